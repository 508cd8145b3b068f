"""Jobs of several processes: the same results, one folder, nothing left behind."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.paths import TESTS
from safetensors.torch import load_file

from pattern_bench.errors import UserError
from pattern_bench.processes.launch import launch

FEW = ["logger=none", "data.limit=300", "degradation.images=12", "data.batch_size=32"]
SMALL = [*FEW, "model.training.epochs=4"]


def read(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def in_processes(command_in, cache_dir, tmp_path_factory):
    """The folder of a job in as many processes. All 1,797 digits; 719 of a split in batches of 64 are no multiple of
    anything."""
    job = ["logger=none", "data.batch_size=64", "probe=both", "trainer=ddp_cpu", "probe.steps=300", "seed=0"]
    folder = tmp_path_factory.mktemp("processes")

    @functools.cache
    def start(count):
        # The trained network is common property, and nothing else.
        (folder / str(count) / "cache").mkdir(parents=True)
        if (cache_dir / "models").is_dir():
            (folder / str(count) / "cache" / "models").symlink_to(cache_dir / "models")
        own = [f"hydra.run.dir={folder / str(count)}", f"cache.dir={folder / str(count)}/cache"]
        done = command_in(folder, *job, f"trainer.devices={count}", *own)
        assert done.returncode == 0, done.stderr
        assert read(folder / str(count))["processes"] == count
        if count == 1:
            assert not (cache_dir / "models").is_dir() or (folder / "1" / "cache" / "models").is_symlink()
        return folder / str(count)

    return start


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_one_two_and_four_processes_agree(in_processes, count):
    """Statistics and curves to 1e-6, the ρ of the SGD probe to 0.01."""
    alone, together = in_processes(1), in_processes(count)
    one, other = (
        {name: pd.read_csv(folder / name) for name in ("rho.csv", "degradation.csv", "splits.csv")}
        for folder in (alone, together)
    )
    assert len(one["rho.csv"]) == 2 * 170
    patterns = load_file(alone / "patterns.safetensors")
    assert one["splits.csv"].equals(other["splits.csv"])
    for name, tensor in load_file(together / "patterns.safetensors").items():
        torch.testing.assert_close(tensor, patterns[name], rtol=1e-6, atol=0)
    exact = one["rho.csv"].probe == "closed_form"
    for table, tolerance in ((exact, 1e-6), (~exact, 0.01)):
        pd.testing.assert_frame_equal(one["rho.csv"][table], other["rho.csv"][table], rtol=tolerance, atol=0)
    pd.testing.assert_frame_equal(one["degradation.csv"], other["degradation.csv"], rtol=1e-6, atol=0)
    assert read(together)["accuracy"] == read(alone)["accuracy"]
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}


@pytest.mark.slow
def test_unreadable_images_are_counted_once_whichever_process_met_them(command, photographs, tmp_path):
    root = photographs(tmp_path / "images", count=30)
    for name in ("class0/0.jpg", "class0/3.jpg", "class1/7.jpg"):
        (root / name).write_bytes(b"no image")
    folder = tmp_path / "run"
    model = ["model=vgg16_features", "model.architecture=vgg11", "model.weights=null", "layer=features.0"]
    done = command(
        "data=folder", f"data.root={root}", "data.size=32", "data.workers=0", "data.batch_size=4", *model,
        "logger=none", "trainer=ddp_cpu", f"hydra.run.dir={folder}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read(folder)["unreadable"] == ["class0/0.jpg", "class0/3.jpg", "class1/7.jpg"]
    assert done.stderr.count("cannot be read and are left out") <= 3


@pytest.mark.slow
def test_a_sweep_of_jobs_with_two_processes_leaves_two_folders(command, tmp_path):
    done = command(
        "-m", "estimator=w,a_plus_minus", "trainer=ddp_cpu", "trainer.devices=2", "hydra.sweep.dir=sweep", *SMALL
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"]
    names = sorted(path.name for path in (tmp_path / "sweep").iterdir())
    assert names == ["0-small_vgg-w", "1-small_vgg-a_plus_minus", "multirun.yaml"]
    for name in names[:2]:
        assert read(tmp_path / "sweep" / name)["processes"] == 2
        assert not (tmp_path / "sweep" / name / "partial").exists()
    assert done.stderr.count("prepare data and model") == 2
    # Again: complete jobs are left alone.
    again = command(
        "-m", "estimator=w,a_plus_minus", "trainer=ddp_cpu", "trainer.devices=2", "hydra.sweep.dir=sweep", *SMALL
    )
    assert again.stderr.count("this run is complete") == 2


FAULTY = ["model=imported", "model.path=helpers.own_network.Faulty", "allow_any_target=true", "trainer=ddp_cpu", *FEW]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [None, 1])
def test_a_job_that_fails_in_one_process_is_told_once_and_the_sweep_goes_on_or_stops(command, tmp_path, batch):
    stops = [] if batch is None else [f"hydra.sweeper.max_batch_size={batch}"]
    done = command("-m", "+model.arguments.fails_in=1,-1", "hydra.sweep.dir=sweep", *FAULTY, *stops)
    assert done.returncode == 1
    assert done.stderr.count("is this very process") == 1
    assert "Traceback" not in done.stderr
    complete = sorted(path.parent.name for path in (tmp_path / "sweep").glob("*/summary.json"))
    assert len(complete) == (1 if batch is None else 0)


def loses_the_other(cfg, folder):
    """The first process makes a mistake, and the second is heard of first."""
    if os.environ["RANK"] == "1":
        raise RuntimeError("the other is gone")
    signal.signal(signal.SIGTERM, lambda *_: None)
    time.sleep(0.5)
    raise UserError("seed=x is not possible")


def test_a_mistake_is_told_before_what_it_brought_about(configure, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tempfile.tempdir = None
    with pytest.raises(UserError, match="seed=x is not possible"):
        launch(loses_the_other, configure("trainer=ddp_cpu"), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_a_bug_in_one_process_shows_its_traceback_once(command, tmp_path):
    done = command("+model.arguments.fails_in=1", "+model.arguments.how=bug", *FAULTY)
    assert done.returncode != 0
    assert done.stderr.count("ZeroDivisionError: a bug in one process") == 1
    assert "process 1 of 2 failed" in done.stderr


def processes_with(mark):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                if alive and mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("number", "whom"),
    [
        (signal.SIGINT, "all"),
        *(pytest.param(number, "first", marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGKILL)),
    ],
)
def test_no_process_outlives_the_command(tmp_path, cache_dir, number, whom):
    """Ctrl-C reaches every process of a terminal; what a scheduler sends may reach the first alone."""
    mark = uuid.uuid4().hex
    environment = {
        **os.environ,
        "PATTERN_BENCH_CACHE": str(cache_dir),
        "MARK": mark,
        "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    job = subprocess.Popen(
        [sys.executable, "-m", "pattern_bench", "+model.arguments.how=waits", *FAULTY],
        cwd=tmp_path, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while len(processes_with(mark)) < 3 and time.monotonic() < until:
            time.sleep(0.2)
        time.sleep(3)
        assert len(processes_with(mark)) >= 3
        (os.killpg if whom == "all" else os.kill)(job.pid, number)
        _, told = job.communicate(timeout=60)
        until = time.monotonic() + 20
        while processes_with(mark) and time.monotonic() < until:
            time.sleep(0.2)
        assert processes_with(mark) == []
        assert job.returncode != 0
        assert "Traceback" not in told
    finally:
        for pid in processes_with(mark):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_torchrun_starts_the_processes_too(tmp_path, cache_dir):
    environment = {**os.environ, "PATTERN_BENCH_CACHE": str(cache_dir), "OMP_NUM_THREADS": "1"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    job = [*torchrun, "-m", "pattern_bench", "trainer=ddp_cpu", *SMALL]
    done = subprocess.run(job, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results: ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (folder,) = (tmp_path / "runs").glob("*/*")
    assert read(folder)["processes"] == 2

    done = subprocess.run(
        [*job, "trainer.devices=3"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "makes 3 processes, but 2 were started" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.devices=0"], "trainer.devices=0 is not possible"),
        (["trainer.devices=many"], "trainer.devices=many is not possible"),
        (["trainer=ddp_cpu", "trainer.num_nodes=2"], "trainer.num_nodes=2 needs processes on every node"),
        (["trainer.accelerator=tpu"], "is not possible here"),
    ],
)
def test_mistakes_in_the_trainers_settings_get_one_message(command, overrides, message):
    done = command(*overrides, "logger=none")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
