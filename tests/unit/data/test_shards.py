import functools
import gc
import gzip
import http.server
import io
import json
import multiprocessing
import pickle
import subprocess
import tarfile
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.models import ResNet18_Weights
from torchvision.transforms._presets import ImageClassification

from pattern_bench.configuration.build import build
from pattern_bench.data import remote, shards
from pattern_bench.data.base import photograph_transform
from pattern_bench.data.folder import FolderPool
from pattern_bench.data.splits import Unreadable, make_splits
from pattern_bench.errors import UserError
from pattern_bench.storage.cache import Cache


def add(shard, name, content, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    shard.addfile(member, io.BytesIO(content))


@pytest.fixture
def shard_set(photographs):
    """The 12 photographs of a folder as shards of 5, 5 and 2 images; returns the shards' folder and the images'."""

    def make(root, label="cls", start=0, **size):
        images = photographs(root / "images", **size)
        pool = FolderPool(str(images), "data.root")
        (root / "shards").mkdir()
        for number, first in enumerate(range(0, 12, 5), start=start):
            with tarfile.open(root / f"shards/train-{number:03}.tar", "w") as shard:
                for i in range(first, min(first + 5, 12)):
                    key = pool.ids[i].removesuffix(".jpg")
                    add(shard, f"{key}.jpg", (images / pool.ids[i]).read_bytes())
                    if label == "cls":
                        add(shard, f"{key}.cls", b"%d\n" % pool.labels[i])
                    elif label == "json":
                        add(shard, f"{key}.json", json.dumps({"label": pool.labels[i], "caption": "…"}).encode())
        return root / "shards", images

    return make


@pytest.fixture(scope="module")
def settings(configure):
    """What conf/data/shards.yaml sets, composed once: it takes a while."""
    return configure("data=shards", "data.root='{a,b}.tar'").data


@pytest.fixture
def source(settings):
    def make(root, cache=None, **others):
        root = [str(each) for each in root] if isinstance(root, list) else str(root)
        made = build(OmegaConf.merge(settings, {"root": root, **others}))
        made.cache = cache
        return made

    return make


@pytest.fixture
def serve(monkeypatch):
    """Serves a folder over HTTP; returns its URL and a list of what is asked for: (method, path, range or None)."""
    monkeypatch.setattr(remote, "WAITS", (0, 0))
    servers = []

    def start(folder, ranges=True, spoil=lambda handler: False):
        asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                wanted = self.headers.get("Range")
                asked.append(("GET", self.path, wanted))
                if spoil(self):
                    return
                if not (ranges and wanted):
                    super().do_GET()
                    return
                content = Path(self.translate_path(self.path)).read_bytes()
                first, last = wanted.removeprefix("bytes=").split("-")
                part = content[int(first) : int(last) + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def whole(asked):
    """How often each file was asked for as a whole."""
    return Counter(path for method, path, part in asked if method == "GET" and part is None)


def same_images(pool, folder):
    reference = FolderPool(str(folder), "data.root")
    number = {name: i for i, name in enumerate(reference.ids)}
    names = [name.partition(".tar/")[2] for name in pool.ids]
    assert sorted(names) == list(reference.ids)
    assert pool.classes == reference.classes
    for i, name in enumerate(names):
        assert pool.labels[i] == reference.labels[number[name]]
        assert pool.image(i).tobytes() == reference.image(number[name]).tobytes()


@pytest.mark.parametrize("label", ["cls", "json"])
def test_shards_hold_the_folders_images_and_labels(source, shard_set, tmp_path, label):
    folder, images = shard_set(tmp_path, label)
    pool, validation = source(folder).pools()
    assert validation is None
    same_images(pool, images)
    assert pool.ids[0].startswith("train-000.tar/class0/")
    assert pool.sequential


def test_shards_without_labels(source, shard_set, tmp_path):
    folder, _ = shard_set(tmp_path, None)
    pool, _ = source(folder).pools()
    assert (len(pool.ids), pool.labels, pool.classes) == (12, None, None)


def test_classes_are_those_of_both_roots_or_as_given(source, shard_set, tmp_path):
    folder, _ = shard_set(tmp_path)
    with tarfile.open(tmp_path / "held.tar", "w") as shard:
        add(shard, "a.jpg", b"")
        add(shard, "a.cls", b"07")
    held = f"{tmp_path}/held.tar"
    assert [pool.classes for pool in source(folder, validation_root=held).pools()] == [8, 8]
    assert [pool.classes for pool in source(folder, validation_root=held, classes=10).pools()] == [10, 10]
    with pytest.raises(UserError, match=r"data.classes=7 is too few for the label 7: give at least 8"):
        source(folder, validation_root=held, classes=7).pools()


def test_members_are_told_apart_by_their_keys(source, photographs, tmp_path):
    """Names that lead elsewhere, folders, links, several images of a key, endings that only look like one."""
    jpeg = (photographs(tmp_path / "images", count=1, classes=0) / "0.jpg").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        add(shard, "folder", b"", type=tarfile.DIRTYPE)
        add(shard, "../../outside.cls", b"3")
        add(shard, "../../outside.jpg", jpeg)
        add(shard, "/etc/absolute.JPEG", jpeg)
        add(shard, "/etc/absolute.json", b'{"cls": 1}')
        add(shard, "link.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(shard, "hard.jpg", b"", type=tarfile.LNKTYPE, linkname="../../outside.jpg")
        add(shard, "._outside.jpg", b"notes of another program")
        add(shard, "a/b.seg.png", b"no image of ours")
        add(shard, "a/b.jpg", jpeg)
        add(shard, "a/b.png", b"a second one")
        add(shard, "a/b.txt", b"caption")
        add(shard, "a/b.json", b'{"label": 9}')
        add(shard, "a/b.cls", b"2")
        add(shard, "c\xe4\udcff" + "x" * 200 + ".jpg", jpeg)
        add(shard, "c\xe4\udcff" + "x" * 200 + ".cls", b"0")
        add(shard, "alone.cls", b"0")
    before = sorted(tmp_path.rglob("*"))
    pool, _ = source(tmp_path / "a.tar").pools()
    assert list(pool.ids) == [
        "a.tar/../../outside.jpg", "a.tar//etc/absolute.JPEG", "a.tar/a/b.jpg", "a.tar/cä\\xff" + "x" * 200 + ".jpg",
    ]  # fmt: skip
    assert list(pool.labels) == [3, 1, 2, 0]
    assert {pool.image(i).tobytes() for i in range(4)} == {Image.open(io.BytesIO(jpeg)).convert("RGB").tobytes()}
    assert sorted(tmp_path.rglob("*")) == before
    assert not [file for folder in tmp_path.parents for file in folder.glob("outside.*")]


@pytest.mark.parametrize(
    "pattern",
    ["t-{000..012}.tar", "{a,bc}/t-{8..11}.tar", "{x,y}{1..2}{p,q}.tar", "t-{0..0}.tar", "plain.tar", "{a}.tar"],
)
def test_braces_mean_what_they_mean_to_bash(pattern):
    expected = subprocess.run(["bash", "-c", f"printf '%s\n' {pattern}"], capture_output=True, text=True, check=True)
    assert remote.find(pattern, ".tar", "data.root") == expected.stdout.split()


def test_patterns_of_shards(source, shard_set, tmp_path):
    folder, _ = shard_set(tmp_path)
    (folder / "notes.txt").write_text("")
    (folder / ".half-written.tar").write_text("")
    expected = [f"{folder}/train-{i:03}.tar" for i in range(3)]
    for pattern in (folder, f"{folder}/train-*.tar", f"{folder}/train-{{000..002}}.tar", expected, f"file://{folder}"):
        assert [shard.place for shard in source(pattern).pools()[0].shards] == expected
    both = source(f"{folder}/train-000.tar", validation_root=f"{folder}/train-001.tar").pools()
    assert [pool.ids[0].partition("/")[0] for pool in both] == ["train-000.tar", "train-001.tar"]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("{folder}/none", r"data.root: .*/none is not there .*: give the path of a file"),
        ("{folder}/train-{{000..003}}.tar", r"data.root: .*train-003.tar is not there"),
        ("{folder}/*.tgz", r"data.root=.* means no .tar file: give a folder"),
        ("{folder}/train-00{{0,0}}.tar", r"means .*train-000.tar twice"),
        ("pipe:curl https://host/a.tar", r"data.root=pipe:.* would run a command: give a path or a URL"),
        ("s5://bucket/a.tar", r"data.root=s5://bucket/a.tar cannot be opened: .*s5"),
        ("https://me:word@host/a.tar", r"data.root=https://host/a.tar has credentials in it"),
    ],
)
def test_roots_that_are_no_shards_are_refused(source, shard_set, tmp_path, root, message):
    folder, _ = shard_set(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        source(root.format(folder=folder)).pools()
    assert "word" not in str(caught.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"x"}, r"data.root: no image in 1 shards"),
        ({"a.jpg": b"", "a.cls": b"dog"}, r"bad.tar: a.cls has b'dog' for a class index"),
        ({"a.jpg": b"", "a.cls": b"-1"}, r"a.cls has -1 for a class index"),
        ({"a.jpg": b"", "a.cls": b"99999999999999999999"}, r"a.cls has 9+ for a class index"),
        ({"a.jpg": b"", "a.json": b'{"label": "dog"}'}, r"a.json has 'dog' for a class index"),
        ({"a.jpg": b"", "a.json": b"[" * 100_000}, r"a.json has b'\[+' for a class index"),
        ({"a.jpg": b"", "a.cls": b"1", "b.jpg": b""}, r"1 of 2 images have no .cls or .json label .* is bad.tar/b.jpg"),
    ],
)
def test_shards_with_bad_labels_are_refused(source, tmp_path, members, message):
    with tarfile.open(tmp_path / "bad.tar", "w") as shard:
        for name, content in members.items():
            add(shard, name, content)
    with pytest.raises(UserError, match=message):
        source(tmp_path).pools()


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100, gzip.compress(bytes(2048), mtime=0), "folder"])
def test_a_shard_that_is_no_tar_file_is_refused(source, tmp_path, content):
    if content == "folder":
        (tmp_path / "a.tar").mkdir()
    else:
        (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"data.root.*a.tar cannot be read as an uncompressed tar file|no .tar file"):
        source(f"{tmp_path}/a.tar").pools()


