"""The canonical form that the API keeps is that of the network as it is, whatever of it was changed, and how."""

import copy
import functools
import gc
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pattern_bench as pb
from pattern_bench.api import networks as api
from pattern_bench.core.snapshot import Snapshot

X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SLOPE = 0.0


class Options:
    slope = 0.0


class Net(nn.Module):
    """A forward that reads what attributes, objects, functions and globals say."""

    gain = 1.0

    def __init__(self, **more):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.LeakyReLU(0.01)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(512, 5)
        self.register_buffer("mask", torch.ones(8, 1, 1), persistent=False)
        self.plain = torch.ones(8, 1, 1)
        self.scales = {"x": [1.0, 2.0]}
        self.then = F.relu
        self.half = functools.partial(torch.mul, other=1.0)
        for name, value in more.items():
            setattr(self, name, value)
        self.eval()

    def forward(self, x):
        x = self.act(self.norm(self.first(x))) * self.mask * self.plain * self.scales["x"][0] * self.gain
        x = self.half(self.then(self.second(x)))
        x = x * (1 + SLOPE + getattr(getattr(self, "options", None), "slope", 0.0))
        return self.head(self.dropout(x).flatten(1))


def data_in_place(m):
    for p in m.parameters():
        nn.init.normal_(p.data, std=0.3)


def no_grad_in_place(m):
    with torch.no_grad():
        m.second.weight[0, 0, 0, 0] += 1


def through_numpy(m):
    m.first.bias.detach().numpy()[:] = 1


def new_parameter(m):
    m.second.weight = nn.Parameter(m.second.weight.detach().flip(0))


def no_bias(m):
    m.second.bias = None


def batch_norm_statistics(m):
    m.norm.running_mean.data += 0.5


def buffer(m):
    m.mask.data[3] = 0


def plain_tensor(m):
    m.plain[2] = 0


def other_module(m):
    m.act = nn.ReLU().eval()


def module_in_its_place(m):
    m.add_module("second", nn.Conv2d(8, 8, 3, padding=1, groups=2).eval())


def slope(m):
    m.act.negative_slope = 0.5


def eps(m):
    m.norm.eps = 0.5


def padding_mode(m):
    m.first.padding_mode, m.first._reversed_padding_repeated_twice = "circular", [1] * 4


def padding(m):
    m.second.padding, m.second.dilation = (2, 2), (2, 2)


def container(m):
    m.scales["x"][0] = -1.0


def function(m):
    m.then = torch.tanh


def partial_function(m):
    m.half = functools.partial(torch.mul, other=-0.5)


def closure(m):
    c = 0.5
    m.then = lambda x: c * x


def forward_of_a_module(m):
    m.act.forward = lambda x: x.abs()


def forward_of_the_network(m):
    m.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), m)


def hook(m):
    m.act.register_forward_hook(lambda module, inputs, output: torch.cat([output[:, :4] * 0, output[:, 4:]], 1))


def pre_hook(m):
    m.dropout.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def norm_of_weights(m):
    nn.utils.parametrizations.weight_norm(m.second).eval()
    m.second.parametrizations.weight.original0.data.mul_(3)


CHANGES = [data_in_place, no_grad_in_place, through_numpy, new_parameter, no_bias, batch_norm_statistics, buffer,
           plain_tensor, other_module, module_in_its_place, slope, eps, padding_mode, padding, container, function,
           partial_function, closure, forward_of_a_module, forward_of_the_network, hook, pre_hook,
           norm_of_weights]  # fmt: skip


def check(model, patterns, change, undo=None):
    kept = pb.PatternAttribution(model, patterns)
    before = kept.attribute(X, target=1)
    answer = model(X).detach()
    change(model)
    assert not torch.equal(model(X), answer)
    found = kept.attribute(X, target=1)
    right = pb.PatternAttribution(copy.deepcopy(model), patterns).attribute(X, target=1)
    assert torch.equal(found, right)
    assert not torch.equal(found, before)
    moments, fresh = (pb.collect_moments(m, [X]) for m in (model, copy.deepcopy(model)))
    assert all(torch.equal(moments[layer].xug, fresh[layer].xug) for layer in fresh)
    # And where it is changed back.
    if undo:
        undo(model)
        assert torch.equal(kept.attribute(X, target=1), before)


