"""Methods that the settings name: checked before anything is computed, and given their network and patterns."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from pattern_bench.configuration.build import build
from pattern_bench.configuration.checks import names_shown
from pattern_bench.core.estimators import Pattern
from pattern_bench.engine.streams import fast_layout
from pattern_bench.errors import UserError
from pattern_bench.methods.base import Method, create, kind_of
from pattern_bench.pipeline.setup import Setup

# --- one method ---


def check_method(setup: Setup, method: Any) -> None:
    """Make a method once, with the weights for patterns, so that it can refuse its settings before anything is
    computed.

    Raises:
        UserError: the method's own.
    """
    weights: dict[str, Any] = {name: setup.model.get_submodule(name).weight for name in setup.all_layers}
    own = {name: Pattern(w, w, torch.zeros(len(w), dtype=torch.bool)) for name, w in weights.items()}
    create(method, setup.model, own, setup.sample[None])


def build_method(setup: Setup, device: torch.device, patterns: Mapping[str, Pattern]) -> Method:
    """The run's method, given its network and patterns."""
    return create(setup.method, setup.model, patterns, reference_images(setup, device, [setup.method]))


def reference_images(setup: Setup, device: torch.device, methods: Iterable[Any]) -> Tensor | None:
    """Images whose parts may take the place of others', the first of the fit split; None where no method asks.

    Raises:
        UserError: where none of them can be read.
    """
    if not any(kind_of(method).takes_reference for method in methods):
        return None
    split = setup.splits["fit"]
    images = split.batch(range(min(100, len(split)))).images
    if images is None:
        raise UserError("none of the first 100 images of the fit split can be read: mend the files")
    return images.to(device)


# --- several, as of the gallery and the sanity checks ---


def methods_shown(cfg: DictConfig, passes: Sequence[str]) -> dict[str, Any]:
    """The methods that are shown, by name, still to be given their network: those that ``cfg.show`` names, or else
    all that take so many ``passes``, as :attr:`Method.passes` says it."""
    built = {str(name): build(cfg.methods[name]) for name in cfg.methods}
    default = [name for name, method in built.items() if kind_of(method).passes in passes]
    return {name: built[name] for name in names_shown(cfg.show, built, default)}


def any_needs_patterns(methods: Mapping[str, Any]) -> bool:
    """Whether any of the methods shows patterns."""
    return any(kind_of(method).needs_patterns for method in methods.values())


def check_methods(setup: Setup, methods: Mapping[str, Any]) -> None:
    """Make every method once, so that it can refuse its settings before anything is computed.

    Raises:
        UserError: the method's own; where the network has no classifier or the data no images; where a method needs
            patterns and the estimator has none.
    """
    if not setup.classifier:
        raise UserError(f"model={setup.model_name} has no classifier, so there is no answer to explain: choose another")
    if setup.sample.ndim < 2:
        raise UserError(f"data={setup.source.name} has no images: choose other data")
    if setup.layers != setup.all_layers:
        raise UserError("the explanation of a whole network needs all of its layers: give layer=all")
    for name, method in methods.items():
        if kind_of(method).needs_patterns and not setup.estimator.has_pattern:
            raise UserError(
                f"show={name} needs patterns, and estimator={setup.estimator.name} has none: choose another "
                "estimator, or show methods without patterns"
            )
        check_method(setup, method)


class Explainer:
    """Explains with one network and its patterns.

    Methods with patterns compute in float64: PatternNet's signal grows by orders of magnitude in every layer whose
    patterns are longer than its weights, and passes float32's range in deep networks.

    Args:
        model: canonical network.
        patterns: by layer, (N, D); empty where no method needs them.
        reference: (R, ...) other images, for methods that replace parts of an image by parts of others.
        batch_size: images that are explained at once.
    """

    def __init__(
        self, model: nn.Module, patterns: Mapping[str, Pattern], reference: Tensor | None, batch_size: int
    ) -> None:
        self.model, self.patterns, self.reference, self.batch_size = model, patterns, reference, batch_size

    @cached_property
    def exact(self) -> nn.Module:
        """The network in float64."""
        return copy.deepcopy(self.model).double()

    def make(self, method: Any) -> tuple[Method, torch.dtype | None]:
        """The method, and the precision that its images are to be given in (None for their own)."""
        exact = kind_of(method).needs_patterns
        network = self.exact if exact else self.model
        return create(method, network, self.patterns, self.reference), torch.float64 if exact else None

    def explain(self, method: Any, images: Tensor, target: Tensor) -> Tensor:
        """Explanations (B, C, H, W) in float64, on the CPU.

        Raises:
            UserError: the method's own, for this network and these images.
        """
        made, dtype = self.make(method)
        parts = zip(images.split(self.batch_size), target.split(self.batch_size), strict=True)
        return torch.cat([made.attribute(fast_layout(i.to(dtype or i.dtype)), t).double().cpu() for i, t in parts])
