"""The cache against everything that may happen to its files, its disk, its locks and the clock."""

import errno
import logging
import os
import subprocess
import time

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pattern_bench.core.collector import Collector
from pattern_bench.core.moments import Moments
from pattern_bench.storage import cache as cache_module
from pattern_bench.storage.cache import Cache
from pattern_bench.storage.tensor_files import Damaged, read_tensors

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float64).reshape(3, 4),
    "turned": torch.arange(12.0).reshape(3, 4).mT,
    "number": torch.tensor(3.5, dtype=torch.bfloat16),
    "nothing": torch.zeros(0, 7),
    "mask": torch.tensor([True, False]),
    "nan": torch.tensor([torch.nan, -torch.inf, -0.0]),
}
ABOUT = {"images": "3", "unreadable": '["é.jpg"]'}


@pytest.fixture
def cache(tmp_path):
    return Cache(str(tmp_path / "cache"))


def entry(cache, key="key"):
    return cache.folder / "kind" / f"{key}.safetensors"


def equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, equal_nan=True)


# --- content ---


def test_an_entry_comes_back_as_it_went(cache):
    cache.save("kind", "key", TENSORS, ABOUT)
    tensors, metadata = cache.load("kind", "key")
    equal(tensors, TENSORS)
    assert metadata == ABOUT
    assert cache.load("kind", "other") is None
    with safe_open(entry(cache), "pt") as file:
        assert file.metadata()["checksum"].startswith("sha256:")


def test_a_flipped_bit_is_noticed_wherever_it_is(cache, caplog):
    """In every byte: of the header, of the metadata, of the tensors."""
    cache.save("kind", "key", TENSORS, ABOUT)
    content = entry(cache).read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        entry(cache).write_bytes(damaged)
        caplog.clear()
        found = cache.load("kind", "key")
        if found is None:
            assert f"cache entry {entry(cache)} is damaged" in caplog.text
        else:  # a space that pads the header has become another
            assert damaged[place] in b" \t\r\n"
            equal(found[0], TENSORS)
            assert found[1] == ABOUT


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "header too small"),
        (b"\xff" * 100, "header too large"),
        (b"\x80\x04no safetensors but a pickle.", "header"),
        (lambda whole: whole[:-1], "incomplete"),
        (lambda whole: whole + b"\0", "incomplete"),
        (lambda whole: whole.replace(b'"shape":[3,4]', b'"shape":[4,3]'), "does not match its checksum"),
        (lambda whole: whole.replace(b'"F64","shape":[3', b'"I64","shape":[3'), "does not match its checksum"),
        (lambda whole: whole.replace(b'"mask"', b'"musk"'), "does not match its checksum"),
        (lambda whole: whole.replace(b'"images":"3"', b'"images":"4"'), "does not match its checksum"),
        (lambda whole: whole.replace(b'"checksum"', b'"checksun"'), "has no checksum"),
        (lambda whole: whole.replace(b'"sha256:', b'"sha257:'), "does not match its checksum"),
    ],
)
def test_damage_is_said_and_mended(cache, caplog, content, reason):
    cache.save("kind", "key", TENSORS, ABOUT)
    whole = entry(cache).read_bytes()
    damaged = content if isinstance(content, bytes) else content(whole)
    assert damaged != whole
    entry(cache).write_bytes(damaged)
    with pytest.raises(Damaged, match=reason):
        read_tensors(entry(cache))
    assert cache.load("kind", "key") is None
    assert f"cache entry {entry(cache)} is damaged" in caplog.text
    assert reason in caplog.text
    cache.save("kind", "key", TENSORS, ABOUT)
    equal(cache.load("kind", "key")[0], TENSORS)


def test_a_file_without_a_checksum_is_only_taken_where_it_may_be(cache, caplog):
    (cache.folder / "kind").mkdir()
    save_file({"x": torch.ones(2)}, entry(cache), {"from": "elsewhere"})
    assert cache.load("kind", "key") is None
    assert "it has no checksum" in caplog.text
    tensors, metadata = read_tensors(entry(cache), unsigned=True)
    assert metadata == {"from": "elsewhere"}
    assert tensors["x"].tolist() == [1, 1]
    assert "has no checksum, so damage to it would not be noticed" in caplog.text


