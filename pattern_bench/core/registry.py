"""The classes of a package by the name that each gives itself, so that a new one is entered in no list."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from typing import Any, TypeVar

T = TypeVar("T")


@functools.cache
def classes_by_name(base: type[T], package: str) -> dict[str, type[T]]:
    """Import every module that lies in a package, and collect the subclasses of ``base`` that are defined there.

    Args:
        base: what they extend. A class with a ``name`` in its own body counts; one without is a base of others.
        package: as in an import.

    Returns:
        The classes by ``name``: by their ``place``, and those of one place by name.

    >>> from pattern_bench.core.estimators import Estimator
    >>> list(classes_by_name(Estimator, "pattern_bench.core"))
    ['random', 'x', 'w', 'a', 'a_plus_minus']
    """
    own = [kind for kind in subclasses_in(base, package) if "name" in vars(kind)]
    return {kind.name: kind for kind in sorted(own, key=lambda kind: (kind.place, kind.name))}


def subclasses_in(base: type[T], package: str) -> list[Any]:
    """Import every module that lies in a package, and list the subclasses of ``base`` that these define.

    >>> from pattern_bench.core.estimators import Estimator, Linear
    >>> Linear in subclasses_in(Estimator, "pattern_bench.core")
    True
    """
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(module.name)
    return [kind for kind in _below(base) if _stands_in(package, kind)]


def _stands_in(package: str, kind: type) -> bool:
    """Whether a module of the package has the class, which none has that a function or an example defines."""
    module = sys.modules.get(kind.__module__)
    return kind.__module__.startswith(f"{package}.") and getattr(module, kind.__name__, None) is kind


def _below(base: Any) -> list[Any]:
    """All subclasses, each once."""
    every = [kind for child in base.__subclasses__() for kind in (child, *_below(child))]
    return list(dict.fromkeys(every))
