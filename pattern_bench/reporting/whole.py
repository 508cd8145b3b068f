"""Whether the tables of a run are whole: they agree with themselves, and with what its ``summary.json`` says of them.

A table that was cut at the end of a line, or has lines twice, reads well and shows other figures. What the summary of
an earlier version does not say is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

ROUNDING = 1e-6
"""Of figures that are computed again from what a file holds, whatever digits it was written with."""
NEURON = ["model", "data", "layer", "estimator", "criterion", "probe", "neuron"]
CURVE = ["model", "data", "estimator", "method"]
FIGURES = ("mean", "median", "q25", "q75")


def check_rho(rho: pd.DataFrame, summary: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: where ``rho.csv`` does not hold every neuron of every layer once, a dead one with a ρ, or other ones
            than ``summary`` counts; or where their mean or quartiles are others.
    """
    if rho.empty:
        raise ValueError("rho.csv has no rows")
    if rho.duplicated(NEURON).any():
        raise ValueError(f"rho.csv has {int(rho.duplicated(NEURON).sum())} neurons twice")
    if (rho.dead & rho.rho.notna()).any():
        raise ValueError("rho.csv gives a dead neuron a ρ")
    probes = list(dict.fromkeys(rho.probe))
    expected = ["closed_form", "sgd"] if summary.get("probe") == "both" else [summary.get("probe", probes[0])]
    if sorted(probes) != sorted(expected):
        raise ValueError(f"rho.csv has probes {probes}, and summary.json {expected}")
    by_probe = dict(iter(rho.groupby("probe", observed=True)))
    measured = {probe: set(zip(rows.layer, rows.neuron, strict=True)) for probe, rows in by_probe.items()}
    for probe in probes:
        if lacking := len(measured[expected[0]] - measured[probe]):
            raise ValueError(f"rho.csv lacks {lacking} neurons of probe {probe}")
        _check_layers(by_probe[probe], summary, first=probe == expected[0])


def _check_layers(rho: pd.DataFrame, summary: Mapping[str, Any], first: bool) -> None:
    """The rows of one probe. The summary is of the ``first``; the other one may measure more neurons (of which the
    first draws some, under the criterion ``positive``)."""
    about = summary.get("rho", {})
    layers = about.get("layers")
    by_layer: dict[Any, pd.DataFrame] = dict(iter(rho.groupby("layer", observed=True, sort=False)))
    if isinstance(layers, list):
        named = {str(of["layer"]): of for of in layers}
        if set(named) != set(by_layer):
            odd = sorted(set(named) ^ set(by_layer))
            raise ValueError(f"rho.csv and summary.json have other layers: {', '.join(odd[:3])}")
        for layer, of in named.items():
            _check_figures(f"layer {layer}", by_layer[layer], of, first, summary)
    if isinstance(about.get("all"), dict):
        _check_figures("all layers", rho, about["all"], first, summary)


def _check_figures(
    where: str, rows: pd.DataFrame, of: Mapping[str, Any], first: bool, summary: Mapping[str, Any]
) -> None:
    if not first and summary.get("criterion") == "positive":
        return
    for name, count in (("neurons", len(rows)), ("dead", int(rows.dead.sum()))):
        if name in of and of[name] != count:
            raise ValueError(f"rho.csv has {count} {name} in {where}, and summary.json {of[name]}")
    if not first:
        return
    live = rows.rho.dropna()
    found = dict(zip(FIGURES, [live.mean(), *live.quantile([0.5, 0.25, 0.75])], strict=True))
    for name, value in found.items():
        if name in of and not _same(value, of[name]):
            raise ValueError(f"rho.csv has the {name} {_number(value)} in {where}, and summary.json {of[name]}")


