"""Tables that are written keep their names and columns."""

import pandas as pd
import pytest

from pattern_bench.reporting.runs import _table
from pattern_bench.reporting.tables import write_table
from pattern_bench.results.schema import RHO_COLUMNS, write_csv


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
