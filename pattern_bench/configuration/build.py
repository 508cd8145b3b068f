"""From the composed configuration to objects, and which classes it may name. Imports no torch before it builds."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pattern_bench.configuration.importing import located
from pattern_bench.configuration.reach import check_trainer
from pattern_bench.errors import UserError

# The files in conf/hydra/launcher are meant to have the names of the plugins' own configurations, and to be checked
# against them. A worker process, too, comes by here before it composes its job.
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema", UserWarning)

PACKAGES = ("pattern_bench", "torch", "torchvision", "timm")
"""What a configuration may name classes of, unless ``allow_any_target`` is true."""
KINDS = {
    "pattern_bench.core.estimators.Estimator", "pattern_bench.data.base.Source",
    "pattern_bench.models.base.ModelSource",
    "pattern_bench.methods.base.Method", "torch.nn.modules.module.Module",
}  # fmt: skip
"""Such a class is a subclass of one of these. By name, so that a check imports nothing that is not named."""
IMPORTED_MODEL = "pattern_bench.models.imported.ImportedModel"
"""Its ``path`` names something to import and call, as a ``_target_`` does."""
REMEDY = "name another, or if you trust it to run here, say allow_any_target=true"


def check_complete(cfg: DictConfig) -> None:
    """Checks the composed configuration, before anything that it names is imported.

    Raises:
        UserError: naming the first setting that must be given and was not, or that names something outside of
            PACKAGES without ``allow_any_target``; or an argument of the trainer's that is not possible.
    """
    missing = list(_missing(OmegaConf.to_container(cfg, resolve=False), ""))
    if cfg.cache.dir == "":  # of an empty environment variable, which would be the current folder
        missing.append("cache.dir")
    if missing:
        raise UserError(f"{missing[0]} has no value: give one, {missing[0]}=…")
    trusted = _trusted(cfg)
    for setting, name in _targets(OmegaConf.to_container(cfg, resolve=True), ""):
        _check_name(setting, name, trusted)
    check_trainer(OmegaConf.to_container(cfg.trainer, resolve=True))  # type: ignore[arg-type]


def build(node: DictConfig) -> Any:
    """The object that a group's ``_target_`` names, or with ``_partial_`` a partial of its class.

    A ``_target_`` further down in the group is built too, and given to the one above. Unless the configuration says
    ``allow_any_target: true``, each must be an estimator, a data set, a model, a method or a ``torch.nn.Module``, and
    a class that PACKAGES define: not a function, nor what their modules merely import.

    Raises:
        UserError: where it names anything else, or what its settings do not fit; the object's own, where it refuses
            them.
    """
    # Not by Hydra's instantiate, which resolves twice: there an escaped interpolation, mere text to any check of the
    # resolved settings, becomes a _target_ of its own.
    plain, path = OmegaConf.to_container(node, resolve=True), node._get_full_key(None)
    trusted = _trusted(node._get_root())
    for setting, name in _targets(plain, path):
        _check_name(setting, name, trusted)
        _check_class(setting, name, trusted)
    return _built(plain, path)


def _missing(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _missing(value, f"{path}.{key}" if path else str(key))
    elif node == "???":
        yield path


def _trusted(cfg: Any) -> bool:
    value = OmegaConf.select(cfg, "allow_any_target", default=False)
    if not isinstance(value, bool):
        raise UserError(f"allow_any_target={value} is not possible: give true or false")
    return value


def _targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The settings that name something to import and call, and what they name."""
    if isinstance(node, dict):
        below = f"{path}." if path else ""
        if "_target_" in node:
            yield f"{below}_target_", node["_target_"]
            if node["_target_"] == IMPORTED_MODEL:
                yield f"{below}path", node.get("path")
        for key, value in node.items():
            yield from _targets(value, f"{below}{key}")
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from _targets(value, f"{path}[{place}]")


def _check_name(setting: str, name: Any, trusted: bool) -> None:
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"{setting}={name} names no class: give package.module.Class")
    if not trusted and parts[0] not in PACKAGES:
        raise UserError(f"{setting}={name} lies outside of {', '.join(PACKAGES)}: {REMEDY}")


def _check_class(setting: str, name: str, trusted: bool) -> None:
    found = located(setting, name)
    if trusted:
        return
    bases = {f"{base.__module__}.{base.__qualname__}" for base in getattr(found, "__mro__", ())}
    if not (bases & KINDS and found.__module__.partition(".")[0] in PACKAGES):
        raise UserError(
            f"{setting}={name} is no estimator, data set, model, method or torch.nn.Module that {', '.join(PACKAGES)} "
            f"define: {REMEDY}"
        )


def _built(node: Any, path: str) -> Any:
    if isinstance(node, list):
        return [_built(value, f"{path}[{place}]") for place, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    settings = {key: _built(value, f"{path}.{key}") for key, value in node.items()}
    if "_target_" not in settings:
        return settings
    name, deferred = settings.pop("_target_"), settings.pop("_partial_", False)
    found = located(f"{path}._target_", name)
    try:
        if deferred:
            inspect.signature(found).bind_partial(**settings)
            return partial(found, **settings)
        return found(**settings)
    except TypeError as error:
        raise UserError(f"{path} does not fit {name}: {error}") from error
