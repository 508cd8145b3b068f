"""A network as the suite sees it: its layers in the order they run, by name, with batch norm folded away."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from pattern_bench.core.collector import Collector
from pattern_bench.core.layers import LAYER_TYPES
from pattern_bench.errors import UserError, did_you_mean


def canonical(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without gradients, with every batch norm that directly follows a convolution or
    dense layer folded into it, so that the layer's output is the pre-activation that the gate sees."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for layer_name, norm_name in _foldable(model):
        layer: Any = model.get_submodule(layer_name)
        norm: Any = model.get_submodule(norm_name)
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        model.set_submodule(layer_name, fuse(layer, norm).requires_grad_(False))
        model.set_submodule(norm_name, nn.Identity())
    return model


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _foldable(model: nn.Module) -> list[tuple[str, str]]:
    """(layer, batch norm) pairs where the norm is the only reader of the layer's output; each used once."""
    if not any(isinstance(module, _NORMS) for module in model.modules()):
        return []
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise UserError(
            f"model={type(model).__name__} has batch norm, which must be folded into the layer before it, but its "
            f"forward cannot be traced by torch.fx ({error}). Fold it first, or write its forward without "
            "data-dependent control flow."
        ) from error
    calls = [node for node in graph.nodes if node.op == "call_module"]
    uses: dict[str, int] = {}
    for node in calls:
        uses[node.target] = uses.get(node.target, 0) + 1
    pairs = []
    for node in calls:
        if not isinstance(model.get_submodule(node.target), _NORMS):
            continue
        before = node.args[0]
        if (
            before.op == "call_module"
            and isinstance(model.get_submodule(before.target), LAYER_TYPES)
            and len(before.users) == 1
            and uses[before.target] == uses[node.target] == 1
        ):
            pairs.append((before.target, node.target))
    return pairs


def layers_in_order(model: nn.Module, example: Tensor) -> list[str]:
    """Names of the Conv and Linear layers in the order in which a forward pass of ``example`` first calls them."""
    order: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LAYER_TYPES):

            def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], name: str = name) -> None:
                if name not in order:
                    order.append(name)

            handles.append(module.register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return order


def select_layers(names: Sequence[str], wanted: str | Sequence[str]) -> list[str]:
    """The layers that ``wanted`` names: ``all``, a name, a glob, or a list of names and globs; in network order.

    Raises:
        UserError: where a name or glob matches no layer.
    """
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen: set[str] = set()
    for pattern in asked:
        found = list(names) if pattern == "all" else fnmatch.filter(names, pattern)
        if not found:
            raise UserError(f"layer={pattern} matches no layer of the model: {did_you_mean(pattern, names)}")
        chosen.update(found)
    if not chosen:
        raise UserError("layer=[] selects no layer: name one, give a glob such as 'features.*', or layer=all")
    return [name for name in names if name in chosen]


@contextmanager
def collecting(model: nn.Module, collectors: Mapping[str, Collector]) -> Iterator[None]:
    """Within, every forward pass adds each named layer's patches to its collector."""

    def watch(collector: Collector) -> Any:
        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            collector.add(inputs[0], output)

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(watch(collector)) for name, collector in collectors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
