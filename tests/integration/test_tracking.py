"""Tracking: what a W&B server has of a run, sent at once or by ``wandb sync`` later, is what the run's folder has."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wandb
import yaml
from helpers.paths import TESTS
from helpers.tracked import begin, log_everything
from helpers.wandb_run_server import ENTITY, KEY, Run, Server, serving
from hydra import compose, initialize_config_dir
from pytorch_lightning.loggers import CSVLogger

from pattern_bench.configuration.location import CONF
from pattern_bench.errors import UserError
from pattern_bench.pipeline import gallery, patterns, sanity
from pattern_bench.pipeline.job import run

FEW = ["data.limit=300", "model.training.epochs=4", "degradation.images=8"]
JOB = [*FEW, "probe=both", "probe.steps=20", "bootstrap.resamples=2"]
PASSWORD, TOKEN = "pass-word-of-the-remote", "token-for-a-user"
TWO_PROCESSES = ["trainer=ddp_cpu", "trainer.devices=2"]


@dataclass
class Tracked:
    """A run as the server has it, and its folder."""

    server: Server
    run: Run
    folder: Path

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
    path = os.pathsep.join([str(TESTS), *sys.path])
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
    """Two processes, offline, in a git repository whose remote has a token and a password; sent by ``wandb sync``."""
    work = tmp_path_factory.mktemp("repository")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    remote = f"https://{TOKEN}:{PASSWORD}@example.org/research.git"
    for arguments in (["init", "-q"], ["remote", "add", "origin", remote], ["commit", "-qm", "x", "--allow-empty"]):
        subprocess.run([*git, *arguments], cwd=work, check=True)
    folder = work / "out"
    call(["-m", "pattern_bench", *JOB, *TWO_PROCESSES, f"hydra.run.dir={folder}"], environment, work)
    (offline,) = (folder / "wandb").glob("*run-*")
    assert offline.name.startswith("offline-run-")
    with serving() as server:
        sync(offline, environment, server)
    (tracked,) = server.runs.values()
    return Tracked(server, tracked, folder)


@contextmanager
def connected(server, place):
    """Within, W&B in this process knows this server alone, and the current folder is another."""
    wandb.teardown()  # W&B reads the environment once
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name, value in at(server).items():
            patch.setenv(name, value)
        patch.chdir(place)
        yield patch
        wandb.teardown()


def die(*_):
    raise RuntimeError("in the middle")


@pytest.fixture(scope="session")
def online(configure, tmp_path_factory):
    """A run that was interrupted and taken up again, with the server at hand."""
    work = tmp_path_factory.mktemp("online")
    (work / "out").mkdir()
    job = configure("logger=wandb", *JOB)
    with serving() as server, connected(server, work):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(patterns, "fit_patterns", die)
            with pytest.raises(RuntimeError, match="in the middle"):
                run(job, work / "out")
        run(job, work / "out")
    assert server.failures == []
    (tracked,) = server.runs.values()
    return Tracked(server, tracked, work / "out")


@pytest.fixture(params=[pytest.param("synced", marks=pytest.mark.slow), "online"])
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
        "_step", "_timestamp", "_runtime", "descent/epoch", "descent/loss", "descent/rho", "degradation/step",
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
        "summary.json", "rho.csv", "degradation.csv", "areas.csv", "accuracy.json", "splits.csv", "bootstrap.csv",
        "config.yaml", "rho.png", "degradation.png", "explanations.png",
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


@pytest.mark.slow
def test_wandbs_own_reader_finds_the_same_in_the_file(synced, environment):
    (file,) = (synced.folder / "wandb").glob("offline-run-*/*.wandb")
    records = [
        json.loads(line)
        for line in call(["-m", "wandb", "leet", "inspect", "--json", file], environment, synced.folder).splitlines()
        if line.startswith("{")
    ]

    def numbers(row):
        return {key: value for key, value in row.items() if isinstance(value, int | float)}

    read = [numbers(record["history"]["item"]) for record in records if record["type"] == "history"]
    for sent in synced.run.history:
        assert numbers(sent).items() <= read[sent["_step"]].items()
    assert len(read) == len(synced.run.history)
    artifacts = {record["artifact"]["name"] for record in records if record["type"] == "artifact"}
    assert artifacts == {artifact.name for artifact in synced.server.artifacts.values()}
    files = {file["path"] for record in records if record["type"] == "files" for file in record["files"]["files"]}
    assert files >= {name for name in synced.run.files if name.startswith(("results/", "media/"))}


@pytest.mark.slow
def test_git_is_told_where_there_is_a_repository(synced, online):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=synced.folder, capture_output=True, text=True, check=True)
    assert synced.run.told("commit") == head.stdout.strip()
    assert "example.org/research" in synced.run.told("repo")
    assert online.run.told("commit") is None
    assert online.run.told("repo") is None


@pytest.mark.slow
def test_no_secret_is_written_or_sent(synced, online, environment):
    """The password of a git remote, and the key, which only goes where it belongs."""
    sent = [repr(vars(server)).encode() for server in (synced.server, online.server)]
    written = [file.read_bytes() for root in (synced.folder, online.folder, Path(environment["HOME"]))
               for file in root.rglob("*") if file.is_file()]  # fmt: skip
    for secret in (PASSWORD.encode(), TOKEN.encode(), KEY.encode()):
        assert not any(secret in content for content in written)
    for tracked, content in zip((synced, online), sent, strict=True):
        assert PASSWORD.encode() not in content
        assert TOKEN.encode() not in content
        assert tracked.server.keys == {KEY}


def test_a_run_that_is_taken_up_goes_on_under_its_id(online):
    assert online.run.ended == [1, 0]
    assert online.server.asked.count("RunResumeStatus") == 2
    assert online.logged("accuracy/top1") == 2 * [online.json("accuracy.json")["top1"]]


# --- other runs ---


@pytest.fixture(scope="session")
def others(environment, cache_dir, tmp_path_factory):
    """By job type: the runs of a sweep of two jobs, of a gallery and of sanity checks, offline and then sent."""
    work = tmp_path_factory.mktemp("others")
    sweep = ["-m", "estimator=w,a", "layer=features.0", *FEW, f"hydra.sweep.dir={work / 'my sweep'}"]
    call(["-m", "pattern_bench", *sweep], environment, work)
    for name, job in (
        ("gallery", (gallery.run, "figure=fig5", "images=1")),
        ("sanity", (sanity.run, "images=1", "refit=20", "directions=2")),
    ):
        (work / name).mkdir()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(name, [f"cache.dir={cache_dir}", *FEW[:2], *job[1:]])
        job[0](cfg, work / name)
    folders = sorted(work.glob("**/offline-run-*"))
    with serving() as server:
        call(["-m", "wandb", "sync", *folders], environment | at(server), work)
    assert server.failures == []
    assert len(server.runs) == len(folders) == 4
    runs = {}
    for sent in server.runs.values():
        runs.setdefault(sent.told("jobType"), []).append(sent)
    return work, runs


@pytest.mark.slow
def test_a_sweep_is_a_group_of_runs(others):
    _, runs = others
    found = {(run.told("displayName"), run.told("groupName")) for run in runs["job"]}
    assert found == {(f"small_vgg/features.0/{estimator}", "my sweep") for estimator in ("w", "a")}
    assert {run.told("groupName") for run in (*runs["gallery"], *runs["sanity"])} == {None}


@pytest.mark.slow
def test_galleries_and_sanity_checks_are_runs_with_pictures(others):
    work, runs = others
    for kind, pictures in {"gallery": {"fig5"}, "sanity": {"randomisation", "convergence"}}.items():
        (run,) = runs[kind]
        found = {key: value for key, value in run.summary.items() if key.startswith("figures/")}
        assert {key.removeprefix("figures/") for key in found} == pictures
        for key, entry in found.items():
            assert "small_vgg on digits" in entry["caption"]
            assert run.files[entry["path"]] == (work / kind / f"{key.removeprefix('figures/')}.png").read_bytes()
        assert run.files[f"results/{kind}.json"] == (work / kind / f"{kind}.json").read_bytes()


# --- a tracker alone ---


def said(caplog):
    """What the user sees."""
    return [record.getMessage() for record in caplog.records
            if record.name.startswith("pattern_bench") and record.levelno >= logging.WARNING]  # fmt: skip


def test_a_server_that_vanishes_costs_nothing_but_a_warning(environment, tmp_path, caplog):
    with serving() as server, connected(server, tmp_path) as patch:
        patch.setenv("WANDB_FINISH_TIMEOUT", "2")
        server.until = "CreateArtifact"
        log_everything(begin(tmp_path), tmp_path)
    assert server.vanished
    assert not any(artifact.committed for artifact in server.artifacts.values())
    (folder,) = (tmp_path / "wandb").glob("run-*")
    assert said(caplog) == [f"W&B did not take everything in time: wandb sync --include-online {folder} sends the rest"]
    with serving() as server:
        sync(folder, environment, server)
    run = server.runs["abcd1234"]
    assert [row["degradation/method"] for row in run.history if "degradation/method" in row] == [0.5, 0.25, 0.5 / 3]
    assert run.summary["rho/mean"] == 0.5
    assert run.files[run.summary["figures/rho"]["path"]] == run.files["results/rho.png"]
    made = {artifact.name: artifact.files for artifact in server.artifacts.values() if artifact.committed}
    assert made.keys() == {"data-d", "patterns-d", "run-abcd1234-rho", "results-r"}
    assert made["patterns-d"]["patterns.safetensors"] == b"patterns"
    assert made["results-r"]["rho.png"] == run.files["results/rho.png"]


def test_an_agents_run_is_the_agents_and_its_address_is_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with serving() as server, connected(server, tmp_path) as patch:
        patch.setenv("WANDB_SWEEP_ID", "sweep123")
        patch.setenv("WANDB_RUN_ID", "fromtheagent")
        patch.setenv("WANDB_ENTITY", ENTITY)
        patch.setenv("WANDB_PROJECT", "p")
        log_everything(begin(tmp_path), tmp_path)
    assert server.failures == []
    assert list(server.runs) == ["fromtheagent"]
    assert server.runs["fromtheagent"].told("sweep") == "sweep123"
    assert f"W&B: {server.url}/{ENTITY}/p/runs/fromtheagent" in caplog.text
    assert said(caplog) == []


@pytest.mark.slow
def test_a_process_of_wandbs_that_dies_costs_nothing_but_a_warning(environment, tmp_path):
    if not Path("/proc/self/task").is_dir():
        pytest.skip("finds the process in Linux's /proc")
    kills = """
        import os, signal
        from pathlib import Path
        from helpers.tracked import begin, log_everything
        tracker = begin(Path.cwd())
        for children in Path("/proc/self/task").glob("*/children"):
            for child in children.read_text().split():
                if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text():
                    os.kill(int(child), signal.SIGKILL)
                    os.waitpid(int(child), 0)
        log_everything(tracker, Path.cwd())
        print("ended")
    """
    output = call(["-c", textwrap.dedent(kills)], environment, tmp_path)
    assert "ended\n" in output
    assert output.count("not everything can be tracked") == 1


@pytest.fixture
def tracker(tmp_path, caplog):
    """A tracker offline, that has nothing to complain of."""
    with begin(tmp_path) as found:
        yield found
    assert said(caplog) == []


def test_no_row_of_a_long_table_is_cut_off(tracker, tmp_path):
    long = pd.DataFrame({"neuron": range(10_500)})
    tracker.table("rho", long)
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    assert json.loads(media.read_text())["data"] == [[neuron] for neuron in range(10_500)]
    artifact = max(tmp_path.glob("wandb/offline-run-*/artifacts/staging/*"), key=lambda file: file.stat().st_size)
    assert len(json.loads(artifact.read_text())["data"]) == 10_500


def test_everything_is_kept_in_the_runs_folder(tracker, tmp_path, monkeypatch):
    """Also what W&B's own place for it, in the home, has no room for; and it is not kept twice."""
    monkeypatch.setenv("HOME", "/dev/null")
    (tmp_path / "patterns.safetensors").write_bytes(bytes(1000))
    tracker.uses("patterns", "d", {}, tmp_path / "patterns.safetensors")
    (kept,) = tmp_path.glob("wandb/offline-run-*/artifacts/patterns-d/patterns.safetensors")
    assert kept.samefile(tmp_path / "patterns.safetensors")


