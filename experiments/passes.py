"""One batch's part of a pass that adds up moments, without the pass's beginning and end: what the experiments time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pattern_bench.core.collector import Collector
from pattern_bench.core.layers import Scratch
from pattern_bench.core.network import collecting, layers_in_order


def moment_pass(
    network: nn.Module, images: Tensor, gram: bool, **settings: Any
) -> tuple[Callable[[], None], dict[str, Collector]]:
    """A function that runs the network on the images and adds to the moments of each layer, and their collectors.

    Args:
        network: in canonical form.
        images: (B, C, H, W).
        gram: whether to add up the Gram matrices of ρ.
        settings: of ``Collector``, such as ``positions``.
    """
    layers: dict[str, Any] = {name: network.get_submodule(name) for name in layers_in_order(network, images[:1])}
    scratch = Scratch()
    collectors = {name: Collector(layer, gram, scratch=scratch, **settings) for name, layer in layers.items()}

    def run() -> None:
        with torch.no_grad(), collecting(network, collectors):
            network(images)

    return run, collectors
