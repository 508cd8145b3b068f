"""What every stage of a job needs: data, splits and network, with every setting checked before long work starts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pattern_bench.configuration.build import build
from pattern_bench.core import weight_digests
from pattern_bench.core.canonical import canonical
from pattern_bench.core.estimators import Estimator
from pattern_bench.core.half_precision import images_for, widened
from pattern_bench.core.memory import fits
from pattern_bench.core.network import layers_in_order, select_layers
from pattern_bench.core.outputs import as_logits
from pattern_bench.core.probe_closed_form import CRITERIA
from pattern_bench.data.base import Source
from pattern_bench.data.splits import GlobalBatches, Split, Unreadable, joined, make_splits
from pattern_bench.engine.progress import Bar, LightningBar
from pattern_bench.engine.trainer import make_trainer
from pattern_bench.engine.training import Learner
from pattern_bench.errors import UserError, did_you_mean
from pattern_bench.metrics.degradation import ORDERS, REPLACEMENTS
from pattern_bench.models.base import ModelSource, Training, fingerprint
from pattern_bench.processes import collectives
from pattern_bench.processes.launch import threads_as_alone
from pattern_bench.storage.cache import Cache, key_of
from pattern_bench.storage.stage_state import Partial

TRAINING_VERSION = 3


@dataclass
class Setup:
    """Data, network and settings, checked."""

    cfg: DictConfig
    folder: Path
    cache: Cache
    source: Source
    splits: dict[str, Split]
    model_name: str
    classifier: bool
    model: nn.Module
    model_key: str
    all_layers: list[str]
    layers: list[str]
    estimator: Estimator
    sample: Tensor
    outputs: int
    belongs_to: dict[str, str] = field(default_factory=dict)
    """The weights of the network as it came, before it was brought into canonical form (``core.belonging``)."""

    @property
    def names(self) -> dict[str, str]:
        return {"model": self.model_name, "data": self.source.name}

    @property
    def device(self) -> torch.device:
        return self.trainer().strategy.root_device

    def trainer(self, bar: Bar | None = None, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
        bars = [] if bar is None else [LightningBar(bar)]
        return make_trainer(self.cfg.trainer, [*bars, *callbacks], **settings)

    def loader(self, split: Split, positions: Iterable[int], batch_size: int | None = None) -> DataLoader:
        return split.loader(positions, batch_size or self.source.batch_size, self.source.workers)

    def partial(self, stage: str, **parts: Any) -> Partial:
        """The unfinished state of a stage, which depends on ``parts``."""
        return Partial(self.folder, stage, key_of(**{**parts, **self.arithmetic}), self.cfg.checkpoint.seconds)

    @property
    def arithmetic(self) -> dict[str, Any]:
        """The part of every key that says how products are rounded, where that is not as usual."""
        return {"tf32": True} if self.cfg.trainer.get("tf32") else {}

    def seed(self, layer: str) -> int:
        """A seed of its own for what is drawn for a layer."""
        digest = hashlib.sha256(f"{self.cfg.seed} {layer}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    @property
    def memory(self) -> int:
        """Bytes that temporaries may take."""
        return round(self.cfg.moments.memory_gib * 2**30)

    def weight(self, layer: str) -> Tensor:
        """(N, D), float64, on the CPU as the moments are."""
        return self.model.get_submodule(layer).weight.flatten(1).double().cpu()  # type: ignore[operator]


def prepare(cfg: DictConfig, folder: Path, bar: Bar, check: Callable[[Setup], None]) -> Setup:
    """Data, splits and network, every setting checked; trains the network where it comes without weights.

    ``check`` refuses, before that, what the stages to come cannot do; the setup's model is not trained then.
    """
    cache = Cache(cfg.cache.dir, cfg.cache.gib)
    estimator: Estimator = build(cfg.estimator)
    model_source: ModelSource = build(cfg.model)
    source: Source = build(cfg.data)
    source.cache = cache
    _check_numbers(cfg)
    splits = make_splits(source, cfg.seed)
    _check_bootstrap(cfg, cache, splits)
    transform = model_source.transform() or source.transform()
    for split in splits.values():
        split.transform = transform
    if source.strict:
        _read_all(splits, bar)
    sample = _sample(splits["fit"])
    pool = splits["fit"].pool

    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    built = widened(model_source.build(sample, pool.classes))
    sample = _in_precision_of(built, sample, splits)
    logits, outputs = _logits(built, sample, model_source, source.name)
    network = canonical(logits, sample[None])  # before any training, so that what is refused is refused at once
    names = layers_in_order(network, sample[None])
    if not names:
        raise UserError(f"model={model_source.name} has no Conv or Linear layer to examine: choose another model")
    _check_finite(network, cfg)
    setup = Setup(
        cfg, folder, cache, source, splits, model_source.name, model_source.classifier, network, "", names,
        select_layers(names, layer_setting(cfg)), estimator, sample, outputs,
    )  # fmt: skip
    check(setup)
    if model_source.training is not None:
        if pool.labels is None:
            raise UserError(
                f"model={model_source.name} has no weights and data={source.name} no labels to train it on: "
                "give model.weights=FILE, or images in one subfolder per class"
            )
        if outputs == 1 and not source.regression and pool.classes != 2:
            raise UserError(
                f"model={model_source.name} has one output and data={source.name} {pool.classes} classes: one output "
                "tells two classes apart, so choose a model with as many outputs as classes"
            )
        _train(setup, logits, model_source.training, bar)
        setup.model = canonical(logits, sample[None])
        _check_finite(setup.model, cfg)
    setup.model_key = fingerprint(setup.model, _settings(cfg.model))
    setup.belongs_to = weight_digests.belongs_to(built, sample[None], setup.layers)
    return setup


@dataclass(frozen=True)
class _Cast:
    """A transform whose images come in another precision."""

    transform: Callable[[Any], Tensor]
    dtype: torch.dtype

    def __call__(self, image: Any) -> Tensor:
        return self.transform(image).to(self.dtype)


def _in_precision_of(network: nn.Module, sample: Tensor, splits: Mapping[str, Split]) -> Tensor:
    """``sample`` as the network takes it; the images of the splits will come in that precision, too."""
    cast = images_for(network, sample)
    if cast.dtype != sample.dtype:
        for split in splits.values():
            split.transform = _Cast(split.transform, cast.dtype)
    return cast


def _settings(model: DictConfig) -> dict[str, Any]:
    """The settings of a model that neither its printed form nor its weights may show, such as an activation's slope.

    Left out are its name, how it was trained, and which file its weights came from.
    """
    settings: Any = OmegaConf.to_container(model, resolve=True)
    left_out = ("name", "training", "classifier")
    return {key: value for key, value in settings.items() if key not in left_out} | {
        "weights": settings.get("weights") is not None
    }


def layer_setting(cfg: DictConfig) -> str | list[str]:
    """``cfg.layer`` as plain data."""
    return [str(name) for name in cfg.layer] if isinstance(cfg.layer, ListConfig) else str(cfg.layer)


def _check_numbers(cfg: DictConfig) -> None:
    smallest = {
        "explanation.images": 1, "degradation.images": 1, "degradation.patch": 1, "degradation.steps": 1,
        "data.batch_size": 1, "data.workers": 0, "data.limit": 1, "seed": 0, "probe.steps": 1, "probe.patience": 1,
        "probe.neurons": 1, "bootstrap.resamples": 0, "bootstrap.chunks": 2, "data.data_seed": 0,
    }  # fmt: skip
    for setting, least in smallest.items():
        value = OmegaConf.select(cfg, setting, default=least)  # a group that is not chosen has none
        if value is None and setting != "data.data_seed":  # elsewhere it leaves the choice to the suite
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{setting}={value} is not possible: give a whole number of at least {least}")
    if cfg.criterion not in CRITERIA:
        raise UserError(f"criterion={cfg.criterion} is unknown: {did_you_mean(str(cfg.criterion), CRITERIA)}")
    seconds = cfg.checkpoint.seconds
    if isinstance(seconds, bool) or not isinstance(seconds, float | int) or not 0 <= seconds < math.inf:
        raise UserError(f"checkpoint.seconds={seconds} is not possible: give a number, 0 for after every batch")
    for setting in (
        "probe.regularisation", "probe.learning_rate", "moments.memory_gib", "moments.positions", "data.fit",
        "data.probe", "data.validation",
    ):  # fmt: skip
        value = OmegaConf.select(cfg, setting, default=1.0)
        if not (isinstance(value, float | int) and 0 < value < math.inf):
            raise UserError(f"{setting}={value} is not possible: give a positive number")
    gib = cfg.cache.gib
    if gib is not None and (isinstance(gib, bool) or not isinstance(gib, float | int) or not 0 < gib < math.inf):
        raise UserError(f"cache.gib={gib} is not possible: give a positive number of GiB, or null for no bound")
    if cfg.moments.positions > 1:
        raise UserError(f"moments.positions={cfg.moments.positions} is no share: give up to 1.0, which is exact")
    for setting, choices in (("order", ORDERS), ("replacement", REPLACEMENTS)):
        value = str(cfg.degradation[setting])
        if value not in choices:
            raise UserError(f"degradation.{setting}={value} is unknown: choose from {', '.join(choices)}")
    if isinstance(cfg.degradation.value, bool) or not isinstance(cfg.degradation.value, float | int):
        raise UserError(f"degradation.value={cfg.degradation.value} is no number: give one, such as 0.0")
    if cfg.seed >= 2**32:
        raise UserError(f"seed={cfg.seed} is too large for NumPy's generator: give one below 2**32 = {2**32}")
    if cfg.bootstrap.resamples == 1:
        raise UserError("bootstrap.resamples=1 has no spread: give 0 for no bootstrap, or at least 2")
    if cfg.bootstrap.resamples and cfg.probe.name == "sgd":
        raise UserError(
            "bootstrap.resamples needs the closed form, which the moments of chunks are enough for: give "
            "probe=closed_form or probe=both, or bootstrap.resamples=0"
        )


def _check_finite(model: nn.Module, cfg: DictConfig) -> None:
    """
    Raises:
        UserError: naming the first layer whose weights are not numbers.
    """
    for name, tensor in model.state_dict().items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            layer, _, part = name.rpartition(".")
            raise UserError(
                f"model.weights={cfg.model.get('weights')}: layer {layer} has NaN or Inf in {bad} of "
                f"{tensor.numel()} values of its {part}: give other weights, or train with a smaller learning rate"
            )


def _check_bootstrap(cfg: DictConfig, cache: Cache, splits: Mapping[str, Split]) -> None:
    if not cfg.bootstrap.resamples:
        return
    fewest = min(len(split) for split in splits.values())
    if cfg.bootstrap.chunks > fewest:
        raise UserError(
            f"bootstrap.chunks={cfg.bootstrap.chunks} is more than the {fewest} images of the smallest split: give "
            "fewer chunks, or more images"
        )
    if not cache.writable:
        raise UserError(
            f"bootstrap.resamples keeps the moments of chunks in cache.dir={cfg.cache.dir}, which cannot be written: "
            "choose another cache.dir"
        )


def _read_all(splits: Mapping[str, Split], bar: Bar) -> None:
    bar.start(sum(len(split) for split in splits.values()), "reading every image (data.strict)", "images")
    for split in splits.values():
        for position in range(len(split)):
            split[position]
            bar.advance()


def _sample(split: Split) -> Tensor:
    """The first image that can be read."""
    item: Any = None
    for position in range(len(split)):
        item = split[position]
        if not isinstance(item, Unreadable):
            return item[0]
    raise UserError(
        f"none of the {len(split)} images of the fit split can be read ({split.name(item.position)}: {item.reason})"
    )


def _logits(model: nn.Module, sample: Tensor, source: ModelSource, data: str) -> tuple[nn.Module, int]:
    """The model as one that puts out logits, and how many for each of the data's images."""
    try:
        found = as_logits(model.eval(), sample[None], source.output)
        with torch.no_grad():
            return found, found(sample[None]).shape[1]
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"model={source.name} cannot take data={data}, whose images have shape {tuple(sample.shape)} "
            f"({str(error).splitlines()[0]}): choose a model and data that fit"
        ) from error


