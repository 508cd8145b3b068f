"""The files of a run: their names and columns are a contract (README, "What a run leaves")."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pattern_bench.results.labels import RANDOM_ORDER
from pattern_bench.storage.atomic import write_file

if TYPE_CHECKING:  # the report starts a second earlier without them
    from torch import Tensor

    from pattern_bench.core.estimators import Pattern
    from pattern_bench.data.splits import Split

RHO_COLUMNS = (
    "model", "data", "layer", "layer_index", "estimator", "criterion", "probe", "neuron", "rho", "dead",
)  # fmt: skip
DEGRADATION_COLUMNS = (
    "model", "data", "estimator", "method", "step", "probability_mean", "probability_std", "n",
)  # fmt: skip
AREA_COLUMNS = ("model", "data", "estimator", "method", "image", "area")
BOOTSTRAP_COLUMNS = (
    "model", "data", "layer", "layer_index", "estimator", "criterion", "probe", "resample", "mean", "median",
)  # fmt: skip
SPLIT_COLUMNS = ("split", "index", "name", "label", "used")
PACKAGES = (
    "pattern_bench", "torch", "torchvision", "pytorch-lightning", "hydra-core", "wandb", "numpy", "pandas",
)  # fmt: skip


# What a spreadsheet takes for a formula, at the start of a cell; after any apostrophes, so that they can be taken off.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]inf")


def as_cell(name: str) -> str:
    """Return ``name`` as text for a table that a spreadsheet may open: an apostrophe stands before what would be read
    as a formula there. :func:`from_cell` takes it off.

    >>> as_cell("-1x1"), as_cell("features.0")
    ("'-1x1", 'features.0')
    """
    return f"'{name}" if _FORMULA.match(name) and not _NUMBER.fullmatch(name) else name


def from_cell(text: str) -> str:
    """Return the name that :func:`as_cell` wrote as ``text``.

    >>> from_cell("'-1x1")
    '-1x1'
    """
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def in_cells(table: pd.DataFrame, written: Callable[[str], str] = as_cell) -> pd.DataFrame:
    """Return ``table`` with all text, that of its head too, as it is ``written``; numbers stay numbers."""
    changed = {}
    for column in table.columns:
        if not pd.api.types.is_numeric_dtype(table[column]):
            names = {name: written(name) for name in table[column].unique() if isinstance(name, str)}
            if names := {name: text for name, text in names.items() if name != text}:
                changed[column] = [names.get(value, value) if isinstance(value, str) else value
                                   for value in table[column]]  # fmt: skip
    return table.assign(**changed).rename(columns=lambda name: written(name) if isinstance(name, str) else name)


def write_csv(path: Path, table: pd.DataFrame, float_format: str | None = None) -> None:
    """Write a table. Names that a spreadsheet would read as formulas get an apostrophe, see :func:`as_cell`."""
    write_file(path, lambda file: in_cells(table).to_csv(file, index=False, float_format=float_format))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file; NaN and infinite values are refused with a ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False)
    write_file(path, lambda file: file.write_text(text + "\n"))


def rho_rows(layer: str, index: int, rho: Tensor, dead: Tensor, common: Mapping[str, str]) -> pd.DataFrame:
    """Return one row of ``rho.csv`` per neuron of a layer; a dead neuron has no rho.

    Args:
        layer: name.
        index: the layer's place in the network.
        rho: (N,).
        dead: (N,), bool.
        common: the other names in RHO_COLUMNS.
    """
    values = rho.double().cpu().masked_fill(dead.cpu(), float("nan")).numpy()
    table = pd.DataFrame({"neuron": range(len(values)), "rho": values, "dead": dead.cpu().numpy()})
    return table.assign(layer=layer, layer_index=index, **common)[list(RHO_COLUMNS)]


def degradation_rows(curves: Mapping[str, Tensor], model: str, data: str, estimator: str) -> pd.DataFrame:
    """Return one row of ``degradation.csv`` per method and step. The random order does not depend on the estimator:
    ``none`` stands there, as it does for methods that use no patterns."""
    tables = []
    for method, curve in curves.items():
        table = pd.DataFrame(
            {
                "step": range(curve.shape[1]),
                "probability_mean": curve.double().mean(0).numpy(),
                "probability_std": curve.double().std(0).numpy() if len(curve) > 1 else float("nan"),
                "n": len(curve),
            }
        )
        tables.append(table.assign(model=model, data=data, estimator=_whose(method, estimator), method=method))
    return pd.concat(tables, ignore_index=True)[list(DEGRADATION_COLUMNS)]


def area_rows(
    areas: Mapping[str, Tensor], images: Sequence[str], model: str, data: str, estimator: str
) -> pd.DataFrame:
    """Return one row of ``areas.csv`` per method and image, from the areas (images,) over each method's curves: what
    methods can be compared by, image by image."""
    tables = [
        pd.DataFrame({"image": images, "area": area.numpy()}).assign(
            model=model, data=data, estimator=_whose(method, estimator), method=method
        )
        for method, area in areas.items()
    ]
    return pd.concat(tables, ignore_index=True)[list(AREA_COLUMNS)]


def _whose(method: str, estimator: str) -> str:
    return "none" if method.startswith(RANDOM_ORDER) else estimator


def pattern_tensors(patterns: Mapping[str, Pattern]) -> dict[str, Tensor]:
    """Return the tensors ``LAYER/positive``, ``LAYER/negative`` and ``LAYER/dead`` of ``patterns.safetensors``."""
    return {
        f"{layer}/{part}": getattr(pattern, part)
        for layer, pattern in patterns.items()
        for part in ("positive", "negative", "dead")
    }


def summarise_rho(rho: pd.DataFrame, bootstrap: pd.DataFrame) -> dict[str, Any]:
    """Return mean, median and quartiles over the live neurons, of each layer and of all together; with the standard
    errors of each layer's mean and median where images were drawn again (else ``bootstrap`` is empty)."""

    def figures(table: pd.DataFrame) -> dict[str, Any]:
        live = table.rho.dropna()
        quartiles = live.quantile([0.25, 0.5, 0.75]) if len(live) else pd.Series([None] * 3)
        return {
            "mean": _number(live.mean()),
            "median": _number(quartiles.iloc[1]),
            "q25": _number(quartiles.iloc[0]),
            "q75": _number(quartiles.iloc[2]),
            "neurons": len(table),
            "dead": int(table.dead.sum()),
        }

    layers = [
        {"layer": layer, **figures(table)} for (_, layer), table in rho.groupby(["layer_index", "layer"], sort=True)
    ]
    if len(bootstrap):
        errors = standard_errors(bootstrap, ["layer"])
        for layer in layers:
            spread = errors.loc[layer["layer"]]
            layer["standard_error"] = {name: _number(spread[name]) for name in ("mean", "median")}
    return {"all": figures(rho), "layers": layers}


