"""One setting and one seed: draw the images, train the networks, explain, and score every heat map for truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pattern_bench as pb
from experiments.ground_truth.networks import MODELS, trained
from experiments.neurons import over_same_neurons
from pattern_bench.api import LayerMoments, Patterns
from pattern_bench.data.known_signal import UNITS, KnownSignal, draw
from pattern_bench.methods.gradients import DeConvNet, Gradient, GuidedBackProp, IntegratedGradients, SmoothGrad
from pattern_bench.methods.patterns import DtdW2, LrpZ
from pattern_bench.methods.perturbation import Occlusion, PredictionDifference
from pattern_bench.metrics.degradation import area_over_curve
from pattern_bench.metrics.earth_mover import closeness
from pattern_bench.metrics.localization import angle, precision, share
from pattern_bench.results.schema import write_csv

ESTIMATORS = ("random", "w", "a", "a_plus_minus")
BASELINES = ("random_map", "input", "sobel", "laplace")
SCORES = ("precision", "closeness", "on_suppressors", "angle", "angle_of_magnitudes")
RATES = {8: {"linear": 0.01, "mlp": 0.003, "cnn": 0.005}, 64: {"linear": 0.001, "mlp": 0.001, "cnn": 0.003}}


@dataclass(frozen=True)
class Setting:
    """Of the images, and how many: half of ``train`` for patterns, half for v of ρ, all for the network; ρ and the
    accuracy are measured on ``validation`` others, of which the first ``explained`` that are classified correctly are
    explained."""

    scenario: str
    side: int
    signal: float
    suppressor: float
    train: int = 4000
    validation: int = 1000
    epochs: int = 15
    explained: int = 24

    def name(self, seed: int) -> str:
        return f"{self.scenario}-{self.side}-{self.signal:g}-{self.suppressor:g}-{seed}"


def score(setting: Setting, seed: int) -> pd.DataFrame:
    """A row for each model, and estimator and method: the scores' means over the explained images, ``rho_first`` and
    ``rho_all`` of estimators (mean over the neurons of the first layer, and of all, that are live under all of them),
    the same under the criterion ``rectified`` as ``rectified_first`` and ``rectified_all``, ``area_mean`` and
    ``area_zero`` (area over the degradation curve), and the model's ``accuracy``."""
    images = setting.train + setting.validation
    known = draw(setting.scenario, setting.side, setting.signal, setting.suppressor, images, seed)
    found = [_of_one_network(setting, known, model, seed) for model in MODELS]
    table = pd.concat(found, ignore_index=True)
    for column, name in enumerate(("scenario", "side", "signal", "suppressor")):
        table.insert(column, name, getattr(setting, name))
    return table.assign(seed=seed)


def keep_score(setting: Setting, seed: int, file: Path) -> Path:
    """Writes :func:`score` to a CSV file, whole or not at all."""
    write_csv(file, score(setting, seed))
    return file


