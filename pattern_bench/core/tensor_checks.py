"""Tensors as others hand them over."""

from __future__ import annotations

import torch
from torch import Tensor


def unusable(tensor: Tensor) -> str | None:
    """What kind of tensor this is where nothing can be computed with it, such as ``nested``; None where it is dense,
    real and has values."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return str(tensor.layout)
    if tensor.is_meta and type(tensor) is Tensor:  # a subclass may have its values elsewhere
        return "meta"
    if tensor.is_quantized:
        return "quantised"
    return "complex" if tensor.is_complex() else None


def whole_numbers(tensor: Tensor) -> bool:
    """Whether it is a usable tensor of integers."""
    return unusable(tensor) is None and not tensor.is_floating_point() and tensor.dtype != torch.bool
