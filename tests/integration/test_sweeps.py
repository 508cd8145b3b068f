"""The paper's sweeps, of Hydra (conf/sweep) and of W&B (sweeps): what their jobs are, and that they run.

W&B's own rules are in the package ``sweeps``, which asks for a numpy that pandas refuses: it is installed without its
dependencies, into a folder of its own, and used in a process of its own.
"""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from pattern_bench.configuration.location import CONF

WANDB_SWEEPS = CONF.parent / "sweeps"
COMMANDS = {"fig3": "config", "fig4a": "config", "criteria": "config", "sanity": "sanity"}
"""Sweeps, and the configuration of the command that runs each."""
SMALL = ["data.limit=300", "model.training.epochs=4"]
SMALL_JOB = [*SMALL, "degradation.images=4", "degradation.steps=4", "explanation.images=2"]
SMALL_CHECKS = [*SMALL, "images=2", "refit=20", "directions=2"]


def jobs_of(sweep):
    """The overrides of each job, as Hydra's sweeper makes them."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(COMMANDS[sweep], [f"+sweep={sweep}"], return_hydra_config=True)
        given = [*(f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()), f"+sweep={sweep}"]
        (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(given), None)
    return jobs


def choices(sweep, overrides):
    """What a job composes: its groups' choices, and its configuration."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(COMMANDS[sweep], list(overrides), return_hydra_config=True)
    return cfg.hydra.runtime.choices, cfg


# --- Hydra ---


def test_fig3_has_a_job_per_estimator():
    groups = [choices("fig3", job)[0] for job in jobs_of("fig3")]
    assert [group.estimator for group in groups] == ["random", "x", "w", "a", "a_plus_minus"]
    assert {path.stem for path in (CONF / "estimator").glob("*.yaml")} == {group.estimator for group in groups}


def test_fig4a_has_every_curve_once():
    """Methods without patterns are not repeated for every estimator; of the two that are another's curve, and of the
    slow ones, the file says so."""
    groups = [choices("fig4a", job)[0] for job in jobs_of("fig4a")]
    curves = Counter((group.estimator, group.method) for group in groups)
    assert set(curves.values()) == {1}
    assert {estimator for estimator, method in curves if method == "pattern_attribution"} == {
        path.stem for path in (CONF / "estimator").glob("*.yaml")
    }
    every = {path.stem for path in (CONF / "method").glob("*.yaml")}
    left_out = every - {method for _, method in curves}
    assert left_out == {"lrp_z", "dtd_w2", "occlusion", "prediction_difference"}
    free = Counter(method for _, method in curves if not method.startswith("pattern_"))
    assert set(free.values()) == {1}


def test_criteria_has_every_criterion_with_a_probe_that_serves_it():
    found = [choices("criteria", job) for job in jobs_of("criteria")]
    assert {group.probe for group, _ in found} == {"sgd"}
    cells = {(cfg.criterion, group.estimator) for group, cfg in found}
    assert cells == set(itertools.product(("all", "rectified", "positive"), ("random", "w", "a", "a_plus_minus")))
    assert len(found) == len(cells)


