"""Networks that put out something else than logits (B, K), and networks in other forms, are read as what they are."""

import copy

import pytest
import torch
from helpers.endings import Ending, Named, images, plain
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import pattern_bench as pb
from pattern_bench.core.canonical import canonical
from pattern_bench.core.network import layers_in_order
from pattern_bench.core.outputs import as_logits
from pattern_bench.core.predictions import prediction_of, probabilities
from pattern_bench.errors import UserError

ENDS = {
    "softmax": lambda z: F.softmax(z, dim=1),
    "softmax over -1": lambda z: z.softmax(-1),
    "log softmax": lambda z: F.log_softmax(z, 1),
    "torch.log_softmax": lambda z: torch.log_softmax(z, -1),
    "logarithm": lambda z: torch.log(z.softmax(1)),
    "reshaped": lambda z: z[:, :, None, None].softmax(1).flatten(1),
    "in a dict": lambda z: {"probabilities": z.softmax(1)},
    "kept off zero": lambda z: z.softmax(1).clamp(1e-12),
}


def maps_and_curves(model):
    x = images()
    patterns = pb.fit_patterns(model, pb.collect_moments(model, [x], gram=False), "a")
    method = pb.PatternAttribution(model, patterns)
    return method, pb.degradation(
        model, x, {"PA": lambda m, i, t: canonical_map(model, patterns, i, t)}, patch=3, steps=9
    )


def canonical_map(model, patterns, x, target):
    from pattern_bench.methods.patterns import PatternAttribution

    return PatternAttribution(canonical(model, x[:1]), patterns).attribute(x, target)


@pytest.mark.parametrize("end", ENDS)
def test_the_logits_before_a_last_softmax_are_explained_and_their_softmax_is_taken_once(end):
    logits, ending = Ending(lambda z: z).eval(), Ending(ENDS[end]).eval()
    x = images()
    network = canonical(ending, x[:1])
    with torch.no_grad():
        torch.testing.assert_close(network(x), logits(x))
        torch.testing.assert_close(as_logits(ending, x[:1])(x), logits(x))
    assert layers_in_order(network, x[:1]) == ["output.0", "output.4"]
    _, expected = maps_and_curves(logits)
    _, found = maps_and_curves(ending)
    for name, curve in expected.items():
        torch.testing.assert_close(found[name], curve)
    torch.testing.assert_close(found["PA"][:, 0], logits(x).softmax(1).max(1).values.detach())
    again = copy.deepcopy(network).double()
    torch.testing.assert_close(again(x.double()), logits.double()(x.double()))


def test_modules_that_end_in_a_softmax():
    x = images()
    expected = plain()(x)
    for last in (nn.Softmax(1), nn.LogSoftmax(-1)):
        model = nn.Sequential(plain(), last).eval()
        torch.testing.assert_close(canonical(model, x[:1])(x), expected.detach())


def test_sigmoids_are_taken_once_and_each_output_by_itself():
    x, model = images(), nn.Sequential(plain(), nn.Sigmoid()).eval()
    network = canonical(model, x[:1])
    torch.testing.assert_close(network(x), plain()(x).detach())
    torch.testing.assert_close(probabilities(network, network(x)), model(x).detach())
    curve = pb.degradation(model, x, {}, patch=4, steps=3, target=2)["random_order"]
    torch.testing.assert_close(curve[:, 0], model(x)[:, 2].detach())


@pytest.mark.parametrize(
    "end", [lambda z: z, lambda z: z.squeeze(1), lambda z: z.sigmoid(), lambda z: z[:, 0].sigmoid()]
)
def test_one_logit_is_the_evidence_for_class_1(end):
    x, model = images(), Ending(end, 1).eval()
    z = Ending(lambda z: z, 1).eval()(x).detach()
    network = canonical(model, x[:1])
    torch.testing.assert_close(network(x), z)
    curve = pb.degradation(model, x, {}, patch=4, steps=3)["random_order"]
    torch.testing.assert_close(curve[:, 0], z[:, 0].sigmoid())
    assert curve.unique().numel() > 6
    both = torch.tensor([[1.5], [-1.5], [0.5]])
    found = prediction_of(network, both)
    assert found.output.tolist() == [0, 0, 0]
    assert found.label.tolist() == [1, 0, 1]
    torch.testing.assert_close(found.confidence, both.abs()[:, 0].sigmoid())


