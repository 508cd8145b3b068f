"""Whether a network is as it was: what a copy of it, kept for later, must be compared with.

Parameters and buffers are compared by content, modules by type and by their plain attributes, and all that code may
read besides by what the network answers to one image, bit by bit. What may change without a trace in these, such as
hooks and objects of the user's own, is not remembered at all.
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


class _Unknown(Exception):
    """Something that may change unnoticed."""


class Remembered:
    """A network as it was at some time, without holding on to the network itself.

    Args:
        model: the network.
        example: (1, C, spatial...), an image that it can take.
        kept: tensors by name that are kept in any case; those with the content of one of the network's own are not
            copied again.

    Raises:
        ValueError: where the network has something that may change unnoticed.
    """

    def __init__(self, model: nn.Module, example: Tensor, kept: Mapping[str, Tensor]) -> None:
        try:
            self.modules = _modules(model)
        except _Unknown as error:
            raise ValueError(f"module {error} may change unnoticed") from error
        self.tensors = {}
        for name, tensor in _tensors(model):
            same = kept.get(name)
            self.tensors[name] = same if same is not None and _equal(same, tensor) else tensor.detach().clone()
        self.example, self.answer = example.clone(), _answer(model, example)

    def is_still(self, model: nn.Module) -> bool:
        """Whether ``model``, the same object, has not changed since."""
        try:
            if _modules(model) != self.modules:
                return False
        except _Unknown:
            return False
        tensors = dict(_tensors(model))
        return (
            tensors.keys() == self.tensors.keys()
            and all(_equal(tensor, tensors[name]) for name, tensor in self.tensors.items())
            and self._answers(model)
        )

    def _answers(self, model: nn.Module) -> bool:
        answer = _answer(model, self.example)
        return len(answer) == len(self.answer) and all(map(_equal, self.answer, answer))


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _answer(model: nn.Module, example: Tensor) -> list[Tensor]:
    """The tensors that the network puts out, also in tuples and dicts."""
    with torch.no_grad():
        waiting, found = [model(example.clone())], []
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.append(value.clone())
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, tuple | list):
            waiting += value
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all is the same; NaN is not equal to NaN, so what holds one always differs."""
    kinds = ((t.dtype, t.device, t.shape, t.layout) for t in (one, other))
    return len(set(kinds)) == 1 and torch.equal(one, other)


def _modules(model: nn.Module) -> list[Any]:
    """Type and attributes of each module, so that equal lists are equal settings."""
    if any(getattr(torch_modules, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward")):
        raise _Unknown("hooks of all modules")
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        found.append((name, kind, kind.__dict__.get("forward"), [*module._parameters], [*module._buffers]))
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules", *_STATE_DICT):
                continue
            if "hooks" in key and value:
                raise _Unknown(f"{name} has hooks, which")
            try:
                found.append((key, _plain(value)))
            except _Unknown as error:
                raise _Unknown(f"{name}: attribute {key} ({error})") from error
    return found


def _plain(value: Any) -> Any:
    """A value that is equal as long as ``value`` is the same, however it is changed in place."""
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
        return kind, [(_plain(key), _plain(item)) for key, item in value.items()]
    if kind in (list, tuple, torch.Size):
        return kind, [_plain(item) for item in value]
    if kind in (set, frozenset) and all(isinstance(item, _PLAIN) for item in value):
        return kind, frozenset(value)
    if kind is functools.partial:
        return kind, _plain(value.func), _plain(value.args), _plain(value.keywords)
    raise _Unknown(kind.__name__)
