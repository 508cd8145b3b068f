"""What a network puts out, and what that says: logits, the probabilities they stand for, and the class predicted.

Explanations start from logits. Networks whose last step is a softmax, log-softmax or sigmoid, whose outputs have
another form than (B, K), or that put out several tensors, are read by :class:`Logits`: it runs the network as it is and
hands on what went into that last step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pattern_bench.core.network import first_not_finite, refuse_training, unwrapped
from pattern_bench.core.output_activation import Squashing, squashed_by
from pattern_bench.core.tensor_checks import unusable, whole_numbers
from pattern_bench.errors import UserError, told

Output = str | int | Callable[[Any], Tensor] | None
"""Which of a network's outputs are its logits: a key, an index, or a function of all; None for the only one."""

_SOFTMAX = ("softmax", "log_softmax")
_SIGMOID = ("sigmoid", "sigmoid_", "logsigmoid", "log_sigmoid", "expit", "special_expit")


_REMEDY = (
    "explanations start from logits, so hand over a network that puts them out, or say which of its outputs they are "
    "(model.output=NAME; from Python pb.Logits(model, NAME), or a function that undoes what follows a last softmax, as "
    "pb.Logits(model, lambda y: y / 100))"
)


# --- probabilities ---


def probabilities(network: Any, logits: Tensor) -> Tensor:
    """Probabilities that ``logits`` (B, K) of ``network`` stand for, (B, K).

    Their softmax. Of a single logit, and of a network that ends in a sigmoid, each output's own sigmoid: a network with
    one logit z tells class 1 from class 0, z is evidence for class 1, and sigmoid(z) is the probability of class 1.
    """
    return logits.sigmoid() if independent(network, logits) else logits.softmax(1)


def spoilt(network: Any, images: Tensor, logits: Tensor) -> str | None:
    """The first layer where something is NaN or infinite, where that shows in the ``logits`` (B, K) of ``images``; None
    where they are of numbers."""
    if probabilities(network, logits).isfinite().all():
        return None
    return first_not_finite(network, images) or "after the last one"


def independent(network: Any, logits: Tensor) -> bool:
    """Whether each of ``logits`` (B, K) tells of a class by itself, rather than against the others."""
    return logits.shape[1] == 1 or (isinstance(network, Logits) and network._independent)


class Answer(NamedTuple):
    """What a network answers: ``output`` to explain, class ``label`` and the ``confidence`` in it, each (B,).

    Output and label are the same but for networks with one logit z, which have nothing but output 0 to explain: the
    label is 1 where z > 0 and 0 elsewhere, with the larger of sigmoid(z) and sigmoid(-z) for confidence.
    """

    output: Tensor
    label: Tensor
    confidence: Tensor


def answer(network: Any, logits: Tensor) -> Answer:
    """The answer that ``logits`` (B, K) of ``network`` give."""
    found = probabilities(network, logits)
    confidence, output = found.max(1)
    if logits.shape[1] > 1:
        return Answer(output, output, confidence)
    return Answer(output, (logits[:, 0] > 0).long(), torch.maximum(confidence, 1 - confidence))


def targets(target: Any, logits: Tensor, who: str = "") -> Tensor:
    """The outputs that ``target`` asks for, (B,): those of the largest of ``logits`` (B, K) for None. Errors begin with
    ``who``.

    Raises:
        UserError: where it is neither a whole number nor B of them, or out of range.
    """
    if target is None:
        return logits.detach().argmax(1)
    asked, outputs = asked_for(target, len(logits), logits.device, who), logits.shape[1]
    outside = asked[(asked < 0) | (asked >= outputs)]
    if len(outside):
        raise UserError(
            f"{who}target={int(outside[0])} is out of range: the network has {outputs} outputs, so give 0 to "
            f"{outputs - 1}, or None for the predicted class"
        )
    return asked


def asked_for(target: Any, images: int, device: torch.device, who: str = "") -> Tensor:
    """``target``, one whole number or a tensor of one for each image, as (images,) int64. Errors begin with ``who``.

    Raises:
        UserError: where it is neither.
    """
    if isinstance(target, Integral) and not isinstance(target, bool) and -(2**63) <= int(target) < 2**63:
        return torch.full((images,), int(target), device=device)
    if not isinstance(target, Tensor) or not whole_numbers(target) or target.shape not in ((), (images,)):
        what = told(target)
        if isinstance(target, Tensor):
            what = unusable(target) or f"{target.dtype} of shape {tuple(target.shape)}"
        raise UserError(
            f"{who}target={what} is not possible: give one whole number, a tensor of {images} (one for each image), or "
            "None for the predicted class"
        )
    return target.detach().to(device, torch.int64).expand(images).clone()


# --- logits ---


