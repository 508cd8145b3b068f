"""Files with every kind of damage: each gives one error of ours or the right content, and no harm beyond.

Also run as a program, ``python test_fuzz.py TARGET FOLDER CASES SEED``, by tests that must survive a crash or a hang.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import resource
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.damage import ANY, cut, flip, grow, remove, splice
from safetensors.torch import save_file
from torch import nn

import pattern_bench as pb
from pattern_bench.core.collector import Collector
from pattern_bench.core.moments import Moments
from pattern_bench.errors import UserError
from pattern_bench.models.base import load_weights, read_weights
from pattern_bench.storage.cache import Cache

# --- mutations of a safetensors file ---

NUMBERS = (
    -1,
    0,
    1,
    7,
    2**31,
    2**32,
    2**40,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    10**30,
    0.5,
    None,
    "8",
    [],
    True,
)


def header_length(draw, content, other):
    size = struct.unpack("<Q", content[:8])[0]
    wrong = draw.choice((0, 1, size - 1, size + 1, size + 8, len(content), 10**8, 2**32, 2**63, 2**64 - 1))
    return struct.pack("<Q", wrong) + content[8:]


def header(draw, content, other):
    """A header that says something else, well-formed and of the right length unless JSON itself is the point."""
    size = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + size])
    name = draw.choice([name for name in entries if name != "__metadata__"])
    one, metadata = entries[name], entries.get("__metadata__", {})
    edit = draw.randrange(16)
    text = None
    if edit == 0:
        one["data_offsets"][draw.randrange(2)] = draw.choice(NUMBERS)
    elif edit == 1:
        one["data_offsets"] = [n + draw.choice((-8, -1, 1, 8)) for n in one["data_offsets"]]
    elif edit == 2:
        one["data_offsets"] = draw.choice((one["data_offsets"][::-1], [], [0], [0, 8, 16], [0, 2**62], "0"))
    elif edit == 3:
        one["dtype"] = draw.choice(
            ("F64", "F32", "I64", "BOOL", "BF16", "F8_E4M3", "F4", "C64", "f32", "F128", "", 3, None)
        )
    elif edit == 4:
        one["shape"] = draw.choice(
            (
                [],
                [0],
                [1],
                [2**62, 4],
                [2**32, 2**32],
                [-1],
                one["shape"][::-1],
                [1] * 70,
                [*one["shape"], 1],
                "4",
                None,
            )
        )
    elif edit == 5 and one["shape"]:
        one["shape"][draw.randrange(len(one["shape"]))] = draw.choice(NUMBERS)
    elif edit == 6:
        del entries[name]
    elif edit == 7:
        entries[draw.choice(("", "x", "no/such/positive", "\ud800", "é" * 50, name + " "))] = entries.pop(name)
    elif edit == 8:
        twin = draw.choice([n for n in entries if n != "__metadata__"])
        entries[name]["data_offsets"], entries[twin]["data_offsets"] = (
            entries[twin]["data_offsets"],
            one["data_offsets"],
        )
    elif edit == 9:
        entries[name + "2"] = one
    elif edit == 10 and metadata:
        metadata.pop(draw.choice(list(metadata)))
    elif edit == 11 and metadata:
        metadata[draw.choice(list(metadata))] = draw.choice(("", "0", "sha256:", 3, None, {}, "x" * 10_000))
    elif edit == 12:
        entries["__metadata__"] = draw.choice(({}, None, [], "x", {"a": 1}, {"version": "9"}))
    elif edit == 13:
        twin = json.dumps({name: {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}})
        text = json.dumps(entries)[:-1] + ", " + twin[1:]
    elif edit == 14:
        text = draw.choice(('{"a":' * 100_000, "[" * 100_000, "{}", "[]", "null", "", '{"__metadata__":{}}', "\x00{}"))
    else:
        text = json.dumps(entries, indent=draw.choice((1, 4))) + " " * draw.randrange(20)  # the same, written otherwise
    encoded = (json.dumps(entries) if text is None else text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + content[8 + size :]


SAFETENSORS = (*ANY, header_length, header, header, header, header, header)

# --- mutations of a state dict in torch.save's zip archive ---


def repacked(change):
    """The archive with its records changed, and their sums made right again, so that the change is met."""

    def mutate(draw, content, other):
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
            records = {info.filename: old.read(info) for info in old.infolist()}
            how = change(draw, records)
            for name, record in records.items():
                new.writestr(name, record, zipfile.ZIP_STORED if how is None else how)
        return made.getvalue()

    mutate.__name__ = change.__name__
    return mutate


def pickle_of(records):
    return next(name for name in records if name.endswith("data.pkl"))


@repacked
def other_pickle(draw, records):
    name = pickle_of(records)
    records[name] = draw.choice((flip, flip, flip, cut, grow, remove, splice))(draw, records[name], records[name])


@repacked
def other_numbers(draw, records):
    """Sizes, strides, offsets and numbers of elements in the pickle become others: K is a byte, M two, J four."""
    name = pickle_of(records)
    pickled = bytearray(records[name])
    for _ in range(draw.randint(1, 3)):
        place = draw.choice([i for i, byte in enumerate(pickled[:-5]) if byte in b"KMJ"])
        pickled[place : place + {75: 2, 77: 3, 74: 5}[pickled[place]]] = draw.choice(
            (b"K\x00", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"N", b"\x88",
             b"\x8a\x06" + b"\xff" * 5 + b"\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f")
        )  # fmt: skip
    records[name] = bytes(pickled)


@repacked
def other_records(draw, records):
    name = draw.choice(list(records))
    choice = draw.randrange(4)
    if choice == 0:
        del records[name]
    elif choice == 1:
        records[name] = draw.choice((b"", records[name][:-1], records[name] * 2, draw.randbytes(64)))
    elif choice == 2:
        records[draw.choice(("a", "archive/data/0", "../../x", "constants.pkl"))] = records.pop(name)
    return zipfile.ZIP_DEFLATED if choice == 3 else None


@repacked
def bomb(draw, records):
    """130 KB that unpack to 128 MiB."""
    name = draw.choice([name for name in records if "/data/" in name])
    records[name] = bytes(2**27)
    return zipfile.ZIP_DEFLATED


def legacy_numbers(draw, content, other):
    """The same numbers in a state dict from before torch's archives."""
    place = draw.choice([i for i, byte in enumerate(content[:-5]) if byte in b"KMJ"])
    wrong = draw.choice((b"K\x00", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x06" + b"\xff" * 5 + b"\x7f"))
    return content[:place] + wrong + content[place + {75: 2, 77: 3, 74: 5}[content[place]] :]


ARCHIVE = (*ANY, other_pickle, other_pickle, other_numbers, other_numbers, other_records)
LEGACY = (*ANY, legacy_numbers, legacy_numbers)

# --- what reads the files, and what it may answer ---


class Heard(logging.Handler):
    """Counts what the package says."""

    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def same(one, other):
    """Bit by bit: a NaN is itself."""
    return one.keys() == other.keys() and all(
        (a.dtype, a.shape) == (b.dtype, b.shape)
        and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
        for a, b in ((one[name], other[name]) for name in one)
    )


def refused(error, place):
    """One line that names the file."""
    if str(place) not in str(error) or "\n" in str(error):
        raise AssertionError(f"no message for a user: {error}")
    return "refused"


class Target:
    """Something that reads files: sound ``originals``, what damages them, and ``read``, which says how a file went."""

    suffix = ".safetensors"
    mutations = SAFETENSORS

    def __init__(self, folder):
        self.heard, log = Heard(), logging.getLogger("pattern_bench")
        log.addHandler(self.heard)
        log.propagate = False
        self.originals = {}
        self.prepare(folder)

    def damaged(self, draw):
        name = draw.choice(list(self.originals))
        mutation = draw.choice(self.mutations)
        return name, mutation.__name__, mutation(draw, self.originals[name], draw.choice(list(self.originals.values())))

    def close(self):
        log = logging.getLogger("pattern_bench")
        log.removeHandler(self.heard)
        log.propagate = True


class Moment(Target):
    """Cache entries of moments: right, or missing and said."""

    def prepare(self, folder):
        torch.manual_seed(0)
        self.cache, self.right = Cache(str(folder / "cache")), {}
        self.place = folder / "cache" / "moments" / "two.safetensors"
        for key, gram, groups in (("one", True, 1), ("two", False, 1), ("three", True, 2)):
            layer = nn.Conv2d(2, 4, 2, groups=groups).requires_grad_(False)
            collector, x = Collector(layer, gram), torch.randn(3, 2, 4, 4)
            collector.add(x, layer(x))
            self.right[key] = collector.moments().tensors(), {"images": "3", "unreadable": "[]", "layer": key}
            self.cache.save("moments", key, *self.right[key])
            self.originals[key] = (folder / "cache" / "moments" / f"{key}.safetensors").read_bytes()

    def read(self, name):
        found = self.cache.load("moments", "two", Moments.from_tensors)
        if found is None:
            assert any("is damaged" in line and "two.safetensors" in line for line in self.heard.said)
            return "refused"
        # Another entry in this one's place is not this one.
        assert same(found[0].tensors(), self.right["two"][0])
        assert found[1] == self.right["two"][1]
        return "right"


class Semantic(Moment):
    """Entries whose checksum is right and whose tensors are not moments, or are others."""

    def damaged(self, draw):
        right = self.right["two"][0]
        tensors = dict(right)
        for _ in range(draw.randint(1, 2)):
            name = draw.choice(list(right))
            one = right[name]
            tensors[draw.choice((name, name, name, "gram", "x", "weight"))] = draw.choice(
                (one.float(), one.bool(), one[None], one.flatten(), one.reshape(-1)[:0], one.reshape(-1)[0], one + 0.5,
                 -1 - one, one * torch.nan, one * torch.inf, one.repeat((2,) * one.ndim), torch.zeros(1, 8, 8).double(),
                 one.movedim(0, -1) if one.ndim else one + 1)
            )  # fmt: skip
            if draw.random() < 0.3:
                tensors.pop(draw.choice(list(right)), None)
        self.written = tensors
        self.cache.save("moments", "two", tensors, {})
        return "two", "semantic", self.place.read_bytes()

    def read(self, name):
        found = self.cache.load("moments", "two", Moments.from_tensors)
        if found is None:
            return "refused"
        moments, neurons = found[0], found[0].xg.shape[0]
        assert same(moments.tensors(), self.written)
        assert all(tensor.dtype == torch.float64 for tensor in moments.tensors().values())
        assert moments.cov_xu.shape == moments.xug.shape == (neurons, moments.x.shape[1])
        assert moments.var_u.shape == moments.g.shape
        assert float(moments.n) >= float(moments.g.max()) >= 0
        if moments.gram is not None:
            assert moments.cov_x.shape == (len(moments.x), moments.x.shape[1], moments.x.shape[1])
        return "right"


class Entry(Target):
    """Cache entries of trained weights, with what state dicts hold besides float32."""

    def prepare(self, folder):
        torch.manual_seed(0)
        self.cache = Cache(str(folder / "cache"))
        self.place = folder / "cache" / "models" / "one.safetensors"
        self.right = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).state_dict()
        self.right |= {
            "half": torch.randn(5).half(),
            "none": torch.zeros(0, 3),
            "mask": torch.ones(3, dtype=torch.bool),
        }
        for key in ("one", "two"):
            self.cache.save("models", key, self.right, {"model": "small"})
            self.originals[key] = (folder / "cache" / "models" / f"{key}.safetensors").read_bytes()

    def read(self, name):
        found = self.cache.load("models", "one")
        if found is None:
            assert any("is damaged" in line for line in self.heard.said)
            return "refused"
        assert same(found[0], self.right)
        assert found[1] == {"model": "small"}
        return "right"


class PatternFile(Target):
    """Patterns: right, or one error; what an earlier version wrote without a checksum may differ, but says so."""

    def prepare(self, folder):
        torch.manual_seed(0)
        self.place = folder / "patterns.safetensors"
        self.network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).eval()
        moments = pb.collect_moments(self.network, [torch.randn(4, 2, 4, 4)], gram=False)
        for estimator in ("a_plus_minus", "w"):
            patterns = pb.fit_patterns(self.network, moments, estimator)
            patterns.save(self.place)
            self.originals[estimator] = self.place.read_bytes()
        self.right = {estimator: self._content(estimator) for estimator in self.originals}
        size = struct.unpack("<Q", self.originals["w"][:8])[0]
        entries = json.loads(self.originals["w"][8 : 8 + size])
        entries["__metadata__"] = {"estimator": "w"}
        earlier = json.dumps(entries).encode()
        self.originals["earlier"] = struct.pack("<Q", len(earlier)) + earlier + self.originals["w"][8 + size :]

    def _content(self, name):
        self.place.write_bytes(self.originals[name])
        loaded = self._tensors(pb.load_patterns(self.place, self.network))
        # What was loaded lies in the file, which is about to be overwritten.
        return {key: tensor.clone() for key, tensor in loaded.items()}

    @staticmethod
    def _tensors(patterns):
        return {
            f"{layer}/{part}": getattr(pattern, part)
            for layer, pattern in patterns.items()
            for part in ("positive", "negative", "dead")
        }

    def read(self, name):
        try:
            patterns = pb.load_patterns(self.place, self.network)
        except UserError as error:
            return refused(error, self.place)
        found = self._tensors(patterns)
        for layer, pattern in patterns.items():
            weight = self.network.get_submodule(layer).weight
            assert pattern.positive.shape == pattern.negative.shape == weight.shape
            assert pattern.positive.isfinite().all()
            assert pattern.dead.shape == weight.shape[:1]
        if any("has no checksum" in line for line in self.heard.said):
            return "unsigned"
        assert same(found, self.right[patterns.estimator])
        return "right"


