"""Estimators are compared over the neurons that are live under all of them; a run's own files keep its own."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers.made_runs import LAYERS, gather_from, make_run
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pattern_bench.commands.report import main
from pattern_bench.reporting import console
from pattern_bench.reporting.changes import change_table, changes
from pattern_bench.reporting.gathering import gather
from pattern_bench.reporting.tables import areas, overview, rho_table
from pattern_bench.results.schema import LAYER, of_same_neurons

DEAD = {"random": [], "w": [], "a": [1], "a_plus_minus": [1, 4], "mine": [0]}
LOW = -3.0
"""ρ of neurons that are dead under some estimator, under the others: what is averaged with it shows."""


def make(root, dead=None, low=True, **common):
    """A run of each estimator, with its own dead neurons; x, which has no ρ, too."""
    dead = DEAD if dead is None else dead
    for estimator, dies in {**dead, "x": []}.items():
        folder = make_run(root / estimator, estimator=estimator, dead=dies, **common)
        if low:
            table = pd.read_csv(folder / "rho.csv")
            unlike = table.neuron.isin(set().union(*dead.values())) & table.rho.notna()
            table.assign(rho=table.rho.mask(unlike, LOW)).to_csv(folder / "rho.csv", index=False)
    return root


def own(root):
    """All rows of ρ, as the runs wrote them."""
    return pd.concat([pd.read_csv(file) for file in sorted(root.rglob("rho.csv"))], ignore_index=True)


def brute(rows, within, keys):
    """ρ of each ``keys``, of the neurons that have one under every estimator that has any among the same ``within``:
    rows one by one, in plain Python."""
    live = {}
    for row in rows.to_dict("records"):
        if row["rho"] == row["rho"]:
            place = tuple(row[key] for key in within)
            live.setdefault(place, {}).setdefault(row["estimator"], {})[row["layer"], row["neuron"]] = row
    kept = {}
    for estimators in live.values():
        shared = set.intersection(*(set(neurons) for neurons in estimators.values()))
        for neurons in estimators.values():
            for place, row in neurons.items():
                cell = kept.setdefault(tuple(row[key] for key in keys), [])
                cell += [row["rho"]] if place in shared else []
    return kept


# --- the mechanism ---


ROWS = st.lists(
    st.tuples(st.sampled_from("pq"), st.sampled_from("kl"), st.sampled_from("xyz"), st.integers(0, 4), st.booleans()),
    unique_by=lambda row: row[:4],
    max_size=50,
)


@settings(max_examples=80, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_it_is_the_intersection_whatever_the_order_of_rows(rows, shuffle):
    shuffle.shuffle(rows)
    table = pd.DataFrame(rows, columns=["probe", "layer", "estimator", "neuron", "has"])
    table = table.assign(
        model="m", data="d", criterion="all", rho=np.where(table.has, np.arange(len(rows)) + 0.5, np.nan)
    )
    for within in (LAYER, LAYER[:4]):
        compared = of_same_neurons(table, within)
        assert compared.drop(columns="rho").equals(table.drop(columns="rho"))
        left = {key: sorted(cell.rho.dropna()) for key, cell in compared.groupby(["probe", "layer", "estimator"])}
        expected = brute(table, within, ["probe", "layer", "estimator"])
        assert left == {key: sorted(expected.get(key, [])) for key in left}
        # Once more changes nothing.
        assert of_same_neurons(compared, within).equals(compared)


def test_a_neuron_that_a_damaged_file_names_twice_is_one():
    names = {"model": "m", "data": "d", "criterion": "all", "probe": "p", "layer": "l"}
    rows = [("a", 0), ("a", 1), ("a", 1), ("w", 0), ("w", 2)]
    table = pd.DataFrame([{**names, "estimator": who, "neuron": neuron, "rho": 0.5} for who, neuron in rows])
    compared = of_same_neurons(table).dropna(subset=["rho"])
    assert compared[["estimator", "neuron"]].to_numpy().tolist() == [["a", 0], ["w", 0]]


def test_rows_without_numbers_are_neurons_in_their_order():
    names = {"model": "m", "data": "d", "criterion": "all", "probe": "p", "layer": "l"}
    table = pd.DataFrame({"estimator": ["a", "a", "w", "w"], "rho": [0.1, np.nan, 0.2, 0.3]}).assign(**names)
    compared = of_same_neurons(table)
    assert compared.rho.tolist() == pytest.approx([0.1, np.nan, 0.2, np.nan], nan_ok=True)
    assert "neuron" not in compared


# --- Fig. 3 ---


def test_fig3_is_over_the_neurons_that_are_live_under_all_estimators(tmp_path, capsys):
    make(tmp_path / "runs")
    rows = own(tmp_path / "runs")
    main([str(tmp_path / "runs"), "--output", str(tmp_path / "report")])
    table = pd.read_csv(tmp_path / "report" / "fig3.csv")
    expected = brute(rows, ["layer"], ["layer", "estimator"])
    alone = rows.groupby(["layer", "estimator"]).rho
    for row in table.itertuples():
        key = (row.layer, row.estimator)
        assert row.neurons == LAYERS[row.layer]
        if row.estimator == "x":
            assert (row.status, row.left_out, row.dead) == ("undefined", 0, 0)
            continue
        values = expected[key]
        assert len(values) == LAYERS[row.layer] - 3
        assert (row.mean, row.median) == pytest.approx((np.mean(values), np.median(values)))
        assert (row.q25, row.q75) == pytest.approx(tuple(np.quantile(values, [0.25, 0.75])))
        assert row.dead == len(DEAD[row.estimator])
        assert row.left_out == row.neurons - row.dead - len(values)
        # Over its own live neurons, it would have been another: what is left out has a low ρ.
        assert row.mean > alone.mean()[key] + 0.3
    assert table.columns[-1] == "left_out"
    out = int(table.left_out.sum())
    assert out == 3 * (3 + 3 + 2 + 1 + 2)
    assert f"{out} values of other live ones are left out, in 15 cells" in capsys.readouterr().out
    markdown = (tmp_path / "report" / "fig3.md").read_text()
    assert f"{table['mean'][table.estimator == 'w'].iloc[0]:.4f}" in markdown
    page = (tmp_path / "report" / "index.html").read_text()
    assert "left out in 15 of 18 values" in page
    assert "11 of 25 live neurons are left out" not in page
    assert "9 of 25 live neurons are left out: another estimator has no ρ for them" in page


def test_where_all_have_the_same_neurons_nothing_is_left_out_or_said(tmp_path, capsys):
    make(tmp_path / "runs", dead={name: [2] for name in DEAD}, low=False)
    main([str(tmp_path / "runs"), "--output", str(tmp_path / "report")])
    table = pd.read_csv(tmp_path / "report" / "fig3.csv")
    assert (table.left_out == 0).all()
    alone = own(tmp_path / "runs").groupby(["layer", "estimator"]).rho.mean()
    assert [alone[row.layer, row.estimator] for row in table.itertuples()] == pytest.approx(
        table["mean"].tolist(), nan_ok=True
    )
    assert "left out" not in capsys.readouterr().out
    assert "none is left out" in (tmp_path / "report" / "index.html").read_text()


def test_one_estimator_alone_keeps_its_own(tmp_path):
    make_run(tmp_path / "run", estimator="a_plus_minus", dead=[1, 4], resamples=5)
    table = rho_table(*(lambda g: (g.rho, g.bootstrap))(gather_from(tmp_path)))
    alone = own(tmp_path).groupby("layer").rho.mean()
    assert table["mean"].tolist() == pytest.approx([alone[layer] for layer in table.layer])
    assert (table.left_out == 0).all()


def test_tables_do_not_depend_on_the_order_of_runs(tmp_path):
    dead = {"w": [], "a": [1], "a_plus_minus": [1, 4]}
    for criterion, layers in (("all", LAYERS), ("rectified", {"features.0": 8})):
        make(tmp_path / criterion, dead=dead, layers=layers, criterion=criterion)
    make_run(tmp_path / "again" / "a", estimator="a", dead=[2], seed=1)  # ends when the others do
    folders = sorted(file.parent for file in tmp_path.rglob("summary.json"))
    orders = [folders, folders[::-1], folders[3:] + folders[:3]]
    made = []
    for order in orders:
        gathered = gather([(folder, str(folder.relative_to(tmp_path))) for folder in order])
        made.append((rho_table(gathered.rho, gathered.bootstrap, gathered.missing_cells), overview(gathered)))
    for table, lines in made[1:]:
        pd.testing.assert_frame_equal(table, made[0][0])
        assert [repr(line) for line in lines] == [repr(line) for line in made[0][1]]


def test_criteria_and_probes_are_tables_of_their_own(tmp_path):
    make_run(tmp_path / "w", estimator="w", dead=[])
    make_run(tmp_path / "a", estimator="a", dead=[1])
    make_run(tmp_path / "rectified", estimator="w", dead=[], criterion="rectified")
    make_run(tmp_path / "other", estimator="a_plus_minus", dead=[3], model="other")
    descent = make_run(tmp_path / "descent", estimator="a_plus_minus", dead=[5])
    table = pd.read_csv(descent / "rho.csv").assign(probe="sgd")
    table.to_csv(descent / "rho.csv", index=False)
    summary = json.loads((descent / "summary.json").read_text())
    (descent / "summary.json").write_text(json.dumps({**summary, "probe": "sgd"}))
    gathered = gather_from(tmp_path)
    table = rho_table(gathered.rho, gathered.bootstrap).set_index(["model", "criterion", "probe", "estimator"]).left_out
    assert (table["net", "all", "closed_form", "w"] == 1).all()
    assert table.sum() == 3


def test_of_measured_neurons_those_are_compared_that_all_estimators_measured(tmp_path):
    """Under ``positive`` the closed form measures some neurons of each layer."""
    measured = {"w": [0, 2, 3, 5], "a": [0, 1, 2, 3], "a_plus_minus": [0, 2, 3, 4]}
    for estimator, neurons in measured.items():
        run = make_run(
            tmp_path / estimator, estimator=estimator, criterion="positive", layers={"features.0": 8}, dead=[3]
        )
        table = pd.read_csv(run / "rho.csv")
        table[table.neuron.isin(neurons)].to_csv(run / "rho.csv", index=False)
    rows = own(tmp_path)
    table = rho_table(*(lambda g: (g.rho, g.bootstrap))(gather_from(tmp_path)))
    for row in table.itertuples():
        values = rows[(rows.estimator == row.estimator) & rows.neuron.isin([0, 2])].rho
        assert (row.mean, row.neurons, row.dead, row.left_out) == (pytest.approx(values.mean()), 4, 1, 1)


def test_a_layer_that_is_dead_under_one_estimator_is_undefined_for_it_and_out_of_the_mean_of_all_layers(tmp_path):
    make_run(tmp_path / "w", estimator="w", dead=[])
    make_run(tmp_path / "a", estimator="a", dead=range(6))  # all five of the classifier
    make_run(tmp_path / "x", estimator="x")
    gathered = gather_from(tmp_path)
    table = rho_table(gathered.rho, gathered.bootstrap).set_index(["estimator", "layer"])
    assert table.status["a", "classifier"] == "undefined"
    assert (table.status["w", "classifier"], table.left_out["w", "classifier"]) == ("complete", 0)
    rows = own(tmp_path)
    lines = {line.names[4]: line for line in overview(gathered)}
    for estimator in ("w", "a"):
        values = rows[(rows.estimator == estimator) & (rows.layer != "classifier") & (rows.neuron >= 6)].rho
        assert lines[estimator].mean == pytest.approx(values.mean())
        assert lines[estimator].neurons == len(values) == 2 + 6
    assert (lines["w"].left_out, lines["a"].left_out) == (25 - 8, 0)
    assert np.isnan(lines["x"].mean)


def test_without_a_neuron_that_all_have_there_is_no_value(tmp_path):
    for estimator, dead in (("w", [0, 1]), ("a", [2, 3, 4])):
        make_run(tmp_path / estimator, estimator=estimator, dead=dead, layers={"classifier": 5})
    gathered = gather_from(tmp_path)
    table = rho_table(gathered.rho, gathered.bootstrap)
    assert table.status.tolist() == ["undefined"] * 2
    assert table.left_out.tolist() == [3, 2]
    main([str(tmp_path), "--output", str(tmp_path / "report")])
    assert "live under all estimators, ρ is not defined" in (tmp_path / "report" / "index.html").read_text()


def test_the_mean_of_all_layers_is_over_layers_that_all_estimators_have(tmp_path):
    make_run(tmp_path / "w", estimator="w", dead=[], resamples=6)
    make_run(tmp_path / "a", estimator="a", dead=[1], layers={"features.0": 8, "features.2": 12}, resamples=6)
    rows = own(tmp_path)
    lines = {line.names[4]: line for line in overview(gather_from(tmp_path))}
    for estimator in ("w", "a"):
        mine = rows[(rows.estimator == estimator) & (rows.layer != "classifier") & (rows.neuron != 1)]
        assert lines[estimator].mean == pytest.approx(mine.rho.mean())
        drawn = pd.read_csv(tmp_path / estimator / "bootstrap.csv").pivot(
            index="resample", columns="layer", values="mean"
        )
        # Resamples are of all live neurons; layers count as in the mean.
        error = (7 * drawn["features.0"] + 11 * drawn["features.2"]).div(18).std()
        assert lines[estimator].error == pytest.approx(error)
    assert (lines["w"].left_out, lines["a"].left_out, lines["a"].lacking) == (1 + 1 + 5, 0, 1)


def test_a_sweeps_table_in_the_terminal(tmp_path):
    make(tmp_path)
    gathered = gather_from(tmp_path)
    table = rho_table(gathered.rho, gathered.bootstrap, gathered.missing_cells)
    terminal = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.show(table, areas(gathered.degradation), [], terminal)
    said = terminal.export_text()
    medians = brute(own(tmp_path), ["layer"], ["layer", "estimator"])
    line = next(line.split() for line in said.splitlines() if line.strip().startswith("features.2"))
    order = ["random", "w", "a", "a_plus_minus", "mine"]
    assert [word for word in line[1:] if word != "–"] == [f"{np.median(medians['features.2', e]):.3f}" for e in order]
    out = "9 of 25 of random, 9 of 25 of S_w, 6 of 25 of S_a, 3 of 25 of S_a+-, 6 of 25 of mine"
    assert f"over the neurons live under all estimators; left out: {out}" in said


# --- A and B ---


def compared(a, b):
    return change_table(changes(gather_from(a), gather_from(b)))


def test_a_and_b_are_compared_over_the_neurons_that_are_live_in_both(tmp_path):
    a = make(tmp_path / "a", {"w": [], "a": [1]}, low=False)
    b = make(tmp_path / "b", {"w": [2], "a": [4], "a_plus_minus": [0]}, low=False, better=0.1, seed=1)
    table = compared(a, b)
    rho = table[(table.quantity == "rho") & table.estimator.isin(["w", "a"])]
    sides = [own(side) for side in (a, b)]
    for row in rho.itertuples():
        values = []
        for side in sides:
            mine = side[(side.estimator == row.estimator) & ~side.neuron.isin([0, 1, 2, 4])]
            values.append(mine if row.layer == "all layers" else mine[mine.layer == row.layer])
        assert (row.a, row.b) == pytest.approx(tuple(value.rho.mean() for value in values))
        assert row.interval == "neurons, paired bootstrap"
        # Live in A or in B, and not compared.
        assert row.left_out == 4 * (3 if row.layer == "all layers" else 1)
    assert table.left_out[table.quantity != "rho"].isna().all()
    main(["--compare", str(a), str(b), "--output", str(tmp_path / "out")])
    assert "left out" in (tmp_path / "out" / "compare.md").read_text()
    assert list(pd.read_csv(tmp_path / "out" / "compare.csv").columns)[-1] == "left_out"


def test_different_networks_have_their_own_neurons(tmp_path):
    a = make(tmp_path / "a", {"w": [], "a": [1]}, low=False, model="old")
    wide = {name: 2 * neurons for name, neurons in LAYERS.items()}
    b = make(tmp_path / "b", {"w": [2, 3], "a": []}, low=False, model="new", layers=wide)
    table = compared(a, b)
    rho = table[(table.quantity == "rho") & table.estimator.isin(["w", "a"])]
    for row in rho.itertuples():
        for value, folder, out in ((row.a, a, [1]), (row.b, b, [2, 3])):
            side = own(folder)
            mine = side[(side.estimator == row.estimator) & ~side.neuron.isin(out)]
            assert value == pytest.approx(mine[mine.layer.eq(row.layer) | (row.layer == "all layers")].rho.mean())
        assert row.interval == "neurons, unpaired bootstrap"
        assert row.left_out == (1 if row.estimator == "w" else 2) * (3 if row.layer == "all layers" else 1)


def test_measured_neurons_of_one_network_are_paired_and_of_another_are_not(tmp_path):
    for name, neurons, epochs in (("a", [0, 2, 3, 5], 1), ("b", [0, 1, 2, 3, 6], 1), ("other", [0, 1, 2, 3, 6], 2)):
        run = make_run(
            tmp_path / name, criterion="positive", layers={"features.0": 8}, dead=[3], seed=len(neurons),
            settings={"model": {"name": "net", "epochs": epochs}},
        )  # fmt: skip
        table = pd.read_csv(run / "rho.csv")
        table[table.neuron.isin(neurons)].to_csv(run / "rho.csv", index=False)
    row = compared(tmp_path / "a", tmp_path / "b").iloc[0]
    sides = [own(tmp_path / name).set_index("neuron").rho for name in ("a", "b")]
    assert (row.a, row.b) == pytest.approx(tuple(side[[0, 2]].mean() for side in sides))
    assert (row.interval, row.left_out) == ("neurons, paired bootstrap", 3)
    row = compared(tmp_path / "a", tmp_path / "other").iloc[0]
    assert (row.a, row.b) == pytest.approx(tuple(side.mean() for side in sides))
    assert (row.interval, row.left_out) == ("neurons, unpaired bootstrap", 0)


def test_layers_that_one_side_lacks_are_out_of_the_comparison_of_all_layers(tmp_path):
    make_run(tmp_path / "a", layers={"features.0": 8, "classifier": 5}, settings={"model": {"name": "net"}})
    make_run(tmp_path / "b", layers={"features.0": 8}, better=0.1, settings={"model": {"name": "net"}})
    table = compared(tmp_path / "a", tmp_path / "b")
    whole = table.iloc[0]
    assert (whole.layer, whole.interval, whole.left_out) == ("all layers", "neurons, paired bootstrap", 5)
    assert whole.difference == pytest.approx(0.1)
    assert table.set_index("layer").verdict["classifier"] == "missing in B"


def test_intervals_over_images_say_where_their_resamples_are_of_more_neurons(tmp_path):
    make_run(tmp_path / "a", resamples=12, dead=[1])
    make_run(tmp_path / "b", resamples=12, dead=[1], better=0.02)
    make_run(tmp_path / "c", resamples=12, dead=[2])
    assert set(compared(tmp_path / "a", tmp_path / "b").interval[:4]) == {"images, paired resamples"}
    assert set(compared(tmp_path / "a", tmp_path / "c").interval[:4]) == {
        "images, paired resamples, with the neurons left out"
    }


def test_a_runs_own_files_keep_its_own_neurons(run_job):
    """Whatever lies beside it: the summary of a run is over all of its own live neurons."""
    few = ["data.limit=120", "model.training.epochs=1", "layer=classifier.*"]
    folders = [run_job(*few, f"estimator={name}") for name in ("w", "a_plus_minus")]
    gathered = gather_from(*folders)
    table = rho_table(gathered.rho, gathered.bootstrap).set_index(["estimator", "layer"])
    out = 0
    for folder, estimator in zip(folders, ("w", "a_plus_minus"), strict=True):
        mine = pd.read_csv(folder / "rho.csv").groupby("layer").rho
        for layer in json.loads((folder / "summary.json").read_text())["rho"]["layers"]:
            assert layer["mean"] == pytest.approx(mine.mean()[layer["layer"]])
            cell = table.loc[(estimator, layer["layer"])]
            out += cell.left_out
            assert cell.left_out == layer["neurons"] - layer["dead"] - _shared(folders, layer["layer"])
    assert out > 0  # so that this network has neurons that never fire


def _shared(folders, layer):
    tables = [pd.read_csv(folder / "rho.csv") for folder in folders]
    live = [set(table[(table.layer == layer) & table.rho.notna()].neuron) for table in tables]
    return len(set.intersection(*live))
