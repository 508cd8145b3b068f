import math

import pytest
import torch

from pattern_bench.configuration.build import build
from pattern_bench.data.splits import Unreadable, make_splits
from pattern_bench.errors import UserError


def splits(configure, *overrides, seed=0):
    return make_splits(build(configure(*overrides).data), seed)


def test_splits_share_no_image_and_lose_none(configure):
    parts = splits(configure, "data=digits")
    indices = [i for part in parts.values() for i in part.indices.tolist()]
    assert sorted(indices) == list(range(1797))
    assert [len(parts[name]) for name in ("fit", "probe", "validation")] == [719, 719, 359]
    assert torch.equal(splits(configure, "data=digits")["fit"].indices, parts["fit"].indices)
    assert not torch.equal(splits(configure, "data=digits", seed=1)["fit"].indices, parts["fit"].indices)


def test_split_sizes_are_shares_or_counts(configure):
    parts = splits(configure, "data=digits", "data.limit=100", "data.fit=30", "data.probe=0.5", "data.validation=7")
    assert [len(parts[name]) for name in ("fit", "probe", "validation")] == [30, 50, 7]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.fit=1700"], r"data.fit=1700.* ask for 2778 images, but data=digits has 1797"),
        (["data.limit=5"], r"fewer than 2 images .*data.limit=5"),
        (["data.limit=0"], r"data.limit=0 leaves no image"),
        (["data.probe=-0.1"], r"data.probe=-0.1 is no split size"),
        (["data.fit=2.5"], r"data.fit=2.5 is no split size"),
    ],
)
def test_impossible_splits_are_refused(configure, overrides, message):
    with pytest.raises(UserError, match=message):
        splits(configure, "data=digits", *overrides)


def test_folder_labels_come_from_subfolders(configure, photographs, tmp_path):
    root = photographs(tmp_path / "labelled")
    pool = splits(configure, "data=folder", f"data.root={root}")["fit"].pool
    assert pool.classes == 3
    assert all(int(name.split("/")[0][-1]) == label for name, label in zip(pool.ids, pool.labels, strict=True))
    flat = photographs(tmp_path / "flat", classes=0)
    part = splits(configure, "data=folder", f"data.root={flat}")["fit"]
    assert part.pool.labels is None
    assert part[0][1] == -1


def test_a_folder_of_validation_images(configure, photographs, tmp_path):
    train, held = photographs(tmp_path / "train"), photographs(tmp_path / "held", count=6)
    parts = splits(
        configure, "data=folder", f"data.root={train}", f"data.validation_root={held}",
        "data.fit=0.5", "data.probe=0.5", "data.validation=1.0",
    )  # fmt: skip
    assert [len(part) for part in parts.values()] == [6, 6, 6]
    assert parts["validation"].pool.root == held


def test_the_fingerprint_follows_images_and_transform(configure, photographs, tmp_path):
    root = photographs(tmp_path / "images")
    one, same = (splits(configure, "data=folder", f"data.root={root}")["fit"] for _ in range(2))
    assert one.fingerprint == same.fingerprint
    same.transform = torch.nn.Identity()
    assert one.fingerprint != same.fingerprint
    photographs(root, count=3, size=50)
    assert splits(configure, "data=folder", f"data.root={root}")["fit"].fingerprint != one.fingerprint


def test_unreadable_images_are_named_and_left_out(configure, photographs, tmp_path):
    root = photographs(tmp_path / "images")
    for name in ("class0/0.jpg", "class1/1.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:100])
    part = splits(configure, "data=folder", f"data.root={root}", "data.limit=12")["fit"]
    part.transform = build(configure("data=folder", f"data.root={root}").data).transform()
    part.indices = torch.arange(12)
    items = [part[i] for i in range(12)]
    bad = {part.name(item.position) for item in items if isinstance(item, Unreadable)}
    assert bad == {"class0/0.jpg", "class1/1.jpg"}
    batch = part.collate(items)
    assert batch.images.shape == (10, 3, 224, 224)
    assert len(batch.unreadable) == 2
    assert part.collate([item for item in items if isinstance(item, Unreadable)]).images is None
    part.strict = True
    with pytest.raises(UserError, match=r"data.strict=true, and class0/0.jpg cannot be read"):
        part[part.pool.ids.index("class0/0.jpg")]


def test_the_toy_data_know_their_signal(configure):
    source = build(configure("data=toy", "data.angle=30").data)
    pool, _ = source.pools()
    y = torch.tensor(pool.labels)
    distractor = pool.images - y[:, None] * source.signal.float()
    direction = distractor / distractor.norm(dim=1, keepdim=True)
    expected = torch.tensor([math.cos(math.radians(30)), math.sin(math.radians(30))])
    torch.testing.assert_close((direction @ expected).abs(), torch.ones(len(y)), atol=1e-5, rtol=0)


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