@pytest.fixture
def patterns():
    model = Net()
    return dict(pb.fit_patterns(model, pb.collect_moments(model, [X])))


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(patterns, change):
    check(Net(), patterns, change)


def test_what_a_hook_reads_is_noticed_from_call_to_call(patterns):
    model, strength = Net(), [1.0]
    model.act.register_forward_hook(lambda module, inputs, output: output * strength[0])
    check(model, patterns, lambda _: strength.__setitem__(0, 0.2), lambda _: strength.__setitem__(0, 1.0))


def test_hooks_of_all_modules_are_noticed(patterns):
    handles = []

    def change(_):
        handles.append(nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: output * 0.5 if isinstance(module, nn.LeakyReLU) else None
        ))  # fmt: skip

    try:
        check(Net(), patterns, change, lambda _: handles.pop().remove())
    finally:
        for handle in handles:
            handle.remove()


def test_objects_and_globals_that_the_forward_reads_are_noticed(patterns, monkeypatch):
    options = Options()
    check(
        Net(options=options),
        patterns,
        lambda _: setattr(options, "slope", 0.3),
        lambda _: setattr(options, "slope", 0.0),
    )
    monkeypatch.setitem(globals(), "SLOPE", 0.0)
    check(Net(), patterns, lambda _: globals().__setitem__("SLOPE", 0.3), lambda _: globals().__setitem__("SLOPE", 0.0))
    monkeypatch.setattr(Net, "gain", 1.0)
    check(Net(), patterns, lambda _: setattr(Net, "gain", 0.3), lambda _: setattr(Net, "gain", 1.0))


def test_another_precision_is_noticed(patterns):
    model = Net()
    kept = pb.PatternAttribution(model, patterns)
    single = kept.attribute(X, target=1)
    found = pb.PatternAttribution(model.double(), patterns)
    model.plain = model.plain.double()
    torch.testing.assert_close(found.attribute(X.double(), target=1), single.double(), rtol=1e-3, atol=1e-6)
    assert found.attribute(X.double(), target=1).dtype == torch.float64


def test_a_network_that_stays_is_brought_into_canonical_form_once(patterns, monkeypatch):
    """Also where it was made a copy of, its requires_grad changed, or its state dict read and loaded."""
    made = []
    monkeypatch.setattr(api, "canonical", lambda *given: made.append(1) or api_canonical(*given))
    model = Net()
    kept = pb.PatternNet(model, patterns)
    for _ in range(3):
        kept.attribute(X[:2])
        model.requires_grad_(False)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    kept.attribute(X[4:])
    assert len(made) == 1
    kept.attribute(torch.randn(2, 3, 8, 8))
    assert len(made) == 1
    model.then = torch.tanh
    kept.attribute(X[:2])
    assert len(made) == 2


api_canonical = api.canonical


def test_what_is_remembered_costs_no_second_copy_and_keeps_no_network_alive(patterns):
    model = Net()
    pb.PatternNet(model, patterns).attribute(X[:1])
    remembered, network = api._canonical[model]
    assert remembered.tensors["second.weight"].data_ptr() == network.second.weight.data_ptr()
    assert remembered.tensors["first.weight"].data_ptr() != network.first.weight.data_ptr()  # batch norm is folded in
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None


@pytest.mark.parametrize("value", [object(), Options(), [Options()], (lambda c: lambda x: x * c)(1), nn.ReLU().forward])
def test_what_may_change_without_a_trace_is_not_remembered(value):
    with pytest.raises(ValueError, match="may change unnoticed"):
        Snapshot(Net(options=value), X[:1], {})
    assert Snapshot(Net(options=[1, {"a": (2.0, None)}, torch.float32, torch.ones(2)]), X[:1], {}).matches(
        Net(options=[1, {"a": (2.0, None)}, torch.float32, torch.ones(2)])
    )
    assert not Snapshot(Net(options=[-0.0, True]), X[:1], {}).matches(Net(options=[0.0, True]))
    assert not Snapshot(Net(options=[1]), X[:1], {}).matches(Net(options=[True]))
