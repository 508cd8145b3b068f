"""Explanations of a network in any form, and of anything that explains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pattern_bench.api.arguments import check_patterns
from pattern_bench.api.networks import canonical_form, kept_form
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.half_precision import wide
from pattern_bench.core.tensor_checks import unusable
from pattern_bench.errors import UserError, told
from pattern_bench.methods import patterns as layerwise
from pattern_bench.methods.base import Method
from pattern_bench.results.labels import RANDOM_ORDER


class _OnAnyNetwork(Method):
    """A layer-wise method, on the canonical form of whatever network it is given."""

    method: ClassVar[Any]
    needs_patterns = True

    def __init__(self, model: nn.Module, patterns: Mapping[str, Pattern], last_layer: str = "positive") -> None:
        super().__init__(model)
        if patterns is None or (isinstance(patterns, Mapping) and not patterns):
            raise UserError(f"{self.name} needs patterns, and there are none: fit them with pb.fit_patterns")
        check_patterns(patterns)
        self.patterns, self.last_layer = patterns, last_layer

    def _attribute(self, x: Tensor, target: Tensor | None) -> Tensor:
        network = kept_form(self.model, x)
        if network is None:
            self._logits(x[:1])  # an input that does not fit is this method's to refuse, not the canonical form's
            network = canonical_form(self.model, x)
        return self.method(network, self.patterns, self.last_layer)._attribute(x, target)


class PatternNet(_OnAnyNetwork):
    """The signal in an image (:class:`pattern_bench.methods.patterns.PatternNet`), for networks in any form: batch norm
    is folded away, and ReLUs may be functions.

    The filter (1, -1) below answers y, and cancels the distractor e of x = (y + e, e). The answer's signal is y (1, 0).

    >>> import pattern_bench as pb
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    >>> images = torch.tensor([[2.0, 1.0], [0.0, -1.0], [0.0, 1.0], [-2.0, -1.0]])
    >>> patterns = pb.fit_patterns(model, pb.collect_moments(model, [images]), "a")
    >>> pb.PatternNet(model, patterns).attribute(images[:2])
    tensor([[1., 0.],
            [1., 0.]])

    Args:
        model: any network in evaluation mode; it is not changed.
        patterns: of :func:`pattern_bench.fit_patterns`, by layer.
        last_layer: what the output layer propagates: ``positive``, a₊ as every other layer, or its ``weight``.

    Raises:
        UserError: where there are no patterns, or they are not finite or of other shapes.
    """

    method, name, kind = layerwise.PatternNet, "pattern_net", "signal"
    label = layerwise.PatternNet.label


class PatternAttribution(_OnAnyNetwork):
    """The attribution of an answer (:class:`pattern_bench.methods.patterns.PatternAttribution`), for networks in any
    form. Arguments and errors are those of :class:`PatternNet`.

    >>> import pattern_bench as pb
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    >>> images = torch.tensor([[2.0, 1.0], [0.0, -1.0], [0.0, 1.0], [-2.0, -1.0]])
    >>> patterns = pb.fit_patterns(model, pb.collect_moments(model, [images]), "w")
    >>> pb.PatternAttribution(model, patterns).attribute(images[:1])  # S_w: half of the answer 1 for each input
    tensor([[0.5000, 0.5000]])
    """

    method, name, kind = layerwise.PatternAttribution, "pattern_attribution", "attribution"
    label = layerwise.PatternAttribution.label


def check_methods(methods: Any) -> None:
    """Refuse what cannot explain.

    >>> check_methods({"input": lambda model, inputs, targets: inputs})
    >>> check_methods({"input": 1})
    Traceback (most recent call last):
    pattern_bench.errors.UserError: methods: 'input'=1 is not possible: give, by a name, an object with \
attribute(inputs, target=...), or a function of model, inputs and targets

    Raises:
        UserError: where ``methods`` are not explanations by name.
    """
    if not isinstance(methods, Mapping):
        raise UserError(f"methods={told(methods)} is not possible: give explanations by name, as {{'mine': method}}")
    for name, method in methods.items():
        explains = getattr(method, "attribute", method)
        wanted: Any = ((None,), {"target": None}) if explains is not method else ((None, None, None), {})
        if not isinstance(name, str) or isinstance(method, type) or not _takes(explains, *wanted):
            shown = repr(name) if isinstance(name, str) else told(name)
            raise UserError(
                f"methods: {shown}={told(method)} is not possible: give, by a name, an object with "
                "attribute(inputs, target=...), or a function of model, inputs and targets"
            )
        if name == RANDOM_ORDER:
            raise UserError(f"methods: {name!r} is what the random order is called: give the method another name")


def explained(name: str, explanation: Any, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Ask anything that explains for a heat map of each image: an object with ``attribute``, or a function.

    >>> model, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval(), torch.ones(1, 1, 2, 2)
    >>> explained("input", lambda model, inputs, targets: inputs[:, 0].numpy(), model, images, torch.tensor([0]))
    tensor([[[[1., 1.],
              [1., 1.]]]])

    Args:
        name: what error messages call it.
        explanation: with ``attribute(inputs, target=...)``, or a function of model, inputs and targets.
        model: given to a function; modes, values and gradients that it changes are put back.
        images: (B, C, spatial...).
        target: (B,), the outputs to explain.

    Returns:
        (B, C or 1, spatial...), float32 or float64.

    Raises:
        UserError: where it returns something else.
    """
    attribute = getattr(explanation, "attribute", None)
    with nullcontext() if isinstance(explanation, Method) else _as_before(model):
        given = images.clone(), target.clone()
        returned = attribute(given[0], target=given[1]) if attribute is not None else explanation(model, *given)
    wrong = f"methods: {name!r}: an explanation"
    try:
        heat = torch.as_tensor(returned).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{wrong} is {told(returned)}: return one tensor or array, a value for each pixel") from error
    if what := unusable(heat):
        raise UserError(f"{wrong} is a {what} tensor: return a dense one of real numbers, with values")
    heat = (wide(heat) if heat.is_floating_point() else heat.double()).to(images.device)
    if heat.ndim == images.ndim - 1:  # one value per pixel
        heat = heat[:, None]
    rows, channels, *size = images.shape
    if heat.ndim != images.ndim or tuple(heat.shape) not in ((rows, 1, *size), (rows, channels, *size)):
        raise UserError(
            f"{wrong} has shape {tuple(heat.shape)} and the images {tuple(images.shape)}: it must give one value per "
            "pixel, or per pixel and channel"
        )
    if not heat.isfinite().all():
        raise UserError(f"{wrong} holds NaN or Inf: mend it, or choose another method")
    return heat


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Within, explanations of the user's are made; modes, values and gradients that they change are put back."""
    modes = [(module, module.training) for module in model.modules()]
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    gradients = [(p, p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
            for parameter, requires_grad, gradient, its in gradients:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
                if gradient is not None and its is not None:
                    gradient.copy_(its)


def _takes(function: Any, arguments: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Whether a function can be called with these arguments; of some that are not Python's nobody knows."""
    if not callable(function):
        return False
    try:
        signature(function.forward if isinstance(function, nn.Module) else function).bind(*arguments, **named)
    except ValueError:
        return True
    except TypeError:
        return False
    return True
