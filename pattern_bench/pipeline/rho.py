"""The stages that measure ρ(S): in closed form, by descent as the paper did, and how sure both are."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from pattern_bench.core.active_moments import FiringMoments, firing_rho
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.memory import fits
from pattern_bench.core.moments import Moments
from pattern_bench.core.network import collecting
from pattern_bench.core.probe_closed_form import CLOSED_FORM, Probe, Target, rho
from pattern_bench.core.probe_sgd import Correlation, Reader
from pattern_bench.data.splits import GlobalBatches
from pattern_bench.engine.progress import Bar
from pattern_bench.engine.streams import ReadingStream, Seen, fast_layout
from pattern_bench.engine.training import ReaderDescent
from pattern_bench.errors import UserError
from pattern_bench.pipeline.patterns import M, SplitMoments, Sums, all_samples, fit_pattern, measured, where_firing
from pattern_bench.pipeline.run_pass import Met, met, stream_over
from pattern_bench.pipeline.setup import Setup, checkpoint
from pattern_bench.processes import collectives
from pattern_bench.results.schema import BOOTSTRAP_COLUMNS, RHO_COLUMNS, rho_rows
from pattern_bench.storage.tensor_files import checksum

log = logging.getLogger(__name__)
ROUND = 100
"""Batches, at most, after which descent looks at its loss and keeps its state."""
AGREEMENT = 0.02
"""A difference in ρ that no figure shows."""
DESCENT_VERSION = 2
"""Of what a descent keeps; another's is begun again."""
Tell = Callable[[int, dict[str, float]], None]


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


def sums(setup: Setup) -> Sums:
    """What the closed form needs of a split."""
    return all_samples(setup, gram=True) if setup.cfg.criterion in CLOSED_FORM else where_firing(setup)


