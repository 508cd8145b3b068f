"""Learned weights outside of Conv and Linear layers: which of them sum inputs, so that there are neurons in them.

Everything that torch computes in a forward pass is watched, whatever Python or C++ it comes from. What a tensor holds
is one of four kinds: what depends on the image, what depends on parameters alone (learned), what depends on tensors
that the network stores beside them (buffers, attributes), and constants. An operation on an image's values and learned
ones is

- elementwise, and so no neuron by itself: layer scale, the affine part of a norm, position embeddings;
- something that moves values, such as a concatenation with class tokens;
- or anything else (a product of matrices, a convolution, a distance, an operation of another library): refused.

An elementwise product becomes a neuron once it is summed. So each value remembers which learned values it was
multiplied by, as a number, its factor: next to every storage lies another of its size. A sum over values with
different factors is refused where it is the only reader of the product; where the product goes on, the sum is a
statistic of it, as the mean in a norm that is written out. Whether an operation sums over different factors, or chooses
among them, is found by letting it run on them. A sum may also be one of tensors, in a loop: so products remember which
value of which tensor they were made of, their origin.

Stored tensors may be prototypes, or a window, a cosine transform, a blur. Where they are summed with and no layer
follows, the network's outputs are theirs: refused. Otherwise they are fixed steps between layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CONSTANT, STORED, LEARNED, IMAGE = range(4)

_ADDING = (
    "add", "sub", "rsub", "where", "masked_fill", "maximum", "minimum", "fmax", "fmin", "clamp", "clamp_min",
    "clamp_max", "copysign",
)  # fmt: skip
"""Elementwise operations of two operands, by name, that do not multiply them."""
_MOVING = (
    "cat", "stack", "copy", "index_put", "_index_put_impl", "slice_scatter", "select_scatter", "scatter", "index_copy",
    "index_fill", "masked_scatter",
)  # fmt: skip
"""Operations that put the values of several tensors into one."""
_REARRANGING = ("roll", "flip", "constant_pad_nd", "clone", "index", "index_select", "gather", "repeat")
"""Operations that put one tensor's values in other places."""
_CHOOSING = ("index", "index_select", "gather", "take", "embedding", "masked_select")
"""Operations that take some of a tensor's values, by an index that may depend on the image."""
_NORMALISING = (
    "native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm",
    "_fused_rms_norm", "_softmax", "_log_softmax",
)  # fmt: skip
"""Operations that sum in order to normalise; with an elementwise affine part at most."""
_SUMMING = (
    "add", "sub", "rsub", "addcmul", "addcdiv", "lerp", "maximum", "minimum", "fmax", "fmin", "logaddexp", "logaddexp2",
    "hypot",
)  # fmt: skip
"""Elementwise operations that add their operands, or choose the larger."""
_ACTIVATIONS = ("prelu", "_prelu_kernel")
"""Activations with learned slopes, which torch does not count among its elementwise operations."""
_ADDED = ("bias", "attn_mask", "attn_bias")
"""Arguments, by name, of operations that sum: they are added to the sum."""


@dataclass
class _Memory:
    """What is known of a storage. ``factors`` and ``shifts`` (elements,) hold, for every element, a number for the
    learned values that it was multiplied by, or that were added to it; 0 for none. ``origins`` (elements,) hold the
    number of a tensor and, behind the point, that of one of its values."""

    storage: Any  # kept, so that no other storage takes its place
    kind: int = CONSTANT
    factors: Tensor | None = None
    shifts: Tensor | None = None
    origins: Tensor | None = None
    product: bool = False
    """Whether an image's values were multiplied by learned ones to make it."""
    shifted: bool = False
    """Whether learned values were added to an image's to make it."""
    repeated: bool = False
    """Whether an image's values are in it several times."""
    meets_stored: bool = False
    """Whether each of an image's values met several stored ones to make it."""
    stored_sum: Exception | None = None
    """The refusal of the sum of an image's values and stored ones that it is."""
    readers: int = 0
    parents: list[_Memory] = field(default_factory=list)

    def is_summed_product(self) -> bool:
        """Whether it is, or was made of, a product that nothing else has read than what leads to the reader at hand."""
        return any(memory.product for memory in self.sources(lambda memory: memory.readers <= 1))

    def squared(self) -> None:
        """Takes note that it was multiplied by itself: learned values that were added are multiplied by the image's."""
        for memory in self.sources(lambda _: True):
            memory.product |= memory.shifted

    def sources(self, through: Callable[[_Memory], bool]) -> Iterator[_Memory]:
        """It and what it was made of, along those that ``through`` lets pass."""
        seen, memories = set(), [self]
        while memories:
            memory = memories.pop()
            if id(memory) not in seen and through(memory):
                seen.add(id(memory))
                yield memory
                memories += memory.parents


