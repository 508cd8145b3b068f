"""From a name in a setting to what it names. Whether a setting may name it is for ``targets.py`` to say."""

from __future__ import annotations

import importlib
from typing import Any

from pattern_bench.errors import UserError

MOVED = {"pattern_bench.data.vision.ImageNet": "pattern_bench.data.imagenet.ImageNet"}
"""The present names of classes that configurations of earlier versions name elsewhere."""


def import_object(setting: str, name: str) -> Any:
    """Import a module and return what it holds under the last part of ``name``, such as ``package.module.Class``.

    The module is imported by its own name: one that another has imported, such as ``torch.os``, is none.

    >>> import_object("model.path", "fractions.Fraction")
    <class 'fractions.Fraction'>

    Args:
        setting: that names it, for the message.
        name: a dotted path.

    Raises:
        UserError: where there is no such thing.
    """
    module, _, attribute = MOVED.get(name, name).rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{setting}={name} cannot be imported ({error}): give package.module.Class, importable from here (is its "
            "folder on PYTHONPATH?)"
        ) from error