@pytest.mark.parametrize("size", [-1024, 2**40, 2**63])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_that_leads_elsewhere_ends_the_shard(source, tmp_path, size, kind, caplog):
    """Sizes that no member has: a negative one would let tarfile read the same headers for ever."""
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            add(shard, name, b"x" * 600)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    header = tarfile.TarInfo("b.jpg")
    header.size, header.type = size, kind
    content[1536:2048] = header.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(content)
    pool, _ = source(tmp_path).pools()
    assert list(pool.ids) == ["a.tar/a.jpg"]
    assert "a.tar: it ends early" in caplog.text


def test_truncated_and_deleted_shards(source, shard_set, tmp_path, caplog):
    folder, _ = shard_set(tmp_path)
    first, second, third = sorted(folder.iterdir())
    # Cut off within an image before it is indexed: the images before are known, and it says so.
    with tarfile.open(second) as shard:
        whole, fourth = (shard.getmember(name) for name in shard.getnames()[5:7])
    second.write_bytes(second.read_bytes()[: fourth.offset_data + 100])
    pool, _ = source(folder).pools()
    assert [pool.ids[i].partition("/")[0] for i in (4, 5, 7, 8, 9)] == [
        "train-000.tar", "train-001.tar", "train-001.tar", "train-002.tar", "train-002.tar",
    ]  # fmt: skip
    assert len(pool.ids) == 5 + 3 + 2
    assert (
        f"train-001.tar: it ends early (unexpected end of data): what followed {whole.name} is missing" in caplog.text
    )
    # Cut off after it was indexed, and gone: its images cannot be read, and are left out.
    first.write_bytes(first.read_bytes()[: int(pool.offsets[2]) + 10])
    third.unlink()
    for index in (2, 3, 8, 9):
        with pytest.raises(OSError, match=r"bytes before the image does|No such file"):
            pool.image(index)
    assert pool.image(1).size == pool.image(5).size == (48, 40)


