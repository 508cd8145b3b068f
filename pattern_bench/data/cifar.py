"""CIFAR-10 from its binary version, which is plain bytes: the Python version is pickles, and loading them runs code."""

from __future__ import annotations

import hashlib
import http.client
import math
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torchvision.datasets.utils import download_url

from pattern_bench.configuration.rules import check_arguments
from pattern_bench.data.base import FILES, Pool, Source, photograph_transform
from pattern_bench.errors import UserError

# https://www.cs.toronto.edu/~kriz/cifar.html
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER, PICKLES = "cifar-10-batches-bin", "cifar-10-batches-py"
TRAIN, TEST = tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)
RECORDS, CLASSES, SHAPE = 10_000, 10, (3, 32, 32)  # records of a file; each is a label's byte and the pixels'


class Cifar10(Source):
    """CIFAR-10: 50,000 training and 10,000 validation images of 32×32 pixels.

    Args:
        root: the folder that holds, or with ``download`` gets, ``cifar-10-batches-bin``.
        download: where the folder is not there, fetch the archive (unless that is) and unpack it.
    """

    def __init__(self, *, root: str, download: bool, **common: Any) -> None:
        super().__init__(**common)
        check_arguments(FILES, root=root, download=download)
        self.root, self.download = root, download

    def pools(self) -> tuple[Pool, Pool | None]:
        root = Path(self.root).expanduser()
        if self.download and not (root / FOLDER).is_dir():
            _fetch(root, f"data.root={self.root}")
        if not (root / FOLDER).is_dir():
            pickles = f" but {PICKLES}, pickles, which can run code and are not loaded"
            raise UserError(
                f"data.root={self.root} has no {FOLDER}{pickles if (root / PICKLES).exists() else ''}: give the folder "
                f"that holds it, unpack {URL} there, or set data.download=true, which fetches and unpacks that archive"
            )
        return CifarPool(root / FOLDER, TRAIN), CifarPool(root / FOLDER, TEST)

    def transform(self) -> Callable[[Any], Tensor]:
        return photograph_transform(32)


class CifarPool(Pool):
    """Some of the binary version's files, one after the other. All are read at once: 31 MB a file.

    Args:
        folder: that holds the files.
        files: their names.

    Raises:
        UserError: naming the file that cannot be read, has another size or a label that CIFAR-10 does not have.
    """

    classes = CLASSES

    def __init__(self, folder: Path, files: tuple[str, ...]) -> None:
        records = np.concatenate([_records(folder / name) for name in files])
        self.pixels = records[:, 1:].reshape(-1, *SHAPE)
        self.labels = records[:, 0].tolist()
        self.ids = [str(i) for i in range(len(records))]
        self.fingerprint = hashlib.sha256(records.data).hexdigest()

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels[index].transpose(1, 2, 0)))


def _records(path: Path) -> np.ndarray:
    """(records, 1 + 3·32·32) bytes."""
    remedy = f"remove {path.parent} and set data.download=true, or unpack {URL} again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    length = 1 + math.prod(SHAPE)
    if len(content) != RECORDS * length:
        raise UserError(f"{path} has {len(content)} bytes instead of {RECORDS * length}: {remedy}")
    records = np.frombuffer(content, dtype=np.uint8).reshape(RECORDS, length)
    if records[:, 0].max() >= CLASSES:
        raise UserError(f"{path} has the label {records[:, 0].max()}, and CIFAR-10's end at {CLASSES - 1}: {remedy}")
    return records


def _fetch(root: Path, setting: str) -> None:
    """The folder, whole or not at all, from the archive in ``root``, which is downloaded where it is not there.

    Raises:
        UserError: where that fails, or the archive is not what it should be.
    """
    archive = root / URL.rsplit("/", 1)[1]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{archive.name}.lock"):
            if (root / FOLDER).is_dir():  # another job was faster
                return
            download_url(URL, root, archive.name, MD5)
            with tempfile.TemporaryDirectory(dir=root, prefix=".") as scratch, tarfile.open(archive, "r:gz") as tar:
                tar.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4
                tar.extractall(scratch, _vetted(tar, archive))  # noqa: S202  no version's default filter is relied on
                os.replace(Path(scratch, FOLDER), root / FOLDER)
    except (OSError, EOFError, RuntimeError, zlib.error, http.client.HTTPException, tarfile.TarError) as error:
        raise UserError(
            f"data.download=true, but {URL} cannot be brought to {setting} ({error}): "
            f"mend that, or bring the archive with the MD5 sum {MD5} there yourself"
        ) from error


def _vetted(tar: tarfile.TarFile, archive: Path) -> list[tarfile.TarInfo]:
    """The archive's members, where each is the folder or a regular file right in it."""
    members = tar.getmembers()
    for member in members:
        parts = PurePosixPath(member.name).parts
        plain = member.isdir() if parts == (FOLDER,) else member.isreg() and len(parts) == 2 and parts[0] == FOLDER
        if not plain or ".." in parts:
            raise UserError(f"{archive} holds {member.name}, which is no file of {FOLDER}: nothing was unpacked")
    return members
