"""Tell what layers take in and put out, so that moments and patterns of a network that computes otherwise are seen.

Weights alone (``core/weight_digests.py``) do not show which activations, poolings and settings lie between the layers.
So moments and patterns carry sixteen weighted sums each of a layer's input and output, for one image of noise that is
the same everywhere. They are compared up to rounding (``core/agreement.py``), so that device and precision do not
matter; a change that shows by less than that, or not for this image, goes unseen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pattern_bench.core.agreement import agree
from pattern_bench.core.copies import copied, plain_copy
from pattern_bench.core.half_precision import images_for, own_precision, widen_
from pattern_bench.core.layers import LAYER_TYPES
from pattern_bench.core.network import in_training, unwrapped
from pattern_bench.core.rounding import float32_products

SUMS = 16
"""How many weighted sums stand for a tensor."""
MOST_VALUES = 2**18
"""Of a larger tensor, evenly spaced values are summed."""
LOUDEST = 8
"""The noise's deviation grows from 1 to this across the image, so that activations show where they saturate, too."""
MOST_PIXELS = 2**26
"""Images of more values are not tried, so that no file can ask for any memory it likes."""
_LINE = re.compile(rf"\d{{1,9}}(x\d{{1,9}})*( -?\d+(\.\d+)?(e[-+]\d+)?){{{2 * SUMS}}}", re.ASCII)


@float32_products()
def responses(model: nn.Module, shape: Sequence[int], layers: Iterable[str]) -> dict[str, str]:
    """Return in a line of text, for each layer, the image's size and what stands for the layer's input and output.

    Args:
        model: any network; a copy of it is run once, in evaluation mode.
        shape: (C, spatial...), of the image of noise.
        layers: names of Conv and Linear modules; the batch norms that read their output count as parts of them.

    Returns:
        By layer, in the order they run. Left out are those that the image does not run, or whose values are not finite,
        and all where the network cannot be copied, or the image is too large for it or for ``MOST_PIXELS``.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
    >>> {name: len(line.split()) for name, line in responses(model, (2,), ["0", "2"]).items()}
    {'0': 33, '2': 33}
    """
    if math.prod(shape) > MOST_PIXELS:
        return {}
    try:
        watches = _watched(model, shape, set(layers))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return {}
    size, lines = "x".join(map(str, shape)), {}
    for name, watch in watches.items():
        if watch.sums.isfinite().all():
            lines[name] = " ".join([size, *(f"{value:.5g}" for value in watch.sums.flatten().tolist())])
    return lines


def changed_response(then: Mapping[str, str], model: nn.Module) -> str | None:
    """Return in words the first layer that takes in or puts out something else than it did; None where none does.

    Args:
        then: as :func:`responses` returned them; empty for those of earlier versions, of which nothing can be told.
            Lines of another form are passed over.
        model: the network at hand.

    >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).eval()
    >>> other = nn.Sequential(model[0], nn.Softplus(), model[2]).eval()
    >>> then = responses(model, (2,), ["0", "2"])
    >>> print(changed_response(then, model), changed_response(then, other), sep="; ")
    None; layer 2 takes in something else
    """
    then = {name: line for name, line in then.items() if _LINE.fullmatch(line)}
    if not then:
        return None
    shape = [int(side) for side in next(iter(then.values())).split()[0].split("x")]
    now = responses(model, shape, then)
    if gone := next((name for name in then if now and name not in now), None):
        return f"layer {gone} does something else"
    for name, line in now.items():
        before, after = (torch.tensor([float(v) for v in t.split()[1:]]).view(2, -1) for t in (then[name], line))
        for what, old, new in zip(("takes in", "puts out"), before, after, strict=True):
            if not agree(new, old):
                return f"layer {name} {what} something else"
    return None


class _Watch:
    """The sums of one layer, (2, SUMS) float64: of its inputs, and of its outputs."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, SUMS, dtype=torch.float64)
        self.draw = torch.Generator().manual_seed(0)

    def add(self, row: int, t: Tensor) -> None:
        """Add a tensor's values, each times a weight that its place decides."""
        values = t.detach().flatten()
        values = values[:: math.ceil(len(values) / MOST_VALUES) | 1].cpu().double()
        weights = torch.randn(len(values), generator=self.draw, dtype=torch.float64)
        parts = (values * weights / math.sqrt(max(1, len(values)))).tensor_split(SUMS)
        self.sums[row] += torch.stack([part.sum() for part in parts])


def _watched(model: nn.Module, shape: Sequence[int], layers: set[str]) -> dict[str, _Watch]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with own_precision(device), torch.no_grad():
        network = widen_(plain_copy(copied(unwrapped(model)).eval() if in_training(model) else model))
        watches = _hooked(network, layers)
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        noise *= torch.linspace(1, LOUDEST, noise.shape[-1], dtype=torch.float64)
        network(images_for(network, noise.float().to(device)))
    return watches


def _hooked(network: nn.Module, layers: set[str]) -> dict[str, _Watch]:
    """Return what the network's next forward pass fills with the watch of each layer that it runs."""
    watches: dict[str, _Watch] = {}
    made: dict[int, tuple[_Watch, Tensor, int]] = {}  # by id; kept, so that no id is used twice

    def enter_layer(name: str, inputs: tuple[Any, ...]) -> None:
        watches.setdefault(name, _Watch()).add(0, inputs[0])

    def leave_layer(name: str, output: Tensor) -> None:
        watches[name].add(1, output)
        made[id(output)] = watches[name], output, output._version

    def leave_norm(inputs: tuple[Any, ...], output: Tensor) -> None:
        watch, y, version = made.get(id(inputs[0]), (None, None, 0))
        if watch is not None and y is not None and y._version == version:
            watch.add(1, output)

    for name, module in network.named_modules():
        if isinstance(module, LAYER_TYPES) and name in layers:
            module.register_forward_pre_hook(lambda _, inputs, name=name: enter_layer(name, inputs))
            module.register_forward_hook(lambda _, inputs, output, name=name: leave_layer(name, output))
        elif isinstance(module, _BatchNorm):
            module.register_forward_hook(lambda _, inputs, output: leave_norm(inputs, output))
    return watches


# --- in files ---

_PREFIX = "response/"


def metadata(responses: Mapping[str, str]) -> dict[str, str]:
    """Return responses as the metadata of a safetensors file, ``response/LAYER`` for each layer.

    >>> metadata({"fc": "2 0.5"})
    {'response/fc': '2 0.5'}
    """
    return {f"{_PREFIX}{name}": line for name, line in responses.items()}


def from_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the responses in a file's metadata, the inverse of :func:`metadata`; empty where it has none.

    >>> from_metadata({"response/fc": "2 0.5", "estimator": "a"})
    {'fc': '2 0.5'}
    """
    return {name.removeprefix(_PREFIX): line for name, line in metadata.items() if name.startswith(_PREFIX)}
