"""Find a network's logits among its outputs, or before a last softmax or sigmoid.

Explanations start from logits. A network whose last step is a softmax, log-softmax or sigmoid, whose outputs have
another shape than (B, K), or that returns several tensors, is wrapped in :class:`Logits`: it runs the network as it is
and returns what went into that last step. Shapes: B images, C channels, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pattern_bench.core.memory import is_out_of_memory
from pattern_bench.core.network import refuse_training, unwrapped
from pattern_bench.core.output_activation import ActivationWatch, output_activation
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


class Logits(nn.Module):
    """A network that returns its logits (B, K) in the place of all its outputs.

    Its layers and parameters, and their names, are the network's own: a change of one is a change of the other.

    Args:
        network: any network.
        output: which of its outputs are the logits: the key of a mapping, the index in a tuple or list, or a function
            of all outputs; None for the only tensor.

    Raises:
        UserError: where ``network`` is none, or ``output`` no key, index or function; in a forward pass, where there is
            no such output, or several and none is named.

    >>> class TwoHeads(nn.Linear):
    ...     def forward(self, x):
    ...         return {"classes": super().forward(x), "mean": x.mean()}
    >>> Logits(TwoHeads(2, 5), "classes")(torch.ones(1, 2)).shape
    torch.Size([1, 5])
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
        """Return the logits (B, K) of images (B, C, spatial...)."""
        if self._last is None:
            logits = self._selected(x)
            return logits[:, None] if logits.ndim == 1 else logits
        with _Calls(self._last) as calls:
            self._selected(x)  # whose function may take a softmax, too
        return calls.calls[0].x.reshape(len(x), -1)

    def _selected(self, x: Tensor) -> Tensor:
        return selected(self._network(x), self._output, type(self._network).__name__)

    def train(self, mode: bool = True) -> Logits:
        """Set training mode, of the network too."""
        super().train(mode)
        self._network.train(mode)
        return self

    def extra_repr(self) -> str:
        """Return the network's class and the settings in the printed form."""
        kind = type(self._network)
        parts = {"output": self._output, "last": self._last}
        return ", ".join(
            [f"{kind.__module__}.{kind.__qualname__}", *(f"{k}={v!r}" for k, v in parts.items() if v is not None)]
        )


def as_logits(model: nn.Module, example: Tensor, output: Output = None) -> nn.Module:
    """Return the network itself where it puts out logits (B, K), otherwise its :class:`Logits`; nothing in it changes.

    Whether a network's last step is a softmax is found by looking: at the outputs for ``example``, and at the function
    that made them.

    Args:
        model: any network, in evaluation mode.
        example: (B, C, spatial...).
        output: as of :class:`Logits`.

    Raises:
        UserError: where the network is in training mode; where there is no image; where it puts out several tensors
            and none is named, probabilities that no softmax or sigmoid made, or what was made of the probabilities of
            one; where its layers run inside of ``torch.vmap``.

    >>> model, image = nn.Sequential(nn.Linear(2, 3), nn.Softmax(1)).eval(), torch.ones(1, 2)
    >>> torch.equal(as_logits(model, image)(image), model[0](image)), as_logits(model[0], image) is model[0]
    (True, True)
    """
    refuse_training(model)
    plain_model, model = model, unwrapped(model)
    name = type(model._network if isinstance(model, Logits) else model).__name__
    if not len(example):
        raise UserError(f"the images given to model={name} are none (shape {tuple(example.shape)}): give at least one")
    try:
        with torch.no_grad(), ActivationWatch(model, example) as seen, _Calls() as calls:
            whole = model(example)
            y = selected(whole, output, name)
    except RuntimeError as error:
        _refuse_if_unwatchable(model, name, example, error)
        raise
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
    wrapped = plain_model if plain else Logits(model, output)
    if y.ndim != 2 or len(y) != len(example):
        return wrapped
    return _before_activation(wrapped, model, output, example, y, seen, calls.calls)


def _refuse_if_unwatchable(model: nn.Module, name: str, example: Tensor, error: RuntimeError) -> None:
    """
    Raises:
        UserError: where the network takes the images by itself, and raised ``error`` only because it was watched.
    """
    if is_out_of_memory(error):
        return
    try:
        with torch.no_grad():
            model(example)
    except Exception:  # for the images, as ``error`` says
        return
    raise UserError(
        f"model={name} hides what its layers compute ({str(error).splitlines()[0]}): call them on whole batches, "
        "outside of torch.vmap and other transforms of torch.func"
    ) from error


