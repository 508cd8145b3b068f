"""Facts that are read from the source of classes."""

from dataclasses import fields

import pytest

from pattern_bench import methods
from pattern_bench.core import estimators
from pattern_bench.results import declared


@pytest.mark.parametrize(
    ("found", "kinds"), [(declared.estimators(), estimators.by_name()), (declared.methods(), methods.by_name())]
)
def test_what_the_report_reads_of_classes_is_what_they_say(found, kinds):
    assert list(found) == list(kinds)
    for name, facts in found.items():
        for field in fields(facts):
            if hasattr(kinds[name], field.name):
                assert getattr(facts, field.name) == getattr(kinds[name], field.name)
