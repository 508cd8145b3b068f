"""Fig. 5, every method on some images: ``python -m experiments.fig5_gallery --help``.

Writes NETWORK.jpg beside itself: of SqueezeNet with photographs that may be shown, and of the digits.
"""

from pathlib import Path

from experiments.jobs import DIGITS, SQUEEZENET
from experiments.pictures import gallery

HERE = Path(__file__).parent


def main() -> None:
    gallery("fig5", {DIGITS: "images=4", SQUEEZENET: "images=3"}, HERE, __doc__)


if __name__ == "__main__":
    main()
