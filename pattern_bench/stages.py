"""What each stage of the job does. ``job.py`` says in which order."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from pattern_bench.cache import Cache, key_of
from pattern_bench.config import build
from pattern_bench.core.canonical import canonical
from pattern_bench.core.degradation import ORDERS, REPLACEMENTS, area_over_curve, mean_interval, random_ranks
from pattern_bench.core.estimators import Estimator, Pattern
from pattern_bench.core.moments import Moments
from pattern_bench.core.network import layers_in_order, select_layers
from pattern_bench.core.quality import CLOSED_FORM, CRITERIA
from pattern_bench.data.source import Source
from pattern_bench.data.splits import SPLITS, Split, Unreadable, joined, make_splits
from pattern_bench.errors import UserError, did_you_mean
from pattern_bench.files import write_file
from pattern_bench.methods.base import Method, create, kind_of
from pattern_bench.methods.patterns import LrpZ, PatternAttribution, PatternNet
from pattern_bench.models.source import ModelSource, Training, fingerprint
from pattern_bench.progress import Bar, LightningBar
from pattern_bench.streams import AccuracyStream, DegradationStream, Learner, MomentStream, Seen, fast_layout

MOMENTS_VERSION = 2


@dataclass
class Setup:
    """What every stage needs: data, network and settings, checked."""

    cfg: DictConfig
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

    @property
    def names(self) -> dict[str, str]:
        return {"model": self.model_name, "data": self.source.name}

    @property
    def device(self) -> torch.device:
        return self.trainer().strategy.root_device

    def trainer(self, bar: Bar | None = None, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
        return build(
            self.cfg.trainer,
            logger=False,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*([] if bar is None else [LightningBar(bar)]), *callbacks],
            **settings,
        )

    def loader(self, split: Split, shuffle: bool = False) -> torch.utils.data.DataLoader:
        return split.loader(self.source.batch_size, self.source.workers, shuffle)

    def seed(self, layer: str) -> int:
        """A seed of its own for what is drawn for a layer."""
        digest = hashlib.sha256(f"{self.cfg.seed} {layer}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    @property
    def memory(self) -> int:
        """Bytes that temporaries may take."""
        return round(self.cfg.moments.memory_gib * 2**30)

    def pieces(self, split: str) -> list[Split]:
        """What moments are kept of: the whole split, or its chunks where they will be drawn again."""
        whole = self.splits[split]
        return whole.chunks(self.cfg.bootstrap.chunks) if self.cfg.bootstrap.resamples else [whole]

    def weight(self, layer: str) -> Tensor:
        """(N, D), float64, on the CPU as the moments are."""
        return self.model.get_submodule(layer).weight.flatten(1).double().cpu()  # type: ignore[operator]


def prepare(cfg: DictConfig, bar: Bar) -> Setup:
    """Data, splits and network, every setting checked; trains the network where it comes without weights."""
    cache = Cache(cfg.cache.dir)
    estimator: Estimator = build(cfg.estimator)
    model_source: ModelSource = build(cfg.model)
    source: Source = build(cfg.data)
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
    built = model_source.build(sample, pool.classes)
    outputs = _outputs(built, sample, model_source.name, source.name)
    network = canonical(built, sample[None])  # before any training, so that what is refused is refused at once
    names = layers_in_order(network, sample[None])
    if not names:
        raise UserError(f"model={model_source.name} has no Conv or Linear layer to examine: choose another model")
    setup = Setup(
        cfg, cache, source, splits, model_source.name, model_source.classifier, network, "", names,
        select_layers(names, layer_setting(cfg)), estimator, sample, outputs,
    )  # fmt: skip
    method, _ = chosen_method(setup)
    if why_no_explanation(setup) is None:
        patch_and_steps(setup)
        check_method(setup, method)
    if model_source.training is not None:
        if pool.labels is None:
            raise UserError(
                f"model={model_source.name} has no weights and data={source.name} no labels to train it on: "
                "give model.weights=FILE, or images in one subfolder per class"
            )
        _train(setup, built, model_source.training, bar)
        setup.model = canonical(built, sample[None])
    setup.model_key = fingerprint(setup.model)
    return setup


def layer_setting(cfg: DictConfig) -> str | list[str]:
    """``cfg.layer`` as plain data."""
    return [str(name) for name in cfg.layer] if isinstance(cfg.layer, ListConfig) else str(cfg.layer)


def _check_numbers(cfg: DictConfig) -> None:
    smallest = {
        "explanation.images": 1, "degradation.images": 1, "degradation.patch": 1, "degradation.steps": 1,
        "data.batch_size": 1, "data.workers": 0, "data.limit": 1, "seed": 0, "probe.steps": 1, "probe.patience": 1,
        "bootstrap.resamples": 0, "bootstrap.chunks": 2,
    }  # fmt: skip
    for setting, least in smallest.items():
        value = OmegaConf.select(cfg, setting)
        if value is not None and (not isinstance(value, int) or value < least):
            raise UserError(f"{setting}={value} is not possible: give a whole number of at least {least}")
    if cfg.criterion not in CRITERIA:
        raise UserError(f"criterion={cfg.criterion} is unknown: {did_you_mean(str(cfg.criterion), CRITERIA)}")
    for setting in (
        "probe.regularisation", "probe.learning_rate", "moments.memory_gib", "moments.positions", "data.fit",
        "data.probe", "data.validation",
    ):  # fmt: skip
        value = OmegaConf.select(cfg, setting, default=1.0)
        if not (isinstance(value, float | int) and 0 < value < math.inf):
            raise UserError(f"{setting}={value} is not possible: give a positive number")
    if cfg.moments.positions > 1:
        raise UserError(f"moments.positions={cfg.moments.positions} is no share: give up to 1.0, which is exact")
    for setting, choices in (("order", ORDERS), ("replacement", REPLACEMENTS)):
        value = str(cfg.degradation[setting])
        if value not in choices:
            raise UserError(f"degradation.{setting}={value} is unknown: choose from {', '.join(choices)}")
    if isinstance(cfg.degradation.value, bool) or not isinstance(cfg.degradation.value, float | int):
        raise UserError(f"degradation.value={cfg.degradation.value} is no number: give one, such as 0.0")
    if cfg.criterion not in CLOSED_FORM and cfg.probe.name != "sgd":
        raise UserError(
            f"criterion={cfg.criterion} has no closed form, since every neuron has samples of its own: give "
            f"probe=sgd, or a criterion of {', '.join(CLOSED_FORM)}"
        )
    if cfg.bootstrap.resamples == 1:
        raise UserError("bootstrap.resamples=1 has no spread: give 0 for no bootstrap, or at least 2")
    if cfg.bootstrap.resamples and cfg.probe.name == "sgd":
        raise UserError(
            "bootstrap.resamples needs the closed form, which the moments of chunks are enough for: give "
            "probe=closed_form or probe=both, or bootstrap.resamples=0"
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
    bar.start(sum(len(split) for split in splits.values()), "reading every image (data.strict)")
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
    raise UserError(f"none of the {len(split)} images of the fit split can be read ({item.name}: {item.reason})")


def _outputs(model: nn.Module, sample: Tensor, name: str, data: str) -> int:
    """How many outputs the model has for the data's images."""
    try:
        with torch.no_grad():
            output = model.eval()(sample[None])
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"model={name} cannot take data={data}, whose images have shape {tuple(sample.shape)} "
            f"({str(error).splitlines()[0]}): choose a model and data that fit"
        ) from error
    if not isinstance(output, Tensor):
        raise UserError(f"model={name} returns a {type(output).__name__}: it must return one tensor of outputs")
    return output.shape[1]


