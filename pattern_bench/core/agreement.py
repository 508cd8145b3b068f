"""Tell whether two networks' outputs agree up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Outputs that differ by less than this share of the largest agree: float32 errors add up over depth."""
CLOSE = 2e-6
"""Outputs that differ by less than this share agree in any precision, so nothing more needs to be computed."""


def agree(outputs: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Return whether two tensors have one shape and differ by at most ``tolerance`` times the largest finite value of
    ``expected``; NaN agrees with NaN.

    >>> expected = torch.tensor([1.0, float("nan"), 1000.0])
    >>> agree(expected + 0.5, expected), agree(expected + 5, expected), agree(expected[:2], expected)
    (True, False, False)
    """
    if outputs.shape != expected.shape:
        return False
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(outputs, expected, rtol=0.0, atol=tolerance * scale, equal_nan=True)
