"""The canonical form of a network: plain layers, each with all of its weight in ``weight``, and batch norm folded.

Everything is read off one forward pass of an example image, so no network needs to be traceable: a forward pass
under a ``TorchFunctionMode`` shows which module called which function on which tensors.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

from pattern_bench.core.half_precision import copied, images_for, widen_
from pattern_bench.core.layers import LAYER_TYPES, Layer, PaddedConv2d, convolved, geometry_of
from pattern_bench.core.learned_weights import IMAGE, LEARNED, LearnedWeights
from pattern_bench.core.network import refuse_training, refuse_without_weights, unwrapped
from pattern_bench.core.outputs import as_logits
from pattern_bench.core.rounding import float32_products
from pattern_bench.errors import UserError

TOLERANCE = 1e-3
"""Outputs that differ by less than this share of the largest are the same: float32 errors add up over depth."""
CLEAR = 2e-6
"""Outputs this close are so in any precision, and nothing more is computed."""
FOLD_ROUNDINGS = 8
"""A folded weight may be off by so many roundings: it is a product of four numbers."""
ROUNDINGS = 30
"""A fold may change the outputs by so many times what rounding its weights anew does, in float64."""

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution", "linear")


@float32_products()
def canonical(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy in evaluation mode, without gradients, that computes the same outputs from plain layers; in float32 where
    the network is in half precision.

    Layers whose effective weight is not their ``weight`` parameter (weight standardisation, weight norm) or that pad
    on their own are written out, and every batch norm that reads exactly what a Conv or Linear layer put out is
    folded into it, so that the layer's output is the pre-activation that the gate sees.

    Args:
        model: any network; it is not changed.
        example: (B, C, spatial...), images of the size that the network is to be used with.

    Returns:
        A network that puts out logits (B, K), as ``core.outputs`` finds them; other outputs than (B, K) as they are.

    Raises:
        UserError: where the network is in training mode, or lacks weights; where it puts out several tensors, or
            probabilities that no softmax of its own made; where a layer does more than its declared convolution, where
            learned weights are multiplied with outside of Conv and Linear modules, or where the copy computes other
            outputs.
    """
    network = widen_(plain_copy(model))
    name, example = type(model).__name__, images_for(network, example)
    with torch.no_grad():
        network = as_logits(network, example)
        expected = network(example)
        for layer, plain in _rewritten(network, example, name).items():
            network = _replaced(network, layer, plain)
    right = True
    for layer, norm in _foldable(network, example, name):
        fused = fuse_conv_bn_eval(layer, norm)  # which does for Linear too
        right &= _is_fold(fused, layer, norm)
        network = _replaced(network, layer, fused)
        network = _replaced(network, norm, _after(norm).eval())
    network.requires_grad_(False)
    with torch.no_grad():
        found = network(example)
    alike = same(found, expected, CLEAR) or _rounded_alike(model, network, example, same(found, expected))
    if not (right and alike):
        raise UserError(
            f"model={name} computes other outputs (by up to {float((found - expected).abs().max()):.2g}) once batch "
            "norm is folded: fold it into its layers before handing the network over, or take randomness out of its "
            "evaluation mode"
        )
    return network


