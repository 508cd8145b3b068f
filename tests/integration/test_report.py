"""The report's command on run folders: what is found, what wins, what is missing, and what it says."""

import json
import random
import resource
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers.damage import cut, flip, grow, remove
from helpers.made_runs import LAYERS, hydra, make_run, make_sweep

from pattern_bench.commands.report import main
from pattern_bench.errors import UserError
from pattern_bench.reporting.gathering import gather
from pattern_bench.reporting.runs import read_settings
from pattern_bench.reporting.sections import report_sections
from pattern_bench.reporting.sweeps import expected_names, read_sweep
from pattern_bench.reporting.tables import errors_over_layers, overview, rho_table


@pytest.fixture
def report(tmp_path, capsys):
    """Runs the command; returns the folder that it wrote, and what it said."""

    def run(*arguments):
        output = tmp_path / "report"
        main([*map(str, arguments), "--output", str(output)])
        return output, capsys.readouterr().out

    return run


def found(*folders):
    return gather([(folder, folder.name) for folder in folders])


# --- which runs there are ---


def test_a_run_that_lies_in_wandbs_folder_too_is_one_run(tmp_path):
    run = make_run(tmp_path / "run", run_id="abcd1234", overrides=["estimator=a"])
    copy = run / "wandb" / "offline-run-20260101_000000-abcd1234" / "files" / "results"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("wandb", ".hydra"))
    (only,) = found(tmp_path).runs
    assert only.folder == run.resolve()
    assert only.overrides == ("estimator=a",)


def test_of_two_attempts_with_one_id_the_later_is_read(tmp_path):
    make_run(tmp_path / "old", run_id="abcd1234", ended="2026-01-01T00:00:00+00:00")
    make_run(tmp_path / "new", run_id="abcd1234", ended="2026-01-02T00:00:00+01:00", seed=1)
    (only,) = found(tmp_path).runs
    assert only.folder.name == "new"


def test_without_ids_what_runs_hold_tells_them_apart(tmp_path):
    run = make_run(tmp_path / "run")
    shutil.copytree(run, tmp_path / "copy")
    make_run(tmp_path / "other", estimator="w")
    assert len(found(tmp_path).runs) == 2
    # A folder that is given twice, too.
    assert len(found(tmp_path, tmp_path / "other").runs) == 2


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


def test_every_job_that_a_sweep_was_to_have_is_expected(tmp_path):
    task = ["estimator=w,a", "seed=range(0,3)", "layer='features.*'", "+sweep=x"]
    jobs = read_sweep(make_sweep(tmp_path, task)).jobs
    assert len(jobs) == 6
    assert jobs[1] == ("estimator=w", "seed=1", "layer='features.*'", "+sweep=x")
    # The command line wins over the sweeper's own parameters.
    jobs = read_sweep(make_sweep(tmp_path, ["model=linear"], {"model": "a,b", "estimator": "glob(a*)"})).jobs
    assert {frozenset(job) for job in jobs} == {
        frozenset({"model=linear", f"estimator={e}"}) for e in ("a", "a_plus_minus")
    }
    assert read_sweep(make_sweep(tmp_path, ["estimator=w,a"], sweeper="OptunaSweeper")).jobs is None


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


def test_a_layer_that_one_estimator_lacks_is_missing_and_one_without_residual_is_not(tmp_path):
    make_run(tmp_path / "w", estimator="w")
    make_run(tmp_path / "a", estimator="a", layers={"features.0": 8})
    make_run(tmp_path / "x", estimator="x")
    gathered = found(tmp_path)
    table = rho_table(gathered.rho, gathered.bootstrap, gathered.missing_cells)
    status = {(row.estimator, row.layer): row.status for row in table.itertuples()}
    assert status["a", "features.2"] == status["a", "classifier"] == "missing"
    assert {status["x", layer] for layer in LAYERS} == {"undefined"}
    assert list(status.values()).count("complete") == 4
    # In the order of the paper's estimators and the network's layers.
    assert list(status)[:3] == [("x", "features.0"), ("w", "features.0"), ("a", "features.0")]


