"""Set how products and convolutions of float32 numbers are rounded.

torch lets cuDNN round the inputs of convolutions to TF32 (10 bits of mantissa) unless told otherwise, and
``torch.set_float32_matmul_precision``, or Lightning's users, do the same to products, on some CPUs to bfloat16. That is
wrong in the third digit: patterns are off by 1 %, and differences between two networks drown in it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_cudnn: Any = torch.backends.cudnn
_onednn: Any = torch.backends.mkldnn
_ON_GPUS: tuple[Any, ...] = (torch.backends.cuda.matmul, _cudnn.conv, _cudnn.rnn)
_OPERATIONS: tuple[Any, ...] = (*_ON_GPUS, _onednn.matmul, _onednn.conv, _onednn.rnn)
_lock = threading.Lock()
_users = 0
_before: dict[str, Any] = {}


@contextmanager
def float32_products(tf32: bool = False) -> Iterator[None]:
    """Round products and convolutions of float32 numbers to float32, whatever torch is set to; restore that at the end.

    A context manager, and a decorator. Where one is active already, in this thread or another, it changes nothing: the
    outermost decides.

    Args:
        tf32: round to TF32 instead, on GPUs that have it.

    >>> torch.set_float32_matmul_precision("medium")
    >>> with float32_products():
    ...     torch.get_float32_matmul_precision()
    'highest'
    >>> torch.get_float32_matmul_precision()
    'medium'
    >>> torch.set_float32_matmul_precision("highest")
    """
    global _users, _before
    with _lock:
        if not _users:
            _before = _state()
            _set(tf32)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _restore(_before)


def _set(tf32: bool) -> None:
    # By both of torch's interfaces, so that neither finds the other's settings at odds with its own.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    for operation in _OPERATIONS:
        operation.fp32_precision = "tf32" if tf32 and operation in _ON_GPUS else "ieee"


def _state() -> dict[str, Any]:
    state: dict[str, Any] = {"operations": [operation.fp32_precision for operation in _OPERATIONS]}
    # The older interface refuses to say what the newer one has set.
    with suppress(RuntimeError):
        state["matmul"] = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        state["cudnn"] = torch.backends.cudnn.allow_tf32
    return state


def _restore(state: dict[str, Any]) -> None:
    # Where the older interface did not say, its own defaults: they were overruled by the newer one.
    torch.set_float32_matmul_precision(state.get("matmul", "highest"))
    torch.backends.cudnn.allow_tf32 = state.get("cudnn", True)
    for operation, precision in zip(_OPERATIONS, state["operations"], strict=True):
        operation.fp32_precision = "none"  # which follows torch.backends.fp32_precision, as it may have done before
        if operation.fp32_precision != precision:
            operation.fp32_precision = precision
