"""A run folder belongs to one job: a second is refused while the first lives, wherever that is."""

import json
import os
import signal
import subprocess
import threading
import time

import pytest

from pattern_bench.errors import UserError
from pattern_bench.storage import folder_lock, kernel_lock
from pattern_bench.storage.folder_lock import FILE, claimed

HOLDER = """
import os, sys
from pathlib import Path
from pattern_bench.storage.folder_lock import claimed
with claimed(Path(sys.argv[1]), "hydra.run.dir"):
    if sys.argv[2:]:  # a child that outlives its parent, as a loader's worker may
        if os.fork() == 0:
            print(os.getpid(), flush=True)
            __import__("time").sleep(60)
    print("has it", flush=True)
    sys.stdin.read(1)
"""


@pytest.fixture
def job(tmp_path, script):
    """Starts a process that has the folder, until it is sent a line."""
    orphans = []

    def start(*arguments):
        one = script(HOLDER, tmp_path / "run", *arguments)
        lines = {one.stdout.readline() for _ in range(1 + len(arguments))}
        assert "has it\n" in lines
        one.orphan = next((int(line) for line in lines if line.strip().isdigit()), None)
        orphans.extend([one.orphan] if one.orphan else [])
        return one

    yield start
    for orphan in orphans:
        os.kill(orphan, signal.SIGKILL)


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT", 0.1)
    monkeypatch.setattr(folder_lock, "LOST", 1.0)


def elsewhere(folder, **more):
    """As a job on another machine leaves it."""
    folder.mkdir(exist_ok=True)
    about = {"pid": 123, "host": "node7", "boot": "another", "started": "5", "processes": "pid:[1]", "sign": "0"}
    (folder / FILE).write_text(json.dumps(about | more))


def test_a_folder_is_of_one_job_until_it_ends(job, tmp_path):
    first = job()
    with (
        pytest.raises(UserError, match=rf"hydra.run.dir=.*run belongs to .*process {first.pid} on .*: wait"),
        claimed(tmp_path / "run", "hydra.run.dir"),
    ):
        pass
    assert [file.name for file in (tmp_path / "run").iterdir()] == [FILE]
    first.communicate("\n", timeout=60)
    assert list((tmp_path / "run").iterdir()) == []
    with claimed(tmp_path / "run", "hydra.run.dir"), claimed(tmp_path / "run", "hydra.run.dir"):
        assert (tmp_path / "run" / FILE).exists()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("more", [(), ("forks",)])
def test_what_a_killed_job_left_is_taken_over_at_once_and_said_once(job, tmp_path, caplog, more):
    first = job(*more)
    first.kill()
    first.wait()
    for _ in range(2):
        with claimed(tmp_path / "run", "hydra.run.dir"):
            pass
    assert caplog.text.count("taken over from a job that is gone") == 1
    assert f"process {first.pid} on" in caplog.text


def test_a_job_that_stands_still_is_not_gone(job, tmp_path):
    first = job()
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="belongs to a job"), claimed(tmp_path / "run", "hydra.run.dir"):
        pass
    first.send_signal(signal.SIGCONT)


def test_a_job_on_another_machine_is_heard(tmp_path, soon):
    """Whose lock the file system does not show here."""
    folder, over = tmp_path / "run", threading.Event()
    elsewhere(folder)

    def live():
        number = 0
        while not over.wait(0.1):
            number += 1
            elsewhere(folder, sign=str(number))

    other = threading.Thread(target=live)
    other.start()
    with pytest.raises(UserError, match="process 123 on node7"), claimed(folder, "hydra.run.dir"):
        pass
    over.set()
    other.join()
    assert "node7" in (folder / FILE).read_text()


def test_a_machine_that_is_gone_holds_nobody_up(tmp_path, soon, caplog):
    elsewhere(tmp_path / "run")
    with claimed(tmp_path / "run", "hydra.run.dir"):
        assert json.loads((tmp_path / "run" / FILE).read_text())["pid"] == os.getpid()
    assert "taken over from a job that is gone (process 123 on node7)" in caplog.text


def test_a_machine_that_is_gone_whose_lock_a_server_keeps(tmp_path, soon, job):
    first = job()
    first.send_signal(signal.SIGSTOP)
    elsewhere(tmp_path / "run")
    with claimed(tmp_path / "run", "hydra.run.dir"):
        assert json.loads((tmp_path / "run" / FILE).read_text())["pid"] == os.getpid()


