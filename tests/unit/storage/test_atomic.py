"""Files are whole or not there, and as open to others as any other file of the user's."""

import stat

import pytest
import torch

from pattern_bench.storage.atomic import write_file
from pattern_bench.storage.tensor_files import write_tensors


def test_files_of_tensors_may_be_read_by_whom_the_umask_lets(tmp_path):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)}, {})
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.safetensors")]
    assert modes[0] == modes[1]


def test_a_file_that_fails_half_way_leaves_what_was_there(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("before")

    def half(path):
        path.write_text("ha")
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        write_file(file, half)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert file.read_text() == "before"