COUNT_RENAMES = """\
import os, sys

def note(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(".safetensors"):
        with open(os.environ["RENAMES"], "a") as file:
            print(*str(arguments[1]).split(os.sep)[-2:], sep="/", file=file)

sys.addaudithook(note)
"""
"""Files of tensors are written under another name and moved into place, which Python can be made to tell of."""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_shared_statistics_are_computed_once_however_many_jobs_need_them(command, tmp_path, monkeypatch, launcher):
    """By two models, three splits and six layers; what is given beside a sweep comes in the place of what it says."""
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "watched").mkdir()
    (tmp_path / "watched" / "sitecustomize.py").write_text(COUNT_RENAMES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "watched"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RENAMES", str(tmp_path / "renames"))
    cache = tmp_path / "own cache"
    side_by_side = [f"hydra/launcher={launcher}", *(["hydra.launcher.n_jobs=3"] if launcher == "joblib" else [])]
    done = command(
        "-m", "+sweep=fig3", "estimator=w,a,a_plus_minus", "model.width=4,8", "logger=none", f"cache.dir='{cache}'",
        *side_by_side, *SMALL_JOB,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len([*tmp_path.glob("runs/*/*-sweep/*/summary.json")]) == 2 * 3
    written = Counter((tmp_path / "renames").read_text().split())
    entries = {f"{path.parent.name}/{path.name}" for path in cache.glob("*/*.safetensors")}
    assert {name: written[name] for name in entries} == dict.fromkeys(entries, 1)
    assert Counter(name.split("/")[0] for name in entries) == {"models": 2, "moments": 2 * 3 * 6, "baselines": 2}


@pytest.mark.slow
def test_layers_can_be_swept(command, tmp_path):
    done = command("-m", "+sweep=fig3", "layer=features.0,features.2", "estimator=a", "logger=none", *SMALL_JOB)
    assert done.returncode == 0, done.stderr
    tables = [pd.read_csv(path) for path in tmp_path.glob("runs/*/*-sweep/*/rho.csv")]
    assert sorted(table.layer.unique().tolist() for table in tables) == [["features.0"], ["features.2"]]


@pytest.mark.slow
def test_the_sanity_sweep_runs(command, tmp_path):
    few = ["estimator=w,a", "logger=none", *SMALL_CHECKS]
    done = command("-m", "+sweep=sanity", *few, module="pattern_bench.sanity")
    assert done.returncode == 0, done.stderr
    tables = [pd.read_csv(path) for path in tmp_path.glob("runs/*/*-sweep/*/sanity.csv")]
    assert sorted(table.estimator.unique().tolist() for table in tables) == [["a"], ["w"]]
    assert {method for table in tables for method in table.method} == {"pattern_net", "pattern_attribution"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("pattern_bench", ["+sweep=fig3"], "start it with python -m pattern_bench -m +sweep=fig3"),
        ("pattern_bench", ["-m", "+sweep=sanity"], "start it with python -m pattern_bench.sanity -m +sweep=sanity"),
        ("pattern_bench.sanity", ["-m", "+sweep=fig3"], "start it with python -m pattern_bench -m +sweep=fig3"),
        ("pattern_bench.gallery", ["-m", "+sweep=fig4a"], "start it with python -m pattern_bench -m +sweep=fig4a"),
        ("pattern_bench", ["-m", "+sweep=fig3,criteria"], "give one sweep at a time"),
        ("pattern_bench", ["-m", "+sweep=fig5"], "Could not find 'sweep/fig5'"),
        ("pattern_bench.gallery", ["curve=a"], "curve=a has no effect on figure=fig5"),
    ],
)
def test_a_sweep_that_is_started_in_another_way_is_one_message(command, tmp_path, module, arguments, message):
    done = command(*arguments, module=module)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.glob("runs/*/*-sweep")]


@pytest.mark.slow
def test_a_job_of_a_sweep_can_be_taken_up_alone(command, tmp_path):
    done = command("-m", "+sweep=fig4a", "curve=gradient", "logger=none", *SMALL_JOB)
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in tmp_path.glob("runs/*/*-sweep/*/summary.json"))
    (folder / "summary.json").unlink()
    done = command(f"resume={folder}")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "summary.json").read_text())["method"] == "gradient"


# --- W&B ---

DRAW = """\
import json, sys
import sweeps

config = json.load(sys.stdin)
drawn, answer = [], {"violations": sweeps.schema_violations_from_proposed_config(config)}
while len(drawn) < 20 and (run := sweeps.next_run(config, drawn)) is not None:
    drawn.append(run)
    if config["method"] != "grid":  # which never ends
        break
answer["draws"] = [run.config for run in drawn]
if "early_terminate" in config:
    # Two good runs that are over, and two that go on, one of them badly.
    name = config["metric"]["name"]
    runs = [
        sweeps.SweepRun(name=who, state=state, sampledHistory=[{name: value}] * 12)
        for who, state, value in (
            ("first", "finished", 0.5), ("second", "finished", 0.51), ("good", "running", 0.49), ("bad", "running", 0.9)
        )
    ]
    answer["stopped"] = [run.name for run in sweeps.stop_runs(config, runs)]
json.dump(answer, sys.stdout, default=float)
"""


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """What W&B's rules say of a sweep's configuration, and what they draw from it."""
    place = tmp_path_factory.mktemp("sweeps")
    needed = ["sweeps==0.2.0", "jsonschema", "jsonschema-specifications", "jsonref", "referencing", "rpds-py", "attrs"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "0", "--timeout", "5"]
    done = subprocess.run([*pip, "--target", place, *needed], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install the package sweeps: {done.stderr.strip().splitlines()[-1]}")

    def start(config):
        found = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", DRAW], input=json.dumps(config), capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(place)},
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)

    return start