def test_an_entry_of_another_version_is_computed_again(cache, caplog, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(cache_module, "VERSION", 0)
        cache.save("kind", "key", TENSORS, ABOUT)
    assert cache.load("kind", "key") is None
    assert "it holds kind/key of version 0 instead of kind/key of version 1" in caplog.text


def test_an_entry_in_the_place_of_another_is_not_that(cache, caplog):
    cache.save("kind", "key", TENSORS, ABOUT)
    entry(cache).rename(entry(cache, "other"))
    assert cache.load("kind", "other") is None
    assert "it holds kind/key" in caplog.text


def test_a_folder_in_an_entrys_place_costs_the_entry(cache, caplog):
    (entry(cache) / "x").mkdir(parents=True)
    assert cache.load("kind", "key") is None
    cache.save("kind", "key", TENSORS, ABOUT)
    assert f"cache entry {entry(cache)} cannot be written" in caplog.text


def collected(gram=True):
    layer = nn.Conv2d(2, 4, 2, groups=2).requires_grad_(False)
    collector, x = Collector(layer, gram), torch.randn(3, 2, 4, 4)
    collector.add(x, layer(x))
    return collector.moments().tensors()


@pytest.mark.parametrize("gram", [True, False])
def test_moments_come_back_from_the_cache(cache, gram):
    tensors = collected(gram)
    cache.save("kind", "key", tensors, {})
    moments, _ = cache.load("kind", "key", Moments.from_tensors)
    equal(moments.tensors(), tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ug": None}, "lack, or should not have, ug"),
        ({"weight": torch.zeros(2).double()}, "lack, or should not have, weight"),
        ({"x": torch.zeros(2, 4)}, "must be float64, and x are not"),
        ({"n": torch.tensor([3.0]).double()}, r"do not fit together: n \(1,\)"),
        ({"g": torch.zeros(5).double()}, r"do not fit together: g \(5,\)"),
        ({"gram": torch.zeros(2, 4, 5).double()}, r"do not fit together: gram \(2, 4, 5\)"),
        ({"xun": torch.zeros(4, 5).double()}, r"do not fit together: xun \(4, 5\)"),
        ({"x": torch.zeros(3, 4).double()}, r"of \(4, 4\) neurons and inputs in \(3, 4\) groups"),
        ({"x": torch.zeros(0, 4).double()}, r"in \(0, 4\) groups"),
        ({"n": torch.tensor(torch.nan).double()}, "moments of nan patches"),
        ({"n": torch.tensor(torch.inf).double()}, "moments of inf patches"),
        ({"n": torch.tensor(1.0).double()}, "moments of 1 patches cannot have neurons that fire for"),
        ({"g": torch.tensor([0, 1, 2, -1.0]).double()}, "cannot have neurons that fire for"),
        ({"g": torch.full((4,), torch.nan).double()}, "cannot have neurons that fire for"),
    ],
)
def test_moments_that_cannot_be_are_computed_again(cache, caplog, changes, message):
    tensors = {name: tensor for name, tensor in (collected() | changes).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        Moments.from_tensors(tensors)
    cache.save("kind", "key", tensors, {})
    assert cache.load("kind", "key", Moments.from_tensors) is None
    assert f"{entry(cache)} is damaged" in caplog.text


# --- disks ---


@pytest.fixture
def disk(tmp_path):
    """Mounts a disk in memory of so many bytes."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options):
        asked = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(place)]
        try:
            done = subprocess.run(asked, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"mounts no disk to fill: {error}")
        if done.returncode:
            pytest.skip(f"may not mount a disk to fill: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True)


def test_a_full_disk_costs_the_entries_that_do_not_fit(disk, caplog):
    cache = Cache(str(disk("size=1m")))
    for key in ("large", "larger"):
        cache.save("kind", key, {"x": torch.randn(2**18)}, {})
        assert cache.load("kind", key) is None
    assert caplog.text.count("cannot be written") == 1
    assert str(entry(cache, "large")) in caplog.text
    assert list((cache.folder / "kind").iterdir()) == []
    cache.save("kind", "small", TENSORS, {})
    equal(cache.load("kind", "small")[0], TENSORS)


def test_a_disk_that_cannot_even_hold_a_lock_stops_nothing(disk, caplog):
    cache = Cache(str(disk("nr_inodes=1")))
    with cache.lock("kind", "key"):
        cache.save("kind", "key", TENSORS, {})
    with cache.lock("kind", "key"):
        assert cache.load("kind", "key") is None
    assert caplog.text.count("cannot be locked") == 1
    assert caplog.text.count("cannot be written") == 1


def test_a_job_on_a_full_disk_ends_as_one_with_room(disk, run_job, caplog):
    few = ["layer=classifier.*", "data.limit=100", "model.training.epochs=1", "degradation.images=2"]
    few += ["bootstrap.resamples=3", "bootstrap.chunks=4"]  # chunks that are in memory are drawn again and again
    room = run_job(*few)
    caplog.clear()
    full = run_job(*few, f"cache.dir={disk('size=64k')}")
    assert caplog.text.count("cannot be written") == 1
    assert (full / "summary.json").is_file()
    for name in ("rho.csv", "bootstrap.csv"):
        assert (full / name).read_bytes() == (room / name).read_bytes()


def test_a_read_only_disk_is_read(disk, caplog):
    place = disk("size=1m")
    Cache(str(place)).save("kind", "key", TENSORS, {})
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    cache = Cache(str(place))
    with cache.lock("kind", "key"):
        equal(cache.load("kind", "key")[0], TENSORS)
    with cache.lock("kind", "other"):
        cache.save("kind", "other", TENSORS, {})
    assert cache.load("kind", "other") is None
    assert [record.message for record in caplog.records] == [
        f"cache.dir={place} cannot be written: nothing will be reused by later runs"
    ]


# --- jobs side by side ---


JOB = """
import sys, torch
from pattern_bench.storage.cache import Cache
cache = Cache(sys.argv[1])
print("starts", flush=True)
with cache.lock("kind", "key"):
    found = cache.load("kind", "key")
    if found is None:
        print("computes", flush=True)
        sys.stdin.read(1)
        cache.save("kind", "key", {"x": torch.ones(2)}, {})
    else:
        print("loads", found[0]["x"].tolist(), flush=True)
"""


@pytest.fixture
def job(cache, script):
    """Starts a job of its own that wants the entry ``kind/key``; a line to it lets it finish."""

    def start():
        one = script(JOB, cache.folder)
        assert one.stdout.readline() == "starts\n"
        return one

    return start


def test_of_two_jobs_one_computes_and_the_other_waits_and_loads(job):
    first = job()
    assert first.stdout.readline() == "computes\n"
    second = job()
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.3)
    first.communicate("\n", timeout=60)
    said, _ = second.communicate(timeout=60)
    assert said == "loads [1.0, 1.0]\n"


def test_the_lock_of_a_job_that_was_killed_holds_nobody_up(job, cache):
    first = job()
    assert first.stdout.readline() == "computes\n"
    first.kill()
    first.wait(60)
    assert (cache.folder / "kind" / "key.lock").exists()
    second = job()
    assert second.stdout.readline() == "computes\n"
    second.communicate("\n", timeout=60)
    assert cache.load("kind", "key")[0]["x"].tolist() == [1, 1]


@pytest.mark.parametrize("why", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_without_locks_the_cache_works_and_says_so(cache, monkeypatch, caplog, why):
    def refuse(*_):
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr("fcntl.flock", refuse)
    for _ in range(2):
        with cache.lock("kind", "key"):
            cache.save("kind", "key", TENSORS, {})
    equal(cache.load("kind", "key")[0], TENSORS)
    assert caplog.text.count("cannot be locked") == 1
    assert os.strerror(why) in caplog.text


def test_a_lock_that_the_library_does_not_have_is_gone_without(cache, monkeypatch, caplog):
    class Missing(FileLock):
        def _acquire(self):
            raise NotImplementedError("no flock here")

    monkeypatch.setattr(cache_module, "FileLock", Missing)
    with cache.lock("kind", "key"):
        pass
    assert "cannot be locked (no flock here)" in caplog.text


def test_what_fails_under_the_lock_is_not_taken_for_the_locks_failure(cache, caplog):
    with pytest.raises(OSError, match="a job's own"), cache.lock("kind", "key"):
        raise OSError("a job's own")
    assert caplog.text == ""
    with FileLock(cache.folder / "kind" / "key.lock", timeout=0):
        pass


# --- clocks ---


def test_the_clock_has_no_say(cache, monkeypatch, caplog):
    """Neither a clock that was wrong when the entry was written nor one that jumps while it is."""
    year, now = 365 * 86400, time.time()
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now + 10 * year * (-1) ** next(jumps))
    with caplog.at_level(logging.WARNING):
        with cache.lock("kind", "key"):
            cache.save("kind", "key", TENSORS, ABOUT)
        for stamp in (0, now + 80 * year, now):
            os.utime(entry(cache), (stamp, stamp))
            with cache.lock("kind", "key"):
                equal(cache.load("kind", "key")[0], TENSORS)
    assert caplog.text == ""
