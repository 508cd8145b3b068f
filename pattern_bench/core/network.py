"""The layers of a network: their names in the order they run, which of them are selected, and hooks on their inputs and
outputs.

A layer is a Conv1d, Conv2d, Conv3d or Linear module. Shapes: B images, C channels.
"""

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
from pattern_bench.core.tensor_checks import unusable
from pattern_bench.errors import UserError, did_you_mean


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` was given, or the module itself.

    >>> model = nn.ReLU()
    >>> unwrapped(model) is model  # unwrapped(torch.compile(model)) is model, too
    True
    """
    return getattr(model, "_orig_mod", model)


def without_weights(model: nn.Module) -> str | None:
    """Return the name of the first module whose weights take shape at its first input, as in torch's lazy modules; None
    where there is none.

    >>> print(without_weights(nn.Sequential(nn.ReLU(), nn.LazyLinear(2))), without_weights(nn.Linear(2, 2)))
    1 None
    """
    for name, module in model.named_modules():
        own = itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
        if any(is_lazy(tensor) for tensor in own):
            return name or "the network itself"
    return None


def in_training(model: nn.Module) -> str | None:
    """Return the name of the first module in training mode; None where all are in evaluation mode.

    >>> print(in_training(nn.ReLU()), in_training(nn.ReLU().eval()))
    at the root None
    """
    return next((name or "at the root" for name, module in model.named_modules() if module.training), None)


def refuse_training(model: nn.Module) -> None:
    """Check that a network is in evaluation mode.

    Raises:
        UserError: where a module is in training mode.

    >>> refuse_training(nn.ReLU())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    pattern_bench.errors.UserError: model=ReLU is in training mode (module at the root), ...: call model.eval() first
    """
    if where := in_training(model):
        raise UserError(
            f"model={type(model).__name__} is in training mode (module {where}), in which its outputs are random or "
            "depend on their batch: call model.eval() first"
        )


def refuse_without_weights(model: nn.Module) -> None:
    """Check that every module of a network has its weights.

    Raises:
        UserError: where the weights of a module take shape at its first input, or have no values because they are on
            the device ``meta``.

    >>> refuse_without_weights(nn.LazyLinear(2))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    pattern_bench.errors.UserError: model=LazyLinear: module the network itself has no weights before ...
    """
    if lazy := without_weights(model):
        raise UserError(
            f"model={type(model).__name__}: module {lazy} has no weights before it meets its first input, and those "
            "would be random: run the network on an image once, and train it or load its weights"
        )
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if unusable(tensor.detach()) == "meta":
            raise UserError(
                f"model={type(model).__name__}: {name} has no values, since it is on the device meta: make the network "
                "on another device, or call model.to_empty(device=...) and load its weights"
            )


def layers_in_order(model: nn.Module, example: Tensor) -> list[str]:
    """Return the names of the Conv and Linear layers in the order in which a forward pass first calls them.

    Args:
        model: any network; layers that the pass does not call are left out.
        example: (B, C, spatial...), one image is enough.

    >>> layers_in_order(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)), torch.ones(1, 3))
    ['0', '2']
    """
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
    """Return the layers that ``wanted`` names, in network order.

    Args:
        names: all layers, in network order.
        wanted: ``all``, a name, a glob, or a list of names and globs.

    Raises:
        UserError: where there are no layers, a name or glob matches none, or the list is empty.

    >>> select_layers(["conv1", "conv2", "fc"], "conv*"), select_layers(["conv1", "conv2", "fc"], ["fc", "conv1"])
    (['conv1', 'conv2'], ['conv1', 'fc'])
    """
    if not names:
        raise UserError(
            "the network runs no Conv1d, Conv2d, Conv3d or Linear layer, so there is nothing to examine: give another"
        )
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen: set[str] = set()
    for pattern in asked:
        matching = _matching(names, pattern)
        if not matching:
            raise UserError(f"layer={pattern} matches no layer of the model: {did_you_mean(pattern, names)}")
        chosen.update(matching)
    if not chosen:
        raise UserError("layer=[] selects no layer: name one, give a glob such as 'features.*', or layer=all")
    return [name for name in names if name in chosen]


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    if pattern == "all":
        return list(names)
    # A name may hold what a glob would read otherwise.
    return [pattern] if pattern in names else fnmatch.filter(names, pattern)


@contextmanager
def refusing_other_layers(model: nn.Module, known: Sequence[str], wanted: str | Sequence[str]) -> Iterator[None]:
    """Refuse, within this context, forward passes that run a layer that is wanted and not known.

    A network is brought into canonical form by one image, so nothing is known of layers that run for others only.

    Args:
        model: any network.
        known: the layers that the image runs, as :func:`layers_in_order` returns them.
        wanted: as of :func:`select_layers`.

    Raises:
        UserError: in such a forward pass, naming the layer.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> with refusing_other_layers(model, ["0"], "all"):
    ...     model(torch.ones(1, 2))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    pattern_bench.errors.UserError: layer 1 runs for some images, and not for the first one, by which ...
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)}
    known_layers = {id(layers[name]) for name in known}
    others = [name for name, module in layers.items() if id(module) not in known_layers]
    asked = [wanted] if isinstance(wanted, str) else wanted

    def refusal(name: str) -> Any:
        def hook(_layer: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
            raise UserError(
                f"layer {name} runs for some images, and not for the first one, by which the network was read: select "
                "layers that run for every image, or give a network that runs the same layers for all"
            )

        return hook

    handles = [
        layers[name].register_forward_pre_hook(refusal(name))
        for name in dict.fromkeys(name for pattern in asked for name in _matching(others, pattern))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Watcher(Protocol):
    """Anything with an ``add`` for a layer's inputs and outputs, such as a collector of moments.

    >>> class Shapes:
    ...     def add(self, x, y):
    ...         print(tuple(x.shape), tuple(y.shape))
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> with collecting(model, {"0": Shapes()}):
    ...     output = model(torch.ones(1, 3))
    (1, 3) (1, 2)
    """

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take one call's input (B, C, spatial...) and output (B, N, output spatial...)."""


@contextmanager
def collecting(model: nn.Module, watchers: Mapping[str, Watcher]) -> Iterator[None]:
    """Hand each named layer's input and output to its watcher, in every forward pass inside this context.

    >>> from pattern_bench.core.collector import Collector
    >>> model = nn.Linear(2, 1)
    >>> collector = Collector(model, gram=False)
    >>> with collecting(model, {"": collector}), torch.no_grad():
    ...     output = model(torch.ones(5, 2))
    >>> collector.moments().x.tolist()
    [[5.0, 5.0]]
    """

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
    """Return the name of the first layer whose output for ``images`` (B, C, spatial...) has a NaN or infinite value, or
    None.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    >>> first_not_finite(model, torch.tensor([[float("inf")]]))
    '0'
    """
    watched = {name: _Finite() for name in layers_in_order(model, images)}
    with torch.no_grad(), collecting(model, watched):
        model(images)
    return next((name for name, layer in watched.items() if not layer.finite), None)


class _Finite:
    """Watcher that notes whether all of a layer's outputs were finite."""

    finite = True

    def add(self, x: Tensor, y: Tensor) -> None:
        self.finite = self.finite and bool(y.isfinite().all())
