"""ImageNet through torchvision's data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision import datasets

from pattern_bench.data.source import Pool, Source, photograph_transform
from pattern_bench.errors import UserError


class VisionPool(Pool):
    """A torchvision data set that keeps its labels in ``targets``."""

    def __init__(self, dataset: Any, ids: list[str] | None = None) -> None:
        self.dataset = dataset
        self.labels = list(dataset.targets)
        self.ids = ids or [str(i) for i in range(len(dataset))]
        self.classes = len(dataset.classes)
        names = "\n".join([type(dataset).__name__, *self.ids, *map(str, self.labels)])
        self.fingerprint = hashlib.sha256(names.encode()).hexdigest()

    def image(self, index: int) -> Image.Image:
        return self.dataset[index][0].convert("RGB")


class ImageNet(Source):
    """ImageNet (ILSVRC 2012): 1.28 million training and 50,000 validation images in 1,000 classes.

    Args:
        root: the folder with torchvision's layout (``train/``, ``val/`` and ``meta.bin``, or the original archives).
        size: side of the input for models that bring no transform of their own.
    """

    def __init__(self, *, root: str, size: int, **common: Any) -> None:
        super().__init__(**common)
        self.root, self.size = root, size

    def pools(self) -> tuple[Pool, Pool | None]:
        root = Path(self.root).expanduser()
        try:
            train, validation = (datasets.ImageNet(root, split=split) for split in ("train", "val"))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"data.root={self.root} has no ImageNet ({_first_line(error)}): give the folder that holds "
                "train/, val/ and meta.bin, or the archives that torchvision.datasets.ImageNet unpacks"
            ) from error

        def names(dataset: Any) -> list[str]:
            return [Path(file).relative_to(root).as_posix() for file, _ in dataset.imgs]

        return VisionPool(train, names(train)), VisionPool(validation, names(validation))

    def transform(self) -> Callable[[Any], Tensor]:
        return photograph_transform(self.size)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
