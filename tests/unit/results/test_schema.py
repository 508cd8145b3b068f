"""Names in tables: nothing begins a cell that a spreadsheet would read as a formula, and names stay what they are."""

import csv

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pattern_bench.results.schema import as_cell, from_cell, write_csv

NAMES = ["=1+1", "+x", "-x", "@SUM(A1)", "\tx", "\rx", "'=x", "''-x", "'x", "-1", "-1e5", "+2.5", "-", "a=b", "", "'",
         "=cmd|' /C calc'!A0", "\n=x", "--", "-1-1"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_begins_with_no_formula_and_gives_the_name_back(name):
    cell = as_cell(name)
    assert from_cell(cell) == name
    assert not cell.startswith(("=", "@", "\t", "\r", "\n"))
    if cell.startswith(("+", "-")):
        float(cell)  # a number, which stays one


@given(st.text(alphabet="'=+-@\t\r\n1.ea", max_size=8))
def test_of_any_name(name):
    assert from_cell(as_cell(name)) == name


@given(st.text(alphabet="'=+-@1a", max_size=5), st.text(alphabet="'=+-@1a", max_size=5))
def test_different_names_are_different_cells(a, b):
    assert (as_cell(a) == as_cell(b)) == (a == b)


def test_a_csv_file_has_text_cells_guarded_and_numbers_as_they_are(tmp_path):
    table = pd.DataFrame({"=head": ["=a", "b", "-c"], "n": [-1.5, 2.0, float("nan")], "mixed": [-3, "-d", None],
                          "kind": pd.Categorical(["@x", "y", "@x"])})  # fmt: skip
    write_csv(tmp_path / "x.csv", table)
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["'=head", "n", "mixed", "kind"], ["'=a", "-1.5", "-3", "'@x"], ["b", "2.0", "'-d", "y"],
                    ["'-c", "", "", "'@x"]]  # fmt: skip
    assert list(table["=head"]) == ["=a", "b", "-c"]  # the table itself is not changed
