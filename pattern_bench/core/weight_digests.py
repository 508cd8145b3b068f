"""Tell which weights moments and patterns were computed from.

A layer's moments depend on everything that its input went through, so they carry a digest (SHA-256) of every parameter
and buffer that the network used up to the layer, by name: biases and batch norms included. It is taken of the values,
so it is the same on every device and in every precision that holds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pattern_bench.core.copies import plain_copy
from pattern_bench.core.half_precision import images_for, widen_
from pattern_bench.core.layers import LAYER_TYPES

UNUSED = "unused"
"""In the place of the digest of a tensor that the layers in question do not depend on."""
_COMPILED = "_orig_mod."


def digests(model: nn.Module) -> dict[str, str]:
    """Return the digest of each parameter and buffer, by name.

    >>> {name: len(digest) for name, digest in digests(nn.Linear(2, 1)).items()}
    {'weight': 64, 'bias': 64}
    """
    return {name: _digest(tensor) for name, tensor in _tensors(model)}


def belongs_to(model: nn.Module, example: Tensor, layers: Iterable[str]) -> dict[str, str]:
    """Return the digests of the tensors that the named layers depend on, and of the batch norms that follow them.

    Args:
        model: any network in evaluation mode.
        example: (1, C, spatial...); one forward pass of it shows what is used.
        layers: names of Conv and Linear modules.

    Returns:
        A digest for each parameter and buffer of the model, by name; ``UNUSED`` for those that play no part.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
    >>> belongs_to(model, torch.ones(1, 2), ["0"])["2.weight"]
    'unused'
    """
    used = _used(widen_(plain_copy(model)), example, set(layers))
    return {name: _digest(tensor) if name in used else UNUSED for name, tensor in _tensors(model)}


def difference(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return in words the first layer in which two networks differ; None where they are the same.

    Args:
        then: of the network that moments or patterns were computed from, as :func:`belongs_to` returns them.
        now: the :func:`digests` of the network at hand.

    >>> difference({"fc.weight": "a1", "fc.bias": "b1"}, {"fc.weight": "a1", "fc.bias": "b2"})
    'layer fc has other weights (bias)'
    """
    for name in (*now, *sorted(then.keys() - now.keys())):
        if then.get(name) not in (UNUSED, now.get(name)):
            layer, part = _layer_and_part(name)
            how = "" if name in then and name in now else " is gone" if name in then else " is new"
            return f"layer {layer} has other weights ({part}{how})"
    return None


def _layer_and_part(name: str) -> tuple[str, str]:
    layer, _, part = name.partition(".parametrizations.")
    if not part:
        layer, _, part = name.rpartition(".")
    return layer or "at the root", part


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            yield name.replace(_COMPILED, ""), tensor


def _digest(tensor: Tensor) -> str:
    t = tensor.detach().cpu()
    if t.is_floating_point() and not (t.dtype == torch.float64 and not torch.equal(t.float().double(), t)):
        t = t.float()
    digest = hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode())
    digest.update(t.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Uses(TorchFunctionMode):
    """Record the ids of every function's operands, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs))
        return func(*args, **(kwargs or {}))

    def _note(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.order.append(id(value))
        elif isinstance(value, Mapping):
            self._note(tuple(value.values()))
        elif isinstance(value, tuple | list):
            for item in value:
                self._note(item)


def _used(model: nn.Module, example: Tensor, layers: set[str]) -> set[str]:
    """Return the names of the tensors used up to the last call of one of ``layers``, and before the next layer."""
    neurons = {name.replace(_COMPILED, "") for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)}
    names: dict[int, list[str]] = {}
    for name, tensor in _tensors(model):
        names.setdefault(id(tensor), []).append(name)
    image, uses = images_for(model, example).clone(), _Uses()
    with torch.no_grad(), uses:
        model(image)
    order = [name for use in uses.order for name in names.get(use, ())]
    owner = {name: _layer_and_part(name)[0] for name in order}
    last = max((i for i, name in enumerate(order) if owner[name] in layers), default=len(order))
    after = (i for i, name in enumerate(order) if i > last and owner[name] in neurons - layers)
    return set(order[: next(after, len(order))])


# --- digests in files ---

_PREFIX = "network/"


def metadata(belongs_to: Mapping[str, str]) -> dict[str, str]:
    """Return digests as the metadata of a safetensors file, ``network/NAME`` for each parameter and buffer.

    >>> metadata({"fc.bias": "b1"})
    {'network/fc.bias': 'b1'}
    """
    return {f"{_PREFIX}{name}": digest for name, digest in belongs_to.items()}


def from_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the digests in a file's metadata, the inverse of :func:`metadata`; empty where it has none.

    >>> from_metadata({"network/fc.bias": "b1", "estimator": "a"})
    {'fc.bias': 'b1'}
    """
    return {name.removeprefix(_PREFIX): digest for name, digest in metadata.items() if name.startswith(_PREFIX)}
