"""ImageNet in torchvision's layout."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchvision import datasets

from pattern_bench.configuration.build import build
from pattern_bench.data import imagenet as imagenet_module
from pattern_bench.data.imagenet import _Layout
from pattern_bench.data.splits import make_splits
from pattern_bench.errors import UserError


def splits(configure, *overrides, seed=0):
    return make_splits(build(configure(*overrides).data), seed)


def test_imagenet_through_torchvision(configure, photographs, tmp_path):
    for part in ("train", "val"):
        for i, wnid in enumerate(("n01440764", "n01443537")):
            photographs(tmp_path / part / wnid, count=3 + i, classes=0)
    torch.save(({"n01440764": ("tench",), "n01443537": ("goldfish",)}, ["n01440764"] * 7), tmp_path / "meta.bin")
    parts = splits(configure, "data=imagenet", f"data.root={tmp_path}", "data.fit=3", "data.probe=4")
    assert [len(part) for part in parts.values()] == [3, 4, 7]
    assert parts["validation"].pool.ids[0] == "val/n01440764/0.jpg"
    with pytest.raises(UserError, match=r"data.root=.* has no ImageNet"):
        splits(configure, "data=imagenet", f"data.root={tmp_path}/no")


def settle(root, time=1_600_000_000):
    for folder, _, names in os.walk(root):
        for name in names:
            os.utime(Path(folder) / name, (time, time), follow_symlinks=False)
        os.utime(folder, (time, time))


WNIDS = ("n01443537", "n01440764", "n02119789")


@pytest.fixture
def imagenet(photographs, tmp_path):
    root = tmp_path / "imagenet"
    for part in ("train", "val"):
        for i, wnid in enumerate(WNIDS):
            photographs(root / part / wnid, count=3 + i, classes=0, size=20)
    names = {wnid: (wnid.upper(),) for wnid in WNIDS}
    torch.save((names, list(WNIDS)), root / "meta.bin")
    return root


@pytest.fixture(scope="module")
def settings(configure):
    return configure("data=imagenet", "data.root=ROOT").data


@pytest.fixture
def source(settings):
    def make(root, cache=None):
        made = build(OmegaConf.merge(settings, {"root": str(root)}))
        made.cache = cache
        return made

    return make


def test_imagenet_is_torchvisions(imagenet, source, cache, looked_into):
    settle(imagenet)
    pools = source(imagenet, cache).pools()
    looked_into.clear()
    again = source(imagenet, cache).pools()
    assert set(looked_into) <= {"train", "val"}  # torchvision's look at the classes
    for part, pool, kept in zip(("train", "val"), pools, again, strict=True):
        reference = datasets.ImageNet(imagenet, split=part)
        assert list(pool.ids) == [Path(file).relative_to(imagenet).as_posix() for file, _ in reference.imgs]
        assert list(pool.labels) == reference.targets
        assert pool.classes == len(reference.classes) == 3
        assert all(pool.image(i).tobytes() == reference[i][0].tobytes() for i in range(len(reference)))
        assert (list(kept.ids), list(kept.labels), kept.fingerprint) == (
            list(pool.ids), list(pool.labels), pool.fingerprint,
        )  # fmt: skip


def test_imagenets_fingerprint_follows_the_images(imagenet, source, cache):
    settle(imagenet)
    before = source(imagenet, cache).pools()[1].fingerprint
    file = imagenet / "val" / WNIDS[0] / "0.jpg"
    file.write_bytes(file.read_bytes() + b"\0")
    assert source(imagenet, cache).pools()[1].fingerprint != before


def _empty(root):
    (root / "val" / WNIDS[0]).rename(root / "elsewhere")
    (root / "val" / WNIDS[0]).mkdir()


def _stray(root):
    (root / "train/stray.jpg").write_bytes(b"")


def _unknown(root):
    (root / "train/n00000000").mkdir()


def _no_meta(root):
    (root / "meta.bin").unlink()


def _bad_meta(root):
    (root / "meta.bin").write_bytes(b"no archive")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_empty, r"data.root=.*: val/n01443537 holds no image: fill it"),
        (_stray, r"data.root=.*: train/stray.jpg lies in no class's folder"),
        (_unknown, r"data.root=.*: train/ has a folder 'n00000000', which is no class of meta.bin"),
        (_no_meta, r"data.root=.* has no ImageNet \(The archive ILSVRC2012_devkit_t12.tar.gz is not present"),
        (_bad_meta, r"data.root=.* has no ImageNet"),
    ],
)  # fmt: skip
def test_what_is_not_imagenet_is_refused(imagenet, source, change, message):
    change(imagenet)
    with pytest.raises(UserError, match=message):
        source(imagenet).pools()


def _archive(file, members):
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_imagenets_archives_are_unpacked(imagenet, source, monkeypatch):
    """The archives as they are distributed: one per class in one, and validation images by their order."""
    expected = [list(pool.labels) for pool in source(imagenet).pools()]
    images = [
        [(file.name, file.read_bytes()) for file in sorted((imagenet / "val" / wnid).iterdir())] for wnid in WNIDS
    ]
    for wnid, content in zip(WNIDS, images, strict=True):
        _archive(imagenet / f"{wnid}.tar", {f"{wnid}_{name}": data for name, data in content})
    _archive(
        imagenet / "ILSVRC2012_img_train.tar",
        {f"{wnid}.tar": (imagenet / f"{wnid}.tar").read_bytes() for wnid in WNIDS},
    )
    every = [(wnid, data) for wnid, content in zip(WNIDS, images, strict=True) for _, data in content]
    _archive(imagenet / "ILSVRC2012_img_val.tar", {f"val_{i:05}.jpg": data for i, (_, data) in enumerate(every)})
    names, _ = torch.load(imagenet / "meta.bin")
    torch.save((names, [wnid for wnid, _ in every]), imagenet / "meta.bin")
    for part in ("train", "val"):
        (imagenet / part).rename(imagenet / f"old-{part}")
    monkeypatch.setattr(datasets.imagenet, "check_integrity", lambda file, *_: Path(file).exists())
    assert [list(pool.labels) for pool in source(imagenet).pools()] == expected


@pytest.mark.parametrize("name", ["../../outside.JPEG", "/{tmp}/outside.JPEG"])
def test_archives_cannot_write_outside_the_root(imagenet, source, monkeypatch, tmp_path, name):
    """Also with the torchvision of before 0.29, which unpacks without a filter."""
    (imagenet / "train").rename(imagenet / "old")
    _archive(imagenet / "ILSVRC2012_img_train.tar", {name.format(tmp=tmp_path): b"x"})
    monkeypatch.setattr(datasets.imagenet, "check_integrity", lambda file, *_: Path(file).exists())

    def old(from_path, to_path, compression):
        with tarfile.open(from_path) as archive:
            archive.extractall(to_path)

    monkeypatch.setitem(datasets.utils._ARCHIVE_EXTRACTORS, ".tar", old)
    kept = tarfile.TarFile.__dict__.get("extraction_filter")
    if name.startswith(".."):
        with pytest.raises(UserError, match=r"has no ImageNet \(.*outside"):
            source(imagenet).pools()
    else:
        with pytest.raises(UserError, match=r"data.root=.*"):  # unpacked, without the leading slash, into train/
            source(imagenet).pools()
    assert not (tmp_path / "outside.JPEG").exists()
    assert tarfile.TarFile.__dict__.get("extraction_filter") is kept
    with imagenet_module.safe_extraction(), tarfile.open(imagenet / "ILSVRC2012_img_train.tar") as archive:
        assert archive.extraction_filter is tarfile.data_filter


def test_imagenets_folders_are_its_classes_alone(tmp_path):
    for name in ("n01440764", "n01443537", ".ipynb_checkpoints", "@eaDir"):
        (tmp_path / name).mkdir()
    found = _Layout.find_classes(_Layout.__new__(_Layout), str(tmp_path))
    assert found == (["n01440764", "n01443537"], {"n01440764": 0, "n01443537": 1})
