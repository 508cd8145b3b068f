"""From a group of the composed configuration to the object that it describes."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pattern_bench.configuration.importing import import_object
from pattern_bench.configuration.targets import allows_any, check_class, check_name, named_targets
from pattern_bench.errors import UserError


def build(node: DictConfig) -> Any:
    """Make the object that a group's ``_target_`` names, or with ``_partial_`` a partial of its class.

    A ``_target_`` further down in the group is built too, and given to the one above. Unless the configuration says
    ``allow_any_target: true``, each must be an estimator, a data set, a model, a method or a ``torch.nn.Module``, and
    a class that ``targets.PACKAGES`` define: not a function, nor what their modules merely import.

    >>> cfg = OmegaConf.create({"estimator": {"_target_": "pattern_bench.core.estimators.Filter"}})
    >>> build(cfg.estimator).name
    'w'

    Args:
        node: a group of the configuration, such as ``cfg.model``.

    Raises:
        UserError: where it names anything else, or what its settings do not fit; the object's own, where it refuses
            them.
    """
    # Not by Hydra's instantiate, which resolves twice: there an escaped interpolation, mere text to any check of the
    # resolved settings, becomes a _target_ of its own.
    plain, path = OmegaConf.to_container(node, resolve=True), node._get_full_key(None)
    any_target = allows_any(node._get_root())
    for setting, name in named_targets(plain, path):
        check_name(setting, name, any_target)
        check_class(setting, name, any_target)
    return _built(plain, path)


def _built(node: Any, path: str) -> Any:
    if isinstance(node, list):
        return [_built(value, f"{path}[{place}]") for place, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    settings = {key: _built(value, f"{path}.{key}") for key, value in node.items()}
    if "_target_" not in settings:
        return settings
    name, deferred = settings.pop("_target_"), settings.pop("_partial_", False)
    if not isinstance(deferred, bool):
        raise UserError(f"{path}._partial_={deferred} is not possible: give true or false")
    made_by = import_object(f"{path}._target_", name)
    try:
        if deferred:
            inspect.signature(made_by).bind_partial(**settings)
            return partial(made_by, **settings)
        return made_by(**settings)
    except TypeError as error:
        raise UserError(f"{path} does not fit {name}: {error}") from error
