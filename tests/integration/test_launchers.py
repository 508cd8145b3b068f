"""Sweeps across jobs: each launcher leaves what the jobs one after the other leave, and a failed job is one message.

Those marked slurm run on a real Slurm of one node, which ``tests/helpers/slurm/cluster.sh`` sets up and tears
down; those marked ray on a real Ray on this machine.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
from helpers.paths import SLURM
from omegaconf import OmegaConf
from pandas.testing import assert_frame_equal

from pattern_bench.configuration.location import CONF

ESTIMATORS = ["w", "a", "a_plus_minus"]
QUICK = ["logger=none", "data.limit=300", "model.training.epochs=4", "degradation.images=8"]
# after patterns.safetensors is there, goes on for some ten seconds
CLOSED_FORM = ["estimator=a", "bootstrap.resamples=30"]
DESCENT = ["estimator=a", "probe=sgd", "probe.steps=300"]
ON_SLURM = ["hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2"]


@pytest.fixture(scope="module")
def cluster():
    """A Slurm of this machine's own; the environment leads to it."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a Slurm cluster of one's own needs Linux and root")
    folder = Path(tempfile.gettempdir()) / f"pattern_bench_slurm_{os.getpid()}"
    up = subprocess.run([SLURM / "cluster.sh", "up", folder], capture_output=True, text=True)
    if up.returncode:
        pytest.fail(up.stderr)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
    subprocess.run([SLURM / "cluster.sh", "down", folder], check=True)


@pytest.fixture(
    params=[
        pytest.param("joblib", marks=pytest.mark.slow),
        pytest.param("submitit_local", marks=pytest.mark.slow),
        pytest.param("submitit_slurm", marks=pytest.mark.slurm),
        pytest.param("ray", marks=pytest.mark.ray),
    ]
)
def launcher(request):
    """The overrides that choose a launcher whose package is installed, and whose cluster is up."""
    pytest.importorskip(f"hydra_plugins.hydra_{request.param.split('_')[0]}_launcher")
    if request.param == "submitit_slurm":
        request.getfixturevalue("cluster")
        return ON_SLURM
    return [f"hydra/launcher={request.param}"]


@pytest.fixture(scope="module")
def one_after_the_other(configure, tmp_path_factory):
    """The folders of the jobs by their estimator, run in this process."""
    from pattern_bench.pipeline.job import run

    root = tmp_path_factory.mktemp("expected")
    for estimator in ESTIMATORS:
        (root / estimator).mkdir()
        run(configure(f"estimator={estimator}", *QUICK), root / estimator)
    return {estimator: root / estimator for estimator in ESTIMATORS}


def compare(folder, expected, *names):
    for name in names:
        assert_frame_equal(pd.read_csv(folder / name), pd.read_csv(expected / name), obj=name)


def test_a_sweep_leaves_what_the_jobs_one_after_the_other_leave(command, launcher, one_after_the_other, tmp_path):
    done = command("-m", f"estimator={','.join(ESTIMATORS)}", *QUICK, *launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning:" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (sweep,) = (tmp_path / "runs").glob("*/*")
    jobs = {f"{number}-small_vgg-{name}": name for number, name in enumerate(ESTIMATORS)}
    assert {path.name for path in sweep.iterdir()} - {".submitit"} == {*jobs, "multirun.yaml"}
    for job, estimator in jobs.items():
        expected = one_after_the_other[estimator]
        assert {path.name for path in (sweep / job).iterdir()} == {
            *(path.name for path in expected.iterdir()), ".hydra", "pattern_bench.log",
        }  # fmt: skip
        compare(sweep / job, expected, "rho.csv", "degradation.csv")


def test_a_job_that_fails_is_one_message_and_the_others_are_complete(command, launcher, tmp_path):
    done = command("-m", "estimator=w", "allow_any_target=false,perhaps", *QUICK, *launcher)
    assert done.returncode == 1
    assert done.stderr.count("error: allow_any_target=perhaps is not possible") == 1
    assert "Traceback" not in done.stderr + done.stdout
    (sweep,) = (tmp_path / "runs").glob("*/*")
    assert (sweep / "0-small_vgg-w" / "summary.json").is_file()
    assert not (sweep / "1-small_vgg-w" / "summary.json").exists()


def test_the_jobs_of_joblib_have_no_more_threads_than_there_are_cores(monkeypatch):
    joblib = pytest.importorskip("joblib")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    jobs = OmegaConf.load(CONF / "hydra" / "launcher" / "joblib.yaml").n_jobs
    threads = joblib.Parallel(jobs)(joblib.delayed(os.getenv)("OMP_NUM_THREADS") for _ in range(8))
    joblib.externals.loky.get_reusable_executor().shutdown()
    assert joblib.effective_n_jobs(jobs) * max(map(int, threads)) <= joblib.cpu_count()


@pytest.mark.parametrize("extra", ["joblib", "submitit", "ray"])
def test_a_launcher_that_is_not_installed_names_its_extra(command, extra):
    name = {"submitit": "submitit_local"}.get(extra, extra)
    missing = f"hydra.launcher._target_=hydra_plugins.hydra_{extra}_launcher.nowhere.Launcher"
    done = command("-m", "estimator=w,a", f"hydra/launcher={name}", missing)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert f"pip install 'pattern_bench[{extra}]'" in done.stderr


@pytest.mark.slurm
def test_what_slurm_refuses_is_one_message(command, cluster):
    done = command("-m", "estimator=w,a", *ON_SLURM, "hydra.launcher.partition=nowhere")
    assert done.returncode == 1
    assert "error: hydra/launcher: sbatch: error: invalid partition specified: nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
    return found


def queue():
    """The only job in the queue: its number and state, or nothing."""
    return subprocess.check_output(["squeue", "--noheader", "--format=%i %T"], text=True).split()


def send_usr1(job):
    subprocess.run(["scancel", "--signal=USR1", job], check=True)


def send_usr1_to_the_script(job):
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)