def _train(setup: Setup, model: nn.Module, training: Training, bar: Bar) -> None:
    """Gives ``model`` trained weights, from the cache where an earlier job left them."""
    images = joined(setup.splits["fit"], setup.splits["probe"])
    # The initial weights stand for the architecture and the seed.
    key = key_of(images=images.fingerprint, initial=fingerprint(model), training=vars(training))
    with setup.cache.lock("models", key):
        entry = setup.cache.load("models", key)
        if entry is not None:
            model.load_state_dict(entry[0])
            return
        loader = images.loader(training.batch_size, setup.source.workers, shuffle=True)
        steps = training.epochs * len(loader)
        bar.start(steps, "training")
        learner = Learner(model, training, setup.source.regression, steps)
        setup.trainer(bar, max_epochs=training.epochs).fit(learner, loader)
        setup.cache.save("models", key, model.state_dict(), setup.names)


def collect(setup: Setup, split: str, gram: bool, bar: Bar) -> tuple[dict[str, Moments], Seen]:
    """Moments of the selected layers over a split; only those that no earlier job left in the cache are computed."""
    total: dict[str, Moments] = {}
    seen = Seen()
    pieces = setup.pieces(split)
    bar.start(sum(len(setup.loader(piece)) for piece in pieces))
    for piece in pieces:
        moments, met = _collect_piece(setup, piece, gram, bar)
        total = {layer: total[layer].add_(sums) for layer, sums in moments.items()} if total else moments
        seen.images, seen.unreadable = seen.images + met.images, seen.unreadable + met.unreadable
    if seen.images < 2:
        raise UserError(
            f"only {seen.images} of the {len(setup.splits[split])} images of the {split} split can be read: "
            "mend the files, or ask for more images (data.limit, data.fit, data.probe, data.validation)"
        )
    return total, seen


