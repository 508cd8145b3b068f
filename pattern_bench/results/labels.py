"""How estimators and methods are written for people, and in which order: the classes say it themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pattern_bench import methods

if TYPE_CHECKING:
    from pattern_bench.core.estimators import Estimator

RANDOM_ORDER = "random_order"
"""The baseline of degradation curves, which no method makes."""


def estimators() -> dict[str, type[Estimator]]:
    """Return every estimator of the suite by its name; torch is imported when this is first called, and not before,
    so that the report's command starts without it.

    >>> estimators()["a"].label
    'S_a'
    """
    from pattern_bench.core.estimators import by_name

    return by_name()


def plain(name: str) -> str:
    """Return an estimator's or a method's label in plain text; text after a comma stays, and so does an unknown name.

    >>> plain("a_plus_minus"), plain("lrp_z, constant 0"), plain("mine")
    ('S_a+-', 'LRP z-rule, constant 0', 'mine')
    """
    first, *rest = name.split(",")
    facts = estimators().get(first) or methods.by_name().get(first)
    label = "random order" if first == RANDOM_ORDER else facts.label if facts else first
    return ",".join([label, *rest])


def formula(estimator: str) -> str:
    """Return an estimator's label in figures, a formula between ``$`` where it has one.

    >>> formula("a_plus_minus"), formula("random"), formula("mine")
    ('$S_{a+-}$', 'random', 'mine')
    """
    facts = estimators().get(estimator)
    return facts.math_label if facts else estimator


def ordered(names: Iterable[str]) -> list[str]:
    """Return each name once: the suite's in the order of their ``place``, then others by name.

    >>> ordered(["mine", "a", "x", "a"])
    ['x', 'a', 'mine']
    """
    known = estimators()
    return sorted(set(names), key=lambda name: (known[name].place if name in known else 99, name))


def method_place(method: str) -> tuple[int, str]:
    """Return a key to sort methods by: the suite's in its order, then the random order, then others by name.

    >>> sorted(["mine", "random_order", "gradient", "pattern_net"], key=method_place)
    ['pattern_net', 'gradient', 'random_order', 'mine']
    """
    name = method.split(",")[0]
    facts = methods.by_name().get(name)
    return (98 if name == RANDOM_ORDER else facts.place if facts else 99, method)
