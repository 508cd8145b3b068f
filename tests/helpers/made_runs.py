"""Run folders as the job leaves them, made in no time, with numbers that tests can choose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from PIL import Image

from pattern_bench.reporting.gathering import Gathered, gather

LAYERS = {"features.0": 8, "features.2": 12, "classifier": 5}


def make_run(
    folder: Path, *, model="net", data="digits", estimator="a", criterion="all", method="pattern_attribution",
    layers=None, seed=0, better=0.0, ended="2026-01-01T00:00:00+00:00", run_id=None, resamples=0, steps=8, images=20,
    overrides=None, accuracy=0.9, settings=None, picture=False, seconds=None, dead=None,
) -> Path:  # fmt: skip
    """A complete run of one estimator; ``better`` is added to all its ρ, and ``dead`` are the neurons of each layer
    that have none (every seventh by default)."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = LAYERS if layers is None else layers
    draw, again = (np.random.default_rng([part, seed, *estimator.encode()]) for part in (0, 1))
    names = {"model": model, "data": data, "estimator": estimator, "criterion": criterion, "probe": "closed_form"}
    tables, drawn = [], []
    for index, (layer, neurons) in enumerate(layers.items()):
        rho = np.clip(draw.normal(0.6, 0.1, neurons), 0, 1) + better
        dies = np.arange(neurons) % 7 == 6 if dead is None else np.isin(np.arange(neurons), list(dead))
        rho = np.full(neurons, np.nan) if estimator == "x" else np.where(dies, np.nan, rho)
        table = pd.DataFrame({"neuron": range(neurons), "rho": rho, "dead": dies & (estimator != "x")})
        tables.append(table.assign(layer=layer, layer_index=index, **names))
        if resamples:
            noise = again.normal(0, 0.02, resamples)
            rows = {"resample": range(resamples), "mean": np.nanmean(rho) + noise, "median": np.nanmedian(rho) + noise}
            drawn.append(pd.DataFrame(rows).assign(layer=layer, layer_index=index, **names))
    order = ["model", "data", "layer", "layer_index", "estimator", "criterion", "probe"]
    pd.concat(tables)[[*order, "neuron", "rho", "dead"]].to_csv(folder / "rho.csv", index=False)
    if resamples:
        pd.concat(drawn)[[*order, "resample", "mean", "median"]].to_csv(folder / "bootstrap.csv", index=False)
    curves, intervals = [], {}
    for name, fall in ((method, 0.6 + better), ("random_order", 0.3)):
        mean = 1 - fall * np.linspace(0, 1, steps + 1)
        who = "none" if name == "random_order" or not method.startswith("pattern") else estimator
        curve = {"step": range(steps + 1), "probability_mean": mean, "probability_std": 0.2, "n": images}
        curves.append(pd.DataFrame(curve).assign(model=model, data=data, estimator=who, method=name))
        area = float((mean[0] - mean).mean())
        intervals[name] = [area - 0.05, area + 0.05]
    columns = ["model", "data", "estimator", "method", "step", "probability_mean", "probability_std", "n"]
    pd.concat(curves)[columns].to_csv(folder / "degradation.csv", index=False)
    known = {"model": model, "data": data}
    (folder / "accuracy.json").write_text(json.dumps({**known, "top1": accuracy, "top5": 1.0, "images": 100}))
    config = {"model": {"name": model}, "data": {"name": data, "limit": 300}, "seed": seed, "criterion": criterion}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **(settings or {})}))
    if overrides is not None:
        hydra(folder, overrides)
    if picture:
        Image.new("RGB", (60, 40), (10 * seed, 80, 120)).save(folder / "explanations.png")
    summary = {
        **names, "method": method, "ended": ended, "area_over_curve_interval": intervals, "skipped": {},
        "versions": {"python": "3.11", "torch": "2.11"}, **({"run_id": run_id} if run_id else {}),
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def hydra(folder: Path, overrides: list[str], name: str = "pattern_bench") -> None:
    """What Hydra writes into the folder of a run as it begins."""
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump({"hydra": {"job": {"name": name}}}))


def make_sweep(folder: Path, task: list[str], params=None, own=(), sweeper="BasicSweeper") -> Path:
    """What Hydra writes into the folder of a sweep as it begins."""
    folder.mkdir(parents=True, exist_ok=True)
    node = {
        "job": {"name": "pattern_bench"},
        "sweeper": {"_target_": f"hydra._internal.core_plugins.basic_sweeper.{sweeper}", "params": params},
        "overrides": {"task": task, "hydra": ["hydra.mode=MULTIRUN", *own]},
    }
    (folder / "multirun.yaml").write_text(yaml.safe_dump({"hydra": node}))
    return folder


def gather_from(*folders: Path) -> Gathered:
    """Lay the runs below the folders together, as a report does."""
    return gather([(folder, folder.name) for folder in folders])