def closed_form(
    setup: Setup,
    patterns: Mapping[str, Pattern],
    probe: SplitMoments,
    test: SplitMoments,
    bar: Bar,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """rho of every neuron, under ``positive`` of the measured ones, and the regularisation that each layer needed; in
    the first process, where moments are."""
    tables, regularisation = [], {}
    if not collectives.first():
        return pd.DataFrame(columns=list(RHO_COLUMNS)), {}
    bar.start(len(patterns))
    for layer, pattern in patterns.items():
        values, regularisation[layer] = _layer_rho(setup, layer, pattern, probe[layer], test[layer])
        rows = _rows(setup, layer, values, pattern.dead, "closed_form")
        if setup.cfg.criterion not in CLOSED_FORM:
            rows = rows.iloc[measured(setup, layer).numpy()]
        tables.append(rows)
        bar.advance(detail=layer)
    return pd.concat(tables, ignore_index=True), regularisation


def _layer_rho(setup: Setup, layer: str, pattern: Pattern, probe: M, test: M) -> tuple[Tensor, float]:
    """rho (N,), NaN for those not measured, and the regularisation, computed on the device, or on the CPU where Gram
    matrices find no room there."""
    found: list[tuple[Tensor, float]] = []

    def compute(device: torch.device) -> None:
        found.append(_layer_rho_on(device, setup, layer, pattern, probe, test))

    for device in dict.fromkeys((setup.device, torch.device("cpu"))):
        if fits(functools.partial(compute, device)):
            return found[0]
        log.warning("out of memory with ρ of layer %s on %s", layer, device)
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
            neurons = measured(setup, layer).to(device)
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


# --- descent ---


def descent(
    setup: Setup, patterns: Mapping[str, Pattern], fit_bar: Bar, tell: Tell, listened: bool
) -> tuple[dict[str, Reader], dict[str, Any], Met]:
    """Readers of the selected layers, fitted on the probe split; what the descent took; what it met.

    The readers of the round with the lowest loss are kept in the run's ``checkpoints``, and are those returned. Every
    round's number is told as soon as it is over, with its ``loss``, and the ``rho`` of some validation images;
    those of an interrupted run again, at once. That ρ is NaN, and costs nothing, unless somebody ``listened``.
    """
    cfg, split = setup.cfg.probe, setup.splits["probe"]
    layers: dict[str, Any] = {layer: setup.model.get_submodule(layer) for layer in patterns}
    readers = {
        layer: Reader(layers[layer], pattern, setup.cfg.criterion, cfg.regularisation).to(setup.device)
        for layer, pattern in patterns.items()
    }
    setup.model.to(setup.device)
    used = {f"{layer}/{part}": tensor for layer, p in patterns.items() for part, tensor in vars(p).items()}
    parts = {
        "version": DESCENT_VERSION, "model": setup.model_key, "images": split.fingerprint,
        "patterns": checksum(used, {}), "seed": setup.cfg.seed,
        "criterion": setup.cfg.criterion, "probe": dict(cfg), "batch_size": setup.source.batch_size,
    }  # fmt: skip
    partial = setup.partial("readers", **parts)
    batches = GlobalBatches(
        len(split), setup.source.batch_size, setup.cfg.seed, collectives.rank(), collectives.size(), most=ROUND
    )
    module = ReaderDescent(setup.model, readers, cfg.learning_rate, cfg.steps, batches)
    if (kept := partial.load()) is not None:
        state = kept[0]
        module.load_state_dict({name: tensor for name, tensor in state.items() if name.startswith("readers.")})
        took = {"steps": int(state["steps"]), "loss": float(state["loss"]), "stopped_early": bool(state["early"])}
        for epoch, values in enumerate(state["rounds"].tolist()):
            tell(epoch, dict(zip(("loss", "rho"), values, strict=True)))
        return readers, took, met(split, Seen.from_tensors(state))
    _calibrate(setup, module)
    fit_bar.start(cfg.steps, unit="steps")
    best = ModelCheckpoint(setup.folder / "checkpoints", "readers-{step}", monitor="loss", save_on_train_epoch_end=True)
    patience = EarlyStopping("loss", patience=cfg.patience, min_delta=1e-5, check_on_train_epoch_end=True)
    # Last, so that it holds what the others have come to.
    every_round, last = checkpoint(setup.folder, f"readers-{partial.key}")
    trainer = setup.trainer(
        fit_bar,
        _Telling(module, tell, _held_out(setup, module, patterns, listened)),
        best,
        patience,
        every_round,
        max_epochs=-1,
    )
    loader = split.shuffled(batches, setup.source.workers)
    if not fits(lambda: trainer.fit(module, loader, ckpt_path=last, weights_only=True)):
        raise module.too_small("the readers of all layers and what Adam keeps of them")
    state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name: tensor for name, tensor in state.items() if name.startswith("readers.")}
    module.load_state_dict(state)
    loss = float(best.best_model_score or 0)
    took = {"steps": trainer.global_step, "loss": loss, "stopped_early": patience.stopped_epoch > 0}
    ends = {"steps": trainer.global_step, "loss": loss, "early": took["stopped_early"]}
    end = {name: torch.tensor(value, dtype=torch.float64) for name, value in ends.items()}
    rounds = torch.tensor([[values["loss"], values["rho"]] for values in module.rounds], dtype=torch.float64)
    partial.save(state | end | {"rounds": rounds} | module.seen.tensors(), len(split))
    return readers, took, met(split, module.seen)


class _Telling(pl.Callback):
    """Tells of every round."""

    def __init__(self, module: ReaderDescent, tell: Tell, measure: Callable[[], float]) -> None:
        self.module, self.tell, self.measure = module, tell, measure

    def on_train_start(self, *_: Any) -> None:
        for epoch, values in enumerate(self.module.rounds):
            self.tell(epoch, values)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.module.rounds.append({"loss": float(trainer.callback_metrics["loss"]), "rho": self.measure()})
        self.tell(len(self.module.rounds) - 1, self.module.rounds[-1])


