"""What each method of the suite explains of the linear neuron, and the angle between that and the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import pattern_bench as pb
from experiments.fig2_linear.example import SIGNAL, Neuron, drawn, exact, fitted
from pattern_bench.methods.gradients import DeConvNet, Gradient, GuidedBackProp, IntegratedGradients, SmoothGrad
from pattern_bench.methods.patterns import DtdW2, LrpZ
from pattern_bench.methods.perturbation import Occlusion
from pattern_bench.results.labels import plain

SIGNALS, ATTRIBUTIONS = "signal", "attribution"
WITH_PATTERNS = ("random", "w", "a", "a_plus_minus")
Explain = Callable[[Neuron, Tensor, int], Tensor]
"""From a neuron, samples (n, 2) and a seed to explanations (n, 2)."""


def _of(method: Any, **settings: Any) -> Explain:
    return lambda neuron, x, seed: method(neuron.network, **settings).attribute(x)


def _with_patterns(method: Any, estimator: str) -> Explain:
    def explain(neuron: Neuron, x: Tensor, seed: int) -> Tensor:
        return method(neuron.network, pb.fit_patterns(neuron.network, neuron.moments, estimator, seed=seed)).attribute(
            x
        )

    return explain


# The network is linear: more steps of the integral and more noisy copies would change nothing.
METHODS: dict[tuple[str, str], Explain] = {
    **{(SIGNALS, f"PatternNet, {plain(e)}"): _with_patterns(pb.PatternNet, e) for e in WITH_PATTERNS},
    (SIGNALS, "S_x, the input"): lambda neuron, x, seed: x,
    (SIGNALS, "gradient"): _of(Gradient),
    (SIGNALS, "DeConvNet"): _of(DeConvNet),
    (SIGNALS, "Guided BackProp"): _of(GuidedBackProp),
    **{(ATTRIBUTIONS, f"PatternAttribution, {plain(e)}"): _with_patterns(pb.PatternAttribution, e)
       for e in WITH_PATTERNS},
    (ATTRIBUTIONS, "LRP z-rule, input × gradient"): _of(LrpZ),
    (ATTRIBUTIONS, "w²-rule"): _of(DtdW2),
    (ATTRIBUTIONS, "Integrated Gradients"): _of(IntegratedGradients, steps=2),
    (ATTRIBUTIONS, "SmoothGrad"): _of(SmoothGrad, samples=2),
    (ATTRIBUTIONS, "occlusion"): _of(Occlusion),
}  # fmt: skip


def degrees(found: Tensor, truth: Tensor) -> Tensor:
    """Angles between the lines that two directions (..., 2) span, 0 to 90 degrees (...)."""
    across = found[..., 0] * truth[..., 1] - found[..., 1] * truth[..., 0]
    along = (found * truth).sum(-1)
    return torch.atan2(across.abs(), along.abs()).rad2deg()  # unlike acos, to the last digit near 0


def angles_at(phi: float, seed: int, samples: int, explained: int) -> pd.DataFrame:
    """One row per method and fit (``exact``: infinitely many samples; ``samples``): the angle's mean and standard
    deviation over the explained samples, which are others than those that the neuron was fitted on."""
    x, y = drawn(explained, phi, seed + 1_000_000)
    rows = []
    for fit, neuron in (("exact", exact(phi)), ("samples", fitted(samples, phi, seed))):
        truths = {SIGNALS: y[:, None] * SIGNAL, ATTRIBUTIONS: y[:, None] * neuron.w * SIGNAL}
        for (tells, method), explain in METHODS.items():
            angle = degrees(explain(neuron, x, seed), truths[tells])
            rows.append({"phi": phi, "seed": seed, "fit": fit, "tells": tells, "method": method,
                         "mean": float(angle.mean()), "sd_samples": float(angle.std())})  # fmt: skip
    return pd.DataFrame(rows)


def weights_at(phi: float, seed: int, samples: int) -> pd.DataFrame:
    """One row per fit: w and a."""
    rows = []
    for fit, neuron in (("exact", exact(phi)), ("samples", fitted(samples, phi, seed))):
        w, a = neuron.w.tolist(), neuron.a.tolist()
        rows.append({"phi": phi, "seed": seed, "fit": fit, "w1": w[0], "w2": w[1], "a1": a[0], "a2": a[1]})
    return pd.DataFrame(rows)


def over_seeds(angles: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, its standard deviation ``sd_seeds``, and the mean ``sd_samples``."""
    cells = angles.groupby(["phi", "fit", "tells", "method"], sort=False)
    found = cells.agg(mean=("mean", "mean"), sd_seeds=("mean", "std"), sd_samples=("sd_samples", "mean"))
    return found.reset_index()
