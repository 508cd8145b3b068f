"""How far is the filter from the signal, by architecture and training: ``python -m experiments.models --help``.

Writes layers.csv, models.csv and models.png beside itself, and the table of README.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import pandas as pd
import seaborn as sns
import torch
from matplotlib import pyplot as plt
from safetensors.torch import load_file

from experiments.jobs import (
    BOOTSTRAP,
    CIFAR,
    FEW,
    NOTHING_ELSE,
    SQUEEZENET,
    VGG16,
    arguments,
    cifar,
    given,
    settings,
    sweep,
)
from experiments.pages import beside_others, markdown, write_block
from pattern_bench.results.schema import of_same_neurons, write_csv

HERE = Path(__file__).parent
ESTIMATORS = ("w", "a", "a_plus_minus")
TRAINING = "{epochs: 8, learning_rate: 0.002, batch_size: 128}"
SMALL = ["model=cifar_vgg", "model.width=16", "model.dense=[128]", "model.dropout=0", f"model.training={TRAINING}"]
TRAINED = {
    "VGG, 6 conv layers of 16 to 64": [],
    "… batch norm": ["model.batch_norm=true"],
    "… 3 conv layers": ["model.blocks=[1,1,1]"],
    "… 12 conv layers": ["model.blocks=[4,4,4]"],
    "… 12 conv layers, batch norm": ["model.blocks=[4,4,4]", "model.batch_norm=true"],
    "… half as wide": ["model.width=8"],
    "… twice as wide": ["model.width=32"],
    "… untrained": ["model.training=null"],
}
# Both halve the image five times: of 32 pixels, the last kernels would see one, and padding around it.
FAMILIES = {
    name: [f"model={name}", "model.weights=null", f"model.training={TRAINING}", "data.size=64"]
    for name in ("resnet18", "mobilenet_v2")
}
IMAGENET = {"SqueezeNet 1.1, ImageNet's weights": SQUEEZENET, "VGG-16's conv layers, ImageNet's weights": VGG16}


def angles(filters: Path, patterns: Path, *others: Path) -> pd.DataFrame:
    """Degrees between each neuron's filter and its pattern a₊, from the patterns of S_w and of another estimator; of
    the neurons that are live under both, and under the ``others`` that they stand beside."""
    own, other, *rest = (load_file(folder / "patterns.safetensors") for folder in (filters, patterns, *others))
    rows = []
    for name in (key.removesuffix("/positive") for key in own if key.endswith("/positive")):
        w, a = (tensors[f"{name}/positive"].flatten(1).double() for tensors in (own, other))
        degrees = torch.nn.functional.cosine_similarity(w, a, dim=1).clamp(-1, 1).acos().rad2deg()
        alive = ~torch.stack([each[f"{name}/dead"] for each in (own, other, *rest)]).any(0)
        rows += [{"layer": name, "degrees": float(value)} for value in degrees[alive]]
    return pd.DataFrame(rows)


def measured(root: Path) -> pd.DataFrame:
    """By layer: mean ρ of every estimator, and the mean angle between filter and pattern, over the neurons that are
    live under all estimators; how many others are live under S_w; with the accuracy."""
    folders = {read_json(path)["estimator"]: path.parent for path in root.glob("*/summary.json")}
    rho = pd.concat([pd.read_csv(folder / "rho.csv") for folder in folders.values()], ignore_index=True)
    compared = of_same_neurons(rho)
    table = compared.pivot_table("rho", ["layer_index", "layer"], "estimator", "mean", sort=False).reset_index()
    filters, neurons = (each[each.estimator == "w"].groupby("layer").rho.count() for each in (rho, compared))
    table["left_out"] = table.layer.map(filters - neurons)
    for name in ("a", "a_plus_minus"):
        apart = angles(folders["w"], folders[name], *folders.values()).groupby("layer").degrees.mean()
        table[f"degrees_{name}"] = table.layer.map(apart)
    return table.assign(accuracy=read_json(folders["w"] / "summary.json")["accuracy"])


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def by_model(layers: pd.DataFrame) -> pd.DataFrame:
    """Means over the layers of each model and seed, without the first, which sees pixels."""
    columns = [*ESTIMATORS, "degrees_a", "degrees_a_plus_minus", "accuracy"]
    above = layers[layers.layer_index > 0]
    return above.groupby(["model", "data", "seed"], sort=False)[columns].mean().reset_index()


def table(models: pd.DataFrame) -> str:
    """Means over seeds, and half of their range where there are several."""
    rows = []
    for (model, data), of in models.groupby(["model", "data"], sort=False):
        row = {"model": model, "data": data, "top-1": "–" if of.accuracy.isna().all() else f"{of.accuracy.mean():.1%}"}
        shown = {"w": "ρ(S_w)", "a": "ρ(S_a)", "a_plus_minus": "ρ(S_a+-)", "degrees_a": "filter to S_a, degrees"}
        shown["degrees_a_plus_minus"] = "to S_a+-'s a₊"
        for column, title in shown.items():
            digits = 0 if column.startswith("degrees") else 3 if column == "w" else 2
            half = (of[column].max() - of[column].min()) / 2
            row[title] = f"{of[column].mean():.{digits}f}" + (f" ± {half:.{digits}f}" if len(of) > 1 else "")
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def draw(layers: pd.DataFrame, path: Path) -> None:
    """The angle between filter and S_a's pattern, and ρ(S_w), over the place of the layer in the network."""
    place = layers.layer_index / layers.groupby(["model", "data"]).layer_index.transform("max")
    shown = layers.assign(place=place, label=layers.model)
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained", sharex=True)
    titles = {"degrees_a": "angle between filter and pattern of $S_a$ (degrees)", "w": r"$\rho(S_w)$"}
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        sns.lineplot(
            shown, x="place", y=column, hue="label", style="label", markers=True, dashes=True, ax=axis, errorbar=None,
            legend=column == "w", palette="colorblind" if shown.label.nunique() <= 10 else "husl",
        )  # fmt: skip
        axis.set(xlabel="layer, from the first (0) to the last (1)", ylabel=title)
    axes[0].axhline(90, color="black", linewidth=0.8)
    sns.move_legend(axes[1], "center left", bbox_to_anchor=(1, 0.5), frameon=False, title=None)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    options_of = arguments(__doc__, [CIFAR, SQUEEZENET, VGG16])
    options_of.add_argument("--seeds", type=int, default=2, help="networks that are trained of each kind")
    options = options_of.parse_args()
    if options.seeds < 1:
        options_of.error(f"--seeds {options.seeds}: at least one network of each kind, such as --seeds 2")
    networks = given([CIFAR, SQUEEZENET, VGG16], options)
    estimators = f"estimator={','.join(ESTIMATORS)}"
    found = []
    for seed in range(options.seeds if CIFAR in networks else 0):
        for title, changes in (TRAINED | FAMILIES).items():
            own = changes if title in FAMILIES else [*SMALL, *changes]
            chosen = [*cifar(options), "data.limit=20000", f"seed={seed}", *NOTHING_ELSE, *own, estimators]
            folder = re.sub(r"\W+", "-", f"{seed} {title}")
            layers = measured(sweep(options.runs / "models" / folder, *chosen))
            found.append(layers.assign(model=title, data="CIFAR-10", seed=seed))
    for title, network in IMAGENET.items():
        if network in networks:
            # In the chunks of the experiment on Fig. 3, whose moments are used again where they are still kept.
            chosen = [*settings(network, options), *BOOTSTRAP[network], FEW, *NOTHING_ELSE, estimators]
            layers = measured(sweep(options.runs / "models" / network, *chosen))
            found.append(layers.assign(model=title, data="photographs", seed=0))
    if not found:
        raise SystemExit("nothing to measure: give --cifar, or --photographs and weights (--help)")
    layers = beside_others(HERE / "layers.csv", pd.concat(found, ignore_index=True), ["model"])
    order = [*TRAINED, *FAMILIES, *IMAGENET]
    layers = layers[layers.model.isin(order)].sort_values("model", key=lambda m: m.map(order.index), kind="stable")
    models = by_model(layers)
    write_csv(HERE / "layers.csv", layers.round(5))
    write_csv(HERE / "models.csv", models.round(5))
    draw(layers, HERE / "models.png")
    write_block(HERE / "README.md", "table", table(models))


if __name__ == "__main__":
    main()
