"""Learned weights outside of Conv and Linear layers: what sums inputs with them is refused, what does not runs."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from pattern_bench.core.canonical import canonical
from pattern_bench.errors import UserError


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.mm(w.T)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x


class Net(nn.Module):
    """``head`` makes outputs of the network, its features (B, 8, 6, 6) and their means (B, 8)."""

    def __init__(self, head):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.matrix, self.scale = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.rand(8) + 0.5)
        self.place = nn.Parameter(torch.randn(1, 8, 6, 6))
        self.norm, self.shift = nn.BatchNorm2d(8), nn.Conv2d(8, 18, 3, padding=1)
        self.deform = torchvision.ops.DeformConv2d(8, 8, 3, padding=1)
        for parameter in self.norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        self.spectrum = nn.Parameter(torch.randn(8, 6, 4, dtype=torch.cfloat))
        self.parts = nn.Parameter(torch.randn(8, 6, 4, 2))
        self.register_buffer("prototypes", torch.randn(5, 8))
        self.attribute = torch.randn(5, 8)
        self.register_buffer("mask", (torch.arange(8) % 3 > 0).float())
        self.register_buffer("constant", torch.rand(1, 8, 6, 6) + 0.5)
        self.register_buffer("cosines", (torch.arange(8.0)[:, None] * (torch.arange(8) + 0.5) * torch.pi / 8).cos())
        self.register_buffer("blur", torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16)
        self.head = head

    def forward(self, x):
        f = self.conv(x).relu()
        return self.head(self, f, f.mean((2, 3)))


def run(head):
    return canonical(Net(head).eval(), torch.randn(1, 3, 8, 8))


def loop_over_inputs(n, f, g):
    y = 0
    for i in range(8):
        y = y + g[:, i : i + 1] * n.matrix[:, i]
    return y


def loop_in_place(n, f, g):
    y, h = torch.zeros(len(g), 5), F.pad(g, (1, 1)).relu()
    for i in range(8):
        y += h[:, i + 1 : i + 2].sqrt() * n.matrix[:, i]
    return y


def loop_over_both(n, f, g):
    return torch.stack([sum(g[:, i] * n.matrix[k, i] for i in range(8)) for k in range(5)], 1)


def loop_fused(n, f, g):
    y = torch.zeros(len(g), 5)
    for i in range(8):
        y = torch.addcmul(y, g[:, i : i + 1].expand(-1, 5), n.matrix[:, i].expand(len(g), -1))
    return y


def loop_into_columns(n, f, g):
    y = torch.zeros(len(g), 5)
    for k in range(5):
        for i in range(8):
            y[:, k] += g[:, i] * n.matrix[k, i]
    return y


def loop_of_maxima(n, f, g):
    y = torch.full((len(g), 5), -1e9)
    for i in range(8):
        y = torch.maximum(y, g[:, i : i + 1] * n.matrix[:, i])
    return y


def loop_over_shifts(n, f, g):
    y, p = 0, F.pad(f, (1, 1, 1, 1))
    for i in range(9):
        y = y + p[:, :, i // 3 : i // 3 + 6, i % 3 : i % 3 + 6] * n.place[0, :, i // 3, i % 3, None, None]
    return n.fc(y.mean((2, 3)))


def loop_over_prototypes(n, f, g):
    y = 0
    for i in range(8):
        y = y - (g[:, i : i + 1] - n.prototypes[:, i : i + 1].T).abs()
    return y


def filtered(spectrum):
    return lambda n, f, g: n.fc(torch.fft.irfft2(torch.fft.rfft2(f) * spectrum(n), s=(6, 6)).relu().mean((2, 3)))


SUMS = {
    "sparse": (lambda n, f, g: torch.sparse.mm(n.matrix.to_sparse(), g.T).T, "mm"),
    "sparse image": (lambda n, f, g: torch.sparse.mm(g.to_sparse(), n.matrix.T), "mm"),
    "learned spectrum": (filtered(lambda n: n.spectrum), "irfft2"),
    "learned spectrum, in parts": (filtered(lambda n: torch.view_as_complex(n.parts)), "irfft2"),
    "spectrum of a learned kernel": (filtered(lambda n: torch.fft.rfft2(n.place[0])), "irfft2"),
    "Kronecker product": (lambda n, f, g: torch.kron(g, n.matrix).view(len(g), 5, -1).sum(-1), "sum"),
    "soft maximum": (lambda n, f, g: (g[:, None] * n.matrix).logsumexp(-1), "logsumexp"),
    "largest": (lambda n, f, g: (g[:, None] * n.matrix).amax(-1), "amax"),
    "largest and where": (lambda n, f, g: (g[:, None] * n.matrix).max(-1).values, "max"),
    "largest sum": (lambda n, f, g: (g[:, None] + n.matrix).amax(-1), "amax"),
    "largest distance": (lambda n, f, g: (g[:, None] - n.matrix).abs().amax(-1), "amax"),
    "median": (lambda n, f, g: (g[:, None] * n.matrix).median(-1).values, "median"),
    "product of all": (lambda n, f, g: (g[:, None] * n.matrix).prod(-1), "prod"),
    "pooled over places": (lambda n, f, g: n.fc(F.max_pool2d(f * n.place, 6).flatten(1)), "max_pool2d"),
    "loop over inputs": (loop_over_inputs, "add"),
    "loop in place": (loop_in_place, "add"),
    "loop over both": (loop_over_both, "add"),
    "loop into columns": (loop_into_columns, "add"),
    "loop of maxima": (loop_of_maxima, "maximum"),
    "loop over shifts": (loop_over_shifts, "add"),
    "loop over prototypes": (loop_over_prototypes, "sub"),
    "sparse prototypes": (lambda n, f, g: torch.sparse.mm(n.prototypes.to_sparse(), g.T).T, "mm"),
    "loop, fused": (loop_fused, "addcmul"),
    "two channels": (lambda n, f, g: n.fc(g) + (g[:, :1] * n.scale[0] - g[:, 1:2] * n.scale[1]), "sub"),
    "neighbours": (lambda n, f, g: n.fc((f * n.place + f.roll(1, -1) * n.place.roll(2, -1)).mean((2, 3))), "add"),
    "neighbours, mixed": (lambda n, f, g: n.fc(torch.lerp(g, g.roll(1, 1), n.scale)), "lerp"),
    "prototypes": (lambda n, f, g: g @ n.prototypes.T, "matmul"),
    "prototypes, no buffer": (lambda n, f, g: F.linear(g, n.attribute), "linear"),
    "prototypes' kernel": (lambda n, f, g: F.conv2d(f, n.prototypes[..., None, None]).mean((2, 3)), "conv2d"),
    "prototypes' distances": (lambda n, f, g: -torch.cdist(g, n.prototypes), "cdist"),
    "prototypes' cosine": (lambda n, f, g: 9 * F.cosine_similarity(g[:, None], n.prototypes, dim=-1), "cosine"),
    "prototypes' product and sum": (lambda n, f, g: (g[:, None] * n.prototypes).sum(-1), "sum"),
    "prototypes' nearest": (lambda n, f, g: -(g[:, None] - n.prototypes).abs().amax(-1), "amax"),
    "matmul": (lambda n, f, g: g @ n.matrix.T, "__matmul__|matmul"),
    "mm below Python": (lambda n, f, g: torch.ops.aten.mm(g, n.matrix.T), "mm"),
    "einsum": (lambda n, f, g: torch.einsum("bc,kc->bk", g, n.matrix), "einsum"),
    "dense function": (lambda n, f, g: F.linear(g, n.matrix), "linear"),
    "kernel made of weights": (lambda n, f, g: F.conv2d(f, n.matrix.tanh()[..., None, None]).mean((2, 3)), "conv2d"),
    "own autograd function": (lambda n, f, g: Product.apply(g, n.matrix), "apply|mm"),
    "deformable": (lambda n, f, g: n.fc(n.deform(f, n.shift(f)).mean((2, 3))), r"deform \(DeformConv2d\)"),
    "cosine": (lambda n, f, g: F.cosine_similarity(g[:, None], n.matrix, dim=-1), "cosine_similarity"),
    "distances": (lambda n, f, g: -torch.cdist(g, n.matrix), "cdist"),
    "distance, written out": (lambda n, f, g: (g[:, None] - n.matrix).square().sum(-1), "sum"),
    "distance to one": (lambda n, f, g: ((g - n.scale) ** 2).sum(1, keepdim=True).expand(-1, 5), "sum"),
    "pairwise distance": (lambda n, f, g: F.pairwise_distance(g[:, None], n.matrix), "pairwise_distance"),
    "product and sum": (lambda n, f, g: (g[:, None] * n.matrix).sum(-1), "sum"),
    "product and mean": (lambda n, f, g: (n.matrix * g[:, None] + 1).mean(-1), "mean"),
    "product in place": (lambda n, f, g: g[:, None].repeat(1, 5, 1).mul_(n.matrix).sum(-1), "sum"),
    "product into a part": (
        lambda n, f, g: (lambda y: (y[:, 2:6].mul_(n.scale[2:6]), n.fc(g) + y.sum(1, keepdim=True))[1])(g.clone()),
        "sum",
    ),
    "through an activation": (lambda n, f, g: (g[:, None] * n.matrix).tanh().sum(-1), "sum"),
    "with a constant matrix": (lambda n, f, g: (g[:, None] * n.matrix) @ torch.ones(8), "matmul"),
    "unfolded": (lambda n, f, g: (F.unfold(f, 1).mT.unsqueeze(2) * n.matrix).sum(-1).mean(1), "sum"),
    "over channels of a map": (lambda n, f, g: n.fc(g) + (f * n.place).sum((1, 2, 3))[:, None], "sum"),
    "chosen weights": (lambda n, f, g: (g[:, None] * n.matrix[torch.arange(5)]).sum(-1), "sum"),
    "weights chosen by the image": (
        lambda n, f, g: n.fc(g) + (g * n.matrix[g[:, :5].argmax(1)]).sum(1, keepdim=True), "sum"
    ),
    "attention with a learned query": (
        lambda n, f, g: n.fc(
            F.scaled_dot_product_attention(n.matrix[None, :1], f.flatten(2).mT, f.flatten(2).mT).flatten(1)
        ),
        "scaled_dot_product_attention",
    ),
    "attention pooling": (
        lambda n, f, g: n.fc((lambda t: (t * (t * n.scale).sum(-1, keepdim=True).softmax(1)).sum(1))(f.flatten(2).mT)),
        "sum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SUMS)
def test_what_sums_inputs_with_learned_weights_is_refused(case):
    head, function = SUMS[case]
    with pytest.raises(UserError, match=rf"multiplies by learned weights.*({function})|({function}).*multiplies by"):
        run(head)


def written_out(n, x):
    """Layer norm over channels as ConvNeXt's authors write it."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * n.scale[:, None, None]