def test_unreadable_images_of_shards_are_counted(source, shard_set, tmp_path):
    folder, _ = shard_set(tmp_path)
    made = source(folder, fit=4, probe=4, validation=4)
    splits = make_splits(made, 0)
    sorted(folder.iterdir())[1].unlink()
    bad = [
        split.name(item.position)
        for split in splits.values()
        for item in map(split.__getitem__, range(4))
        if isinstance(item, Unreadable)
    ]
    assert sorted(bad) == sorted(name for name in splits["fit"].pool.ids if name.startswith("train-001.tar/"))


def test_each_shard_is_indexed_once(source, shard_set, tmp_path, monkeypatch):
    folder, images = shard_set(tmp_path)
    cache = Cache(str(tmp_path / "cache"))
    read, opened = shards.read_index, []
    monkeypatch.setattr(shards, "read_index", lambda file, name: opened.append(name[-7:]) or read(file, name))
    one, _ = source(folder, cache=cache).pools()
    assert opened == ["000.tar", "001.tar", "002.tar"]
    two, _ = source(folder, cache=cache).pools()
    assert len(opened) == 3
    assert (one.fingerprint, list(one.ids), list(one.labels)) == (two.fingerprint, list(two.ids), list(two.labels))
    same_images(two, images)
    with tarfile.open(folder / "train-001.tar", "a") as shard:
        add(shard, "new.jpg", b"")
        add(shard, "new.cls", b"0")
    three, _ = source(folder, cache=cache).pools()
    assert opened[3:] == ["001.tar"]
    assert three.ids[10] == "train-001.tar/new.jpg"
    assert three.fingerprint != one.fingerprint


