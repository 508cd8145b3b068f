"""Fig. 3 on four networks, under three criteria: ``python -m experiments.fig3_signal_estimators --help``.

Writes by_layer.csv, summary.csv, changed.csv and NETWORK.png beside itself, and the tables of README.md.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.jobs import (
    BOOTSTRAP,
    CIFAR,
    DIGITS,
    ESTIMATORS,
    FEW,
    NOTHING_ELSE,
    SQUEEZENET,
    VGG16,
    arguments,
    given,
    settings,
    sweep,
)
from experiments.pages import beside_others, markdown, with_error, write_block
from pattern_bench.plotting.figures import draw_rho
from pattern_bench.results.schema import of_same_neurons, write_csv

HERE = Path(__file__).parent
CRITERIA = ("all", "rectified", "positive")
TITLES = {
    DIGITS: "small VGG, digits", CIFAR: "VGG with dense layers, CIFAR-10", SQUEEZENET: "SqueezeNet 1.1, photographs",
    VGG16: "VGG-16's conv layers, photographs",
}  # fmt: skip
# Each neuron of VGG-16 has a Gram matrix of up to 170 MB of its own.
FIRING = {
    DIGITS: ["probe.neurons=1000", *BOOTSTRAP[DIGITS]],
    CIFAR: ["probe.neurons=10", "moments.positions=0.25", "bootstrap.resamples=20", "bootstrap.chunks=5"],
    SQUEEZENET: ["probe.neurons=32", *BOOTSTRAP[SQUEEZENET]],
    VGG16: ["probe.neurons=6", "moments.positions=0.1", "data.batch_size=8", "checkpoint.seconds=600"],
}


def measure(network: str, runs: Path, chosen: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """ρ of every neuron, and its means by layer and resample (each over all neurons that are live under the estimator),
    from the runs of a network."""
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
USUAL, OWN, OTHER_HALVES = "as usual", "each regime's own means", "other halves"
RIDGES = {"1e-6": "λ = 1e-6", "1e-2": "λ = 1e-2"}


def investigate(network: str, runs: Path, chosen: list[str]) -> pd.DataFrame:
    """ρ of every neuron, with one thing changed: what S_a+- is, λ, and the split of a network that is not trained on
    it."""
    chosen = [*chosen, *NOTHING_ELSE]
    shared, regular = [*BOOTSTRAP[network], FEW], "criterion=all,rectified"
    estimators = "estimator=a,a_plus_minus"
    found = {OWN: [sweep(runs / f"{network}-own", *chosen, *shared, *OWN_MEANS, regular)]}
    if network == DIGITS:  # elsewhere it takes a while
        firing = [*chosen, *FIRING[network], FEW, "criterion=positive"]
        found[OWN] += [sweep(runs / f"{network}-own-positive", *firing, *OWN_MEANS)]
    for ridge, what in RIDGES.items() if network != VGG16 else ():  # there each job takes minutes
        changed = f"probe.regularisation={ridge}"
        found[what] = [sweep(runs / f"{network}-{ridge}", *chosen, *shared, estimators, regular, changed)]
        if network == DIGITS:
            found[what] += [sweep(runs / f"{network}-{ridge}-positive", *firing, estimators, changed)]
    if network == SQUEEZENET:
        found[OTHER_HALVES] = [sweep(runs / f"{network}-1", *chosen, estimators, regular, "seed=1")]
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
    error of the mean over images (bootstrap, of all live neurons of the estimator), or, where none were drawn again,
    over neurons; and what the draw of the neurons adds to the former, where a criterion is measured on fewer than
    another."""
    cells = rho.groupby(KEYS, sort=False)
    found = cells.rho.agg(
        mean="mean", median="median", q25=lambda r: r.quantile(0.25), q75=lambda r: r.quantile(0.75), neurons="count"
    )
    found["dead"] = cells.dead.sum()
    found["error"] = bootstrap.groupby(KEYS, sort=False)["mean"].std()
    found["error_over"] = found.error.isna().map({True: "neurons", False: "images"})
    measured = cells.size()
    unmeasured = 1 - measured / measured.groupby(KEYS[1:]).transform("max")  # as the sample grows to the whole, to 0
    found["error_of_draw"] = (cells.rho.var() * unmeasured / found.neurons) ** 0.5
    found["error"] = found.error.fillna(cells.rho.std() / found.neurons**0.5)
    return found.reset_index()


def compared_by_layer(rho: pd.DataFrame, bootstrap: pd.DataFrame) -> pd.DataFrame:
    """As :func:`by_layer`, over the neurons that have a ρ under all estimators; ``left_out`` is how many others have
    one."""
    layers = by_layer(of_same_neurons(rho, ["criterion", "layer"]), bootstrap)
    return layers.assign(left_out=rho.groupby(KEYS, sort=False).rho.count().to_numpy() - layers.neurons)


