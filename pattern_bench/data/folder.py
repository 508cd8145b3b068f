"""Any folder of images, labelled by its subfolders or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from pattern_bench.cache import Cache
from pattern_bench.data.decode import decode
from pattern_bench.data.listing import Names, list_images
from pattern_bench.data.source import Pool, Source, photograph_transform
from pattern_bench.errors import UserError


class FolderPool(Pool):
    """Every image file below ``root``; the class is the subfolder, where every image lies in one.

    Raises:
        UserError: where ``root`` is no folder or holds no image.
    """

    ids: Names

    def __init__(self, root: str, setting: str, cache: Cache | None = None) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"{setting}={root} is not a folder: give the path of a folder of images")
        listing = list_images(self.root, cache)
        if not listing.names:
            raise UserError(
                f"{setting}={root} holds no image: put files of these types in it: {' '.join(IMG_EXTENSIONS)}"
            )
        labelled = min(listing.labels) >= 0
        self.ids = listing.names
        self.labels = listing.labels if labelled else None
        self.classes = len(listing.classes) if labelled else None
        self.fingerprint = listing.fingerprint

    def image(self, index: int) -> Image.Image:
        return decode(self.root / self.ids.path(index))


class Folder(Source):
    """A folder of images.

    Args:
        root: the folder; every subfolder is searched.
        validation_root: a folder of validation images; None draws them from ``root``.
        size: side of the input for models that bring no transform of their own.
    """

    def __init__(self, *, root: str, validation_root: str | None, size: int, **common: Any) -> None:
        super().__init__(**common)
        self.root, self.validation_root, self.size = root, validation_root, size

    def pools(self) -> tuple[Pool, Pool | None]:
        train = FolderPool(self.root, "data.root", self.cache)
        if self.validation_root is None:
            return train, None
        return train, FolderPool(self.validation_root, "data.validation_root", self.cache)

    def transform(self) -> Callable[[Any], Tensor]:
        return photograph_transform(self.size)
