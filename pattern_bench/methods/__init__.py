"""Explanation methods: each a class with ``attribute(inputs, target)`` and a YAML file in ``conf/method``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what reads no more than names imports no torch
    from pattern_bench.methods.base import Method


def by_name() -> dict[str, type[Method]]:
    """Every method of the suite by its name, in the order of tables and legends.

    >>> [name for name, kind in by_name().items() if kind.needs_patterns]
    ['pattern_net', 'pattern_attribution']
    """
    from pattern_bench.core.registry import classes_by_name
    from pattern_bench.methods.base import Method

    return classes_by_name(Method, "pattern_bench.methods")
