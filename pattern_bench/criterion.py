"""The stages that measure ρ(S): in closed form, by descent as the paper did, and how sure both are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from pattern_bench.core.estimators import Pattern
from pattern_bench.core.moments import Moments
from pattern_bench.core.network import collecting
from pattern_bench.core.quality import Probe, Target, rho
from pattern_bench.core.reading import Reader
from pattern_bench.data.splits import SPLITS
from pattern_bench.errors import UserError
from pattern_bench.progress import Bar
from pattern_bench.results import BOOTSTRAP_COLUMNS, rho_rows
from pattern_bench.stages import Setup, fit_pattern, kept_moments
from pattern_bench.streams import ReaderDescent, ReadingStream, Seen, fast_layout

AGREEMENT = 0.02
"""A difference in ρ that no figure shows."""


def probes(setup: Setup) -> list[str]:
    """How v is fitted, in the order of the results."""
    name = setup.cfg.probe.name
    return ["closed_form", "sgd"] if name == "both" else [name]


def _rows(setup: Setup, layer: str, values: Tensor, dead: Tensor, probe: str) -> pd.DataFrame:
    common = {**setup.names, "estimator": setup.estimator.name, "criterion": setup.cfg.criterion, "probe": probe}
    return rho_rows(layer, setup.all_layers.index(layer), values, dead, common)


def missing_rho(setup: Setup) -> pd.DataFrame:
    """Rows without rho, for an estimator that has none."""
    tables = []
    for probe in probes(setup):
        for layer in setup.layers:
            count = len(setup.weight(layer))
            nothing, alive = torch.full((count,), torch.nan), torch.zeros(count, dtype=torch.bool)
            tables.append(_rows(setup, layer, nothing, alive, probe))
    return pd.concat(tables, ignore_index=True)


# --- closed form ---


def closed_form(
    setup: Setup,
    patterns: Mapping[str, Pattern],
    probe: Mapping[str, Moments],
    test: Mapping[str, Moments],
    bar: Bar,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """rho of every neuron, and the regularisation that each layer needed."""
    tables, regularisation = [], {}
    bar.start(len(patterns))
    for layer, pattern in patterns.items():
        values, regularisation[layer] = _layer_rho(setup, layer, pattern, probe[layer], test[layer])
        tables.append(_rows(setup, layer, values, pattern.dead, "closed_form"))
        bar.advance(detail=layer)
    return pd.concat(tables, ignore_index=True), regularisation


def _layer_rho(setup: Setup, layer: str, pattern: Pattern, probe: Moments, test: Moments) -> tuple[Tensor, float]:
    here = Pattern(*(tensor.to(setup.device) for tensor in vars(pattern).values()))
    bias: Any = setup.model.get_submodule(layer).bias
    target = Target(setup.cfg.criterion, None if bias is None else bias.double().to(setup.device))
    try:
        fitted = Probe(probe.to(setup.device), setup.cfg.probe.regularisation, setup.memory)
    except ValueError as error:
        raise UserError(f"rho of layer {layer}: {error}") from error
    direction = fitted.direction(here, target)
    regularisation = fitted.regularisation
    del fitted  # its factor is as large as the Gram matrix that comes next
    return rho(direction, test.to(setup.device), here, target, setup.memory), regularisation


# --- descent ---


def descent(
    setup: Setup, patterns: Mapping[str, Pattern], folder: Path, fit_bar: Bar
) -> tuple[dict[str, Reader], dict[str, Any], Seen]:
    """Readers of the selected layers, fitted on the probe split; what the descent took; what it met.

    The readers of the epoch with the lowest loss are kept in ``folder/checkpoints``, and are those returned.
    """
    cfg, split = setup.cfg.probe, setup.splits["probe"]
    layers: dict[str, Any] = {layer: setup.model.get_submodule(layer) for layer in patterns}
    readers = {
        layer: Reader(layers[layer], pattern, setup.cfg.criterion, cfg.regularisation).to(setup.device)
        for layer, pattern in patterns.items()
    }
    first = next((batch.images for batch in setup.loader(split) if batch.images is not None), None)
    if first is None:
        raise UserError(f"none of the {len(split)} images of the probe split can be read: mend the files")
    setup.model.to(setup.device)
    with torch.no_grad(), collecting(setup.model, {name: _Calibration(reader) for name, reader in readers.items()}):
        setup.model(fast_layout(first.to(setup.device)))
    fit_bar.start(cfg.steps)
    module = ReaderDescent(setup.model, readers, cfg.learning_rate, cfg.steps, setup.source.batch_size)
    best = ModelCheckpoint(folder / "checkpoints", "readers-{step}", monitor="loss", save_on_train_epoch_end=True)
    patience = EarlyStopping("loss", patience=cfg.patience, min_delta=1e-5, check_on_train_epoch_end=True)
    pl.seed_everything(setup.cfg.seed, workers=True, verbose=False)  # of the order of images
    trainer = setup.trainer(fit_bar, best, patience, max_steps=cfg.steps, max_epochs=-1)
    trainer.fit(module, setup.loader(split, shuffle=True))
    state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    module.load_state_dict({key: tensor for key, tensor in state.items() if key.startswith("readers.")})
    took = {
        "steps": trainer.global_step,
        "loss": float(best.best_model_score or 0),
        "stopped_early": patience.stopped_epoch > 0,
    }
    return readers, took, module.seen


class _Calibration:
    """Shows a reader the first call of its layer."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.done = reader, False

    def add(self, x: Tensor, y: Tensor) -> None:
        if not self.done:
            self.reader.calibrate(x, y)
        self.done = True


