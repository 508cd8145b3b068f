"""Networks of many families come out of ``canonical`` with the same outputs, and what it cannot do, it says."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models

from pattern_bench.core.canonical import canonical
from pattern_bench.core.collector import Collector
from pattern_bench.core.estimators import Pattern, TwoRegimes
from pattern_bench.core.layers import LAYER_TYPES, geometry_of, patches
from pattern_bench.core.network import collecting, layers_in_order
from pattern_bench.errors import UserError
from pattern_bench.methods.patterns import PatternAttribution

# name: batch norms that no layer directly precedes, and which stay
TORCHVISION = {
    "alexnet": 0, "convnext_tiny": 0, "densenet121": 62, "efficientnet_b0": 0, "googlenet": 0, "inception_v3": 0,
    "mnasnet0_5": 0, "mobilenet_v2": 0, "mobilenet_v3_small": 0, "regnet_y_400mf": 0, "resnet18": 0,
    "shufflenet_v2_x0_5": 0, "squeezenet1_1": 0, "vgg11_bn": 0,
}  # fmt: skip
TIMM = {
    "convnext_atto": 0,
    "densenet121": 62,
    "ghostnet_050": 0,
    "mobilenetv3_small_050": 0,
    "nf_resnet26": 0,  # ScaledStdConv2d
    "regnetx_002": 0,
    "repvgg_a0": 17,  # identity branches: batch norm of the block's input
    "resnet18": 0,
    "resnetv2_50": 17,  # pre-activation
    "resnetv2_50x1_bit": 0,  # StdConv2d, group norm
    "resnext26ts": 0,  # BatchNormAct2d
    "tf_efficientnet_b0": 0,  # Conv2dSame
    "tf_mixnet_s": 34,  # Conv2dSame, and batch norm of concatenated layers
    "vit_tiny_patch16_224": 0,  # every projection is a Linear module
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small operations are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomised(model):
    """Statistics of batch norm, and gains that start at zero, as training leaves them: none a no-op."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    return model.double().eval()


def from_torchvision(name):
    extra = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    size = 75 if name == "inception_v3" else 64
    with torch.device("meta" if name in ("alexnet", "vgg11_bn") else "cpu"):
        model = models.get_model(name, weights=None, **extra)
    if name in ("alexnet", "vgg11_bn"):  # whose dense layers would take 1 GB in double precision
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier[1 if name == "alexnet" else 0] = nn.Linear(256 if name == "alexnet" else 512, 4096)
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.05)
    return randomised(model), torch.randn(2, 3, size, size).double()


def from_timm(name):
    timm = pytest.importorskip("timm", reason="the extra 'timm' is not installed")
    size = 224 if name.startswith("vit") else 64
    return randomised(timm.create_model(name)), torch.randn(2, 3, size, size).double()


def norms(model):
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def check(model, x):
    """Canonicalises; compares outputs, every layer's arithmetic and the original before and after."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    description = str(model)
    network = canonical(model, x[:1])
    assert str(model) == description
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    wrong, seen = [], []

    def hook(layer, inputs, y):
        x = inputs[0][:1].flatten(0, -2) if isinstance(layer, nn.Linear) else inputs[0][:1]
        p = patches(x, geometry_of(layer))
        u = p @ layer.weight.view(len(p), -1, p.shape[-1]).mT
        channels_last = y[:1] if isinstance(layer, nn.Linear) else y[:1].movedim(1, -1)
        u = u.movedim(0, 1).reshape(channels_last.shape) + (0 if layer.bias is None else layer.bias)
        seen.append(layer)
        if not torch.allclose(u, channels_last, rtol=1e-9, atol=1e-9 * float(u.abs().max())):
            wrong.append(layer)

    layers = [module for module in network.modules() if isinstance(module, LAYER_TYPES)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        found, expected = network(x), model(x)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert seen
    assert not wrong
    assert not any(parameter.requires_grad for parameter in network.parameters())
    return network


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_families(name):
    model, x = from_torchvision(name)
    network = check(model, x)
    assert norms(network) == TORCHVISION[name]
    assert layers_in_order(network, x[:1]) == layers_in_order(model, x[:1])


@pytest.mark.parametrize("name", TIMM)
def test_timm_families(name):
    model, x = from_timm(name)
    network = check(model, x)
    assert norms(network) == TIMM[name]
    assert layers_in_order(network, x[:1]) == layers_in_order(model, x[:1])


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("torchvision", "mobilenet_v2"), ("torchvision", "googlenet"), ("torchvision", "squeezenet1_1"),
        ("timm", "tf_efficientnet_b0"), ("timm", "resnext26ts"), ("timm", "nf_resnet26"),
    ],
)  # fmt: skip
def test_patterns_and_attributions_of_a_family(library, name):
    model, x = (from_torchvision if library == "torchvision" else from_timm)(name)
    network = canonical(model, x[:1])
    names = layers_in_order(network, x[:1])
    collectors = {layer: Collector(network.get_submodule(layer), gram=False) for layer in names}
    with torch.no_grad(), collecting(network, collectors):
        network(x)
    patterns = {}
    for layer, collector in collectors.items():
        weight = network.get_submodule(layer).weight
        fitted = TwoRegimes().fit(weight.flatten(1), collector.moments(), torch.Generator())
        patterns[layer] = Pattern(fitted.positive.view_as(weight), fitted.negative.view_as(weight), fitted.dead)
    attribution = PatternAttribution(network, patterns).attribute(x)
    assert attribution.shape == x.shape
    assert attribution.isfinite().all()
    assert attribution.abs().max() > 0


class Net(nn.Module):
    """``forward`` is a function of the modules and x."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x).flatten(1)


