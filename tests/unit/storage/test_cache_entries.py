"""What a cache holds, and how it is emptied and bounded, beside jobs that run."""

import os
import time

import pytest
import torch
from safetensors.torch import save_file

from pattern_bench.commands.cache import main
from pattern_bench.errors import UserError
from pattern_bench.storage.cache import Cache
from pattern_bench.storage.cache_entries import KINDS, USERS, entries, in_use

KIB = 1024


def key(number):
    return f"{number:032x}"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def fill(folder, kind, numbers, kib=100, age=0.0):
    """Entries of a job that has ended, each used ``age`` seconds ago and one second after the one before."""
    cache = Cache(str(folder))
    for number in numbers:
        assert cache.save(kind, key(number), {"x": torch.zeros(kib * KIB // 4)}, {})
        used = time.time() - age + number
        os.utime(folder / kind / f"{key(number)}.safetensors", (used, used))
    del cache


def kept(folder):
    return {(entry.kind, int(entry.key, 16)) for entry in entries(folder)}


JOB = """
import sys
from pattern_bench.storage.cache import Cache
cache = Cache(sys.argv[1])
assert cache.load("moments", sys.argv[2]) is not None
print("uses it", flush=True)
sys.stdin.read(1)
"""


@pytest.fixture
def job(folder, script):
    """Starts a job that uses an entry of the moments, until it is sent a line."""

    def start(number):
        one = script(JOB, folder, key(number))
        assert one.stdout.readline() == "uses it\n"
        return one

    return start


# --- looking ---


def test_the_table_counts_by_kind(folder, capsys):
    fill(folder, "moments", range(3), kib=1024, age=3 * 86400)
    fill(folder, "models", [7], kib=2048)
    main(["--dir", str(folder)])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(folder)
    rows = {line.split()[0]: line.split()[1:4] for line in said[2:]}
    assert rows == {
        "models": ["1", "2.0", "MiB"], "moments": ["3", "3.0", "MiB"], "baselines": ["0", "0", "B"],
        "listings": ["0", "0", "B"], "all": ["4", "5.0", "MiB"],
    }  # fmt: skip
    assert "3 d" in next(line for line in said if "moments" in line)


@pytest.mark.slow
def test_every_kind_that_the_suite_keeps_is_listed(command, tmp_path, photographs):
    """Whatever a job leaves as an entry is counted: nothing grows unseen."""
    photographs(tmp_path / "photos", 40, 2, 16)
    few = ["logger=none", "model.training.epochs=1", "degradation.images=2", "explanation.images=1", "data.workers=0"]
    done = command(
        *few, f"cache.dir={tmp_path / 'cache'}", "data=folder", f"data.root={tmp_path / 'photos'}", "data.size=16"
    )
    assert done.returncode == 0, done.stderr
    files = {path for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert {(path.parent.name, path.stem) for path in files} == {(e.kind, e.key) for e in entries(tmp_path / "cache")}
    assert {path.parent.name for path in files} <= set(KINDS)
    assert {"models", "moments", "baselines"} <= {path.parent.name for path in files}
    assert not list((tmp_path / "cache" / USERS).glob("*.keys"))


# --- removing ---


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["--all"], set()),
        (["--kind", "moments"], {("models", 9)}),
        (["--older-than", "2d"], {("moments", 3), ("moments", 4), ("moments", 5), ("models", 9)}),
        (["--older-than", "2d", "--kind", "models"], "everything"),
        # used longest ago first; what two entries and their headers take
        (["--down-to", "210KiB"], {("moments", 5), ("models", 9)}),
        (["--down-to", "0"], set()),
        (["--down-to", "1GiB"], "everything"),
        (["--down-to", "0", "--older-than", "2d"], {("moments", 3), ("moments", 4), ("moments", 5), ("models", 9)}),
    ],
)
def test_entries_go_by_kind_by_age_and_by_size(folder, capsys, arguments, left):
    fill(folder, "moments", range(3), age=5 * 86400)
    fill(folder, "moments", range(3, 6), age=86400)
    fill(folder, "models", [9], age=86400)
    everything = kept(folder)
    left = everything if left == "everything" else left
    main(["--dir", str(folder), "--remove", *arguments, "--dry-run"])
    would = capsys.readouterr().out
    assert kept(folder) == everything
    main(["--dir", str(folder), "--remove", *arguments])
    assert kept(folder) == left
    assert capsys.readouterr().out == would.replace("would remove", "removed")
    assert f"would remove {len(everything) - len(left)} of " in would


@pytest.mark.parametrize(
    "arguments",
    [["--remove"], ["--all"], ["--dry-run"], ["--down-to", "1GiB"], ["--remove", "--all", "--down-to", "1"]],
)
def test_half_a_command_removes_nothing(folder, capsys, arguments):
    fill(folder, "models", [1])
    with pytest.raises(SystemExit) as end:
        main(["--dir", str(folder), *arguments])
    assert end.value.code == 2
    assert kept(folder) == {("models", 1)}


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(SystemExit, match=r"error: --dir=.*none is no folder"):
        main(["--dir", str(tmp_path / "none")])


def test_what_a_running_job_uses_stays(folder, job, capsys):
    fill(folder, "moments", range(3))
    one = job(1)
    main(["--dir", str(folder), "--remove", "--all", "--dry-run"])
    main(["--dir", str(folder), "--remove", "--all"])
    assert kept(folder) == {("moments", 1)}
    assert capsys.readouterr().out.count("kept 1 that running jobs use") == 2
    one.communicate("\n", timeout=60)
    assert not list((folder / USERS).glob("*.keys"))
    main(["--dir", str(folder), "--remove", "--all"])
    assert kept(folder) == set()


def test_what_a_killed_job_used_goes(folder, job):
    fill(folder, "moments", [1])
    one = job(1)
    one.kill()
    one.wait()
    assert list((folder / USERS).glob("*.keys"))
    main(["--dir", str(folder), "--remove", "--all"])
    assert kept(folder) == set()
    assert not list((folder / USERS).glob("*.keys"))


def test_a_job_on_another_machine_is_believed_for_a_week(folder):
    fill(folder, "moments", [1, 2])
    told = folder / USERS / "5-other.keys"
    told.write_text(f"another machine\nmoments/{key(1)}\n")
    assert in_use(folder) == {("moments", key(1))}
    main(["--dir", str(folder), "--remove", "--all"])
    assert kept(folder) == {("moments", 1)}
    os.utime(told, (0, 0))
    main(["--dir", str(folder), "--remove", "--all"])
    assert kept(folder) == set()


def test_links_and_what_others_left_stay_as_they_are(folder, tmp_path):
    fill(folder, "moments", [1])
    elsewhere = tmp_path / "elsewhere"
    fill(elsewhere, "models", [2])
    (folder / "models").symlink_to(elsewhere / "models")
    (folder / "moments" / f"{key(3)}.safetensors").symlink_to(elsewhere / "models" / f"{key(2)}.safetensors")
    save_file({"x": torch.zeros(3)}, folder / "moments" / f"{key(4)}.safetensors", {"entry": "of another program"})
    (folder / "moments" / f"{key(5)}.safetensors").write_text("notes")
    (folder / "moments" / "precious.safetensors").write_text("notes")
    (folder / "moments" / f"{key(6)}.safetensors").mkdir()
    (folder / "thesis.txt").write_text("notes")
    before = {path for path in tmp_path.rglob("*")}
    main(["--dir", str(folder), "--remove", "--all"])
    gone = before - {path for path in tmp_path.rglob("*")}
    assert gone == {folder / "moments" / f"{key(1)}.safetensors"}
    assert kept(elsewhere) == {("models", 2)}


def test_a_link_in_the_place_of_the_users_folder_is_not_followed(folder, tmp_path):
    fill(folder, "moments", [1])
    for path in (folder / USERS).iterdir():
        path.unlink()
    (folder / USERS).rmdir()
    (tmp_path / "elsewhere").mkdir()
    (folder / USERS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="cannot be changed"):
        main(["--dir", str(folder), "--remove", "--all"])
    assert list((tmp_path / "elsewhere").iterdir()) == []
    cache = Cache(str(folder))
    assert cache.load("moments", key(1)) is not None


def test_locks_and_beginnings_of_jobs_that_are_gone_are_swept_up(folder):
    fill(folder, "moments", [1])
    old, new = folder / "moments" / f"{key(2)}.lock", folder / "moments" / f"{key(3)}.lock"
    begun = folder / "moments" / f".{key(4)}.part.safetensors"
    for path in (old, new, begun):
        path.write_text("")
    os.utime(old, (0, 0))
    os.utime(begun, (0, 0))
    main(["--dir", str(folder), "--remove", "--kind", "moments"])
    assert list((folder / "moments").iterdir()) == [new]


# --- the bound ---


def test_a_bound_lets_go_of_what_was_used_longest_ago(folder, caplog):
    fill(folder, "moments", range(4), age=1000)
    cache = Cache(str(folder), 450 * KIB / 2**30)
    assert cache.load("moments", key(0)) is not None  # which is used now, and the oldest no more
    for number in (10, 11):
        cache.save("moments", key(number), {"x": torch.zeros(100 * KIB // 4)}, {})
        assert sum(entry.size for entry in entries(folder)) <= 450 * KIB
    assert kept(folder) == {("moments", 0), ("moments", 3), ("moments", 10), ("moments", 11)}
    assert caplog.text.count("cache.gib=0.000429153 is met: removed") == 1


def test_what_the_job_itself_and_others_use_stays_above_the_bound(folder, job, caplog):
    fill(folder, "moments", [1, 2])
    job(1)
    cache = Cache(str(folder), 150 * KIB / 2**30)
    for number in (10, 11, 12):
        cache.save("moments", key(number), {"x": torch.zeros(100 * KIB // 4)}, {})
    assert kept(folder) == {("moments", 1), ("moments", 10), ("moments", 11), ("moments", 12)}
    assert caplog.text.count("cache.gib=") == 1
    assert "running jobs need more, which is kept for them" in caplog.text


def test_without_a_bound_nothing_goes(folder, caplog):
    fill(folder, "moments", range(4))
    Cache(str(folder)).save("moments", key(10), {"x": torch.zeros(10)}, {})
    assert len(kept(folder)) == 5
    assert caplog.text == ""


@pytest.mark.parametrize("gib", ["0", "-1", "lots", "true", ".inf"])
def test_a_bound_is_a_positive_number(run_job, gib):
    with pytest.raises(UserError, match=r"cache.gib=.* is not possible: give a positive number of GiB"):
        run_job(f"cache.gib={gib}")


def test_a_job_with_a_bound_has_the_results_of_one_without(run_job, tmp_path, caplog):
    few = ["data.limit=100", "model.training.epochs=1", "degradation.images=2", "explanation.images=1"]
    one = run_job(*few, f"cache.dir={tmp_path / 'a'}")
    other = run_job(*few, f"cache.dir={tmp_path / 'b'}", "cache.gib=0.0001")
    again = run_job(*few, f"cache.dir={tmp_path / 'b'}", "cache.gib=0.0001", "seed=1")
    assert (one / "rho.csv").read_bytes() == (other / "rho.csv").read_bytes()
    assert (again / "rho.csv").exists()
    assert caplog.text.count("cache.gib=0.0001 is met") == 2
