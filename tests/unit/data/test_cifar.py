"""CIFAR-10's binary version: the same images as torchvision's pickles, whole files only, and archives that stay put."""

import functools
import hashlib
import http.server
import io
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from helpers.cifar_files import RECORDS, batches, binary, write_binary, write_pickles
from torchvision import datasets

from pattern_bench.configuration.build import build
from pattern_bench.data import cifar
from pattern_bench.data.splits import make_splits
from pattern_bench.errors import UserError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Files of 4 records instead of 10,000."""
    monkeypatch.setattr(cifar, "RECORDS", RECORDS)


@pytest.fixture
def pools(configure):
    def make(root, *overrides):
        return build(configure("data=cifar10", f"data.root={root}", *overrides).data).pools()

    return make


def archive(members):
    """A .tar.gz: bytes are a file, a TarInfo is taken as it is."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        folder = tarfile.TarInfo(cifar.FOLDER)
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
        for name, content in members.items():
            if isinstance(content, bytes):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                tar.addfile(content)
    return file.getvalue()


def whole():
    return {f"{cifar.FOLDER}/{name}": content for name, content in binary().items()}


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serves an archive on this machine, in the place of the real one; returns the paths asked for."""
    servers = []

    def serve(content, md5=None):
        folder = tmp_path / "server"
        folder.mkdir()
        (folder / "cifar-10-binary.tar.gz").write_bytes(content)
        asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                asked.append(self.path)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(cifar, "URL", f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz")
        monkeypatch.setattr(cifar, "MD5", md5 or hashlib.md5(content).hexdigest())
        return asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_images_labels_and_order_are_torchvisions(pools, tmp_path, monkeypatch):
    ours = pools(write_binary(tmp_path / "binary"))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    root = write_pickles(tmp_path / "pickles")
    for pool, theirs in zip(ours, (datasets.CIFAR10(root), datasets.CIFAR10(root, train=False)), strict=True):
        assert len(pool.ids) == len(theirs) == (20 if theirs.train else 4)
        assert pool.labels == theirs.targets
        assert pool.classes == 10
        for index in range(len(theirs)):
            assert pool.image(index).mode == "RGB"
            assert np.array_equal(pool.image(index), theirs[index][0])


def test_splits_and_transform(configure, tmp_path):
    source = build(configure("data=cifar10", f"data.root={write_binary(tmp_path)}").data)
    parts = make_splits(source, 0)
    assert [len(part) for part in parts.values()] == [10, 10, 4]
    part = parts["validation"]
    part.transform = source.transform()
    batch = part.batch(range(4))
    assert batch.images.shape == (4, 3, 32, 32)
    assert batch.targets.tolist() == [part.pool.labels[index] for index in part.indices]
    pixels = np.asarray(part.pool.image(part.indices[0])) / 255
    expected = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    torch.testing.assert_close(batch.images[0].permute(1, 2, 0).double(), torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_fingerprint_follows_every_byte(pools, tmp_path):
    root = write_binary(tmp_path)
    train, test = (pool.fingerprint for pool in pools(root))
    assert [pool.fingerprint for pool in pools(root)] == [train, test]
    assert train != test
    file = root / cifar.FOLDER / "data_batch_3.bin"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    changed, same = (pool.fingerprint for pool in pools(root))
    assert changed != train
    assert same == test


@pytest.mark.parametrize("size", [0, 3073 * RECORDS - 1, 3073 * RECORDS + 1, 3074 * RECORDS])
def test_a_file_of_another_size_is_refused_by_name(pools, tmp_path, size):
    file = write_binary(tmp_path) / cifar.FOLDER / "data_batch_2.bin"
    file.write_bytes(bytes(size))
    with pytest.raises(UserError, match=rf"data_batch_2.bin has {size} bytes instead of 12292: remove .*data.download"):
        pools(tmp_path)


def test_a_missing_file_and_an_impossible_label_are_refused_by_name(pools, tmp_path):
    file = write_binary(tmp_path) / cifar.FOLDER / "test_batch.bin"
    file.write_bytes(b"\x0b" + file.read_bytes()[1:])
    with pytest.raises(UserError, match=r"test_batch.bin has the label 11"):
        pools(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"test_batch.bin cannot be read \(No such file"):
        pools(tmp_path)


def test_pickles_are_refused_with_the_archive_to_take_instead(pools, tmp_path):
    root = write_pickles(tmp_path)
    with pytest.raises(UserError, match=r"data.root=.* has no cifar-10-batches-bin but .* run code .*binary.tar.gz"):
        pools(root)


def test_no_pickle_is_ever_read(pools, tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a pickle was loaded")

    write_pickles(write_binary(tmp_path))
    monkeypatch.setattr(pickle, "load", forbidden)
    monkeypatch.setattr(pickle, "loads", forbidden)
    assert len(pools(tmp_path)[0].ids) == 20


def test_nothing_there_is_refused_with_the_remedy(pools, tmp_path):
    with pytest.raises(UserError, match=r"data.root=.*/no has no cifar-10-batches-bin: .*data.download=true"):
        pools(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_download_once_and_offline_afterwards(pools, served, tmp_path):
    asked, root = served(archive(whole())), tmp_path / "new" / "data"
    train, test = pools(root, "data.download=true")
    assert train.labels == [int(label) for labels, _ in batches()[:5] for label in labels]
    assert len(asked) > 0
    asked.clear()
    assert pools(root, "data.download=true")[1].fingerprint == test.fingerprint
    assert pools(root)[0].fingerprint == train.fingerprint
    assert not asked
    # The archive is kept: it is unpacked again without a network.
    for file in (root / cifar.FOLDER).iterdir():
        file.unlink()
    (root / cifar.FOLDER).rmdir()
    assert pools(root, "data.download=true")[0].fingerprint == train.fingerprint
    assert not asked


def left(root):
    """What lies below root, but for the archive and the lock beside it."""
    return sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*") if "cifar-10-binary.tar.gz" not in path.name
    )


def test_a_download_with_another_checksum_is_refused_and_not_unpacked(pools, served, tmp_path):
    served(archive(whole()), md5="0" * 32)
    with pytest.raises(UserError, match=r"data.download=true, but .* cannot be brought to .*corrupted.*0{32}"):
        pools(tmp_path / "data", "data.download=true")
    assert left(tmp_path / "data") == []


def test_no_network_is_one_error(pools, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(cifar, "URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    with pytest.raises(UserError, match=r"data.download=true, but http.* cannot be brought to data.root=.*refused"):
        pools(tmp_path / "data", "data.download=true")


def test_an_archive_cut_short_leaves_no_folder(pools, served, tmp_path):
    served(archive(whole())[:-3000])
    with pytest.raises(UserError, match=r"data.download=true, but"):
        pools(tmp_path / "data", "data.download=true")
    assert left(tmp_path / "data") == []


def test_an_archive_with_other_content_leaves_no_folder(pools, served, tmp_path):
    served(archive({})[:20] + b"\xff" * 50)
    with pytest.raises(UserError, match=r"data.download=true, but"):
        pools(tmp_path / "data", "data.download=true")
    assert left(tmp_path / "data") == []


def link(name, kind, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "name",
    ["../evil", "cifar-10-batches-bin/../../evil", "/{outside}/evil", "other/evil", "cifar-10-batches-bin/deep/evil"],
)
def test_an_archive_that_reaches_elsewhere_is_refused_and_writes_nothing(pools, served, tmp_path, name):
    name = name.format(outside=tmp_path)
    served(archive({**whole(), name: b"evil"}))
    with pytest.raises(UserError, match=r"holds .*evil, which is no file of cifar-10-batches-bin: nothing"):
        pools(tmp_path / "data", "data.download=true")
    assert left(tmp_path / "data") == []
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"), (tarfile.SYMTYPE, "../../outside"), (tarfile.SYMTYPE, "test_batch.bin"),
        (tarfile.LNKTYPE, "../outside"), (tarfile.FIFOTYPE, ""), (tarfile.CHRTYPE, ""),
    ],
)  # fmt: skip
def test_links_and_devices_in_an_archive_are_refused(pools, served, tmp_path, kind, target):
    served(archive({**whole(), "link": link(f"{cifar.FOLDER}/data_batch_1.bin", kind, target)}))
    with pytest.raises(UserError, match=r"holds cifar-10-batches-bin/data_batch_1.bin, which is no file"):
        pools(tmp_path / "data", "data.download=true")
    assert left(tmp_path / "data") == []


def test_a_link_in_the_place_of_the_folder_is_refused(pools, served, tmp_path):
    (tmp_path / "outside").mkdir()
    served(archive({"link": link(cifar.FOLDER, tarfile.SYMTYPE, str(tmp_path / "outside")), **whole()}))
    with pytest.raises(UserError, match=r"nothing was unpacked"):
        pools(tmp_path / "data", "data.download=true")
    assert list((tmp_path / "outside").iterdir()) == []
