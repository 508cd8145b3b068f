"""Sizes and ages, as the command reads and shows them."""

import pytest

from pattern_bench.commands.cache import age_of, shown_age, shown_size, size_of
from pattern_bench.errors import UserError


@pytest.mark.parametrize(
    ("text", "size"), [("10GiB", 10 * 2**30), ("1.5 MiB", 1572864), ("0", 0), ("7k", 7168), ("2T", 2**41), ("5B", 5)]
)
def test_sizes_are_read(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1PiB", "1e3", "ten"])
def test_what_is_no_size_is_said(text):
    with pytest.raises(UserError, match="is no size: give"):
        size_of(text)


def test_ages_are_read_and_shown():
    assert [age_of(text) for text in ("90m", "12h", "1.5d")] == [5400, 43200, 129600]
    for text in ("", "5", "5y", "-1d"):
        with pytest.raises(UserError, match="is no age: give"):
            age_of(text)
    assert [shown_age(seconds) for seconds in (3, 90, 7200, 100_000, 172_800)] == ["now", "2 min", "2 h", "28 h", "2 d"]
    assert [shown_size(size) for size in (0, 1023, 1024, 2**30 * 3 // 2)] == ["0 B", "1023 B", "1.0 KiB", "1.5 GiB"]