class Weights(Target):
    """Weights, which carry no checksum: the model keeps its shapes and types, or there is one error."""

    def prepare(self, folder):
        torch.manual_seed(0)
        self.place = folder / f"weights{self.suffix}"
        self.network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).eval()
        self.shapes = {key: (tensor.dtype, tensor.shape) for key, tensor in self.network.state_dict().items()}
        for content in ({}, {"extra": torch.randn(3).half()}):
            self.save(self.network.state_dict() | content)
            self.originals[str(len(content))] = self.place.read_bytes()

    def save(self, state):
        save_file(state, self.place)

    def read(self, name):
        try:
            load_weights(self.network, read_weights(str(self.place)), f"model.weights={self.place}", "small")
        except UserError as error:
            return refused(error, self.place)
        assert {key: (tensor.dtype, tensor.shape) for key, tensor in self.network.state_dict().items()} == self.shapes
        return "right"


class StateDict(Weights):
    suffix, mutations = ".pt", ARCHIVE

    def save(self, state):
        torch.save(state, self.place)


class LegacyStateDict(Weights):
    suffix, mutations = ".pth", LEGACY

    def save(self, state):
        torch.save(state, self.place, _use_new_zipfile_serialization=False)


TARGETS = {kind.__name__: kind for kind in (Moment, Semantic, Entry, PatternFile, Weights, StateDict, LegacyStateDict)}


