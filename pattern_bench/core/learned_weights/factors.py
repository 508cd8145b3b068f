"""Work out the factors and shifts of an operation's results from those of its operands (``tracking.py``).

In the examples, ``image`` depends on the image and ``weight`` is learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pattern_bench.core.learned_weights.operations import ADDED, ADDING, CHOOSING, base_name, squares
from pattern_bench.core.learned_weights.tracking import (
    Kind,
    ValueTracker,
    expanded,
    is_number,
    joined,
    repeated_dimensions,
    tensors_of,
)
from pattern_bench.core.learned_weights.trials import combine, is_elementwise, results_on


@dataclass(frozen=True)
class Call:
    """An operation, what it was called with, and what it returned.

    >>> tracker, image, weight = ValueTracker(), torch.ones(2), torch.ones(2)
    >>> tracker.provenance(image).kind, tracker.provenance(weight).kind = Kind.IMAGE, Kind.LEARNED
    >>> call = Call.of(tracker, torch.ops.aten.mul.Tensor, (image, weight), {}, [image * weight])
    >>> call.name, call.pointwise, call.kind.name, call.image[0] is image, call.learned[0] is weight
    ('mul', True, 'IMAGE', True, True)
    """

    func: Any
    args: Any
    kwargs: Any
    results: list[Tensor]
    operands: list[Tensor]
    image: list[Tensor]
    """The operands that depend on the image."""
    learned: list[Tensor]
    """The operands that are learned."""
    kind: Kind
    """That of the results."""

    @classmethod
    def of(cls, tracker: ValueTracker, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> Call:
        """Return the call with its operands sorted by their kinds."""
        operands = tensors_of((args, kwargs))
        kinds = [tracker.kind(t) for t in operands]
        chosen = base_name(func) in CHOOSING and kinds[0] == Kind.LEARNED
        image, learned = (
            [t for t, kind in zip(operands, kinds, strict=True) if kind == wanted]
            for wanted in (Kind.IMAGE, Kind.LEARNED)
        )
        kind = Kind.LEARNED if chosen else max(kinds)
        return cls(func, args, kwargs, results, operands, image, learned, kind)

    @property
    def name(self) -> str:
        """The operation's name, as the tables of ``operations.py`` have it."""
        return base_name(self.func)

    @property
    def image_numbers(self) -> list[Tensor]:
        """The operands that depend on the image and are no indices or truth values."""
        return [t for t in self.image if is_number(t)]

    @property
    def pointwise(self) -> bool:
        """Whether torch counts it among its elementwise operations."""
        return torch.Tag.pointwise in self.func.tags


class Marks(NamedTuple):
    """Factors and shifts of a result in its shape, None for 0; and whether it is a product of image values and learned
    ones.

    >>> Marks().is_product
    False
    """

    factors: Tensor | None = None
    shifts: Tensor | None = None
    is_product: bool = False


def elementwise(tracker: ValueTracker, call: Call, result: Tensor) -> Marks:
    """Return the marks of an elementwise operation's result.

    >>> tracker, image, weight = ValueTracker(), torch.ones(2), torch.ones(2)
    >>> tracker.provenance(image).kind, tracker.provenance(weight).kind = Kind.IMAGE, Kind.LEARNED
    >>> call = Call.of(tracker, torch.ops.aten.mul.Tensor, (image, weight), {}, [image * weight])
    >>> marks = elementwise(tracker, call, call.results[0])
    >>> marks.is_product, torch.equal(marks.factors, tracker.read(weight, "factors"))
    (True, True)
    """
    factors = joined(numbers_of(tracker, call.image, "factors"))
    shifts = joined(numbers_of(tracker, call.image, "shifts"))
    is_product = False
    if call.learned:
        given = joined(numbers_of(tracker, call.learned, "factors"))
        # Compared with several learned values each: a distance to prototypes, once it is summed.
        repeated = any(repeated_dimensions(t, result.shape) > 0 for t in call.image_numbers)
        is_product = call.name not in ADDING or repeated
        if is_product:
            factors = joined([factors, given])
        else:
            shifts = joined([shifts, given])
    elif shifts is not None and squares(call.name, call.args):
        factors, shifts = joined([factors, shifts]), None
        for t in call.image:
            tracker.provenance(t).mark_squared()
    return Marks(expanded(factors, result), expanded(shifts, result), is_product)


def normalised(tracker: ValueTracker, call: Call) -> Marks:
    """Return the marks of the result of a norm or softmax: the factors of its input, joined with those of its weight.

    >>> tracker, image, weight = ValueTracker(), torch.ones(1, 2), torch.ones(2)
    >>> tracker.provenance(image).kind, tracker.provenance(weight).kind = Kind.IMAGE, Kind.LEARNED
    >>> args = (image, [2], weight, None, 1e-5)
    >>> call = Call.of(tracker, torch.ops.aten.native_layer_norm.default, args, {}, [image.clone()])
    >>> torch.equal(normalised(tracker, call).factors[0], tracker.read(weight, "factors"))
    True
    """
    names = (argument.name for argument in call.func._schema.arguments)
    weight = (dict(zip(names, call.args, strict=False)) | call.kwargs).get("weight")
    x, result = call.args[0], call.results[0]
    before = tracker.read(x, "factors") if x.shape == result.shape and "softmax" not in call.name else None
    if not isinstance(weight, Tensor) or tracker.kind(weight) != Kind.LEARNED:
        return Marks(before)
    own = tracker.read(weight, "factors")
    if own is not None and ("batch" in call.name or "group" in call.name):  # others' are of the last dimensions
        own = own.view(1, -1, *[1] * (result.ndim - 2))
    return Marks(expanded(joined([before, own]), result), None, True)


