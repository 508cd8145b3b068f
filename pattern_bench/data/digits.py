"""scikit-learn's handwritten digits: 1,797 real images of 8×8 pixels in ten classes, shipped with the library."""

from __future__ import annotations

import torch

from pattern_bench.data.base import Pool, Source, TensorPool


class Digits(Source):
    """scikit-learn's digits as images (1, 8, 8), float32, from 0 (paper) to 1 (ink), with ten classes."""

    def pools(self) -> tuple[Pool, Pool | None]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 16
        return TensorPool(images, torch.from_numpy(digits.target), 10), None
