"""A cache of its own, and the folders that are listed."""

import os
from pathlib import Path

import pytest

from pattern_bench.data import file_index
from pattern_bench.storage.cache import Cache


@pytest.fixture
def cache(tmp_path):
    return Cache(str(tmp_path / "cache"))


def settle(root, time=1_600_000_000):
    for folder, _, names in os.walk(root):
        for name in names:
            os.utime(Path(folder) / name, (time, time), follow_symlinks=False)
        os.utime(folder, (time, time))


@pytest.fixture
def looked_into(monkeypatch):
    """The folders that are listed, by name."""
    found, scandir = [], os.scandir

    def watched(folder):
        found.append(Path(os.fsdecode(folder)).name)
        return scandir(folder)

    monkeypatch.setattr(file_index.os, "scandir", watched)
    return found
