"""The tables of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.pages import markdown, with_error
from experiments.scaling.cost import EVERYTHING, FORWARD, PATTERNS, exponent, solve_rate
from experiments.scaling.projection import passes

SHOWN_GPUS = (1, 8, 64)
CLOSE = 0.1


def by_images(patterns: pd.DataFrame, rho: pd.DataFrame) -> str:
    """By n: the median over layers of each error, its mean ± standard deviation over draws."""

    def over(table: pd.DataFrame, value: str, n: int) -> str:
        by_draw = table[table.n == n].groupby("draw")[value].median()
        return with_error(by_draw.mean(), by_draw.std()) if len(by_draw) else "–"

    rows = []
    for n in sorted({*patterns.n, *rho.n}):
        row = {"images n": str(n)}
        for name in ("a", "a₊", "a₋"):
            row[f"{name}: two fits apart"] = over(patterns[patterns.pattern == name], "disjoint", n)
        for name in ("a", "a₊"):
            row[f"{name}: from the full fit"] = over(patterns[patterns.pattern == name], "full", n)
        for criterion in ("all", "rectified"):
            own = rho[(rho.estimator == "a_plus_minus") & (rho.criterion == criterion)]
            row[f"ρ of S_a+-, {criterion}"] = over(own, "rho", n)
            row[f"off, {criterion}"] = over(own, "off", n)
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def law(patterns: pd.DataFrame) -> str:
    """p of error ~ nᵖ by pattern: median over layers, least and most."""
    said = []
    for name, own in patterns.groupby("pattern", sort=False):
        means = own.groupby(["layer", "n"]).disjoint.mean().reset_index().assign(what=name)
        found = [exponent(layer, "n", str(name), "disjoint") for _, layer in means.groupby("layer")]
        said.append(f"{name}: {pd.Series(found).median():.2f} ({min(found):.2f} to {max(found):.2f})")
    return "; ".join(said)


def by_layer(patterns: pd.DataFrame, rho: pd.DataFrame, about: pd.DataFrame, counts: Sequence[int]) -> str:
    """By layer: D, positions of an image; errors at some n, mean over draws; and how many images would bring a fit to
    within ``CLOSE`` of the truth, if errors fall with the root of n.

    Two fits that share no image are √2 times as far from each other as each is from the truth.
    """
    distance: Any = patterns.groupby(["layer", "pattern", "n"]).disjoint.mean()
    chosen = rho[(rho.estimator == "a_plus_minus") & (rho.criterion == "all")]
    median: Any = chosen.groupby(["layer", "n"]).rho.mean()
    most = max(patterns.n)
    rows = []
    for name, d, positions in zip(about.layer, about.d, about.positions, strict=True):
        row = {"layer": str(name), "D": str(d), "positions": str(positions)}
        for pattern in ("a", "a₊"):
            far = distance[name, pattern]
            row |= {f"{pattern}, n = {n}": f"{far[n]:.2f}" for n in counts}
            row[f"{pattern}: images for {CLOSE:.0%}"] = f"{most * (far[most] / CLOSE) ** 2 / 2:.0f}"
        row |= {f"ρ, n = {n}": f"{value:.2f}" for n, value in median[name].items() if n in {*counts, max(rho.n)}}
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def by_share(patterns: pd.DataFrame, rho: pd.DataFrame, cost: pd.DataFrame, sampled: Sequence[str]) -> str:
    """By share of positions: the median over the layers that are sampled, and what it costs."""
    rows = []
    for share in sorted(cost.share.unique(), reverse=True):
        own = cost[cost.share == share].set_index("what")
        row = {"share": f"{share:g}"}
        for name in ("a", "a₊"):
            errors = patterns[(patterns.share == share) & (patterns.pattern == name) & patterns.layer.isin(sampled)]
            row[f"{name}: from all positions"] = f"{errors.full.median():.2f}" if len(errors) else "0"
        for criterion in ("all", "rectified"):
            off = rho[(rho.share == share) & (rho.estimator == "a_plus_minus") & (rho.criterion == criterion)]
            off = off[off.layer.isin(sampled)].off
            row[f"ρ, {criterion}: off"] = f"{off.median():.3f}" if len(off) else "0"
        for title, what in (("patterns", PATTERNS), ("everything for ρ", EVERYTHING)):
            row[f"{title}, × forward"] = _ratio(own.loc[what])
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def _ratio(row: Any) -> str:
    return f"{row.ratio:.1f} ({row.least:.1f} to {row.most:.1f})"


def growth(images: pd.DataFrame, width: pd.DataFrame) -> str:
    """Seconds and memory by images; seconds by width; exponents of both."""
    rows = []
    for over, table, memory in (("images", images, True), ("channels", width, False)):
        for what, own in table.groupby("what", sort=False):
            own = own.set_index(over)
            few, many = own.index.min(), own.index.max()
            row = {"what": f"{what}, by {over}", "from": f"{few}: {own.seconds[few]:.3g} s",
                   "to": f"{many}: {own.seconds[many]:.3g} s",
                   "exponent": f"{exponent(table, over, str(what)):.2f}",
                   "× forward": "–" if what == FORWARD else f"{own.ratio[few]:.1f} to {own.ratio[many]:.1f}",
                   "most memory (MiB)": f"{own.mib[few]:.0f} to {own.mib[many]:.0f}" if memory else "–"}  # fmt: skip
            rows.append(row)
    return markdown(pd.DataFrame(rows))


def networks(measured: pd.DataFrame) -> str:
    """Of the networks that were measured: seconds, ratios, operations, and the moments' size."""
    rows = []
    for name, own in measured.groupby("network", sort=False):
        own = own.set_index("what")
        gflop = own.operations[FORWARD] / 1e9
        seconds = own.seconds[FORWARD] / own.images[FORWARD]
        row = {"network": str(name), "forward, ms an image": f"{1000 * seconds:.1f}", "GFLOP": f"{gflop:.2f}",
               "GFLOP/s": f"{gflop / seconds:.0f}"}  # fmt: skip
        for title, what in (("patterns", PATTERNS), ("everything for ρ", EVERYTHING)):
            row[f"{title}, × forward"] = _ratio(own.loc[what])
            row[f"{title}, operations"] = f"{own.operations[what] / own.operations[FORWARD]:.1f}"
        row["moments, GiB"] = f"{own.bytes.max() / 2**30:.2f}"
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def on_gpus(rows: pd.DataFrame, about: pd.DataFrame, decoding: float) -> str:
    """The projection: minutes, speedup, and the parts that are not shared out, in seconds."""
    found = []
    for one in about.itertuples():
        own = rows[rows.network == one.network].set_index("gpus")
        serial = own.reducing[64] + own.storing[64] + own.solving[64]
        forwards = f"{one.patterns:.1f}, {one.everything:.1f}" + ("" if one.measured else " (counted)")
        row = {"network": one.network, "GFLOP": f"{one.gflop:.1f}", "× forward": forwards}
        row |= {f"minutes, {g} GPU{'s' * (g > 1)}": f"{own.seconds[g] / 60:.1f}" for g in SHOWN_GPUS}
        row["speedup at 64"] = f"{own.speedup[64]:.0f}"
        row["reducing, storing, solving (s)"] = ", ".join(
            f"{own[part][64]:.1f}" for part in ("reducing", "storing", "solving")
        )
        row["half used from (GPUs)"] = f"{own.streaming[1] / serial:,.0f}"
        row["cores to decode for one GPU"] = f"{own.images_per_second[1] / decoding:.1f}"
        found.append(row)
    return markdown(pd.DataFrame(found))


def on_this_machine(measured: pd.DataFrame, about: Mapping[str, float], width: pd.DataFrame) -> str:
    """The same protocol on the processor that the rates were measured on, in days; ρ's solves in minutes.

    Args:
        measured: of ``cost.by_network``.
        about: float64 operations (TFLOP) of ρ's solves by network.
        width: of ``cost.by_width``.
    """
    rows = []
    for name, own in measured.groupby("network", sort=False):
        if name not in about:
            continue
        own = own.set_index("what")
        seconds = own.seconds[FORWARD] / own.images[FORWARD] * passes(own.ratio[PATTERNS], own.ratio[EVERYTHING])
        solving = about[str(name)] * 1e12 / solve_rate(width)
        title = f"solving, minutes ({solve_rate(width) / 1e9:.0f} GFLOP/s in float64)"
        rows.append({"network": str(name), "streaming, days": f"{seconds / 86400:.1f}", title: f"{solving / 60:.1f}"})
    return markdown(pd.DataFrame(rows)) if rows else "(nothing)"
