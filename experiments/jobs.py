"""What the experiments run: the main job as a sweep, on the networks and images that a reader may have."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

DIGITS, CIFAR, SQUEEZENET, VGG16 = "digits", "cifar", "squeezenet", "vgg16"
EXPECTED = {"photographs": ["."], "cifar": ["train", "test"], "squeezenet": [""], "vgg16": [""]}
"""The folders of each; "" where it is a file."""
NEEDS = {DIGITS: [], CIFAR: ["cifar"], SQUEEZENET: ["photographs", "squeezenet"], VGG16: ["photographs", "vgg16"]}
ESTIMATORS = ("random", "w", "a", "a_plus_minus")
# Of jobs that are there for ρ.
NOTHING_ELSE = ["explanation.images=1", "degradation.images=1", "degradation.steps=1"]
# VGG-16's patches have up to 4,608 values: ten chunks of its Gram matrices take 20 GB.
BOOTSTRAP = {
    DIGITS: ["bootstrap.resamples=50"],
    CIFAR: ["bootstrap.resamples=20"],
    SQUEEZENET: ["bootstrap.resamples=20"],
    VGG16: ["bootstrap.resamples=5", "bootstrap.chunks=10", "data.batch_size=8"],
}
FEW = "bootstrap.resamples=2"
"""As chunks are kept anyway, so that they are used again."""


def arguments(description: str | None, networks: Iterable[str]) -> argparse.ArgumentParser:
    """A parser of what the experiments on these networks ask for; a network whose files are not given is left out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = {name for network in networks for name in NEEDS[network]}
    about = {
        "photographs": "folder of ImageNet photographs, one subfolder per class",
        "squeezenet": "ImageNet weights of torchvision's squeezenet1_1, as safetensors",
        "vgg16": "ImageNet weights of vgg16's features.*, as safetensors",
        "cifar": "folder with train/CLASS/*.jpg and test/CLASS/*.jpg of CIFAR-10",
    }
    for name, text in about.items():
        if name in wanted:
            parser.add_argument(f"--{name}", type=Path, help=text)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="where runs are kept, and found")
    return parser


def given(networks: Iterable[str], options: argparse.Namespace) -> list[str]:
    """Those of the networks whose files are given.

    Raises:
        SystemExit: where what is given is not there.
    """
    for name, parts in EXPECTED.items():
        path = getattr(options, name, None)
        if path is not None and not all((path / part).is_dir() if part else path.is_file() for part in parts):
            what = " and ".join(f"{path / part}/" for part in parts if part) or f"the file {path}"
            raise SystemExit(f"--{name} {path}: {what} must be there; --help says what is meant")
    found = [network for network in networks if all(getattr(options, name) is not None for name in NEEDS[network])]
    for network in networks:
        if network not in found:
            print(f"{network} is left out: it needs {' and '.join(f'--{name}' for name in NEEDS[network])}", flush=True)
    return found


def settings(network: str, options: argparse.Namespace) -> list[str]:
    """The overrides that choose a network and its images."""
    if network == DIGITS:
        return ["data=digits", "model=small_vgg"]
    if network == CIFAR:
        return [*cifar(options), "model=cifar_vgg"]
    photographs = ["data=folder", "data.name=imagenet-sample", f"data.root={quoted(options.photographs)}"]
    if network == SQUEEZENET:
        return [*photographs, "model=squeezenet1_1", f"model.weights={quoted(options.squeezenet)}"]
    return [*photographs, "model=vgg16_features", f"model.weights={quoted(options.vgg16)}"]


def cifar(options: argparse.Namespace) -> list[str]:
    """CIFAR-10: half of the 50,000 training images for patterns and half for v, all test images for validation."""
    return [
        "data=folder", "data.name=cifar10", f"data.root={quoted(options.cifar / 'train')}",
        f"data.validation_root={quoted(options.cifar / 'test')}", "data.size=32", "data.fit=0.5", "data.probe=0.5",
        "data.validation=1.0", "data.batch_size=256",
    ]  # fmt: skip


def quoted(path: Path) -> str:
    """A path as Hydra reads it."""
    return "'" + str(path).replace("'", r"\'") + "'"


def folder(path: Path) -> Path:
    """The folder, made where it is not there.

    Raises:
        SystemExit: where it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{path} cannot be made a folder ({error.strerror}): choose another --runs") from error
    return path


def sweep(into: Path, *overrides: str, module: str = "pattern_bench") -> Path:
    """Runs a sweep into ``into``; jobs that are complete there are left alone.

    Raises:
        SystemExit: with the command's own status, where it fails.
    """
    command = [sys.executable, "-m", module, "-m", f"hydra.sweep.dir={quoted(into)}", "logger=none", *overrides]
    print(" ".join(command), flush=True)
    if status := subprocess.run(command, check=False).returncode:  # noqa: S603  what it runs is this module's
        raise SystemExit(status)
    return into