def _held_out(
    setup: Setup, module: ReaderDescent, patterns: Mapping[str, Pattern], listened: bool
) -> Callable[[], float]:
    """What measures the mean ρ of the live neurons, as the readers are now, on the first validation images: a batch at
    most, and few beside those of a round, since it is measured after every round.

    The loss has the regularisation in it, and is of the images that the readers are fitted on. This can be compared
    between runs with another one. It is NaN where nobody listened, and where no image can be read.
    """
    split = setup.splits["validation"]
    few = max(32, len(setup.splits["probe"]) // 10)
    images = split.batch(range(min(few, setup.source.batch_size, len(split)))).images if listened else None
    readers: dict[str, Any] = dict(zip(module.names, module.readers, strict=True))

    def measure() -> float:
        if images is None:
            return float("nan")
        total = {name: Correlation(reader) for name, reader in readers.items()}

        def take(part: slice) -> None:
            watched = {name: Correlation(reader) for name, reader in readers.items()}
            with torch.no_grad(), collecting(setup.model, watched):
                setup.model(fast_layout(images[part].to(setup.device)))
            for name, correlation in watched.items():
                total[name].sums += correlation.sums

        module.in_parts(len(images), take)
        return float(torch.cat([total[name].rho().cpu()[~patterns[name].dead.cpu()] for name in total]).nanmean())

    return measure


def _calibrate(setup: Setup, module: ReaderDescent) -> None:
    """Shows the readers one batch, the same in every process, or as much of it as the memory of each is enough for."""
    split = setup.splits["probe"]
    loader = setup.loader(split, split.share(len(split)))
    batch = next((batch for batch in loader if batch.images is not None), None)
    if batch is None:
        raise UserError(f"none of the {len(split)} images of the probe split can be read: mend the files")
    images = batch.images.to(setup.device)
    while not _everywhere(fits(functools.partial(module.calibrate, images, batch.positions))):
        module.halve(len(images))
        images = images[: module.most]


def _everywhere(fine: bool) -> bool:
    """Whether it is so in every process."""
    return int(collectives.total(torch.tensor(int(fine)))) == collectives.size()


def measure_readers(
    setup: Setup, patterns: Mapping[str, Pattern], readers: Mapping[str, Reader], bar: Bar
) -> tuple[pd.DataFrame, Met]:
    """rho of every neuron from what the readers read on the validation images."""
    split = setup.splits["validation"]
    stream = ReadingStream(setup.model, readers)
    partial = setup.partial("read", images=split.fingerprint, readers=checksum(stream.readers.state_dict(), {}),
                            model=setup.model_key, criterion=setup.cfg.criterion)  # fmt: skip
    bar.start(0, unit="images")
    stream_over(setup, stream, split, partial, bar)
    here = met(split, stream.seen)
    tables = []
    for layer, correlation in stream.watchers.items():
        correlation.sums = collectives.total(correlation.sums)
        tables.append(_rows(setup, layer, correlation.rho(), patterns[layer].dead, "sgd"))
    return pd.concat(tables, ignore_index=True), here


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


def bootstrap(
    setup: Setup, fit: SplitMoments[Moments], probe: SplitMoments, test: SplitMoments, bar: Bar
) -> pd.DataFrame:
    """Mean and median of rho over live neurons, by layer, with the images of every split drawn again in chunks; in the
    first process, which has the moments.

    Patterns, v and ρ are all computed anew for each draw, so the spread is that of the whole procedure.
    """
    settings = setup.cfg.bootstrap
    rows: list[dict[str, Any]] = []
    bar.start(settings.resamples * len(setup.layers))
    for layer in setup.layers if collectives.first() else ():
        chunks = {"fit": fit.pieces(layer), "probe": probe.pieces(layer), "validation": test.pieces(layer)}
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


def _drawn(chunks: list[M], generator: torch.Generator) -> M:
    """The sum of as many chunks, drawn with replacement."""
    counts = torch.randint(len(chunks), (len(chunks),), generator=generator).bincount(minlength=len(chunks))
    kept = [sums.times(count) for sums, count in zip(chunks, counts.tolist(), strict=True) if count]
    for sums in kept[1:]:
        kept[0].add_(sums)
    return kept[0]