def test_processes_side_by_side_index_each_shard_once(source, shard_set, tmp_path, monkeypatch):
    folder, _ = shard_set(tmp_path)
    context = multiprocessing.get_context("fork")
    opened, ready = context.SimpleQueue(), context.Barrier(2)
    read = shards.read_index
    monkeypatch.setattr(shards, "read_index", lambda file, name: opened.put(name[-7:]) or read(file, name))

    def pools():
        made = source(folder, cache=Cache(str(tmp_path / "cache")))
        ready.wait(30)
        assert len(made.pools()[0].ids) == 12

    processes = [context.Process(target=pools) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(opened.get() for _ in range(3)) == ["000.tar", "001.tar", "002.tar"]
    assert opened.empty()


def positions_read(pool, workers):
    """Reads the pool as the job does, in the pool's order; the content of every image by its index."""
    loader = DataLoader(Items(pool), batch_size=2, num_workers=workers, collate_fn=list)
    return [item for batch in loader for item in batch]


class Items(torch.utils.data.Dataset):
    def __init__(self, pool):
        self.pool = pool

    def __len__(self):
        return len(self.pool.ids)

    def __getitem__(self, index):
        return index, self.pool.image(index).tobytes()


@pytest.mark.parametrize("where", ["disk", "server"])
def test_two_workers_read_every_image_once(source, shard_set, serve, tmp_path, where):
    folder, _ = shard_set(tmp_path)
    url, _ = serve(folder)
    pool, _ = source(folder if where == "disk" else f"{url}/train-{{000..002}}.tar").pools()
    pool.image(0)  # opens files, and fsspec's thread, before the fork
    read = positions_read(pool, workers=2)
    assert [index for index, _ in read] == list(range(12))
    assert dict(read) == dict(positions_read(source(folder).pools()[0], workers=0))


@pytest.mark.parametrize("ranges", [True, False])
def test_shards_from_a_server(source, shard_set, serve, tmp_path, ranges):
    """Every shard is downloaded once for the index and once for the pass, whichever worker reads; two are kept."""
    folder, images = shard_set(tmp_path)
    url, asked = serve(folder, ranges)
    cache = Cache(str(tmp_path / "cache"))
    made = source(f"{url}/train-{{000..002}}.tar", cache=cache, shards_kept=2)
    pool, _ = made.pools()
    assert [shard.parts for shard in pool.shards] == [ranges] * 3
    assert set(whole(asked).values()) <= ({1} if ranges else {1, 2})  # without ranges, trying them asks for it all
    kept = pool.store.folder
    assert len(list(kept.glob("*.file"))) == 2
    asked.clear()
    read = positions_read(pool, workers=2)
    assert sorted(index for index, _ in read) == list(range(12))
    assert set(whole(asked)) <= {f"/train-{i:03}.tar" for i in range(3)}
    assert max(whole(asked).values()) == 1
    assert len(list(kept.glob("*.file"))) <= 2
    same_images(pool, images)
    asked.clear()
    again, _ = source(f"{url}/train-{{000..002}}.tar", cache=cache).pools()
    assert not whole(asked) or not ranges
    assert again.fingerprint == pool.fingerprint
    assert not list(again.store.folder.iterdir())
    del pool, made, read
    gc.collect()
    assert not kept.exists()


def test_single_images_of_a_server_come_without_their_shard(source, shard_set, serve, tmp_path, monkeypatch):
    folder, _ = shard_set(tmp_path)
    cache = Cache(str(tmp_path / "cache"))
    url, asked = serve(folder)
    source(f"{url}/train-{{000..002}}.tar", cache=cache).pools()
    pool, _ = source(f"{url}/train-{{000..002}}.tar", cache=cache).pools()
    monkeypatch.setattr(shards, "ROUND_TRIP_BYTES", pool.shards[0].size // 3)
    asked.clear()
    reference, _ = source(folder).pools()
    for index in (0, 6, 1, 7, 11, 2):
        assert pool.image(index).tobytes() == reference.image(index).tobytes()
    assert not whole(asked)
    assert len(asked) == 6
    # The fourth image of a shard: by now the shard would have cost as much.
    pool.image(3)
    pool.image(4)
    assert whole(asked) == {"/train-000.tar": 1}
    assert len(asked) == 7


def test_the_next_shard_is_downloaded_ahead(source, shard_set, serve, tmp_path, monkeypatch):
    folder, _ = shard_set(tmp_path)
    url, asked = serve(folder)
    cache = Cache(str(tmp_path / "cache"))
    source(f"{url}/train-{{000..002}}.tar", cache=cache).pools()
    pool, _ = source(f"{url}/train-{{000..002}}.tar", cache=cache).pools()
    monkeypatch.setattr(shards, "IN_A_ROW", 3)
    started = []

    class Now(threading.Thread):
        def start(self):
            started.append(self)
            self.run()

    monkeypatch.setattr(shards, "threading", SimpleNamespace(Thread=Now))
    for index in (0, 1):
        pool.image(index)
    assert not started
    asked.clear()
    for index in (2, 3, 4):
        pool.image(index)
    assert whole(asked) == {"/train-001.tar": 1}
    assert len(started) == 1
    pool.image(5)
    assert whole(asked) == {"/train-001.tar": 1}


def test_downloads_that_fail_are_tried_again(source, shard_set, serve, tmp_path):
    folder, images = shard_set(tmp_path)
    failures = Counter()

    def spoil(handler):
        """Every file fails twice: no answer, then half of one."""
        if handler.headers.get("Range"):
            return False
        failures[handler.path] += 1
        if failures[handler.path] == 1:
            handler.send_error(503)
        elif failures[handler.path] == 2:
            content = Path(handler.translate_path(handler.path)).read_bytes()
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[:1000])
            handler.close_connection = True
        return failures[handler.path] < 3

    url, _ = serve(folder, spoil=spoil)
    same_images(source(f"{url}/train-{{000..002}}.tar").pools()[0], images)
    assert set(failures.values()) == {3}


@pytest.mark.parametrize(("status", "tries"), [(500, 3), (403, 1)])
def test_a_download_that_goes_on_failing_is_an_error(source, shard_set, serve, tmp_path, status, tries):
    folder, _ = shard_set(tmp_path)
    spoiled = []

    def spoil(handler):
        if handler.headers.get("Range"):
            return False
        spoiled.append(handler.path)
        handler.send_error(status)
        return True

    url, _ = serve(folder, spoil=spoil)
    with pytest.raises(UserError) as caught:
        source(f"{url}/train-000.tar?token=secret").pools()
    assert str(caught.value).startswith(f"data.root: {url}/train-000.tar cannot be read")
    assert f"{status}" in str(caught.value)
    assert "check the address" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(spoiled) == tries


def test_a_server_that_is_not_there_is_an_error(source, shard_set, serve, tmp_path):
    folder, _ = shard_set(tmp_path)
    url, _ = serve(folder)
    with pytest.raises(UserError, match=r"data.root: http://.*/train-009.tar cannot be read \(.*404"):
        source(f"{url}/train-009.tar").pools()
    with pytest.raises(UserError, match=r"data.root: http://127.0.0.1:1/a.tar cannot be read in 3 tries"):
        source("http://127.0.0.1:1/a.tar").pools()


def test_a_full_disk_is_an_error(source, shard_set, serve, tmp_path, monkeypatch):
    folder, _ = shard_set(tmp_path)
    url, _ = serve(folder)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote, "write_file", full)
    with pytest.raises(
        UserError, match=r"has no room for data.root: http://.*: set TMPDIR to a folder on a larger disk"
    ):
        source(f"{url}/train-000.tar").pools()


