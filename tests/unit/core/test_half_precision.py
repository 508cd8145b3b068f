"""Networks in half and double precision, and callers with settings of their own: results are those of float32."""

import copy
import json

import pandas as pd
import pytest
import torch
from captum.attr import Saliency
from helpers.own_network import InPrecision
from helpers.small_networks import METHODS, method
from safetensors.torch import load_file
from torch import nn

import pattern_bench as pb
from pattern_bench.core.active_moments import FiringCollector
from pattern_bench.core.collector import Collector
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.probe_sgd import Correlation, Reader
from pattern_bench.errors import UserError
from pattern_bench.methods.base import Method

HALF = [torch.float16, torch.bfloat16]


def network(features=128):
    """Weights that every precision holds, so that the networks are the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(features, 5),
    ).eval()  # fmt: skip
    return rounded(model)


def rounded(model):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
    return model


def images(count=12, size=12, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def everything(model, x):
    """What the Python API finds on a network."""
    moments = pb.collect_moments(model, [x[:5], x[5:]])
    patterns = pb.fit_patterns(model, moments)
    found = {f"moments {layer} {name}": t for layer in moments for name, t in moments[layer].tensors().items()}
    found |= {f"pattern {layer}": pattern.positive for layer, pattern in patterns.items()}
    found |= {f"rho {layer}": rho for layer, rho in pb.evaluate(model, patterns, moments, moments).items()}
    methods = {kind.name: kind(model, patterns) for kind in (pb.PatternNet, pb.PatternAttribution)}
    own = x.double() if next(model.parameters()).dtype == torch.float64 else x  # float32 is refused there
    found |= {f"map {name}": method.attribute(own, target=1) for name, method in methods.items()}
    return found | pb.degradation(model, x, methods, patch=3, steps=16)


def assert_same(found, expected, rtol=1e-3):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = float(expected[name].nan_to_num().abs().max())
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=0, atol=rtol * scale, equal_nan=True)


@pytest.mark.parametrize("given", [torch.float32, None])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_computed_in_float32(dtype, given):
    """To the bit: the weights and images are the same numbers, and the network given is left as it was."""
    model, x = network(), images()
    half = copy.deepcopy(model).to(dtype)
    found, expected = everything(half, x.to(given or dtype)), everything(model, x)
    assert all(torch.equal(found[name].nan_to_num(), expected[name].nan_to_num()) for name in expected)
    assert {value.dtype for name, value in found.items() if name.startswith("map")} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {dtype}


def test_float64_is_computed_in_float64():
    model, x = network(), images(400)
    double = copy.deepcopy(model).double()
    found = everything(double, x)  # float32 images, as a loader yields them
    assert_same(found, everything(model, x))
    assert found["map pattern_net"].dtype == torch.float64
    patch = nn.functional.unfold(x.double(), 3, padding=1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found["moments 0 gram"][0], patch @ patch.mT, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", HALF)
def test_sums_do_not_overflow_in_half_precision(dtype):
    """A wide dense layer and a large image: sums over a batch pass 65,504."""
    torch.manual_seed(0)
    model = rounded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 38 * 38, 5)).eval())
    x = 20 + images(size=40)
    found = pb.collect_moments(copy.deepcopy(model).to(dtype), [x.to(dtype)], layers="0")["0"]
    patch = nn.functional.unfold(x.to(dtype).double(), 3).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.gram[0], patch @ patch.mT, rtol=1e-5, atol=0)
    assert float(found.gram.max()) > 65504


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("dtype", HALF)
def test_every_method_explains_a_network_in_half_precision(name, dtype):
    model, x = rounded(nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ).eval()), images(3, 8)[:, :2]  # fmt: skip
    half = copy.deepcopy(model).to(dtype)
    expected = method(name, model).attribute(x, 1)
    found = method(name, half).attribute(x.to(dtype), 1)
    assert found.dtype == torch.float32
    assert all(image.abs().max() > 0 for image in found)
    # Patterns made from the half network's weights are the weights; Gaussian references are rounded.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


def test_every_method_is_tried_in_half_precision():
    def all_of(kind):
        return {kind, *(one for below in kind.__subclasses__() for one in all_of(below))}

    named = {
        kind.name for kind in all_of(Method) if kind.__module__.startswith("pattern_bench.") and "name" in vars(kind)
    }
    assert named <= set(METHODS)


def test_changes_of_a_network_in_half_precision_are_followed():
    model, x = network().half(), images(2)
    explain = method("gradient", model)
    before = explain.attribute(x, 1)
    model[7].weight.data.mul_(2)
    torch.testing.assert_close(explain.attribute(x, 1), 2 * before)


@pytest.mark.parametrize("dtype", HALF)
def test_collectors_and_readers_of_a_half_layer_sum_in_float32(dtype):
    """Also where they are used by themselves."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 2, 3).to(dtype).requires_grad_(False)
    x = 20 + images(16, 24).to(dtype)
    y = layer(x)
    sums = Collector(layer, gram=True)
    sums.add(x, y)
    expected = Collector(copy.deepcopy(layer).double(), gram=True)
    expected.add(x.double(), y.double())
    for name, found in sums.moments().tensors().items():
        assert found.isfinite().all()
        if name in ("n", "x", "g", "xg", "gram"):  # the others ask for u, which the layer has rounded
            torch.testing.assert_close(found, expected.moments().tensors()[name], rtol=1e-5, atol=1e-3)
    firing = FiringCollector(layer, torch.arange(2))
    firing.add(x, y)
    assert firing.finite
    assert float(firing.moments().sums.max()) > 65504
    assert firing.moments().sums.isfinite().all()
    weight = layer.weight.flatten(1)
    reader = Reader(layer, Pattern(weight, weight, torch.zeros(2, dtype=torch.bool)), "all", 1e-4)
    reader.calibrate(x, y)
    reading = Correlation(reader)
    reading.add(x, y)
    assert reader.loss(x, y).isfinite().all()
    assert reading.sums.isfinite().all()


