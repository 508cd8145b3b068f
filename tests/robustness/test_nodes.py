"""Jobs on two hosts, two processes each, by torchrun as the README says."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from helpers.namespaces import Hosts
from helpers.paths import AT_STAGE
from pandas.testing import assert_frame_equal

pytestmark = pytest.mark.nodes

JOB = [
    "logger=none", "data.limit=100", "model.training.epochs=1", "layer=features.0", "degradation.images=4",
    "data.batch_size=16", "explanation.images=1", "quiet=true",
]  # fmt: skip
LOST_AFTER = 8


@pytest.fixture(scope="module")
def hosts():
    with Hosts() as made:
        yield made


@pytest.fixture
def start(hosts, tmp_path, cache_dir):
    """Starts a job on both hosts; all that is left at the end of a test is killed."""
    started = []

    def begin(*overrides, **variables):
        for number in (0, 1):
            temporary = tmp_path / f"tmp{number}"
            temporary.mkdir(exist_ok=True)
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATTERN_BENCH_CACHE": str(cache_dir)}
            environment |= {"TMPDIR": str(temporary), **variables}
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
            endpoint = ["--rdzv-backend=c10d", "--rdzv-endpoint=hosta:29500"]
            several = [
                "trainer=ddp_cpu",
                "trainer.devices=2",
                "trainer.num_nodes=2",
                f"hydra.run.dir={tmp_path / 'run'}",
            ]
            started.append(
                hosts.start(
                    number,
                    [*torchrun, *endpoint, "-m", "pattern_bench", *JOB, *several, *overrides],
                    env=environment,
                    cwd=tmp_path,
                    text=True,
                    stderr=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,
                )
            )
        return started[-2:]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ended(process, seconds=240):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def same(one, other, *more):
    for name in ("rho.csv", "degradation.csv", *more):
        assert_frame_equal(pd.read_csv(one / name), pd.read_csv(other / name), rtol=1e-6, atol=0, obj=name)


@pytest.fixture(scope="module")
def alone(cache_dir, tmp_path_factory):
    """The folder of the job in one process."""
    folder = tmp_path_factory.mktemp("alone")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATTERN_BENCH_CACHE": str(cache_dir)}
    job = [sys.executable, "-m", "pattern_bench", *JOB, "trainer=ddp_cpu", "trainer.devices=1"]
    subprocess.run([*job, f"hydra.run.dir={folder}"], env=environment, check=True, capture_output=True)
    return folder


def test_two_hosts_find_what_one_process_finds(hosts, start, alone, tmp_path):
    for code, out, err in map(ended, start()):
        assert code == 0, err
        assert "error" not in out + err
    same(alone, tmp_path / "run")
    assert hosts.processes() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tmp0", "tmp1"]


def test_a_mistake_is_told_once(start):
    told = [ended(process) for process in start("data.fit=0")]
    assert all(code != 0 for code, *_ in told)
    assert "".join(err for *_, err in told).count("data.fit=0 is not possible") == 1


@pytest.mark.parametrize(("lost", "which"), [("killed", 1), ("killed", 0), ("vanished", 1)])
def test_a_host_that_is_lost_ends_the_job_on_the_other(hosts, start, alone, cache_dir, tmp_path, lost, which):
    """While the first process computes alone, and all others wait for it in an exchange for longer than silence may
    last; taken up again, in one process, the run is as an undisturbed one."""
    mark = tmp_path / "mark"
    path = os.pathsep.join([str(AT_STAGE), os.environ.get("PYTHONPATH", "")])
    job = start(f"trainer.lost_after={LOST_AFTER}", AT_STAGE="rho:wait", MARK=str(mark), PYTHONPATH=path)
    until = time.monotonic() + 120
    while not mark.exists():
        assert time.monotonic() < until
        assert [process.poll() for process in job] == [None, None], [ended(process) for process in job]
        time.sleep(0.2)
    time.sleep(1.5 * LOST_AFTER)
    assert [process.poll() for process in job] == [None, None]  # busy is not lost
    since = time.monotonic()
    with contextlib.ExitStack() as cable:
        if lost == "killed":
            os.killpg(job[which].pid, signal.SIGKILL)
        else:
            hosts.pull_the_cable()
            cable.callback(hosts.put_the_cable_back)
        code, _, err = ended(job[1 - which], 120)
        assert code != 0
        assert time.monotonic() - since < LOST_AFTER + 40
        numbers, host = (("2, 3", "hostb"), ("0", "hosta"))[which == 0]
        assert err.count("error: lost ") == 1
        assert f"error: lost process {numbers} on {host}, of 4 processes: " in err
        if lost == "vanished":
            assert f"not answered for {LOST_AFTER} s (trainer.lost_after)" in err
    if lost == "vanished":  # there torchrun itself goes on to wait for the other host
        *_, other = ended(job[which], 120)
        assert other.count("error: lost process 0 on hosta") == 1
    assert not [*(tmp_path / "tmp0").glob("pattern_bench-*"), *(tmp_path / "tmp1").glob("pattern_bench-*")]
    assert hosts.processes() == []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATTERN_BENCH_CACHE": str(cache_dir)}
    job = [sys.executable, "-m", "pattern_bench", f"resume={tmp_path / 'run'}", "trainer.devices=1"]
    subprocess.run([*job, "trainer.num_nodes=1"], env=environment, check=True, capture_output=True)
    same(alone, tmp_path / "run")