def factors_of_learned(tracker: ValueTracker, call: Call) -> list[Tensor | None]:
    """Return the factors of learned values that were made of others: what the operation makes of theirs.

    >>> tracker, weight = ValueTracker(), torch.ones(2)
    >>> tracker.provenance(weight).kind = Kind.LEARNED
    >>> call = Call.of(tracker, torch.ops.aten.neg.default, (weight,), {}, [-weight])
    >>> torch.equal(factors_of_learned(tracker, call)[0], -tracker.read(weight, "factors"))
    True
    """

    def factors(t: Tensor) -> Tensor | None:
        if not t.is_floating_point():
            return None
        return tracker.read(t, "factors") if tracker.kind(t) == Kind.LEARNED else t.double()

    made = results_on(call.func, call.args, call.kwargs, factors)
    if [t.shape for t in made] != [t.shape for t in call.results]:
        return [None] * len(call.results)
    if not all(f.is_floating_point() and f.isfinite().all() for f in made):
        return [None] * len(call.results)
    return list(made)


def moved(tracker: ValueTracker, call: Call) -> list[Tensor | None]:
    """Return the factors of the results of an operation that moves values: what it makes of theirs.

    >>> tracker, image = ValueTracker(), torch.ones(2)
    >>> tracker.provenance(image).kind = Kind.IMAGE
    >>> tracker.write(image, "factors", torch.tensor([1.25, 1.5]))
    >>> call = Call.of(tracker, torch.ops.aten.cat.default, ([image, torch.ones(1)],), {}, [torch.ones(3)])
    >>> moved(tracker, call)[0].tolist()
    [1.25, 1.5, 0.0]
    """

    def factors(t: Tensor) -> Tensor | None:
        if not t.is_floating_point():
            return None
        known = tracker.read(t, "factors") if tracker.kind(t) == Kind.IMAGE else None
        return torch.zeros(t.shape, dtype=torch.float64, device=t.device) if known is None else known.clone()

    made = results_on(call.func, call.args, call.kwargs, factors)
    return made if len(made) == len(call.results) else [None] * len(call.results)


def combined(tracker: ValueTracker, call: Call, t: Tensor, which: str) -> tuple[list[Tensor | None], bool]:
    """Return the ``factors`` (or ``shifts``, as ``which`` says) of an operation's results, and whether it sums over
    values of its operand ``t`` with different ones.

    >>> tracker, image = ValueTracker(), torch.ones(2)
    >>> tracker.provenance(image).kind = Kind.IMAGE
    >>> call = Call.of(tracker, torch.ops.aten.sum.default, (image,), {}, [image.sum()])
    >>> tracker.write(image, "factors", torch.tensor([1.5, 1.5]))
    >>> combined(tracker, call, image, "factors")
    ([tensor(1.5000, dtype=torch.float64)], False)
    >>> tracker.write(image, "factors", torch.tensor([1.25, 1.5]))
    >>> combined(tracker, call, image, "factors")
    ([None], True)
    """
    c = tracker.read(t, which)
    if c is None or not c.any():
        return [None] * len(call.results), False

    def run(power: Tensor) -> list[Any]:
        def instead(x: Tensor) -> Tensor | None:
            if x is t:
                return power.to(torch.complex128) if t.is_complex() else power
            if not x.is_floating_point():
                return None
            learned = tracker.kind(x) == Kind.LEARNED
            return torch.zeros_like(x, dtype=torch.float64) if learned else x.double()

        return results_on(call.func, call.args, call.kwargs, instead)

    if is_elementwise(run, c):
        return [c], False
    return combine(run, c, call.results, tracker.generator)


def is_summed(tracker: ValueTracker, call: Call, kind: Kind) -> bool:
    """Return whether an operation that sums takes values of this kind as more than something to add to the sum.

    >>> tracker, image, bias = ValueTracker(), torch.ones(1, 2), torch.ones(3)
    >>> tracker.provenance(bias).kind = Kind.LEARNED
    >>> args = (image, torch.ones(3, 2), bias)
    >>> is_summed(tracker, Call.of(tracker, torch.ops.aten.linear.default, args, {}, []), Kind.LEARNED)
    False
    """
    names = [argument.name for argument in call.func._schema.arguments]
    arguments = [*zip(names, call.args, strict=False), *call.kwargs.items()]
    return any(
        name not in ADDED and any(tracker.kind(t) == kind for t in tensors_of(value)) for name, value in arguments
    )


def numbers_of(tracker: ValueTracker, tensors: list[Tensor], which: str) -> list[Tensor | None]:
    """Return the ``factors`` (or ``shifts``) of the tensors that are no indices or truth values.

    >>> numbers_of(ValueTracker(), [torch.ones(1), torch.tensor([1])], "factors")
    [None]
    """
    return [tracker.read(t, which) for t in tensors if is_number(t)]
