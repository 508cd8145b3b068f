"""Moments and patterns belong to what a network computes, too, not only to its weights."""

import copy

import pytest
import torch
from torch import nn

import pattern_bench as pb
from pattern_bench.core import responses
from pattern_bench.errors import UserError
from pattern_bench.storage.tensor_files import read_tensors, write_tensors

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0)) + 0.3
torch.manual_seed(0)
CONV, SECOND, HEAD = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)


def network(activation=None, pool=None, between=None):
    parts = CONV, activation or nn.ReLU(), between or nn.Identity(), SECOND, pool or nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*parts, nn.Flatten(), HEAD).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, file = network(), tmp_path_factory.mktemp("saved") / "p.safetensors"
    moments = pb.collect_moments(model, [X])
    patterns = pb.fit_patterns(model, moments)
    patterns.save(file)
    return moments, patterns, file


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


OTHERS = {
    "softplus": ({"activation": nn.Softplus()}, 3),
    "leaky": ({"activation": nn.LeakyReLU(0.01)}, 3),
    "clipped": ({"activation": nn.ReLU6()}, 3),
    "a function": ({"between": Doubled()}, 3),
    "other sizes": ({"between": nn.AvgPool2d(3, 1, 1)}, 3),
    "pooling": ({"pool": nn.AdaptiveMaxPool2d(1)}, 6),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_same_weights_with_something_else_between_them_are_another_network(saved, case):
    moments, patterns, file = saved
    settings, layer = OTHERS[case]
    other = network(**settings)
    there = pb.collect_moments(other, [X])
    for argument, use in (
        ("moments", lambda: pb.fit_patterns(other, moments)),
        ("file=.*", lambda: pb.load_patterns(file, other)),
        ("probe", lambda: pb.evaluate(other, dict(patterns), moments, there)),
        ("test", lambda: pb.evaluate(other, dict(patterns), there, moments)),
        ("patterns", lambda: pb.evaluate(other, patterns, there, there)),
    ):
        with pytest.raises(UserError, match=f"{argument}: layer {layer} takes in something else than when "):
            use()


def test_what_computes_the_same_is_the_same_network(saved):
    moments, _, file = saved
    model = network()
    training = copy.deepcopy(model).train()
    for same in (
        model, network(activation=nn.ReLU(inplace=True)), network(between=nn.Dropout(0.5)),
        copy.deepcopy(model).double(), copy.deepcopy(model).to(memory_format=torch.channels_last),
    ):  # fmt: skip
        assert list(pb.load_patterns(file, same)) == list(moments)
        pb.fit_patterns(same, moments)
    with torch.inference_mode():
        assert list(pb.load_patterns(file, model)) == list(moments)
    with torch.autocast("cpu", torch.bfloat16):
        assert list(pb.load_patterns(file, model)) == list(moments)
    assert list(pb.load_patterns(file, training)) == list(moments)
    assert training.training
    assert pb.evaluate(model, pb.load_patterns(file, model), moments, moments)


def test_only_what_a_layers_moments_depend_on_counts(tmp_path):
    moments = pb.collect_moments(network(), [X], layers=["0", "3"])
    pb.fit_patterns(network(), moments).save(tmp_path / "p")
    pb.load_patterns(tmp_path / "p", network(pool=nn.AdaptiveMaxPool2d(1)))
    with pytest.raises(UserError, match="layer 3 takes in something else"):
        pb.load_patterns(tmp_path / "p", network(activation=nn.Softplus()))


def test_the_batch_norm_after_the_last_layer_counts_as_its_part(tmp_path):
    def normed(eps):
        return nn.Sequential(CONV, nn.BatchNorm2d(8, eps, affine=False), nn.Flatten(), nn.Linear(1152, 2)).eval()

    pb.fit_patterns(normed(1e-5), pb.collect_moments(normed(1e-5), [X], layers="0", gram=False)).save(tmp_path / "p")
    pb.load_patterns(tmp_path / "p", normed(1e-5))
    with pytest.raises(UserError, match="layer 0 puts out something else"):
        pb.load_patterns(tmp_path / "p", normed(0.1))


def test_files_without_it_and_damaged_lines_are_taken(saved, tmp_path):
    moments, _, file = saved
    tensors, metadata = read_tensors(file)
    assert sum(name.startswith("response/") for name in metadata) == len(moments)
    earlier = {name: text for name, text in metadata.items() if not name.startswith("response/")}
    for about in (
        earlier,
        earlier | {"response/0": "nonsense"},
        earlier | {"response/0": "99999x99999x99999 " + " ".join(["0.5"] * 32)},
        earlier | {"response/0": "3x1x1x1 " + " ".join(["0.5"] * 32)},
    ):
        write_tensors(tmp_path / "p", tensors, about)
        assert list(pb.load_patterns(tmp_path / "p", network(activation=nn.Softplus()))) == list(moments)


def test_networks_that_cannot_take_noise_are_not_compared():
    class Positive(nn.Module):
        def forward(self, x):
            assert x.min() >= 0
            return HEAD(CONV(x).mean((2, 3)))

    assert responses.responses(Positive().eval(), (3, 12, 12), ["0"]) == {}
    assert responses.changed_response({}, network()) is None
