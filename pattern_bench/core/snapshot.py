"""Tell whether a network has changed since it was last seen, so that what was computed from it can be used again.

Parameters and buffers are compared by content, modules by their type and plain attributes, and everything else that
code may read by the network's output for one image, bit by bit. Networks with something that may change without a trace
in all of these, such as hooks or objects of the user's own, cannot have a snapshot.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

_PLAIN = (int, float, complex, str, bytes, bool, type(None), type(Ellipsis), torch.dtype, torch.device,
          torch.memory_format, torch.layout, Enum, range)  # fmt: skip
_STATE_DICT = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
               "_load_state_dict_post_hooks")  # fmt: skip
"""Hooks that have no part in what a network computes."""


class _CannotCompare(Exception):
    """Raised for a value that may change unnoticed."""


class Snapshot:
    """The state of a network at one time, without a reference to the network.

    Args:
        model: the network.
        example: (1, C, spatial...), an image that it can take.
        kept: tensors by name that somebody keeps in any case; those equal to the network's own tensor of that name are
            shared instead of copied.

    Raises:
        ValueError: where the network has something that may change unnoticed.

    >>> model, example = nn.Linear(2, 1), torch.ones(1, 2)
    >>> snapshot = Snapshot(model, example, {})
    >>> snapshot.matches(model)
    True
    >>> with torch.no_grad():
    ...     _ = model.bias.add_(1)
    >>> snapshot.matches(model)
    False
    """

    def __init__(self, model: nn.Module, example: Tensor, kept: Mapping[str, Tensor]) -> None:
        try:
            self.modules = _modules(model)
        except _CannotCompare as error:
            raise ValueError(f"module {error} may change unnoticed") from error
        self.tensors = {}
        for name, tensor in _tensors(model):
            same = kept.get(name)
            self.tensors[name] = same if same is not None and _equal(same, tensor) else tensor.detach().clone()
        self.example, self.outputs = example.clone(), _outputs(model, example)

    def matches(self, model: nn.Module) -> bool:
        """Return whether ``model``, the same object, is unchanged."""
        try:
            if _modules(model) != self.modules:
                return False
        except _CannotCompare:
            return False
        tensors = dict(_tensors(model))
        return (
            tensors.keys() == self.tensors.keys()
            and all(_equal(tensor, tensors[name]) for name, tensor in self.tensors.items())
            and self._same_outputs(model)
        )

    def _same_outputs(self, model: nn.Module) -> bool:
        outputs = _outputs(model, self.example)
        return len(outputs) == len(self.outputs) and all(map(_equal, self.outputs, outputs))


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _outputs(model: nn.Module, example: Tensor) -> list[Tensor]:
    """Return the tensors that the network puts out, also in tuples and mappings."""
    with torch.no_grad():
        waiting, tensors = [model(example.clone())], []
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            tensors.append(value.clone())
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, tuple | list):
            waiting += value
    return tensors


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether values, type, device, shape and layout agree; a tensor with a NaN equals no other."""
    kinds = ((t.dtype, t.device, t.shape, t.layout) for t in (one, other))
    return len(set(kinds)) == 1 and torch.equal(one, other)


def _modules(model: nn.Module) -> list[Any]:
    """Return type and attributes of each module, so that equal lists mean equal settings."""
    if any(getattr(torch_modules, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward")):
        raise _CannotCompare("hooks of all modules")
    described: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        described.append((name, kind, kind.__dict__.get("forward"), [*module._parameters], [*module._buffers]))
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules", *_STATE_DICT):
                continue
            if "hooks" in key and value:
                raise _CannotCompare(f"{name} has hooks, which")
            try:
                described.append((key, _comparable(value)))
            except _CannotCompare as error:
                raise _CannotCompare(f"{name}: attribute {key} ({error})") from error
    return described


def _comparable(value: Any) -> Any:
    """Return something that compares equal as long as ``value`` is unchanged, also where ``value`` is changed in place.

    Raises:
        _CannotCompare: where there is no such thing.
    """
    kind = type(value)
    if isinstance(value, _PLAIN):
        return kind, repr(value) if isinstance(value, float) else value
    if isinstance(value, type | types.BuiltinFunctionType):
        return value
    if kind is types.FunctionType and value.__closure__ is None:
        return value
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return kind, value.dtype, value.device, tuple(value.shape), content
    if issubclass(kind, dict) and kind.__module__ in ("builtins", "collections"):
        return kind, [(_comparable(key), _comparable(item)) for key, item in value.items()]
    if kind in (list, tuple, torch.Size):
        return kind, [_comparable(item) for item in value]
    if kind in (set, frozenset) and all(isinstance(item, _PLAIN) for item in value):
        return kind, frozenset(value)
    if kind is functools.partial:
        return kind, _comparable(value.func), _comparable(value.args), _comparable(value.keywords)
    raise _CannotCompare(kind.__name__)
