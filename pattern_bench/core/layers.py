"""Cut the inputs of Conv1d, Conv2d, Conv3d and Linear layers into patches, and sum over patches without cutting them.

A patch x is what one neuron sees at one position of the layer's output, zero padding included. Shapes: B images, C
input channels, G groups, D = C/G · prod(kernel) values of a patch, N neurons (output channels), L output positions, M
maps, or positions drawn. To a Linear layer, each input vector is one patch.
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
"""Padding (before, after) of each spatial dimension."""


class PaddedConv2d(nn.Conv2d):
    """A Conv2d with zero padding that differs before and after, or depends on the input's size as TensorFlow's "same".

    Args:
        arguments, settings: those of Conv2d, without its padding.
        margins: zeros (before, after) each spatial dimension.
        same: whether the margins are those that TensorFlow's "same" takes for the size of each input.
        only: (H, W), the size that ``margins`` are known for; None for all sizes.

    Raises:
        UserError: in a forward pass, for an input of another size than ``only``.

    >>> layer = PaddedConv2d(1, 1, 2, margins=((0, 1), (0, 1)))
    >>> layer(torch.ones(1, 1, 4, 4)).shape
    torch.Size([1, 1, 4, 4])
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
        """Return the convolution of the padded input, (B, C, H, W) to (B, N, H', W')."""
        if self.only is not None and tuple(x.shape[2:]) != self.only:
            raise UserError(
                f"a layer that pads by a rule of its own was written out for inputs of {self.only[0]}×{self.only[1]}, "
                f"and meets one of {x.shape[2]}×{x.shape[3]}: give images of one size"
            )
        return super().forward(pad(x, geometry_of(self)))

    def extra_repr(self) -> str:
        """Return the settings in the printed form."""
        how = "same" if self.same else self.margins
        return f"{super().extra_repr()}, margins={how}"


Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
LAYER_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Geometry:
    """Kernel, stride, dilation and padding with which a layer cuts its input into patches; empty for a Linear layer.

    With ``same`` the padding depends on the input's size: :meth:`padding_of` returns it.

    >>> geometry = geometry_of(nn.Conv2d(1, 1, 3, stride=2, padding=1))
    >>> geometry.kernel, geometry.stride, geometry.padding
    ((3, 3), (2, 2), ((1, 1), (1, 1)))
    >>> geometry.output_size((10, 10))
    (4, 4)
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Margins
    padding_mode: str
    groups: int
    same: bool = False

    @property
    def pads(self) -> bool:
        """Whether there is any padding."""
        return self.same or any(before or after for before, after in self.padding)

    def padding_of(self, spatial: tuple[int, ...]) -> Margins:
        """Return the padding of an input of this size; TensorFlow's "same" has one output for each stride begun."""
        if not self.same:
            return self.padding
        total = [
            max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
            for size, k, s, d in zip(spatial, self.kernel, self.stride, self.dilation, strict=True)
        ]
        return tuple((t // 2, t - t // 2) for t in total)

    def unpadded(self) -> Geometry:
        """Return the geometry for an input whose padding is written out."""
        return replace(self, padding=tuple((0, 0) for _ in self.padding), padding_mode="zeros", same=False)

    @property
    def pads_as_convolutions_do(self) -> bool:
        """Whether torch's convolutions take this padding as a number: zeros, as many before as after."""
        return self.padding_mode == "zeros" and not self.same and all(before == after for before, after in self.padding)

    def output_size(self, padded: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output positions per spatial dimension for an input of size ``padded``, its padding included."""
        return tuple(
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(padded, self.kernel, self.stride, self.dilation, strict=True)
        )


def geometry_of(layer: Layer) -> Geometry:
    """Return the geometry of a layer; that of a Linear layer has no spatial dimension.

    >>> geometry_of(nn.Linear(3, 2)).kernel, geometry_of(nn.Conv1d(2, 4, 3, groups=2)).groups
    ((), 2)
    """
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
    """Return N, the number of neurons of a layer: output channels, or rows of a Linear layer's weight.

    >>> neurons(nn.Conv2d(3, 8, 5))
    8
    """
    return layer.weight.shape[0]


def patch_size(layer: Layer) -> int:
    """Return D, the number of values that one neuron sees.

    >>> patch_size(nn.Conv2d(3, 8, 5)), patch_size(nn.Conv2d(4, 8, 3, groups=4)), patch_size(nn.Linear(7, 2))
    (75, 9, 7)
    """
    return layer.weight[0].numel()


def pad(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the input (B, C, spatial...) with its padding written out, (B, C, padded spatial...).

    >>> pad(torch.ones(1, 1, 2), geometry_of(nn.Conv1d(1, 1, 3, padding=1))).tolist()
    [[[0.0, 1.0, 1.0, 0.0]]]
    """
    if not geometry.pads:
        return x
    flat = list(itertools.chain.from_iterable(reversed(geometry.padding_of(tuple(x.shape[2:])))))
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(x, flat, mode=mode)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the output of a layer of this geometry with another weight and bias.

    Args:
        x: (B, C, spatial...).
        weight: in the layer's shape.
        bias: (N,), or None.
        geometry: of the layer.

    Returns:
        (B, N, output spatial...).

    >>> geometry = geometry_of(nn.Conv1d(1, 1, 2))
    >>> convolved(torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[[-1.0, 1.0]]]), None, geometry).tolist()
    [[[1.0, 2.0]]]
    """
    if not geometry.kernel:
        return F.linear(x, weight, bias)
    padding: Any = [before for before, _ in geometry.padding]
    if not geometry.pads_as_convolutions_do:
        x, padding = pad(x, geometry), 0
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(geometry.kernel) - 1]
    return convolve(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def _windows(x: Tensor, geometry: Geometry) -> Tensor:
    """Return a view of the padded input, (B, C, output spatial..., kernel...)."""
    view = pad(x, geometry)
    for i, (k, s, d) in enumerate(zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)):
        view = view.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    return view


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """Return every patch of an input, (B, C, spatial...) to (G, B·L, D).

    >>> patches(torch.tensor([[[1.0, 2.0, 4.0]]]), geometry_of(nn.Conv1d(1, 1, 2))).tolist()
    [[[1.0, 2.0], [2.0, 4.0]]]
    """
    groups, dims = geometry.groups, len(geometry.kernel)
    view = _windows(x, geometry)
    b, c = view.shape[:2]
    view = view.reshape(b, groups, c // groups, *view.shape[2:])
    positions, taps = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    view = view.permute(1, 0, *positions, 2, *taps)
    return view.reshape(groups, -1, c // groups * math.prod(geometry.kernel))


def patches_at(x: Tensor, geometry: Geometry, positions: Tensor) -> Tensor:
    """Return some patches of an input, (B, C, spatial...) to (G, B·M, D).

    Args:
        x: (B, C, spatial...).
        geometry: of the layer.
        positions: (B, M) int64, output positions counted in reading order.

    >>> x = torch.tensor([[[1.0, 2.0, 4.0]]])
    >>> patches_at(x, geometry_of(nn.Conv1d(1, 1, 2)), torch.tensor([[1]])).tolist()
    [[[2.0, 4.0]]]
    """
    view = _windows(x, geometry)
    dims = len(geometry.kernel)
    image = torch.arange(len(x), device=x.device).repeat_interleave(positions.shape[1])
    where = torch.unravel_index(positions.flatten(), view.shape[2 : 2 + dims])
    chosen = view.movedim(1, 1 + dims)[(image, *where)]
    return chosen.reshape(len(chosen), geometry.groups, -1).transpose(0, 1)


def draw_positions(images: int, positions: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` of ``positions`` for each image, (images, count) int64.

    One from each of ``count`` equal stretches, so that every position is as likely as any other. The draws do not
    depend on how images are batched.

    >>> draw_positions(1, 100, 4, torch.Generator().manual_seed(0)) // 25
    tensor([[0, 1, 2, 3]])
    """
    within = torch.rand(images, count, generator=generator, dtype=torch.float64)
    return ((torch.arange(count) + within) * (positions / count)).long().clamp(max=positions - 1)


def patch_sum(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the sum of all patches in float64, (B, C, spatial...) to (G, D).

    >>> patch_sum(torch.tensor([[[1.0, 2.0, 4.0]]]), geometry_of(nn.Conv1d(1, 1, 2))).tolist()
    [[3.0, 6.0]]
    """
    total = pad(_sum_of_images(x).double(), geometry)[0][..., None]
    out = geometry.output_size(tuple(total.shape[1:-1]))
    for k, o, s, d in zip(geometry.kernel, out, geometry.stride, geometry.dilation, strict=True):
        # The first spatial dimension left becomes a last one of taps.
        taps = [total[:, t * d : t * d + (o - 1) * s + 1 : s].sum(1) for t in range(k)]
        total = torch.stack(taps, -1)
    return total.reshape(geometry.groups, -1)


def _sum_of_images(x: Tensor) -> Tensor:
    """Return the sum over images, (B, ...) to (1, ...); where channels are last in memory, torch adds 20 times faster
    in that order."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).sum(0, keepdim=True).permute(0, 3, 1, 2)
    return x.sum(0, keepdim=True)


class Scratch:
    """Memory for a batch's temporaries, used again from layer to layer and from batch to batch.

    On a CPU, fresh pages cost ten times the arithmetic that fills them.

    >>> scratch = Scratch()
    >>> first = scratch.like("gate", torch.ones(4))
    >>> scratch.like("gate", torch.ones(2)).data_ptr() == first.data_ptr()
    True
    """

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def like(self, name: str, t: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """Return a tensor of ``t``'s type, device and memory format, and of its shape unless ``size`` is given.

        It holds arbitrary values, and is the caller's until the next call with this name.
        """
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
    """Return Σ t ⊗ x over images and positions, for maps t and patches x: the weight gradient of the convolution.

    Args:
        x: (B, C, spatial...).
        maps: (B, M, output spatial...), M a multiple of the groups; map ``m`` belongs to group ``m // (M/G)``.

    Returns:
        (M, C/G, kernel...), as a weight is shaped; in whatever memory format the convolution left it.

    >>> x, maps = torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[[10.0, 1.0]]])
    >>> cross_sum(x, maps, geometry_of(nn.Conv1d(1, 1, 2))).tolist()  # 10 (1, 2) + 1 (2, 4)
    [[[12.0, 24.0]]]
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
