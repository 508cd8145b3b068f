"""Fig. 4a on three networks, every estimator and every method: ``python -m experiments.fig4a_degradation --help``.

Writes NETWORK.csv, NETWORK.png, order.csv and the tables of README.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.jobs import CIFAR, DIGITS, SQUEEZENET, arguments, folder, given, settings, sweep
from experiments.pages import beside_others, markdown, write_block
from pattern_bench.plotting.figures import draw_degradation
from pattern_bench.results.labels import plain
from pattern_bench.results.schema import write_csv

HERE = Path(__file__).parent
SWEEPS = {
    "attribution": "estimator=random,x,w,a,a_plus_minus",
    "signal": "method=pattern_net estimator=random,w,a,a_plus_minus",
    "other": "estimator=x method=gradient,deconvnet,guided_backprop,integrated_gradients,smoothgrad",
}
SLOW = "estimator=x method=occlusion,prediction_difference"
TITLES = {DIGITS: "small VGG, digits", CIFAR: "VGG with dense layers, CIFAR-10", SQUEEZENET: "SqueezeNet 1.1"}
IMAGES = {DIGITS: 359, CIFAR: 500, SQUEEZENET: 50}
# Thousands of forward passes an image: of fewer images, and in coarser steps than the default.
FEWER = {
    DIGITS: ["degradation.images=359"],
    CIFAR: ["degradation.images=50", "++method.stride=2"],
    SQUEEZENET: ["degradation.images=20", "++method.window=16", "++method.stride=16"],
}
BEST = "PatternAttribution, S_a+-"

USUAL, LEAST = "as usual", "least relevant first"
CHANGES = {"blurred": ["degradation.replacement=blur"], LEAST: ["degradation.order=least"]}
COARSE = {"constant 0": ["degradation.replacement=constant"], "patches of 4×4": ["degradation.patch=4"]}
INVESTIGATED = {DIGITS: CHANGES | COARSE, CIFAR: CHANGES | COARSE, SQUEEZENET: CHANGES | {"200 images": []}}
MORE = 200
PAPER = ("random order", "PatternAttribution, S_a", "PatternAttribution, S_w", "S_x (LRP z-rule, input × gradient)")
"""From the worst on, with S_a+- the best."""


def measure(network: str, runs: Path, chosen: list[str], slow: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean curves, and areas over the curves of each image."""
    chosen = [*chosen, "explanation.images=1"]
    images = f"degradation.images={IMAGES[network]}"
    roots = [sweep(runs / f"{network}-{name}", *chosen, images, *which.split()) for name, which in SWEEPS.items()]
    if slow:
        roots.append(sweep(runs / f"{network}-slow", *chosen, *SLOW.split(), *FEWER[network]))
    jobs = [path.parent for root in roots for path in sorted(root.glob("*/summary.json"))]
    curves, areas = (
        pd.concat([pd.read_csv(job / name) for job in jobs], ignore_index=True)
        for name in ("degradation.csv", "areas.csv")
    )
    keys = ["model", "data", "estimator", "method"]
    # The random order is every job's; the one of the most images stands for all.
    most = curves.groupby(keys).n.transform("max")
    return curves[curves.n == most].drop_duplicates([*keys, "step"]), areas


def title(estimator: str, method: str) -> str:
    if (estimator, method) == ("x", "lrp_z"):
        return "S_x (LRP z-rule, input × gradient)"
    return plain(method) if estimator == "none" else f"{plain(method)}, {plain(estimator)}"


def investigate(network: str, runs: Path, chosen: list[str]) -> dict[str, pd.DataFrame]:
    """Areas of each image with one thing changed, of the explanations in the paper's order."""
    chosen = [*chosen, "explanation.images=1", "estimator=x,w,a,a_plus_minus"]
    found = {}
    for what, changes in INVESTIGATED[network].items():
        images = f"degradation.images={IMAGES[network] if changes else MORE}"
        root = sweep(runs / f"{network}-{re.sub(r'[^a-z0-9]+', '-', what)}", *chosen, images, *changes)
        found[what] = pd.concat(
            [pd.read_csv(path.parent / "areas.csv") for path in sorted(root.glob("*/summary.json"))]
        )
    return found


def by_image(areas: pd.DataFrame) -> pd.DataFrame:
    """A row for each image, a column for each method. How patches were ordered and replaced, which follows a comma, is
    no part of its name."""
    methods = areas.method.str.partition(", ")[0]
    named = areas.assign(method=[title(*pair) for pair in zip(areas.estimator, methods, strict=True)])
    return named.drop_duplicates(["image", "method"]).pivot(index="image", columns="method", values="area")


