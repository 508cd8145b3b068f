"""A network as the suite sees it: its layers by name, in the order they run, and what streams through them."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pattern_bench.core.layers import LAYER_TYPES
from pattern_bench.errors import UserError, did_you_mean


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, or the module itself."""
    return getattr(model, "_orig_mod", model)


def without_weights(model: nn.Module) -> str | None:
    """The first module that has no weights until it meets an input, as torch's lazy ones; None where all have."""
    for name, module in model.named_modules():
        own = itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
        if any(is_lazy(tensor) for tensor in own):
            return name or "the network itself"
    return None


def in_training(model: nn.Module) -> str | None:
    """The first module that is in training mode; None where all are in evaluation mode."""
    return next((name or "at the root" for name, module in model.named_modules() if module.training), None)


def refuse_training(model: nn.Module) -> None:
    """
    Raises:
        UserError: where a module is in training mode.
    """
    if where := in_training(model):
        raise UserError(
            f"model={type(model).__name__} is in training mode (module {where}), in which its outputs are random or "
            "depend on their batch: call model.eval() first"
        )


def refuse_without_weights(model: nn.Module) -> None:
    """
    Raises:
        UserError: where a module has no weights before it meets its first input.
    """
    if lazy := without_weights(model):
        raise UserError(
            f"model={type(model).__name__}: module {lazy} has no weights before it meets its first input, and those "
            "would be random: run the network on an image once, and train it or load its weights"
        )


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
        # A name may hold what a glob would read otherwise.
        found = list(names) if pattern == "all" else [pattern] if pattern in names else fnmatch.filter(names, pattern)
        if not found:
            raise UserError(f"layer={pattern} matches no layer of the model: {did_you_mean(pattern, names)}")
        chosen.update(found)
    if not chosen:
        raise UserError("layer=[] selects no layer: name one, give a glob such as 'features.*', or layer=all")
    return [name for name in names if name in chosen]


class Watcher(Protocol):
    """What can be shown a layer's inputs and outputs: a collector of moments, a running correlation."""

    def add(self, x: Tensor, y: Tensor) -> None: ...


@contextmanager
def collecting(model: nn.Module, watchers: Mapping[str, Watcher]) -> Iterator[None]:
    """Within, every forward pass shows each named layer's input and output to its watcher."""

    def watch(watcher: Watcher) -> Any:
        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            watcher.add(inputs[0], output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(watcher)) for name, watcher in watchers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_not_finite(model: nn.Module, images: Tensor) -> str | None:
    """The first layer whose output is NaN or infinite somewhere, or None."""
    watched = {name: _Finite() for name in layers_in_order(model, images)}
    with torch.no_grad(), collecting(model, watched):
        model(images)
    return next((name for name, layer in watched.items() if not layer.finite), None)


class _Finite:
    """Whether all that a layer put out was finite."""

    finite = True

    def add(self, x: Tensor, y: Tensor) -> None:
        self.finite = self.finite and bool(y.isfinite().all())