def test_probabilities_of_another_origin_are_refused():
    ensemble = Ending(lambda z: (z.softmax(1) + (2 * z).softmax(1)) / 2).eval()
    for use in (canonical, as_logits):
        with pytest.raises(UserError, match="model=Ending puts out probabilities that no softmax of its own made"):
            use(ensemble, images(1))


class Heads(nn.Module):
    """``end`` of features (B, 8, 10, 10), a map (B, 4, 10, 10) that a convolution makes of them, and two dense
    layers' outputs (B, 4)."""

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.map = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.a, self.b, self.norm = nn.Linear(8, 4), nn.Linear(8, 4), nn.BatchNorm1d(4)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        self.end = end

    def forward(self, x):
        f = self.conv(x).relu()
        g = f.mean((2, 3))
        return self.end(self, f, self.map(f), self.a(g), self.b(g))


SQUASHED = {
    "log-softmax, scaled": lambda n, f, m, a, b: 3 * a.log_softmax(1),
    "per cent": lambda n, f, m, a, b: 100 * a.softmax(1),
    "softmax of a softmax": lambda n, f, m, a, b: a.softmax(1).softmax(1),
    "sigmoid of a log-softmax": lambda n, f, m, a, b: a.log_softmax(1).sigmoid(),
    "heads, side by side": lambda n, f, m, a, b: torch.cat([a.softmax(1), b.log_softmax(1)], 1),
    "hierarchy": lambda n, f, m, a, b: 9 * (a[:, :2].softmax(1)[..., None] * b.view(-1, 2, 2).softmax(2)).flatten(1),
    "over images": lambda n, f, m, a, b: a.softmax(0),
    "over one value": lambda n, f, m, a, b: a[:, :1].softmax(1),
    "sigmoid, scaled": lambda n, f, m, a, b: 5 * a.sigmoid(),
    "one sigmoid, shifted": lambda n, f, m, a, b: 2 * a[:, :1].sigmoid() - 1,
    "hard sigmoid": lambda n, f, m, a, b: F.hardsigmoid(a),
    "any position": lambda n, f, m, a, b: 1 - (1 - m.sigmoid()).flatten(2).prod(-1),
    "clamped": lambda n, f, m, a, b: a.softmax(1).clamp(0.2, 0.3),
    "logarithm of more": lambda n, f, m, a, b: a.softmax(1).add(0.1).log(),
    "after batch norm": lambda n, f, m, a, b: 2 * n.norm(a).softmax(1),
    "two networks": lambda n, f, m, a, b: a.softmax(1) + b.softmax(1),
    "mean of a map": lambda n, f, m, a, b: 10 * m.softmax(1).mean((2, 3)),
    "softmin": lambda n, f, m, a, b: 10 * F.softmin(a, 1),
    "times confidence": lambda n, f, m, a, b: a.softmax(1) * b[:, :1],
    "into a tensor": lambda n, f, m, a, b: torch.zeros_like(a).copy_(a.softmax(1)).mul_(7),
    "kept where large": lambda n, f, m, a, b: (lambda p: torch.where(p > 0.25, p, 0.0))(a.softmax(1)),
    "written out": lambda n, f, m, a, b: 100 * a.exp() / a.exp().sum(1, keepdim=True),
    "logarithm, written out": lambda n, f, m, a, b: 3 * (a - a.logsumexp(1, keepdim=True)),
    "kept from overflow": lambda n, f, m, a, b: (a - a.max(1, keepdim=True).values).softmax(1),
}  # fmt: skip


@pytest.mark.parametrize("end", SQUASHED)
def test_what_is_made_of_a_softmax_or_sigmoid_is_refused(end):
    model, x = Heads(SQUASHED[end]).eval(), images()
    settings = {"patch": 4, "steps": 2}
    for use in (as_logits, canonical, lambda model, x: pb.degradation(model, x, {}, **settings)):
        with pytest.raises(
            UserError, match=r"^model=Heads puts out .*(softmax|sigmoid).*model.output=NAME; from Python pb.Logits"
        ):
            use(model, x)


