"""Any folder of images, labelled by its subfolders or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from pattern_bench.data.source import Pool, Source, photograph_transform
from pattern_bench.errors import UserError


class FolderPool(Pool):
    """Every image file below ``root``; the class is the subfolder, where every image lies in one.

    Raises:
        UserError: where ``root`` is no folder or holds no image.
    """

    def __init__(self, root: str, setting: str) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"{setting}={root} is not a folder: give the path of a folder of images")
        # followlinks is off: a link to a parent would never end.
        files = sorted(
            (Path(folder) / name).relative_to(self.root)
            for folder, _, names in os.walk(self.root)
            for name in names
            if name.lower().endswith(IMG_EXTENSIONS)
        )
        if not files:
            raise UserError(
                f"{setting}={root} holds no image: put files of these types in it: {' '.join(IMG_EXTENSIONS)}"
            )
        self.ids = [path.as_posix() for path in files]
        labelled = all(len(path.parts) > 1 for path in files)
        names = sorted({path.parts[0] for path in files}) if labelled else []
        number = {name: i for i, name in enumerate(names)}
        self.labels = [number[path.parts[0]] for path in files] if labelled else None
        self.classes = len(names) if labelled else None
        digest = hashlib.sha256()
        for path in files:
            stat = (self.root / path).stat()
            digest.update(f"{path.as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        self.fingerprint = digest.hexdigest()

    def image(self, index: int) -> Image.Image:
        with Image.open(self.root / self.ids[index]) as image:
            return image.convert("RGB")


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
        train = FolderPool(self.root, "data.root")
        if self.validation_root is None:
            return train, None
        return train, FolderPool(self.validation_root, "data.validation_root")

    def transform(self) -> Callable[[Any], Tensor]:
        return photograph_transform(self.size)
