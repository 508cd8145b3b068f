"""Fig. 4b, PatternNet and PatternAttribution with every estimator: ``python -m experiments.fig4b_estimators --help``.

Writes NETWORK.jpg beside itself: of SqueezeNet with photographs that may be shown, and of the digits.
"""

from pathlib import Path

from experiments.jobs import DIGITS, SQUEEZENET
from experiments.pictures import gallery

HERE = Path(__file__).parent


def main() -> None:
    gallery("fig4b", {DIGITS: "image=0", SQUEEZENET: "image=2"}, HERE, __doc__)


if __name__ == "__main__":
    main()
