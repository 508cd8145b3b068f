"""Which classes a configuration may name, and where in it they are named. Imports nothing that is not named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from pattern_bench.configuration.importing import import_object
from pattern_bench.errors import UserError

PACKAGES = ("pattern_bench", "torch", "torchvision", "timm")
"""The packages whose classes a configuration may name, unless ``allow_any_target`` is true."""
KINDS = {
    "pattern_bench.core.estimators.Estimator", "pattern_bench.data.base.Source",
    "pattern_bench.models.base.ModelSource",
    "pattern_bench.methods.base.Method", "torch.nn.modules.module.Module",
}  # fmt: skip
"""The base classes, one of which a named class must have. By name, so that a check imports nothing else."""
IMPORTED_MODEL = "pattern_bench.models.imported.ImportedModel"
"""Its ``path`` names something to import and call, as a ``_target_`` does."""
REMEDY = "name another, or if you trust it to run here, say allow_any_target=true"


def allows_any(cfg: Any) -> bool:
    """The setting ``allow_any_target``: whether the configuration may name anything that can be imported.

    Raises:
        UserError: where it is neither true nor false.
    """
    value = OmegaConf.select(cfg, "allow_any_target", default=False)
    if not isinstance(value, bool):
        raise UserError(f"allow_any_target={value} is not possible: give true or false")
    return value


def named_targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The settings below ``path`` that name something to import and call, each with what it names."""
    if isinstance(node, dict):
        below = f"{path}." if path else ""
        if "_target_" in node:
            yield f"{below}_target_", node["_target_"]
            if node["_target_"] == IMPORTED_MODEL:
                yield f"{below}path", node.get("path")
        for key, value in node.items():
            yield from named_targets(value, f"{below}{key}")
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from named_targets(value, f"{path}[{place}]")


def check_name(setting: str, name: Any, any_target: bool) -> None:
    """Check the name of a class before it is imported.

    Raises:
        UserError: where it is no dotted path, or lies outside of PACKAGES without ``any_target``.
    """
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"{setting}={name} names no class: give package.module.Class")
    if not any_target and parts[0] not in PACKAGES:
        raise UserError(f"{setting}={name} lies outside of {', '.join(PACKAGES)}: {REMEDY}")


def check_class(setting: str, name: str, any_target: bool) -> None:
    """Import what ``name`` names, and check that it may be built.

    Raises:
        UserError: where there is no such thing; without ``any_target``, where it is no subclass of KINDS that
            PACKAGES define.
    """
    named = import_object(setting, name)
    if any_target:
        return
    bases = {f"{base.__module__}.{base.__qualname__}" for base in getattr(named, "__mro__", ())}
    if not (bases & KINDS and named.__module__.partition(".")[0] in PACKAGES):
        raise UserError(
            f"{setting}={name} is no estimator, data set, model, method or torch.nn.Module that {', '.join(PACKAGES)} "
            f"define: {REMEDY}"
        )
