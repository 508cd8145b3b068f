"""Compute the Gram matrix Σ x xᵀ of a layer's patches from autocorrelations, without unfolding a patch.

For stride 1 and dilation 1 the entry for kernel taps i and j is a sum of x[q] x[q + j - i] over the pixels q that
tap i reaches: it depends on the offset j - i alone, but for the lines at the border that the window never reaches
at tap i. So the autocorrelation at all offsets (one convolution weight gradient of x with itself; half of the
offsets, since the others are its transposes), those of the border lines, and of the corners, give the whole matrix.
They are plain sums too, so they add up over batches and are assembled once, at the end.

Shapes: B images, C input channels, G groups, D values of a patch, kernel (kh, kw), images of H×W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from torch import Tensor

from pattern_bench.core.layers import Geometry, Scratch, cross_sum

SMALL_PATCH = 128
"""Patches of at most this many values are unfolded, and their products taken in float64: filters of a depthwise layer
take differences that float32 leaves few digits of. What that costs: ``experiments/benchmark``."""


def is_small_patch(size: int) -> bool:
    """Return whether products of patches of ``size`` values are taken in float64 (see ``SMALL_PATCH``).

    >>> is_small_patch(9), is_small_patch(576)
    (True, False)
    """
    return size <= SMALL_PATCH


def autocorrelation_applies(geometry: Geometry, channels: int, size: tuple[int, ...]) -> bool:
    """Return whether :class:`Autocorrelation` gives the Gram matrix of a layer, and faster than unfolding.

    Args:
        geometry: of the layer; one with strides, dilation, or other than two spatial dimensions is unfolded.
        channels: C, input channels.
        size: (H, W) of the input, its padding not included.

    >>> from torch import nn
    >>> from pattern_bench.core.layers import geometry_of
    >>> autocorrelation_applies(geometry_of(nn.Conv2d(64, 8, 3, padding=1)), 64, (32, 32))
    True
    >>> autocorrelation_applies(geometry_of(nn.Conv2d(64, 8, 3, stride=2)), 64, (32, 32))
    False
    """
    if len(geometry.kernel) != 2 or set(geometry.stride + geometry.dilation) != {1} or geometry.kernel == (1, 1):
        return False
    if is_small_patch(channels // geometry.groups * geometry.kernel[0] * geometry.kernel[1]):
        return False
    # Lines counted from either border must not meet.
    return all(n >= 2 * k for n, k in zip(size, geometry.kernel, strict=True))


def _unreached(tap: int, kernel: int, before: int, after: int) -> list[int]:
    """Return the lines of the image that the window never reaches at ``tap``: 0, 1, ... at the start; -1, -2, ... at
    the end."""
    low = max(0, tap - before)
    high = max(0, kernel - 1 - tap - after)
    return [*range(low), *range(-high, 0)]


def _line_pairs(taps: tuple[int, int], kernel: int, padding: tuple[int, int]) -> list[int]:
    """Return the unreached lines whose partner at the offset of ``taps`` = (i, j) is a line of the image too."""
    i, j = taps
    return [line for line in _unreached(i, kernel, *padding) if (line + j - i >= 0 if line >= 0 else line + j - i < 0)]


class Autocorrelation:
    """Running sums of the autocorrelation of a layer's input.

    ``full`` (C, C/G, kh, 2 kw - 1) holds the sums at row offsets 0 to kh - 1 and column offsets -(kw - 1) to kw - 1;
    ``row``, ``column`` and ``corner`` hold the same for single lines, by line (negative: from the end) and offset
    across.

    Args:
        geometry: of a layer to which :func:`autocorrelation_applies`; its padding must be zeros.
        channels: C, input channels.
        like: a float64 tensor on the device where the sums shall be.
        scratch: memory for temporaries.

    >>> import torch
    >>> from torch import nn
    >>> from pattern_bench.core.layers import geometry_of, patches
    >>> geometry = geometry_of(nn.Conv2d(1, 1, 3, padding=1))
    >>> x = torch.arange(72.0, dtype=torch.float64).view(1, 1, 6, 12)
    >>> sums = Autocorrelation(geometry, 1, x, Scratch())
    >>> sums.add(x)
    >>> p = patches(x, geometry)
    >>> torch.equal(sums.gram(), p.mT @ p)
    True
    """

    def __init__(self, geometry: Geometry, channels: int, like: Tensor, scratch: Scratch) -> None:
        self.geometry, self.channels, self.scratch = geometry, channels, scratch
        (self.kh, self.kw), (self.rows, self.columns) = geometry.kernel, geometry.padding
        row_taps = [(i, j) for i in range(self.kh) for j in range(i, self.kh)]
        column_taps = list(itertools.product(range(self.kw), repeat=2))
        self.row_lines = sorted({(r, j - i) for i, j in row_taps for r in _line_pairs((i, j), self.kh, self.rows)})
        self.column_lines = sorted(
            {(c, j - i) for i, j in column_taps for c in _line_pairs((i, j), self.kw, self.columns)}
        )
        block = (channels, channels // geometry.groups)

        def zero(*offsets: int) -> Tensor:
            return like.new_zeros(*block, *offsets)

        self.full = zero(self.kh, 2 * self.kw - 1)
        self.row = {key: zero(1, 2 * self.kw - 1) for key in self.row_lines}
        self.column = {key: zero(self.kh, 1) for key in self.column_lines}
        self.corner = {key: zero(1, 1) for key in itertools.product(self.row_lines, self.column_lines)}

    def add(self, x: Tensor) -> None:
        """Add a batch of inputs (B, C, H, W), padding not written out; all of it, or nothing where memory runs out."""
        parts = [(self.full, self._correlate(x, x, self.kh, self.kw))]
        for (line, offset), total in self.row.items():
            one = x.select(2, line % x.shape[2])[:, :, None]
            other = x.select(2, line % x.shape[2] + offset)[:, :, None]
            parts.append((total, self._correlate(one, other, 1, self.kw)))
        for (line, offset), total in self.column.items():
            one = x.select(3, line % x.shape[3])[:, :, :, None]
            other = x.select(3, line % x.shape[3] + offset)[:, :, :, None]
            parts.append((total, self._correlate(one, other, self.kh, 1)))
        for ((r, dr), (c, dc)), total in self.corner.items():
            row, column = r % x.shape[2], c % x.shape[3]
            one, other = x[:, :, row, column, None, None], x[:, :, row + dr, column + dc, None, None]
            parts.append((total, self._correlate(one, other, 1, 1)))
        for total, part in parts:
            total += part

    def sums(self) -> dict[str, Tensor]:
        """Return the running sums by name."""
        named = {"full": self.full}
        for kind, sums in (("row", self.row), ("column", self.column), ("corner", self.corner)):
            named |= {f"{kind}/{key}": tensor for key, tensor in sums.items()}
        return named

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Replace the running sums by the :meth:`sums` of another autocorrelation of the same layer."""
        for name, tensor in self.sums().items():
            tensor.copy_(sums[name])

    def _correlate(self, one: Tensor, other: Tensor, kh: int, kw: int) -> Tensor:
        """Return Σ one[q] ⊗ other[q + offset] over pixels q, row offsets 0..kh-1 and column offsets -(kw-1)..kw-1:
        (C, C/G, kh, 2kw-1)."""
        height = other.shape[2]
        padded = self.scratch.like("padded", other, (*other.shape[:2], height + kh - 1, other.shape[3]))
        padded[:, :, :height].copy_(other)
        padded[:, :, height:].zero_()
        offsets = Geometry((kh, 2 * kw - 1), (1, 1), (1, 1), ((0, 0), (kw - 1, kw - 1)), "zeros", self.geometry.groups)
        # One is the output gradient, so its taps are the offsets.
        return cross_sum(padded, one, offsets)

    def gram(self) -> Tensor:
        """Return Σ x xᵀ over the patches of all batches, (G, D, D)."""
        groups, c = self.geometry.groups, self.channels // self.geometry.groups
        taps = list(itertools.product(range(self.kh), range(self.kw)))
        # Offsets first, so that a block is contiguous.
        full = self.full.permute(2, 3, 0, 1).contiguous()
        d = c * len(taps)
        gram = self.full.new_empty(groups, d, d)
        # Written where it belongs: a second tensor of this size can have gigabytes.
        blocks = gram.view(groups, c, len(taps), c, len(taps)).permute(2, 4, 0, 1, 3)
        for (a, i), (b, j) in itertools.product(enumerate(taps), repeat=2):
            if j[0] > i[0] or (j[0] == i[0] and j[1] >= i[1]):
                block = self._block(full, i, j).view(groups, c, c)
                blocks[a, b] = block
                if a != b:
                    blocks[b, a] = block.mT
        return gram

    def _block(self, full: Tensor, i: tuple[int, int], j: tuple[int, int]) -> Tensor:
        """Return the entries of taps i and j, (C, C/G): all pixels, less the lines that tap i never reaches."""
        dr, dc = j[0] - i[0], j[1] - i[1]
        rows = _line_pairs((i[0], j[0]), self.kh, self.rows)
        columns = _line_pairs((i[1], j[1]), self.kw, self.columns)
        block = full[dr, dc + self.kw - 1].clone()
        for r in rows:
            block -= self.row[r, dr][:, :, 0, dc + self.kw - 1]
        for c in columns:
            block -= self.column[c, dc][:, :, dr, 0]
        for r, c in itertools.product(rows, columns):
            block += self.corner[(r, dr), (c, dc)][:, :, 0, 0]
        return block
