"""Photographs that may be shown, and pictures small enough to be kept beside a page."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image
from sklearn import datasets

from experiments import jobs
from experiments.jobs import SQUEEZENET, arguments, given, settings, sweep

# Two by danielbuechele and vultilion (CC BY 2.0) that come with scikit-learn; one of the US Navy with matplotlib.
PHOTOGRAPHS = ("china.jpg", "flower.jpg", "grace_hopper.jpg")


def photographs(folder: Path) -> Path:
    """A folder with the photographs."""
    jobs.folder(folder)
    beside = Path(datasets.__file__).parent / "images"
    for name in PHOTOGRAPHS[:2]:
        shutil.copyfile(beside / name, folder / name)
    shutil.copyfile(Path(get_data_path()) / "sample_data" / PHOTOGRAPHS[2], folder / PHOTOGRAPHS[2])
    return folder


def keep_small(picture: Path, copy: Path, width: int = 1600) -> None:
    """A copy of a picture, at most so many pixels wide, as JPEG or as PNG of 256 colours, by its name."""
    with Image.open(picture) as image:
        small = image.convert("RGB")
    small.thumbnail((width, 100 * width), Image.Resampling.LANCZOS)
    if copy.suffix == ".png":
        small = small.quantize(256, dither=Image.Dither.NONE)
    small.save(copy, quality=88, optimize=True)


def gallery(figure: str, shown: Mapping[str, str], folder: Path, about: str | None) -> None:
    """Draws a gallery of each network, which ``shown`` gives one more setting, into ``folder`` as NETWORK.jpg."""
    options = arguments(about, shown).parse_args()
    for network in given(shown, options):
        chosen = [*settings(network, options), f"figure={figure}", shown[network]]
        if network == SQUEEZENET:
            # Patterns from all of the reader's photographs; shown are others.
            others = photographs(options.runs / "photographs")
            chosen += [f"data.validation_root={jobs.quoted(others)}", "data.validation=1.0"]
            chosen += ["data.fit=0.5", "data.probe=0.5", "percentile=99.5"]
        made = sweep(options.runs / f"{figure}-{network}", *chosen, module="pattern_bench.gallery")
        (picture,) = made.glob(f"*/{figure}.png")
        keep_small(picture, folder / f"{network}.jpg")
