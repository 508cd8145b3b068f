"""Fig. 4a on two networks, every estimator and every method: ``python -m experiments.fig4a_degradation --help``.

Writes NETWORK.csv, NETWORK.png and the tables of README.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.jobs import CIFAR, DIGITS, SQUEEZENET, arguments, given, settings, sweep
from experiments.pages import markdown, write_block
from pattern_bench.figures import draw_degradation
from pattern_bench.names import plain
from pattern_bench.results import write_csv

HERE = Path(__file__).parent
SWEEPS = {
    "attribution": "estimator=random,x,w,a,a_plus_minus",
    "signal": "method=pattern_net estimator=random,w,a,a_plus_minus",
    "other": "estimator=x method=gradient,deconvnet,guided_backprop,integrated_gradients,smoothgrad",
}
SLOW = "estimator=x method=occlusion,prediction_difference"
TITLES = {DIGITS: "small VGG, digits", CIFAR: "VGG with dense layers, CIFAR-10", SQUEEZENET: "SqueezeNet 1.1"}
IMAGES = {DIGITS: 359, CIFAR: 500, SQUEEZENET: 50}
# Thousands of forward passes an image: of so many images, and at 224 pixels in coarser steps than the default.
FEWER = {
    DIGITS: ["degradation.images=359"],
    CIFAR: ["degradation.images=50", "++method.stride=2"],
    SQUEEZENET: ["degradation.images=20", "++method.window=16", "++method.stride=16"],
}
BEST = "PatternAttribution, S_a+-"


def measure(network: str, runs: Path, chosen: list[str], slow: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean curves, and areas over the curves of each image."""
    chosen = [*chosen, "explanation.images=1"]
    images = f"degradation.images={IMAGES[network]}"
    roots = [sweep(runs / f"{network}-{name}", *chosen, images, *which.split()) for name, which in SWEEPS.items()]
    if slow:
        roots.append(sweep(runs / f"{network}-slow", *chosen, *SLOW.split(), *FEWER[network]))
    folders = [path.parent for root in roots for path in sorted(root.glob("*/summary.json"))]
    curves, areas = (
        pd.concat([pd.read_csv(folder / name) for folder in folders], ignore_index=True)
        for name in ("degradation.csv", "areas.csv")
    )
    keys = ["model", "data", "estimator", "method"]
    areas = areas.drop_duplicates([*keys, "image"])
    # The random order is every job's; the one of the most images stands for all.
    most = curves.groupby(keys).n.transform("max")
    return curves[curves.n == most].drop_duplicates([*keys, "step"]), areas


def title(estimator: str, method: str) -> str:
    if (estimator, method) == ("x", "lrp_z"):
        return "S_x (LRP z-rule, input × gradient)"
    return plain(method) if estimator == "none" else f"{plain(method)}, {plain(estimator)}"


def ranking(areas: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """By method: images, mean area over the curve and its 95 % bootstrap interval over images; and of the difference
    to PatternAttribution with S_a+-, image by image, mean and interval."""
    named = areas.assign(method=[title(*pair) for pair in zip(areas.estimator, areas.method, strict=True)])
    wide = named.pivot(index="image", columns="method", values="area")
    rows = []
    for method in wide:
        own = wide[method].dropna().to_numpy()
        apart = (wide[method] - wide[BEST]).dropna().to_numpy()
        row = {"method": method, "images": len(own), "area": own.mean(), "difference": apart.mean()}
        for name, values in (("area", own), ("difference", apart)):
            drawn = np.random.default_rng(seed).integers(len(values), size=(10_000, len(values)))
            row[f"{name}_low"], row[f"{name}_high"] = np.quantile(values[drawn].mean(1), [0.025, 0.975])
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


def main() -> None:
    options_of = arguments(__doc__, TITLES)
    options_of.add_argument("--networks", nargs="+", choices=TITLES, default=list(TITLES), help="these alone")
    options_of.add_argument("--fast", action="store_true", help="without occlusion and prediction difference")
    options = options_of.parse_args()
    for network in given(options.networks, options):
        curves, areas = measure(network, options.runs, settings(network, options), not options.fast)
        # Curves of other images begin elsewhere.
        draw_degradation(curves[curves.n == curves.n.max()], HERE / f"{network}.png")
        ranked = ranking(areas)
        write_csv(HERE / f"{network}.csv", ranked)
        write_block(HERE / "README.md", network, table(ranked))


if __name__ == "__main__":
    main()
