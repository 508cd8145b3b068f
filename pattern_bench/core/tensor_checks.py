"""Checks of tensors that users hand over."""

from __future__ import annotations

import torch
from torch import Tensor


def unusable(tensor: Tensor) -> str | None:
    """Return the word for a kind of tensor that nothing can be computed with; None where it is dense, real and has
    values.

    >>> print(unusable(torch.ones(2)), unusable(torch.ones(2, device="meta")), unusable(torch.ones(2).to_sparse()))
    None meta torch.sparse_coo
    """
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
    """Return whether it is a usable tensor of integers; booleans are none.

    >>> whole_numbers(torch.tensor([1, 2])), whole_numbers(torch.tensor([1.0])), whole_numbers(torch.tensor(True))
    (True, False, False)
    """
    return unusable(tensor) is None and not tensor.is_floating_point() and tensor.dtype != torch.bool