def read(name):
    return yaml.safe_load((WANDB_SWEEPS / f"{name}.yaml").read_text())


def test_every_sweep_of_hydra_is_one_of_wandb():
    assert {path.stem for path in WANDB_SWEEPS.iterdir()} == {path.stem for path in (CONF / "sweep").iterdir()} | {
        "probe"
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_wandb_draws_the_jobs_of_hydras_sweep(draw, name):
    config = read(name)
    answer = draw(config)
    assert answer["violations"] == []
    # What Hydra's sweep says beside what it sweeps, W&B's says in its command.
    always = [part for part in config["command"] if "=" in part and not part.startswith("hydra.")]
    drawn = [[*always, *(f"{key}={part['value']}" for key, part in one.items())] for one in answer["draws"]]
    assert sorted(map(settings(name), drawn)) == sorted(map(settings(name), jobs_of(name)))


def settings(sweep):
    """Of a job's overrides, all that it composes but Hydra's own, as text."""

    def composed(overrides):
        _, cfg = choices(sweep, overrides)
        own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        return OmegaConf.to_yaml(own, resolve=True, sort_keys=True)

    return composed


@pytest.mark.slow
def test_bad_settings_of_the_probe_are_stopped_early(draw):
    answer = draw(read("probe"))
    assert answer["violations"] == []
    assert answer["stopped"] == ["bad"]
    (one,) = answer["draws"]
    assert 0.0003 <= one["probe.learning_rate"]["value"] <= 0.1
    assert 1e-6 <= one["probe.regularisation"]["value"] <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMMANDS, "probe"])
def test_a_drawn_run_is_executed_as_the_agent_would(draw, name, cache_dir, tmp_path, monkeypatch):
    from wandb.wandb_agent import Agent

    config = read(name)
    drawn = draw(config)["draws"][-1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PATTERN_BENCH_CACHE", str(cache_dir))
    for variable, value in (("SWEEP_ID", "sweep123"), ("DIR", str(tmp_path)), ("MODE", "offline")):
        monkeypatch.setenv(f"WANDB_{variable}", value)
    for variable in ("RUN_ID", "SWEEP_PARAM_PATH"):  # which the agent sets
        monkeypatch.setenv(f"WANDB_{variable}", "")
    agent = Agent(api=None, queue=None, sweep_id="sweep123")
    agent._sweep_command = [*config["command"], *(SMALL_CHECKS if name == "sanity" else SMALL_JOB)]
    if name in ("probe", "criteria"):
        agent._sweep_command.append("probe.steps=12")
    agent._command_run({"type": "run", "run_id": "run45678", "program": config["program"], "args": drawn})
    assert agent._run_processes["run45678"].wait(timeout=240) == 0
    folder = tmp_path / "runs" / "sweep123" / "run45678"
    assert (folder / ("sanity.json" if name == "sanity" else "summary.json")).is_file()
    overrides = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
    assert set(overrides) >= {f"{key}={part['value']}" for key, part in drawn.items()}
    assert [*(folder / "wandb").glob("offline-run-*-run45678")]


@pytest.mark.slow
def test_the_probes_sweep_goes_by_what_descent_tells_after_every_round(run_job):
    """And what it tells is what ρ will be, but for the validation images that it leaves out."""
    config = read("probe")
    folder = run_job(*SMALL_JOB, "probe=sgd", "probe.steps=90", "probe.patience=90", "logger=csv")
    told = pd.read_csv(folder / "csv" / "metrics.csv")[config["metric"]["name"]].dropna()
    assert len(told) == 90  # 120 images of the probe split, in batches of 256
    rho = pd.read_csv(folder / "rho.csv").rho
    assert told.iloc[-1] == pytest.approx(rho.mean(), abs=0.05)
    assert told.iloc[0] > told.iloc[-1]
