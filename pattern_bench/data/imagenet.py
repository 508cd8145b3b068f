"""ImageNet through torchvision's data set."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision import datasets

from pattern_bench.configuration.rules import check_arguments
from pattern_bench.data.base import FILES, Pool, Source, photograph_transform
from pattern_bench.data.decode import decode
from pattern_bench.data.file_index import Names, list_images
from pattern_bench.data.image_files import counted, is_hidden
from pattern_bench.errors import UserError
from pattern_bench.storage.cache import Cache, key_of

log = logging.getLogger(__name__)


class ImageNetPool(Pool):
    """One part of ImageNet, as torchvision finds it: classes are the sorted WordNet ids.

    Args:
        root: the folder with ``train/``, ``val/`` and ``meta.bin``, or with the archives they are unpacked from.
        part: ``train`` or ``val``.
        cache: keeps the listing; None lists anew.

    Raises:
        UserError: where ``root`` does not hold it.
    """

    ids: Names

    def __init__(self, root: Path, part: str, cache: Cache | None) -> None:
        where = f"data.root={root}"
        # Jobs side by side unpack once.
        unpacking = nullcontext() if cache is None else cache.lock("listings", key_of(unpacking=str(root.resolve())))
        try:
            with unpacking, safe_extraction():
                layout = _Layout(root, split=part)
        except KeyError as error:
            raise UserError(
                f"{where}: {part}/ has a folder {error}, which is no class of meta.bin: move it elsewhere"
            ) from error
        except Exception as error:  # a damaged meta.bin or archive has many
            raise UserError(
                f"{where} has no ImageNet ({_first_line(error)}): give the folder that holds "
                "train/, val/ and meta.bin, or the archives that torchvision.datasets.ImageNet unpacks"
            ) from error
        listing = list_images(root / part, cache, follow_links=True)
        if empty := sorted(set(layout.wnids) - set(listing.classes)):
            raise UserError(f"{where}: {part}/{empty[0]} holds no image: fill it, or remove it")
        if -1 in listing.labels:
            stray = listing.names[listing.labels.index(-1)]
            raise UserError(f"{where}: {part}/{stray} lies in no class's folder: move it to one, or remove it")
        if said := counted(listing.left_out):
            log.info("data.root, %s/: %s", part, said)
        self.root, self.ids = root, listing.names.below(f"{part}/")
        self.labels, self.classes, self.fingerprint = listing.labels, len(layout.wnids), listing.fingerprint

    def image(self, index: int) -> Image.Image:
        return decode(self.root / self.ids.path(index))


class _Layout(datasets.ImageNet):
    """torchvision's checks, unpacking and classes, without its own walk over the images."""

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not is_hidden(name)]
        return classes, {name: number for number, name in enumerate(classes)}

    @staticmethod
    def make_dataset(*_: Any, **__: Any) -> list[tuple[str, int]]:
        return []


@contextmanager
def safe_extraction() -> Iterator[None]:
    """Within, archives are unpacked into their folder and nowhere else.

    torchvision before 0.29 calls ``extractall`` without a filter, and so believes an archive's ``../`` and links;
    Python then takes the filter from this attribute (PEP 706). 3.11.0 to 3.11.3 have none: there only the archive's
    MD5 speaks for it, which torchvision compares first.
    """
    kept = getattr(tarfile.TarFile, "extraction_filter", None)
    safe = getattr(tarfile, "data_filter", None)
    tarfile.TarFile.extraction_filter = None if safe is None else staticmethod(safe)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = kept if kept is None else staticmethod(kept)


class ImageNet(Source):
    """ImageNet (ILSVRC 2012): 1.28 million training and 50,000 validation images in 1,000 classes.

    Args:
        root: the folder with torchvision's layout (``train/``, ``val/`` and ``meta.bin``, or the original archives).
        size: side of the input for models that bring no transform of their own.
    """

    def __init__(self, *, root: str, size: int, **common: Any) -> None:
        super().__init__(**common)
        check_arguments(FILES, root=root, size=size)
        self.root, self.size = root, size

    def pools(self) -> tuple[Pool, Pool | None]:
        root = Path(self.root).expanduser()
        return ImageNetPool(root, "train", self.cache), ImageNetPool(root, "val", self.cache)

    def transform(self) -> Callable[[Any], Tensor]:
        return photograph_transform(self.size)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
