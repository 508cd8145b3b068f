"""Folders of images: their labels, and images held out."""

from pattern_bench.configuration.build import build
from pattern_bench.data.splits import make_splits


def splits(configure, *overrides, seed=0):
    return make_splits(build(configure(*overrides).data), seed)


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