def root_mean_square(n, x):
    return x * (x.pow(2).mean(1, keepdim=True) + 1e-6).rsqrt() * n.scale[:, None, None]


ELEMENTWISE = {
    "mask": lambda n, f, g: n.fc(g * n.mask),
    "mean of what a mask leaves": lambda n, f, g: n.fc(g) + (g * n.mask).sum(1, keepdim=True) / n.mask.sum(),
    "stored position": lambda n, f, g: n.fc((f + n.constant).relu().mean((2, 3))),
    "stored statistics": lambda n, f, g: n.fc(((f - n.constant) / n.constant).mean((2, 3))),
    "window": lambda n, f, g: n.fc((f * n.constant).mean((2, 3))),
    "cosine transform between layers": lambda n, f, g: n.fc(g @ n.cosines),
    "blur": lambda n, f, g: n.fc(F.conv2d(f, n.blur.expand(8, 1, 3, 3), groups=8).mean((2, 3))),
    "blur of the outputs": lambda n, f, g: F.conv2d(f, n.blur.expand(8, 1, 3, 3), groups=8).mean((2, 3)),
    "fixed spectrum": filtered(lambda n: n.blur[0, 0].expand(6, 4)),
    "stored temperature": lambda n, f, g: n.fc(g) * n.constant[0, 0, 0, 0],
    "rotated positions": lambda n, f, g: n.fc(
        torch.cat([g[:, :4] * n.cosines[1, :4] - g[:, 4:] * n.cosines[2, :4], g[:, 4:]], 1)
    ),
    "scaled residual": lambda n, f, g: n.fc(g * n.scale + g * n.matrix[0] + g),
    "weighted fusion": lambda n, f, g: n.fc(
        (lambda w: w[0] * f + w[1] * F.avg_pool2d(f, 3, 1, 1) + w[2] * f.relu())(n.scale.softmax(0)).mean((2, 3))
    ),
    "largest of scaled maps": lambda n, f, g: n.fc((f * n.scale[:, None, None]).amax((2, 3))),
    "soft maximum of scaled maps": lambda n, f, g: n.fc((f * n.scale[:, None, None]).logsumexp((2, 3))),
    "largest of scaled maps, padded": lambda n, f, g: n.fc(
        F.max_pool2d(F.pad(f * n.scale[:, None, None], (1, 1, 1, 1), value=float("-inf")), 3).amax((2, 3))
    ),
    "largest, with position": lambda n, f, g: n.fc(F.max_pool2d(f + n.place, 6).flatten(1)),
    "channels' mean and largest beside the maps": lambda n, f, g: n.fc(
        (lambda y: (y * (y.mean(1, keepdim=True) + y.amax(1, keepdim=True)).sigmoid()).mean((2, 3)))(n.norm(f))
    ),
    "layer scale": lambda n, f, g: n.fc((f * n.scale[:, None, None]).mean((2, 3))),
    "batch norm": lambda n, f, g: n.fc(n.norm(f).relu().mean((2, 3))),
    "batch norm, activation in place": lambda n, f, g: n.fc(F.hardswish(n.norm(f), inplace=True).mean((2, 3))),
    "batch norm, pools": lambda n, f, g: n.fc(F.max_pool2d(F.avg_pool2d(n.norm(f), 2), 3).flatten(1)),
    "position": lambda n, f, g: n.fc((f + n.place).relu().mean((2, 3))),
    "position after a norm": lambda n, f, g: n.fc((n.norm(f) + n.place).mean((2, 3))),
    "norms written out": lambda n, f, g: n.fc(
        written_out(n, written_out(n, f + n.place) + f * n.scale[:, None, None]).mean((2, 3))
    ),
    "root mean square": lambda n, f, g: n.fc(root_mean_square(n, root_mean_square(n, f + n.place)).mean((2, 3))),
    "layer norm of layer norm": lambda n, f, g: n.fc(
        F.layer_norm(F.layer_norm(g, (8,), n.scale), (8,), n.scale) * n.scale
    ),
    "group norm": lambda n, f, g: n.fc(F.group_norm(n.norm(f), 2, n.scale).mean((2, 3))),
    "class token": lambda n, f, g: n.fc(torch.cat([n.matrix[None], f.flatten(2).mT], 1).mean(1)),
    "normalised queries and keys, bias": lambda n, f, g: n.fc(
        (lambda t: F.scaled_dot_product_attention(
            F.layer_norm(t, (8,), n.scale), t, t, attn_mask=n.place[0, 0].flatten().expand(36, 36)
        ))(f.flatten(2).mT).mean(1)
    ),
    "gate": lambda n, f, g: n.fc(
        (f * n.fc(g).mean(1)[:, None, None, None].sigmoid() * n.scale[:, None, None]).mean((2, 3))
    ),
    "normalised sum": lambda n, f, g: n.fc(F.normalize(f + n.place, dim=1).mean((2, 3))),
    "temperature": lambda n, f, g: n.fc(F.normalize(g, dim=1)) * n.scale[0],
    "power mean": lambda n, f, g: n.fc(
        F.avg_pool2d(f.clamp(min=1e-6).pow(n.scale[0]), 6).pow(1 / n.scale[0]).flatten(1)
    ),
    "fixed blur of scaled maps": lambda n, f, g: n.fc(
        F.conv2d(f * n.scale[:, None, None], torch.ones(8, 1, 2, 2), groups=8).mean((2, 3))
    ),
    "learned slopes": lambda n, f, g: n.fc(F.prelu(F.prelu(n.norm(f), n.scale), n.scale[:1]).mean((2, 3))),
    "repeated scale": lambda n, f, g: n.fc((f * n.scale.view(8, 1, 1).repeat(1, 6, 6)).mean((2, 3))),
}  # fmt: skip


@pytest.mark.parametrize("case", ELEMENTWISE)
def test_what_scales_shifts_and_normalises_runs(case):
    network = run(ELEMENTWISE[case])
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_attention_pooling_is_refused_fused_or_not(fused):
    timm = pytest.importorskip("timm", reason="the extra 'timm' is not installed")
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(fused)
    try:
        settings = {"img_size": 32, "global_pool": "map", "class_token": False, "num_classes": 5, "depth": 1}
        model = timm.create_model("vit_tiny_patch16_224", **settings).eval()
    finally:
        timm.layers.set_fused_attn(bool(before))
    with pytest.raises(UserError, match=r"module attn_pool \(AttentionPoolLatent\) multiplies by learned weights"):
        canonical(model, torch.randn(1, 3, 32, 32))