def test_autocast_and_inference_mode_of_the_caller_change_nothing():
    model, x = network(), images()
    expected = everything(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = everything(model, x)
    with torch.inference_mode():
        inferred = everything(model, x.clone())
    with torch.no_grad():
        quiet = everything(model, x)
    for other in (found, inferred, quiet):
        assert all(torch.equal(other[name].nan_to_num(), expected[name].nan_to_num()) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_type_changes_nothing(dtype):
    model, x = network(), images()
    expected = everything(model, x)
    torch.set_default_dtype(dtype)
    try:
        found = everything(model, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name].nan_to_num(), expected[name].nan_to_num()) for name in expected)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}


def test_other_libraries_are_given_images_in_the_networks_precision():
    model, x = network().bfloat16(), images(4)
    curves = pb.degradation(model, x, {"captum": Saliency(model)}, patch=3, steps=16)
    assert curves["captum"].dtype == torch.float32


def test_a_network_that_casts_by_itself_is_refused():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).half()

        def forward(self, x):
            return self.layer(x.half()).float()

    with pytest.raises(UserError, match=r"cannot take images .* a model in float32"):
        pb.collect_moments(Casts().eval(), [torch.randn(5, 4)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_job_on_a_network_in_another_precision(run_job, dtype):
    own = ["model=imported", "model.path=helpers.own_network.InPrecision", "allow_any_target=true", "probe=both",
           "probe.steps=20", "data.limit=100", "degradation.images=4"]  # fmt: skip
    folders = [run_job(*own, f"+model.arguments.dtype={name}") for name in ("float32", dtype)]
    expected, found = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert found["skipped"] == {}
    assert found["rho"]["all"]["mean"] == pytest.approx(expected["rho"]["all"]["mean"], abs=1e-3)
    area = "pattern_attribution"
    assert found["area_over_curve"][area] == pytest.approx(expected["area_over_curve"][area], abs=1e-3)
    ours, theirs = (load_file(folder / "patterns.safetensors") for folder in folders)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name].double(), tensor.double(), rtol=1e-3, atol=1e-4)
    assert len(pd.read_csv(folders[1] / "rho.csv").rho.dropna()) == len(
        pd.read_csv(folders[0] / "rho.csv").rho.dropna()
    )
    pb.load_patterns(folders[1] / "patterns.safetensors", InPrecision(dtype))