def preempt(job):
    """By a job in a partition of higher priority, for which Slurm sends SIGTERM and, five seconds later, SIGKILL."""
    subprocess.run(["srun", "--quiet", "--partition=urgent", "--exclusive", "true"], check=True)
    assert queue()[0] == job


@pytest.fixture(scope="module")
def undisturbed(cache_dir, tmp_path_factory):
    """Runs a job in a process with one thread, as it has on the cluster; returns its folder."""

    @functools.cache
    def run(*overrides):
        folder = tmp_path_factory.mktemp("undisturbed")
        environment = {**os.environ, "PATTERN_BENCH_CACHE": str(cache_dir), "OMP_NUM_THREADS": "1"}
        job = ["logger=none", f"hydra.run.dir={folder}", *overrides]
        subprocess.run([sys.executable, "-m", "pattern_bench", *job], env=environment, check=True)
        return folder

    return run


@pytest.mark.slurm
@pytest.mark.parametrize("interrupt", [send_usr1, preempt])
def test_an_interrupted_job_goes_back_to_the_queue_and_ends_as_an_undisturbed_one(
    cluster, cache_dir, undisturbed, tmp_path, interrupt
):
    """With the default logger, whose own process gets the signals too."""
    expected = undisturbed(*DESCENT)
    sweep = subprocess.Popen(
        [sys.executable, "-m", "pattern_bench", "-m", *DESCENT, *ON_SLURM],
        cwd=tmp_path, env={**os.environ, "PATTERN_BENCH_CACHE": str(cache_dir)}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    state = wait_for(lambda: [*tmp_path.glob("runs/*/*/0-small_vgg-a/partial/readers-*.ckpt")])[0]
    folder = state.parent.parent
    interrupt(queue()[0])
    assert state.exists()
    assert not (folder / "summary.json").exists()
    assert sweep.wait(timeout=240) == 0
    assert (folder / "summary.json").is_file()
    assert [*tmp_path.glob("runs/*/*/*-small_vgg-*")] == [folder]
    (log,) = folder.parent.glob(".submitit/*/*_log.out")
    assert len(re.findall(r"INFO .* Starting with", log.read_text())) == 2
    compare(folder, expected, "rho.csv", "degradation.csv")


@pytest.mark.slurm
@pytest.mark.parametrize("interrupt", [None, send_usr1_to_the_script, preempt])
def test_a_batch_script_of_two_processes(cluster, cache_dir, undisturbed, tmp_path, interrupt):
    expected = undisturbed(*CLOSED_FORM)
    python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    job = subprocess.check_output(
        ["sbatch", "--parsable", SLURM / "ddp.sbatch", *CLOSED_FORM],
        cwd=tmp_path, env={**os.environ, "PATTERN_BENCH_CACHE": str(cache_dir), "PATH": python}, text=True,
    ).strip()  # fmt: skip
    folder = tmp_path / "runs" / f"slurm-{job}"
    if interrupt:
        wait_for((folder / "patterns.safetensors").is_file)
        interrupt(job)
        assert not (folder / "summary.json").exists()
    wait_for(lambda: not queue())
    said = (tmp_path / f"slurm-{job}.out").read_text()
    assert (folder / "summary.json").is_file(), said
    assert json.loads((folder / "summary.json").read_text())["processes"] == 2
    assert said.count("prepare data and model") == 1 + bool(interrupt), said
    assert said.count("results: ") == 1
    assert [*(tmp_path / "runs").iterdir()] == [folder]
    compare(folder, expected, "rho.csv", "degradation.csv", "bootstrap.csv")
