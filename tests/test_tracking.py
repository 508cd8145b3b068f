"""Tracking: what a W&B server has of a run, sent at once or by ``wandb sync`` later, is what the run's folder has."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from wandb_run_server import ENTITY, KEY, Run, Server, serving

FEW = ["data.limit=300", "model.training.epochs=4", "degradation.images=8"]
JOB = [*FEW, "probe=both", "probe.steps=60", "bootstrap.resamples=2"]
PASSWORD = "pass-word-of-the-remote"
PROCESSES_OF_ONE_THREAD = ["trainer=ddp_cpu", "trainer.devices=2"]


@dataclass
class Tracked:
    """A run as the server has it, and its folder."""

    server: Server
    run: Run
    folder: Path
    said: str

    def json(self, name):
        return json.loads((self.folder / name).read_text())

    def csv(self, name):
        return pd.read_csv(self.folder / name)

    def logged(self, key):
        """The values of a metric, in order."""
        return [row[key] for row in self.run.history if key in row]


@pytest.fixture(scope="session")
def environment(cache_dir, tmp_path_factory):
    """That of a user without W&B's settings, whose home is empty."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return {**kept, "HOME": str(home), "PATTERN_BENCH_CACHE": str(cache_dir), "PYTHONPATH": path}


def call(arguments, environment, cwd, *, fails=False):
    """What the command says on both streams."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, cwd=cwd, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert bool(done.returncode) == fails, done.stdout
    return done.stdout


def at(server):
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}


def sync(folder, environment, server):
    call(["-m", "wandb", "sync", "--include-online", folder], environment | at(server), folder)
    assert server.failures == []


@pytest.fixture(scope="session")
def synced(environment, tmp_path_factory):
    """A run of two processes, offline, in a git repository whose remote has a password; sent by ``wandb sync``."""
    work = tmp_path_factory.mktemp("repository")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    remote = f"https://user:{PASSWORD}@example.org/research.git"
    for arguments in (["init", "-q"], ["remote", "add", "origin", remote], ["commit", "-qm", "x", "--allow-empty"]):
        subprocess.run([*git, *arguments], cwd=work, check=True)
    folder = work / "out"
    said = call(["-m", "pattern_bench", *JOB, *PROCESSES_OF_ONE_THREAD, f"hydra.run.dir={folder}"], environment, work)
    (offline,) = (folder / "wandb").glob("*run-*")
    assert offline.name.startswith("offline-run-")
    with serving() as server:
        sync(offline, environment, server)
    (run,) = server.runs.values()
    return Tracked(server, run, folder, said)


@pytest.fixture(scope="session")
def online(environment, tmp_path_factory):
    """A run that was interrupted and taken up again, with the server at hand."""
    work = tmp_path_factory.mktemp("online")
    folder = work / "out"
    dies = (
        "from pattern_bench import __main__, fitting\n"
        "def die(*_): raise RuntimeError('in the middle')\n"
        "fitting.fit_patterns = die\n"
        "__main__.main()"
    )
    with serving() as server:
        for start in (["-c", dies], ["-m", "pattern_bench"]):
            command = [*start, *JOB, f"hydra.run.dir={folder}"]
            said = call(command, environment | at(server), work, fails=start[0] == "-c")
    assert server.failures == []
    (run,) = server.runs.values()
    return Tracked(server, run, folder, said)


@pytest.fixture(params=["synced", "online"])
def tracked(request):
    return request.getfixturevalue(request.param)


def test_the_summary_has_every_figure_and_nothing_else(tracked):
    summary, rho = tracked.json("summary.json"), tracked.csv("rho.csv")
    first = rho[rho.probe == "closed_form"]
    expected = {f"{of}/{stage}": value for of in ("seconds", "images_per_second", "peak_memory_mib")
                for stage, value in summary[of].items()}  # fmt: skip
    expected |= {f"accuracy/{top}": tracked.json("accuracy.json")[top] for top in ("top1", "top5")}
    expected |= {"rho/mean": first.rho.mean(), "rho/median": first.rho.median()}
    for layer, rows in first.groupby("layer"):
        expected |= {f"rho/{layer}/mean": rows.rho.mean(), f"rho/{layer}/median": rows.rho.median()}
    for method, curve in tracked.csv("degradation.csv").groupby("method"):
        expected[f"area_over_curve/{method}"] = (curve.probability_mean.iloc[0] - curve.probability_mean).mean()
    numbers = {key: value for key, value in tracked.run.summary.items() if isinstance(value, int | float)}
    curves = {key for key in numbers if key.startswith(("_", "descent/", "degradation/"))}
    assert {key: numbers[key] for key in numbers.keys() - curves} == pytest.approx(expected, rel=1e-9)
    assert set(summary["seconds"]) >= {"fit_patterns", "rho", "fit_readers", "bootstrap", "degrade"}
    assert curves == {
        "_step", "_timestamp", "_runtime", "descent/epoch", "descent/loss", "degradation/step",
        "degradation/pattern_attribution", "degradation/random_order",
    }  # fmt: skip
    others = tracked.run.summary.keys() - numbers.keys()
    layers = {f"rho/{layer}/distribution" for layer in rho.layer}
    tables = {"rho", "degradation", "bootstrap"}
    assert others == {"_wandb"} | layers | tables | {
        f"figures/{name}" for name in ("rho", "degradation", "explanations")
    }


def test_curves_have_their_own_axes(tracked):
    degradation = tracked.csv("degradation.csv").pivot(index="step", columns="method", values="probability_mean")
    rows = [row for row in tracked.run.history if "degradation/step" in row]
    assert [row["degradation/step"] for row in rows] == degradation.index.tolist()
    for method in degradation:
        assert [row[f"degradation/{method}"] for row in rows] == degradation[method].tolist()
    descent = [row for row in tracked.run.history if "descent/epoch" in row]
    steps = tracked.json("summary.json")["descent"]["steps"]
    assert [row["descent/epoch"] for row in descent] == list(range(len(descent)))
    assert 1 < len(descent) <= steps
    assert min(tracked.logged("descent/loss")) == pytest.approx(tracked.json("summary.json")["descent"]["loss"])
    declared = json.loads(tracked.run.told("config"))["_wandb"]["value"]["m"]  # 1: a name, 2: a glob, 5: its axis
    axes = {entry["2"]: declared[entry["5"] - 1]["1"] for entry in declared if "2" in entry}
    assert axes == {"degradation/*": "degradation/step", "descent/*": "descent/epoch"}


def test_tables_have_every_row(tracked):
    for name in ("rho", "degradation", "bootstrap"):
        expected = tracked.csv(f"{name}.csv")
        (entry,) = tracked.logged(name)
        (artifact,) = [a for a in tracked.server.artifacts.values() if a.name.endswith(f"-{name}")]
        assert (artifact.kind, artifact.committed) == ("run_table", True)
        for content in (tracked.run.files[entry["path"]], artifact.files[f"{name}.table.json"]):
            table = json.loads(content)
            found = pd.DataFrame(table["data"], columns=table["columns"]).replace("NaN", np.nan)
            pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-12)


def test_distributions_are_those_of_the_live_neurons(tracked):
    rho = tracked.csv("rho.csv")
    for layer, rows in rho[rho.probe == "closed_form"].groupby("layer"):
        (found,) = tracked.logged(f"rho/{layer}/distribution")
        assert found["_type"] == "histogram"
        assert found["values"] == np.histogram(rows.rho.dropna(), bins=found["bins"])[0].tolist()
        assert sum(found["values"]) == rows.rho.notna().sum()


def test_images_are_the_folders_and_have_captions(tracked):
    for name in ("rho", "degradation", "explanations"):
        (entry,) = tracked.logged(f"figures/{name}")
        assert entry["_type"] == "image-file"
        assert "small_vgg on digits, a_plus_minus" in entry["caption"]
        assert tracked.run.files[entry["path"]] == (tracked.folder / f"{name}.png").read_bytes()


def test_files_are_the_folders(tracked):
    found = {name.removeprefix("results/"): content for name, content in tracked.run.files.items()
             if name.startswith("results/")}  # fmt: skip
    assert found.keys() == {
        "summary.json", "rho.csv", "degradation.csv", "accuracy.json", "splits.csv", "bootstrap.csv", "config.yaml",
        "rho.png", "degradation.png", "explanations.png",
    }  # fmt: skip
    assert [name for name, content in found.items() if content != (tracked.folder / name).read_bytes()] == []


def test_artifacts_hold_what_results_are_made_of(tracked):
    server, identifier = tracked.server, tracked.json("summary.json")["run_id"]
    found = {a.name: a for a in server.artifacts.values() if a.kind != "run_table"}
    used = {server.artifacts[artifact].name for run, artifact in server.used if run == identifier}
    inputs = {
        "data-digits": "data", "weights-small_vgg": "weights",
        **{f"moments-small_vgg-digits-{split}": "moments" for split in ("fit", "probe", "validation")},
        "patterns-small_vgg-digits-a_plus_minus": "patterns",
    }  # fmt: skip
    made = "results-small_vgg-digits-a_plus_minus"
    assert {name: artifact.kind for name, artifact in found.items()} == inputs | {made: "results"}
    assert all(artifact.committed for artifact in found.values())
    assert used == inputs.keys()
    assert found[made].run == identifier
    for artifact in found.values():
        assert json.loads(artifact.files[f"{artifact.kind}.json"]) == artifact.metadata
    patterns = found["patterns-small_vgg-digits-a_plus_minus"]
    assert patterns.files["patterns.safetensors"] == (tracked.folder / "patterns.safetensors").read_bytes()
    fit = found["moments-small_vgg-digits-fit"].metadata
    assert fit["model"] == patterns.metadata["model"] == found["weights-small_vgg"].metadata["fingerprint"]
    assert fit["images"] == patterns.metadata["images"] == found["data-digits"].metadata["splits"]["fit"]
    results = {name: content for name, content in found[made].files.items() if name != "results.json"}
    assert {f"results/{name}": content for name, content in results.items()} == {
        name: content for name, content in tracked.run.files.items() if name.startswith("results/")
    }


def test_the_run_is_named_and_configured(tracked):
    run, config = tracked.run, tracked.run.config
    assert run.told("displayName") == "small_vgg/all/a_plus_minus"
    assert (run.told("project"), run.told("jobType")) == ("pattern_bench", "job")
    assert run.told("groupName") is None
    assert sorted(run.told("tags")) == ["a_plus_minus", "all", "both", "digits", "pattern_attribution", "small_vgg"]
    assert config.pop("names") == {
        "title": "small_vgg/all/a_plus_minus", "model": "small_vgg", "data": "digits", "layer": "all",
        "estimator": "a_plus_minus", "method": "pattern_attribution", "criterion": "all", "probe": "both",
    }  # fmt: skip
    assert config == yaml.safe_load((tracked.folder / "config.yaml").read_text())
    assert list(tracked.server.runs) == [tracked.json("summary.json")["run_id"]]
    assert re.fullmatch("[a-z0-9]{8}", tracked.json("summary.json")["run_id"])


def test_git_is_told_where_there_is_a_repository(synced, online):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=synced.folder, capture_output=True, text=True, check=True)
    assert synced.run.told("commit") == head.stdout.strip()
    assert "example.org/research" in synced.run.told("repo")
    assert online.run.told("commit") is None
    assert online.run.told("repo") is None


def test_no_secret_is_written_or_sent(synced, online, environment):
    """The password of a git remote, and the key, which only goes where it belongs."""
    sent = [repr(vars(server)).encode() for server in (synced.server, online.server)]
    written = [file.read_bytes() for root in (synced.folder, online.folder, Path(environment["HOME"]))
               for file in root.rglob("*") if file.is_file()]  # fmt: skip
    for secret in (PASSWORD.encode(), KEY.encode()):
        assert not any(secret in content for content in written)
    for tracked, content in zip((synced, online), sent, strict=True):
        assert PASSWORD.encode() not in content
        assert tracked.server.keys == {KEY}


def test_a_run_that_is_taken_up_goes_on_under_its_id(online):
    assert online.run.ended == [1, 0]
    assert online.server.asked.count("RunResumeStatus") == 2
    assert online.logged("accuracy/top1") == 2 * [online.json("accuracy.json")["top1"]]
    assert f"/{ENTITY}/pattern_bench/runs/{online.json('summary.json')['run_id']}" in online.said
