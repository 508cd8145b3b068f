"""Fig. 5, every method on some images: ``python -m experiments.fig5_gallery --help``.

Writes NETWORK.jpg beside itself: of SqueezeNet with photographs that may be shown, and of the digits.
"""

from pathlib import Path

from experiments.jobs import DIGITS, SQUEEZENET
from experiments.pictures import gallery

if __name__ == "__main__":
    gallery("fig5", {DIGITS: "images=4", SQUEEZENET: "images=3"}, Path(__file__).parent, __doc__)
