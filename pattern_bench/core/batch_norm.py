"""Find the batch norms that can be folded into the layer before them, and check that they were.

One forward pass shows which layer's output each norm reads and who else reads it. The same pass checks that no learned
weights sum an image's values outside of Conv and Linear layers (``core/learned_weights``).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from pattern_bench.core.agreement import agree
from pattern_bench.core.function_calls import CONVOLUTIONS, name_of, tensors_in
from pattern_bench.core.layers import LAYER_TYPES, Layer
from pattern_bench.core.learned_weights.tracking import Kind
from pattern_bench.core.learned_weights.watch import LearnedWeights
from pattern_bench.errors import UserError

FOLD_ROUNDINGS = 8
"""A folded weight may be off by this many roundings: it is a product of four numbers."""


def foldable(network: nn.Module, example: Tensor, model: str) -> list[tuple[Any, Any]]:
    """Return the pairs of a layer and the batch norm that is the only reader of its output, where each is used once.

    Args:
        network: in evaluation mode; it is run once, with gradients. Afterwards none of its parameters needs a gradient.
        example: (B, C, spatial...).
        model: the network's name, for errors.

    Raises:
        UserError: where the network cannot be run with gradients, or where learned weights outside of Conv and Linear
            layers sum an image's values.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2)).eval()
    >>> foldable(model, torch.ones(1, 1, 2, 2), "mine") == [(model[0], model[1])]
    True
    """
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    with torch.enable_grad():
        image = example.detach().clone().requires_grad_()
        walk = _Walk(network, image, model)
        handles = []
        for name, module in network.named_modules():
            handles.append(module.register_forward_pre_hook(lambda m, _, name=name: walk.enter(name, m), prepend=True))
            handles.append(module.register_forward_hook(walk.leave, always_call=True))
        try:
            with walk, walk.learned:
                outputs = network(image * 1)  # not a leaf, which the network could not change in place
        except RuntimeError as error:
            raise UserError(
                f"model={model} cannot be run with gradients ({str(error).splitlines()[0]}), which explanations need: "
                "make its forward differentiable"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        walk.learned.check(tensors_in(outputs))
    network.requires_grad_(False)
    return walk.pairs()


def is_fold(fused: Any, layer: Any, norm: Any) -> bool:
    """Return whether every weight and bias of ``fused`` is that of ``norm`` after ``layer``, but for rounding: a wrong
    one may not show in the outputs of a single image.

    >>> layer, norm = nn.Linear(2, 1).eval(), nn.BatchNorm1d(1).eval()
    >>> fused = nn.utils.fuse_conv_bn_eval(layer, norm)
    >>> is_fold(fused, layer, norm), is_fold(layer, layer, norm)
    (True, False)
    """
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    parts = [-norm.running_mean.double() * scale]
    parts += [] if norm.bias is None else [norm.bias.double()]
    parts += [] if layer.bias is None else [layer.bias.double() * scale]
    allowed = FOLD_ROUNDINGS * torch.finfo(layer.weight.dtype).eps
    off = (fused.weight.double() - weight).abs() > allowed * weight.abs() + 1e-30
    bias_off = (fused.bias.double() - sum(parts)).abs() > allowed * sum(part.abs() for part in parts) + 1e-30
    return not bool(off.any() | bias_off.any())


def activation_of(norm: nn.Module) -> nn.Module:
    """Return the module that stays in the place of a folded norm: its activation, where it has one, as timm's norms
    do.

    >>> activation_of(nn.BatchNorm2d(1))
    Identity()
    """
    children = OrderedDict(norm.named_children())
    return nn.Sequential(children) if children else nn.Identity()


class _Walk(TorchFunctionMode):
    """Watch one forward pass: which layer's output each norm reads, who else reads it, and what the learned weights
    outside of layers do."""

    def __init__(self, network: nn.Module, image: Tensor, model: str) -> None:
        super().__init__()
        self.model, self.function = model, ""
        self.learned = LearnedWeights(network, image, self.in_layer, self.refusal)
        self.running: list[tuple[str, nn.Module]] = []
        self.calls: Counter[nn.Module] = Counter()
        self.readers: Counter[int] = Counter()
        self.made: dict[int, tuple[Any, Tensor]] = {}  # by id; kept, so that no id is used twice
        self.norms: list[tuple[Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = list(tensors_in((args, kwargs)))
        self.function = name_of(func)
        kernel = operands[1:2] if self.function in CONVOLUTIONS and not self.in_layer() else []
        # A kernel that was made of the image is refused too.
        if any(self.learned.tracker.kind(t) in (Kind.LEARNED, Kind.IMAGE) for t in kernel):
            raise self.refusal(self.function)
        output = func(*args, **(kwargs or {}))
        self.function = ""
        if next(tensors_in(output), None) is not None:  # asking for a size is not reading
            self.readers.update(id(t) for t in operands if id(t) in self.made)
        return output

    def in_layer(self) -> bool:
        return any(isinstance(module, LAYER_TYPES) for _, module in self.running)

    def refusal(self, function: str) -> UserError:
        name, module = self.running[-1]
        kind = type(module).__name__ if name else self.model
        return UserError(
            f"model={self.model}: module {name or 'at the root'} ({kind}) multiplies by learned weights in "
            f"{self.function or function}, outside any Conv or Linear module, so its neurons would be left out: "
            "rewrite it with nn.Conv1d, nn.Conv2d, nn.Conv3d or nn.Linear modules, or choose another model"
        )

    def enter(self, name: str, module: nn.Module) -> None:
        self.running.append((name, module))
        self.calls[module] += 1

    def leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.running.pop()
        if isinstance(module, LAYER_TYPES):
            self.made[id(output)] = module, output
        elif isinstance(module, _BatchNorm) and inputs:
            self.norms.append((module, inputs[0]))

    def pairs(self) -> list[tuple[Any, Any]]:
        """Return each layer with the norm that alone reads its output."""
        pairs = []
        for norm, x in self.norms:
            layer, y = self.made.get(id(x), (None, None))
            if (
                layer is not None
                and y is not None
                and y is x
                and self.readers[id(y)] == 1
                and self.calls[layer] == self.calls[norm] == 1
                and _normalises(norm, layer, y.detach())
            ):
                pairs.append((layer, norm))
        return pairs


def _normalises(norm: Any, layer: Layer, x: Tensor) -> bool:
    """Return whether ``norm`` scales and shifts each of the layer's neurons by constants, before its activation."""
    if norm.running_mean is None or (isinstance(layer, nn.Linear) and x.ndim != 2):
        return False
    with torch.no_grad():
        normed = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return agree(activation_of(norm)(normed), norm(x))
