"""Photographs that may be shown, and pictures small enough to be kept beside a page."""

from __future__ import annotations

import shutil
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image
from sklearn import datasets

# Two by danielbuechele and vultilion (CC BY 2.0) that come with scikit-learn; one of the US Navy with matplotlib.
PHOTOGRAPHS = ("china.jpg", "flower.jpg", "grace_hopper.jpg")


def photographs(folder: Path) -> Path:
    """A folder with the photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(datasets.__file__).parent / "images"
    for name in PHOTOGRAPHS[:2]:
        shutil.copyfile(beside / name, folder / name)
    shutil.copyfile(Path(get_data_path()) / "sample_data" / PHOTOGRAPHS[2], folder / PHOTOGRAPHS[2])
    return folder


def keep_small(picture: Path, copy: Path, width: int = 1600) -> None:
    """A copy of a picture, at most so many pixels wide, as JPEG or PNG by its name."""
    with Image.open(picture) as image:
        small = image.convert("RGB")
    small.thumbnail((width, 100 * width), Image.Resampling.LANCZOS)
    small.save(copy, quality=88, optimize=True)
