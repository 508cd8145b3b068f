"""The Python API, on networks as users have them."""

import copy
import re

import pytest
import torch
from captum.attr import Saliency
from helpers.brute_force import brute_neuron, brute_rho
from helpers.own_network import Residual
from helpers.paths import ROOT
from torch import nn
from torchvision import models

import pattern_bench as pb
from pattern_bench.errors import UserError


def loader(seed=0, batches=3, size=12, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, channels, size, size, generator=generator), torch.zeros(8)) for _ in range(batches)]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(5, 4),
    ).eval()  # fmt: skip


def test_patterns_and_rho_equal_brute_force(network):
    images, probe, test = (torch.cat([x for x, _ in loader(seed)]) for seed in (0, 1, 2))
    moments = pb.collect_moments(network, loader(0), layers="0")
    assert list(moments) == ["0"]
    patterns = pb.fit_patterns(network, moments, estimator="a_plus_minus")
    for neuron in range(4):
        patch, u, gate = brute_neuron(network[0], images, neuron)
        numerator = (patch[gate] * u[gate, None]).mean(0) - patch[gate].mean(0) * u.mean()
        w = network[0].weight[neuron].detach().double().numpy().ravel()
        found = patterns["0"].positive[neuron].flatten().numpy()
        assert found == pytest.approx(numerator / (w @ numerator), abs=1e-5)
    rho = pb.evaluate(
        network, patterns, probe=pb.collect_moments(network, loader(1)), test=pb.collect_moments(network, loader(2))
    )
    ridge = 1e-4 * float(pb.collect_moments(network, loader(1))["0"].cov_x[0].diagonal().mean())
    layer = network[0].double().requires_grad_(False)
    flat = type(patterns["0"])(*(p.flatten(1).double() for p in (patterns["0"].positive, patterns["0"].negative)),
                               patterns["0"].dead)  # fmt: skip
    for neuron in range(4):
        expected = brute_rho(layer, probe.double(), test.double(), flat, neuron, ridge)
        assert float(rho["0"][neuron]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("make", [lambda: models.resnet18(num_classes=10), lambda: Residual()])
def test_networks_with_batch_norm_and_sums_are_explained_and_left_as_they_were(make):
    torch.manual_seed(0)
    model = make().eval()
    channels = next(model.parameters()).shape[1]
    batches = loader(size=32, channels=channels)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    moments = pb.collect_moments(model, (x for x, _ in batches), gram=False)
    patterns = pb.fit_patterns(model, moments)
    x = batches[0][0][:3]
    for kind in (pb.PatternNet, pb.PatternAttribution):
        found = kind(model, patterns).attribute(x, target=3)
        assert found.shape == x.shape
        assert found.isfinite().all()
        assert found.abs().sum() > 0
        single = torch.cat([kind(model, patterns).attribute(image[None], target=3) for image in x])
        torch.testing.assert_close(found, single, rtol=1e-3, atol=1e-4 * float(found.abs().max()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert not any(module._forward_hooks for module in model.modules())


def test_other_weights_are_noticed(network):
    """The canonical form is kept, but not for weights that have changed since."""
    x = loader()[0][0]
    moments = pb.collect_moments(network, loader())
    before = pb.PatternNet(network, pb.fit_patterns(network, moments)).attribute(x)
    with torch.no_grad():
        network[6].weight.mul_(2)
        network[6].bias.zero_()
    again = pb.fit_patterns(network, pb.collect_moments(network, loader()))
    assert not torch.allclose(pb.PatternNet(network, again).attribute(x), before)


def test_patterns_are_saved_and_refused_where_they_do_not_fit(network, tmp_path):
    patterns = pb.fit_patterns(network, pb.collect_moments(network, loader(), gram=False))
    patterns.save(tmp_path / "p.safetensors")
    loaded = pb.load_patterns(tmp_path / "p.safetensors", network)
    assert loaded.estimator == "a_plus_minus"
    for layer, pattern in patterns.items():
        assert torch.equal(loaded[layer].positive, pattern.positive)
        assert torch.equal(loaded[layer].dead, pattern.dead)
    shorter = copy.deepcopy(network[:3])
    with torch.no_grad():
        network[2].weight.add_(1)
    with pytest.raises(UserError, match="layer 2 has other weights"):
        pb.load_patterns(tmp_path / "p.safetensors", network)
    network[2] = nn.Conv2d(4, 5, 1)
    with pytest.raises(UserError, match=r"layer 2 has shape \(5, 4, 3, 3\) and its weight \(5, 4, 1, 1\)"):
        pb.load_patterns(tmp_path / "p.safetensors", network)
    with pytest.raises(UserError, match="patterns of layer 6, which Sequential lacks"):
        pb.load_patterns(tmp_path / "p.safetensors", shorter)
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 50)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        pb.load_patterns(tmp_path / "bad.safetensors", network)
    with pytest.raises(UserError, match="is not a file"):
        pb.load_patterns(tmp_path / "none.safetensors", network)


def test_mistakes_get_one_message(network):
    moments = pb.collect_moments(network, loader(), gram=False)
    patterns = pb.fit_patterns(network, moments)
    with pytest.raises(UserError, match="estimator=b is unknown"):
        pb.fit_patterns(network, moments, "b")
    with pytest.raises(UserError, match="estimator=x has no patterns"):
        pb.fit_patterns(network, moments, "x")
    with pytest.raises(UserError, match="loader yields no batch"):
        pb.collect_moments(network, [])
    with pytest.raises(UserError, match="loader yields str"):
        pb.collect_moments(network, ["image"])
    with pytest.raises(UserError, match="no Gram matrix"):
        pb.evaluate(network, patterns, moments, moments)
    with pytest.raises(UserError, match="is not measured here"):
        pb.evaluate(network, patterns, moments, moments, "positive")
    with pytest.raises(UserError, match="training mode"):
        pb.PatternNet(network.train(), patterns).attribute(loader()[0][0])
    with pytest.raises(UserError, match="holds NaN"):
        pb.PatternNet(network.eval(), patterns).attribute(torch.full((1, 3, 12, 12), torch.nan))
    with pytest.raises(UserError, match="needs patterns"):
        pb.PatternAttribution(network, {})
    with pytest.raises(AttributeError, match="no attribute 'patterns'"):
        pb.patterns  # noqa: B018


def test_whatever_explains_plugs_into_degradation_and_gallery(network, tmp_path):
    """This suite's methods, captum's, and a function as Quantus calls it; the most relevant patch falls first."""
    x = loader()[0][0]
    patterns = pb.fit_patterns(network, pb.collect_moments(network, loader()))

    def quantus_style(model, inputs, targets):
        return Saliency(model).attribute(inputs, target=targets).sum(1).numpy()

    methods = {
        "attribution": pb.PatternAttribution(network, patterns), "signal": pb.PatternNet(network, patterns),
        "captum": Saliency(network), "function": quantus_style,
    }  # fmt: skip
    curves = pb.degradation(network, x, methods, patch=3, steps=16)
    assert set(curves) == {*methods, "random_order"}
    assert all(curve.shape == (8, 17) for curve in curves.values())
    torch.testing.assert_close(curves["captum"], curves["function"])
    # Whatever the order, first nothing and in the end everything is replaced.
    for curve in curves.values():
        torch.testing.assert_close(curve[:, [0, -1]], curves["random_order"][:, [0, -1]])
    least = pb.degradation(network, x, {"captum": Saliency(network)}, patch=3, steps=16, order="least")
    assert not torch.allclose(least["captum"], curves["captum"])
    pb.draw_gallery(network, x, methods, tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="steps=17 is not possible"):
        pb.degradation(network, x, methods, patch=3, steps=17)
    with pytest.raises(UserError, match="order=some is unknown"):
        pb.degradation(network, x, methods, patch=3, steps=3, order="some")
    with pytest.raises(UserError, match="one value per pixel"):
        pb.degradation(network, x, {"bad": lambda *_: torch.zeros(8, 3, 4, 4)}, patch=3, steps=3)


@pytest.mark.slow
def test_the_readmes_example_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "patterns.safetensors").is_file()
    assert (tmp_path / "gallery.png").is_file()