def steps(areas: pd.DataFrame, sign: int = 1) -> pd.DataFrame:
    """From each place of the paper's order to the next: the mean difference of the area, image by image, and its 95 %
    bootstrap interval; times ``sign``."""
    wide = by_image(areas)
    rows = []
    for worse, better in zip(PAPER, (*PAPER[1:], BEST), strict=True):
        apart = sign * (wide[better] - wide[worse]).dropna().to_numpy()
        low, high = interval(apart)
        rows.append({"step": f"{short(worse)} < {short(better)}", "images": len(apart), "difference": apart.mean()})
        rows[-1] |= {"low": low, "high": high}
    return pd.DataFrame(rows)


def short(method: str) -> str:
    return method.removeprefix("PatternAttribution, ").partition(" (")[0]


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(10_000, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def order(found: pd.DataFrame) -> str:
    """Rows: what was measured. Bold: an interval without 0, whichever way."""
    rows = []
    for (network, what), of in found.groupby(["network", "changed"], sort=False):
        row = {"network": TITLES[str(network)], "changed": what, "images": str(of.images.max())}
        for step, *values in of[["step", "difference", "low", "high"]].itertuples(index=False):
            mean, low, high = map(float, values)
            cell = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
            row[step] = f"**{cell}**" if low * high > 0 else cell
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def ranking(areas: pd.DataFrame) -> pd.DataFrame:
    """By method: images, mean area over the curve and its 95 % bootstrap interval over images; and of the difference
    to PatternAttribution with S_a+-, image by image, mean and interval."""
    wide = by_image(areas)
    rows = []
    for method in wide:
        own = wide[method].dropna().to_numpy()
        apart = (wide[method] - wide[BEST]).dropna().to_numpy()
        row = {"method": method, "images": len(own), "area": own.mean(), "difference": apart.mean()}
        for name, values in (("area", own), ("difference", apart)):
            row[f"{name}_low"], row[f"{name}_high"] = interval(values)
        rows.append(row)
    # By the difference, since areas of other images do not compare.
    return pd.DataFrame(rows).sort_values("difference", ascending=False, ignore_index=True)


def table(ranked: pd.DataFrame) -> str:
    rows = [
        {
            "": str(place + 1),
            "method": row.method,
            "images": str(row.images),
            "area over the curve": f"{row.area:.3f} ({row.area_low:.3f} to {row.area_high:.3f})",
            "less PatternAttribution, S_a+-": "–" if row.method == BEST
            else f"{row.difference:+.3f} ({row.difference_low:+.3f} to {row.difference_high:+.3f})",
        }
        for place, row in enumerate(ranked.itertuples())
    ]  # fmt: skip
    return markdown(pd.DataFrame(rows))


def keep_order(network: str, found: dict[str, pd.DataFrame]) -> None:
    """What is known of the paper's order, with what is found of this network in the place of what was."""
    made = [steps(areas, -1 if what == LEAST else 1).assign(changed=what) for what, areas in found.items()]
    file = HERE / "order.csv"
    new = beside_others(file, pd.concat(made).assign(network=network), ["network", "changed"])
    rank = [list(TITLES), [USUAL, *CHANGES, *COARSE, "200 images"]]
    new = new.sort_values(["network", "changed"], key=lambda c: c.map(rank[c.name == "changed"].index), kind="stable")
    write_csv(file, new)
    write_block(HERE / "README.md", "order", order(new))


def main() -> None:
    options_of = arguments(__doc__, TITLES)
    options_of.add_argument("--networks", nargs="+", choices=TITLES, default=list(TITLES), help="these alone")
    fast = "without occlusion and prediction difference; written below --runs instead"
    options_of.add_argument("--fast", action="store_true", help=fast)
    options_of.add_argument("--investigate", action="store_true", help="the paper's order with one thing changed, too")
    options = options_of.parse_args()
    for network in given(options.networks, options):
        curves, areas = measure(network, options.runs, settings(network, options), not options.fast)
        place = folder(options.runs) if options.fast else HERE
        # Curves of other images begin elsewhere.
        draw_degradation(curves[curves.n == curves.n.max()], place / f"{network}.png")
        ranked = ranking(areas)
        write_csv(place / f"{network}.csv", ranked)
        if options.fast:
            print(table(ranked))
        else:
            write_block(HERE / "README.md", network, table(ranked))
            found = {USUAL: areas}
            if options.investigate:
                found |= investigate(network, options.runs, settings(network, options))
            keep_order(network, found)


if __name__ == "__main__":
    main()
