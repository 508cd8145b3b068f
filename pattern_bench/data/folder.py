"""Any folder of images, labelled by its subfolders or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL
from PIL import Image
from torch import Tensor

from pattern_bench.configuration.rules import check_arguments
from pattern_bench.data.base import FILES, Pool, Source, photograph_transform
from pattern_bench.data.decode import decode
from pattern_bench.data.file_index import Names, list_images
from pattern_bench.data.image_files import OTHER_IMAGES, counted, suffixes
from pattern_bench.data.remote import plain
from pattern_bench.errors import UserError
from pattern_bench.storage.cache import Cache

log = logging.getLogger(__name__)


class FolderPool(Pool):
    """Every image file below a folder; the class is the subfolder, where every image lies in one.

    Files and folders that are hidden, and files of types that Pillow does not read, are left out; the log says how
    many.

    Args:
        root: the folder.
        setting: that names it, for messages.
        cache: keeps the listing; None lists anew.
        strict: whether an image of a type that Pillow does not read is an error.

    Raises:
        UserError: where ``root`` is no folder or holds no image, or under ``strict``.
    """

    ids: Names

    def __init__(self, root: str, setting: str, cache: Cache | None = None, strict: bool = False) -> None:
        self.root = Path(os.path.expanduser(root))  # Path's own raises where there is no such user
        if not self.root.is_dir():
            hint = ", or with data=shards the address of shards" if "://" in root else ""
            raise UserError(f"{setting}={plain(root)} is not a folder: give the path of a folder of images{hint}")
        listing = list_images(self.root, cache)
        said = counted(listing.left_out)
        if not listing.names:
            raise UserError(
                f"{setting}={root} holds no image{f' ({said})' if said else ''}: put files of these types in it: "
                f"{' '.join(suffixes())}"
            )
        missed = {suffix: number for suffix, number in listing.left_out.items() if suffix in OTHER_IMAGES}
        if strict and missed:
            raise UserError(
                f"data.strict=true, and {setting}={root} has images of types that Pillow {PIL.__version__} does not "
                f"read ({', '.join(f'{suffix} {number}' for suffix, number in missed.items())}): convert or remove them"
            )
        if set(listing.left_out) - {"hidden"}:
            log.warning("%s: %s", setting, said)
        elif said:
            log.info("%s: %s", setting, said)
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
        check_arguments(FILES, root=root, validation_root=validation_root, size=size)
        self.root, self.validation_root, self.size = root, validation_root, size

    def pools(self) -> tuple[Pool, Pool | None]:
        train = FolderPool(self.root, "data.root", self.cache, self.strict)
        if self.validation_root is None:
            return train, None
        return train, FolderPool(self.validation_root, "data.validation_root", self.cache, self.strict)

    def transform(self) -> Callable[[Any], Tensor]:
        return photograph_transform(self.size)