def measure_readers(
    setup: Setup, patterns: Mapping[str, Pattern], readers: Mapping[str, Reader], bar: Bar
) -> tuple[pd.DataFrame, Seen]:
    """rho of every neuron from what the readers read on the validation images."""
    loader = setup.loader(setup.splits["validation"])
    bar.start(len(loader))
    stream = ReadingStream(setup.model, readers)
    setup.trainer(bar).predict(stream, loader, return_predictions=False)
    tables = [
        _rows(setup, layer, correlation.rho(), patterns[layer].dead, "sgd")
        for layer, correlation in stream.correlations.items()
    ]
    return pd.concat(tables, ignore_index=True), stream.seen


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


# --- uncertainty ---


def bootstrap(setup: Setup, bar: Bar) -> pd.DataFrame:
    """Mean and median of rho over live neurons, by layer, with the images of every split drawn again in chunks.

    Patterns, v and ρ are all computed anew for each draw, so the spread is that of the whole procedure.
    """
    settings = setup.cfg.bootstrap
    bar.start(settings.resamples * len(setup.layers))
    rows = []
    for layer in setup.layers:
        chunks = {split: kept_moments(setup, split, layer, gram=split != "fit") for split in SPLITS}
        for resample in range(settings.resamples):
            # The same draws for every layer.
            generator = torch.Generator().manual_seed(setup.seed(f"bootstrap {resample}"))
            drawn = {split: _drawn(sums, generator) for split, sums in chunks.items()}
            pattern = fit_pattern(setup, layer, drawn["fit"])
            values, _ = _layer_rho(setup, layer, pattern, drawn["probe"], drawn["validation"])
            live = values[~pattern.dead.to(values.device)]
            live = live[~live.isnan()]
            rows.append(
                {
                    **setup.names,
                    "layer": layer,
                    "layer_index": setup.all_layers.index(layer),
                    "estimator": setup.estimator.name,
                    "criterion": setup.cfg.criterion,
                    "probe": "closed_form",
                    "resample": resample,
                    "mean": float(live.mean()),
                    "median": float(live.quantile(0.5)) if len(live) else float("nan"),
                }
            )
            bar.advance(detail=layer)
    return pd.DataFrame(rows, columns=list(BOOTSTRAP_COLUMNS))


def _drawn(chunks: list[Moments], generator: torch.Generator) -> Moments:
    """The sum of as many chunks, drawn with replacement."""
    counts = torch.randint(len(chunks), (len(chunks),), generator=generator).bincount(minlength=len(chunks))
    kept = [sums.times(count) for sums, count in zip(chunks, counts.tolist(), strict=True) if count]
    for sums in kept[1:]:
        kept[0].add_(sums)
    return kept[0]
