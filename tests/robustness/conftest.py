"""A small job without faults, and what a fault changes of it."""

import shutil

import pytest
import torch
from helpers.small_jobs import SMALL
from helpers.tight_networks import Net

from pattern_bench.pipeline.job import run


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def images():
    return torch.randn(19, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained(configure, tmp_path_factory):
    """A complete run without faults, and its cache."""
    folder, cache = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("cache")
    run(configure(*SMALL, f"cache.dir={cache}"), folder)
    return folder, cache


@pytest.fixture
def own_cache(trained, tmp_path):
    """A cache with the trained model, and nothing else."""
    shutil.copytree(trained[1] / "models", tmp_path / "cache" / "models")
    return f"cache.dir={tmp_path / 'cache'}"
