"""What the experiments run: the main job as a sweep, on the networks and images that a reader may have."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

DIGITS, CIFAR, SQUEEZENET, VGG16 = "digits", "cifar", "squeezenet", "vgg16"
NEEDS = {DIGITS: [], CIFAR: ["cifar"], SQUEEZENET: ["photographs", "squeezenet"], VGG16: ["photographs", "vgg16"]}


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
        SystemExit: where a file that is given is not there.
    """
    for name in ("photographs", "squeezenet", "vgg16", "cifar"):
        path = getattr(options, name, None)
        if path is not None and not path.exists():
            raise SystemExit(f"--{name} {path} does not exist: give the path of what is meant by it (--help)")
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
    photographs = ["data=folder", "data.name=imagenet-sample", f"data.root='{options.photographs}'"]
    if network == SQUEEZENET:
        return [*photographs, "model=squeezenet1_1", f"model.weights='{options.squeezenet}'"]
    return [*photographs, "model=vgg16_features", f"model.weights='{options.vgg16}'"]


def cifar(options: argparse.Namespace) -> list[str]:
    """CIFAR-10: half of the 50,000 training images for patterns and half for v, all test images for validation."""
    return [
        "data=folder", "data.name=cifar10", f"data.root='{options.cifar}/train'",
        f"data.validation_root='{options.cifar}/test'", "data.size=32", "data.fit=0.5", "data.probe=0.5",
        "data.validation=1.0", "data.batch_size=256",
    ]  # fmt: skip


def sweep(folder: Path, *overrides: str, module: str = "pattern_bench") -> Path:
    """Runs a sweep into ``folder``; jobs that are complete there are left alone.

    Raises:
        SystemExit: with the command's own status, where it fails.
    """
    command = [sys.executable, "-m", module, "-m", f"hydra.sweep.dir='{folder}'", "logger=none", *overrides]
    print(" ".join(command), flush=True)
    if status := subprocess.run(command, check=False).returncode:  # noqa: S603  what it runs is this module's
        raise SystemExit(status)
    return folder
