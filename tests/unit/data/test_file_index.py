import hashlib
import io
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from pattern_bench.data import file_index
from pattern_bench.data.file_index import Names, list_images, numbers, tensor_of
from pattern_bench.data.folder import FolderPool
from pattern_bench.storage.cache import Cache


@pytest.fixture
def tree(tmp_path):
    """Files below ``images``, all of a time long past."""

    def make(*names, root="images"):
        for name in names:
            file = tmp_path / root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(name.encode())
        settle(tmp_path / root)
        return tmp_path / root

    return make


def settle(root, time=1_600_000_000):
    for folder, _, names in os.walk(root):
        for name in names:
            os.utime(Path(folder) / name, (time, time), follow_symlinks=False)
        os.utime(folder, (time, time))


def by_brute_force(root):
    """Names and fingerprint as they were before listings were kept."""
    files = sorted(
        (Path(folder) / name).relative_to(root)
        for folder, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    )
    digest = hashlib.sha256()
    for path in files:
        stat = (root / path).stat()
        digest.update(f"{path.as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return [path.as_posix() for path in files], digest.hexdigest()


def test_a_listing_is_in_the_order_of_paths(tree):
    root = tree(
        "b/2.jpg", "b/10.JPG", "a.b/x.png", "a/z.webp", "a/y/w.tif", "a/y.jpg", "a-b/x.jpg", "Z.jpeg", "ä/ö.jpg",
        "no.txt",
    )  # fmt: skip
    (root / "empty").mkdir()
    (root / "folder.jpg").mkdir()
    (root / "elsewhere").symlink_to(root / "a")
    (root / "round").symlink_to("round")
    (root / "a" / "up").symlink_to(root)
    names, fingerprint = by_brute_force(root)
    found = list_images(root, None)
    assert (list(found.names), found.fingerprint) == (names, fingerprint)
    assert found.classes == ["a", "a-b", "a.b", "b", "ä"]
    first = [name.split("/")[0] if "/" in name else None for name in names]
    assert [found.classes[i] if i >= 0 else None for i in found.labels] == first


def test_links_to_folders_are_followed_where_asked(tree):
    root, other = tree("a/1.jpg", "b/1.jpg"), tree("2.jpg", "d/3.jpg", root="other")
    (root / "c").symlink_to(other)
    assert list(list_images(root, None).names) == ["a/1.jpg", "b/1.jpg"]
    found = list_images(root, None, follow_links=True)
    assert list(found.names) == ["a/1.jpg", "b/1.jpg", "c/2.jpg", "c/d/3.jpg"]
    assert list(found.labels) == [0, 1, 2, 2]


def test_names_that_are_no_text_and_links_to_nothing(tmp_path):
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    picture = Image.fromarray(np.zeros((4, 5, 3), dtype=np.uint8))
    content = io.BytesIO()
    picture.save(content, "png")
    with open(os.fsencode(tmp_path) + b"/h\xe9.png", "wb") as file:
        file.write(content.getvalue())
    pool = FolderPool(str(tmp_path), "data.root")
    assert list(pool.ids) == ["gone.jpg", "h\\xe9.png"]
    assert pool.image(1).size == (5, 4)
    with pytest.raises(OSError, match="gone"):
        pool.image(0)


def test_a_listing_is_kept(tree, cache, looked_into):
    root = tree("a/1.jpg", "b/c/2.jpg", "b/3.jpg")
    names, fingerprint = by_brute_force(root)
    looked_into.clear()
    first = list_images(root, cache)
    assert looked_into == ["images", "a", "b", "c"]
    second = list_images(root, cache)
    assert len(looked_into) == 4
    for found in (first, second):
        assert (list(found.names), found.fingerprint, found.classes) == (names, fingerprint, ["a", "b"])
        assert list(found.labels) == [0, 1, 1]
    list_images(root, cache, follow_links=True)
    list_images(root, None)
    assert len(looked_into) == 12


def _add(root):
    (root / "b/new.jpg").write_bytes(b"")


def _remove(root):
    (root / "b/c/2.jpg").unlink()


def _rename(root):
    (root / "a/1.jpg").rename(root / "a/0.jpg")


def _replace(root):
    (root / "new").write_bytes(b"other")
    (root / "new").rename(root / "a/1.jpg")


def _write_in_place(root):
    (root / "a/1.jpg").write_bytes(b"a/1.jpG")


def _add_folder(root):
    (root / "d").mkdir()
    (root / "d/4.jpg").write_bytes(b"")


def _remove_folder(root):
    (root / "a/1.jpg").unlink()
    (root / "a").rmdir()


@pytest.mark.parametrize(
    "change", [_add, _remove, _rename, _replace, _write_in_place, _add_folder, _remove_folder], ids=lambda f: f.__name__
)
def test_a_kept_listing_is_not_used_after_a_change(tree, cache, change):
    root = tree("a/1.jpg", "b/c/2.jpg", "b/3.jpg")
    before = list_images(root, cache)
    change(root)
    after = list_images(root, cache)
    assert (list(after.names), after.fingerprint) == by_brute_force(root)
    assert after.fingerprint != before.fingerprint


def test_of_many_files_some_are_compared(tree, cache, monkeypatch):
    root = tree(*(f"{i // 10}/{i}.jpg" for i in range(100)))
    before = list_images(root, cache).fingerprint
    monkeypatch.setattr(file_index, "COMPARED", 20)
    compared, measure = [], file_index._size_and_time
    monkeypatch.setattr(file_index, "_size_and_time", lambda file: compared.append(file) or measure(file))
    assert list_images(root, cache).fingerprint == before
    assert len(set(compared)) == 20
    for i in range(10):
        (root / f"3/3{i}.jpg").write_bytes(b"a class that was written anew")
    assert list_images(root, cache).fingerprint != before


def test_a_folder_that_may_still_be_changing_is_listed_again(tree, cache, looked_into):
    root = tree("a/1.jpg")
    os.utime(root / "a")  # now
    looked_into.clear()
    list_images(root, cache)
    list_images(root, cache)
    assert looked_into == ["images", "a"] * 2


def test_a_folder_that_cannot_be_read_is_left_out_and_tried_again(tree, cache, monkeypatch, caplog):
    root = tree("a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def refuse(folder):
        if folder.endswith(b"/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    with monkeypatch.context() as patch:
        patch.setattr(file_index.os, "scandir", refuse)
        assert list(list_images(root, cache).names) == ["a/1.jpg"]
    assert f"{root}/b is left out: it cannot be read (Permission denied)" in caplog.text
    assert list(list_images(root, cache).names) == ["a/1.jpg", "b/2.jpg"]


def test_processes_side_by_side_list_once(tree, tmp_path, monkeypatch):
    root = tree("a/1.jpg", "b/2.jpg")
    context = multiprocessing.get_context("fork")
    walked, ready, walk = context.SimpleQueue(), context.Barrier(2), file_index._walk
    monkeypatch.setattr(file_index, "_walk", lambda *arguments: walked.put(1) or walk(*arguments))

    def work():
        cache = Cache(str(tmp_path / "cache"))
        ready.wait(30)
        assert len(list_images(root, cache).names) == 2

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert walked.get() == 1
    assert walked.empty()


def test_names_are_a_sequence():
    words = ["", "one", "zwö", "", "four"]
    content = [word.encode() for word in words]
    text, ends = tensor_of(bytearray(b"".join(content))), torch.tensor([len(word) for word in content]).cumsum(0)
    names = Names(text, ends)
    assert list(names) == words
    assert (names[-1], names[1:4], names.index("zwö"), len(names)) == ("four", words[1:4], 2, 5)
    with pytest.raises(IndexError):
        names[5]
    headed = Names(text, ends, ["x/", "unused/", "y/"], [0, 3, 3])
    assert list(headed) == ["x/", "x/one", "x/zwö", "y/", "y/four"]
    assert list(pickle.loads(pickle.dumps(headed))) == list(headed)
    assert list(names.below("z/")) == [f"z/{word}" for word in words]
    assert list(Names(tensor_of(bytearray()), torch.zeros(0, dtype=torch.int64))) == []
    assert list(numbers(torch.tensor([3, -1]))) == [3, -1]