def _before_activation(
    wrapped: nn.Module,
    model: nn.Module,
    output: Output,
    example: Tensor,
    y: Tensor,
    seen: ActivationWatch,
    calls: list[_Call],
) -> nn.Module:
    """Return ``wrapped``, or a :class:`Logits` of ``model`` without the softmax or sigmoid that made the outputs ``y``
    (B, K).

    Raises:
        UserError: where ``y`` are probabilities, or made of some, and no such step can be taken off.
    """
    name = type(model._network if isinstance(model, Logits) else model).__name__
    past, stripped = seen.past(y), False
    for number, call in reversed(list(enumerate(calls))):
        if call.gives(y, in_softmax=stripped):
            logits, stripped = Logits(model, output), True
            logits._last, logits._independent = number, call.dim is None
            wrapped = logits
            y, past = call.x.reshape(y.shape), seen.past(call.x)
            if logits._independent:
                break
    if not stripped and _are_probabilities(y):
        raise UserError(
            f"model={name} puts out probabilities that no softmax of its own made as a last step: {_REMEDY}"
        )

    def again() -> Tensor:
        with torch.no_grad():
            outputs: Tensor = wrapped(example)
            return outputs.reshape(y.shape)

    if activation := output_activation(seen, past, y, again):
        raise UserError(
            f"model={name} puts out what is left of its logits after {activation} and what follows it: {_REMEDY}"
        )
    return wrapped


def _are_probabilities(y: Tensor) -> bool:
    """Return whether all rows of ``y`` (B, K) are distributions, or logarithms of distributions."""
    if y.shape[1] < 2:
        return False
    y = y.double()
    one = y.new_ones(len(y))
    return bool((y >= 0).all() and torch.allclose(y.sum(1), one, atol=1e-4)) or bool(
        (y <= 0).all() and torch.allclose(y.exp().sum(1), one, atol=1e-4)
    )


@dataclass
class _Call:
    """A softmax or sigmoid in a forward pass: a copy of its input ``x``, and the softmax's dimension, None for a
    sigmoid."""

    x: Tensor
    dim: int | None

    def gives(self, y: Tensor, in_softmax: bool = False) -> bool:
        """Return whether the outputs ``y`` (B, K) are its result, or the logarithm of that, perhaps in another shape.

        ``in_softmax``: ``y`` went into a softmax itself, so only a log-softmax leaves it as good as the logits.
        """
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
    """Record every softmax and sigmoid of a forward pass; with ``only``, the one of that number, with its graph."""

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
    """Return the dimension of a softmax, torch's default where none is given."""
    dim = kwargs.get("dim", more[0] if more else None)
    default = 0 if x.ndim in (0, 1, 3) else 1
    return dim if isinstance(dim, int) else default


def selected(outputs: Any, output: Output, name: str) -> Tensor:
    """Return the tensor that ``output`` names among a network's outputs.

    Args:
        outputs: what the network returned.
        output: as of :class:`Logits`.
        name: the network's, for errors.

    Raises:
        UserError: where it names none; where it is None and there are several.

    >>> selected({"logits": torch.zeros(1), "features": torch.ones(1)}, "features", "mine")
    tensor([1.])
    """
    if output is None and isinstance(outputs, Tensor):
        return outputs
    if callable(output):
        try:
            chosen = output(outputs)
        except Exception as error:
            raise UserError(
                f"model={name}: the function that chooses its logits failed ({type(error).__name__}: {error}): it gets "
                f"what the network returns, a {type(outputs).__name__}"
            ) from error
        if isinstance(chosen, Tensor):
            return chosen
        raise UserError(
            f"model={name}: the function that chooses its logits returned a {type(chosen).__name__}: return a tensor"
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
    """Return the logits, and then those of auxiliary heads, among a network's outputs in training: all of one shape.

    The network's own are those that are called ``logits``, or the first.

    >>> [tensor.item() for tensor in heads({"aux": torch.tensor(1.0), "logits": torch.tensor(2.0)})]
    [2.0, 1.0]
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    tensors = _tensors(outputs)
    own = tensors.pop("logits" if "logits" in tensors else next(iter(tensors)))
    return [own, *(tensor for tensor in tensors.values() if tensor.shape == own.shape)]


def _tensors(outputs: Any) -> dict[Any, Tensor]:
    """Return the tensors among outputs, by key, field or index."""
    if isinstance(outputs, Mapping):
        named: Mapping[Any, Any] = outputs
    elif isinstance(outputs, tuple | list):
        named = dict(zip(getattr(outputs, "_fields", range(len(outputs))), outputs, strict=True))
    else:
        named = {key: value for key, value in getattr(outputs, "__dict__", {}).items() if not key.startswith("_")}
    return {key: value for key, value in named.items() if isinstance(value, Tensor)}