def _train(setup: Setup, model: nn.Module, training: Training, bar: Bar) -> None:
    """Gives ``model`` trained weights, from the cache where an earlier job left them. The first process trains, so that
    they are the same however many there are."""
    if collectives.first():
        _train_here(setup, model, training, bar)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(collectives.from_first(tensor))


def _train_here(setup: Setup, model: nn.Module, training: Training, bar: Bar) -> None:
    images = joined(setup.splits["fit"], setup.splits["probe"])
    # The initial weights stand for the architecture; where they are constant, the seed still orders the batches.
    key = key_of(
        version=TRAINING_VERSION, images=images.fingerprint, initial=fingerprint(model, _settings(setup.cfg.model)),
        training=vars(training), seed=setup.cfg.seed, regression=setup.source.regression, **setup.arithmetic,
    )  # fmt: skip
    with setup.cache.lock("models", key):
        entry = setup.cache.load("models", key)
        if entry is not None:
            model.load_state_dict(entry[0])
            return
        batches = GlobalBatches(len(images), training.batch_size, setup.cfg.seed)
        bar.start(training.epochs * len(images), "training", "images")
        learner = Learner(model, training, setup.source.regression, batches)
        device = setup.device
        every_epoch, last = checkpoint(setup.folder, f"training-{key}")
        alone = {"devices": 1, "num_nodes": 1, "strategy": SingleDeviceStrategy(device)}
        trainer = setup.trainer(bar, every_epoch, max_epochs=training.epochs, **alone)
        loader = images.shuffled(batches, setup.source.workers)
        model.train()
        with threads_as_alone():
            done = fits(lambda: trainer.fit(learner, loader, ckpt_path=last, weights_only=True))
        model.eval()
        if not done:
            raise learner.too_small("the model and what Adam keeps of it")
        setup.cache.save("models", key, model.state_dict(), setup.names)


def checkpoint(folder: Path, name: str) -> tuple[ModelCheckpoint, Path | None]:
    """Keeps Lightning's state after every epoch; and the file with it, where an earlier run left one."""
    file = folder / "partial" / f"{name}.ckpt"
    keep = _Checkpoint(file.parent, name, save_on_train_epoch_end=True, enable_version_counter=False)
    return keep, file if file.is_file() else None


class _Checkpoint(ModelCheckpoint):
    """Lightning's, but that it takes no file's word for which other files there are: it would remove them."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
