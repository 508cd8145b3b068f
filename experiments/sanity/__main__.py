"""Whether explanations change with the network and with what is asked: ``python -m experiments.sanity --help``.

Runs ``python -m pattern_bench.sanity`` on SqueezeNet and on the digits. Writes sanity.csv, NETWORK-randomisation.png,
NETWORK-convergence.png and the tables of README.md.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.jobs import DIGITS, SQUEEZENET, arguments, given, settings, sweep
from experiments.pages import beside_others, markdown, with_error, write_block
from experiments.pictures import keep_small
from pattern_bench.methods import by_name
from pattern_bench.results.labels import plain
from pattern_bench.results.schema import write_csv

HERE = Path(__file__).parent
# SqueezeNet's images are of 300 of the reader's photographs, as many as are decoded in a moment.
CHANGES = {SQUEEZENET: ["data.limit=300"], DIGITS: []}
PICTURES = ("randomisation", "convergence")
ABSOLUTE, SIGNED, COSINE = "spearman_absolute", "spearman_signed", "cosine_absolute"


def main() -> None:
    options = arguments(__doc__, CHANGES).parse_args()
    for network in given(CHANGES, options):
        root = sweep(
            options.runs / f"sanity-{network}", *settings(network, options), *CHANGES[network],
            module="pattern_bench.sanity",
        )  # fmt: skip
        (file,) = root.glob("*/sanity.csv")
        table = pd.read_csv(file)
        for name in PICTURES:
            keep_small(file.parent / f"{name}.png", HERE / f"{network}-{name}.png")
        write_csv(HERE / "sanity.csv", beside_others(HERE / "sanity.csv", table, ["model", "data"]))
        write_block(HERE / "README.md", f"{network}-randomisation", randomisation(table))
        write_block(HERE / "README.md", f"{network}-convergence", convergence(table))


def randomisation(table: pd.DataFrame) -> str:
    """Rank correlation with the trained network's heat maps, with the last layer random and with all, by method."""
    rows = table[table.check == "randomisation"]
    ends = {"last layer random": rows.layer_index.max(), "all layers random": 0}
    return by_method(
        rows,
        {
            f"{of}, {end}": (rows.measure == measure) & (rows.layer_index == index)
            for of, measure in (("absolute", ABSOLUTE), ("signed", SIGNED))
            for end, index in ends.items()
        },
    )


def convergence(table: pd.DataFrame) -> str:
    """Absolute cosine between the directions that were started from: at the output, and at the image, by method."""
    rows = table[(table.check == "convergence") & (table.measure == COSINE)]
    return by_method(
        rows,
        {
            "at the output": rows.layer_index == rows.layer_index.max(),
            "at the image": rows.layer_index == 0,
        },
    )


def by_method(rows: pd.DataFrame, columns: dict[str, pd.Series]) -> str:
    """A row for each method, in the suite's order, with mean ± standard deviation over images, and the number of images
    behind them."""
    lines = []
    for method in (name for name in by_name() if (rows.method == name).any()):
        cells = {title: rows[chosen & (rows.method == method)].iloc[0] for title, chosen in columns.items()}
        images = sorted({int(cell["n"]) for cell in cells.values()})
        lines.append(
            {"method": plain(method)}
            # No -0.00.
            | {title: with_error(round(cell["mean"], 2) + 0.0, cell["std"]) for title, cell in cells.items()}
            | {"images": " to ".join(str(n) for n in dict.fromkeys((images[0], images[-1])))}
        )
    return markdown(pd.DataFrame(lines))


if __name__ == "__main__":
    main()
