"""ImageNet in torchvision's layout."""

import pytest
import torch

from pattern_bench.configuration.build import build
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
