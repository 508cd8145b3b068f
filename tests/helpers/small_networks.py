"""Small networks in float64 with random weights, and any method on them."""

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from pattern_bench import methods
from pattern_bench.configuration.location import CONF
from pattern_bench.core.canonical import canonical
from pattern_bench.core.estimators import Filter, Pattern
from pattern_bench.core.layers import LAYER_TYPES
from pattern_bench.methods.base import create

METHOD_FILES = sorted((CONF / "method").glob("*.yaml"))
METHODS = set(methods.by_name())


def seeded(model):
    """In evaluation mode and float64, with random weights, biases and norms."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=draw) * (1.5 / fan) ** 0.5
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2, generator=draw)
            module.weight.data.uniform_(0.5, 2, generator=draw)
    return model.double().eval().requires_grad_(False)


def sequential(bias=True, inplace=False):
    return seeded(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=bias), nn.ReLU(inplace), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1, bias=bias), nn.ReLU(inplace), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(24, 5, bias=bias), nn.ReLU(inplace), nn.Linear(5, 3, bias=bias),
        )
    )  # fmt: skip


class Varied(nn.Module):
    """Residual, concatenated, batch-normed, depthwise; ReLUs as functions, methods, reused modules and in place."""

    def __init__(self, inplace=True):
        super().__init__()
        self.inplace = inplace
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.point, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.relu, self.relu6 = nn.ReLU(inplace), nn.ReLU6(inplace)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        y = F.relu(self.depthwise(x), inplace=self.inplace)
        y = self.relu6(self.point(y) + x)
        z = self.relu(self.other(F.max_pool2d(y, 2))) + F.adaptive_avg_pool2d(y, 4)[:, :2].relu()
        return self.head(torch.cat([y.mean((2, 3)), z.clamp(min=0).mean((2, 3))], 1))


def varied(inplace=True):
    return canonical(seeded(Varied(inplace)), images(2))


def images(count, seed=0, size=8):
    return torch.randn(count, 2, 6 if size == 6 else 8, 8, generator=torch.Generator().manual_seed(seed)).double()


def pattern(tensor):
    return Pattern(tensor, tensor, torch.zeros(len(tensor), dtype=torch.bool))


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)}


def patterns(model, change=lambda w: w + 0.1):
    return {name: pattern(change(layer.weight.detach().double())) for name, layer in layers(model).items()}


def filters(model):
    """S_w's patterns."""
    found = {}
    for name, layer in layers(model).items():
        found[name] = Filter().fit(layer.weight.flatten(1).double(), None, torch.Generator())
    return found


def of_file(file):
    """A method's settings, within a configuration that has a seed."""
    return OmegaConf.create({"seed": 0, "method": OmegaConf.load(file)}).method


def method(name, model, **settings):
    settings = {**({"samples": 4} if name in ("smoothgrad", "prediction_difference") else {}), **settings}
    node = OmegaConf.merge(of_file(CONF / "method" / f"{name}.yaml"), settings)
    return create(instantiate(node), model, patterns(model), images(5, seed=9).to(next(model.parameters()).dtype))


def state(model):
    """All that an explanation could leave behind in a network."""
    return {
        name: (dict(module.__dict__), {k: list(v) for k, v in module.__dict__.items() if k.endswith("_hooks")})
        for name, module in model.named_modules()
    }, [(id(p), p.requires_grad, p.grad, p._version) for p in model.parameters()]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(torch.cat([F.relu(self.b(x) + x), x], 1).mean((2, 3)))


class Smooth(nn.Sequential):
    """For digits, with a GELU, which guided back-propagation has no rule for."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 10))
