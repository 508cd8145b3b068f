"""The report's command on run folders: what is found, what wins, what is missing, and what it says."""

import json
import random
import resource
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from helpers.damage import cut, flip, grow, remove
from helpers.made_runs import LAYERS, hydra, make_run, make_sweep

from pattern_bench.commands.report import main
from pattern_bench.errors import UserError
from pattern_bench.reporting.gathering import gather
from pattern_bench.reporting.sections import report_sections
from pattern_bench.reporting.tables import rho_table


@pytest.fixture
def report(tmp_path, capsys):
    """Runs the command; returns the folder that it wrote, and what it said."""

    def run(*arguments):
        output = tmp_path / "report"
        main([*map(str, arguments), "--output", str(output)])
        return output, capsys.readouterr().out

    return run


# --- which runs there are ---


def test_a_wandb_project_is_downloaded_and_read(tmp_path, monkeypatch, report):
    asked = []

    def download(project, into):
        asked.append(project)
        make_run(into / "abcd1234", run_id="abcd1234")

    monkeypatch.setattr("pattern_bench.tracking.wandb_server.download", download, raising=False)
    output, said = report("wandb://me/patterns")
    assert asked == ["me/patterns"]
    assert said.startswith("1 run\n")
    page = (output / "index.html").read_text()
    assert "wandb://me/patterns" in page
    assert "pattern_bench-" not in page  # the folder that it was downloaded into

    def refused(project, into):
        raise UserError("no key")

    monkeypatch.setattr("pattern_bench.tracking.wandb_server.download", refused, raising=False)
    with pytest.raises(SystemExit, match=r"^error: no key$"):
        main(["wandb://me/patterns"])


def test_what_is_no_run_is_refused(tmp_path):
    hydra(tmp_path / "begun", ["estimator=a"])
    for folder, message in ((tmp_path / "no", "is not a folder"), (tmp_path, "holds no complete run")):
        with pytest.raises(SystemExit, match=message):
            main([str(folder)])
    with pytest.raises(SystemExit, match="2"):
        main([])


# --- which numbers win ---


def test_the_latest_run_has_the_cell_and_what_it_replaced_is_named(tmp_path, report):
    make_run(tmp_path / "runs" / "late", seed=1, ended="2026-01-03T00:00:00+00:00")
    make_run(tmp_path / "runs" / "early", seed=0, ended="2026-01-02T00:00:00+00:00")
    output, said = report(tmp_path / "runs")
    assert "3 cells and 0 curves of earlier runs replaced" in said
    assert f"{tmp_path}/runs/late instead of {tmp_path}/runs/early: 3" in said
    assert "(other: seed)" in said
    table, early, late = (
        pd.read_csv(file)
        for file in (output / "fig3.csv", *(tmp_path / "runs" / name / "rho.csv" for name in ("early", "late")))
    )
    conflicts = pd.read_csv(output / "conflicts.csv")
    for layer in LAYERS:
        mean = late[late.layer == layer].rho.mean()
        assert table[table.layer == layer]["mean"].item() == pytest.approx(mean)
        row = conflicts[conflicts.layer == layer].iloc[0]
        assert (row.kept_mean, row.replaced_mean) == pytest.approx((mean, early[early.layer == layer].rho.mean()))
        assert row.settings == "seed"
    assert "early" in (output / "index.html").read_text()


def test_what_agrees_is_no_conflict_and_keeps_its_resamples(tmp_path, report):
    make_run(tmp_path / "drawn", resamples=10, ended="2026-01-01T00:00:00+00:00")
    make_run(tmp_path / "plain", method="gradient", ended="2026-01-02T00:00:00+00:00")
    # Sums in another order: the sixth digit.
    table = pd.read_csv(tmp_path / "plain" / "rho.csv")
    table.assign(rho=table.rho * (1 + 3e-6)).to_csv(tmp_path / "plain" / "rho.csv", index=False)
    output, said = report(tmp_path / "drawn", tmp_path / "plain")
    assert "replaced" not in said
    assert pd.read_csv(output / "conflicts.csv").empty
    assert pd.read_csv(output / "fig3.csv").standard_error_mean.notna().all()


# --- what is missing ---


def test_missing_jobs_are_rows_of_the_figures_and_have_a_command(tmp_path, report):
    sweep = make_sweep(
        tmp_path / "sweep", ["estimator=w,a,x", "model=small_vgg"],
        own=["hydra/launcher=joblib", f"hydra.sweep.dir={tmp_path}/sweep"],
    )  # fmt: skip
    make_run(sweep / "0", model="small_vgg", estimator="w", overrides=["estimator=w", "model=small_vgg"])
    hydra(sweep / "1", ["estimator=a", "model=small_vgg"])
    make_run(tmp_path / "other", model="small_vgg", estimator="random")
    output, said = report(sweep, tmp_path / "other")
    assert "missing: 2 jobs\n" in said
    command = (
        "python -m pattern_bench -m estimator=w,a,x model=small_vgg hydra/launcher=joblib "
        f"hydra.sweep.dir={tmp_path}/sweep"
    )
    assert said.count(command) == 1
    table = pd.read_csv(output / "fig3.csv")
    missing = table[table.status == "missing"]
    assert set(zip(missing.estimator, missing.layer, strict=True)) == {(e, n) for e in ("a", "x") for n in LAYERS}
    assert missing[["mean", "median", "neurons"]].isna().all(axis=None)
    assert (table[table.estimator == "w"].status == "complete").all()
    curves = pd.read_csv(output / "fig4a.csv")
    assert curves["a"].isna().all()
    lines = (output / "fig4a.md").read_text().splitlines()
    column = [name.strip() for name in lines[0].split("|")].index("a")
    assert {line.split("|")[column].strip() for line in lines[2:]} == {"missing"}
    listed = pd.read_csv(output / "missing.csv")
    assert listed.command.dropna().unique().tolist() == [command]
    assert listed.overrides.dropna().tolist() == ["estimator=a model=small_vgg", "estimator=x model=small_vgg"]
    assert len(listed) == 2 + 6 + 2
    text = (output / "index.html").read_text()
    assert "S<sub>a</sub>, PatternAttribution: missing" in text
    assert command.replace("'", "&#39;") in text