class LearnedWeights(TorchDispatchMode):
    """Within, watches a forward pass for learned weights that sum an image's values.

    Args:
        network: whose parameters are learned.
        image: (B, C, spatial...).
        in_layer: tells whether a Conv or Linear layer is running: its weights are no others'.
        refusal: the error for what is computed at the moment.

    Raises:
        Exception: the refusal, where an operation sums values times learned weights at once.
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
        self.generator = torch.Generator().manual_seed(0)
        self.memories: dict[int, _Memory] = {}
        self.sums: list[tuple[_Memory, Exception]] = []
        self.origins = itertools.count(1)
        for module in network.modules():
            for t in (*module.buffers(recurse=False), *vars(module).values()):
                if isinstance(t, Tensor) and _looks_learned(t):
                    self.memory(t).kind = STORED
        for parameter in network.parameters():
            self.memory(parameter).kind = LEARNED
        self.memory(image).kind = IMAGE

    def check(self, outputs: Iterable[Tensor]) -> None:
        """Raises the refusal of a product that was summed and had no other use, and that of a sum with stored values
        that no layer follows on the way to ``outputs``; after the forward pass."""
        for memory, refusal in self.sums:
            if memory.is_summed_product():
                raise refusal
        for t in outputs:
            for memory in self.memory(t).sources(lambda _: True):
                if memory.stored_sum is not None:
                    raise memory.stored_sum

    # --- what lies next to the tensors ---

    def memory(self, t: Tensor, new: bool = False) -> _Memory:
        storage = _values(t).untyped_storage()
        if new or storage._cdata not in self.memories:
            self.memories[storage._cdata] = _Memory(storage)
        return self.memories[storage._cdata]

    def kind(self, t: Tensor) -> int:
        return self.memory(t).kind

    def read(self, t: Tensor, which: str) -> Tensor | None:
        """The factors, shifts or origins of a tensor, in its shape; a learned value that no factor is known for is one
        by itself."""
        memory = self.memory(t)
        elements = memory.storage.nbytes() // t.element_size()
        if memory.kind == LEARNED and memory.factors is None and which == "factors":
            memory.factors = self.numbers(torch.Size([elements]), t.device)
        whole = getattr(memory, which)
        if whole is None:
            return None
        if len(whole) < elements:  # real and imaginary parts
            whole = whole.repeat_interleave(elements // len(whole))
        elif len(whole) > elements:  # complex values of what was real
            whole = whole[:: len(whole) // elements].contiguous()
        setattr(memory, which, whole)
        return whole.as_strided(t.shape, t.stride(), t.storage_offset())

    def origin(self, t: Tensor) -> Tensor | None:
        """The origins of a tensor, in its shape; its own where none are known."""
        memory = self.memory(t)
        if memory.origins is None:
            elements = memory.storage.nbytes() // t.element_size()
            memory.origins = next(self.origins) + self.numbers(torch.Size([elements]), t.device) / 4
        return self.read(t, "origins")

    def write(self, t: Tensor, which: str, values: Tensor | None) -> None:
        memory = self.memory(t)
        if getattr(memory, which) is None:
            if values is None:
                return
            elements = memory.storage.nbytes() // t.element_size()
            setattr(memory, which, torch.zeros(elements, dtype=torch.float64, device=t.device))
        own: Any = self.read(t, which)
        own.copy_(own.new_zeros(()) if values is None else values)

    def numbers(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Numbers between 1 and 2, no two the same."""
        return (1 + torch.rand(shape, generator=self.generator, dtype=torch.float64)).to(device)

    # --- what operations do ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        output = func(*args, **kwargs)
        if not operands or any(_values(t) is None for t in operands):
            return output
        if any(t.layout is not torch.strided for t in (*operands, *_all_tensors(output))):
            self._follow_sparse(func, operands, output)
            return output
        results = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.layout is torch.strided]
        changes = func._schema.is_mutable
        own = {t.untyped_storage()._cdata for t in operands}
        if not changes:
            results = [t for t in results if t.untyped_storage()._cdata not in own]  # others are views
        if not results:
            return output
        name = func._schema.name.partition("::")[2].removesuffix("_")
        chosen = name in _CHOOSING and self.kind(operands[0]) == LEARNED
        kind = LEARNED if chosen else max(map(self.kind, operands))
        changed = {t.untyped_storage()._cdata for t in results} & own
        read = {id(m): m for t in operands if (m := self.memory(t)).storage._cdata not in changed}
        for memory in read.values():
            memory.readers += 1
        if self.in_layer():
            for t in results:
                self.memory(t, new=not changes).kind = kind
            return output
        found = self._follow(name, func, args, kwargs, operands, results, kind)
        origins = self._origins(name, func, args, kwargs, operands, results, kind, found)
        repeated, meets_stored, stored_sum = self._met_stored(name, func, args, kwargs, operands, results, kind)
        for t, (factors, shifts, product) in zip(results, found, strict=True):
            memory = self.memory(t, new=not changes)
            memory.repeated |= repeated
            memory.meets_stored |= meets_stored
            memory.stored_sum = memory.stored_sum or stored_sum
            memory.kind = max(memory.kind, kind)
            self.write(t, "factors", factors)
            self.write(t, "shifts", shifts)
            self.write(t, "origins", origins)
            if changes:
                memory.readers = 0
            memory.product |= product
            memory.shifted |= shifts is not None and any(self.kind(operand) == LEARNED for operand in operands)
            memory.parents += [m for m in read.values() if m is not memory and m.kind == IMAGE]
        return output

    def _follow(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: Any,
        operands: list[Tensor],
        results: list[Tensor],
        kind: int,
    ) -> list[tuple[Tensor | None, Tensor | None, bool]]:
        """Factors, shifts, and whether it is a product, of each result."""
        learned = [t for t in operands if self.kind(t) == LEARNED]
        image = [t for t in operands if self.kind(t) == IMAGE]
        nothing: list[tuple[Tensor | None, Tensor | None, bool]] = [(None, None, False) for _ in results]
        if kind in (CONSTANT, STORED):
            return nothing
        if kind == LEARNED:
            return [(f, None, False) for f in self._shadows(func, args, kwargs, results)]
        if torch.Tag.pointwise in func.tags:
            return [self._elementwise(name, args, operands, t) for t in results]
        if name in _ACTIVATIONS:
            return [(self.read(args[0], "factors"), None, False)]
        if name in _NORMALISING:
            return [self._normalised(name, func, args, kwargs, results[0]), *nothing[1:]]
        if name in _MOVING:
            return [(f, None, False) for f in self._moved(func, args, kwargs, results)]
        if learned and any(self._summed(func, args, kwargs)):
            raise self.refusal(name)
        if len([t for t in image if _is_number(t)]) != 1:
            return nothing  # of two tensors that depend on the image, as in attention
        t = next(t for t in image if _is_number(t))
        factors, varies = self._run_on(func, args, kwargs, t, "factors", results)
        if varies:
            self.sums.append((self.memory(t), self.refusal(name)))
        if name == "linalg_vector_norm" and self._run_on(func, args, kwargs, t, "shifts", results)[1]:
            self.memory(t).squared()
            self.sums.append((self.memory(t), self.refusal(name)))
        return [(f, None, False) for f in factors]

    def _follow_sparse(self, func: Any, operands: list[Tensor], output: Any) -> None:
        """Takes note of kinds alone. An operation on sparse tensors sums, or is elementwise."""
        kinds = {self.kind(t) for t in operands}
        if {LEARNED, IMAGE} <= kinds and torch.Tag.pointwise not in func.tags and not self.in_layer():
            raise self.refusal(func._schema.name.partition("::")[2])
        sums = {STORED, IMAGE} <= kinds and torch.Tag.pointwise not in func.tags and not self.in_layer()
        for t in _all_tensors(output):
            if _values(t) is not None:
                self.memory(t).kind = max(kinds)
                self.memory(t).stored_sum = self.refusal(func._schema.name.partition("::")[2]) if sums else None

    def _origins(
        self, name: str, func: Any, args: Any, kwargs: Any, operands: list[Tensor], results: list[Tensor], kind: int,
        found: list[tuple[Tensor | None, Tensor | None, bool]],
    ) -> Tensor | None:  # fmt: skip
        """The origins of an operation's result; nothing where it is of no value's own.

        Raises:
            Exception: the refusal, where it adds several values of a tensor times different learned ones.
        """
        image = [t for t in operands if self.kind(t) == IMAGE and _is_number(t)]
        if not image or len(results) != 1 or kind != IMAGE:
            return None
        result = results[0]
        if name in _REARRANGING and len(image) == 1:
            moved = self._run(func, args, kwargs, lambda t: self.origin(t) if t is image[0] else None)
            return moved[0] if len(moved) == 1 and moved[0].shape == result.shape else None
        if name == "copy":
            return _expanded(self.read(args[1], "origins"), result)
        if torch.Tag.pointwise not in func.tags:
            return None
        if len(image) > 1 and name in _SUMMING:
            self._refuse_terms(name, args, operands, result)
        product = found[0][2]
        for t in image:
            part = t.numel() < self.memory(t).storage.nbytes() // t.element_size()
            if self.memory(t).origins is not None or product or part:
                return _expanded(self.origin(t), result)
        return None

    def _refuse_terms(self, name: str, args: Any, operands: list[Tensor], result: Tensor) -> None:
        """Refuses a sum of two terms that are values of one tensor times different learned ones."""
        groups = [[t] for t in operands]
        if name in ("addcmul", "addcdiv") and len(operands) == 3:
            groups = [operands[:1], operands[1:]]
        elif name == "lerp" and len(operands) == 3:
            groups = [[operands[0], operands[2]], [operands[1], operands[2]]]
        terms: list[tuple[Tensor, Tensor]] = []
        for group in groups:
            image = [t for t in group if self.kind(t) == IMAGE and _is_number(t)]
            if len(image) != 1:
                continue
            learned = [t for t in group if self.kind(t) == LEARNED]
            factors = _joined(self._all([*image, *learned], "factors"))
            if factors is None or (self.memory(image[0]).origins is None and not learned):
                continue
            # The weights of lerp are w and 1 - w.
            factors = factors * (1 + len(terms)) if name == "lerp" else factors
            origin: Any = self.origin(image[0])
            terms.append((factors.expand(result.shape), origin.expand(result.shape)))
        for (f, o), (g, p) in itertools.combinations(terms, 2):
            of_one = (o.floor() == p.floor()) & (o != p)
            if bool((of_one & (f != 0) & (g != 0) & (f != g)).any()):
                raise self.refusal(name)

    def _met_stored(
        self, name: str, func: Any, args: Any, kwargs: Any, operands: list[Tensor], results: list[Tensor], kind: int
    ) -> tuple[bool, bool, Exception | None]:
        """Whether a result holds an image's values several times, and whether each of these meets several stored ones;
        and the refusal where they are summed."""
        image = [t for t in operands if self.kind(t) == IMAGE and _is_number(t)]
        if kind != IMAGE or not image or name in _NORMALISING:
            return False, False, None
        stored = any(self.kind(t) == STORED for t in operands)
        met = any(self.memory(t).meets_stored for t in image)
        if torch.Tag.pointwise in func.tags:
            repeated = all(_repeated(t, results[0].shape) > 0 or self.memory(t).repeated for t in image)
            added = name in _SUMMING and sum(self.memory(t).meets_stored for t in image) > 1
            return repeated, met or (stored and repeated), self.refusal(name) if added else None
        if name in _MOVING or name in _REARRANGING:
            return any(self.memory(t).repeated for t in image), met, None
        sums = met or (stored and any(self._summed(func, args, kwargs, STORED)))
        return False, False, self.refusal(name) if sums else None

    def _summed(self, func: Any, args: Any, kwargs: Any, kind: int = LEARNED) -> Iterator[bool]:
        """Whether arguments are learned (or of another kind) and more than added."""
        names = [argument.name for argument in func._schema.arguments]
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            yield name not in _ADDED and any(isinstance(t, Tensor) and self.kind(t) == kind for t in tree_leaves(value))

    def _elementwise(
        self, name: str, args: Any, operands: list[Tensor], result: Tensor
    ) -> tuple[Tensor | None, Tensor | None, bool]:
        image = [t for t in operands if self.kind(t) == IMAGE]
        learned = [t for t in operands if self.kind(t) == LEARNED]
        factors, shifts = _joined(self._all(image, "factors")), _joined(self._all(image, "shifts"))
        product = False
        if learned:
            given = _joined(self._all(learned, "factors"))
            # Compared with several learned values each: a distance to prototypes, once it is summed.
            product = name not in _ADDING or any(_repeated(t, result.shape) > 0 for t in image if _is_number(t))
            if product:
                factors = _joined([factors, given])
            else:
                shifts = _joined([shifts, given])
        elif shifts is not None and _squares(name, args):
            factors, shifts = _joined([factors, shifts]), None
            for t in image:
                self.memory(t).squared()
        return _expanded(factors, result), _expanded(shifts, result), product

    def _all(self, tensors: list[Tensor], which: str) -> list[Tensor | None]:
        return [self.read(t, which) for t in tensors if _is_number(t)]

    def _normalised(
        self, name: str, func: Any, args: Any, kwargs: Any, result: Tensor
    ) -> tuple[Tensor | None, Tensor | None, bool]:
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        weight = given.get("weight")
        before = self.read(args[0], "factors") if args[0].shape == result.shape and "softmax" not in name else None
        if not isinstance(weight, Tensor) or self.kind(weight) != LEARNED:
            return before, None, False
        own = self.read(weight, "factors")
        if own is not None and ("batch" in name or "group" in name):  # the others' are of the last dimensions
            own = own.view(1, -1, *[1] * (result.ndim - 2))
        return _expanded(_joined([before, own]), result), None, True

    def _shadows(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> list[Tensor | None]:
        """The factors of learned values that were made of others: what the operation makes of theirs."""

        def factors(t: Tensor) -> Tensor | None:
            if not t.is_floating_point():
                return None
            return self.read(t, "factors") if self.kind(t) == LEARNED else t.double()

        found = self._run(func, args, kwargs, factors)
        fits = len(found) == len(results) and all(f.shape == t.shape for f, t in zip(found, results, strict=True))
        if not fits or not all(f.is_floating_point() and f.isfinite().all() for f in found):
            return [None] * len(results)
        return list(found)

    def _moved(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> list[Tensor | None]:
        def factors(t: Tensor) -> Tensor | None:
            if not t.is_floating_point():
                return None
            found = self.read(t, "factors") if self.kind(t) == IMAGE else None
            return torch.zeros(t.shape, dtype=torch.float64, device=t.device) if found is None else found.clone()

        found = self._run(func, args, kwargs, factors)
        return found if len(found) == len(results) else [None] * len(results)

    def _run_on(
        self, func: Any, args: Any, kwargs: Any, t: Tensor, which: str, results: list[Tensor]
    ) -> tuple[list[Tensor | None], bool]:
        """The factors (or shifts) of an operation's results, and whether it sums over values of ``t`` with different
        ones: of linear operations f with weights of one sign, f(1) f(c²) is more than f(c)² there, by Cauchy's
        inequality; of others, and by weights of both signs, it is another number."""
        c = self.read(t, which)
        if c is None or not c.any():
            return [None] * len(results), False

        def run(power: Tensor) -> list[Any]:
            def instead(x: Tensor) -> Tensor | None:
                if x is t:
                    return power.to(torch.complex128) if t.is_complex() else power
                if not x.is_floating_point():
                    return None
                return torch.zeros_like(x, dtype=torch.float64) if self.kind(x) == LEARNED else x.double()

            return self._run(func, args, kwargs, instead)

        if self._is_elementwise(run, c):
            return [c], False
        powers = [run(power) for power in ((c != 0).double(), c, c.square())]
        if not all(len(p) == len(results) for p in powers):
            return [None] * len(results), False
        found: list[Tensor | None] = []
        varies = False
        for one, first, second in zip(*powers, strict=True):
            if not _is_number(first):
                found.append(None)
                continue
            difference = (one * second - first.square()).abs()
            varies |= bool((difference > 1e-5 * first.abs().square().clamp(min=1e-12)).any())
            found.append(
                torch.where(one != 0, first / one, 0.0).nan_to_num(0, 0, 0) if first.is_floating_point() else None
            )
        if not self._is_sum(run, c):
            varies = self._chooses(run, c)
        return [None] * len(results) if varies else found, varies

    @staticmethod
    def _is_sum(run: Callable[[Tensor], list[Any]], c: Tensor) -> bool:
        other = c.sin()
        several = zip(run(c), run(other), run(c + other), strict=False)
        return all(torch.allclose(a + b, both, rtol=1e-6, atol=1e-9) for a, b, both in several if _is_number(a))

    def _chooses(self, run: Callable[[Tensor], list[Any]], c: Tensor) -> bool:
        """Whether one result depends on values of different factors, in whatever way: NaN in place of some factors, and
        then of all others, reaches it both times."""
        known, which = c.unique(return_inverse=True)
        for _ in range(4):
            drawn = (torch.rand(known.shape, generator=self.generator, dtype=torch.float64) < 0.5).to(c.device)
            some, others = drawn[which], ~drawn[which]
            first, second = (run(c.masked_fill(chosen & (c != 0), torch.nan)) for chosen in (some, others))
            pairs = zip(first, second, strict=False)
            if any(bool((a.isnan() & b.isnan()).any()) for a, b in pairs if _is_number(a)):
                return True
        return False

    @staticmethod
    def _is_elementwise(run: Callable[[Tensor], list[Any]], c: Tensor) -> bool:
        """Whether an operation of another kind than torch's elementwise ones is one nevertheless, as some activations
        are: it does not matter to it in which order its values come."""
        order = torch.randperm(c.numel(), generator=torch.Generator().manual_seed(0)).to(c.device)
        found, mixed = run(c.contiguous()), run(c.flatten()[order].view(c.shape))
        if len(found) != 1 or len(mixed) != 1 or found[0].shape != c.shape:
            return False
        return torch.allclose(found[0].flatten()[order], mixed[0].flatten(), rtol=1e-9, atol=0.0)

    def _run(self, func: Any, args: Any, kwargs: Any, instead: Callable[[Tensor], Tensor | None]) -> list[Any]:
        """What an operation makes of other values; nothing where it does not take them."""

        def replaced(t: Tensor) -> Tensor:
            other = instead(t)
            other = t if other is None else other
            return other.clone() if func._schema.is_mutable else other

        try:
            with torch.no_grad():
                found = func(*tree_map_only(Tensor, replaced, args), **tree_map_only(Tensor, replaced, kwargs))
        except (RuntimeError, TypeError, NotImplementedError):
            return []
        return [t for t in tree_leaves(found) if isinstance(t, Tensor)]


def _joined(several: Iterable[Tensor | None]) -> Tensor | None:
    """A number for each combination of numbers, the same where these are; 0 where all are."""
    found: Tensor | None = None
    for one in several:
        if found is None or one is None:
            found = one if found is None else found
            continue
        both = (found != 0) & (one != 0)
        found = torch.where(both, 0.382 * found + 0.618 * one, found + one)
    return found


def _is_number(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _all_tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def _values(t: Tensor) -> Any:
    """The tensor itself, or that of a sparse one's values; None where there is none."""
    if t.layout is torch.strided:
        return t
    if t.layout is torch.sparse_coo:
        return t._values()
    compressed = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    return t.values() if t.layout in compressed else None


def _looks_learned(t: Tensor) -> bool:
    """Whether a stored tensor may be weights: most of its values differ, and they are no scale, which is sorted."""
    values = t.detach().flatten()
    if t.layout is not torch.strided or not _is_number(t) or t.ndim < 2 or t.is_complex():
        return False
    return bool(2 * len(values.unique()) > len(values)) and not bool((values.diff() >= 0).all())


def _expanded(values: Tensor | None, like: Tensor) -> Tensor | None:
    return None if values is None else values.expand(like.shape)


def _repeated(t: Tensor, shape: torch.Size) -> int:
    """How many dimensions of ``shape`` the values of ``t`` are repeated along, but for the images'."""
    sizes, strides = [1] * (len(shape) - t.ndim) + list(t.shape), [0] * (len(shape) - t.ndim) + list(t.stride())
    return sum(
        wanted > 1 and (size == 1 or stride == 0) for wanted, size, stride in zip(shape, sizes, strides, strict=True)
    )


def _squares(name: str, args: Any) -> bool:
    """Whether an elementwise operation multiplies its operand by itself."""
    if name == "pow":
        return isinstance(args[1], int | float) and args[1] >= 2
    return name == "square" or (
        name == "mul" and isinstance(args[1], Tensor) and args[0].data_ptr() == args[1].data_ptr()
    )
