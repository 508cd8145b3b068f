"""Checks of a composed configuration, before long work starts. Imports no torch.

What a single setting may be is a rule in ``tables.py``; what two settings must be together follows in the function that
checks the rules. Wrong settings raise a UserError that names the setting, its value and the remedy.

| function | checks | called |
|---|---|---|
| `check_complete(cfg)` | that nothing is missing, the rules, names of classes, the trainer | before imports |
| `check_choices(overrides)` | that no group is set to null | before Hydra composes |
| `check_groups(cfg)` | that groups are chosen | by `check_complete` and `check_settings` |
| `check_trainer(cfg.trainer)` | Lightning's arguments and the suite's own | before a trainer is made |
| `check_settings(cfg, criteria, orders, replacements)` | numbers and choices of the job | before data are read |
| `check_bootstrap(cfg, smallest, writable)` | the bootstrap against the data and the cache | when splits are made |
| `check_gallery(cfg, figures)`, `check_gallery_overrides(cfg, overrides)` | the gallery's own settings | at its start |
| `check_sanity(cfg, starts)`, `check_sanity_overrides(overrides)` | the sanity checks' own settings | at their start |
| `check_one_process(cfg.trainer)` | that no more processes are asked for | by both of these |
| `names_shown(cfg.show, choices, default)` | `show`, and reads it | by both of these |

Settings of a data set or a model are checked by its own class, with rules of :mod:`pattern_bench.configuration.rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from pattern_bench.configuration.location import CONF
from pattern_bench.configuration.rules import check_rules, choice, name_among, whole_number
from pattern_bench.configuration.tables import (
    CHOSEN,
    FEW_DEVICES,
    GALLERY,
    JOB,
    LIGHTNING,
    LISTS,
    SANITY,
    SECTIONS,
    TRAINER,
)
from pattern_bench.configuration.targets import allows_any, check_name, named_targets
from pattern_bench.configuration.trainer_arguments import HARMLESS, OWN, REFUSED, STRATEGIES
from pattern_bench.errors import UserError, did_you_mean
from pattern_bench.processes.launch import processes_per_node

JOB_ONLY = ("criterion", "probe", "bootstrap", "explanation", "degradation", "layer", "method", "curve")
"""Settings of the job that neither the gallery nor the sanity checks have a use for."""


def check_complete(cfg: DictConfig) -> None:
    """Check the composed configuration, before anything that it names is imported.

    Raises:
        UserError: naming the first setting that must be given and was not, that cannot have its value, or that names
            something outside of ``targets.PACKAGES`` without ``allow_any_target``; or an argument of the trainer's that
            is not possible.
    """
    check_groups(cfg)
    missing = list(_missing(OmegaConf.to_container(cfg, resolve=False), ""))
    if cfg.cache.dir == "":  # of an empty environment variable, which would be the current folder
        missing.append("cache.dir")
    if missing:
        raise UserError(f"{missing[0]} has no value: give one, {missing[0]}=…")
    check_rules(JOB, cfg)
    any_target = allows_any(cfg)
    for setting, name in named_targets(OmegaConf.to_container(cfg, resolve=True), ""):
        check_name(setting, name, any_target)
    check_trainer(OmegaConf.to_container(cfg.trainer, resolve=True))  # type: ignore[arg-type]


def check_choices(overrides: Iterable[str]) -> None:
    """Check overrides before Hydra composes them, which fails where a group's choice is no name.

    Raises:
        UserError: where null, or settings, are given for a group that must be chosen.
    """
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        if group in CHOSEN and (value.startswith("{") or "null" in re.split(r"[\s,\[\]]+", value.lower())):
            raise UserError(f"{override} is not possible: choose from {', '.join(_choices(group))}")


def check_groups(cfg: DictConfig) -> None:
    """
    Raises:
        UserError: where a group of settings is none, or was not chosen.
    """
    for group in CHOSEN:
        _check_chosen(group, group, OmegaConf.select(cfg, group))
    for group in SECTIONS:
        if not isinstance(value := OmegaConf.select(cfg, group), DictConfig):
            raise UserError(f"{group}={_shown(value)} is not possible: it holds settings; give one of these, {group}.…")
    for listed, folder in LISTS.items():
        if listed in cfg:
            below = OmegaConf.select(cfg, listed)
            if not isinstance(below, DictConfig) or not below:
                raise UserError(f"{listed}={_shown(below)} is not possible: leave it as it is, and name some in show=…")
            for name in map(str, below):
                _check_chosen(f"{listed}.{name}", folder, below[name])


def _check_chosen(setting: str, folder: str, value: Any) -> None:
    if not isinstance(value, DictConfig) or not value:
        raise UserError(f"{setting}={_shown(value)} is not possible: choose from {', '.join(_choices(folder))}")


def _choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml") if file.stem != "common")


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Check the ``trainer`` settings.

    Raises:
        UserError: naming the first argument that could change results without any key naming it, or that Lightning
            does not have; a strategy that is none of STRATEGIES; or another of the suite's own that is not possible.
    """
    for name, value in trainer.items():
        if name in REFUSED:
            raise UserError(f"trainer.{name}={value} is not possible: {REFUSED[name]}")
        if name not in OWN and name not in HARMLESS:
            raise UserError(f"trainer.{name}={value} is unknown: {did_you_mean(name, (*OWN, *HARMLESS))}")
    strategy = trainer.get("strategy", "auto")
    if strategy not in STRATEGIES:
        raise UserError(f"trainer.strategy={strategy} is not possible: choose from {', '.join(STRATEGIES)}")
    for name, rule in {**TRAINER, **LIGHTNING}.items():
        if name in trainer:
            rule.check(trainer[name])
    FEW_DEVICES.check(trainer.get("devices", 1))


