"""The table of a sweep in the terminal."""

import io

import pandas as pd
from rich.console import Console

from pattern_bench.reporting import tables
from pattern_bench.reporting.console import show as show_report

SMALL = ["data.limit=300", "model.training.epochs=2", "degradation.images=6", "explanation.images=2"]


def test_a_sweeps_table_has_every_cell_and_says_which_are_missing():
    rows = []
    for estimator, values in {"a": [0.9, 0.8, 0.1], "x": [None, None, None]}.items():
        for index, layer in enumerate(["conv1", "conv2"]):
            if (layer, estimator) != ("conv2", "a"):
                rows += [
                    {"model": "m", "data": "d", "criterion": "all", "probe": "sgd", "layer": layer,
                     "layer_index": index, "estimator": estimator, "rho": value} for value in values
                ]  # fmt: skip
    missing = [("m", "d", "all", "sgd", "conv2", "a"), ("m", "d", "all", "sgd", "conv1", "w")]
    curves = pd.DataFrame(
        {"model": "m", "data": "d", "estimator": "a", "method": "pattern_net", "step": [0, 1, 2],
         "probability_mean": [1.0, 0.5, 0.3]}
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=100)
    rho = pd.DataFrame(rows).astype({"rho": float}).assign(dead=False)
    table = tables.rho_table(rho, pd.DataFrame(), missing)
    show_report(table, tables.areas(curves), [("m", "d", "w", "pattern_net")], console)
    lines = [line.split() for line in console.file.getvalue().splitlines() if line.strip()]
    assert ["layer", "S_x", "S_w", "S_a"] in lines
    assert ["conv1", "–", "missing", "0.800"] in lines
    assert ["conv2", "–", "missing"] in lines
    assert ["m", "d", "PatternNet,", "S_a", "0.400"] in lines
    assert ["m", "d", "PatternNet,", "S_w", "missing"] in lines
