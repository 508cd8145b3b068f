"""Explanation methods: each a class with ``attribute(inputs, target)`` and a YAML file in ``conf/method``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who imports the package alone, imports no torch
    from pattern_bench.methods.base import Method


def by_name() -> dict[str, type[Method]]:
    """Return every method of the suite by its name, in the order of tables and legends.

    >>> [name for name, kind in by_name().items() if kind.needs_patterns]
    ['pattern_net', 'pattern_attribution']
    """
    from pattern_bench.core.registry import classes_by_name
    from pattern_bench.methods.base import Method

    return classes_by_name(Method, "pattern_bench.methods")


def curves() -> dict[str, tuple[str, str]]:
    """Return estimator and method of each curve in the sweep of degradation curves (``sweep=fig4a``), by its name.

    PatternAttribution goes with every estimator, and its curve is called as that one; other methods with patterns go
    with estimators whose patterns come from data. Methods without patterns have a curve of their own, with S_x so that
    none are fitted, unless they take hundreds of passes or say another reason (``no_curve_reason``).

    >>> {name: curves()[name] for name in ("a", "pattern_net_a", "gradient")}
    {'a': ('a', 'pattern_attribution'), 'pattern_net_a': ('a', 'pattern_net'), 'gradient': ('x', 'gradient')}
    """
    from pattern_bench.core import estimators

    kinds, listed = estimators.by_name(), {name: (name, "pattern_attribution") for name in estimators.by_name()}
    for name, method in by_name().items():
        if method.needs_patterns and name != "pattern_attribution":
            listed |= {f"{name}_{fitted}": (fitted, name) for fitted, kind in kinds.items() if kind.from_data}
        elif not method.needs_patterns and method.passes != "hundreds" and not method.no_curve_reason:
            listed[name] = ("x", name)
    return listed
