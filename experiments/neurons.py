"""Estimators that were measured from Python, compared over the same neurons, as the report compares runs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor

from pattern_bench.results.schema import of_same_neurons

K = TypeVar("K", bound=Hashable)


def over_same_neurons(
    rho: Mapping[K, Mapping[str, Tensor]], within: Sequence[str] = ("layer",)
) -> dict[K, dict[str, Tensor]]:
    """ρ by estimator and layer (N,), with NaN for neurons that have none under another of the estimators.

    Args:
        rho: of each estimator, as ``pattern_bench.evaluate`` gives it.
        within: ``layer``, or nothing where layers are averaged together, so that all of them have to have it.
    """
    names = list(rho)
    rows = [
        pd.DataFrame({"estimator": place, "layer": layer, "neuron": range(len(values)), "rho": values.double().cpu()})
        for place, name in enumerate(names)
        for layer, values in rho[name].items()
    ]
    table = of_same_neurons(pd.concat(rows, ignore_index=True).assign(all="all"), ["all", *within])
    found: dict[K, dict[str, Tensor]] = {name: {} for name in names}
    for (place, layer), own in table.groupby(["estimator", "layer"], sort=False):
        found[names[int(str(place))]][str(layer)] = torch.from_numpy(own.rho.to_numpy(copy=True))
    return found
