"""Which files count as images, in folders and in shards, and what is said of the others."""

import io
import logging
import os
import socket
import tarfile

import numpy as np
import pytest
from PIL import Image, features

from pattern_bench.data.decode import decode
from pattern_bench.data.folder import FolderPool
from pattern_bench.data.image_files import counted, is_hidden, suffix_of, suffixes
from pattern_bench.data.shards import read_index
from pattern_bench.errors import UserError
from pattern_bench.storage.cache import Cache

HIDDEN = [".ipynb_checkpoints", "__MACOSX", "@eaDir", "._0.jpg", ".DS_Store", "Thumbs.db", "lost+found", "$RECYCLE.BIN",
          "System Volume Information", "#recycle", "desktop.ini", ".git", ".Trashes", "#snapshot"]  # fmt: skip


def picture(file, format=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format=format or "JPEG")


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("place", ["{}/0.jpg", "a/{}/0.jpg", "a/{}"])
def test_hidden_and_system_files_are_neither_classes_nor_images(tmp_path, caplog, name, place):
    picture(tmp_path / "root" / "b" / "0.jpg")
    picture(tmp_path / "root" / "a" / "0.jpg")
    picture(tmp_path / "root" / place.format(name))
    with caplog.at_level(logging.INFO):
        pool = FolderPool(str(tmp_path / "root"), "data.root")
    assert (list(pool.ids), list(pool.labels), pool.classes) == (["a/0.jpg", "b/0.jpg"], [0, 1], 2)
    assert [record.getMessage() for record in caplog.records] == [
        "data.root: 1 files or folders are left out: 1 hidden or of a system"
    ]


def test_a_root_below_a_hidden_folder_is_a_root(tmp_path):
    picture(tmp_path / ".cache" / "@eaDir" / "0.jpg")
    assert len(FolderPool(str(tmp_path / ".cache" / "@eaDir"), "data.root").ids) == 1


@pytest.mark.parametrize(
    "name", ["a.b", "..", ".", "recycle", "eaDir", "-x", "$5", "#1", "@home", "macosx", "_x", "~x"]
)
def test_other_names_are_not_hidden(name):
    assert not is_hidden(name)


WRITTEN = {".jpg": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".jpeg": "JPEG", ".gif": "GIF", ".tga": "TGA",
           ".bmp": "BMP", ".dib": "DIB", ".png": "PNG", ".apng": "PNG", ".ppm": "PPM", ".pcx": "PCX", ".ico": "ICO",
           ".tif": "TIFF",
           ".sgi": "SGI", ".rgb": "SGI", ".dds": "DDS", ".qoi": "QOI", ".im": "IM", ".mpo": "MPO"}  # fmt: skip
WRITTEN |= {".avif": "AVIF"} if features.check("avif") else {}
WRITTEN |= {".jp2": "JPEG2000", ".j2k": "JPEG2000"} if features.check("jpg_2000") else {}
WRITTEN |= {".webp": "WEBP"} if features.check("webp") else {}


@pytest.mark.parametrize("suffix", [*WRITTEN, ".JPE", ".Gif"])
def test_what_pillow_writes_and_reads_is_used_whatever_the_case(tmp_path, suffix):
    picture(tmp_path / f"0{suffix}", WRITTEN[suffix.lower()])
    pool = FolderPool(str(tmp_path), "data.root")
    assert list(pool.ids) == [f"0{suffix}"]
    assert pool.image(0).mode == "RGB"


@pytest.mark.parametrize(
    "suffix", [".pdf", ".eps", ".ps", ".mpg", ".h5", ".hdf", ".wmf", ".emf", ".grib", ".bufr", ".txt"]
)
def test_what_pillow_does_not_decode_by_itself_is_no_image(suffix):
    assert suffix not in suffixes()


def test_the_former_suffixes_are_still_images():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(IMG_EXTENSIONS) <= set(suffixes())


def test_what_is_left_out_is_counted_by_reason_and_kept_with_the_listing(tmp_path, caplog):
    root = tmp_path / "root"
    picture(root / "a" / "0.jpg")
    for name in ("1.heic", "2.HEIC", "notes.txt", "README", ".hidden"):
        (root / "a" / name).write_text("")
    os.utime(root, (1, 1))
    os.utime(root / "a", (1, 1))  # long ago, so that the listing is kept
    for _ in range(2):
        caplog.clear()
        FolderPool(str(root), "data.root", Cache(tmp_path / "cache"))
        assert [record.getMessage() for record in caplog.records] == [
            "data.root: 5 files or folders are left out: 4 of types that are no images here (.heic 2, no suffix 1, "
            ".txt 1), 1 hidden or of a system"
        ]
    with pytest.raises(UserError, match=r"data.strict=true, and data.root=.*does not read \(.heic 2\)"):
        FolderPool(str(root), "data.root", strict=True)
    for name in ("1.heic", "2.HEIC"):
        (root / "a" / name).unlink()
    assert len(FolderPool(str(root), "data.root", strict=True).ids) == 1


def test_a_folder_without_an_image_says_what_it_has_instead(tmp_path):
    (tmp_path / "a.heic").write_text("")
    with pytest.raises(UserError, match=r"holds no image \(1 files or folders are left out: .*.heic 1\)\): put files"):
        FolderPool(str(tmp_path), "data.root")


def shard(**members):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    content.seek(0)
    return content


def test_members_of_shards_follow_the_same_rules():
    image = io.BytesIO()
    Image.new("RGB", (9, 9)).save(image, "GIF")
    members = {"./a/0.gif": image.getvalue(), "./a/0.cls": b"1", "__MACOSX/a/._0.gif": b"x", "a/._0.jpg": b"x",
               "a/@eaDir/1.jpg": b"x", "a/2.heic": b"x", "a/2.cls": b"0", ".b/3.jpg": b"x"}  # fmt: skip
    tensors, metadata = read_index(shard(**members), "s.tar")
    assert bytes(tensors["names"].tolist()) == b"./a/0.gif"
    assert tensors["labels"].tolist() == [1]
    assert metadata["left_out"] == '{"hidden": 4, ".heic": 1}'


def test_counts_read_as_a_sentence():
    assert counted({}) == ""
    many = counted({f".x{i}": 20 - i for i in range(12)})
    assert many.endswith("and 4 more types)")
    assert suffix_of("a.JPG") == ".jpg"
    assert suffix_of(".jpg") == suffix_of("jpg") == suffix_of("a.") == "no suffix"
    with pytest.raises(OSError, match="PostScript"):
        decode(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"))


def test_what_is_no_file_is_counted_too(tmp_path, caplog, monkeypatch):
    root = tmp_path / "root"
    picture(root / "a" / "0.jpg")
    (root / "a" / "empty.png").mkdir()
    picture(root / "b.png" / "0.jpg")  # a folder of images all the same
    os.mkfifo(root / "a" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(root)  # its name may have a hundred bytes
        listening.bind("socket.png")
    (root / "a" / "up").symlink_to(root)
    pool = FolderPool(str(root), "data.root")
    assert list(pool.ids) == ["a/0.jpg", "b.png/0.jpg"]
    assert [record.getMessage() for record in caplog.records] == [
        "data.root: 4 files or folders are left out: 1 links to folders, which are not followed, 2 pipes, sockets, "
        "devices or links, 1 folders that are named as images and hold none"
    ]


def test_links_and_pipes_in_shards_are_counted():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.FIFOTYPE), ("c.jpg", tarfile.DIRTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type = kind
            tar.addfile(entry)
    content.seek(0)
    assert read_index(content, "s.tar")[1]["left_out"] == '{"no file": 2}'