def check_settings(
    cfg: DictConfig, criteria: Sequence[str], orders: Sequence[str], replacements: Sequence[str]
) -> None:
    """Check the numbers and choices of the job, which the gallery and the sanity checks have too.

    Args:
        cfg: composed configuration.
        criteria: what ``criterion`` may be.
        orders: what ``degradation.order`` may be.
        replacements: what ``degradation.replacement`` may be.

    Raises:
        UserError: for the first that is not possible.
    """
    check_groups(cfg)
    choices = (
        name_among("criterion", criteria),
        choice("degradation.order", orders),
        choice("degradation.replacement", replacements),
    )
    check_rules([*JOB, *choices], cfg)
    if cfg.bootstrap.resamples and cfg.probe.name == "sgd":
        raise UserError(
            "bootstrap.resamples needs the closed form, which the moments of chunks are enough for: give "
            "probe=closed_form or probe=both, or bootstrap.resamples=0"
        )


def check_bootstrap(cfg: DictConfig, smallest: int, writable: bool) -> None:
    """Check the bootstrap against the data and the cache; without one (``bootstrap.resamples=0``) there is nothing
    to check.

    Args:
        cfg: composed configuration, of which ``check_settings`` has nothing to say.
        smallest: images of the smallest split.
        writable: whether the cache can be written.

    Raises:
        UserError: where there are fewer images than chunks, or no place for the moments of the chunks.
    """
    if not cfg.bootstrap.resamples:
        return
    if cfg.bootstrap.chunks > smallest:
        raise UserError(
            f"bootstrap.chunks={cfg.bootstrap.chunks} is more than the {smallest} images of the smallest split: give "
            "fewer chunks, or more images"
        )
    if not writable:
        raise UserError(
            f"bootstrap.resamples keeps the moments of chunks in cache.dir={cfg.cache.dir}, which cannot be written: "
            "choose another cache.dir"
        )


def check_gallery(cfg: DictConfig, figures: Sequence[str]) -> None:
    """Check the gallery's own settings.

    Args:
        cfg: the gallery's configuration.
        figures: what ``figure`` may be.

    Raises:
        UserError: for the first that is not possible, or has no effect on the figure.
    """
    choice("figure", figures).check(cfg.figure)
    check_rules(GALLERY, cfg)
    used, other, least = ("images", "image", 1) if cfg.figure == "fig5" else ("image", "images", 0)
    if cfg[other] is not None:
        raise UserError(f"{other}={cfg[other]} has no effect on figure={cfg.figure}: give {used} instead")
    remedy = f"give a whole number of at least {least}, or null"
    whole_number(used, least, nullable=True, remedy=remedy).check(cfg[used])


def check_sanity(cfg: DictConfig, starts: Sequence[str]) -> None:
    """Check the sanity checks' own settings.

    Args:
        cfg: their configuration.
        starts: what ``start`` may be.

    Raises:
        UserError: for the first that is not possible.
    """
    check_rules([*SANITY, choice("start", starts)], cfg)


def check_gallery_overrides(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """
    Raises:
        UserError: where an override has no effect on the gallery's figure, ``cfg.figure``.
    """
    unused = (*JOB_ONLY, "estimator", "methods") if cfg.figure == "fig4b" else (*JOB_ONLY, "estimators")
    _refuse_unused(overrides, f"figure={cfg.figure}", unused)


def check_sanity_overrides(overrides: Iterable[str]) -> None:
    """
    Raises:
        UserError: where an override has no effect on the sanity checks.
    """
    _refuse_unused(overrides, "the sanity checks", JOB_ONLY)


def check_one_process(trainer: DictConfig) -> None:
    """
    Raises:
        UserError: where the trainer's settings ask for several processes, which the job has a use for, and the gallery
            and the sanity checks not.
    """
    if processes_per_node(trainer) * trainer.get("num_nodes", 1) > 1:
        raise UserError(f"trainer.devices={trainer.devices}: this command runs in one process; give trainer.devices=1")


def names_shown(show: Any, choices: Iterable[str], default: Iterable[str]) -> list[str]:
    """Return the names in the setting ``show``, in its order and each once; ``default`` where it is None.

    >>> names_shown(["lrp_z", "gradient"], ["gradient", "lrp_z", "occlusion"], default=["gradient"])
    ['lrp_z', 'gradient']

    Args:
        show: a name, a list of names, or None.
        choices: the names that there are.
        default: what None stands for.

    Raises:
        UserError: where it names nothing, or what is not among ``choices``.
    """
    if show is None:
        return list(default)
    names = [str(name) for name in show] if isinstance(show, list | ListConfig) else [str(show)]
    if not names:
        raise UserError("show=[] shows nothing: name some, or give null for the default")
    known = list(choices)
    for name in names:
        name_among("show", known).check(name)
    return list(dict.fromkeys(names))


def _missing(node: Any, path: str) -> Iterator[str]:
    """The settings that a configuration leaves to the user, and that have no value."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _missing(value, f"{path}.{key}" if path else str(key))
    elif node == "???":
        yield path


def _refuse_unused(overrides: Iterable[str], command: str, unused: Sequence[str]) -> None:
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if key.split(".")[0] in unused:
            raise UserError(f"{override} has no effect on {command}: leave it out")