LAYER = ("model", "data", "criterion", "probe", "layer")
"""What tells the layers of Fig. 3 apart."""


def of_same_neurons(
    rho: pd.DataFrame, within: Sequence[str] = LAYER, of: Sequence[str] = ("estimator",)
) -> pd.DataFrame:
    """Return the table with ρ of those neurons alone that have one under all estimators which they stand beside.

    An estimator's own live neurons are others than the next one's: means over them compare different neurons. An
    estimator that has no ρ at all where it stands (S_x, which leaves no residual) takes no neuron from the others.

    Args:
        rho: columns ``layer``, ``neuron``, ``rho`` and those named below, in any order of rows. Without ``neuron``, a
            layer's rows are taken to be its neurons, in the same order under all estimators.
        within: columns that tell apart what does not stand side by side.
        of: columns that tell estimators apart.

    Returns:
        All rows and columns, with NaN as ``rho`` of the neurons that are left out.
    """
    numbered = rho
    if "neuron" not in rho:
        numbered = rho.assign(neuron=rho.groupby(list(dict.fromkeys([*within, "layer", *of]))).cumcount())
    live = numbered[rho.rho.notna()]
    group, neuron, who = (
        live.groupby(list(dict.fromkeys(columns)), sort=False, observed=True).ngroup().to_numpy()
        for columns in (within, [*within, "layer", "neuron"], of)
    )
    # Which estimators have which neuron, and which are in which group: (places, estimators).
    neuron_has, group_has = (
        np.zeros((place.max(initial=0) + 1, who.max(initial=0) + 1), dtype=bool) for place in (neuron, group)
    )
    neuron_has[neuron, who], group_has[group, who] = True, True
    kept = rho.rho.notna().to_numpy(copy=True)
    kept[kept] = neuron_has.sum(1)[neuron] == group_has.sum(1)[group]
    return rho.assign(rho=rho.rho.where(kept))


def standard_errors(bootstrap: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return the spread over the resamples of each layer's ``mean`` and ``median``, by ``keys``."""
    return bootstrap.groupby(keys)[["mean", "median"]].std()


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def split_table(splits: Mapping[str, Split], unreadable: set[str]) -> pd.DataFrame:
    """Return one row of ``splits.csv`` per image: its split, its index in its pool, its name and label, and whether it
    could be read."""
    tables = []
    for name, split in splits.items():
        pool, indices = split.pool, split.indices.tolist()
        labels = None if pool.labels is None else [pool.labels[i] for i in indices]
        names = [pool.ids[i] for i in indices]
        tables.append(pd.DataFrame({"split": name, "index": indices, "name": names, "label": labels}))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(used=~table.name.isin(unreadable))
