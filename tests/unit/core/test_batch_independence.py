"""Networks whose answer for an image depends on the rest of its batch are refused, wherever one is handed over."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pattern_bench as pb
from pattern_bench.core.batch_independence import refuse_batch_dependence
from pattern_bench.core.canonical import canonical
from pattern_bench.errors import UserError
from pattern_bench.methods.gradients import Gradient

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0)) + 0.3


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.function = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5), function

    def forward(self, x):
        return self.fc(self.function(self.conv(x)).relu().mean((2, 3)))


DEPENDENT = {
    "batch norm without running statistics": nn.BatchNorm2d(8, track_running_stats=False).eval(),
    "functional batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "minus the mean": lambda x: x - x.mean(0, keepdim=True),
    "over the largest": lambda x: x / x.max(),
    "minus the first": lambda x: x - x[:1],
    "the next one's": lambda x: x.roll(1, 0),
    "sorted": lambda x: x.sort(0).values,
    "over the deviation": lambda x: x / x.std(),
}
RANDOM = {
    "dropout": lambda x: F.dropout(x, 0.1, training=True),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
}
INDEPENDENT = {
    "instance norm": F.instance_norm,
    "one image at a time": lambda x: torch.cat([image[None] / image.std() for image in x]),
    "another path for each": lambda x: torch.stack([image if image.mean() > 0 else -image for image in x]),
    "no batch of three": lambda x: x.view(1, 8, 12, 12),
    "a running batch norm": nn.BatchNorm2d(8).eval(),
    "of rounded values": lambda x: (20 * x).round() / 20,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", DEPENDENT)
def test_what_computes_over_the_batch_is_refused(case, dtype):
    for x in (X, 100 * X, 0.01 * X, torch.ones_like(X)):
        with pytest.raises(UserError, match="model=mine puts out something else for an image where other images are"):
            refuse_batch_dependence(Net(DEPENDENT[case]).eval().to(dtype), x.to(dtype), "mine")


@pytest.mark.parametrize("case", RANDOM)
def test_randomness_is_told_as_such(case):
    with pytest.raises(UserError, match=r"for the same image in every pass, .*: take the randomness out of it"):
        refuse_batch_dependence(Net(RANDOM[case]).eval(), X, "mine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", INDEPENDENT)
def test_what_computes_each_image_by_itself_is_not(case, dtype):
    for x in (X, 100 * X, 0.01 * X, torch.ones_like(X)):
        refuse_batch_dependence(Net(INDEPENDENT[case]).eval().to(dtype), x.to(dtype), "mine")


def test_a_network_that_takes_no_single_image_is_tried_with_three():
    of_the_batch = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(UserError, match="where other images are in its batch"):
        refuse_batch_dependence(of_the_batch, torch.randn(2, 3), "mine")

    class Three(nn.Linear):
        def forward(self, x):
            return super().forward(x.view(3, -1))

    refuse_batch_dependence(Three(3, 4), torch.randn(3, 3), "mine")


def test_it_is_refused_on_every_way_in(tmp_path):
    model = Net(DEPENDENT["minus the mean"]).eval()
    heat = {"mine": lambda model, inputs, targets: inputs}
    for use in (
        lambda: canonical(model, X[:1]),
        lambda: pb.collect_moments(model, [X]),
        lambda: pb.degradation(model, X, heat, patch=4, steps=3),
        lambda: pb.draw_gallery(model, X, heat, tmp_path / "gallery.png"),
        lambda: Gradient(model).attribute(X),
        lambda: Gradient(model).attribute(X[:1]),
        lambda: Gradient(model.bfloat16()).attribute(X),
    ):
        with pytest.raises(UserError, match="model=Net puts out something else for an image where other images are"):
            use()


def test_a_method_tries_a_network_once_and_again_with_another_module():
    model, sizes = Net(nn.Identity()).eval(), []
    model.conv.register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
    for _ in range(2):
        Gradient(model).attribute(X)
    assert sizes == [1, 3, 4, 4]
    model.function = nn.BatchNorm2d(8, track_running_stats=False).eval()
    with pytest.raises(UserError, match="where other images are in its batch"):
        Gradient(model).attribute(X)


def test_methods_do_not_try_canonical_networks_again():
    network, sizes = canonical(Net(nn.Identity()).eval(), X[:1]), []
    network.conv.register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
    Gradient(network).attribute(X)
    assert sizes == [4]
