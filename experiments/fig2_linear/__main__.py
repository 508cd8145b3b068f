"""The linear example of the paper's section 2 and Fig. 2: ``python -m experiments.fig2_linear``.

Turns the distractor and asks every method of the suite for the signal, which is known. Writes angles.csv, weights.csv,
trained.csv, fig2.png and the tables of README.md beside itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import jobs
from experiments.fig2_linear.angles import ATTRIBUTIONS, SIGNALS, angles_at, over_seeds, weights_at
from experiments.fig2_linear.figure import draw
from experiments.pages import markdown, with_error, write_block
from pattern_bench.results.schema import write_csv

HERE = Path(__file__).parent
PHIS = tuple(range(5, 180, 5))
TABLED = (15, 45, 75, 90, 135)
TRAINED = (20, 45, 75, 135)
SEEDS, SAMPLES, EXPLAINED = 10, 10_000, 100
JOB_SEEDS = 3


def main() -> None:
    parser = jobs.arguments(__doc__, [])
    parser.add_argument("--quick", action="store_true", help="a few angles and samples, written below --runs instead")
    options = parser.parse_args()
    place = jobs.folder(options.runs / "fig2_linear") if options.quick else HERE
    phis, seeds, samples = (TABLED, 2, 500) if options.quick else (PHIS, SEEDS, SAMPLES)
    angles = pd.concat(angles_at(phi, seed, samples, EXPLAINED) for phi in phis for seed in range(seeds))
    weights = pd.concat(weights_at(phi, seed, samples) for phi in phis for seed in range(seeds))
    found = over_seeds(angles)
    write_csv(place / "angles.csv", found.round(4))
    write_csv(place / "weights.csv", weights.round(6))
    draw(found, weights, place / "fig2.png", samples)
    if options.quick:
        return
    trained = by_jobs(options.runs / "fig2_linear")
    write_csv(HERE / "trained.csv", trained.round(4))
    page = HERE / "README.md"
    for tells in (SIGNALS, ATTRIBUTIONS):
        write_block(page, tells, angle_table(found[found.tells == tells]))
    write_block(page, "exactness", exactness(found))
    write_block(page, "weights", weight_table(weights))
    write_block(page, "trained", trained_table(trained))


def by_jobs(folder: Path) -> pd.DataFrame:
    """The main job on the example: degrees between the signal and the filter that Adam learns, and S_a's pattern."""
    jobs.sweep(
        folder, "data=toy", "estimator=a", f"data.angle={','.join(map(str, TRAINED))}",
        f"data.data_seed={','.join(map(str, range(JOB_SEEDS)))}", "quiet=true",
    )  # fmt: skip
    rows = []
    for file in sorted(folder.glob("*/summary.json")):
        overrides = dict(line.removeprefix("- ").split("=", 1) for line in
                         (file.parent / ".hydra" / "overrides.yaml").read_text().splitlines())  # fmt: skip
        measured = json.loads(file.read_text())["signal_angle_degrees"]
        rows.append({"phi": int(overrides["data.angle"]), "seed": int(overrides["data.data_seed"]), **measured})
    return pd.DataFrame(rows).sort_values(["phi", "seed"])


def angle_table(angles: pd.DataFrame) -> str:
    """Methods by φ: the exact angle, ± its deviation over seeds where it depends on what is drawn; its range over all
    φ; the angle from samples; the deviation over samples of one seed."""

    def cell(row: Any) -> str:
        return with_error(row["mean"], row.sd_seeds if row.sd_seeds > 0.05 else float("nan"), 1)

    rows = []
    for method, own in angles.groupby("method", sort=False):
        exactly, found = (own[own.fit == fit].set_index("phi") for fit in ("exact", "samples"))
        row = {"method": method} | {f"{phi}°": cell(exactly.loc[phi]) for phi in TABLED}
        row["least to most"] = f"{exactly['mean'].min():.1f} to {exactly['mean'].max():.1f}"
        row["45°, fitted"] = cell(found.loc[45])
        row["45°, SD over x"] = f"{exactly.sd_samples[45]:.1f}"
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def exactness(angles: pd.DataFrame) -> str:
    """The largest exact angle of S_a's two methods, which is rounding."""
    own = angles[(angles.fit == "exact") & angles.method.str.endswith((" S_a", " S_a+-"))]
    largest = own.groupby("method", sort=False)["mean"].max()
    return "; ".join(f"{method}: {value:.0e}°" for method, value in largest.items())


def weight_table(weights: pd.DataFrame) -> str:
    """w and a by φ, exact, and from samples as mean ± standard deviation over seeds."""
    rows = []
    for phi in TABLED:
        means = weights[weights.phi == phi].groupby("fit")[["w1", "w2", "a1", "a2"]].agg(["mean", "std"])
        at: Any = means.round(3) + 0.0  # no -0.000
        row = {"φ": f"{phi}°"}
        for name in ("w", "a"):
            pairs = [(at.loc[fit, f"{name}1"], at.loc[fit, f"{name}2"]) for fit in ("exact", "samples")]
            row[f"{name}, exact"] = f"({', '.join(format(part['mean'], '.3f') for part in pairs[0])})"
            row[f"{name}, fitted"] = f"({', '.join(with_error(part['mean'], part['std'], 3) for part in pairs[1])})"
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def trained_table(trained: pd.DataFrame) -> str:
    """Degrees to the signal by φ, mean ± standard deviation over seeds."""
    rows = []
    for phi, own in trained.groupby("phi"):
        row = {"φ": f"{phi}°"}
        for title, column in (("filter w to the signal", "filter"), ("pattern a to the signal", "pattern")):
            row[title] = with_error(own[column].mean(), own[column].std())
        rows.append(row)
    return markdown(pd.DataFrame(rows))


if __name__ == "__main__":
    main()