def test_a_run_that_was_begun_outside_a_sweep_is_listed_with_what_resumes_it(tmp_path, report):
    make_run(tmp_path / "done")
    hydra(tmp_path / "begun", ["estimator=w"])
    hydra(tmp_path / "picture", ["figure=fig1"], "gallery")
    hydra(tmp_path / "foreign", [], "another_program")
    _, said = report(tmp_path)
    assert "missing: 2 jobs\n" in said
    assert f"python -m pattern_bench resume={tmp_path}/begun" in said
    assert f"python -m pattern_bench.gallery resume={tmp_path}/picture" in said


@pytest.mark.slow
def test_missing_cells_of_a_real_sweep(command, tmp_path):
    """Two of its jobs fail, since there is no such criterion."""
    few = ["logger=none", "data.limit=300", "model.training.epochs=4", "degradation.images=8"]
    done = command("-m", "estimator=w,a", "criterion=all,most", *few, "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    done = command("sweep", module="pattern_bench.report")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "report" / "fig3.csv")
    assert table.groupby(["criterion", "estimator"]).status.agg("first").to_dict() == {
        ("all", "w"): "complete", ("all", "a"): "complete", ("most", "w"): "missing", ("most", "a"): "missing",
    }  # fmt: skip
    assert len(table) == 4 * 6


# --- damage ---


@pytest.mark.slow
def test_of_mutated_run_folders_each_gives_a_report_or_one_error(tmp_path):
    """The slow part of the report, its pictures, apart: they are drawn of what these read."""
    sweep = make_sweep(tmp_path / "good" / "sweep", ["estimator=w,a"])
    make_run(sweep / "0", estimator="w", overrides=["estimator=w"], resamples=3, picture=True)
    hydra(sweep / "1", ["estimator=a"])
    make_run(tmp_path / "good" / "x", estimator="x", run_id="abcd1234")
    gallery = tmp_path / "good" / "gallery"
    hydra(gallery, ["figure=fig5"], "gallery")
    about = {"model": "net", "data": "digits", "figure": "fig5", "images": [{"true": "1"}], "columns": [{"key": "a"}]}
    (gallery / "gallery.json").write_text(json.dumps(about))
    shutil.copy(sweep / "0" / "explanations.png", gallery / "fig5.png")
    files = sorted(p.relative_to(tmp_path / "good") for p in (tmp_path / "good").rglob("*") if p.is_file())
    draw = random.Random(0)
    outcomes = []
    for case in range(100):
        folder = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", folder)
        for name in draw.sample(files, draw.choice((1, 1, 2))):
            content = (folder / name).read_bytes()
            mutate = draw.choice((flip, cut, grow, remove, swap))
            (folder / name).write_bytes(mutate(draw, content, b"") if content else b"")
        try:
            gathered = gather([(folder, "bad")])
            rho = rho_table(gathered.rho, gathered.bootstrap, gathered.missing_cells)
            report_sections(gathered, rho, "")
            outcomes.append("a report")
        except UserError as error:
            outcomes.append("an error" if "\n" not in str(error) else f"case {case}: {error}")
        shutil.rmtree(folder)
    assert set(outcomes) == {"a report", "an error"}
    assert min(map(outcomes.count, set(outcomes))) > 10


def swap(draw, content, other):
    """One value of a text for another that may be of another type."""
    values = [b"null", b"-1", b"1e400", b"[]", b"{}", b'"x"', b"true", b"nan", b"", b"*a", b"${x}", b"2026-13-45"]
    words = content.replace(b",", b" , ").replace(b"\n", b" \n ").split(b" ")
    words[draw.randrange(len(words))] = draw.choice(values)
    return b" ".join(words).replace(b" , ", b",").replace(b" \n ", b"\n")


# --- much ---


def test_the_command_starts_without_torch():
    """Which takes longer to import than most reports to write."""
    code = "import sys, pattern_bench.report; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "torchvision", "pytorch_lightning", "wandb"} & set(done.stdout.split())


@pytest.mark.very_slow
def test_a_million_neurons_stay_below_two_gibibytes(tmp_path, capsys):
    """And takes as long as it says, with -s."""
    layers = {f"layer{i}": 500 for i in range(20)}
    for model in range(5):
        for criterion in ("all", "rectified", "positive", "other"):
            for estimator in ("random", "w", "a", "a_plus_minus", "mine"):
                make_run(
                    tmp_path / "runs" / f"{model}-{criterion}-{estimator}", model=f"model{model}", layers=layers,
                    criterion=criterion, estimator=estimator, steps=100,
                )  # fmt: skip
    code = (
        "import time, resource; start = time.perf_counter(); "
        "from pattern_bench.commands.report import main; main(['runs']); "
        "print(f'{time.perf_counter() - start:.1f} s')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    with capsys.disabled():
        print(f"\n1,000,000 rows of 100 runs: {done.stdout.splitlines()[-1]}, {peak:.2f} GiB")
    assert peak < 2
    assert len(pd.read_csv(tmp_path / "report" / "fig3.csv")) == 2000
