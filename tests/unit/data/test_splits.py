import pytest
import torch

from pattern_bench.configuration.build import build
from pattern_bench.data.splits import GlobalBatches, Unreadable, joined, make_splits
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
        (["data.limit=0"], r"data.limit=0 is not possible: give a whole number of at least 1"),
        (["data.probe=-0.1"], r"data.probe=-0.1 is not possible: give a positive number"),
        (["data.fit=2.5"], r"data.fit=2.5 is no split size"),
    ],
)
def test_impossible_splits_are_refused(configure, overrides, message):
    with pytest.raises(UserError, match=message):
        splits(configure, "data=digits", *overrides)


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


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch_size", [1, 32, 256, 5000])
@pytest.mark.parametrize("sequential", [False, True])
def test_every_image_is_one_processes_and_only_ones(configure, size, batch_size, sequential):
    splits = make_splits(build(configure("data=digits").data), 0)
    split = joined(joined(splits["fit"], splits["probe"]), splits["validation"])
    split.pool.sequential = sequential
    shares = [split.share(batch_size, rank, size) for rank in range(size)]
    assert sorted(torch.cat(shares).tolist()) == list(range(1797))
    alone = split.share(batch_size).split(batch_size)
    together = [batch for share in shares for batch in share.split(batch_size) if len(batch)]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    counts = [-(-len(share) // batch_size) for share in shares]
    assert max(counts) - min(counts) <= 1
    if sequential:
        assert split.indices[torch.cat(shares)].tolist() == list(range(1797))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("most", [None, 4])
def test_processes_share_the_very_batches_of_one(size, most):
    alone = GlobalBatches(103, 10, 5, most=most)
    parts = [GlobalBatches(103, 10, 5, rank, size, most) for rank in range(size)]
    met = []
    for number in range(6):
        for batches in (alone, *parts):
            batches.set_epoch(number)
        for whole, *shares in zip(alone, *parts, strict=True):
            assert [position for share in shares for position in share] == whole
            met += whole
    passes = [met[i : i + 103] for i in range(0, len(met) - 102, 103)]
    assert all(sorted(seen) == list(range(103)) for seen in passes)
    assert passes[0] != passes[1]
