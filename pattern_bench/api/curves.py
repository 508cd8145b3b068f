"""Image degradation: how fast an answer falls with the patches that an explanation ranks first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pattern_bench.api.arguments import check_choice, number, some_images, whole
from pattern_bench.api.explanations import check_methods, explained
from pattern_bench.api.networks import answers, in_own_precision
from pattern_bench.core.half_precision import images_for, widened
from pattern_bench.core.predictions import target_outputs
from pattern_bench.core.rounding import float32_products
from pattern_bench.metrics import degradation as protocol
from pattern_bench.results.labels import RANDOM_ORDER


@float32_products()
@in_own_precision
def degradation(
    model: nn.Module,
    images: Tensor,
    methods: Mapping[str, Any],
    target: Tensor | None = None,
    *,
    patch: int = 9,
    steps: int = 100,
    order: str = "most",
    replacement: str = "mean",
    value: float = 0.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Measure degradation curves (``metrics.degradation``; Kindermans et al. 2018, Fig. 4a) of any explanations, and of
    a random order.

    Below, the right half of the image decides. Once that patch is replaced by its mean, 0, class 1 has lost its lead.

    >>> import pattern_bench as pb
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 2)).eval()
    >>> _ = model[1].weight.data.copy_(torch.tensor([[0.0] * 8, [0, 0, 1, -1, 0, 0, 1, -1]]))
    >>> _ = model[1].bias.data.zero_()
    >>> image = torch.tensor([[0.0, 0, 1, -1], [0, 0, 1, -1]]).expand(1, 1, 2, 4)
    >>> methods = {"mine": lambda model, inputs, targets: inputs.abs()}
    >>> pb.degradation(model, image, methods, patch=2, steps=2)["mine"].round(decimals=3)
    tensor([[0.9820, 0.5000, 0.5000]])

    Args:
        model: the network, in evaluation mode.
        images: (B, C, spatial...): signals, images or volumes, of any floating type.
        methods: by name, objects with ``attribute(inputs, target=...)`` (this suite's, captum's), or functions
            ``explain(model, inputs, targets)`` that return a tensor or array (Quantus').
        target: outputs to explain, (B,) or one for all; the predicted classes for None.
        patch, steps, order, replacement, value: the protocol.
        seed: of the random order.

    Returns:
        By method, and ``random_order``: probabilities (``core.outputs``) of the target, (B, steps + 1).

    Raises:
        UserError: where a setting or a target is not possible; where the network is in training mode, or puts out what
            says not which its logits are; where there are no images; where images, outputs or explanations are not
            finite; where outputs are random or depend on the other images of a batch.
    """
    check_methods(methods)
    value = number("value", value, -1e30)
    seed = whole("seed", seed, -(2**63))
    network, images = widened(model), some_images(images)
    own, images = images_for(model, images), images_for(network, images)
    check_choice("order", order, protocol.ORDERS)
    check_choice("replacement", replacement, protocol.REPLACEMENTS)
    protocol.check_patches(images.shape[2:], patch, steps)
    network, logits = answers(network, images)
    target = target_outputs(target, logits)
    grid, generator = protocol.grid_of(images.shape[2:], patch), torch.Generator().manual_seed(seed)
    ranks = {RANDOM_ORDER: protocol.random_patch_order(len(images), grid, generator).to(images.device)}
    for name, explanation in methods.items():
        heat = explained(name, explanation, model, own, target)
        ranks[name] = protocol.patch_order(heat, patch, order)
    replaced_by = protocol.replacement(images, patch, replacement, value)
    with torch.no_grad():
        return {
            name: protocol.degradation_curve(network, images, rank, target, patch, steps, replaced_by)
            for name, rank in ranks.items()
        }
