"""Fig. 3 on four networks, under three criteria: ``python -m experiments.fig3_signal_estimators --help``.

Writes by_layer.csv, summary.csv and NETWORK.png beside itself, and the tables of README.md.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.jobs import CIFAR, DIGITS, SQUEEZENET, VGG16, arguments, given, settings, sweep
from experiments.pages import markdown, with_error, write_block
from pattern_bench.figures import draw_rho
from pattern_bench.results import write_csv

HERE = Path(__file__).parent
ESTIMATORS = ("random", "w", "a", "a_plus_minus")
CRITERIA = ("all", "rectified", "positive")
TITLES = {
    DIGITS: "small VGG, digits", CIFAR: "VGG with dense layers, CIFAR-10", SQUEEZENET: "SqueezeNet 1.1, photographs",
    VGG16: "VGG-16's conv layers, photographs",
}  # fmt: skip
# VGG-16's patches have up to 4,608 values: ten chunks of its Gram matrices take 20 GB, and each neuron's own 170 MB.
BOOTSTRAP = {
    DIGITS: ["bootstrap.resamples=50"],
    CIFAR: ["bootstrap.resamples=20"],
    SQUEEZENET: ["bootstrap.resamples=20"],
    VGG16: ["bootstrap.resamples=5", "bootstrap.chunks=10", "data.batch_size=8"],
}
FIRING = {
    DIGITS: ["probe.neurons=1000", *BOOTSTRAP[DIGITS]],
    CIFAR: ["probe.neurons=10", "moments.positions=0.25", "bootstrap.resamples=20", "bootstrap.chunks=5"],
    SQUEEZENET: ["probe.neurons=32", *BOOTSTRAP[SQUEEZENET]],
    VGG16: ["probe.neurons=6", "moments.positions=0.1", "data.batch_size=8", "checkpoint.seconds=600"],
}
# These jobs are there for ρ.
NOTHING_ELSE = ["explanation.images=1", "degradation.images=1", "degradation.steps=1"]


def measure(network: str, runs: Path, chosen: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """ρ of every neuron, and its means by layer and resample, from the runs of a network."""
    estimators = f"estimator={','.join(ESTIMATORS)}"
    shared = sweep(
        runs / network, *chosen, *NOTHING_ELSE, *BOOTSTRAP[network], estimators, f"criterion={','.join(CRITERIA[:2])}"
    )
    firing = sweep(
        runs / f"{network}-positive", *chosen, *NOTHING_ELSE, *FIRING[network], estimators, "criterion=positive"
    )
    folders = [path.parent for root in (shared, firing) for path in sorted(root.glob("*/summary.json"))]
    drawn = [folder / "bootstrap.csv" for folder in folders if (folder / "bootstrap.csv").exists()]
    return (
        pd.concat([pd.read_csv(folder / "rho.csv") for folder in folders], ignore_index=True),
        pd.concat([pd.read_csv(file) for file in drawn], ignore_index=True),
    )


OWN_MEANS = ["estimator._target_=experiments.fig3_signal_estimators.regimes.OwnMeans", "allow_any_target=true"]
FEW = "bootstrap.resamples=2"
"""As chunks are kept anyway, so that they are used again."""


def investigate(network: str, runs: Path, chosen: list[str]) -> pd.DataFrame:
    """ρ of every neuron, with one thing changed: what S_a+- is, λ, and, where that does not train another network, the
    split."""
    chosen = [*chosen, *NOTHING_ELSE]
    shared, regular = [*BOOTSTRAP[network], FEW], "criterion=all,rectified"
    estimators = "estimator=a,a_plus_minus"
    found = {"each regime's own means": [sweep(runs / f"{network}-own", *chosen, *shared, *OWN_MEANS, regular)]}
    if network == DIGITS:  # elsewhere it takes a while
        firing = [*chosen, *FIRING[network], FEW, "criterion=positive"]
        found["each regime's own means"] += [sweep(runs / f"{network}-own-positive", *firing, *OWN_MEANS)]
    for ridge in ("1e-6", "1e-2"):
        changed = f"probe.regularisation={ridge}"
        found[f"λ = {ridge}"] = [sweep(runs / f"{network}-{ridge}", *chosen, *shared, estimators, regular, changed)]
        if network == DIGITS:
            found[f"λ = {ridge}"] += [sweep(runs / f"{network}-{ridge}-positive", *firing, estimators, changed)]
    if network == SQUEEZENET:
        found["other halves (seed 1)"] = [sweep(runs / f"{network}-1", *chosen, estimators, regular, "seed=1")]
    tables = [
        pd.read_csv(path.parent / "rho.csv").assign(changed=what)
        for what, roots in found.items()
        for root in roots
        for path in sorted(root.glob("*/summary.json"))
    ]
    return pd.concat(tables, ignore_index=True)


def in_the_papers_terms(table: pd.DataFrame) -> pd.DataFrame:
    """Layers of a VGG named conv1_1 to fc8: its max-pools end the blocks, and the index in ``features`` tells them."""
    layers = table.drop_duplicates("layer_index").sort_values("layer_index").layer
    if not layers.str.fullmatch(r"(features|classifier)\.\d+").all():
        return table
    names, block, within, before, dense = {}, 1, 0, -2, 5
    for layer in layers:
        part, _, index = layer.partition(".")
        if part == "classifier":
            dense += 1
            names[layer] = f"fc{dense}"
            continue
        block, within = (block + 1, 1) if int(index) - before > 2 else (block, within + 1)
        names[layer], before = f"conv{block}_{within}", int(index)
    return table.assign(layer=table.layer.map(names))


def kind(layer: pd.Series) -> pd.Series:
    return layer.map(lambda name: "dense" if name.startswith("fc") else "conv")


KEYS = ["criterion", "layer_index", "layer", "estimator"]


def by_layer(rho: pd.DataFrame, bootstrap: pd.DataFrame) -> pd.DataFrame:
    """Per criterion, layer and estimator: mean, median and quartiles over the neurons that have a ρ; the standard
    error of the mean over images (bootstrap), or, where none were drawn again, over neurons."""
    cells = rho.groupby(KEYS, sort=False)
    found = cells.rho.agg(
        mean="mean", median="median", q25=lambda r: r.quantile(0.25), q75=lambda r: r.quantile(0.75), neurons="count"
    )
    found["dead"] = cells.dead.sum()
    found["error"] = bootstrap.groupby(KEYS, sort=False)["mean"].std()
    found["error_over"] = found.error.isna().map({True: "neurons", False: "images"})
    found["error"] = found.error.fillna(cells.rho.std() / found.neurons**0.5)
    return found.reset_index()


def over_layers(network: str, layers: pd.DataFrame, bootstrap: pd.DataFrame) -> pd.DataFrame:
    """Mean over layers of the layers' means: of the first layer, of the conv layers above it, of the dense layers.
    Resamples draw the same images for all layers, so that errors of one layer and another are not independent."""

    def grouped(table: pd.DataFrame, *more: str) -> pd.Series:
        where = kind(table.layer).where(table.layer_index > 0, "first")
        return table.assign(where=where).groupby(["criterion", "where", "estimator", *more])["mean"].mean()

    found = grouped(layers).rename("mean").to_frame()
    found["error"] = grouped(bootstrap, "resample").groupby(["criterion", "where", "estimator"]).std()
    return found.reset_index().assign(network=network)


def summary(table: pd.DataFrame) -> str:
    rows = []
    for network in TITLES:
        for criterion in CRITERIA:
            for where, title in (("first", "first"), ("conv", "conv, above it"), ("dense", "dense")):
                cell = table[(table.network == network) & (table.criterion == criterion) & (table["where"] == where)]
                if cell.empty:
                    continue
                values = cell.set_index("estimator")
                rows.append(
                    {"network": TITLES[network], "criterion": criterion, "layers": title}
                    | {name: with_error(*values.loc[name, ["mean", "error"]]) for name in ESTIMATORS}
                )
    found = pd.DataFrame(rows)
    # Said once.
    same_network = found.network.eq(found.network.shift())
    same_criterion = same_network & found.criterion.eq(found.criterion.shift())
    found = found.assign(
        network=found.network.mask(same_network, ""), criterion=found.criterion.mask(same_criterion, "")
    )
    return markdown(found.rename(columns={"w": "S_w", "a": "S_a", "a_plus_minus": "S_a+-"}))


def findings(table: pd.DataFrame, usual: pd.DataFrame) -> str:
    """What was changed, beside the usual: means over layers."""
    where = kind(table.layer).where(table.layer_index > 0, "first")
    keys = ["network", "criterion", "where", "changed"]
    layers = table.assign(where=where).groupby([*keys, "layer", "estimator"]).rho.mean()
    means = layers.groupby([*keys, "estimator"]).mean().unstack("estimator")
    usual = usual.assign(changed="nothing").set_index([*keys, "estimator"])["mean"].unstack("estimator")
    rows = []
    for network in dict.fromkeys(table.network):
        for criterion in CRITERIA:
            for place in ("conv", "dense"):
                for what in ("nothing", *dict.fromkeys(table.changed)):
                    source = (usual if what == "nothing" else means).to_dict("index")
                    if (own := source.get((network, criterion, place, what))) is None:
                        continue
                    shown = {name: own.get(name, float("nan")) for name in ("a", "a_plus_minus")}
                    if what.startswith("each regime"):
                        shown["a_plus_minus"] = own["own_means"]
                    rows.append(
                        {"network": TITLES[network], "criterion": criterion, "layers": place, "changed": what}
                        | {name: "–" if pd.isna(value) else f"{value:.2f}" for name, value in shown.items()}
                    )
    return markdown(pd.DataFrame(rows).rename(columns={"a": "S_a", "a_plus_minus": "S_a+-"}))


def main() -> None:
    options_of = arguments(__doc__, TITLES)
    options_of.add_argument("--networks", nargs="+", choices=TITLES, default=list(TITLES), help="these alone")
    options_of.add_argument("--investigate", action="store_true", help="the second table: what changes with λ, …")
    options = options_of.parse_args()
    everything = HERE / "by_layer.csv"
    tables = [pd.read_csv(everything)] if everything.exists() else []
    summaries = [pd.read_csv(HERE / "summary.csv")] if everything.exists() else []
    for network in given(options.networks, options):
        rho, bootstrap = map(in_the_papers_terms, measure(network, options.runs, settings(network, options)))
        draw_rho(rho, HERE / f"{network}.png", bootstrap)
        layers = by_layer(rho, bootstrap)
        tables = [*(table[table.network != network] for table in tables), layers.assign(network=network)]
        found = over_layers(network, layers, bootstrap)
        summaries = [*(table[table.network != network] for table in summaries), found]
    write_csv(everything, pd.concat(tables))
    write_csv(HERE / "summary.csv", pd.concat(summaries))
    write_block(HERE / "README.md", "table", summary(pd.concat(summaries)))
    if options.investigate:
        changed = [
            in_the_papers_terms(investigate(network, options.runs, settings(network, options))).assign(network=network)
            for network in given([n for n in (DIGITS, CIFAR, SQUEEZENET) if n in options.networks], options)
        ]
        write_block(HERE / "README.md", "investigation", findings(pd.concat(changed), pd.concat(summaries)))


if __name__ == "__main__":
    main()
