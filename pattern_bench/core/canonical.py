"""Bring a network into canonical form: plain layers, each with all of its weight in ``weight``, and batch norm folded.

Everything is read off one forward pass of an example image, so no network needs to be traceable: a forward pass
under a ``TorchFunctionMode`` shows which module called which function on which tensors.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pattern_bench.core.agreement import CLOSE, agree
from pattern_bench.core.batch_independence import refuse_batch_dependence_once
from pattern_bench.core.batch_norm import activation_of, foldable, is_fold
from pattern_bench.core.copies import plain_copy, with_replaced
from pattern_bench.core.half_precision import images_for, widen_
from pattern_bench.core.outputs import as_logits
from pattern_bench.core.plain_layers import rewritten
from pattern_bench.core.rounding import float32_products
from pattern_bench.errors import UserError

ROUNDINGS = 30
"""A fold may change the outputs by this many times what rounding its weights anew does, in float64."""


@float32_products()
def canonical(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy in evaluation mode, without gradients, that computes the same outputs from plain layers; in float32
    where the network is in half precision.

    Layers whose effective weight is not their ``weight`` parameter (weight standardisation, weight norm) or that pad
    on their own are written out, and every batch norm that reads exactly what a Conv or Linear layer puts out is
    folded into it, so that the layer's output is the pre-activation y = wᵀx + b whose sign is the gate.

    Args:
        model: any network; it is not changed.
        example: (B, C, spatial...), images of the size that the network is to be used with.

    Returns:
        A network that puts out logits (B, K), as :func:`pattern_bench.core.outputs.as_logits` finds them; outputs of
        another shape as they are.

    Raises:
        UserError: where the network is in training mode, or lacks weights; where it puts out several tensors, or
            probabilities that no softmax of its own made; where a layer does more than its declared convolution, where
            learned weights are multiplied with outside of Conv and Linear modules, where the copy computes other
            outputs, or where the outputs for an image depend on the other images in its batch.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Softmax(1)).eval()
    >>> network = canonical(model, torch.ones(1, 1, 1, 1))  # Logits: what goes into the softmax
    >>> [type(module).__name__ for module in network.children()]
    ['Conv2d', 'Identity', 'Flatten', 'Softmax']
    """
    network = widen_(plain_copy(model))
    name, example = type(model).__name__, images_for(network, example)
    with torch.no_grad():
        network = as_logits(network, example)
        expected = network(example)
        for layer, plain in rewritten(network, example, name).items():
            network = with_replaced(network, layer, plain)
    right = True
    for layer, norm in foldable(network, example, name):
        fused = fuse_conv_bn_eval(layer, norm)  # which does for Linear too
        right &= is_fold(fused, layer, norm)
        network = with_replaced(network, layer, fused)
        network = with_replaced(network, norm, activation_of(norm).eval())
    network.requires_grad_(False)
    with torch.no_grad():
        outputs = network(example)
    alike = agree(outputs, expected, CLOSE) or _agree_but_for_rounding(
        model, network, example, agree(outputs, expected)
    )
    if not (right and alike):
        raise UserError(
            f"model={name} computes other outputs (by up to {float((outputs - expected).abs().max()):.2g}) once batch "
            "norm is folded: fold it into its layers before handing the network over, or take randomness out of its "
            "evaluation mode"
        )
    refuse_batch_dependence_once(network, network, example, name)
    return network


def _agree_but_for_rounding(model: nn.Module, network: nn.Module, example: Tensor, otherwise: bool) -> bool:
    """Return whether ``network`` computes in float64 what ``model`` computes, but for the rounding of its weights.

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
            outputs = exact(x)
            if not agree(exact(x), outputs, 1e-9):  # a difference between two passes is randomness, not rounding
                return False
            generator = torch.Generator().manual_seed(0)
            for t in (*exact.parameters(), *exact.buffers()):
                if t.is_floating_point():
                    t.mul_(1 + eps * (2 * torch.rand(t.shape, generator=generator, dtype=t.dtype) - 1).to(t.device))
            rounded = exact(x)
        except (RuntimeError, TypeError):
            return otherwise
    finite = (rounded - outputs)[outputs.isfinite() & rounded.isfinite()]
    scale = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0.0
    allowed = ROUNDINGS * float(finite.abs().max()) / scale if finite.numel() and scale else 0.0
    return agree(outputs, expected, allowed + 1e-9)