def _moments_keys(setup: Setup, piece: Split, gram: bool) -> tuple[str, dict[str, str]]:
    """The name of a piece's lock, and of each layer's entry."""
    shared: dict[str, Any] = {"version": MOMENTS_VERSION, "model": setup.model_key, "images": piece.fingerprint}
    if setup.cfg.moments.positions < 1:
        shared |= {"positions": setup.cfg.moments.positions, "seed": setup.cfg.seed}
    return key_of(**shared), {layer: key_of(**shared, layer=layer, gram=gram) for layer in setup.layers}


def _collect_piece(setup: Setup, piece: Split, gram: bool, bar: Bar) -> tuple[dict[str, Moments], Seen]:
    lock, keys = _moments_keys(setup, piece, gram)
    loader = setup.loader(piece)
    with setup.cache.lock("moments", lock):
        entries = {layer: setup.cache.load("moments", keys[layer]) for layer in setup.layers}
        missing = [layer for layer in setup.layers if entries[layer] is None]
        moments = {layer: Moments.from_tensors(entry[0]) for layer, entry in entries.items() if entry is not None}
        if not missing:
            metadata = entries[setup.layers[0]][1]  # type: ignore[index]
            bar.advance(len(loader))
            return moments, Seen(int(metadata["images"]), json.loads(metadata["unreadable"]))
        seeds = {layer: setup.seed(layer) for layer in missing}
        stream = MomentStream(setup.model, missing, gram, setup.memory, setup.cfg.moments.positions, seeds)
        setup.trainer(bar).predict(stream, loader, return_predictions=False)
        metadata = {"images": str(stream.seen.images), "unreadable": json.dumps(stream.seen.unreadable)}
        for layer in missing:
            # Released one by one: a layer's Gram matrix can have gigabytes.
            moments[layer] = stream.collectors.pop(layer).moments().to("cpu")
            setup.cache.save("moments", keys[layer], moments[layer].tensors(), {**metadata, "layer": layer})
        return {layer: moments[layer] for layer in setup.layers}, stream.seen


def kept_moments(setup: Setup, split: str, layer: str, gram: bool) -> list[Moments]:
    """One layer's moments of each piece of a split that :func:`collect` left in the cache.

    Raises:
        UserError: where one is no longer there.
    """
    found = []
    for piece in setup.pieces(split):
        entry = setup.cache.load("moments", _moments_keys(setup, piece, gram)[1][layer])
        if entry is None:
            raise UserError(
                f"cache.dir={setup.cfg.cache.dir} lacks moments that were just written: is its disk full? Free space, "
                "give fewer bootstrap.chunks, or bootstrap.resamples=0"
            )
        found.append(Moments.from_tensors(entry[0]))
    return found


def fit_pattern(setup: Setup, layer: str, moments: Moments) -> Pattern:
    """A layer's patterns, (N, D) float64."""
    return setup.estimator.fit(setup.weight(layer), moments, torch.Generator().manual_seed(setup.seed(layer)))


def fit_patterns(setup: Setup, moments: Mapping[str, Moments]) -> dict[str, Pattern]:
    """Patterns of every selected layer, (N, D) float64."""
    return {layer: fit_pattern(setup, layer, sums) for layer, sums in moments.items()}


