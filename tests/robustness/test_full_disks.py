"""Disks that are full under the run's folder, its cache and its log."""

import os
import shutil
import subprocess

import pytest
from helpers.small_jobs import SMALL, summary_of

from pattern_bench.pipeline.job import run


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB, filled but for so many KiB."""
    mounted = []

    def full(folder, free):
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount a disk of its own: {done.stderr.strip()}")
        mounted.append(folder)
        (folder / "filling").write_bytes(bytes((1024 - free) * 1024))
        return folder

    if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid():
        pytest.skip("only root can mount a disk of its own")
    yield full
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_run_folder_on_a_full_disk_is_one_error_and_can_be_taken_up(
    trained, command, configure, small_disk, tmp_path
):
    disk = small_disk(tmp_path / "disk", free=100)
    folder, same_cache = disk / "run", f"cache.dir={trained[1]}"
    done = command(*SMALL, "logger=none", same_cache, f"hydra.run.dir={folder}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert error.startswith(f"error: cannot use {folder / 'patterns.safetensors'} (")
    assert error.endswith("): free space, or choose another hydra.run.dir")
    assert "o space left on device" in error
    assert not [file for file in folder.iterdir() if file.name.startswith(".") and file.name != ".hydra"]
    (disk / "filling").unlink()
    run(configure(*SMALL, same_cache), folder)
    for name in ("rho.csv", "degradation.csv", "accuracy.json", "splits.csv"):
        assert (folder / name).read_bytes() == (trained[0] / name).read_bytes()


def test_a_cache_on_a_full_disk_is_said_once(trained, run_job, small_disk, tmp_path, caplog):
    disk = small_disk(tmp_path / "disk", free=300)
    shutil.copytree(trained[1] / "models", disk / "models")  # 100 KiB; the moments take 900
    folder = run_job(*SMALL, f"cache.dir={disk}")
    assert caplog.text.count("cannot be written") == 1
    assert "No space left on device" in caplog.text
    assert 0 < len(list((disk / "moments").glob("*.safetensors"))) < 18
    assert not list((disk / "moments").glob(".*"))
    for name in ("rho.csv", "degradation.csv"):
        assert (folder / name).read_bytes() == (trained[0] / name).read_bytes()
    (disk / "filling").unlink()
    again = run_job(*SMALL, f"cache.dir={disk}")
    assert (again / "rho.csv").read_bytes() == (trained[0] / "rho.csv").read_bytes()


@pytest.mark.parametrize("seconds", [0, 10])
def test_unfinished_state_on_a_full_disk_is_said_once(trained, configure, small_disk, tmp_path, seconds, caplog):
    """Whether after every batch, or at a stage's end."""
    folder = tmp_path / "run"
    small_disk(folder / "partial", free=0)
    run(configure(*SMALL, f"cache.dir={trained[1]}", "criterion=rectified", f"checkpoint.seconds={seconds}"), folder)
    assert caplog.text.count("cannot be written") == 1
    assert "accuracy-0-of-1.safetensors cannot be written" in caplog.text
    assert summary_of(folder)["accuracy"] == summary_of(trained[0])["accuracy"]
    assert (folder / "degradation.csv").read_bytes() == (trained[0] / "degradation.csv").read_bytes()


def test_checkpoints_on_a_full_disk_are_said_once_and_training_goes_on(
    configure, run_job, small_disk, own_cache, tmp_path, caplog
):
    job = ["data.limit=100", "model.training.epochs=3", "estimator=w", "degradation.images=4", own_cache]
    folder = tmp_path / "run"
    small_disk(folder / "partial", free=20)
    run(configure(*job), folder)
    assert caplog.text.count(".ckpt cannot be written (No space left on device): going on without it") == 1
    plain = run_job(*job[:-1], f"cache.dir={tmp_path / 'other'}")
    assert (folder / "rho.csv").read_bytes() == (plain / "rho.csv").read_bytes()


@pytest.mark.slow
def test_a_log_file_without_room_is_no_traceback(trained, command, small_disk, tmp_path):
    disk = small_disk(tmp_path / "disk", free=24)  # enough for Hydra's files
    (tmp_path / "cache" / "models").mkdir(parents=True)
    for file in (trained[1] / "models").glob("*.safetensors"):
        shutil.copy(file, tmp_path / "cache" / "models")
    done = command(
        *SMALL, "logger=none", f"cache.dir={tmp_path / 'cache'}", f"hydra.run.dir={disk}", "checkpoint.seconds=0"
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
