"""Tables that are written keep their names and columns."""

import numpy as np
import pandas as pd
import pytest
from helpers.made_runs import gather_from, make_run

from pattern_bench.reporting.runs import _table
from pattern_bench.reporting.tables import errors_over_layers, overview, write_table
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


def test_standard_errors_over_all_layers_are_those_of_the_weighted_mean(tmp_path):
    make_run(tmp_path, resamples=15)
    gathered = gather_from(tmp_path)
    drawn, rho = (pd.read_csv(tmp_path / name) for name in ("bootstrap.csv", "rho.csv"))
    live = rho.groupby("layer").rho.count()
    means = [
        sum(rows.set_index("layer")["mean"][layer] * live[layer] for layer in live.index) / live.sum()
        for _, rows in drawn.groupby("resample")
    ]
    errors = errors_over_layers(gathered.rho, gathered.bootstrap)
    assert errors.item() == pytest.approx(np.std(means, ddof=1))
    (line, _) = overview(gathered)
    assert (line.mean, line.error) == pytest.approx((rho.rho.mean(), np.std(means, ddof=1)))
    assert line.areas["pattern_attribution"] == pytest.approx((0.3, 0.25, 0.35))
    # A layer that was not drawn again makes the whole unknown.
    partial = gathered.bootstrap[gathered.bootstrap.layer != "classifier"]
    assert errors_over_layers(gathered.rho, partial).isna().all()
