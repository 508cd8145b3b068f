"""Find out what an operation does by running it on other values than its own.

Below, ``run`` is a function of one tensor that returns the operation's results for it, everything else being equal; and
``c`` a tensor of numbers that stand for something (0 for nothing), such as factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pattern_bench.core.learned_weights.tracking import is_number, tensors_of

Run = Callable[[Tensor], list[Any]]


def results_on(func: Any, args: Any, kwargs: Any, instead: Callable[[Tensor], Tensor | None]) -> list[Any]:
    """Return the tensors that an operation makes of other operands; none where it does not take them.

    Args:
        func: an operation of ``torch.ops``.
        args, kwargs: what it was called with.
        instead: returns another tensor for each operand; None leaves it.

    >>> results_on(torch.ops.aten.add.Tensor, (torch.ones(1), torch.ones(1)), {}, lambda t: 3 * t)
    [tensor([6.])]
    """

    def replaced(t: Tensor) -> Tensor:
        other = instead(t)
        other = t if other is None else other
        return other.clone() if func._schema.is_mutable else other

    try:
        with torch.no_grad():
            results = func(*tree_map_only(Tensor, replaced, args), **tree_map_only(Tensor, replaced, kwargs))
    except (RuntimeError, TypeError, NotImplementedError):
        return []
    return tensors_of(results)


def is_additive(run: Run, c: Tensor) -> bool:
    """Return whether run(a) + run(b) = run(a + b), tried for a = c and b = sin(c).

    >>> c = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> is_additive(lambda x: [x.sum()], c), is_additive(lambda x: [x.square().sum()], c)
    (True, False)
    """
    other = c.sin()
    several = zip(run(c), run(other), run(c + other), strict=False)
    return all(torch.allclose(a + b, both, rtol=1e-6, atol=1e-9) for a, b, both in several if is_number(a))


def mixes(run: Run, c: Tensor, generator: torch.Generator) -> bool:
    """Return whether one result depends on values with different numbers in ``c``, in whatever way.

    NaN in the place of some of the numbers, and then of all others, reaches such a result both times.

    >>> c = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> mixes(lambda x: [x.amax()], c, torch.Generator().manual_seed(0))
    True
    >>> mixes(lambda x: [x.relu()], c, torch.Generator().manual_seed(0))
    False
    """
    known, which = c.unique(return_inverse=True)
    for _ in range(4):
        drawn = (torch.rand(known.shape, generator=generator, dtype=torch.float64) < 0.5).to(c.device)
        some, others = drawn[which], ~drawn[which]
        first, second = (run(c.masked_fill(chosen & (c != 0), torch.nan)) for chosen in (some, others))
        pairs = zip(first, second, strict=False)
        if any(bool((a.isnan() & b.isnan()).any()) for a, b in pairs if is_number(a)):
            return True
    return False


def is_elementwise(run: Run, c: Tensor) -> bool:
    """Return whether it does not matter in which order the values come: so it is for some activations that torch does
    not count among its elementwise operations.

    >>> c = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    >>> is_elementwise(lambda x: [x.relu()], c), is_elementwise(lambda x: [x.cumsum(0)], c)
    (True, False)
    """
    order = torch.randperm(c.numel(), generator=torch.Generator().manual_seed(0)).to(c.device)
    plain, mixed = run(c.contiguous()), run(c.flatten()[order].view(c.shape))
    if len(plain) != 1 or len(mixed) != 1 or plain[0].shape != c.shape:
        return False
    return torch.allclose(plain[0].flatten()[order], mixed[0].flatten(), rtol=1e-9, atol=0.0)


def combine(run: Run, c: Tensor, results: list[Tensor], generator: torch.Generator) -> tuple[list[Tensor | None], bool]:
    """Return the numbers that stand for an operation's results, and whether it sums over values with different ones.

    Where a linear operation f with weights of one sign does, f(1) f(c²) is more than f(c)², by Cauchy's inequality; for
    weights of both signs, it is another number. Where it does not, f(c) / f(1) is the number of the result. Of
    operations that are not additive, :func:`mixes` tells.

    Args:
        run: the operation.
        c: the numbers of its operand.
        results: what it returned.
        generator: for :func:`mixes`.

    Returns:
        A tensor for each result, None where its number is unknown; and whether values with different ones are summed.

    >>> c, one = torch.tensor([1.5, 1.5, 1.25], dtype=torch.float64), [torch.ones(())]
    >>> combine(lambda x: [x[:2].sum()], c, one, torch.Generator())
    ([tensor(1.5000, dtype=torch.float64)], False)
    >>> combine(lambda x: [x.sum()], c, one, torch.Generator())
    ([None], True)
    """
    unknown: list[Tensor | None] = [None] * len(results)
    powers = [run(power) for power in ((c != 0).double(), c, c.square())]
    if not all(len(p) == len(results) for p in powers):
        return unknown, False
    numbers: list[Tensor | None] = []
    varies = False
    for one, first, second in zip(*powers, strict=True):
        if not is_number(first):
            numbers.append(None)
            continue
        difference = (one * second - first.square()).abs()
        varies |= bool((difference > 1e-5 * first.abs().square().clamp(min=1e-12)).any())
        numbers.append(
            torch.where(one != 0, first / one, 0.0).nan_to_num(0, 0, 0) if first.is_floating_point() else None
        )
    if not is_additive(run, c):
        varies = mixes(run, c, generator)
    return unknown if varies else numbers, varies