def over_layers(layers: pd.DataFrame, bootstrap: pd.DataFrame) -> pd.DataFrame:
    """Mean over layers of the layers' means: of the first layer, of the conv layers above it, of the dense layers; and
    its standard error, over images and, where some neurons stand for a layer, their draw. Resamples draw the same
    images for all layers, so that errors of one layer and another are not independent; neurons are drawn for each."""
    keys = ["criterion", "where", "estimator"]

    def placed(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(where=kind(table.layer).where(table.layer_index > 0, "first"))

    cells = placed(layers).groupby(keys)
    found = cells["mean"].mean().to_frame()
    over_images = placed(bootstrap).groupby([*keys, "resample"])["mean"].mean().groupby(keys).std()
    of_draw = cells.error_of_draw.agg(lambda errors: (errors**2).sum() ** 0.5 / len(errors))
    found["error"] = (over_images.reindex(of_draw.index, fill_value=0) ** 2 + of_draw**2) ** 0.5
    return found.reset_index()


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


def over_changed(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over layers above the first of the layers' means, by what was changed."""
    above = table[table.layer_index > 0]
    layers = above.assign(where=kind(above.layer)).groupby(["criterion", "where", "changed", "layer", "estimator"]).rho
    return layers.mean().groupby(["criterion", "where", "changed", "estimator"]).mean().rename("mean").reset_index()


def beside_usual(usual: pd.DataFrame, changed: pd.DataFrame) -> pd.DataFrame:
    """As :func:`over_changed`, of S_a and S_a+- as usual and of what was changed, over the neurons that have a ρ under
    all of these.

    Args:
        usual: ρ of every neuron.
        changed: the same, and what was ``changed``.
    """
    pair = usual[usual.estimator.isin(("a", "a_plus_minus"))].assign(changed=USUAL)
    both = pd.concat([pair, changed], ignore_index=True)
    return over_changed(of_same_neurons(both, ["criterion", "layer"], ["changed", "estimator"]))


def findings(changed: pd.DataFrame, usual: pd.DataFrame) -> str:
    """S_a / S_a+- as usual and with one thing changed, and what stands in S_a+-'s place. What is usual is of the same
    neurons as what was changed where it was kept beside it, and else that of the first table."""
    keys = ["network", "criterion", "where"]
    both = pd.concat([usual.assign(changed=USUAL), changed])
    values = both.set_index([*keys, "changed", "estimator"])["mean"].to_dict()

    def pair(*cell: str) -> str:
        a, a_plus_minus = (values.get((*cell, name)) for name in ("a", "a_plus_minus"))
        return "–" if a is None or a_plus_minus is None else f"{a:.2f} / {a_plus_minus:.2f}"

    asked = changed[keys].drop_duplicates()
    rows = [
        {"network": TITLES[network], "criterion": criterion, "layers": where}
        | {what: pair(network, criterion, where, what) for what in (USUAL, *RIDGES.values(), OTHER_HALVES)}
        | {OWN: f"{values[network, criterion, where, OWN, 'own_means']:.2f}"}
        for network in TITLES
        for criterion in CRITERIA
        for where in ("conv", "dense")
        if ((asked.network == network) & (asked.criterion == criterion) & (asked["where"] == where)).any()
    ]
    return markdown(pd.DataFrame(rows).rename(columns={USUAL: "S_a / S_a+-"}))


def main() -> None:
    options_of = arguments(__doc__, TITLES)
    options_of.add_argument("--networks", nargs="+", choices=TITLES, default=list(TITLES), help="these alone")
    options_of.add_argument("--investigate", action="store_true", help="the second table: what changes with λ, …")
    options = options_of.parse_args()

    def keep(name: str, network: str, table: pd.DataFrame) -> pd.DataFrame:
        """What is known of all networks, with the table in the place of what was known of this one."""
        file = HERE / f"{name}.csv"
        known = beside_others(file, table.assign(network=network), ["network"])
        write_csv(file, known)
        return known

    for network in given(options.networks, options):
        chosen = settings(network, options)
        rho, bootstrap = map(in_the_papers_terms, measure(network, options.runs, chosen))
        draw_rho(rho, HERE / f"{network}.png", bootstrap)
        layers = compared_by_layer(rho, bootstrap)
        keep("by_layer", network, layers)
        summaries = keep("summary", network, over_layers(layers, bootstrap))
        write_block(HERE / "README.md", "table", summary(summaries))
        if options.investigate:
            changed = beside_usual(rho, in_the_papers_terms(investigate(network, options.runs, chosen)))
            known = keep("changed", network, changed)
            write_block(HERE / "README.md", "investigation", findings(known, summaries))


if __name__ == "__main__":
    main()
