"""Which runs lie below folders, which of two attempts counts, and what is missing of a layer."""

import shutil

from helpers.made_runs import LAYERS, gather_from, make_run

from pattern_bench.reporting.tables import rho_table


def test_a_run_that_lies_in_wandbs_folder_too_is_one_run(tmp_path):
    run = make_run(tmp_path / "run", run_id="abcd1234", overrides=["estimator=a"])
    copy = run / "wandb" / "offline-run-20260101_000000-abcd1234" / "files" / "results"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("wandb", ".hydra"))
    (only,) = gather_from(tmp_path).runs
    assert only.folder == run.resolve()
    assert only.overrides == ("estimator=a",)


def test_of_two_attempts_with_one_id_the_later_is_read(tmp_path):
    make_run(tmp_path / "old", run_id="abcd1234", ended="2026-01-01T00:00:00+00:00")
    make_run(tmp_path / "new", run_id="abcd1234", ended="2026-01-02T00:00:00+01:00", seed=1)
    (only,) = gather_from(tmp_path).runs
    assert only.folder.name == "new"


def test_without_ids_what_runs_hold_tells_them_apart(tmp_path):
    run = make_run(tmp_path / "run")
    shutil.copytree(run, tmp_path / "copy")
    make_run(tmp_path / "other", estimator="w")
    assert len(gather_from(tmp_path).runs) == 2
    # A folder that is given twice, too.
    assert len(gather_from(tmp_path, tmp_path / "other").runs) == 2


def test_a_layer_that_one_estimator_lacks_is_missing_and_one_without_residual_is_not(tmp_path):
    make_run(tmp_path / "w", estimator="w")
    make_run(tmp_path / "a", estimator="a", layers={"features.0": 8})
    make_run(tmp_path / "x", estimator="x")
    gathered = gather_from(tmp_path)
    table = rho_table(gathered.rho, gathered.bootstrap, gathered.missing_cells)
    status = {(row.estimator, row.layer): row.status for row in table.itertuples()}
    assert status["a", "features.2"] == status["a", "classifier"] == "missing"
    assert {status["x", layer] for layer in LAYERS} == {"undefined"}
    assert list(status.values()).count("complete") == 4
    # In the order of the paper's estimators and the network's layers.
    assert list(status)[:3] == [("x", "features.0"), ("w", "features.0"), ("a", "features.0")]
