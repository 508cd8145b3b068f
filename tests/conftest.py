"""Shared by the tests: configurations, runs, and a brute-force reference that shares no code with the package."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from pattern_bench.configuration.location import CONF

os.environ["WANDB_MODE"] = "offline"

LONGEST = [
    "processes", "sweeps", "signals", "job", "resume", "tracking", "reading", "devices", "launchers", "gallery",
    "faults", "wheel", "dashboard",
]  # fmt: skip
"""Files that take a minute or more: first, so that no process is left alone with one at the end."""


def pytest_collection_modifyitems(items):
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One cache for the whole session, as a user has."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def configure(cache_dir):
    """Composes the configuration with overrides, quietly and with the session's cache."""

    def make(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", ["logger=none", f"cache.dir={cache_dir}", *overrides])

    return make


@pytest.fixture
def run_job(configure, tmp_path):
    """Runs the job in this process; returns its folder."""
    from pattern_bench.pipeline.job import run

    counter = itertools.count()

    def start(*overrides):
        folder = tmp_path / f"run{next(counter)}"
        folder.mkdir()
        run(configure(*overrides), folder)
        return folder

    return start


@pytest.fixture
def command(cache_dir, tmp_path):
    """Runs ``python -m MODULE ARGUMENTS`` as a user does, in an empty folder."""

    def start(*arguments, module="pattern_bench", cwd=tmp_path):
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ, "PATTERN_BENCH_CACHE": str(cache_dir), "WANDB_MODE": "offline", "PYTHONPATH": path,
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    return start


@pytest.fixture
def script():
    """Starts Python code with arguments in a process of its own, which can be talked to, and ends it with the test."""
    started = []

    def start(code, *arguments):
        one = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        started.append(one)
        return one

    yield start
    for one in started:
        one.kill()
        one.communicate()


@pytest.fixture
def photographs():
    """A folder of 12 random JPEGs in 3 classes."""

    def make(root: Path, count: int = 12, classes: int = 3, size: int = 40) -> Path:
        from PIL import Image

        draw = np.random.default_rng(0)
        for i in range(count):
            folder = root / f"class{i % classes}" if classes else root
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (size, size + 8, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
        return root

    return make


GEOMETRIES = {
    "conv2d": lambda: (nn.Conv2d(3, 4, 3, padding=1), (3, 3, 6, 5)),
    "strided": lambda: (nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0)), (3, 3, 7, 8)),
    "dilated": lambda: (nn.Conv2d(2, 3, 3, dilation=(2, 1), padding=2, bias=False), (2, 2, 7, 6)),
    "grouped": lambda: (nn.Conv2d(4, 6, 2, groups=2), (3, 4, 5, 5)),
    "depthwise": lambda: (nn.Conv2d(3, 6, 3, groups=3, padding=1), (3, 3, 5, 5)),
    "same": lambda: (nn.Conv2d(2, 3, (2, 3), padding="same"), (3, 2, 5, 6)),
    "reflect": lambda: (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (3, 2, 5, 6)),
    "circular": lambda: (nn.Conv2d(2, 3, 3, padding=(0, 2), padding_mode="circular"), (3, 2, 5, 6)),
    "conv1d": lambda: (nn.Conv1d(2, 3, 3, padding=1), (4, 2, 9)),
    "conv3d": lambda: (nn.Conv3d(2, 3, 2, padding=(0, 1, 0)), (2, 2, 4, 3, 4)),
    "linear": lambda: (nn.Linear(5, 4), (30, 5)),
    "linear_on_sequences": lambda: (nn.Linear(5, 4), (6, 7, 5)),
}


def brute_patches(layer, x):
    """(G, samples, D) float64 patches, one output position after the other."""
    x = x.double().numpy()
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    kernel, stride, dilation, groups = layer.kernel_size, layer.stride, layer.dilation, layer.groups
    if layer.padding == "same":
        width = [(d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True)]
    else:
        width = [(p, p) for p in ((0,) * len(kernel) if layer.padding == "valid" else layer.padding)]
    mode = {"zeros": "constant", "reflect": "reflect", "circular": "wrap", "replicate": "edge"}[layer.padding_mode]
    x = np.pad(x, [(0, 0), (0, 0), *width], mode=mode)
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    per_group = x.shape[1] // groups
    found = [[] for _ in range(groups)]
    for image in x:
        for position in itertools.product(*map(range, out)):
            window = tuple(
                slice(p * s, p * s + d * (k - 1) + 1, d)
                for p, s, d, k in zip(position, stride, dilation, kernel, strict=True)
            )
            for g in range(groups):
                found[g].append(image[(slice(g * per_group, (g + 1) * per_group), *window)].ravel())
    return np.array(found)


def brute_neuron(layer, x, neuron):
    """One neuron's patches X (samples, D), u (samples,) and gate (samples,), float64."""
    patches = brute_patches(layer, x)
    per_group = layer.weight.shape[0] // len(patches)
    patch = patches[neuron // per_group]
    u = patch @ layer.weight[neuron].detach().double().numpy().ravel()
    bias = 0.0 if layer.bias is None else float(layer.bias[neuron])
    return patch, u, u + bias > 0


@pytest.fixture(params=GEOMETRIES)
def layer_and_input(request):
    torch.manual_seed(len(request.param))
    layer, shape = GEOMETRIES[request.param]()
    layer = layer.double().requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64)
    x = x.relu() + 0.3 * x + 0.2
    return layer, x


@pytest.fixture
def pretend_device():
    """A device that is none (``pretend_device.py``): what mixes its tensors with the host's is an error."""
    from pretend_device import pretending

    with pretending() as device:
        yield device
