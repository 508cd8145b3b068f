"""What is measured of moments that are there: the time that ρ takes, and the error that sampled positions make."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from experiments.benchmark.rows import POSITIONS
from experiments.benchmark.timing import best
from experiments.passes import moment_pass
from pattern_bench.api import Moments
from pattern_bench.core.collector import Collector
from pattern_bench.core.estimators import Filter, Linear, Random, TwoRegimes
from pattern_bench.core.probe_closed_form import Probe, Target, rho
from pattern_bench.engine.streams import fast_layout

CRITERIA = ("all", "rectified")
RHO = "rho of 512 neurons, D = 4,608, all estimators, two criteria"


def solving(device: str) -> pd.DataFrame:
    """Seconds for rho of all 512 neurons of a layer with D = 4,608, every estimator that has one, both criteria."""
    torch.manual_seed(0)
    layer = nn.Conv2d(512, 512, 3, padding=1).requires_grad_(False).to(device)
    collector = Collector(layer, gram=True)
    for _ in range(4):
        x = torch.randn(8, 512, 14, 14, device=device).relu()
        collector.add(x, layer(x))
    moments, weight = collector.moments(), layer.weight.flatten(1).double()
    generator = torch.Generator().manual_seed(0)
    estimators = (Random(), Filter(), Linear(), TwoRegimes())

    def solve() -> None:
        probe = Probe(moments, 1e-4)
        for estimator in estimators:
            pattern = estimator.fit(weight, moments, generator)
            for criterion in CRITERIA:
                target = Target(criterion, layer.bias.double())  # type: ignore[union-attr]
                rho(probe.direction(pattern, target), moments, pattern, target)

    cuda = device == "cuda"
    a, b = (torch.randn(3000, 3000, dtype=torch.float64, device=device) for _ in range(2))
    rate = 2 * 3000**3 / best(lambda: a @ b, cuda)
    seconds = best(solve, cuda, 2)
    # One factorisation; per neuron 2 columns for one regime and 4 for two, one more for `rectified`.
    floor = (4608**3 / 3 + 512 * (3 * (2 + 3) + 4 + 5) * 2 * 4608**2) / rate
    return pd.DataFrame([{"what": RHO, "seconds": seconds, "floor_seconds": floor, "of_floor": seconds / floor,
                          "floor_is": "float64 operations"}])  # fmt: skip


def sampling_error(model: nn.Module, x: Tensor) -> pd.DataFrame:
    """How far patterns from sampled positions are from exact ones: |a - a_exact| / |a_exact|, over live neurons."""
    exact, sampled = _moments(model, x), _moments(model, x, positions=POSITIONS)
    rows = []
    for name in exact:
        weight = model.get_submodule(name).weight.flatten(1).double()  # type: ignore[operator]
        row: dict[str, Any] = {"layer": name, "positions": int(exact[name].n) // len(x)}
        for estimator in (Linear(), TwoRegimes()):
            a, b = (estimator.fit(weight, m[name], torch.Generator()) for m in (exact, sampled))
            live = ~(a.dead | b.dead)
            error = (b.positive - a.positive)[live].norm(dim=1) / a.positive[live].norm(dim=1)
            row[f"{estimator.name}_median"] = float(error.median())
            row[f"{estimator.name}_90_percent_below"] = float(error.quantile(0.9))
        rows.append(row)
    return pd.DataFrame(rows)


def _moments(model: nn.Module, x: Tensor, **settings: Any) -> dict[str, Moments]:
    run, collectors = moment_pass(model, fast_layout(x), False, **settings)
    run()
    return {name: collector.moments() for name, collector in collectors.items()}
