"""Learned weights outside of Conv and Linear layers: which of them sum inputs, so that there are neurons in them.

Everything that torch computes in a forward pass is watched, whatever Python or C++ it comes from. What a tensor holds
is one of three kinds: what depends on the image, what depends on parameters alone (learned), and constants. An
operation on an image's values and learned ones is

- elementwise, and so no neuron by itself: layer scale, the affine part of a norm, position embeddings;
- something that moves values, such as a concatenation with class tokens;
- or anything else (a product of matrices, a convolution, a distance, an operation of another library): refused.

An elementwise product becomes a neuron once it is summed. So each value remembers which learned values it was
multiplied by, as a number, its factor: next to every storage lies another of its size. A sum over values with
different factors is refused where it is the only reader of the product; where the product goes on, the sum is a
statistic of it, as the mean in a norm that is written out. Whether an operation sums over different factors is found
by letting it run on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CONSTANT, LEARNED, IMAGE = range(3)

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
_CHOOSING = ("index", "index_select", "gather", "take", "embedding", "masked_select")
"""Operations that take some of a tensor's values, by an index that may depend on the image."""
_NORMALISING = (
    "native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm",
    "_fused_rms_norm", "_softmax", "_log_softmax", "logsumexp",
)  # fmt: skip
"""Operations that sum in order to normalise; with an elementwise affine part at most."""
_ACTIVATIONS = ("prelu", "_prelu_kernel")
"""Activations with learned slopes, which torch does not count among its elementwise operations."""
_ADDED = ("bias", "attn_mask", "attn_bias")
"""Arguments, by name, of operations that sum: they are added to the sum."""


@dataclass
class _Memory:
    """What is known of a storage. ``factors`` and ``shifts`` (elements,) hold, for every element, a number for the
    learned values that it was multiplied by, or that were added to it; 0 for none."""

    storage: Any  # kept, so that no other storage takes its place
    kind: int = CONSTANT
    factors: Tensor | None = None
    shifts: Tensor | None = None
    product: bool = False
    """Whether an image's values were multiplied by learned ones to make it."""
    shifted: bool = False
    """Whether learned values were added to an image's to make it."""
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
        parameters: of the network.
        image: (B, C, spatial...).
        in_layer: tells whether a Conv or Linear layer is running: its weights are no others'.
        refusal: the error for what is computed at the moment.

    Raises:
        Exception: the refusal, where an operation sums values times learned weights at once.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        image: Tensor,
        in_layer: Callable[[], bool],
        refusal: Callable[[str], Exception],
    ) -> None:
        super().__init__()
        self.in_layer, self.refusal = in_layer, refusal
        self.generator = torch.Generator().manual_seed(0)
        self.memories: dict[int, _Memory] = {}
        self.sums: list[tuple[_Memory, Exception]] = []
        self.memory(image).kind = IMAGE
        for parameter in parameters:
            self.memory(parameter).kind = LEARNED

    def check(self) -> None:
        """Raises the refusal of a product that was summed and had no other use; after the forward pass."""
        for memory, refusal in self.sums:
            if memory.is_summed_product():
                raise refusal

    # --- what lies next to the tensors ---

    def memory(self, t: Tensor, new: bool = False) -> _Memory:
        storage = t.untyped_storage()
        if new or storage._cdata not in self.memories:
            self.memories[storage._cdata] = _Memory(storage)
        return self.memories[storage._cdata]

    def kind(self, t: Tensor) -> int:
        return self.memory(t).kind

    def read(self, t: Tensor, which: str) -> Tensor | None:
        """The factors or shifts of a tensor, in its shape; a learned value that none are known for is one by itself."""
        memory = self.memory(t)
        if memory.kind == LEARNED and memory.factors is None and which == "factors":
            elements = memory.storage.nbytes() // t.element_size()
            memory.factors = self.numbers(torch.Size([elements]), t.device)
        whole = getattr(memory, which)
        return None if whole is None else whole.as_strided(t.shape, t.stride(), t.storage_offset())

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
        if not operands or any(t.layout is not torch.strided for t in operands):
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
        for t, (factors, shifts, product) in zip(results, found, strict=True):
            memory = self.memory(t, new=not changes)
            memory.kind = max(memory.kind, kind)
            self.write(t, "factors", factors)
            self.write(t, "shifts", shifts)
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
    ) -> Iterable[tuple[Tensor | None, Tensor | None, bool]]:
        """Factors, shifts, and whether it is a product, of each result."""
        learned = [t for t in operands if self.kind(t) == LEARNED]
        image = [t for t in operands if self.kind(t) == IMAGE]
        nothing = [(None, None, False) for _ in results]
        if kind == CONSTANT:
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
        if len([t for t in image if t.is_floating_point()]) != 1:
            return nothing  # of two tensors that depend on the image, as in attention
        t = next(t for t in image if t.is_floating_point())
        factors, varies = self._run_on(func, args, kwargs, t, "factors", results)
        if varies:
            self.sums.append((self.memory(t), self.refusal(name)))
        if name == "linalg_vector_norm" and self._run_on(func, args, kwargs, t, "shifts", results)[1]:
            self.memory(t).squared()
            self.sums.append((self.memory(t), self.refusal(name)))
        return [(f, None, False) for f in factors]

    def _summed(self, func: Any, args: Any, kwargs: Any) -> Iterator[bool]:
        """Whether arguments are learned and more than added."""
        names = [argument.name for argument in func._schema.arguments]
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            yield name not in _ADDED and any(
                isinstance(t, Tensor) and self.kind(t) == LEARNED for t in tree_leaves(value)
            )

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
            product = name not in _ADDING or any(_repeated(t, result.shape) > 0 for t in image if t.is_floating_point())
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
        return [self.read(t, which) for t in tensors if t.is_floating_point()]

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
                if x is t or not x.is_floating_point():
                    return power if x is t else None
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
            if not first.is_floating_point():
                found.append(None)
                continue
            difference = (one * second - first.square()).abs()
            varies |= bool((difference > 1e-5 * first.square().clamp(min=1e-12)).any())
            found.append(torch.where(one != 0, first / one, 0.0))
        return [None] * len(results) if varies else found, varies

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
