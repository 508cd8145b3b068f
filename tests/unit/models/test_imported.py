"""Networks of the user's own, by their path."""

import torch

from pattern_bench.configuration.build import build

PHOTO, DIGIT = torch.rand(3, 64, 64), torch.rand(1, 8, 8)
PHOTO, DIGIT = torch.rand(3, 64, 64), torch.rand(1, 8, 8)


def built(configure, *overrides, sample=PHOTO, classes=10):
    return build(configure(*overrides).model).build(sample, classes)


def test_a_class_of_the_users_own(configure):
    overrides = ["model=imported", "model.path=torchvision.models.resnet18", "+model.arguments.num_classes=7"]
    overrides.append("allow_any_target=true")
    assert built(configure, *overrides)(PHOTO[None].repeat(2, 1, 1, 1)).shape == (2, 7)
