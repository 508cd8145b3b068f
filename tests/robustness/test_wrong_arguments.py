"""Wrong arguments from Python: each is one error that names the argument, its value and what to give."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import pattern_bench as pb
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.half_precision import widened
from pattern_bench.core.probe_closed_form import Probe
from pattern_bench.errors import UserError


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    images = torch.randn(6, 3, 8, 8)
    moments = pb.collect_moments(network.eval(), [images])
    return network, images, moments, pb.fit_patterns(network, moments)


def test_wrong_arguments_are_named(given):
    network, images, moments, patterns = given
    for argument, value in [
        ("positions", 0), ("positions", 1.5), ("positions", -1), ("positions", "a"), ("positions", torch.nan),
        ("memory", 0), ("memory", "1"), ("seed", None), ("seed", 1.5), ("layers", 3), ("layers", [3]),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=rf"^{argument}=.* is not possible: give "):
            pb.collect_moments(network, [images], **{argument: value})
    for loader in (None, 3):
        with pytest.raises(UserError, match=rf"^loader={loader} yields nothing: give"):
            pb.collect_moments(network, loader)
    for batch in ((), images.to("meta"), images.to_sparse()):
        with pytest.raises(UserError, match=r"^loader yields .* where images should be: give"):
            pb.collect_moments(network, [batch])
    for model in (None, network.state_dict(), nn.Conv2d):
        with pytest.raises(UserError, match=r"^model=.* is no network: give"):
            pb.collect_moments(model, [images])
    for estimator in (None, 3, ["a"]):
        with pytest.raises(UserError, match=r"^estimator=.* is none: give"):
            pb.fit_patterns(network, moments, estimator)
    for wrong in (None, {}, dict(moments), patterns):
        with pytest.raises(UserError, match=r"^moments=.* is no moments: give"):
            pb.fit_patterns(network, wrong)
    for value in (-1, "a", torch.nan, torch.inf):
        with pytest.raises(UserError, match=r"^regularisation=.* is not possible: give"):
            pb.evaluate(network, patterns, moments, moments, regularisation=value)
    for wrong in ({"0": images}, images, moments):
        with pytest.raises(UserError, match=r"^patterns=.* is no patterns by layer: give"):
            pb.PatternAttribution(network, wrong)
    own = pb.PatternAttribution(network, patterns)
    for methods in (None, [own], own, {"own": 3}, {3: own}, {"own": pb.PatternAttribution}):
        with pytest.raises(UserError, match=r"^methods.* is not possible: give"):
            pb.degradation(network, images, methods, patch=4, steps=2)
        with pytest.raises(UserError, match=r"^methods.* is not possible: give"):
            pb.draw_gallery(network, images, methods, "never.png")
    for argument, value in [("seed", "a"), ("seed", 2**70), ("value", "a"), ("value", 1e39), ("value", [1, 2, 3])]:
        with pytest.raises(UserError, match=rf"^{argument}=.* is not possible: give"):
            pb.degradation(network, images, {}, patch=4, steps=2, replacement="constant", **{argument: value})


def test_a_singular_covariance_without_regularisation_ends(given):
    _, images, _, _ = given
    layer = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()  # 6 images cannot span 192 dimensions
    moments = pb.collect_moments(layer, [images])["1"]
    assert 0 < Probe(moments, 0.0).regularisation <= 1e-3


class Squeezing(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)[:, :, None, None].softmax(1).squeeze()


def test_a_softmax_whose_squeeze_also_removes_the_batch_is_taken_once(given):
    network, images, _, _ = given
    curves = pb.degradation(Squeezing(network).eval(), images, {}, patch=4, steps=2)
    torch.testing.assert_close(curves["random_order"][:, 0], network(images).softmax(1).max(1).values.detach())


class Choosing(Squeezing):
    def forward(self, x):
        return self.body(x).argmax(1)


def test_outputs_that_are_no_logits_are_refused(given):
    network, images, _, _ = given
    with pytest.raises(UserError, match=r"puts out torch.int64: explanations start from logits"):
        pb.collect_moments(Choosing(network).eval(), [images])
    with pytest.raises(UserError, match=r"the function that chooses its logits failed .KeyError"):
        pb.collect_moments(pb.Logits(network, lambda outputs: {}["logits"]), [images])


# --- anything at all ---

ODD = [
    None, 3.5, -1, True, "a", "", "\0", b"x", [], {}, (), [1, 2], {"a": 1}, object(), nn.Conv2d, 10**30, 2**63,
    range(3), float("nan"), float("inf"), np.ones(3), np.array(1), np.ones((6, 3, 8, 8)), Path("/"), iter([]),
    lambda *given: None, torch.tensor(1), torch.tensor([1.0, 2.0]), torch.zeros(0),
    torch.nested.nested_tensor([torch.ones(2)] * 6),
]  # fmt: skip
KINDS = [
    lambda x: x.int(), lambda x: x.bool(), lambda x: x.to(torch.complex64), lambda x: x.to_sparse(),
    lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), lambda x: x.to("meta"), lambda x: x[:0],
    lambda x: x[0], lambda x: x[:, :2], lambda x: x * torch.nan, lambda x: x.to(torch.float8_e4m3fn),
    lambda x: x.flatten(1),
]  # fmt: skip
CALLS = {
    "collect model": lambda v, n, x, m, p: pb.collect_moments(v, [x]),
    "loader": lambda v, n, x, m, p: pb.collect_moments(n, v),
    "batch": lambda v, n, x, m, p: pb.collect_moments(n, [v]),
    "layers": lambda v, n, x, m, p: pb.collect_moments(n, [x], layers=v),
    "gram": lambda v, n, x, m, p: pb.collect_moments(n, [x], gram=v),
    "memory": lambda v, n, x, m, p: pb.collect_moments(n, [x], memory=v),
    "positions": lambda v, n, x, m, p: pb.collect_moments(n, [x], positions=v),
    "seed": lambda v, n, x, m, p: pb.collect_moments(n, [x], positions=0.5, seed=v),
    "fit moments": lambda v, n, x, m, p: pb.fit_patterns(n, v),
    "estimator": lambda v, n, x, m, p: pb.fit_patterns(n, m, v),
    "fit seed": lambda v, n, x, m, p: pb.fit_patterns(n, m, "random", seed=v),
    "patterns": lambda v, n, x, m, p: pb.evaluate(n, v, m, m),
    "part": lambda v, n, x, m, p: pb.evaluate(n, {"0": Pattern(v, p["0"].negative, p["0"].dead)}, m, m),
    "dead": lambda v, n, x, m, p: pb.PatternNet(n, {**p, "0": Pattern(p["0"].positive, p["0"].negative, v)}),
    "probe": lambda v, n, x, m, p: pb.evaluate(n, p, v, m),
    "test": lambda v, n, x, m, p: pb.evaluate(n, p, m, v),
    "criterion": lambda v, n, x, m, p: pb.evaluate(n, p, m, m, v),
    "regularisation": lambda v, n, x, m, p: pb.evaluate(n, p, m, m, regularisation=v),
    "degradation model": lambda v, n, x, m, p: pb.degradation(v, x, {}, patch=4, steps=2),
    "images": lambda v, n, x, m, p: pb.degradation(n, v, {}, patch=4, steps=2),
    "methods": lambda v, n, x, m, p: pb.degradation(n, x, v, patch=4, steps=2),
    "method": lambda v, n, x, m, p: pb.degradation(n, x, {"own": v}, patch=4, steps=2),
    "returned": lambda v, n, x, m, p: pb.degradation(n, x, {"own": lambda *given: v}, patch=4, steps=2),
    "target": lambda v, n, x, m, p: pb.degradation(n, x, {}, v, patch=4, steps=2),
    "patch": lambda v, n, x, m, p: pb.degradation(n, x, {}, patch=v, steps=2),
    "steps": lambda v, n, x, m, p: pb.degradation(n, x, {}, patch=4, steps=v),
    "order": lambda v, n, x, m, p: pb.degradation(n, x, {}, patch=4, steps=2, order=v),
    "replacement": lambda v, n, x, m, p: pb.degradation(n, x, {}, patch=4, steps=2, replacement=v),
    "value": lambda v, n, x, m, p: pb.degradation(n, x, {}, patch=4, steps=2, value=v),
    "random seed": lambda v, n, x, m, p: pb.degradation(n, x, {}, patch=4, steps=2, seed=v),
    "file": lambda v, n, x, m, p: p.save(v),
    "drawn file": lambda v, n, x, m, p: pb.draw_gallery(n, x[:1], {}, v),
    "loaded file": lambda v, n, x, m, p: pb.load_patterns(v, n),
    "explained": lambda v, n, x, m, p: pb.PatternAttribution(n, p).attribute(v),
    "explained target": lambda v, n, x, m, p: pb.PatternAttribution(n, p).attribute(x, v),
    "last layer": lambda v, n, x, m, p: pb.PatternAttribution(n, p, v).attribute(x),
    "network": lambda v, n, x, m, p: pb.Logits(v)(x),
    "output": lambda v, n, x, m, p: pb.Logits(n, v)(x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("argument", CALLS)
def test_whatever_is_given_is_an_answer_or_one_error(given, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network, images, moments, patterns = given
    for value in [*ODD, *(kind(images) for kind in KINDS), network, moments, patterns, dict(moments)]:
        said = ""
        try:
            CALLS[argument](value, network, images, moments, patterns)
        except UserError as error:
            said = str(error)
        assert "\n" not in said
        assert len(said) < 400


def test_explanations_of_other_kinds_are_as_their_numbers_or_refused_by_name(given):
    network, images, _, _ = given
    heat = torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(1))

    def curve(returned):
        return pb.degradation(network, images, {"own": lambda *given: returned}, patch=2, steps=9)["own"]

    right = curve(heat)
    whole = (1e6 * heat).round()
    for same in (heat.numpy(), heat[:, None], heat.half().double(), heat.tolist(), heat.clone().requires_grad_()):
        torch.testing.assert_close(curve(same), right)
    torch.testing.assert_close(curve(whole.long()), curve(whole))
    torch.testing.assert_close(curve(whole.int().numpy()), curve(whole))
    for wrong in (
        None, (heat, heat), [], "heat", {"heat": heat}, heat[0], heat[:, :4], heat[:5], images[:, :2],
        heat[..., None, None], heat * torch.nan, torch.tensor(0.5), heat.to_sparse(), heat.to("meta"),
        heat + 1j,
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"^methods: 'own': an explanation "):
            curve(wrong)
    with pytest.raises(UserError, match=r"^methods: 'random_order' is what the random order is called"):
        pb.degradation(network, images, {"random_order": lambda *given: heat}, patch=2, steps=9)
    for wrong in (network, lambda inputs: inputs):
        with pytest.raises(UserError, match=r"^methods: 'own'=.* is not possible: give"):
            pb.degradation(network, images, {"own": wrong}, patch=2, steps=9)


def test_a_network_is_as_before_whatever_an_explanation_does_to_it():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3)
    ).eval()
    images = torch.randn(4, 3, 8, 8)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    network[5].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    right = pb.degradation(network, images, {}, patch=2, steps=5)["random_order"]

    def changes(model, x, target, fails=False):
        model.train().requires_grad_()
        model(x).sum().backward()
        with torch.no_grad():
            model[5].weight.mul_(2)
        heat = x * 2
        x.zero_()
        target.zero_()
        if fails:
            raise KeyError("mine")
        return heat

    curves = pb.degradation(network, images, {"own": changes, "again": lambda m, x, t: 2 * x}, patch=2, steps=5)
    with pytest.raises(KeyError, match="mine"):
        pb.draw_gallery(network, images, {"own": lambda *given: changes(*given, fails=True)}, "never.png")
    assert torch.equal(curves["random_order"], right)
    assert torch.equal(curves["own"], curves["again"])
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == [True] * 4 + [False] * 2
    assert torch.equal(network[0].weight.grad, torch.ones_like(network[0].weight))
    assert network[0].bias.grad is None


def test_patterns_of_another_network_or_kind_are_refused_by_layer(given):
    network, _, moments, patterns = given
    one, other = patterns["0"], patterns["4"]
    whole = Pattern(one.positive.int(), one.negative.int(), one.dead)
    for wrong, why in (
        ({"0": other}, "has shape"), ({"0": whole}, r"is torch\.int32"),
        ({"0": Pattern(one.positive, other.negative, one.dead)}, "has parts of shape"),
        ({"0": Pattern(one.positive * torch.nan, one.negative, one.dead)}, "is not finite"),
        ({"0": Pattern(one.positive, one.negative, one.dead.int())}, "does not tell"),
        ({"0": Pattern(one.positive, one.negative, one.dead[:1])}, "does not tell"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"^patterns: that of layer 0 {why}"):
            pb.evaluate(network, wrong, moments, moments)
    with pytest.raises(UserError, match=r"^patterns: that of layer 0 is torch\.int32"):
        pb.PatternNet(network, {"0": whole})
    with pytest.raises(UserError, match=r"^patterns has none: give"):
        pb.evaluate(network, {}, moments, moments)


def test_files_that_cannot_be_written_are_refused_before_any_work(given, tmp_path):
    network, images, _, patterns = given
    worked = []

    def method(model, x, target):
        worked.append(1)
        return x

    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for file in (None, 3, "", ".", tmp_path, tmp_path / "none" / "a.png", pipe, f"{'a' * 300}.png", "a\0.png"):
        for write in (patterns.save, lambda file: pb.draw_gallery(network, images, {"own": method}, file)):
            with pytest.raises(UserError, match=r"^file=.*: (give|make|choose) "):
                write(file)
    for file in ("a", "a.xyz", "a.part", "a.tar.gz"):
        with pytest.raises(UserError, match=r"^file=.*has no suffix of a picture: give one of .*\.png"):
            pb.draw_gallery(network, images, {"own": method}, tmp_path / file)
    assert not worked
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
    for file in (tmp_path / "a.PNG", str(tmp_path / "a.pdf")):
        pb.draw_gallery(network, images[:1], {"own": method}, file)
        assert Path(file).stat().st_size > 1000


def test_a_full_disk_is_one_error(given, tmp_path, monkeypatch):
    network, images, _, patterns = given

    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pattern_bench.storage.tensor_files.save_file", full)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    for write in (patterns.save, lambda file: pb.draw_gallery(network, images[:1], {}, file)):
        with pytest.raises(
            UserError, match=r"^file=.*a\.png cannot be written \(No space left on device\): free space"
        ):
            write(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_pruned_network_in_half_precision_is_explained(given):
    _, images, _, _ = given
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval().half()
    prune.l1_unstructured(network[1], "weight", 0.5)
    curves = pb.degradation(network, images, {}, patch=4, steps=2)
    probabilities = widened(network)(images).softmax(1).max(1).values
    torch.testing.assert_close(curves["random_order"][:, 0], probabilities.detach())
