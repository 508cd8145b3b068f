"""Track what the values of a forward pass were made of: the image, learned parameters, stored tensors or constants.

Next to every storage lies a :class:`Provenance`, with up to three numbers for each of its elements (float64):

- its *factor* stands for the learned values that it was multiplied by, 0 for none;
- its *shift* stands for the learned values that were added to it, 0 for none;
- its *origin* stands for one value of one tensor: the number of the tensor, and behind the point that of the value.

Equal numbers mean the same learned values, or the same origin; they have no other meaning.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Kind(IntEnum):
    """The thing that a value depends on: of several, the last of these.

    >>> max(Kind.LEARNED, Kind.IMAGE, Kind.CONSTANT).name
    'IMAGE'
    """

    CONSTANT = 0
    """Nothing."""
    STORED = 1
    """Tensors that the network keeps beside its parameters: buffers and attributes."""
    LEARNED = 2
    """Parameters alone."""
    IMAGE = 3
    """The image."""


@dataclass
class Provenance:
    """Everything that is known of the values of a storage.

    >>> first = Provenance(storage=None, is_product=True, readers=1)
    >>> Provenance(storage=None, parents=[first]).is_made_of_product()
    True
    """

    storage: Any  # kept, so that no other storage takes its place
    kind: Kind = Kind.CONSTANT
    factors: Tensor | None = None
    """(elements,), as the shifts and origins; None where all are 0."""
    shifts: Tensor | None = None
    origins: Tensor | None = None
    is_product: bool = False
    """Whether an image's values were multiplied by learned ones to make it."""
    is_shifted: bool = False
    """Whether learned values were added to an image's to make it."""
    is_repeated: bool = False
    """Whether an image's values are in it several times."""
    combines_stored: bool = False
    """Whether each of an image's values was combined with several stored ones to make it."""
    stored_sum: Exception | None = None
    """Where it is the sum of an image's values and stored ones: the error that refuses it."""
    readers: int = 0
    """Operations that have read it."""
    parents: list[Provenance] = field(default_factory=list)
    """What it was made of, as far as that depends on the image."""

    def is_made_of_product(self) -> bool:
        """Return whether it is a product, or was made of one that nothing else has read."""
        return any(made_of.is_product for made_of in self.ancestry(lambda made_of: made_of.readers <= 1))

    def mark_squared(self) -> None:
        """Note that it was multiplied by itself: learned values that were added are now multiplied by the image's."""
        for made_of in self.ancestry(lambda _: True):
            made_of.is_product |= made_of.is_shifted

    def ancestry(self, through: Callable[[Provenance], bool]) -> Iterator[Provenance]:
        """Yield it and what it was made of, along those for which ``through`` is true."""
        seen, waiting = set(), [self]
        while waiting:
            one = waiting.pop()
            if id(one) not in seen and through(one):
                seen.add(id(one))
                yield one
                waiting += one.parents