def test_a_run_that_is_taken_up_offline_is_there_once(configure, tmp_path, monkeypatch):
    job = configure("logger=wandb", "estimator=w", "layer=features.0", *FEW)
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(patterns, "fit_patterns", die)
        with pytest.raises(RuntimeError, match="in the middle"):
            run(job, tmp_path / "run")
    (first,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    run(job, tmp_path / "run")
    (second,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    identifier = json.loads((tmp_path / "run" / "summary.json").read_text())["run_id"]
    assert first.name.split("-")[-1] == second.name.split("-")[-1] == identifier
    assert (second / "files" / "results" / "rho.csv").read_bytes() == (tmp_path / "run" / "rho.csv").read_bytes()


# --- what goes wrong ---


def test_results_are_complete_where_nothing_can_be_tracked(run_job, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wandb.sdk.wandb_run.Run.log", full)
    monkeypatch.setattr(CSVLogger, "log_metrics", full)
    for logger in ("wandb", "csv"):
        caplog.clear()
        folder = run_job(f"logger={logger}", "estimator=w", "layer=features.0", *FEW)
        assert (folder / "summary.json").is_file()
        assert said(caplog) == [
            "not everything can be tracked ([Errno 28] No space left on device): the run's folder has all results"
        ]


def test_what_wandb_refuses_is_told_before_anything_is_computed(run_job, monkeypatch):
    monkeypatch.setattr("pattern_bench.pipeline.job.prepare", None)
    for setting, why in {
        "logger.project=a/b": r"W&B refuses the run \(Invalid project name 'a/b'.*logger.project=a/b, .*logger=csv",
        "logger.kind=mlflow": "logger.kind=mlflow is unknown: choose csv, tensorboard, wandb or none",
    }.items():
        with pytest.raises(UserError, match=why):
            run_job("logger=wandb", setting)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            wandb.Error("Error initializing run: entity nobody not found"),
            r"\(entity nobody not found\).*logger.entity=e",
        ),
        (wandb.errors.AuthenticationError("the key is too short"), r"\(the key is too short\): check the key"),
    ],
)
def test_a_server_that_refuses_is_one_error(tmp_path, monkeypatch, error, remedy):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=remedy):
        begin(tmp_path)


