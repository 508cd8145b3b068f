"""Names in tables: nothing begins a cell that a spreadsheet would read as a formula, and names stay what they are."""

import csv

import pandas as pd
import pytest
from helpers.paths import ROOT
from hypothesis import given
from hypothesis import strategies as st

from pattern_bench.reporting.runs import _table
from pattern_bench.reporting.tables import write_table
from pattern_bench.results.schema import RHO_COLUMNS, as_cell, from_cell, write_csv

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


@pytest.mark.parametrize("name", ["=model", "null", "NA", "nan", "'=x", 'a,"b"', "-1", "007", "1.50", "True"])
def test_the_report_reads_the_names_that_were_written(tmp_path, name):
    row = dict.fromkeys(RHO_COLUMNS, name) | {"layer_index": 0, "neuron": 0, "rho": -0.5, "dead": False}
    write_csv(tmp_path / "rho.csv", pd.DataFrame([row, {**row, "neuron": 1, "rho": float("nan"), "dead": True}]))
    read = _table(tmp_path / "rho.csv", RHO_COLUMNS)
    assert set(read.model) == set(read.layer) == {name}
    assert read.rho.tolist()[0] == -0.5
    assert read.rho.isna().tolist() == [False, True]


def test_markdown_and_latex_keep_their_columns(tmp_path):
    table = pd.DataFrame({"model": ["=a|b\nc", "<script>x</script>", "$5_%&\\"], "rho": [-0.25, 1.0, float("nan")]})
    write_table(table, tmp_path / "t")
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert len(lines) == 5
    assert lines[2].startswith(r"| '=a\|b c ")
    assert "-0.2500" in lines[2]
    assert "<script>" not in lines[3].replace(r"\<", "")
    latex = (tmp_path / "t.tex").read_text()
    assert r"\$5\_\%\&\textbackslash" in latex
    assert "-0.2500" in latex


def test_tables_of_the_experiments_are_guarded_and_read_back(tmp_path):
    from experiments.pages import beside_others

    file = tmp_path / "models.csv"
    first = pd.DataFrame({"model": ["=1+1", "net", "-x"], "rho": [0.123456, -1.5, 2.0]})
    write_csv(file, first, "%.3g")
    assert file.read_text() == "model,rho\n'=1+1,0.123\nnet,-1.5\n'-x,2\n"
    again = beside_others(file, pd.DataFrame({"model": ["=1+1"], "rho": [9.0]}), ["model"])
    assert again.model.tolist() == ["net", "-x", "=1+1"]


def test_no_experiment_writes_a_table_without_the_guard():
    for file in (ROOT / "experiments").rglob("*.py"):
        assert ".to_csv(" not in file.read_text(), file
