"""Runs that are interrupted and taken up again: the results are those of a run that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from helpers.results import same
from safetensors.torch import load_file

from pattern_bench.errors import UserError
from pattern_bench.pipeline.job import run
from pattern_bench.storage.stage_state import StageState

SMALL = [
    "data.limit=300",
    "model.training.epochs=4",
    "degradation.images=12",
    "data.batch_size=16",
    "explanation.images=3",
]


class Killed(BaseException):
    """Ends a run in the middle, as nothing that the package catches does."""


@pytest.fixture
def interrupted(configure, tmp_path, monkeypatch):
    """Runs a job that ends right after it has kept its state for the n-th time; returns its folder and whether it was
    cut short."""

    def start(folder, after, *overrides):
        save, kept = StageState.save, [0]

        def save_and_end(self, *arguments):
            save(self, *arguments)
            kept[0] += 1
            if kept[0] == after:
                raise Killed

        folder.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(StageState, "save", save_and_end)
            try:
                run(configure("checkpoint.seconds=0", *overrides), folder)
            except Killed:
                return True
        return False

    return start


@pytest.mark.slow
def test_every_kept_state_of_every_stage_leads_to_the_same_results(interrupted, run_job, tmp_path):
    """One run, cut short after each state that it keeps and taken up again, until it is through."""
    job = [*SMALL, "probe=both", "probe.steps=30"]
    undisturbed = run_job(*job, f"cache.dir={tmp_path / 'one'}")
    folder, cuts = tmp_path / "cut", 0
    while interrupted(folder, 1, *job, f"cache.dir={tmp_path / 'two'}"):
        cuts += 1
        assert not (folder / "summary.json").exists()
        assert cuts < 100
    # 120, 120 and 60 images in batches of 16, twice of the last; 3 and 12 images one by one or in one batch, those
    # in a random order, too; readers.
    assert cuts == 4 + 8 + 8 + 4 + 1 + 4 + 3 + 1 + 1
    assert same(undisturbed, folder) == []
    assert not (folder / "partial").exists()
    assert json.loads((folder / "summary.json").read_text())["rho"]["all"]["neurons"] == 170


@pytest.mark.slow
def test_a_slow_method_is_resumed_image_by_image(interrupted, run_job, tmp_path):
    job = [*SMALL, "method=occlusion", "degradation.images=4", "layer=features.0"]
    undisturbed = run_job(*job)
    folder, cuts = tmp_path / "cut", 0
    while interrupted(folder, 1, *job):
        cuts += 1
    assert cuts >= 3 + 4
    assert same(undisturbed, folder) == []


@pytest.mark.slow
def test_training_goes_on_from_its_last_epoch(configure, run_job, tmp_path, monkeypatch):
    """Dropout and the order of images are those of the epoch, whoever begins it."""
    job = ["data.limit=300", "model.training.epochs=5", "degradation.images=4", "seed=11"]
    undisturbed = run_job(*job, f"cache.dir={tmp_path / 'one'}")
    folder = tmp_path / "cut"
    folder.mkdir()
    begin, epochs = "pattern_bench.engine.training.Learner.on_train_epoch_start", []
    for most in (2, 4, 9):
        with monkeypatch.context() as patch:

            def start(self, most=most):
                epochs.append(self.current_epoch)
                if self.current_epoch == most:
                    raise Killed

            patch.setattr(begin, start)
            if most == 9:
                run(configure(*job, f"cache.dir={tmp_path / 'two'}"), folder)
            else:
                with pytest.raises(Killed):
                    run(configure(*job, f"cache.dir={tmp_path / 'two'}"), folder)
    assert epochs == [0, 1, 2, 2, 3, 4, 4]
    (one,), (two,) = ((tmp_path / name / "models").glob("*.safetensors") for name in ("one", "two"))
    assert one.name == two.name
    assert all(torch.equal(tensor, load_file(two)[name]) for name, tensor in load_file(one).items())
    assert same(undisturbed, folder) == []


def test_descent_goes_on_from_its_last_round(configure, run_job, tmp_path, monkeypatch):
    job = [*SMALL, "probe=sgd", "probe.steps=60", "layer=features.*"]
    undisturbed = run_job(*job)
    folder = tmp_path / "cut"
    folder.mkdir()
    step = "pattern_bench.engine.probe_descent.ReaderDescent.training_step"
    from pattern_bench.engine.probe_descent import ReaderDescent

    train, met = ReaderDescent.training_step, []

    def limited(self, batch, index):
        met.append(self.global_step)
        if len(met) == 30:
            raise Killed
        return train(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(step, limited)
        with pytest.raises(Killed):
            run(configure(*job), folder)
        run(configure(*job), folder)
    assert met[29] == 29
    assert met[30] == 24  # three rounds of 8 batches were kept
    assert same(undisturbed, folder) == []
    summaries = [json.loads((path / "summary.json").read_text())["descent"] for path in (undisturbed, folder)]
    assert summaries[0] == summaries[1]


def test_a_complete_run_is_left_alone_and_another_configuration_is_not(configure, run_job):
    folder = run_job(*SMALL)
    first = (folder / "summary.json").read_bytes()
    (folder / "rho.csv").unlink()
    run(configure(*SMALL), folder)
    assert not (folder / "rho.csv").exists()
    assert (folder / "summary.json").read_bytes() == first
    run(configure(*SMALL, "estimator=w"), folder)
    assert set(pd.read_csv(folder / "rho.csv").estimator) == {"w"}


def test_a_state_of_other_settings_is_not_taken_up(interrupted, run_job, tmp_path):
    folder = tmp_path / "cut"
    elsewhere = f"cache.dir={tmp_path / 'cache'}"
    assert interrupted(folder, 6, *SMALL, elsewhere)
    assert list((folder / "partial").glob("fit-0-0-of-1.safetensors"))
    other = [*SMALL, "seed=5", elsewhere]
    assert not interrupted(folder, -1, *other)
    assert same(run_job(*other[:-1], f"cache.dir={tmp_path / 'other'}"), folder) == []


def test_a_damaged_state_is_said_and_begun_again(interrupted, run_job, tmp_path, caplog):
    folder = tmp_path / "cut"
    elsewhere = f"cache.dir={tmp_path / 'cache'}"
    assert interrupted(folder, 6, *SMALL, elsewhere)
    (state,) = (folder / "partial").glob("fit-*.safetensors")
    state.write_bytes(state.read_bytes()[:-100])
    assert not interrupted(folder, -1, *SMALL, elsewhere)
    assert "is damaged" in caplog.text
    assert same(run_job(*SMALL, f"cache.dir={tmp_path / 'other'}"), folder) == []


def kill_and_resume(command_line, environment, folder, kills, draw, longest):
    """Kills the command so many times at random moments of at most ``longest`` seconds, then lets it run."""
    killed = 0
    while killed < kills:
        job = subprocess.Popen(
            command_line, env=environment, cwd=folder.parent, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            job.wait(draw.uniform(0.5, longest))
            break  # it was through before
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
            killed += 1
    done = subprocess.run(command_line, env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return killed


@pytest.mark.parametrize(
    ("runs", "job"),
    [
        pytest.param(1, ["data.limit=600", "model.training.epochs=8"], id="one", marks=pytest.mark.slow),
        pytest.param(20, [], id="twenty", marks=pytest.mark.very_slow),
    ],
)
def test_runs_killed_at_random_moments_equal_an_undisturbed_one(tmp_path, runs, job):
    """SIGKILL, thrice each; with a cache of their own, so that they train and collect too."""
    draw = random.Random(0)
    python = [sys.executable, "-m", "pattern_bench", "logger=none", "checkpoint.seconds=0", "data.batch_size=64", *job]

    def environment(name):
        return {**os.environ, "PATTERN_BENCH_CACHE": str(tmp_path / name)}

    start = time.monotonic()
    undisturbed = tmp_path / "undisturbed"
    subprocess.run(
        [*python, f"hydra.run.dir={undisturbed}"], env=environment("c"), cwd=tmp_path, check=True, capture_output=True
    )
    longest = time.monotonic() - start
    for number in range(runs):
        kills, attempt = 0, 0
        while not kills:  # a run may be through before the signal comes: then another takes its place
            attempt += 1
            name = f"run{number}-{attempt}"
            folder = tmp_path / name
            kills = kill_and_resume([*python, f"hydra.run.dir={folder}"], environment(name), folder, 3, draw, longest)
            longest = longest if kills else 0.8 * longest
        assert same(undisturbed, folder) == []
        assert not [path for path in folder.iterdir() if path.name.startswith(".") and path.name != ".hydra"]


@pytest.mark.slow
def test_resume_takes_up_the_settings_of_the_folder(command, tmp_path, cache_dir):
    folder = tmp_path / "a run, with = signs"
    python = [
        sys.executable,
        "-m",
        "pattern_bench",
        "logger=none",
        "checkpoint.seconds=0",
        *SMALL,
        "estimator=w",
        "seed=23",
    ]
    environment = {**os.environ, "PATTERN_BENCH_CACHE": str(cache_dir)}
    job = subprocess.Popen(
        [*python, f"hydra.run.dir='{folder}'"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    while not (folder / "splits.csv").exists() and job.poll() is None:
        time.sleep(0.05)
    job.kill()
    job.wait()
    assert not (folder / "summary.json").exists()
    done = command(f"resume={folder}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["estimator"], summary["seed"]) == ("w", 23)
    again = command(f"resume={folder}")
    assert again.returncode == 0
    assert "this run is complete" in again.stderr
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}
    other = command(f"resume={folder}", "estimator=a", "quiet=true")
    assert other.returncode == 1
    (line,) = other.stderr.splitlines()[-1:]
    assert line.startswith(f"error: hydra.run.dir={folder} holds a complete run of other settings (estimator._target_=")
    assert "start this one in a folder of its own, python -m pattern_bench logger=none" in line
    assert "seed=23 estimator=a" in line
    assert all(path.read_bytes() == content for path, content in whole.items())
    (folder / "summary.json").unlink()
    anew = command(f"resume={folder}", "estimator=a")
    assert anew.returncode == 0, anew.stderr
    assert json.loads((folder / "summary.json").read_text())["estimator"] == "a"
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


def test_a_folder_that_is_no_run_cannot_be_resumed(command, tmp_path):
    done = command(f"resume={tmp_path / 'none'}")
    assert done.returncode == 1
    assert "is not the folder of a run" in done.stderr
    assert "Traceback" not in done.stderr


def test_checkpoint_seconds_must_be_a_number(run_job):
    with pytest.raises(UserError, match=r"checkpoint.seconds=-1 is not possible"):
        run_job("checkpoint.seconds=-1")