@dataclass
class _Call:
    """A softmax or sigmoid that a forward pass took: of ``x``, which lies apart; (B, K) over ``dim`` of it."""

    x: Tensor
    dim: int | None

    def gives(self, y: Tensor, in_softmax: bool = False) -> bool:
        """Whether the outputs ``y`` (B, K) are this, or its logarithm, perhaps in another shape. Where a softmax of
        them was taken, only a log-softmax is as good as what went into it."""
        x = self.x
        if x.numel() != y.numel() or x.dtype != y.dtype:
            return False
        if self.dim is None:
            candidates = [] if in_softmax else [x.sigmoid(), nn.functional.logsigmoid(x)]
        elif x.shape[self.dim] == y.shape[1] > 1:
            candidates = [x.log_softmax(self.dim)] if in_softmax else [x.softmax(self.dim), x.log_softmax(self.dim)]
        else:
            return False
        close = 64 * torch.finfo(y.dtype).eps
        return any(torch.allclose(c.reshape(y.shape), y, rtol=close, atol=close) for c in candidates)


class _Calls(TorchFunctionMode):
    """Keeps every softmax and sigmoid of a forward pass; with ``only``, that one by number, with its graph."""

    def __init__(self, only: int | None = None) -> None:
        super().__init__()
        self.only, self.count = only, 0
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _SOFTMAX or name in _SIGMOID:
            if self.only in (None, self.count):
                x, *more = args or (kwargs["input"],)
                if isinstance(x, Tensor) and x.is_floating_point():
                    self.calls.append(_Call(x.clone(), None if name in _SIGMOID else _dim(x, more, kwargs)))
            self.count += 1
        return func(*args, **kwargs)


def _dim(x: Tensor, more: Any, kwargs: Mapping[str, Any]) -> int:
    """The dimension of a softmax; that of torch's default where none is given."""
    dim = kwargs.get("dim", more[0] if more else None)
    default = 0 if x.ndim in (0, 1, 3) else 1
    return dim if isinstance(dim, int) else default


class Logits(nn.Module):
    """A network that puts out its logits, (B, K), in the place of all its outputs.

    Layers, parameters and their names are the network's own, and shared with it; whatever changes the one changes the
    other.

    Args:
        network: any network.
        output: which of its outputs are the logits: the key of a mapping, the index in a tuple or list, or a function
            of all outputs; None for the only tensor.

    Raises:
        UserError: where ``network`` is none, or ``output`` no key, index or function; in a forward pass, where there is
            no such output, or several and none is named.
    """

    # Underscores, and nothing registered: every other name is one of the network's own modules.
    _network: Any
    _output: Any
    _last: int | None = None
    """The number of the softmax or sigmoid, counted through a forward pass, that the logits go into."""
    _independent = False
    """Whether that is a sigmoid."""

    def __init__(self, network: nn.Module, output: Output = None) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise UserError(f"network={told(network)} is no network: give a torch.nn.Module")
        if not (output is None or isinstance(output, str | int) or callable(output)):
            raise UserError(
                f"output={told(output)} is not possible: give a key, an index, or a function of all outputs that "
                "returns the logits"
            )
        network = unwrapped(network)
        if isinstance(network, Logits):
            output = network._output if output is None else output
            network = network.__dict__["_network"]
        self.__dict__["_network"], self.__dict__["_output"] = network, output
        for shared in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[shared] = network.__dict__[shared]
        self.training = network.training

    def forward(self, x: Tensor) -> Tensor:
        if self._last is None:
            found = self._selected(x)
            return found[:, None] if found.ndim == 1 else found
        with _Calls(self._last) as calls:
            self._selected(x)  # whose function may take a softmax, too
        return calls.calls[0].x.reshape(len(x), -1)

    def _selected(self, x: Tensor) -> Tensor:
        return selected(self._network(x), self._output, type(self._network).__name__)

    def train(self, mode: bool = True) -> Logits:
        super().train(mode)
        self._network.train(mode)
        return self

    def extra_repr(self) -> str:
        kind = type(self._network)
        parts = {"output": self._output, "last": self._last}
        return ", ".join(
            [f"{kind.__module__}.{kind.__qualname__}", *(f"{k}={v!r}" for k, v in parts.items() if v is not None)]
        )