def test_a_servers_folder_and_its_globs(source, shard_set, serve, tmp_path):
    shard_set(tmp_path)
    url, _ = serve(tmp_path)
    for root in (f"{url}/shards/", f"{url}/shards", f"{url}/shards/train-*.tar"):
        assert [shard.place for shard in source(root).pools()[0].shards] == [
            f"{url}/shards/train-{i:03}.tar" for i in range(3)
        ]


def test_pools_can_be_sent_to_other_processes(source, shard_set, serve, tmp_path):
    folder, _ = shard_set(tmp_path)
    url, _ = serve(folder)
    for root in (folder, f"{url}/train-{{000..002}}.tar"):
        pool, _ = source(root).pools()
        pool.image(3)
        copy = pickle.loads(pickle.dumps(pool))
        assert list(copy.ids) == list(pool.ids)
        assert copy.image(3).tobytes() == pool.image(3).tobytes()
        del copy
        gc.collect()
        assert pool.image(6).size == (48, 40)


def test_images_of_shards_become_what_torchvision_makes_of_files(source, tmp_path):
    """Bit for bit, for the suite's own transform and for one that belongs to weights."""
    rows, columns = np.mgrid[0:375, 0:500]
    noise = np.random.default_rng(0).normal(0, 20, (375, 500, 3))
    scene = 128 + 90 * np.stack([np.sin(rows / 40), np.cos(columns / 25), np.sin((rows + columns) / 9)], 2) + noise
    Image.fromarray(scene.clip(0, 255).astype(np.uint8)).save(tmp_path / "photo.jpg", quality=90)
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        shard.add(tmp_path / "photo.jpg", "photo.jpg")
    pool, _ = source(tmp_path).pools()
    with Image.open(tmp_path / "photo.jpg") as photo:
        reference = ImageClassification(crop_size=224, resize_size=224)(photo.convert("RGB"))
        preset = ResNet18_Weights.DEFAULT.transforms()(photo.convert("RGB"))
    assert torch.equal(photograph_transform(224)(pool.image(0)), reference)
    assert torch.equal(ResNet18_Weights.DEFAULT.transforms()(pool.image(0)), preset)
    assert not torch.equal(reference, preset)


def test_the_job_runs_on_shards(run_job, shard_set, tmp_path):
    folder, _ = shard_set(tmp_path, size=32)
    results = run_job(
        "data=shards", f"data.root={folder}", "data.size=16", "data.workers=0", "estimator=a", "method=gradient",
        "model.training.epochs=1",
    )  # fmt: skip
    summary = json.loads((results / "summary.json").read_text())
    assert summary["splits"] == {"fit": 5, "probe": 5, "validation": 2}
    assert summary["unreadable"] == []
