"""The tables of the page."""

from __future__ import annotations

import pandas as pd

from experiments.benchmark.moments import RHO
from experiments.benchmark.rows import ATTRIBUTION, CHANNELS_LAST, EVERYTHING, FORWARD, PATTERNS
from experiments.benchmark.subjects import MOBILENET, SQUEEZENET, VGG16
from experiments.pages import markdown

CONV = [f"conv{block}_{i}" for block, layers in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, layers + 1)]
"""VGG-16's layers in the paper's terms."""
NETWORKS = {VGG16: "VGG-16's conv layers", SQUEEZENET: "SqueezeNet 1.1", MOBILENET: "MobileNetV2"}


def of_vgg16(table: pd.DataFrame) -> str:
    """Every row of VGG-16: the largest batch with seconds and distance from the floor, the others by ratio alone."""
    own = table[table.network == VGG16]
    first, *others = sorted(own.batch.unique(), reverse=True)
    lines = []
    for what, rows in own.groupby("what", sort=False):
        at = rows.set_index("batch")
        line = {"": what, f"batch {first:g}: × forward (range)": ratio(at.loc[first])}
        line |= {"seconds": f"{at.seconds[first]:#.3g}", "× floor": f"{at.of_floor[first]:.1f}"}
        line |= {f"batch {batch:g}: × forward (range)": ratio(at.loc[batch]) for batch in others}
        lines.append(line)
    return markdown(pd.DataFrame(lines))


def of_rho(table: pd.DataFrame) -> str:
    """The time that ρ takes, as a sentence."""
    (row,) = table[table.what == RHO].itertuples()
    return (
        "ρ of all 512 neurons of a layer with D = 4,608, the four estimators that have one and both closed-form "
        f"criteria: {row.seconds:.1f} s,\n{row.of_floor:.1f} times the floor of its float64 operations."
    )


def by_network(table: pd.DataFrame) -> str:
    """Some rows of the networks of large and of small patches, at the smallest batch."""
    batch = table[table.network == VGG16].batch.min()
    own = table[table.network.isin(NETWORKS) & (table.batch == batch)].set_index(["what", "network"])
    lines = [{"": "forward, seconds"} | {title: f"{own.seconds[FORWARD, n]:#.3g}" for n, title in NETWORKS.items()}]
    for what in (CHANNELS_LAST, PATTERNS, EVERYTHING, ATTRIBUTION):
        lines.append({"": what} | {title: ratio(own.loc[(what, n)]) for n, title in NETWORKS.items()})
    return markdown(pd.DataFrame(lines))


def of_positions(errors: pd.DataFrame) -> str:
    """Errors of patterns from sampled positions, by layer of VGG-16."""
    lines = [
        {
            "layer": layer,
            "positions": f"{row.positions:,}",
            "S_a": f"{row.a_median:.1%}",
            "S_a+-, a₊": f"{row.a_plus_minus_median:.1%}",
        }
        for layer, row in zip(CONV, errors.itertuples(), strict=True)
    ]
    return markdown(pd.DataFrame(lines))


def ratio(row: pd.Series) -> str:
    """``3.5 (3.3 to 3.5)``; the forward pass itself is ``1``."""
    if row.least == row.most == 1:
        return "1"
    return f"{digits(row.ratio)} ({digits(row.least)} to {digits(row.most)})"


def digits(value: float) -> str:
    """One digit after the point, below 1 two."""
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"
