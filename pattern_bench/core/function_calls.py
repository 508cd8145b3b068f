"""Read the calls that a ``TorchFunctionMode`` sees: a function's name, and the tensors among its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution", "linear")
"""Functions of torch, by name, that multiply their input by a weight and sum."""


def name_of(function: Any) -> str:
    """Return the name of a function of torch, empty where it has none.

    >>> import torch
    >>> name_of(torch.nn.functional.conv2d), name_of(3)
    ('conv2d', '')
    """
    return getattr(function, "__name__", "")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings, in order.

    >>> import torch
    >>> [tensor.item() for tensor in tensors_in(({"a": torch.tensor(1)}, [torch.tensor(2), None]))]
    [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
