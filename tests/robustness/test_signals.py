"""SIGTERM, SIGINT and SIGUSR1: obeyed in every stage; results of a run taken up are as if there had been none."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.paths import AT_STAGE
from helpers.results import same

JOB = [
    "logger=none", "data.limit=100", "model.training.epochs=2", "degradation.images=4",
    "data.batch_size=16", "explanation.images=1", "quiet=true", "probe=both", "probe.steps=20", "bootstrap.resamples=3",
    "bootstrap.chunks=4",
]  # fmt: skip
STAGES = [
    "prepare", "accuracy", "fit_patterns", "fit_probe", "validation_moments", "rho", "fit_readers", "read", "bootstrap",
    "explain", "degrade",
]  # fmt: skip
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def start(folder, *overrides, module="pattern_bench", cache, at=None, launcher=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATTERN_BENCH_CACHE": str(cache), "TMPDIR": str(folder)}
    if at is not None:
        path = os.pathsep.join([str(AT_STAGE), os.environ.get("PYTHONPATH", "")])
        environment |= {"AT_STAGE": at, "MARK": str(folder / "mark"), "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, module, *overrides],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(job):
    _, err = job.communicate(timeout=240)
    return job.returncode, err


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Runs the job in so many processes; returns its folder, with its cache beside it."""
    found = {}

    def run(*several):
        if several not in found:
            folder = tmp_path_factory.mktemp("undisturbed")
            code, err = finish(start(folder, *JOB, *several, "hydra.run.dir=run", cache=folder / "cache"))
            assert code == 0, err
            found[several] = folder / "run"
        return found[several]

    return run


def obeys(tmp_path, number, stage, *overrides):
    """Sends the signal in the stage of a job in ``tmp_path / "run"``."""
    (tmp_path / "mark").unlink(missing_ok=True)
    job = start(tmp_path, *overrides, cache=tmp_path / "cache", at=f"{stage}:signal {int(number)}")
    code, err = finish(job)
    assert code == 128 + number, err
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 15  # five, and what a busy machine adds
    line = f"stopped by {number.name}: go on with python -m pattern_bench resume={tmp_path / 'run'}"
    assert line in err.splitlines()
    assert err.count("stopped by") == 1
    assert "Traceback" not in err
    assert not [*tmp_path.glob("pattern_bench-*")]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / ".lock").exists()


def goes_on(tmp_path, undisturbed, *several):
    code, err = finish(start(tmp_path, "resume=run", cache=tmp_path / "cache"))
    assert code == 0, err
    assert same(undisturbed(*several), tmp_path / "run") == []


def ends_and_goes_on(tmp_path, undisturbed, number, stage, *several):
    obeys(tmp_path, number, stage, *JOB, *several, "hydra.run.dir=run")
    goes_on(tmp_path, undisturbed, *several)


EVERY = [(stage, number) for number in SIGNALS for stage in STAGES]


@pytest.mark.slow
def test_a_job_that_is_stopped_in_one_stage_after_another_finds_what_an_undisturbed_one_does(tmp_path, undisturbed):
    """In those that no other quick test of this file stops."""
    left = [stage for stage in STAGES if stage not in ("accuracy", "fit_probe", "rho")]
    for number, stage in enumerate(left):
        begun = ["resume=run"] if number else [*JOB, "hydra.run.dir=run"]
        obeys(tmp_path, SIGNALS[number % len(SIGNALS)], stage, *begun)
    goes_on(tmp_path, undisturbed)


@pytest.mark.very_slow
@pytest.mark.parametrize(("stage", "number"), EVERY)
def test_every_signal_is_obeyed_in_every_stage(tmp_path, undisturbed, stage, number):
    ends_and_goes_on(tmp_path, undisturbed, number, stage)


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        pytest.param(*pair, marks=pytest.mark.slow if pair == ("rho", signal.SIGUSR1) else pytest.mark.very_slow)
        for pair in EVERY
    ],
)
def test_every_signal_is_obeyed_in_every_stage_by_several_processes(tmp_path, undisturbed, stage, number):
    ends_and_goes_on(tmp_path, undisturbed, number, stage, "trainer=ddp_cpu")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_processes_that_torchrun_started_stop_with_one_line(tmp_path, number):
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    job = start(
        tmp_path, *JOB, "trainer=ddp_cpu", "hydra.run.dir=run", cache=tmp_path / "cache",
        at=f"fit_probe:signal {int(number)}", launcher=[*torchrun, "-m"],
    )  # fmt: skip
    code, err = finish(job)
    assert code != 0
    assert err.count("stopped by") == 1
    assert f"stopped by {number.name}: go on with python -m pattern_bench resume={tmp_path / 'run'}" in err, err


@pytest.mark.slow
@pytest.mark.parametrize(("module", "stage"), [("gallery", "explain"), ("sanity", "randomisation")])
def test_galleries_and_sanity_checks_obey_too(tmp_path, cache_dir, module, stage):
    command = f"pattern_bench.{module}"
    few = ["logger=none", "data.limit=100", "model.training.epochs=2", "quiet=true", "hydra.run.dir=run"]
    few += ["show=[gradient]"]
    code, err = finish(start(tmp_path, *few, module=command, cache=cache_dir, at=f"{stage}:signal 15"))
    assert (code, err.strip().splitlines()[-1]) == (
        143,
        f"stopped by SIGTERM: go on with python -m {command} resume={tmp_path / 'run'}",
    )
    code, err = finish(start(tmp_path, "resume=run", module=command, cache=cache_dir))
    assert code == 0, err
    assert json.loads((tmp_path / "run" / f"{module}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_ends_and_does_not_go_on_with_its_next_job(tmp_path, cache_dir, launcher):
    sweep = [*JOB, "estimator=w,a", "hydra.sweep.dir=sweep", f"hydra/launcher={launcher}", "-m"]
    job = start(tmp_path, *sweep, cache=cache_dir, at="accuracy:wait")
    while not (tmp_path / "mark").exists() and job.poll() is None:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    code, err = finish(job)
    assert code == 143, err
    assert err.count("stopped by SIGTERM: go on with python -m pattern_bench") == 1
    assert f"hydra/launcher={launcher} hydra.sweep.dir=sweep -m\n" in err
    assert "Traceback" not in err
    assert not [*tmp_path.glob("sweep/*/summary.json")]
    if launcher == "basic":
        assert not [*tmp_path.glob("sweep/1-*")]


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_nothing_holds_up_the_end(tmp_path):
    """One that comes while a long operation of C has the main thread, and an end that does not end."""
    program = """
import sys, time, torch
from pattern_bench.processes import signals
sys.stdout.write("here\\n"); sys.stdout.flush()
with signals.obeyed(lambda number: print("told", number, file=sys.stderr, flush=True)):
    try:
        print("ready", flush=True)
        torch.linalg.eigh(torch.rand(12000, 12000)) if sys.argv[1] == "c" else time.sleep(60)
    finally:
        time.sleep(60)
"""
    for how, signals, least, most in (("c", 1, 3.5, 9), ("python", 1, 3.5, 9), ("python", 2, 0, 3.5)):
        job = subprocess.Popen(
            [sys.executable, "-c", program, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert (job.stdout.readline(), job.stdout.readline()) == ("here\n", "ready\n")
        time.sleep(1)
        since = time.monotonic()
        for _ in range(signals):
            job.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        _, err = job.communicate(timeout=60)
        assert (job.returncode, err) == (143, "told 15\n")
        assert least <= time.monotonic() - since <= most
