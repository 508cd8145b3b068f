"""The jobs that a sweep was to have, and the names that they would have."""

import os
import shlex

import pytest
import yaml
from helpers.made_runs import make_sweep

from pattern_bench.configuration.location import CONF
from pattern_bench.errors import UserError
from pattern_bench.reporting.sweeps import command_of, expected_names, read_sweep


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


def test_names_of_a_missing_job_are_those_that_it_would_have():
    names = expected_names(["data=toy", "estimator=w", "probe=both", "method=lrp_z", "degradation.order=least"])
    assert (names.model, names.data, names.estimator, names.probes) == ("linear", "toy", "w", ("closed_form", "sgd"))
    assert names.curve == ("none", "lrp_z, least relevant first")
    assert expected_names(["estimator=x"]).curve == ("x", "lrp_z")
    assert expected_names(["layer=features.0"]).curve is None
    assert expected_names(["estimator=none_such"]) is None
    # Nothing that it names is built, or even imported.
    assert expected_names(["allow_any_target=true", "estimator._target_=os.system"]).estimator == "a_plus_minus"


def make_multirun(folder, task, own=()):
    overrides = {"task": list(task), "hydra": list(own)}
    content = {"hydra": {"job": {"name": "pattern_bench"}, "overrides": overrides,
                         "sweeper": {"_target_": "hydra.x.BasicSweeper"}}}  # fmt: skip
    folder.mkdir()
    (folder / "multirun.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_a_command_of_a_report_does_not_run_what_a_folder_names(tmp_path):
    task = [
        "estimator=w,a",
        "allow_any_target=true",
        "method._target_='os.$(touch x)\x1b[2J'",
        "+x={_target_: a},{b: c}",
    ]
    sweep = read_sweep(
        make_multirun(tmp_path / "sweep", task, ["hydra.launcher.setup=[evil]", "hydra/launcher=joblib"])
    )
    line = command_of(sweep.kind, sweep.arguments, tmp_path)
    runs, _, without = line.partition("  # without ")
    assert shlex.split(runs)[3:] == ["-m", "estimator=w,a", "hydra/launcher=joblib", f"hydra.sweep.dir={tmp_path}"]
    assert shlex.split(without)[:2] == ["allow_any_target=true", r"method._target_='os.$(touch x)\x1b[2J'"]
    assert line.isprintable()


def test_a_sweep_of_too_many_jobs_is_an_error_at_once(tmp_path):
    for number, task in enumerate(
        (["seed=range(0,1000000000000)"], ["seed=range(9999)", "degradation.images=range(99)"])
    ):
        with pytest.raises(UserError, match=r"damaged.*jobs or more"):
            read_sweep(make_multirun(tmp_path / str(number), task))


def test_names_of_a_missing_job_do_not_show_the_environment_or_files(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "evil.yaml").write_text("# @package _global_\nmodel: {name: hunter2}\n")
    up = os.path.relpath(tmp_path / "evil", CONF / "model")
    for text in ("model.name=${oc.env:SECRET}", f"model={up}", f"+model={up}"):
        assert "hunter2" not in repr(expected_names(["data=toy", text]))
