"""Watch a forward pass, and refuse networks in which learned weights outside of layers sum an image's values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pattern_bench.core.learned_weights.factors import (
    Call,
    Marks,
    combined,
    elementwise,
    factors_of_learned,
    is_summed,
    moved,
    normalised,
    numbers_of,
)
from pattern_bench.core.learned_weights.operations import (
    ACTIVATIONS,
    MOVING,
    NORMALISING,
    REARRANGING,
    SUMMING,
    full_name,
)
from pattern_bench.core.learned_weights.tracking import (
    Kind,
    Provenance,
    ValueTracker,
    expanded,
    is_number,
    joined,
    repeated_dimensions,
    tensors_of,
    values_of,
)
from pattern_bench.core.learned_weights.trials import results_on


class _StoredMarks(NamedTuple):
    """Notes on a result: whether it holds an image's values several times, whether each of these is combined with
    several stored ones, and the refusal where they are summed."""

    is_repeated: bool = False
    combines_stored: bool = False
    stored_sum: Exception | None = None


class LearnedWeights(TorchDispatchMode):
    """Watch a forward pass for learned weights that sum an image's values; a context manager.

    Args:
        network: whose parameters are learned.
        image: (B, C, spatial...).
        in_layer: returns whether a Conv or Linear layer is running: its weights are not looked at.
        refusal: returns the error for the operation that is running, given its name.

    Raises:
        Exception: the refusal, where an operation sums values times learned weights at once.

    >>> weight, image = nn.Parameter(torch.ones(2, 1)), torch.ones(1, 2)
    >>> network = nn.ParameterList([weight])
    >>> with torch.no_grad(), LearnedWeights(network, image, lambda: False, ValueError):
    ...     image @ weight
    Traceback (most recent call last):
    ValueError: mm
    """

    def __init__(
        self,
        network: nn.Module,
        image: Tensor,
        in_layer: Callable[[], bool],
        refusal: Callable[[str], Exception],
    ) -> None:
        super().__init__()
        self.in_layer, self.refusal = in_layer, refusal
        self.tracker = ValueTracker()
        self.sums: list[tuple[Provenance, Exception]] = []
        for module in network.modules():
            for t in (*module.buffers(recurse=False), *vars(module).values()):
                if isinstance(t, Tensor) and _looks_learned(t):
                    self.tracker.provenance(t).kind = Kind.STORED
        for parameter in network.parameters():
            self.tracker.provenance(parameter).kind = Kind.LEARNED
        self.tracker.provenance(image).kind = Kind.IMAGE

    def check(self, outputs: Iterable[Tensor]) -> None:
        """Refuse sums that only the whole forward pass shows to be neurons; call it afterwards, with its outputs.

        Raises:
            Exception: the refusal of a product that was summed and had no other use, or of a sum with stored values
                that no layer follows on the way to ``outputs``.
        """
        for summed, refusal in self.sums:
            if summed.is_made_of_product():
                raise refusal
        for t in outputs:
            for made_of in self.tracker.provenance(t).ancestry(lambda _: True):
                if made_of.stored_sum is not None:
                    raise made_of.stored_sum

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        output = func(*args, **kwargs)
        if not operands or any(values_of(t) is None for t in operands):
            return output
        if any(t.layout is not torch.strided for t in (*operands, *tensors_of(output))):
            self._follow_sparse(func, operands, output)
            return output
        results = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.layout is torch.strided]
        changes = func._schema.is_mutable
        own = {t.untyped_storage()._cdata for t in operands}
        if not changes:
            results = [t for t in results if t.untyped_storage()._cdata not in own]  # others are views
        if not results:
            return output
        self._follow(Call.of(self.tracker, func, args, kwargs, results), changes, own)
        return output

    def _follow(self, call: Call, changes: bool, own: set[int]) -> None:
        """Note what the results of a call were made of.

        Args:
            call: an operation with results in memory of their own, unless it ``changes`` an operand.
            changes: whether it does.
            own: the storages of its operands.
        """
        changed = {t.untyped_storage()._cdata for t in call.results} & own
        read = {id(p): p for t in call.operands if (p := self.tracker.provenance(t)).storage._cdata not in changed}
        for provenance in read.values():
            provenance.readers += 1
        if self.in_layer():
            for t in call.results:
                self.tracker.provenance(t, new=not changes).kind = call.kind
            return
        marks = self._marks(call)
        origins = self._origins(call, marks)
        stored = self._stored_marks(call)
        for t, (factors, shifts, is_product) in zip(call.results, marks, strict=True):
            provenance = self.tracker.provenance(t, new=not changes)
            provenance.is_repeated |= stored.is_repeated
            provenance.combines_stored |= stored.combines_stored
            provenance.stored_sum = provenance.stored_sum or stored.stored_sum
            provenance.kind = max(provenance.kind, call.kind)
            self.tracker.write(t, "factors", factors)
            self.tracker.write(t, "shifts", shifts)
            self.tracker.write(t, "origins", origins)
            if changes:
                provenance.readers = 0
            provenance.is_product |= is_product
            learned = any(self.tracker.kind(operand) == Kind.LEARNED for operand in call.operands)
            provenance.is_shifted |= shifts is not None and learned
            provenance.parents += [p for p in read.values() if p is not provenance and p.kind == Kind.IMAGE]

    def _follow_sparse(self, func: Any, operands: list[Tensor], output: Any) -> None:
        """Note kinds alone. An operation on sparse tensors sums, or is elementwise."""
        kinds = {self.tracker.kind(t) for t in operands}
        summing = torch.Tag.pointwise not in func.tags and not self.in_layer()
        if {Kind.LEARNED, Kind.IMAGE} <= kinds and summing:
            raise self.refusal(full_name(func))
        with_stored = {Kind.STORED, Kind.IMAGE} <= kinds and summing
        for t in tensors_of(output):
            if values_of(t) is not None:
                provenance = self.tracker.provenance(t)
                provenance.kind = max(kinds)
                provenance.stored_sum = self.refusal(full_name(func)) if with_stored else None

    # --- factors and shifts ---

    def _marks(self, call: Call) -> list[Marks]:
        """Return the marks of each result.

        Raises:
            Exception: the refusal, where the operation sums values times learned ones.
        """
        nothing = [Marks() for _ in call.results]
        if call.kind in (Kind.CONSTANT, Kind.STORED):
            return nothing
        if call.kind == Kind.LEARNED:
            return [Marks(factors) for factors in factors_of_learned(self.tracker, call)]
        if call.pointwise:
            return [elementwise(self.tracker, call, t) for t in call.results]
        if call.name in ACTIVATIONS:
            return [Marks(self.tracker.read(call.args[0], "factors"))]
        if call.name in NORMALISING:
            return [normalised(self.tracker, call), *nothing[1:]]
        if call.name in MOVING:
            return [Marks(factors) for factors in moved(self.tracker, call)]
        if call.learned and is_summed(self.tracker, call, Kind.LEARNED):
            raise self.refusal(call.name)
        if len(call.image_numbers) != 1:
            return nothing  # of two tensors that depend on the image, as in attention
        (t,) = call.image_numbers
        factors, varies = combined(self.tracker, call, t, "factors")
        if varies:
            self.sums.append((self.tracker.provenance(t), self.refusal(call.name)))
        if call.name == "linalg_vector_norm" and combined(self.tracker, call, t, "shifts")[1]:
            self.tracker.provenance(t).mark_squared()
            self.sums.append((self.tracker.provenance(t), self.refusal(call.name)))
        return [Marks(f) for f in factors]

    # --- origins ---

    def _origins(self, call: Call, marks: list[Marks]) -> Tensor | None:
        """Return the origins of an operation's result, None where it is not made of single values.

        Raises:
            Exception: the refusal, where it adds several values of a tensor times different learned ones.
        """
        image = call.image_numbers
        if not image or len(call.results) != 1 or call.kind != Kind.IMAGE:
            return None
        result = call.results[0]
        if call.name in REARRANGING and len(image) == 1:
            elsewhere = results_on(
                call.func, call.args, call.kwargs, lambda t: self.tracker.origin(t) if t is image[0] else None
            )
            return elsewhere[0] if len(elsewhere) == 1 and elsewhere[0].shape == result.shape else None
        if call.name == "copy":
            return expanded(self.tracker.read(call.args[1], "origins"), result)
        if not call.pointwise:
            return None
        if len(image) > 1 and call.name in SUMMING:
            self._refuse_terms(call)
        for t in image:
            provenance = self.tracker.provenance(t)
            part = t.numel() < provenance.storage.nbytes() // t.element_size()
            if provenance.origins is not None or marks[0].is_product or part:
                return expanded(self.tracker.origin(t), result)
        return None

    def _refuse_terms(self, call: Call) -> None:
        """Refuse a sum of two terms that are values of one tensor times different learned ones."""
        operands, result = call.operands, call.results[0]
        groups = [[t] for t in operands]
        if call.name in ("addcmul", "addcdiv") and len(operands) == 3:
            groups = [operands[:1], operands[1:]]
        elif call.name == "lerp" and len(operands) == 3:
            groups = [[operands[0], operands[2]], [operands[1], operands[2]]]
        terms: list[tuple[Tensor, Tensor]] = []
        for group in groups:
            image = [t for t in group if self.tracker.kind(t) == Kind.IMAGE and is_number(t)]
            if len(image) != 1:
                continue
            learned = [t for t in group if self.tracker.kind(t) == Kind.LEARNED]
            factors = joined(numbers_of(self.tracker, [*image, *learned], "factors"))
            if factors is None or (self.tracker.provenance(image[0]).origins is None and not learned):
                continue
            # The weights of lerp are w and 1 - w.
            factors = factors * (1 + len(terms)) if call.name == "lerp" else factors
            origin: Any = self.tracker.origin(image[0])
            terms.append((factors.expand(result.shape), origin.expand(result.shape)))
        for (f, o), (g, p) in itertools.combinations(terms, 2):
            of_one_tensor = (o.floor() == p.floor()) & (o != p)
            if bool((of_one_tensor & (f != 0) & (g != 0) & (f != g)).any()):
                raise self.refusal(call.name)

    # --- stored values ---

    def _stored_marks(self, call: Call) -> _StoredMarks:
        image, name = call.image_numbers, call.name
        if call.kind != Kind.IMAGE or not image or name in NORMALISING:
            return _StoredMarks()
        known = [self.tracker.provenance(t) for t in image]
        stored = any(self.tracker.kind(t) == Kind.STORED for t in call.operands)
        combines = any(one.combines_stored for one in known)
        if call.pointwise:
            repeated = all(
                repeated_dimensions(t, call.results[0].shape) > 0 or one.is_repeated
                for t, one in zip(image, known, strict=True)
            )
            added = name in SUMMING and sum(one.combines_stored for one in known) > 1
            return _StoredMarks(repeated, combines or (stored and repeated), self.refusal(name) if added else None)
        if name in MOVING or name in REARRANGING:
            return _StoredMarks(any(one.is_repeated for one in known), combines)
        sums = combines or (stored and is_summed(self.tracker, call, Kind.STORED))
        return _StoredMarks(stored_sum=self.refusal(name) if sums else None)


def _looks_learned(t: Tensor) -> bool:
    """Return whether a stored tensor may be weights: most of its values differ, and they are not sorted."""
    values = t.detach().flatten()
    if t.layout is not torch.strided or not is_number(t) or t.ndim < 2 or t.is_complex():
        return False
    return bool(2 * len(values.unique()) > len(values)) and not bool((values.diff() >= 0).all())
