"""What a run is about, built from its settings: data, splits, network, estimator and method.

Every setting is checked before long work starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pattern_bench.configuration.build import build
from pattern_bench.configuration.checks import check_bootstrap, check_settings
from pattern_bench.core import responses, weight_digests
from pattern_bench.core.canonical import canonical
from pattern_bench.core.estimators import Estimator
from pattern_bench.core.half_precision import images_for, widened
from pattern_bench.core.network import layers_in_order, select_layers
from pattern_bench.core.outputs import as_logits
from pattern_bench.core.probe_closed_form import CRITERIA, MOST_REGULARISATION
from pattern_bench.data.base import Source
from pattern_bench.data.splits import Split, Unreadable, make_splits
from pattern_bench.engine.progress import Bar
from pattern_bench.errors import UserError
from pattern_bench.methods import by_name as methods_by_name
from pattern_bench.methods.base import kind_of
from pattern_bench.metrics.degradation import ORDERS, REPLACEMENTS
from pattern_bench.models.base import ModelSource, fingerprint
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.train import check_trainable, train


@dataclass(frozen=True)
class Setup:
    """Data, network and what is asked about them, checked.

    Attributes:
        cfg: the settings of the run.
        source: the data set.
        splits: ``fit``, ``probe`` and ``validation``.
        model_name: as it stands in the results.
        classifier: whether the network has answers to explain.
        model: the network in canonical form.
        model_key: its fingerprint; empty until it has its weights.
        all_layers: names of its Conv and Linear layers, in the order they run.
        layers: those that ``layer`` selects.
        estimator: of the signal.
        method: the class that explains, or a ``functools.partial`` of it, still to be given the network.
        method_uses_estimator: whether what the method shows depends on the estimator.
        sample: one image (C, ...), as the network takes it.
        outputs: how many the network has.
        belongs_to: digests of the network's weights as it came (``core.weight_digests``).
        responses: what its layers take in and put out for one image of noise (``core.responses``).
    """

    cfg: DictConfig
    source: Source
    splits: Mapping[str, Split]
    model_name: str
    classifier: bool
    model: nn.Module
    model_key: str
    all_layers: list[str]
    layers: list[str]
    estimator: Estimator
    method: Any
    method_uses_estimator: bool
    sample: Tensor
    outputs: int
    belongs_to: Mapping[str, str]
    responses: Mapping[str, str]

    @property
    def names(self) -> dict[str, str]:
        """What the results call model and data."""
        return {"model": self.model_name, "data": self.source.name}

    @property
    def method_name(self) -> str:
        """As it stands in the results."""
        return kind_of(self.method).name

    def loader(self, split: Split, positions: Iterable[int], batch_size: int | None = None) -> DataLoader:
        """Batches of a split's images."""
        return split.loader(positions, batch_size or self.source.batch_size, self.source.workers)

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


def prepare(cfg: DictConfig, machine: Machine, bar: Bar, check: Callable[[Setup], None]) -> Setup:
    """Build data, splits and network, and train the network where it comes without weights.

    Args:
        cfg: the settings of the run.
        machine: where the network is trained, and where listings of images and trained weights are kept.
        bar: moved where every image is read, and by training.
        check: refuses, before the network is trained, what the stages to come cannot do.

    Raises:
        UserError: for a setting that is not possible, or does not fit another.
    """
    estimator: Estimator = build(cfg.estimator)
    model_source: ModelSource = build(cfg.model)
    source: Source = build(cfg.data).keeping_in(machine.cache)
    check_settings(cfg, CRITERIA, ORDERS, REPLACEMENTS)
    _check_regularisation(cfg)
    splits: Mapping[str, Split] = make_splits(source, cfg.seed)
    check_bootstrap(cfg, min(len(split) for split in splits.values()), machine.cache.writable)
    splits = _transformed(splits, model_source.transform() or source.transform())
    if source.strict:
        _read_all(splits, bar)
    sample = _sample(splits["fit"])

    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    built = widened(model_source.build(sample, splits["fit"].pool.classes))
    sample, splits = _in_precision_of(built, sample, splits)
    logits, outputs = _logits(built, sample, model_source, source.name)
    network = canonical(logits, sample[None])  # before any training, so that what is refused is refused at once
    names = layers_in_order(network, sample[None])
    if not names:
        raise UserError(f"model={model_source.name} has no Conv or Linear layer to examine: choose another model")
    _check_finite(network, cfg)
    method, uses_estimator = _method(cfg, estimator)
    setup = Setup(
        cfg=cfg, source=source, splits=splits, model_name=model_source.name, classifier=model_source.classifier,
        model=network, model_key="", all_layers=names, layers=select_layers(names, layer_setting(cfg)),
        estimator=estimator, method=method, method_uses_estimator=uses_estimator, sample=sample, outputs=outputs,
        belongs_to={}, responses={},
    )  # fmt: skip
    check(setup)
    if model_source.training is not None:
        check_trainable(model_source, source, splits["fit"].pool, outputs)
        train(logits, model_source, source, splits, _model_settings(cfg.model), cfg.seed, machine, bar)
        network = canonical(logits, sample[None])
        _check_finite(network, cfg)
    return replace(
        setup,
        model=network,
        model_key=fingerprint(network, _model_settings(cfg.model)),
        belongs_to=weight_digests.belongs_to(built, sample[None], setup.layers),
        responses=responses.responses(built, sample.shape, setup.layers),
    )


def _check_regularisation(cfg: DictConfig) -> None:
    """
    Raises:
        UserError: where the ridge leaves nothing of what v is fitted on.
    """
    if (ridge := cfg.probe.regularisation) > MOST_REGULARISATION:
        raise UserError(
            f"probe.regularisation={ridge:g} is not possible: it is a multiple of the mean variance of a layer's "
            f"inputs, of which nothing would be left: give at most {MOST_REGULARISATION:g}"
        )


def _method(cfg: DictConfig, estimator: Estimator) -> tuple[Any, bool]:
    """The method to explain with, and whether it is the estimator's. An estimator without patterns, S_x, may have
    another in its place.

    Raises:
        UserError: where it needs patterns and the estimator has none.
    """
    method = build(cfg.method)
    kind = kind_of(method)
    if not kind.needs_patterns:
        return method, False
    if estimator.has_pattern:
        return method, True
    if kind.without_patterns:
        return methods_by_name()[kind.without_patterns], True
    raise UserError(
        f"method={kind.name} needs patterns, and estimator={estimator.name} has none: choose another "
        "estimator, or a method without patterns such as lrp_z"
    )


def _transformed(splits: Mapping[str, Split], transform: Callable[[Any], Tensor]) -> dict[str, Split]:
    return {name: replace(split, transform=transform) for name, split in splits.items()}


@dataclass(frozen=True)
class _Cast:
    """A transform whose images come in another precision."""

    transform: Callable[[Any], Tensor]
    dtype: torch.dtype

    def __call__(self, image: Any) -> Tensor:
        return self.transform(image).to(self.dtype)


def _in_precision_of(
    network: nn.Module, sample: Tensor, splits: Mapping[str, Split]
) -> tuple[Tensor, Mapping[str, Split]]:
    """``sample`` as the network takes it, and the splits with images in that precision, too."""
    cast = images_for(network, sample)
    if cast.dtype != sample.dtype:
        splits = {name: replace(split, transform=_Cast(split.transform, cast.dtype)) for name, split in splits.items()}
    return cast, splits


def _model_settings(model: DictConfig) -> dict[str, Any]:
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