def in_weight_shape(setup: Setup, patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """The patterns as they are used and saved: shaped and typed as the weights."""
    weights: dict[str, Any] = {layer: setup.model.get_submodule(layer).weight for layer in patterns}
    return {layer: pattern.shaped_like(weights[layer]) for layer, pattern in patterns.items()}


def why_no_accuracy(setup: Setup) -> str | None:
    """Why the network's accuracy cannot be measured, or None."""
    pool = setup.splits["validation"].pool
    if setup.source.regression:
        return f"data={setup.source.name} is a regression"
    if not setup.classifier:
        return f"model={setup.model_name} has no classifier"
    if pool.labels is None:
        return f"data={setup.source.name} has no labels"
    if pool.classes != setup.outputs:
        return (
            f"data={setup.source.name} has {pool.classes} classes and model={setup.model_name} {setup.outputs} outputs"
        )
    return None


def why_no_explanation(setup: Setup) -> str | None:
    """Why the network's answers cannot be explained, or None."""
    if not setup.classifier:
        return f"model={setup.model_name} has no classifier, so there is no answer to explain"
    if setup.sample.ndim != 3:
        return f"data={setup.source.name} has no images"
    if setup.layers != setup.all_layers and chosen_method(setup)[1] and setup.estimator.has_pattern:
        return (
            f"layer={setup.cfg.layer} selects {len(setup.layers)} of {len(setup.all_layers)} layers, and a whole "
            "network's explanation needs the patterns of all"
        )
    return None


def measure_accuracy(setup: Setup, bar: Bar) -> dict[str, Any]:
    """Top-1 and top-5 accuracy on the validation images."""
    stream = AccuracyStream(setup.model)
    loader = setup.loader(setup.splits["validation"])
    bar.start(len(loader))
    setup.trainer(bar).predict(stream, loader, return_predictions=False)
    images = stream.seen.images
    return {"top1": stream.top1 / images, "top5": stream.top5 / images, "images": images}


def chosen_method(setup: Setup) -> tuple[Any, bool]:
    """The method to explain with, still to be given its network, and whether it is the estimator's.

    Under S_x, PatternAttribution is the z-rule.

    Raises:
        UserError: where it needs patterns and the estimator has none.
    """
    method = build(setup.cfg.method)
    if not method.func.needs_patterns:
        return method, False
    if setup.estimator.has_pattern:
        return method, True
    if method.func is PatternAttribution:
        return LrpZ, True
    raise UserError(
        f"method={method.func.name} needs patterns, and estimator={setup.estimator.name} has none: choose another "
        "estimator, or a method without patterns such as lrp_z"
    )


def check_method(setup: Setup, method: Any) -> None:
    """Makes a method once, with the weights for patterns, so that it can refuse its settings before anything is
    computed."""
    weights: dict[str, Any] = {name: setup.model.get_submodule(name).weight for name in setup.all_layers}
    own = {name: Pattern(w, w, torch.zeros(len(w), dtype=torch.bool)) for name, w in weights.items()}
    create(method, setup.model, own, setup.sample[None])


def method_of(setup: Setup, patterns: Mapping[str, Pattern]) -> Method:
    """The method that explains the network."""
    method, _ = chosen_method(setup)
    return create(method, setup.model, patterns, reference_images(setup, [method]))


def reference_images(setup: Setup, methods: Iterable[Any]) -> Tensor | None:
    """Images whose parts may take the place of others', the first of the fit split; None where no method asks."""
    if not any(kind_of(method).takes_reference for method in methods):
        return None
    split = setup.splits["fit"]
    images = split.batch(range(min(100, len(split)))).images
    if images is None:
        raise UserError("none of the first 100 images of the fit split can be read: mend the files")
    return images.to(setup.device)


def curve_name(setup: Setup, method: str) -> str:
    """A method's name in the degradation results: with what differs from the paper's protocol."""
    settings = setup.cfg.degradation
    parts = [method]
    if settings.order == "least" and method != "random_order":
        parts.append("least relevant first")
    if settings.replacement != "mean":
        parts.append("blur" if settings.replacement == "blur" else f"constant {settings.value:g}")
    return ", ".join(parts)


def explain(setup: Setup, patterns: Mapping[str, Pattern]) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """The first validation images, their explanations by title, and a caption for each."""
    split = setup.splits["validation"].first(setup.cfg.explanation.images)
    batch = split.batch(range(len(split)))
    if batch.images is None:
        raise UserError("none of the first validation images can be read: give more (explanation.images)")
    images = fast_layout(batch.images.to(setup.device))
    setup.model.to(setup.device)
    with torch.no_grad():
        confidence, predicted = setup.model(images).softmax(1).max(1)
    columns = {}
    method = method_of(setup, patterns)
    if setup.estimator.has_pattern and setup.layers == setup.all_layers and not isinstance(method, PatternNet):
        columns["signal"] = PatternNet(setup.model, patterns).attribute(images, predicted).cpu()
    titles = {PatternAttribution: "attribution", PatternNet: "signal", LrpZ: "input × gradient"}
    title = titles.get(type(method), f"signal, {method.name}" if method.kind == "signal" else method.name)
    columns[title] = method.attribute(images, predicted).cpu()
    captions = [
        f"predicted {p} ({c:.0%})" + ("" if t < 0 or why_no_accuracy(setup) else f"\ntrue {t}")
        for p, c, t in zip(predicted.tolist(), confidence.tolist(), batch.targets.tolist(), strict=True)
    ]
    return batch.images, columns, captions


def patch_and_steps(setup: Setup) -> tuple[int, int]:
    """Side of a patch and number of patches to replace: the settings, or the paper's 9 and 100 at 224 pixels scaled
    to the image's size. A patch of one pixel would be replaced by itself, so the default is at least 2."""
    height, width = setup.sample.shape[1:]
    patch = setup.cfg.degradation.patch or max(2, round(9 / 224 * min(height, width)))
    count = (height // patch) * (width // patch)
    steps = setup.cfg.degradation.steps or max(1, min(100, count))
    if steps > count:
        raise UserError(
            f"degradation.steps={steps} is more than the {count} whole patches of {patch}×{patch} pixels in images "
            f"of {height}×{width}: take fewer steps, or a smaller degradation.patch"
        )
    return patch, steps


def degrade(setup: Setup, patterns: Mapping[str, Pattern], bar: Bar) -> dict[str, Tensor]:
    """Degradation curves by method, (images, steps + 1)."""
    patch, steps = patch_and_steps(setup)
    count = setup.cfg.degradation.images or len(setup.splits["validation"])
    split = setup.splits["validation"].first(count)
    height, width = setup.sample.shape[1:]
    order = random_ranks(len(split), height // patch, width // patch, torch.Generator().manual_seed(setup.cfg.seed))
    loader = setup.loader(split)
    bar.start(len(loader))
    method = method_of(setup, patterns)
    how = setup.cfg.degradation
    stream = DegradationStream(
        setup.model, {method.name: method}, patch, steps, order, how.order, how.replacement, how.value
    )
    setup.trainer(bar, inference_mode=False).predict(stream, loader, return_predictions=False)
    return {curve_name(setup, name): curve for name, curve in stream.curves.items()}


def area_by_method(curves: Mapping[str, Tensor]) -> dict[str, float]:
    """Area over the curve, averaged over images."""
    return {name: float(area_over_curve(curve.double()).mean()) for name, curve in curves.items()}


def area_intervals(setup: Setup, curves: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """95 % bootstrap intervals over images of the area over the curve; the same draws for every method."""
    return {
        name: list(mean_interval(area_over_curve(curve.double()), torch.Generator().manual_seed(setup.cfg.seed)))
        for name, curve in curves.items()
    }


def signal_angles(setup: Setup, patterns: Mapping[str, Pattern]) -> dict[str, float] | None:
    """Degrees between the known signal and the first layer's filter and pattern, where the data know their signal."""
    truth, layer = setup.source.signal, setup.layers[0]
    if truth is None or setup.weight(layer).shape[1] != len(truth):
        return None

    def degrees(direction: Tensor) -> float:
        cosine = (direction @ truth).abs() / (direction.norm() * truth.norm())
        return math.degrees(math.acos(min(1.0, float(cosine))))

    angles = {"filter": degrees(setup.weight(layer)[0])}
    if layer in patterns:
        angles["pattern"] = degrees(patterns[layer].positive[0])
    return angles


def split_table(setup: Setup, unreadable: set[str]) -> pd.DataFrame:
    """One row per image: its split, its index in its pool, its name and label, and whether it could be read."""
    tables = []
    for name in SPLITS:
        split = setup.splits[name]
        labels = split.pool.labels
        tables.append(
            pd.DataFrame(
                {
                    "split": name,
                    "index": split.indices,
                    "name": [split.pool.ids[i] for i in split.indices],
                    "label": [None if labels is None else labels[i] for i in split.indices],
                }
            )
        )
    table = pd.concat(tables, ignore_index=True)
    return table.assign(used=~table.name.isin(unreadable))


def begin(cfg: DictConfig, folder: Path, *marks: str) -> dict[str, Any]:
    """Opens a run's folder: checks that results can be written before anything is computed, unmakes ``summary.json``
    and the other ``marks`` of an earlier run's end, and writes the configuration down, which it returns as plain data.

    Raises:
        UserError: where the folder cannot be written.
    """
    _quiet_lightning()
    try:
        for mark in ("summary.json", *marks):
            (folder / mark).unlink(missing_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"hydra.run.dir={folder} cannot be written ({error.strerror}): choose another folder"
        ) from error
    write_file(folder / "config.yaml", lambda file: OmegaConf.save(cfg, file, resolve=True))
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def _quiet_lightning() -> None:
    """The stages say what happens; Lightning's hints about hardware, workers and sizes do not help here."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*predict_dataloader.*")
