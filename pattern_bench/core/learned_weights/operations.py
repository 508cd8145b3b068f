"""Sort torch's operations by what they do with values, by their names in ATen."""

from __future__ import annotations

from typing import Any

from torch import Tensor

ADDING = (
    "add", "sub", "rsub", "where", "masked_fill", "maximum", "minimum", "fmax", "fmin", "clamp", "clamp_min",
    "clamp_max", "copysign",
)  # fmt: skip
"""Elementwise operations of two operands that do not multiply them."""
MOVING = (
    "cat", "stack", "copy", "index_put", "_index_put_impl", "slice_scatter", "select_scatter", "scatter", "index_copy",
    "index_fill", "masked_scatter",
)  # fmt: skip
"""Operations that put the values of several tensors into one."""
REARRANGING = ("roll", "flip", "constant_pad_nd", "clone", "index", "index_select", "gather", "repeat")
"""Operations that put one tensor's values in other places."""
CHOOSING = ("index", "index_select", "gather", "take", "embedding", "masked_select")
"""Operations that take some of a tensor's values, by an index that may depend on the image."""
NORMALISING = (
    "native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm",
    "_fused_rms_norm", "_softmax", "_log_softmax",
)  # fmt: skip
"""Operations that sum in order to normalise; with an elementwise affine part at most."""
SUMMING = (
    "add", "sub", "rsub", "addcmul", "addcdiv", "lerp", "maximum", "minimum", "fmax", "fmin", "logaddexp", "logaddexp2",
    "hypot",
)  # fmt: skip
"""Elementwise operations that add their operands, or choose the larger."""
ACTIVATIONS = ("prelu", "_prelu_kernel")
"""Activations with learned slopes, which torch does not count among its elementwise operations."""
ADDED = ("bias", "attn_mask", "attn_bias")
"""Arguments of operations that sum, which are added to the sum."""


def base_name(func: Any) -> str:
    """Return the name of an operation without its namespace and overload; in-place variants have the plain one's.

    >>> import torch
    >>> base_name(torch.ops.aten.add.Tensor), base_name(torch.ops.aten.add_.Tensor)
    ('add', 'add')
    """
    return full_name(func).removesuffix("_")


def full_name(func: Any) -> str:
    """Return the name of an operation without its namespace and overload.

    >>> import torch
    >>> full_name(torch.ops.aten.add_.Tensor)
    'add_'
    """
    name: str = func._schema.name.partition("::")[2]
    return name


def squares(name: str, args: Any) -> bool:
    """Return whether an elementwise operation multiplies its operand by itself.

    >>> import torch
    >>> x = torch.ones(2)
    >>> squares("pow", (x, 2)), squares("mul", (x, x)), squares("mul", (x, x + 1))
    (True, True, False)
    """
    if name == "pow":
        return isinstance(args[1], int | float) and args[1] >= 2
    return name == "square" or (
        name == "mul" and isinstance(args[1], Tensor) and args[0].data_ptr() == args[1].data_ptr()
    )