def same(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two tensors agree up to rounding; NaN agrees with NaN."""
    if found.shape != expected.shape:
        return False
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance * scale, equal_nan=True)


def _is_fold(fused: Any, layer: Any, norm: Any) -> bool:
    """Whether every weight and bias of ``fused`` is that of ``norm`` after ``layer``, but for rounding: a wrong one may
    not show in the outputs of a single image."""
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


def _rounded_alike(model: nn.Module, network: nn.Module, example: Tensor, otherwise: bool) -> bool:
    """Whether ``network`` computes in float64 what ``model`` does there, but for the rounding of its weights.

    How much that may change the outputs is measured: by how much they change once every weight is rounded anew. So
    neither TF32 nor a network in half precision makes a right fold look wrong, nor a wrong one right. ``otherwise`` is
    the answer where the network cannot compute in float64.
    """
    eps = max((torch.finfo(p.dtype).eps for p in network.parameters() if p.is_floating_point()), default=0.0)
    x = example.double()
    with torch.no_grad():
        try:
            expected = as_logits(widen_(plain_copy(model)), example).double()(x)
            exact = copy.deepcopy(network).double()
            found = exact(x)
            if not same(exact(x), found, 1e-9):  # what is drawn anew in every pass is no rounding
                return False
            generator = torch.Generator().manual_seed(0)
            for t in (*exact.parameters(), *exact.buffers()):
                if t.is_floating_point():
                    t.mul_(1 + eps * (2 * torch.rand(t.shape, generator=generator, dtype=t.dtype) - 1).to(t.device))
            rounded = exact(x)
        except (RuntimeError, TypeError):
            return otherwise
    finite = (rounded - found)[found.isfinite() & rounded.isfinite()]
    scale = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0.0
    allowed = ROUNDINGS * float(finite.abs().max()) / scale if finite.numel() and scale else 0.0
    return same(found, expected, allowed + 1e-9)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without gradients and without what ``torch.compile`` has put around modules.

    Raises:
        UserError: where the network cannot be copied, is in training mode, or lacks weights.
    """
    model = unwrapped(model)
    name = type(model).__name__
    refuse_training(model)
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise UserError(
            f"model={name}: module {scripted[0] or 'the network itself'} is compiled by TorchScript, which hides its "
            "layers: give the Python module it was made from"
        )
    refuse_without_weights(model)
    network = copied(model)
    for module in list(network.modules()):
        network = _replaced(network, module, unwrapped(module))
    return network.eval().requires_grad_(False)


def _replaced(network: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The network with ``new`` wherever ``old`` is registered: a module may go by several names."""
    if old is new:
        return network
    if old is network:
        return new
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if module is old:
            network.set_submodule(name, new)
    return network


# --- layers whose weight and geometry are not what they declare ---


def _rewritten(network: nn.Module, example: Tensor, model: str) -> dict[Any, Layer]:
    """Plain layers for those that do not compute the convolution of ``weight`` that they declare."""
    found: dict[Any, Layer] = {}

    def check(name: str, layer: Layer, inputs: tuple[Any, ...], output: Any) -> None:
        def refuse(why: str) -> UserError:
            return UserError(
                f"model={model}: layer {name} ({type(layer).__module__}.{type(layer).__qualname__}) {why}: "
                f"replace it by a plain nn.{_base(layer).__name__}"
            )

        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise refuse(f"is called with {len(inputs)} positional inputs instead of one tensor")
        x = inputs[0]
        if x.ndim < 2 + len(geometry_of(layer).kernel):
            raise refuse("is called without a batch dimension")
        if layer not in found:
            hooked = layer._forward_pre_hooks or "weight" not in layer._parameters
            if not hooked and _declares(layer, x, output) and _at_other_sizes(layer, layer, x):
                return
            plain = _plain(layer, x)
            if plain is None:
                raise refuse("computes something else than one convolution or dense layer")
            found[layer] = plain
        if not _declares(found[layer], x, output):
            raise refuse("computes another function than the convolution that its weight, bias and settings declare")

    handles = [
        layer.register_forward_hook(lambda layer, x, y, name=name: check(name, layer, x, y))
        for name, layer in network.named_modules()
        if isinstance(layer, LAYER_TYPES)
    ]
    try:
        network(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _base(layer: nn.Module) -> Any:
    return next(kind for kind in LAYER_TYPES if isinstance(layer, kind))


def _declares(layer: Layer, x: Tensor, output: Tensor) -> bool:
    try:
        return same(declared(layer, x), output)
    except RuntimeError:  # an input too small for the kernel, where the layer pads more than it says
        return False


def _at_other_sizes(declaring: Layer, layer: Layer, x: Tensor) -> bool:
    """Whether what ``declaring`` says also holds of ``layer`` for inputs smaller than ``x``, whatever is left over of a
    stride; of layers with a forward of their own, which may pad by the size of what they are given."""
    if isinstance(layer, nn.Linear) or type(layer).forward is _base(layer).forward:
        return True
    for less in range(1, max(layer.stride)):
        smaller = x
        for dim in range(2, x.ndim):
            smaller = smaller.narrow(dim, 0, max(1, x.shape[dim] - less))
        try:
            output = layer.forward(smaller)
        except RuntimeError:  # too small for it
            continue
        if not _declares(declaring, smaller, output):
            return False
    return True


def declared(layer: Layer, x: Tensor) -> Tensor:
    """What the layer's weight, bias and geometry say that it puts out: all that the suite's arithmetic knows of it."""
    return convolved(x, layer.weight, layer.bias, geometry_of(layer))


class _Convolutions(TorchFunctionMode):
    """Remembers input, weight and bias of every convolution and dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _name(func) in _CONVOLUTIONS:
            self.seen.append({**dict(zip(("input", "weight", "bias"), args, strict=False)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))


def _plain(layer: Layer, x: Tensor) -> Layer | None:
    """A layer of torch's own that uses the weight, bias and padding that ``layer`` used on ``x``."""
    with _Convolutions() as convolutions:
        layer.forward(x)
    if len(convolutions.seen) != 1:
        return None
    call = convolutions.seen[0]
    weight, bias = call["weight"], call.get("bias")
    plain: Layer
    with torch.device("meta"):
        if isinstance(layer, nn.Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias is not None)
        else:
            settings: dict[str, Any] = {
                key: getattr(layer, key)
                for key in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups")
            }
            settings["bias"] = bias is not None
            extra = [b - a for a, b in zip(x.shape[2:], call["input"].shape[2:], strict=True)]
            own = type(layer).forward is not nn.Conv2d.forward
            if isinstance(layer, nn.Conv2d) and own and not geometry_of(layer).pads:
                plain = PaddedConv2d(**settings, margins=tuple((e // 2, e - e // 2) for e in extra))
            else:
                plain = _base(layer)(**settings, padding=layer.padding, padding_mode=layer.padding_mode)
    if plain.weight.shape != weight.shape:
        return None
    plain.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone())
    if isinstance(plain, PaddedConv2d) and not _at_other_sizes(plain, layer, x):
        plain.same = True
        if not (_declares(plain, x, layer.forward(x)) and _at_other_sizes(plain, layer, x)):
            plain.same, plain.only = False, tuple(x.shape[2:])
    return plain.eval().requires_grad_(False)


# --- batch norm, and weights outside of layers ---


class _Walk(TorchFunctionMode):
    """One forward pass, watched: which layer's output each norm reads, who else reads it, and what the learned weights
    outside of layers do (``core.learned``)."""

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
        operands = list(_tensors((args, kwargs)))
        self.function = _name(func)
        kernel = operands[1:2] if self.function in _CONVOLUTIONS and not self.in_layer() else []
        if any(self.learned.kind(t) in (LEARNED, IMAGE) for t in kernel):  # also one that was made of the image
            raise self.refusal(self.function)
        output = func(*args, **(kwargs or {}))
        self.function = ""
        if next(_tensors(output), None) is not None:  # asking for a size is not reading
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


def _foldable(network: nn.Module, example: Tensor, model: str) -> list[tuple[Any, Any]]:
    """(layer, batch norm) pairs where the norm is the only reader of the layer's output; each used once."""
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
        walk.learned.check(_tensors(outputs))
    network.requires_grad_(False)
    pairs = []
    for norm, x in walk.norms:
        layer, y = walk.made.get(id(x), (None, None))
        if (
            layer is not None
            and y is not None
            and y is x
            and walk.readers[id(y)] == 1
            and walk.calls[layer] == walk.calls[norm] == 1
            and _normalises(norm, layer, y.detach())
        ):
            pairs.append((layer, norm))
    return pairs


def _normalises(norm: Any, layer: Layer, x: Tensor) -> bool:
    """Whether ``norm`` scales and shifts each of the layer's neurons by constants, and then does what follows."""
    if norm.running_mean is None or (isinstance(layer, nn.Linear) and x.ndim != 2):
        return False
    with torch.no_grad():
        normed = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return same(_after(norm)(normed), norm(x))


def _after(norm: nn.Module) -> nn.Module:
    """What remains of a folded norm: its activation, where it has one, as timm's do."""
    children = OrderedDict(norm.named_children())
    return nn.Sequential(children) if children else nn.Identity()


def _name(func: Any) -> str:
    return getattr(func, "__name__", "")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