LOGITS = {
    "centred": lambda n, f, m, a, b: b[:, :1] + a - a.mean(1, keepdim=True),
    "batch norm": lambda n, f, m, a, b: n.norm(a),
    "normalised": lambda n, f, m, a, b: 10 * F.normalize(a),
    "layer norm": lambda n, f, m, a, b: F.layer_norm(100 * a, (4,)),
    "instance norm": lambda n, f, m, a, b: F.instance_norm(m).amax((2, 3)),
    "rectified": lambda n, f, m, a, b: a.relu(),
    "kept small": lambda n, f, m, a, b: 30 * (a / 30).tanh(),
    "gate": lambda n, f, m, a, b: a * b.sigmoid(),
    "gate of itself": lambda n, f, m, a, b: a * a.sigmoid(),
    "gate in place, of a part": lambda n, f, m, a, b: (
        lambda y: (y[:, :4].sigmoid_(), y[:, :4] * y[:, 4:])[1]
    )(torch.cat([a, b], 1)),
    "squeeze and excitation": lambda n, f, m, a, b: (m * a.sigmoid()[..., None, None]).mean((2, 3)),
    "mixture of experts": lambda n, f, m, a, b: (
        n.a(f.amax((2, 3))).softmax(1)[..., None] * torch.stack([a, b, -a, -b], 1)
    ).sum(1),
    "attention over positions": lambda n, f, m, a, b: (m.flatten(2) * m[:, :1].flatten(2).softmax(-1)).sum(-1),
    "attention of each class": lambda n, f, m, a, b: (m.flatten(2) * m.flatten(2).softmax(-1)).sum(-1),
    "soft maximum of a map": lambda n, f, m, a, b: m.flatten(2).logsumexp(-1),
    "expected position": lambda n, f, m, a, b: m.flatten(2).softmax(-1) @ torch.linspace(0, 1, 100),
    "expected position, written out": lambda n, f, m, a, b: (
        lambda e: e / e.sum(-1, keepdim=True) @ torch.linspace(0, 1, 100)
    )(m.flatten(2).exp()),
    "expected value": lambda n, f, m, a, b: a.softmax(1) @ torch.arange(4.0)[:, None],
    "classes left out": lambda n, f, m, a, b: a + torch.tensor([0, -1e9, 0, 0]),
}  # fmt: skip


@pytest.mark.parametrize("end", LOGITS)
def test_other_softmaxes_and_sigmoids_are_part_of_the_network(end):
    model, x = Heads(LOGITS[end]).eval(), images()
    assert as_logits(model, x[:1]) is model
    torch.testing.assert_close(canonical(model, x[:1])(x), model(x).detach())


def test_a_function_undoes_what_follows_a_softmax():
    x, expected = images(), Heads(lambda n, f, m, a, b: a).eval()(images()).detach()
    for end, undo in (
        (lambda n, f, m, a, b: 100 * a.softmax(1), lambda y: y / 100),
        (lambda n, f, m, a, b: 3 * a.log_softmax(1), lambda y: y / 3),
        (lambda n, f, m, a, b: {"p": a.softmax(1).add(0.1)}, lambda y: y["p"] - 0.1),
        (lambda n, f, m, a, b: a, lambda y: y.softmax(1)),
        (lambda n, f, m, a, b: a.log_softmax(1), lambda y: y.softmax(1)),
        (lambda n, f, m, a, b: a.softmax(1), lambda y: y.log()),
    ):
        model = pb.Logits(Heads(end).eval(), undo)
        torch.testing.assert_close(as_logits(model, x[:1])(x), expected)
        torch.testing.assert_close(canonical(model, x[:1])(x), expected)
        assert next(iter(pb.collect_moments(model, [x], gram=False))) == "conv"
    with pytest.raises(UserError, match="model=Heads puts out what is left of its logits after a softmax"):
        canonical(pb.Logits(Heads(lambda n, f, m, a, b: a).eval(), lambda y: 2 * y.softmax(1)), x)


@pytest.mark.parametrize(
    ("end", "output"),
    [
        (lambda z: (z, -z), 0),
        (lambda z: [-z, z, None], 1),
        (lambda z: {"out": z, "aux": -z}, "out"),
        (lambda z: Named(z, -z), "logits"),
        (lambda z: Named(-z, z), 1),
        (lambda z: {"deep": [(-z, z)]}, lambda outputs: outputs["deep"][0][1]),
        (lambda z: (z.softmax(1), -z), 0),
    ],
)
def test_one_of_several_outputs_is_named(end, output):
    x, several = images(), Ending(end).eval()
    with pytest.raises(UserError, match=r"model=Ending returns a .*say which are its logits \(model.output="):
        pb.collect_moments(several, [x])
    model = pb.Logits(several, output)
    torch.testing.assert_close(canonical(model, x[:1])(x), Ending(lambda z: z).eval()(x).detach())
    assert list(pb.collect_moments(model, [x], gram=False)) == ["output.0", "output.4"]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in several.named_parameters()]


