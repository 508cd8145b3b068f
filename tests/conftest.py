"""Shared by the tests: configurations, runs, commands, photographs, layers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.brute_force import GEOMETRIES
from helpers.paths import TESTS
from hydra import compose, initialize_config_dir

from pattern_bench.configuration.location import CONF

os.environ["WANDB_MODE"] = "offline"
# Many tests run side by side: one thread for each, and for each job that it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

LONGEST = [
    "processes", "sweeps", "signals", "job", "resume", "devices", "tracking", "probe_sgd", "launchers", "wheel",
    "determinism", "canonical", "gallery", "dashboard", "reach", "security", "out_of_memory", "fuzz", "terminal",
    "fig2_and_scaling", "full_disks", "experiments",
]  # fmt: skip
"""Modules that take longest: first, so that no process is left alone with one at the end."""


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


@pytest.fixture(scope="session")
def command_in(cache_dir):
    """Runs ``python -m MODULE ARGUMENTS`` as a user does, in a folder."""

    def start(folder, *arguments, module="pattern_bench"):
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ, "PATTERN_BENCH_CACHE": str(cache_dir), "WANDB_MODE": "offline", "PYTHONPATH": path,
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    return start


@pytest.fixture
def command(command_in, tmp_path):
    """Runs ``python -m MODULE ARGUMENTS`` as a user does, in an empty folder unless ``cwd`` says another."""

    def start(*arguments, module="pattern_bench", cwd=tmp_path):
        return command_in(cwd, *arguments, module=module)

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
    """A device that is none (``helpers/pretend_device.py``): what mixes its tensors with the host's is an error."""
    from helpers.pretend_device import pretending

    with pretending() as device:
        yield device
