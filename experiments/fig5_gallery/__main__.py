"""Fig. 5, every method on some images: ``python -m experiments.fig5_gallery --help``.

Writes NETWORK.jpg beside itself: of SqueezeNet with photographs that may be shown, and of the digits.
"""

from __future__ import annotations

from pathlib import Path

from experiments.jobs import DIGITS, SQUEEZENET, arguments, given, settings, sweep
from experiments.pictures import keep_small, photographs

HERE = Path(__file__).parent
FIGURE = "fig5"
SHOWN = {DIGITS: "images=4", SQUEEZENET: "images=3"}


def main() -> None:
    options = arguments(__doc__, SHOWN).parse_args()
    for network in given(SHOWN, options):
        chosen = [*settings(network, options), f"figure={FIGURE}", SHOWN[network]]
        if network == SQUEEZENET:
            # Patterns from all of the reader's photographs; shown are others.
            shown = photographs(options.runs / "photographs")
            chosen += [f"data.validation_root='{shown}'", "data.fit=0.5", "data.probe=0.5", "data.validation=1.0"]
            chosen += ["percentile=99.5"]
        made = sweep(options.runs / f"{FIGURE}-{network}", *chosen, module="pattern_bench.gallery")
        (picture,) = made.glob(f"*/{FIGURE}.png")
        keep_small(picture, HERE / f"{network}.jpg")


if __name__ == "__main__":
    main()