def as_logits(model: nn.Module, example: Tensor, output: Output = None) -> nn.Module:
    """The network itself where it puts out logits (B, K), else its :class:`Logits`. Nothing of it is changed.

    Whether a network's last step is a softmax is found by looking: at the outputs for ``example``, and at which
    function made them.

    Args:
        model: any network, in evaluation mode.
        example: (B, C, spatial...).
        output: as of :class:`Logits`.

    Raises:
        UserError: where the network is in training mode; where it puts out several tensors and none is named,
            probabilities that no softmax or sigmoid made, or what was made of the probabilities of one.
    """
    refuse_training(model)
    plain_model, model = model, unwrapped(model)
    name = type(model._network if isinstance(model, Logits) else model).__name__
    with torch.no_grad(), Squashing(model, example) as seen, _Calls() as calls:
        whole = model(example)
        y = selected(whole, output, name)
    plain = y is whole
    if not y.is_floating_point():
        raise UserError(
            f"model={name} puts out {y.dtype}: explanations start from logits, so hand over a network that puts them "
            "out, not the classes that they choose"
        )
    if len(example) == 1 and y.ndim == 1 and len(y) > 1:  # its squeeze() removes the batch of one image, too
        y = y[None]
    if y.ndim == 1 and len(y) == len(example):
        y, plain = y[:, None], False
    if y.ndim != 2 or len(y) != len(example):
        return plain_model if plain else Logits(model, output)
    found: nn.Module = plain_model if plain else Logits(model, output)
    past, stripped = seen.past(y), False
    for number, call in reversed(list(enumerate(calls.calls))):
        if call.gives(y, in_softmax=stripped):
            found, stripped = Logits(model, output), True
            found._last, found._independent = number, call.dim is None
            y, past = call.x.reshape(y.shape), seen.past(call.x)
            if found._independent:
                break
    if not stripped and _are_probabilities(y):
        raise UserError(
            f"model={name} puts out probabilities that no softmax of its own made as a last step: {_REMEDY}"
        )

    def again() -> Tensor:
        with torch.no_grad():
            outputs: Tensor = found(example)
            return outputs.reshape(y.shape)

    if squashed := squashed_by(seen, past, y, again):
        raise UserError(
            f"model={name} puts out what is left of its logits after {squashed} and what follows it: {_REMEDY}"
        )
    return found


def _are_probabilities(y: Tensor) -> bool:
    """Whether all rows of ``y`` (B, K) are distributions, or logarithms of distributions."""
    if y.shape[1] < 2:
        return False
    y = y.double()
    one = y.new_ones(len(y))
    return bool((y >= 0).all() and torch.allclose(y.sum(1), one, atol=1e-4)) or bool(
        (y <= 0).all() and torch.allclose(y.exp().sum(1), one, atol=1e-4)
    )


def selected(outputs: Any, output: Output, name: str) -> Tensor:
    """The tensor that ``output`` names among a network's outputs.

    Raises:
        UserError: where it names none; where it is None and there are several.
    """
    if output is None and isinstance(outputs, Tensor):
        return outputs
    if callable(output):
        try:
            found = output(outputs)
        except Exception as error:
            raise UserError(
                f"model={name}: the function that chooses its logits failed ({type(error).__name__}: {error}): it gets "
                f"what the network returns, a {type(outputs).__name__}"
            ) from error
        if isinstance(found, Tensor):
            return found
        raise UserError(
            f"model={name}: the function that chooses its logits returned a {type(found).__name__}: return a tensor"
        )
    choices = _tensors(outputs)
    if output is None and len(choices) == 1:
        return next(iter(choices.values()))
    if isinstance(output, int) and isinstance(outputs, tuple):  # a named one, too
        choices = dict(enumerate(outputs))
    if output in choices:
        return choices[output]
    what = "returns" if output is None else f"has no output {output!r}; it returns"
    known, one = ", ".join(map(repr, choices)) or "no tensor", next(iter(choices), "KEY")
    raise UserError(
        f"model={name} {what} a {type(outputs).__name__} ({known}): it must return one tensor of outputs, or say which "
        f"are its logits (model.output={one}; from Python pb.Logits(model, {one!r}))"
    )


def heads(outputs: Any) -> list[Tensor]:
    """The logits, and then those of auxiliary heads, among a network's outputs in training: all of one shape; those
    that are called ``logits``, or the first, are the network's own."""
    if isinstance(outputs, Tensor):
        return [outputs]
    found = _tensors(outputs)
    own = found.pop("logits" if "logits" in found else next(iter(found)))
    return [own, *(tensor for tensor in found.values() if tensor.shape == own.shape)]


def _tensors(outputs: Any) -> dict[Any, Tensor]:
    """The tensors among outputs, by key, field or index."""
    if isinstance(outputs, Mapping):
        named: Mapping[Any, Any] = outputs
    elif isinstance(outputs, tuple | list):
        named = dict(zip(getattr(outputs, "_fields", range(len(outputs))), outputs, strict=True))
    else:
        named = {key: value for key, value in getattr(outputs, "__dict__", {}).items() if not key.startswith("_")}
    return {key: value for key, value in named.items() if isinstance(value, Tensor)}
