"""Convergence of directions (Sixt et al. 2020): does what a method sends back differ between classes?

Different vectors are sent back from the output, and compared at the input of every layer. Where they end up on one
line, what the method shows below is the same for every class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pattern_bench.engine.progress import Bar
from pattern_bench.errors import UserError
from pattern_bench.methods.base import Method
from pattern_bench.methods.patterns import LrpZ
from pattern_bench.metrics.similarity import convergence
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.methods import Explainer
from pattern_bench.pipeline.sanity_rows import SanityRows, make_explainer, named, row
from pattern_bench.pipeline.setup import Setup
from pattern_bench.pipeline.stage import Done, Stage

STARTS = ("gaussian", "classes")
"""What may be sent back from the output."""


def directions(
    setup: Setup,
    methods: Mapping[str, Any],
    explainer: Explainer,
    images: Tensor,
    bar: Bar,
) -> SanityRows:
    """Send different vectors back from the output, and compare them at the input of every layer.

    A row per method and layer: the mean absolute cosine of vectors sent back from the output, at the layer's input;
    and one, with layer ``output``, for the vectors as they start."""
    bar.start(len(methods) * len(images))
    starts = start_vectors(setup.cfg.start, setup.cfg.directions, setup.outputs, setup.seed("directions"))
    layers = setup.all_layers
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for name, method in methods.items():
        found: list[list[Tensor]] = []
        try:
            made, dtype = explainer.make(method)
            for image in images.split(1):
                vectors = back_propagated(made, layers, image.to(dtype or image.dtype), starts)
                found.append([convergence(vectors[layer].cpu()) for layer in layers])
                bar.advance(detail=name)
        except UserError as error:
            left_out[f"{name}, convergence"] = str(error)
            bar.advance(len(images) - len(found))
            continue
        rows.append(
            row(name, "convergence", "output", len(layers), "cosine_absolute", convergence(starts).expand(len(images)))
        )
        for index, values in reversed(list(enumerate(zip(*found, strict=True)))):
            rows.append(row(name, "convergence", layers[index], index, "cosine_absolute", torch.stack(values)))
    return SanityRows(rows=rows, left_out=named(left_out))


def start_vectors(start: str, count: int, outputs: int, seed: int) -> Tensor:
    """What is sent back from the output, (count, outputs) float64: Gaussian vectors, or distinct classes."""
    generator = torch.Generator().manual_seed(seed)
    if start == "classes":
        return torch.eye(outputs, dtype=torch.float64)[torch.randperm(outputs, generator=generator)[:count]]
    return torch.randn(count, outputs, generator=generator, dtype=torch.float64)


def back_propagated(method: Method, layers: list[str], image: Tensor, starts: Tensor) -> dict[str, Tensor]:
    """What a method sends back from the outputs to the input of every layer, from one image (1, C, H, W).

    It is the method's own way back: only what it starts from (``starts``, (J, K)) and where it is looked at differ.
    For the z-rule it is the relevance, not the relevance per unit of activation that it is computed with.

    Returns:
        By layer, (J, D).

    Raises:
        UserError: where the method does not work by one pass back through the network.
    """
    edges: dict[str, tuple[Any, Tensor]] = {}
    found: dict[str, Tensor] = {}
    outputs: list[Tensor] = []

    def output(x: Tensor, _target: Tensor | None) -> Tensor:
        with _watching(method.model, layers, edges):
            outputs.append(method._logits(x))
        return outputs[0].sum(1)

    def gradient(_output: Tensor, x: Tensor, _start: Tensor | None = None) -> Tensor:
        wanted = [edge for edge, _ in edges.values()]
        passes = [
            torch.autograd.grad(outputs[0], wanted, start[None].to(outputs[0]), retain_graph=True, allow_unused=True)
            for start in starts
        ]
        for i, (name, (_, value)) in enumerate(edges.items()):
            rows = [torch.zeros_like(value) if grads[i] is None else grads[i] for grads in passes]
            vectors = torch.cat([row.flatten(1) for row in rows])
            found[name] = vectors * value.flatten(1) if isinstance(method, LrpZ) else vectors
        return torch.ones_like(x)  # zeros would stand for an output without a pattern, and be sent back another way

    own: Any = method
    own._output, own._gradient = output, gradient
    try:
        method.attribute(image, 0)
    finally:
        del own._output, own._gradient
    if not found:
        raise UserError(f"{method.name} does not work by one pass back through the network, so it has no directions")
    return found


@contextmanager
def _watching(model: nn.Module, layers: list[str], edges: dict[str, tuple[Any, Tensor]]) -> Iterator[None]:
    """Within, keeps where the graph stands and what the value is at the input of each layer's first call.

    The edge, rather than the tensor, because the tensor may be overwritten in place later on.
    """

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name not in edges:
                edges[name] = torch.autograd.graph.get_gradient_edge(inputs[0]), inputs[0].detach().clone()

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Convergence(SanityRows):
    """Rows of ``sanity.csv`` of the check ``convergence``."""


@dataclass(frozen=True)
class CompareDirections(Stage[Convergence]):
    """Compare what different outputs send back."""

    setup: Setup
    machine: Machine
    methods: Mapping[str, Any]
    images: Tensor
    name = "convergence"
    title = "convergence of directions"

    def run(self, done: Done, bar: Bar) -> Convergence:
        images = self.images.to(self.machine.device)
        explainer = make_explainer(self.setup, self.machine, self.methods, done)
        found = directions(self.setup, self.methods, explainer, images, bar)
        return Convergence(rows=found.rows, left_out=found.left_out)