def check_bootstrap(bootstrap: pd.DataFrame, rho: pd.DataFrame) -> None:
    """
    Raises:
        ValueError: where ``bootstrap.csv`` does not hold the same resamples of every layer, each once, or a layer that
            ``rho.csv`` does not have.
    """
    if strange := sorted(set(bootstrap.layer) - set(rho.layer)):
        raise ValueError(f"bootstrap.csv has a layer that rho.csv has not: {strange[0]}")
    counts = set()
    for _, rows in bootstrap.groupby([*CURVE[:3], "criterion", "probe", "layer"], observed=True):
        if sorted(rows["resample"]) != list(range(len(rows))):
            raise ValueError("bootstrap.csv lacks resamples, or has some twice")
        counts.add(len(rows))
    if len(counts) > 1:
        raise ValueError(f"bootstrap.csv has {min(counts)} resamples of one layer and {max(counts)} of another")


def check_degradation(degradation: pd.DataFrame, summary: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: where ``degradation.csv`` does not hold every step of every curve that ``summary`` names once, holds
            what is no probability, or another area over a curve.
    """
    curves: dict[Any, pd.DataFrame] = dict(iter(degradation.groupby(CURVE, observed=True, sort=False)))
    for (*_, method), rows in curves.items():
        if sorted(rows.step) != list(range(len(rows))):
            raise ValueError(f"degradation.csv lacks steps of {method}, or has some twice")
        if summary.get("steps") is not None and len(rows) != summary["steps"] + 1:
            raise ValueError(f"degradation.csv ends {method} at step {len(rows) - 1}, and summary.json at "
                             f"{summary['steps']}")  # fmt: skip
        if not rows.probability_mean.between(-ROUNDING, 1 + ROUNDING).all():
            raise ValueError(f"degradation.csv has what is no probability in {method}")
        spread = rows.probability_std
        if not (spread.between(0, 1) | (spread.isna() & (rows.n == 1))).all():
            raise ValueError(f"degradation.csv has what is no deviation of probabilities in {method}")
    counts = sorted(set(degradation.n))
    most = summary.get("splits", {}).get("validation", math.inf)
    if len(counts) > 1 or (counts and not 1 <= counts[0] <= most):
        raise ValueError(f"degradation.csv counts {' and '.join(map(str, counts[:2]))} images")
    _check_methods("degradation.csv", [method for *_, method in curves], summary)
    for (*_, method), rows in curves.items():
        ordered = rows.sort_values("step").probability_mean.to_numpy()
        _check_area("degradation.csv", method, float((ordered[0] - ordered).mean()), summary)


def check_areas(areas: pd.DataFrame, degradation: pd.DataFrame, summary: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: where ``areas.csv`` does not hold an area of each image for every curve, or others than the curves
            and ``summary`` have.
    """
    if areas.area.isna().any():
        raise ValueError("areas.csv has an image without an area")
    images = degradation.groupby(CURVE, observed=True).n.first().to_dict()
    by_curve: dict[Any, pd.DataFrame] = dict(iter(areas.groupby(CURVE, observed=True)))
    if set(images) != set(by_curve):
        raise ValueError("areas.csv and degradation.csv have other curves")
    _check_methods("areas.csv", [method for *_, method in by_curve], summary)
    for curve, rows in by_curve.items():
        if len(rows) != images[curve]:
            raise ValueError(f"areas.csv has {len(rows)} images of {curve[-1]}, and degradation.csv {images[curve]}")
        _check_area("areas.csv", curve[-1], float(rows.area.mean()), summary)


def _check_methods(file: str, methods: Sequence[str], summary: Mapping[str, Any]) -> None:
    for field in ("area_over_curve", "area_over_curve_interval"):
        if field in summary and sorted(methods) != sorted(summary[field]):
            has, said = (", ".join(sorted(names)) or "none" for names in (methods, summary[field]))
            raise ValueError(f"{file} has curves of {has}, and summary.json of {said}")


def _check_area(file: str, method: str, area: float, summary: Mapping[str, Any]) -> None:
    said = summary.get("area_over_curve", {}).get(method, area)
    if not _same(area, said):
        raise ValueError(f"{file} has the area {_number(area)} of {method}, and summary.json {said}")


def _same(found: float, said: Any) -> bool:
    """Whether a figure is the one that was written; None was written where there is none."""
    if said is None or np.isnan(found):
        return said is None and bool(np.isnan(found))
    return isinstance(said, int | float) and abs(found - said) <= ROUNDING * max(1.0, abs(said))


def _number(value: float) -> str:
    return f"{value:.6g}"