class ValueTracker:
    """The provenance of every tensor, by its storage.

    >>> tracker, weight = ValueTracker(), torch.ones(2)
    >>> tracker.provenance(weight).kind = Kind.LEARNED
    >>> tracker.kind(weight[1:]).name, tracker.kind(torch.ones(2)).name
    ('LEARNED', 'CONSTANT')
    """

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self._provenances: dict[int, Provenance] = {}
        self._tensor_numbers = itertools.count(1)

    def provenance(self, t: Tensor, new: bool = False) -> Provenance:
        """Return what is known of the tensor's storage; with ``new``, nothing yet."""
        storage = values_of(t).untyped_storage()
        if new or storage._cdata not in self._provenances:
            self._provenances[storage._cdata] = Provenance(storage)
        return self._provenances[storage._cdata]

    def kind(self, t: Tensor) -> Kind:
        """Return what the tensor's values depend on."""
        return self.provenance(t).kind

    def read(self, t: Tensor, which: str) -> Tensor | None:
        """Return the ``factors``, ``shifts`` or ``origins`` of a tensor in its shape, None where all are 0.

        Learned values without a factor get one each, all different.
        """
        known = self.provenance(t)
        elements = known.storage.nbytes() // t.element_size()
        if known.kind == Kind.LEARNED and known.factors is None and which == "factors":
            known.factors = self._numbers(torch.Size([elements]), t.device)
        whole = getattr(known, which)
        if whole is None:
            return None
        if len(whole) < elements:  # real and imaginary parts
            whole = whole.repeat_interleave(elements // len(whole))
        elif len(whole) > elements:  # complex values of what was real
            whole = whole[:: len(whole) // elements].contiguous()
        setattr(known, which, whole)
        return whole.as_strided(t.shape, t.stride(), t.storage_offset())

    def origin(self, t: Tensor) -> Tensor | None:
        """Return the origins of a tensor in its shape; where none are known, its own values become origins."""
        known = self.provenance(t)
        if known.origins is None:
            elements = known.storage.nbytes() // t.element_size()
            known.origins = next(self._tensor_numbers) + self._numbers(torch.Size([elements]), t.device) / 4
        return self.read(t, "origins")

    def write(self, t: Tensor, which: str, values: Tensor | None) -> None:
        """Set the ``factors``, ``shifts`` or ``origins`` of a tensor; None for 0."""
        known = self.provenance(t)
        if getattr(known, which) is None:
            if values is None:
                return
            elements = known.storage.nbytes() // t.element_size()
            setattr(known, which, torch.zeros(elements, dtype=torch.float64, device=t.device))
        own: Any = self.read(t, which)
        own.copy_(own.new_zeros(()) if values is None else values)

    def _numbers(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Draw numbers between 1 and 2, no two the same."""
        return (1 + torch.rand(shape, generator=self.generator, dtype=torch.float64)).to(device)


def joined(several: Iterable[Tensor | None]) -> Tensor | None:
    """Return a number for each combination of numbers: the same for the same ones, 0 where all are 0 or None.

    >>> joined([torch.tensor([0.0, 1.5]), None, torch.tensor([1.25, 0.0])]).tolist(), joined([None])
    ([1.25, 1.5], None)
    """
    together: Tensor | None = None
    for one in several:
        if together is None or one is None:
            together = one if together is None else together
            continue
        both = (together != 0) & (one != 0)
        together = torch.where(both, 0.382 * together + 0.618 * one, together + one)
    return together


def is_number(t: Tensor) -> bool:
    """Return whether a tensor holds real or complex numbers, rather than indices or truth values.

    >>> is_number(torch.ones(1)), is_number(torch.tensor([1]))
    (True, False)
    """
    return t.is_floating_point() or t.is_complex()


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts.

    >>> [tensor.item() for tensor in tensors_of(({"a": torch.tensor(1)}, 2))]
    [1]
    """
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def values_of(t: Tensor) -> Any:
    """Return the tensor itself, or the tensor of a sparse one's values; None for other layouts.

    >>> values_of(torch.tensor([0.0, 2.0]).to_sparse()).tolist()
    [2.0]
    """
    if t.layout is torch.strided:
        return t
    if t.layout is torch.sparse_coo:
        return t._values()
    compressed = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    return t.values() if t.layout in compressed else None


def expanded(values: Tensor | None, like: Tensor) -> Tensor | None:
    """Return ``values`` expanded to the shape of ``like``; None for None.

    >>> expanded(torch.tensor(2.0), torch.ones(2)).tolist()
    [2.0, 2.0]
    """
    return None if values is None else values.expand(like.shape)


def repeated_dimensions(t: Tensor, shape: torch.Size) -> int:
    """Return along how many dimensions of ``shape`` the values of ``t`` are repeated by broadcasting.

    >>> repeated_dimensions(torch.ones(3, 1), torch.Size([3, 4])), repeated_dimensions(torch.ones(4), torch.Size([4]))
    (1, 0)
    """
    sizes, strides = [1] * (len(shape) - t.ndim) + list(t.shape), [0] * (len(shape) - t.ndim) + list(t.stride())
    return sum(
        wanted > 1 and (size == 1 or stride == 0) for wanted, size, stride in zip(shape, sizes, strides, strict=True)
    )