def test_a_server_that_does_not_answer_in_time_means_offline(tmp_path, monkeypatch, caplog):
    init, modes = wandb.init, []

    def slow(*_, mode, **given):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("Timed out initializing run")
        return init(mode=mode, **given)

    monkeypatch.setattr(wandb, "init", slow)
    monkeypatch.setenv("WANDB_MODE", "online")
    begin(tmp_path).finish(succeeded=True)
    assert modes == ["online", "offline"]
    assert said(caplog) == ["W&B does not answer (Timed out initializing run): logging offline, into the run's folder"]


def test_a_wandb_that_cannot_be_started_means_no_tracking(tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "init", fail)
    log_everything(begin(tmp_path), tmp_path)
    assert said(caplog) == [
        "W&B cannot be started ([Errno 28] No space left on device): nothing is tracked, the run's folder has all "
        "results"
    ]


# --- online or offline ---


@pytest.mark.very_slow
def test_without_a_key_and_a_network_a_job_takes_3_seconds_more_at_most(environment, tmp_path):
    alone = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs a process without network (unshare)")
    seconds = {"wandb": [], "none": []}
    for number in range(4):  # the first fills the cache
        for logger, took in seconds.items():
            command = [
                sys.executable,
                "-m",
                "pattern_bench",
                *FEW,
                f"logger={logger}",
                f"hydra.run.dir={logger}{number}",
            ]
            start = time.monotonic()
            done = subprocess.run([*alone, *command], env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL,
                                  capture_output=True, text=True, timeout=300)  # fmt: skip
            assert done.returncode == 0, done.stderr
            if number:
                took.append(time.monotonic() - start)
    print({logger: [round(each, 2) for each in took] for logger, took in seconds.items()})
    assert min(seconds["wandb"]) - min(seconds["none"]) <= 3
