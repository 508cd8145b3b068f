"""Directions that methods send back through layers: by hand, and what the methods themselves send."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from pattern_bench.core.estimators import Pattern
from pattern_bench.errors import UserError
from pattern_bench.methods.gradients import Gradient, IntegratedGradients
from pattern_bench.methods.patterns import DtdW2, LrpZ, PatternNet
from pattern_bench.metrics.similarity import convergence
from pattern_bench.pipeline.convergence import back_propagated, start_vectors


def chain(*weights):
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False).double() for w in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = weight
    return nn.Sequential(OrderedDict((f"l{i}", layer) for i, layer in enumerate(layers))).eval().requires_grad_(False)


def converged(method, model, starts):
    vectors = back_propagated(method, [f"l{i}" for i in range(len(model))], torch.randn(1, 6).double(), starts)
    return [float(convergence(vectors[name])) for name in vectors]


def test_orthogonal_layers_keep_the_angles_and_one_of_rank_one_ends_them():
    torch.manual_seed(0)
    starts = start_vectors("gaussian", 4, 6, seed=1)
    turns = [torch.linalg.qr(torch.randn(6, 6).double())[0] for _ in range(3)]
    model = chain(*turns)
    assert converged(Gradient(model), model, starts) == pytest.approx([float(convergence(starts))] * 3)
    flat = torch.outer(torch.randn(6), torch.randn(6)).double()
    model = chain(turns[0], flat, turns[1])
    found = converged(Gradient(model), model, starts)
    assert found[:2] == pytest.approx([1, 1])
    assert found[2] == pytest.approx(float(convergence(starts)))


def test_vectors_are_what_the_methods_themselves_send_back():
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(l0=nn.Linear(6, 8), relu=nn.ReLU(inplace=True), l1=nn.Linear(8, 5))).eval()
    model.requires_grad_(False)
    x = torch.randn(1, 6)
    for method in (Gradient(model), LrpZ(model), DtdW2(model)):
        found = back_propagated(method, ["l0", "l1"], x, torch.eye(5)[2:3])
        expected = method.attribute(x, 2)
        scale = float(found["l0"].norm() / expected.norm())  # dtd_w2 starts from the output's value, here from 1
        assert torch.allclose(found["l0"], expected * scale, atol=1e-6) or torch.allclose(
            found["l0"], -expected * scale, atol=1e-6
        )
        assert found["l1"].shape == (1, 8)
        again = method.attribute(x, 2)  # the method is itself again
        assert torch.equal(again, expected)
    relevance = back_propagated(LrpZ(model), ["l1"], x, torch.eye(5)[:1])["l1"]
    assert torch.allclose(relevance, model.l0(x).relu() * model.l1.weight[0])


def test_a_method_of_many_passes_has_no_directions():
    model = nn.Sequential(OrderedDict(l0=nn.Linear(6, 5))).eval()
    with pytest.raises(UserError, match="one pass back"):
        back_propagated(IntegratedGradients(model), ["l0"], torch.randn(1, 6), torch.eye(5))


def test_start_vectors():
    assert start_vectors("classes", 3, 10, 0).sum(1).tolist() == [1, 1, 1]
    assert float(convergence(start_vectors("classes", 5, 10, 0))) == 0
    assert torch.equal(start_vectors("gaussian", 3, 10, 0), start_vectors("gaussian", 3, 10, 0))


@pytest.mark.parametrize("last_layer", ["positive", "weight"])
def test_pattern_methods_send_back_what_their_output_layer_propagates(last_layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double().eval()
    patterns = {name: torch.randn_like(model.get_submodule(name).weight) for name in ("0", "2")}
    alive = {name: Pattern(a, a, torch.zeros(len(a), dtype=torch.bool)) for name, a in patterns.items()}
    starts, x = start_vectors("gaussian", 3, 4, 0), torch.randn(1, 6).double()
    found = back_propagated(PatternNet(model, alive, last_layer=last_layer), ["0", "2"], x, starts)
    sent = patterns["2"] if last_layer == "positive" else model[2].weight.detach()
    torch.testing.assert_close(found["2"], starts @ sent)
    torch.testing.assert_close(found["0"], (starts @ sent * (model[0](x) > 0)) @ patterns["0"])
