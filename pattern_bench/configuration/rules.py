"""Rules for single settings: what a setting may be, and what to give instead where it is something else.

>>> positive_number("data.fit").check(0.4)
>>> whole_number("data.batch_size", 1).check(0)
Traceback (most recent call last):
    ...
pattern_bench.errors.UserError: data.batch_size=0 is not possible: give a whole number of at least 1

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pattern_bench.errors import UserError, did_you_mean

_ABSENT = object()


@dataclass(frozen=True)
class Rule:
    """What one setting may be. A refused value reads ``SETTING=VALUE PROBLEM: REMEDY``.

    Attributes:
        setting: its dotted path in the configuration, such as ``data.batch_size``.
        allows: whether a value (not None, where that is possible) is possible.
        remedy: what to give instead, or a function that makes it of the refused value.
        problem: what is wrong with any other value.
        nullable: whether None is possible too.
    """

    setting: str
    allows: Callable[[Any], bool]
    remedy: str | Callable[[Any], str]
    problem: str = "is not possible"
    nullable: bool = False

    def check(self, value: Any) -> None:
        """
        Raises:
            UserError: where the setting cannot have this value.
        """
        if (value is None and self.nullable) or (value is not None and self.allows(value)):
            return
        remedy = self.remedy if isinstance(self.remedy, str) else self.remedy(value)
        raise UserError(f"{self.setting}={value} {self.problem}: {remedy}")


def check_arguments(rules: Iterable[Rule], **values: Any) -> None:
    """Check what a class is given, by the last part of each rule's ``setting``. Rules of others are passed over.

    >>> check_arguments([whole_number("data.size", 1)], size=0)
    Traceback (most recent call last):
        ...
    pattern_bench.errors.UserError: data.size=0 is not possible: give a whole number of at least 1

    Raises:
        UserError: of the first rule that is broken.
    """
    for rule in rules:
        name = rule.setting.rpartition(".")[2]
        if name in values:
            rule.check(values[name])


def check_fields(setting: str, values: Mapping[str, Any], rules: Sequence[Rule]) -> None:
    """Check a group of settings that needs exactly those that have rules.

    >>> check_fields("model.training", {}, [whole_number("model.training.epochs", 1)])
    Traceback (most recent call last):
        ...
    pattern_bench.errors.UserError: model.training needs epochs: give it

    Raises:
        UserError: where one is missing or unknown, or breaks its rule.
    """
    names = [rule.setting.rpartition(".")[2] for rule in rules]
    if missing := [name for name in names if name not in values]:
        raise UserError(f"{setting} needs {', '.join(missing)}: give it")
    if unknown := [str(name) for name in values if name not in names]:
        raise UserError(f"{setting}.{unknown[0]} is unknown: {did_you_mean(unknown[0], names)}")
    check_arguments(rules, **values)


def check_rules(rules: Iterable[Rule], cfg: DictConfig) -> None:
    """Check a configuration, rule by rule. A setting that it does not have, as of a choice not made, is passed over.

    Raises:
        UserError: of the first rule that is broken.
    """
    for rule in rules:
        value = OmegaConf.select(cfg, rule.setting, default=_ABSENT)
        if value is not _ABSENT:
            rule.check(value)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Whether a value is a word or more."""
    return isinstance(value, str) and value != ""


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole_number(setting: str, least: int, *, nullable: bool = False, remedy: str = "") -> Rule:
    """A whole number of at least ``least``."""
    return Rule(
        setting,
        lambda value: is_whole(value) and value >= least,
        remedy or f"give a whole number of at least {least}",
        nullable=nullable,
    )


def positive_number(setting: str, *, nullable: bool = False, remedy: str = "give a positive number") -> Rule:
    """A finite number above 0."""
    return Rule(setting, lambda value: is_number(value) and 0 < value < math.inf, remedy, nullable=nullable)


def number_from_zero(setting: str, remedy: str) -> Rule:
    """A finite number of at least 0."""
    return Rule(setting, lambda value: is_number(value) and 0 <= value < math.inf, remedy)


def text(setting: str, remedy: str, *, nullable: bool = False) -> Rule:
    """A word or more, and no number, list or group."""
    return Rule(setting, is_text, remedy, nullable=nullable)


def whole_numbers(setting: str, least: int, remedy: str) -> Rule:
    """A list of whole numbers of at least ``least``."""
    return Rule(
        setting,
        lambda values: isinstance(values, list | tuple) and all(is_whole(v) and v >= least for v in values),
        remedy,
    )


def boolean(setting: str) -> Rule:
    """True or false, and no word or number for it."""
    return Rule(setting, lambda value: isinstance(value, bool), "give true or false")


def choice(setting: str, choices: Sequence[str]) -> Rule:
    """One of a few words; a refusal lists them all."""
    return Rule(setting, lambda value: str(value) in choices, f"choose from {', '.join(choices)}", problem="is unknown")


def name_among(setting: str, choices: Sequence[str]) -> Rule:
    """One of several names; a refusal suggests the closest."""
    return Rule(
        setting,
        lambda value: str(value) in choices,
        lambda value: did_you_mean(str(value), choices),
        problem="is unknown",
    )
