"""What a neuron sees: the patches of a Conv1d, Conv2d, Conv3d or Linear layer, whatever its geometry.

Shapes: ``B`` images, ``C`` input channels, ``G`` groups, ``D = C/G · prod(kernel)`` values in a patch,
``N`` neurons (output channels), ``L`` output positions. A Linear layer is one patch per input vector.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pattern_bench.errors import UserError

Margins = tuple[tuple[int, int], ...]


class PaddedConv2d(nn.Conv2d):
    """Conv2d that pads zeros of its own: ``margins``, (before, after) per spatial dimension, or TensorFlow's "same".

    Args:
        arguments, settings: those of Conv2d, without its padding.
        margins: for inputs of one size, or of all sizes.
        same: whether the margins are those that TensorFlow's "same" takes for the size of each input.
        only: (H, W), the size that ``margins`` are known for; None for all sizes.

    Raises:
        UserError: in a forward pass, for an input of another size than ``only``.
    """

    def __init__(
        self,
        *arguments: Any,
        margins: Margins,
        same: bool = False,
        only: tuple[int, ...] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self.margins, self.same, self.only = margins, same, only

    def forward(self, x: Tensor) -> Tensor:
        if self.only is not None and tuple(x.shape[2:]) != self.only:
            raise UserError(
                f"a layer that pads by a rule of its own was written out for inputs of {self.only[0]}×{self.only[1]}, "
                f"and meets one of {x.shape[2]}×{x.shape[3]}: give images of one size"
            )
        return super().forward(pad(x, geometry_of(self)))

    def extra_repr(self) -> str:
        how = "same" if self.same else self.margins
        return f"{super().extra_repr()}, margins={how}"


Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
LAYER_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Geometry:
    """How a layer cuts its input into patches. ``padding`` holds (before, after) per spatial dimension; with ``same``
    it depends on the input's size, see :meth:`padding_of`."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str
    groups: int
    same: bool = False

    @property
    def pads(self) -> bool:
        return self.same or any(before or after for before, after in self.padding)

    def padding_of(self, spatial: tuple[int, ...]) -> Margins:
        """The padding of an input of this size: TensorFlow's "same" makes as many outputs as there are strides."""
        if not self.same:
            return self.padding
        total = [
            max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
            for size, k, s, d in zip(spatial, self.kernel, self.stride, self.dilation, strict=True)
        ]
        return tuple((t // 2, t - t // 2) for t in total)

    def unpadded(self) -> Geometry:
        """The same for an input whose padding is written out."""
        return replace(self, padding=tuple((0, 0) for _ in self.padding), padding_mode="zeros", same=False)

    @property
    def pads_as_convolutions_do(self) -> bool:
        """Whether torch's convolutions take this padding as a number: zeros, as many before as after."""
        return self.padding_mode == "zeros" and not self.same and all(before == after for before, after in self.padding)

    def output_size(self, padded: tuple[int, ...]) -> tuple[int, ...]:
        """Output positions per spatial dimension for an input that is padded already."""
        return tuple(
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(padded, self.kernel, self.stride, self.dilation, strict=True)
        )


def geometry_of(layer: Layer) -> Geometry:
    """The geometry of ``layer``; that of a Linear layer has no spatial dimension."""
    if isinstance(layer, nn.Linear):
        return Geometry((), (), (), (), "zeros", 1)
    padding: Margins
    if isinstance(layer, PaddedConv2d):
        padding = layer.margins
    elif layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        padding = tuple((t // 2, t - t // 2) for t in total)
    elif layer.padding == "valid":
        padding = tuple((0, 0) for _ in layer.kernel_size)
    else:
        padding = tuple((int(p), int(p)) for p in layer.padding)
    return Geometry(
        tuple(layer.kernel_size),
        tuple(layer.stride),
        tuple(layer.dilation),
        padding,
        layer.padding_mode,
        layer.groups,
        isinstance(layer, PaddedConv2d) and layer.same,
    )


def neurons(layer: Layer) -> int:
    return layer.weight.shape[0]


def patch_size(layer: Layer) -> int:
    """D, the number of values that one neuron sees."""
    return layer.weight[0].numel()


def pad(x: Tensor, geometry: Geometry) -> Tensor:
    """The input with its padding written out, (B, C, padded spatial...)."""
    if not geometry.pads:
        return x
    flat = list(itertools.chain.from_iterable(reversed(geometry.padding_of(tuple(x.shape[2:])))))
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(x, flat, mode=mode)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """What a layer of this geometry makes of ``x`` with this weight (in its layer's shape) and bias (N,)."""
    if not geometry.kernel:
        return F.linear(x, weight, bias)
    padding: Any = [before for before, _ in geometry.padding]
    if not geometry.pads_as_convolutions_do:
        x, padding = pad(x, geometry), 0
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(geometry.kernel) - 1]
    return convolve(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def _windows(x: Tensor, geometry: Geometry) -> Tensor:
    """A view of the padded input, (B, C, output spatial..., kernel...)."""
    view = pad(x, geometry)
    for i, (k, s, d) in enumerate(zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)):
        view = view.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    return view


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """Every patch of an input: (B, C, spatial...) to (G, B·L, D)."""
    groups, dims = geometry.groups, len(geometry.kernel)
    view = _windows(x, geometry)
    b, c = view.shape[:2]
    view = view.reshape(b, groups, c // groups, *view.shape[2:])
    positions, taps = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    view = view.permute(1, 0, *positions, 2, *taps)
    return view.reshape(groups, -1, c // groups * math.prod(geometry.kernel))


def patches_at(x: Tensor, geometry: Geometry, positions: Tensor) -> Tensor:
    """Some patches of an input: (B, C, spatial...) and flat output positions (B, M) to (G, B·M, D)."""
    view = _windows(x, geometry)
    dims = len(geometry.kernel)
    image = torch.arange(len(x), device=x.device).repeat_interleave(positions.shape[1])
    where = torch.unravel_index(positions.flatten(), view.shape[2 : 2 + dims])
    found = view.movedim(1, 1 + dims)[(image, *where)]
    return found.reshape(len(found), geometry.groups, -1).transpose(0, 1)


def draw_positions(images: int, positions: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of ``positions`` for each image, (images, count): one from each of ``count`` equal stretches, so that
    every position is as likely as any other. The draws do not depend on how images are batched."""
    within = torch.rand(images, count, generator=generator, dtype=torch.float64)
    return ((torch.arange(count) + within) * (positions / count)).long().clamp(max=positions - 1)


def patch_sum(x: Tensor, geometry: Geometry) -> Tensor:
    """Sum of all patches, in float64: (B, C, spatial...) to (G, D)."""
    total = pad(_sum_of_images(x).double(), geometry)[0][..., None]
    out = geometry.output_size(tuple(total.shape[1:-1]))
    for k, o, s, d in zip(geometry.kernel, out, geometry.stride, geometry.dilation, strict=True):
        # The first spatial dimension left becomes a last one of taps.
        taps = [total[:, t * d : t * d + (o - 1) * s + 1 : s].sum(1) for t in range(k)]
        total = torch.stack(taps, -1)
    return total.reshape(geometry.groups, -1)


def _sum_of_images(x: Tensor) -> Tensor:
    """(B, ...) to (1, ...). torch adds up channels-last images 20 times faster when told that channels are last."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).sum(0, keepdim=True).permute(0, 3, 1, 2)
    return x.sum(0, keepdim=True)


class Scratch:
    """Memory for a batch's temporaries, used again from layer to layer and from batch to batch: on a CPU, fresh pages
    cost ten times the arithmetic that fills them."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def like(self, name: str, t: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """A tensor of ``t``'s type, device and memory format, and of its shape unless ``size`` is given. What it
        holds is left from before; it is the caller's until the next call with this name."""
        size = tuple(t.shape) if size is None else size
        numel = math.prod(size)
        kept = self.memory.get(name)
        if kept is None or kept.numel() < numel or (kept.dtype, kept.device) != (t.dtype, t.device):
            kept = self.memory[name] = torch.empty(numel, dtype=t.dtype, device=t.device)
        if t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last):
            b, c, h, w = size
            return kept[:numel].view(b, h, w, c).permute(0, 3, 1, 2)
        return kept[:numel].view(size)


def cross_sum(x: Tensor, maps: Tensor, geometry: Geometry) -> Tensor:
    """Sum over images and positions of ``maps ⊗ patch``: the weight gradient of the convolution.

    Args:
        x: (B, C, spatial...).
        maps: (B, M, output spatial...), M a multiple of the groups; map ``m`` belongs to group ``m // (M/G)``.

    Returns:
        (M, C/G, kernel...), as a weight is shaped; in whatever memory format the convolution left it.
    """
    if not geometry.kernel:
        return maps.mT @ x
    if not geometry.pads_as_convolutions_do:
        x, geometry = pad(x, geometry), geometry.unpadded()
    shape = (maps.shape[1], x.shape[1] // geometry.groups, *geometry.kernel)
    return torch.ops.aten.convolution_backward(
        maps,
        x,
        x.new_empty(1).expand(shape),
        None,
        list(geometry.stride),
        [before for before, _ in geometry.padding],
        list(geometry.dilation),
        False,
        [0] * len(shape[2:]),
        geometry.groups,
        [False, True, False],
    )[1]