def test_names_of_a_missing_job_are_those_that_it_would_have():
    names = expected_names(["data=toy", "estimator=w", "probe=both", "method=lrp_z", "degradation.order=least"])
    assert (names.model, names.data, names.estimator, names.probes) == ("linear", "toy", "w", ("closed_form", "sgd"))
    assert names.curve == ("none", "lrp_z, least relevant first")
    assert expected_names(["estimator=x"]).curve == ("x", "lrp_z")
    assert expected_names(["layer=features.0"]).curve is None
    assert expected_names(["estimator=none_such"]) is None
    # Nothing that it names is built, or even imported.
    assert expected_names(["allow_any_target=true", "estimator._target_=os.system"]).estimator == "a_plus_minus"


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


# --- the numbers ---


def test_standard_errors_over_all_layers_are_those_of_the_weighted_mean(tmp_path):
    make_run(tmp_path, resamples=15)
    gathered = found(tmp_path)
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


def test_settings_are_flat_and_bounded(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("a: {b: [1, x], c: null, d: [{e: true}]}\ncache: {dir: /home/me}\n")
    assert read_settings(file) == {"a.b": '[1, "x"]', "a.c": "null", "a.d[0].e": "true"}
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="more than"):
        read_settings(file)


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


@pytest.mark.parametrize(("file", "field", "wrongs"), [
    *(("summary.json", field, (None, 7, ["a"])) for field in ("run_id", "model", "data", "method", "probe")),
    *(("summary.json", field, (True, "0", 1.5, [])) for field in ("seed", "processes", "patch", "steps")),
    *(("summary.json", field, (True, "0.5", [], float("inf"))) for field in ("accuracy", "positions")),
    *(("summary.json", field, (None, [], {"a": "0.5"}, {"a": None}, {"a": True}, {"a": float("nan")}))
      for field in ("area_over_curve", "seconds", "images_per_second", "peak_memory_mib", "splits")),
    ("summary.json", "area_over_curve_interval", (None, [], [[0, 1]])), ("summary.json", "rho", (None, [], 0.5)),
    ("summary.json", "skipped", ([], {"a": 1})), ("summary.json", "versions", ({"torch": 2.1}, "2.1")),
    ("summary.json", "unreadable", (0, [1], "a")), ("summary.json", "signal_angle_degrees", (3, {"filter": "3"})),
    ("accuracy.json", "model", (7, None)), ("accuracy.json", "top5", (None, "1", 1.5, 0.1, True)),
])  # fmt: skip
def test_a_field_of_another_type_is_one_error_that_names_file_and_field(tmp_path, file, field, wrongs):
    make_run(tmp_path / "run", run_id="abcd1234", overrides=["estimator=a"])
    path = tmp_path / "run" / file
    good = json.loads(path.read_text())
    for wrong in (*wrongs, "x" * 9999 if field == "splits" else [["x" * 9999]]):
        path.write_text(json.dumps({**good, field: wrong}))
        with pytest.raises(UserError, match=rf"^the run in there/run is damaged \({file} gives {field} as ") as raised:
            gather([(tmp_path, "there")])
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 300
    path.write_text(json.dumps(good))
    gather([(tmp_path, "there")])


@pytest.mark.parametrize("kind", ["gallery", "sanity"])
def test_a_gallery_or_sanity_check_of_other_types_is_one_error(tmp_path, kind):
    make_run(tmp_path / "run")
    hydra(tmp_path / "other", [], kind)
    good = {"model": "net", "data": "digits", "seed": 0, "left_out": {"a": "why"}, "versions": {"torch": "2"}}
    good |= {"figure": "fig5", "images": [{"true": "1"}], "columns": [{"key": "a"}]} if kind == "gallery" else {}
    for name in good:
        for wrong in (True, None, 1.5, [3], {"a": [1]}, "../../secret"):
            if isinstance(wrong, str) and isinstance(good[name], str) and name != "figure":
                continue
            (tmp_path / "other" / f"{kind}.json").write_text(json.dumps({**good, name: wrong}))
            with pytest.raises(UserError, match=rf"^the run in there/other is damaged \({kind}\.json gives {name} as "):
                gather([(tmp_path, "there")])
    (tmp_path / "other" / f"{kind}.json").write_text(json.dumps(good))
    assert len(gather([(tmp_path, "there")]).pictures) == 1
