"""Images as loaders yield them, from Python: what is wrong with them is told in one message, and nothing is counted."""

import pytest
import torch
from captum.attr import Saliency
from torch import nn

import pattern_bench as pb
from pattern_bench.errors import UserError


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4)
    ).eval()


def batches(count=4, size=8):
    return list(torch.randn(count, 6, 3, size, size, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("layers", "named"), [(None, "0"), ("2", "[02]"), ("5", "[05]")])
def test_images_that_are_not_finite_are_refused(network, value, layers, named):
    """Also where no sum of the watched layers shows it."""
    x = batches()
    x[2][1, 0, 4, 4] = value
    with pytest.raises(UserError, match=rf"^layer {named}: NaN or Inf in its input or output, for batch 2 of loader "
                                        r"\(images 12 to 17\): mend"):  # fmt: skip
        pb.collect_moments(network, x, layers=layers)
    patterns = pb.fit_patterns(network, pb.collect_moments(network, x[:2], gram=False))
    methods = {"attribution": pb.PatternAttribution(network, patterns)}
    with pytest.raises(UserError, match="image 1 of inputs holds"):
        methods["attribution"].attribute(x[2])
    with pytest.raises(UserError, match=r"^layer 0: NaN or Inf in its input or output, for the batch of images 0 to 5"):
        pb.degradation(network, x[2], methods, patch=2, steps=4)
    with pytest.raises(UserError, match=r"^layer 0: NaN or Inf"):
        pb.degradation(network, x[2], {"captum": Saliency(network)}, patch=2, steps=4)
    with pytest.raises(UserError, match=r"^layer 0: NaN or Inf"):
        pb.draw_gallery(network, x[2], methods, "never.png")


def test_weights_that_are_not_finite_are_refused(network):
    with torch.no_grad():
        network[2].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"^layer 2: NaN or Inf"):
        pb.collect_moments(network, batches())
    with pytest.raises(UserError, match=r"^layer 2: NaN or Inf"):
        pb.degradation(network, batches()[0], {}, patch=2, steps=4)


def test_explanations_that_are_not_finite_are_refused(network):
    with pytest.raises(UserError, match="an explanation holds NaN or Inf"):
        pb.degradation(network, batches()[0], {"own": lambda _m, x, _t: x * torch.nan}, patch=2, steps=4)


def test_empty_batches_are_passed_over(network):
    x = batches()
    some = pb.collect_moments(network, [x[0][:0], x[0], x[1][:0], x[1]])
    all_of_them = pb.collect_moments(network, x[:2])
    for layer, moments in all_of_them.items():
        for name, total in moments.tensors().items():
            assert torch.equal(total, some[layer].tensors()[name])
    with pytest.raises(UserError, match="loader yields no batch with images"):
        pb.collect_moments(network, [x[0][:0]])


@pytest.mark.parametrize(("wrong", "why"), [
    (lambda x: x[:, :1], r"shape \(6, 1, 8, 8\)"), (lambda x: x[..., :5], r"shape \(6, 3, 8, 5\)"),
    (lambda x: x[0], ""), (lambda x: x.flatten(1), r"shape \(6, 192\)"),
])  # fmt: skip
def test_images_of_another_kind_are_refused(network, wrong, why):
    """Whether they come first or later."""
    x = batches(2)
    for given in ([wrong(x[0])], [x[0], wrong(x[1])]):
        with pytest.raises(UserError, match=why):
            pb.collect_moments(network, given)
    with pytest.raises(UserError, match="float tensors"):
        pb.collect_moments(network, [(255 * x[0]).byte()])
    with pytest.raises(UserError, match=r"images is torch\.uint8"):
        pb.degradation(network, (255 * x[0]).byte(), {})


def test_a_loader_keeps_the_callers_autocast_and_gradients(network):
    """Only the network is run without them, not the code that makes the images."""
    seen = []

    def loader():
        for x in batches(2):
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            yield x.requires_grad_()

    with torch.autocast("cpu", torch.bfloat16):
        pb.collect_moments(network, loader())
    assert seen == [(True, True)] * 2
