"""ρ(S) in closed form, and what is made of ρ however it was measured."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pattern_bench.core.active_moments import FiringMoments, firing_rho
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.memory import fits
from pattern_bench.core.moments import Moments
from pattern_bench.core.probe_closed_form import CLOSED_FORM, Probe, Target, rho
from pattern_bench.engine.progress import Bar
from pattern_bench.errors import UserError
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.moments import M, ProbeStatistics, SplitMoments, ValidationStatistics, measured_neurons
from pattern_bench.pipeline.patterns import FittedPatterns
from pattern_bench.pipeline.setup import Setup
from pattern_bench.pipeline.stage import Done, Result, Stage
from pattern_bench.processes import collectives
from pattern_bench.results.schema import RHO_COLUMNS, rho_rows

log = logging.getLogger(__name__)
AGREEMENT = 0.02
"""A difference in ρ that no figure shows."""


def probes(setup: Setup) -> list[str]:
    """How v is fitted, in the order of the results."""
    name = setup.cfg.probe.name
    return ["closed_form", "sgd"] if name == "both" else [name]


def layer_rows(setup: Setup, layer: str, values: Tensor, dead: Tensor, probe: str) -> pd.DataFrame:
    """A layer's rows of ``rho.csv``, from ρ (N,) and which neurons are dead (N,)."""
    common = {**setup.names, "estimator": setup.estimator.name, "criterion": setup.cfg.criterion, "probe": probe}
    return rho_rows(layer, setup.all_layers.index(layer), values, dead, common)


def missing_rho(setup: Setup) -> pd.DataFrame:
    """Rows without ρ, for an estimator that has none."""
    tables = []
    for probe in probes(setup):
        for layer in setup.layers:
            count = len(setup.weight(layer))
            nothing, alive = torch.full((count,), torch.nan), torch.zeros(count, dtype=torch.bool)
            tables.append(layer_rows(setup, layer, nothing, alive, probe))
    return pd.concat(tables, ignore_index=True)


def closed_form(
    setup: Setup,
    device: torch.device,
    patterns: Mapping[str, Pattern],
    probe: SplitMoments[Any],
    test: SplitMoments[Any],
    bar: Bar,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """ρ of every neuron, under ``positive`` of the measured ones, and the regularisation that each layer needed; in
    the first process, where moments are."""
    tables, regularisation = [], {}
    if not collectives.is_rank_zero():
        return pd.DataFrame(columns=list(RHO_COLUMNS)), {}
    bar.start(len(patterns))
    for layer, pattern in patterns.items():
        values, regularisation[layer] = layer_rho(setup, device, layer, pattern, probe[layer], test[layer])
        rows = layer_rows(setup, layer, values, pattern.dead, "closed_form")
        if setup.cfg.criterion not in CLOSED_FORM:
            rows = rows.iloc[measured_neurons(setup, layer).numpy()]
        tables.append(rows)
        bar.advance(detail=layer)
    return pd.concat(tables, ignore_index=True), regularisation


def layer_rho(
    setup: Setup, device: torch.device, layer: str, pattern: Pattern, probe: M, test: M
) -> tuple[Tensor, float]:
    """rho (N,), NaN for those not measured, and the regularisation, computed on the device, or on the CPU where Gram
    matrices find no room there."""
    found: list[tuple[Tensor, float]] = []

    def compute(place: torch.device) -> None:
        found.append(_layer_rho_on(place, setup, layer, pattern, probe, test))

    for place in dict.fromkeys((device, torch.device("cpu"))):
        if fits(functools.partial(compute, place)):
            return found[0]
        log.warning("out of memory with ρ of layer %s on %s", layer, place)
    raise UserError(
        f"the memory is too small for ρ of layer {layer}, whose Gram matrix has {_columns(probe)} columns: "
        "leave it out (layer), or give probe=sgd"
    )


def _columns(moments: Moments | FiringMoments) -> int:
    return moments.sums.shape[1] - 1 if isinstance(moments, FiringMoments) else moments.x.shape[1]


def _layer_rho_on(
    device: torch.device, setup: Setup, layer: str, pattern: Pattern, probe: M, test: M
) -> tuple[Tensor, float]:
    here = Pattern(*(tensor.to(device) for tensor in vars(pattern).values()))
    ridge = setup.cfg.probe.regularisation
    try:
        if isinstance(probe, FiringMoments):
            neurons = measured_neurons(setup, layer).to(device)
            some = Pattern(*(tensor[neurons] for tensor in vars(here).values()))
            weight = setup.weight(layer).to(device)[neurons]
            found, used = firing_rho(probe.to(device), test.to(device), weight, some, ridge, setup.memory)
            return weight.new_full((len(here.dead),), torch.nan).index_copy(0, neurons, found), used
        fitted = Probe(probe.to(device), ridge, setup.memory)
    except ValueError as error:
        raise UserError(f"rho of layer {layer}: {error}") from error
    bias: Any = setup.model.get_submodule(layer).bias
    target = Target(setup.cfg.criterion, None if bias is None else bias.double().to(device))
    direction = fitted.direction(here, target)
    regularisation = fitted.regularisation
    del fitted  # its factor is as large as the Gram matrix that comes next
    return rho(direction, test.to(device), here, target, setup.memory), regularisation


def difference(rho: pd.DataFrame) -> dict[str, Any]:
    """How far the two probes are apart over the live neurons of each layer, and of all together."""
    wide = rho.pivot(index=["layer_index", "layer", "neuron"], columns="probe", values="rho").dropna()
    apart = (wide["sgd"] - wide["closed_form"]).rename("apart").reset_index()

    def figures(table: pd.DataFrame) -> dict[str, Any]:
        size = table.apart.abs()
        return {
            "neurons": len(table),
            "mean": float(table.apart.mean()),
            "median_absolute": float(size.median()),
            "largest_absolute": float(size.max()),
            f"share_within_{AGREEMENT}": float((size <= AGREEMENT).mean()),
        }

    if apart.empty:
        return {}
    layers = [{"layer": layer, **figures(table)} for (_, layer), table in apart.groupby(["layer_index", "layer"])]
    return {"all": figures(apart), "layers": layers}


# --- the stage ---


@dataclass(frozen=True, kw_only=True)
class ClosedFormRho(Result):
    """ρ of every neuron, in the first process.

    Attributes:
        table: rows of ``rho.csv``.
        regularisation: that each layer needed.
    """

    table: pd.DataFrame
    regularisation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasureClosedForm(Stage[ClosedFormRho]):
    """Measure ρ(S) of every neuron in closed form."""

    setup: Setup
    machine: Machine
    name = "rho"
    title = "ρ(S) of every neuron"

    def why_skipped(self) -> str | None:
        return None if self.setup.estimator.has_pattern else self.setup.estimator.no_pattern_reason

    def without(self, reason: str) -> ClosedFormRho:
        return ClosedFormRho(table=missing_rho(self.setup), skipped=reason)

    def run(self, done: Done, bar: Bar) -> ClosedFormRho:
        probe, test = done[ProbeStatistics].moments, done[ValidationStatistics].moments
        table, regularisation = closed_form(
            self.setup, self.machine.device, done[FittedPatterns].patterns, probe, test, bar
        )
        return ClosedFormRho(table=table, regularisation=regularisation)