def small(function, **modules):
    torch.manual_seed(0)
    return randomised(Net(function, **modules)), torch.randn(3, 4, 6, 6).double()


def conv(**settings):
    return nn.Conv2d(4, 4, 3, padding=1, **settings)


def branches(net, x):
    """Traceable by nothing: it looks at values."""
    y = net.norm(net.conv(x))
    return y.relu() if float(y.detach().sum()) > -1e9 else y


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.squeeze, self.scale = nn.Conv2d(4, 4, 1), nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        return x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid() * self.scale


class Blur(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.full((4, 1, 2, 2), 0.25))

    def forward(self, x):
        return F.conv2d(x, self.kernel, groups=4)


FOLDED = {
    "control flow": (branches, lambda: {"conv": conv(), "norm": nn.BatchNorm2d(4)}),
    "dense": (
        lambda net, x: net.norm(net.fc(x.flatten(1))).relu(),
        lambda: {"fc": nn.Linear(144, 5, bias=False), "norm": nn.BatchNorm1d(5)},
    ),
    "dense, without scale": (
        lambda net, x: net.norm(net.fc(x.flatten(1))).relu(),
        lambda: {"fc": nn.Linear(144, 5), "norm": nn.BatchNorm1d(5, affine=False)},
    ),
    "without scale": (
        lambda net, x: F.relu_(net.norm(net.conv(x))),
        lambda: {"conv": conv(), "norm": nn.BatchNorm2d(4, affine=False)},
    ),
    "known by two names": (
        lambda net, x: net.block(x).relu(),
        lambda: (lambda c, n: {"conv": c, "norm": n, "block": nn.Sequential(c, nn.Identity(), n)})(
            conv(), nn.BatchNorm2d(4)
        ),
    ),
    "weight norm": (
        lambda net, x: net.norm(net.conv(x)),
        lambda: {"conv": nn.utils.parametrizations.weight_norm(conv()), "norm": nn.BatchNorm2d(4)},
    ),
    "spectral norm as a hook": (
        lambda net, x: net.norm(net.conv(x)),
        lambda: {"conv": nn.utils.spectral_norm(conv()), "norm": nn.BatchNorm2d(4)},
    ),
    "gates and other norms": (
        lambda net, x: net.layer(net.group(net.gate(net.blur(net.norm(net.conv(x)))))),
        lambda: {
            "conv": conv(), "norm": nn.BatchNorm2d(4), "blur": Blur(), "gate": Gate(), "group": nn.GroupNorm(2, 4),
            "layer": nn.LayerNorm(5),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDED)
def test_batch_norm_is_folded(case):
    function, modules = FOLDED[case]
    network = check(*small(function, **modules()))
    assert norms(network) == 0
    layer = network.conv if hasattr(network, "conv") else network.fc
    assert type(layer) in LAYER_TYPES


KEPT = {
    "read twice": (
        lambda net, x: (lambda y: net.norm(y) + y)(net.conv(x)), lambda: {"conv": conv(), "norm": nn.BatchNorm2d(4)}
    ),
    "shared layer": (
        lambda net, x: net.norm(net.conv(net.conv(x))), lambda: {"conv": conv(), "norm": nn.BatchNorm2d(4)}
    ),
    "changed in place": (
        lambda net, x: net.norm(net.conv(x).relu_()), lambda: {"conv": conv(), "norm": nn.BatchNorm2d(4)}
    ),
    "first": (lambda net, x: net.conv(net.norm(x).relu()), lambda: {"conv": conv(), "norm": nn.BatchNorm2d(4)}),
    "over positions": (
        lambda net, x: net.norm(net.fc(x.flatten(2))),
        lambda: {"fc": nn.Linear(36, 4), "norm": nn.BatchNorm1d(4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_batch_norm_that_is_no_part_of_a_layer_stays(case):
    function, modules = KEPT[case]
    assert norms(check(*small(function, **modules()))) == 1


def test_a_layer_that_pads_by_itself_is_written_out():
    class Same(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.pad(x, (0, 1, 0, 1)))

    network = check(*small(lambda net, x: net.norm(net.conv(x)), conv=Same(4, 4, 3, 2), norm=nn.BatchNorm2d(4)))
    assert norms(network) == 0
    assert geometry_of(network.conv).padding == ((0, 1), (0, 1))


class Squared(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) ** 2


class Matrix(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(6, 3)), function

    def forward(self, x):
        return self.function(x, self.weight)


REFUSED = {
    "transposed": (
        lambda net, x: net.up(net.conv(x)), lambda: {"conv": conv(), "up": nn.ConvTranspose2d(4, 2, 2)},
        r"model=Net: module up \(ConvTranspose2d\) multiplies by learned weights in conv_transpose2d, outside any Conv",
    ),
    "attention": (
        lambda net, x: net.attend(*[x.flatten(2)] * 3)[0],
        lambda: {"attend": nn.MultiheadAttention(36, 2, batch_first=True)},
        r"module attend \(MultiheadAttention\) .* multi_head_attention_forward",
    ),
    "recurrent": (
        lambda net, x: net.lstm(x.flatten(2))[0], lambda: {"lstm": nn.LSTM(36, 5)}, r"module lstm \(LSTM\) .* in lstm"
    ),
    "bilinear": (
        lambda net, x: net.pair(x, x), lambda: {"pair": nn.Bilinear(6, 6, 2)}, r"module pair \(Bilinear\)"
    ),
    "functional": (
        lambda net, x: F.conv2d(x, net.conv.weight), lambda: {"conv": conv()},
        r"module at the root \(Net\) .* in conv2d",
    ),
    "functional, derived": (
        lambda net, x: F.linear(x, net.fc.weight.tanh()), lambda: {"fc": nn.Linear(6, 2)}, r"at the root .* in linear",
    ),
    "product": (lambda net, x: net.m(x), lambda: {"m": Matrix(torch.matmul)}, r"module m \(Matrix\) .* in matmul"),
    "product with a derived matrix": (
        lambda net, x: net.m(x.relu()), lambda: {"m": Matrix(lambda x, w: x @ F.normalize(w))}, r"module m \(Matrix\)"
    ),
    "einsum": (
        lambda net, x: net.m(x), lambda: {"m": Matrix(lambda x, w: torch.einsum("bchw,wk->bck", x, w))}, r"in einsum"
    ),
    "kernel from the image": (
        lambda net, x: F.conv2d(x, net.conv(x).mean((0, 2, 3)).view(1, 4, 1, 1)), lambda: {"conv": conv()},
        r"at the root .* in conv2d",
    ),
    "own forward": (
        lambda net, x: net.conv(x), lambda: {"conv": Squared(4, 2, 3)},
        r"layer conv \(.*Squared\) computes another function .*: replace it by a plain nn.Conv2d",
    ),
    "no batch": (
        lambda net, x: torch.stack([net.conv(image) for image in x]), lambda: {"conv": conv()},
        r"layer conv .* without a batch dimension",
    ),
    "by keyword": (lambda net, x: net.conv(input=x), lambda: {"conv": conv()}, r"layer conv .* 0 positional inputs"),
    "TorchScript": (
        lambda net, x: net.block(x), lambda: {"block": torch.jit.script(conv())},
        r"module block is compiled by TorchScript",
    ),
    "without gradient": (
        lambda net, x: torch.from_numpy(net.conv(x).numpy()), lambda: {"conv": conv()},
        r"model=Net cannot be run with gradients \(Can't call numpy.*\), which explanations need",
    ),
    "batch norm of the batch": (
        lambda net, x: net.norm(net.conv(x))[:, :, :1],
        lambda: {"conv": conv(), "norm": nn.BatchNorm2d(4, track_running_stats=False)},
        r"model=Net puts out something else for an image where other images are in its batch",
    ),
    "random": (
        lambda net, x: F.dropout(net.conv(x), training=True), lambda: {"conv": conv()},
        r"computes other outputs \(by up to .*\) once batch norm is folded.*randomness",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(case):
    function, modules, message = REFUSED[case]
    model, x = small(function, **modules())
    with pytest.raises(UserError, match=message):
        canonical(model, x[:1])


@pytest.mark.parametrize(
    ("name", "message"),
    [("vit_b_16", r"self_attention \(MultiheadAttention\)"), ("swin_t", r"attn \(ShiftedWindowAttention\) .* linear")],
)
def test_torchvision_transformers_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        canonical(models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224))


def test_hooks_are_taken_off_again():
    model, x = small(lambda net, x: net.conv(x), conv=conv())
    network = canonical(model, x[:1])
    for module in [*network.modules(), *model.modules()]:
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
