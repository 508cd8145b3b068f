"""Fig. 4b, PatternNet and PatternAttribution with every estimator: ``python -m experiments.fig4b_estimators --help``.

Writes NETWORK.jpg beside itself: of SqueezeNet with photographs that may be shown, and of the digits.
"""

from pathlib import Path

from experiments.jobs import DIGITS, SQUEEZENET
from experiments.pictures import gallery

if __name__ == "__main__":
    gallery("fig4b", {DIGITS: "image=0", SQUEEZENET: "image=2"}, Path(__file__).parent, __doc__)