def campaign(name, folder, cases, seed):
    """Reads so many damaged files; returns how they went, by mutation. A failure names what damaged the file, which is
    left where it was read."""
    target, draw, went = TARGETS[name](folder), random.Random(f"{name} {seed}"), Counter()
    try:
        for case in range(cases):
            original, mutation, content = target.damaged(draw)
            target.place.write_bytes(content)
            target.heard.said.clear()
            with warnings.catch_warnings(action="ignore"):
                try:
                    went[mutation, target.read(original)] += 1
                except BaseException as error:
                    raise AssertionError(f"{name}, case {case} of seed {seed}: {mutation} of {original}") from error
    finally:
        target.close()
    return went


def peak():
    """Most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_right_or_refused(name, tmp_path):
    went = campaign(name, tmp_path, 1_200, seed=0)
    outcomes = Counter(outcome for _, outcome in went.elements())
    # Both happen, or the mutations are no test.
    assert outcomes["refused"] > 100
    assert outcomes["right"] > 0
    if name in ("Moment", "Entry"):
        assert went["flip", "refused"] > 10 * went["flip", "right"]


def in_a_process(name, folder, cases, seed, seconds):
    """The same where a crash, a hang or gigabytes would end another process than this one."""
    done = subprocess.run(
        [sys.executable, __file__, name, str(folder), str(cases), str(seed)],
        capture_output=True, text=True, timeout=seconds, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("Entry", "StateDict") else pytest.mark.slow) for name in TARGETS],
)
def test_a_damaged_file_crashes_nothing(name, tmp_path):
    told = in_a_process(name, tmp_path, 400, seed=2, seconds=120)
    assert sum(told["outcomes"].values()) == 400
    assert told["grown_mib"] < 100


@pytest.mark.very_slow
@pytest.mark.parametrize("name", TARGETS)
def test_two_hundred_thousand_damaged_files(name, tmp_path):
    told = in_a_process(name, tmp_path, 30_000, seed=3, seconds=3_600)
    assert sum(told["outcomes"].values()) == 30_000
    assert told["grown_mib"] < 100


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path):
    model = nn.Linear(4, 4)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    read_weights(str(tmp_path / "w.pt"))
    (tmp_path / "w.pt").write_bytes(bomb(random.Random(0), content, content))
    assert (tmp_path / "w.pt").stat().st_size < 2**20
    with pytest.raises(UserError, match="unpacks to more than its own size"):
        read_weights(str(tmp_path / "w.pt"))


def main():
    name, folder, cases, seed = sys.argv[1:]
    campaign(name, Path(folder), 20, seed=1)  # what the first calls load is not the files'
    # Half a gigabyte more than it takes to get this far: a header that asks for more gets an error, not the memory.
    if sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, now + 2**29))
    before = peak()
    went = campaign(name, Path(folder), int(cases), seed=int(seed))
    outcomes = Counter(outcome for _, outcome in went.elements())
    print(json.dumps({"outcomes": outcomes, "grown_mib": round(peak() - before)}))


if __name__ == "__main__":
    main()
