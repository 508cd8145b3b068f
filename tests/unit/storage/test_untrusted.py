"""Small files of others are read as plain data, up to a bound."""

import json
import os

import pytest
import yaml

from pattern_bench.storage.untrusted import read_json, read_yaml


def make_multirun(folder, task, own=()):
    overrides = {"task": list(task), "hydra": list(own)}
    content = {"hydra": {"job": {"name": "pattern_bench"}, "overrides": overrides,
                         "sweeper": {"_target_": "hydra.x.BasicSweeper"}}}  # fmt: skip
    folder.mkdir()
    (folder / "multirun.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_small_files_are_bounded(tmp_path):
    file = tmp_path / "x"
    for text in ("a: &a [1]\nb: *a", "- " * 500 + "x", "{a: " * 500):
        file.write_text(text)
        with pytest.raises((ValueError, yaml.YAMLError)):
            read_yaml(file)
    file.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="no object"):
        read_json(file)
    with file.open("wb") as large:
        large.truncate(2**40)
    with pytest.raises(ValueError, match="more than"):
        read_json(file)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no file"):
        read_json(tmp_path / "pipe")