def test_an_output_that_is_not_there_is_one_error():
    several = Ending(lambda z: {"out": z, "aux": -z}).eval()
    with pytest.raises(UserError, match=r"has no output 'logits'; it returns a dict \('out', 'aux'\)"):
        pb.collect_moments(pb.Logits(several, "logits"), [images()])
    with pytest.raises(UserError, match="chooses its logits returned a list: return a tensor"):
        pb.collect_moments(pb.Logits(several, list), [images()])


# --- other forms ---


def weights_of(moments):
    return {name: sums.xg for name, sums in moments.items()}


def test_compiled_networks_are_what_they_were_made_from():
    x, model = images(), plain()
    within = nn.Sequential(torch.compile(plain()[:2], backend="eager"), *plain()[2:]).eval()
    expected = weights_of(pb.collect_moments(model, [x], gram=False))
    found = weights_of(pb.collect_moments(torch.compile(model, backend="eager"), [x], gram=False))
    assert list(found) == ["0", "4"]
    torch.testing.assert_close(found, expected)
    assert list(pb.collect_moments(within, [x], gram=False)) == ["0.0", "3"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
        lambda m: nn.utils.weight_norm(m[0]),
        lambda m: nn.utils.spectral_norm(m[4]),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_hooks_compute_are_written_out(change):
    x, model = images(), plain()
    change(model)
    model(x)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    network = canonical(model.eval(), x[:1])
    torch.testing.assert_close(network(x), model(x).detach())
    assert type(network[0]) is nn.Conv2d
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_network_that_is_one_layer():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)).eval()
    x = images(9, 6)
    network = canonical(layer, x[:1])
    assert type(network) is nn.Linear
    torch.testing.assert_close(network.weight, layer.weight.detach())
    assert list(pb.collect_moments(layer, [x])) == [""]


def test_lazy_layers_have_no_weights_to_examine(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(5)).eval()
    with pytest.raises(UserError, match="module 1 has no weights before it meets its first input"):
        canonical(model, images(1))
    for use in (
        lambda: pb.degradation(model, images(), {}, patch=4, steps=2),
        lambda: pb.draw_gallery(model, images(), {}, tmp_path / "gallery.png"),
    ):
        with pytest.raises(UserError, match="module 1 has no weights before it meets its first input"):
            use()
    assert isinstance(model[1], nn.LazyLinear)
    model(images(1))
    assert list(pb.collect_moments(model, [images()])) == ["1"]


def test_training_mode_is_refused_everywhere_and_nothing_is_changed(tmp_path):
    model = nn.Sequential(plain(), nn.BatchNorm1d(5)).eval()
    moments = pb.collect_moments(model, [images()])
    patterns = pb.fit_patterns(model, moments)
    model[1].train()
    state = copy.deepcopy(model.state_dict())
    x = images()
    for use in (
        lambda: pb.collect_moments(model, [x]),
        lambda: canonical(model, x),
        lambda: pb.degradation(model, x, {}, patch=3, steps=3),
        lambda: pb.draw_gallery(model, x, {}, tmp_path / "gallery.png"),
        lambda: pb.PatternNet(model, patterns).attribute(x),
    ):
        with pytest.raises(UserError, match=r"in training mode \(module 1\).*call model.eval\(\) first"):
            use()
    assert [module.training for module in model.modules()].count(True) == 1
    assert model[1].training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


class Globs(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts, self.head = nn.ModuleDict({"conv[1]": nn.Conv2d(3, 8, 3)}), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.parts["conv[1]"](x).relu().mean((2, 3)))


def test_a_layers_name_may_hold_what_a_glob_would_read():
    assert list(pb.collect_moments(Globs().eval(), [images()], layers=["parts.conv[1]"])) == ["parts.conv[1]"]


def test_no_image_shows_no_outputs():
    with pytest.raises(UserError, match=r"the images given to model=Linear are none \(shape \(0, 2\)\): give at least"):
        as_logits(nn.Linear(2, 3).eval(), torch.ones(0, 2))


def test_layers_within_vmap_cannot_be_examined():
    class Mapped(nn.Sequential):
        def forward(self, x):
            return torch.vmap(super().forward)(x)

    model = Mapped(nn.Linear(2, 3)).eval()
    with pytest.raises(UserError, match=r"model=Mapped hides what its layers compute .*outside of torch.vmap"):
        as_logits(model, torch.ones(2, 2))
    with pytest.raises(RuntimeError, match=r"cannot be multiplied|size"):
        as_logits(model, torch.ones(2, 5))
