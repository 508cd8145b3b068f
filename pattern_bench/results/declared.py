"""Labels, colours and places of the suite's estimators and methods, read from the source of their classes.

To import the classes is to import torch, which takes longer than most reports take to write. So the report reads the
attributes that are plain values in their bodies; code that has imported torch asks the classes themselves.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Facts:
    """Attributes of an estimator's or a method's class; ``core.estimators.Estimator`` and ``methods.base.Method`` say
    what each means."""

    name: str
    label: str
    math_label: str
    place: int = 99
    colour: str | None = None
    line: str = "solid"
    baseline: bool = False
    has_pattern: bool = True
    needs_patterns: bool = False
    without_patterns: str = ""


@functools.cache
def estimators() -> Mapping[str, Facts]:
    """Return the facts of each estimator of the suite by its name, in the order of tables and legends.

    >>> estimators()["a_plus_minus"].label
    'S_a+-'
    """
    return _declared("pattern_bench.core", "Estimator")


@functools.cache
def methods() -> Mapping[str, Facts]:
    """Return the facts of each explanation method of the suite by its name, in the order of tables and legends.

    >>> methods()["pattern_net"].needs_patterns
    True
    """
    return _declared("pattern_bench.methods", "Method")


@dataclass(frozen=True)
class _Class:
    bases: list[str]
    own: dict[str, Any]


def _declared(package: str, base: str) -> dict[str, Facts]:
    """Facts of the classes with a name of their own below the class ``base``, in the modules of ``package``."""
    classes = dict(_classes(package))
    every = []
    for title, kind in classes.items():
        line = list(_line(title, classes))
        if title != base and base in line and "name" in kind.own:
            # Nearest class last, so that it overrules those that it extends; labels are not inherited.
            known = {key: value for name in reversed(line) for key, value in classes[name].own.items()}
            label = kind.own.get("label", kind.own["name"])
            known |= {"label": label, "math_label": kind.own.get("math_label", label)}
            every.append(Facts(**{key: known[key] for key in Facts.__dataclass_fields__ if key in known}))
    return {facts.name: facts for facts in sorted(every, key=lambda facts: (facts.place, facts.name))}


def _classes(package: str) -> Iterator[tuple[str, _Class]]:
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.py")):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
                    yield node.name, _Class(bases, dict(_plain_values(node)))


def _plain_values(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Constant):
            yield from ((target.id, value.value) for target in targets if isinstance(target, ast.Name))


def _line(title: str, classes: Mapping[str, _Class]) -> Iterator[str]:
    """The class and those of the package that it extends, nearest first."""
    if title in classes:
        yield title
        for base in classes[title].bases:
            yield from _line(base, classes)