def _of_one_network(setting: Setting, known: KnownSignal, model: str, seed: int) -> pd.DataFrame:
    train, half = setting.train, setting.train // 2
    rate = RATES[64 if setting.side > 8 else 8][model]
    network = trained(model, known.images[:train], known.labels[:train], setting.epochs, rate, seed)
    held, labels = known.images[train:], known.labels[train:]
    right = network(held).argmax(1) == labels
    chosen = train + right.nonzero().flatten()[: setting.explained]

    fit = pb.collect_moments(network, known.images[:half].split(250), gram=False)
    probe, test = (pb.collect_moments(network, part.split(250)) for part in (known.images[half:train], held))
    patterns = {name: pb.fit_patterns(network, fit, name, seed=seed) for name in ESTIMATORS}
    rho = _rho(network, patterns, probe, test)

    maps = heat_maps(network, patterns, known.images[chosen], known.labels[chosen], known.images[:half], seed)
    unit = setting.side // UNITS
    heats = {f"{estimator}/{method}": heat for (estimator, method), heat in maps.items()}
    areas = {
        "area_mean": _areas(network, known, chosen, heats, patch=2 * unit, steps=(UNITS // 2) ** 2),
        "area_zero": _areas(network, known, chosen, heats, patch=unit, steps=UNITS**2 // 2, replacement="constant"),
    }
    rows = []
    for (estimator, method), heat in maps.items():
        row: dict[str, Any] = {"model": model, "estimator": estimator, "method": method}
        row |= {name: float(values.nanmean()) for name, values in _scores(heat, known, chosen).items()}
        row |= rho.get(estimator, {})
        row |= {name: found[f"{estimator}/{method}"] for name, found in areas.items()}
        rows.append(row)
    return pd.DataFrame(rows).assign(accuracy=float(right.float().mean()))


def _rho(
    network: nn.Module, patterns: Mapping[str, Patterns], probe: LayerMoments, test: LayerMoments
) -> dict[str, dict[str, float]]:
    """Of each estimator, over the neurons that are live under all of them."""
    found: dict[str, dict[str, float]] = {name: {} for name in patterns}
    for criterion, what in (("all", "rho"), ("rectified", "rectified")):
        rho = {name: pb.evaluate(network, own, probe, test, criterion=criterion) for name, own in patterns.items()}
        by_layer, together = over_same_neurons(rho), over_same_neurons(rho, within=())
        for name, values in found.items():
            values[f"{what}_first"] = float(next(iter(by_layer[name].values())).nanmean())
            values[f"{what}_all"] = float(torch.cat(list(together[name].values())).nanmean())
    return found


def _scores(heat: Tensor, known: KnownSignal, chosen: Tensor) -> dict[str, Tensor]:
    truth, signal = known.truth[chosen], known.signal[chosen]
    return {
        "precision": precision(heat, truth),
        "closeness": closeness(heat, truth),
        "on_suppressors": share(heat, known.suppressor),
        "angle": angle(heat, signal),
        "angle_of_magnitudes": angle(heat.abs(), signal.abs()),
    }


def _areas(
    network: nn.Module, known: KnownSignal, chosen: Tensor, heats: Mapping[str, Tensor], **protocol: Any
) -> dict[str, float]:
    methods = {name: lambda *_, heat=heat: heat for name, heat in heats.items()}
    curves = pb.degradation(network, known.images[chosen], methods, known.labels[chosen], **protocol)
    return {name: float(area_over_curve(curve).mean()) for name, curve in curves.items()}


def heat_maps(
    network: nn.Module, patterns: Mapping[str, pb.Patterns], images: Tensor, labels: Tensor, others: Tensor, seed: int
) -> dict[tuple[str, str], Tensor]:
    """By estimator (``none`` where the method needs no patterns) and method: what explains the ``labels``' outputs, and
    what knows nothing of the network: a random map, the image, and its edges. All have the images' shape."""
    unit = images.shape[2] // UNITS
    methods = {
        ("none", method.name): method
        for method in (
            Gradient(network), LrpZ(network), DtdW2(network), DeConvNet(network), GuidedBackProp(network),
            IntegratedGradients(network), SmoothGrad(network, seed=seed),
            Occlusion(network, window=unit, stride=max(1, unit // 2)),
            PredictionDifference(network, others, window=unit, stride=unit, seed=seed),
        )
    }  # fmt: skip
    for estimator, found in patterns.items():
        methods[estimator, "pattern_net"] = pb.PatternNet(network, found)
        methods[estimator, "pattern_attribution"] = pb.PatternAttribution(network, found)
    generator = torch.Generator().manual_seed(seed)
    return {key: method.attribute(images, target=labels) for key, method in methods.items()} | {
        ("none", "random_map"): torch.randn(images.shape, generator=generator),
        ("none", "input"): images,
        ("none", "sobel"): _edges(images, [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]),
        ("none", "laplace"): _edges(images, [[0, 1, 0], [1, -4, 1], [0, 1, 0]]),
    }


def _edges(images: Tensor, kernel: list[list[float]]) -> Tensor:
    """The images (B, 1, H, W) under a filter and, where it is another one, its transpose: the norm of the two."""
    filters = torch.tensor(kernel, dtype=images.dtype)
    filtered = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), torch.stack([filters, filters.T])[:, None])
    return filtered.norm(dim=1, keepdim=True)
