"""Rules for single settings, without any configuration of the suite."""

import math

import pytest
from omegaconf import OmegaConf

from pattern_bench.configuration.rules import (
    Rule,
    boolean,
    check_rules,
    choice,
    name_among,
    number_from_zero,
    positive_number,
    whole_number,
)
from pattern_bench.errors import UserError


@pytest.mark.parametrize(("rule", "possible", "refused"), [
    (whole_number("a", 2), [2, 10**30], [1, -2, 2.0, math.nan, "2", True, None, [2]]),
    (whole_number("a", 0, nullable=True), [0, None], [-1, False]),
    (positive_number("a"), [1, 0.5, 1e-300], [0, -0.5, math.inf, math.nan, "1", True, None]),
    (positive_number("a", nullable=True), [1, None], [0, False]),
    (number_from_zero("a", "give a number"), [0, 0.0, 2], [-1, math.inf, math.nan, "0", False, None]),
    (boolean("a"), [True, False], [0, 1, "true", None]),
    (choice("a", ["most", "least"]), ["most", "least"], ["mos", None, 1, ["most"]]),
    (name_among("a", ["most", "least"]), ["most", "least"], ["mos", None]),
])  # fmt: skip
def test_what_a_rule_allows(rule, possible, refused):
    for value in possible:
        rule.check(value)
    for value in refused:
        with pytest.raises(UserError, match=r"^a=.* (is not possible|is unknown): (give|choose|did you mean)"):
            rule.check(value)


@pytest.mark.parametrize(("rule", "value", "said"), [
    (whole_number("seed", 0), -1, "seed=-1 is not possible: give a whole number of at least 0"),
    (positive_number("cache.gib", remedy="give GiB"), 0, "cache.gib=0 is not possible: give GiB"),
    (choice("order", ["most", "least"]), "mos", "order=mos is unknown: choose from most, least"),
    (name_among("order", ["most", "least"]), "mos", "order=mos is unknown: did you mean most?"),
    (Rule("share", lambda share: share <= 1, "give up to 1", "is no share"), 2, "share=2 is no share: give up to 1"),
])  # fmt: skip
def test_a_refusal_names_setting_value_and_remedy(rule, value, said):
    with pytest.raises(UserError) as refused:
        rule.check(value)
    assert str(refused.value) == said


def test_rules_are_checked_in_their_order_and_absent_settings_are_passed_over():
    rules = [whole_number("probe.steps", 1), whole_number("data.workers", 0), positive_number("data.fit")]
    check_rules(rules, OmegaConf.create({"data": {"workers": 0, "fit": 0.5}}))
    with pytest.raises(UserError, match=r"^data.workers=-1 "):
        check_rules(rules, OmegaConf.create({"data": {"workers": -1, "fit": 0}}))
    with pytest.raises(UserError, match=r"^data.fit=None "):
        check_rules(rules, OmegaConf.create({"data": {"workers": 0, "fit": None}}))