def test_a_machine_that_was_started_again_has_none_of_its_jobs(tmp_path, soon):
    """The same number of a process, on a machine of the same name."""
    elsewhere(tmp_path / "run", pid=os.getpid(), host=folder_lock._here()["host"])
    with claimed(tmp_path / "run", "hydra.run.dir"):
        pass


def test_a_job_whose_folder_was_taken_ends(tmp_path, soon, monkeypatch, caplog):
    ended = threading.Event()
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.set())
    with claimed(tmp_path / "run", "hydra.run.dir"):
        (tmp_path / "run" / FILE).unlink()
        elsewhere(tmp_path / "run")
        assert ended.wait(10)
    assert "was taken over by another job" in caplog.text
    assert "node7" in (tmp_path / "run" / FILE).read_text()


def test_a_living_job_gives_signs(tmp_path, soon):
    with claimed(tmp_path / "run", "hydra.run.dir"):
        seen = set()
        end = time.monotonic() + 10
        while len(seen) < 3 and time.monotonic() < end:
            seen.add((tmp_path / "run" / FILE).read_bytes())
            time.sleep(0.02)
    assert len(seen) >= 3
    assert len({len(content) for content in seen}) == 1


@pytest.mark.parametrize("content", [b"", b"\0\xff", b"[]", b"{", b'{"boot": 7, "pid": "x"}'])
def test_a_lock_that_says_nothing_is_stale(tmp_path, soon, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).write_bytes(content)
    with claimed(tmp_path / "run", "hydra.run.dir"):
        pass


def test_where_nothing_locks_the_process_is_looked_for(tmp_path, soon, monkeypatch):
    monkeypatch.setattr(kernel_lock, "fcntl", None)
    alive = subprocess.Popen(["sleep", "60"])
    about = folder_lock._here() | {"pid": alive.pid, "started": folder_lock._started(alive.pid)}
    elsewhere(tmp_path / "run", **about)
    with pytest.raises(UserError, match=f"process {alive.pid} on"), claimed(tmp_path / "run", "hydra.run.dir"):
        pass
    elsewhere(tmp_path / "run", **about | {"started": "1"})  # another process has its number
    with claimed(tmp_path / "run", "hydra.run.dir"):
        pass
    alive.kill()
    alive.wait()
    elsewhere(tmp_path / "run", **about)
    with claimed(tmp_path / "run", "hydra.run.dir"):
        pass


def test_a_link_in_the_locks_place_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("as it was")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=FILE), claimed(tmp_path / "run", "hydra.run.dir"):
        pass
    assert (tmp_path / "precious").read_text() == "as it was"


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("pattern_bench", ["estimator=a", "hydra.run.dir=FOLDER"]),
        ("pattern_bench.gallery", ["hydra.run.dir=FOLDER"]),
        ("pattern_bench.sanity", ["hydra.run.dir=FOLDER"]),
        ("pattern_bench", ["resume=FOLDER", "seed=3"]),
        ("pattern_bench", ["-m", "estimator=a,w", "hydra.sweep.dir=FOLDER"]),
        ("pattern_bench", ["-m", "estimator=a", "hydra.sweep.dir=FOLDER/..", "hydra.sweep.subdir=run"]),
    ],
)
def test_a_second_command_leaves_the_folder_as_it_is(command, job, tmp_path, module, arguments):
    folder = tmp_path / "run"
    job()
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text("- estimator=w\n")
    (folder / "pattern_bench.log").write_text("of the first\n")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != FILE}
    done = command(*(a.replace("FOLDER", str(folder)) for a in arguments), "logger=none", module=module)
    assert done.returncode == 1
    assert "belongs to a job that is running" in done.stderr
    assert done.stderr.count("belongs to") == 1
    assert "Traceback" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != FILE} == before


@pytest.mark.slow
def test_the_log_of_a_job_is_there_from_the_start_to_the_end(command, tmp_path):
    done = command("logger=none", "degradation.replacement=none", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {".hydra", "pattern_bench.log"}
    assert not (tmp_path / "run" / FILE).exists()
    assert {path.name for path in (tmp_path / "run" / ".hydra").iterdir()} == {
        "config.yaml", "hydra.yaml", "overrides.yaml",
    }  # fmt: skip
