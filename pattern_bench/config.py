"""From the composed configuration to objects. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from pattern_bench.errors import UserError


def build(node: DictConfig, **more: Any) -> Any:
    """The object that a group's ``_target_`` names.

    Raises:
        UserError: the object's own, where it refuses its settings.
    """
    try:
        return instantiate(node, **more)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def check_complete(cfg: DictConfig) -> None:
    """
    Raises:
        UserError: naming the settings that must be given and were not.
    """
    missing = list(_missing(OmegaConf.to_container(cfg, resolve=False), ""))
    if missing:
        raise UserError(f"{missing[0]} has no value: give one, {missing[0]}=…")


def _missing(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _missing(value, f"{path}.{key}" if path else str(key))
    elif node == "???":
        yield path
