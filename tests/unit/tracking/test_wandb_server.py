"""What runs left is fetched from a W&B project: here from a server of this machine that answers as W&B's does."""

import copy
import os
import threading
from urllib.parse import urlparse

import pandas as pd
import pytest
import wandb
from helpers.wandb_server import KEY, python, recorded, serving

from pattern_bench.errors import UserError
from pattern_bench.tracking import wandb_server
from pattern_bench.tracking.wandb_server import download

PASSWORD = "pass-word-of-the-proxy"
PROJECT = recorded("wandb_project")


@pytest.fixture
def fetch(tmp_path, monkeypatch, caplog):
    """Downloads into the folder ``here``, with no other key than the environment's."""
    import wandb

    def start(environment, project="lab/patterns"):
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        for name, value in {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), **environment}.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()  # its client keeps the settings that it begins with
        return download(project, tmp_path / "here")

    yield start
    monkeypatch.undo()
    wandb.teardown()


def changed(change):
    answers = copy.deepcopy(PROJECT)
    change(answers)
    return answers


def test_results_of_finished_runs_come_each_into_a_folder_of_their_own(fetch, tmp_path, caplog):
    with serving(PROJECT) as (environment, asked):
        for _ in range(2):  # what an earlier download left is replaced
            found = fetch(environment)
            for file in tmp_path.glob("here/*/results/*"):
                assert file.read_text() == PROJECT["files"][f"/files/{file.relative_to(tmp_path / 'here')}"]
                file.write_text("of an earlier download")
    assert found == [tmp_path / "here" / run for run in ("a1b2c3d4", "e5f6a7b8")]
    files = {str(path.relative_to(tmp_path / "here")) for path in tmp_path.glob("here/**/*") if path.is_file()}
    assert files == {
        f"{run}/results/{name}"
        for run in ("a1b2c3d4", "e5f6a7b8")
        for name in ("summary.json", "rho.csv", "degradation.csv")
    }
    assert "1 runs of lab/patterns left no results: tried by hand (0a0a0a0a)" in caplog.text
    assert {query["filters"] for name, query in asked if name == "Runs"} == {'{"state": "finished"}'}
    fetched = [query["path"] for name, query in asked if name == "GET"]
    assert [path.rpartition("/")[2] == "summary.json" for path in fetched] == [False, False, True] * 4


@pytest.mark.slow
def test_a_report_is_made_of_a_project(tmp_path):
    with serving(PROJECT) as (environment, _):
        done = python(["-m", "pattern_bench.report", "wandb://lab/patterns"], tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert pd.read_csv(tmp_path / "report" / "fig3.csv").estimator.tolist() == ["w", "a"]


def no_project(answers):
    answers["graphql"]["Runs"] = {"data": {"project": None}}


def no_runs(answers):
    answers["graphql"]["Runs"] = answers["graphql"]["Runs"]["answers"]["0a0a0a0a"]
    answers["graphql"]["Runs"]["data"]["project"]["runs"]["edges"] = []


def no_results(answers):
    answers["graphql"]["RunFiles"] = answers["graphql"]["RunFiles"]["answers"]["0a0a0a0a"]


def wrong_key(answers):
    answers["status"] = 401


def lost_file(answers):
    answers["files"].clear()


def name_of_a_file(name):
    def change(answers):
        files = answers["graphql"]["RunFiles"]["answers"]["a1b2c3d4"]["data"]["project"]["run"]["files"]
        files["edges"][0]["node"]["name"] = name

    return change


def name_of_a_run(name):
    def change(answers):
        answers["graphql"]["Runs"]["answers"][""]["data"]["project"]["runs"]["edges"][0]["node"]["name"] = name
        files = answers["graphql"]["RunFiles"]["answers"]
        files[name] = files["a1b2c3d4"]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_project, "the W&B project lab/patterns cannot be read (Could not find project patterns)"),
        (no_runs, "the W&B project lab/patterns holds no finished run with results: run the job first"),
        (no_results, "the W&B project lab/patterns holds no finished run with results: run the job first"),
        (wrong_key, "401"),
        (lost_file, "404"),
        (name_of_a_file("results/../../outside"), "has a file '../../outside'"),
        (name_of_a_file("results/..\\outside"), "has a file '..\\\\outside'"),
        (name_of_a_file("results/.."), "has a file '..'"),
        (name_of_a_run("../outside"), "has a file '../outside'"),
    ],
)
def test_a_project_that_cannot_be_read_is_one_message(fetch, tmp_path, change, message):
    with serving(changed(change)) as (environment, _), pytest.raises(UserError) as error:
        fetch(environment)
    check(error, message)
    assert not [path for path in tmp_path.rglob("outside*")]


@pytest.mark.parametrize(
    ("environment", "project", "message"),
    [
        ({}, "lab/patterns", ": run wandb login, or set WANDB_API_KEY"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "lab/patterns", "127.0.0.1 does not answer"),
        ({}, "patterns", "patterns is no W&B project: give ENTITY/PROJECT"),
        ({}, "lab/patterns/runs/a", "is no W&B project: give ENTITY/PROJECT"),
    ],
)
def test_without_key_or_answer_it_neither_waits_nor_asks(fetch, environment, project, message):
    with pytest.raises(UserError) as error:
        fetch(environment, project)
    check(error, message)


def check(error, message):
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert KEY not in str(error.value)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The addresses that were tried, all in vain; without W&B's settings, netrc or a proxy."""
    tried = []

    def connect(address, _seconds):
        tried.append(address)
        raise ConnectionRefusedError

    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(wandb_server.socket, "create_connection", connect)
    return tried


def test_an_address_that_is_none_is_one_error_that_does_not_repeat_it(monkeypatch):
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", f"user:{PASSWORD}@nowhere")
    with pytest.raises(UserError, match="not possible: WANDB_BASE_URL") as caught:
        wandb_server.reachable()
    assert PASSWORD not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def reachable(monkeypatch):
    """Whether W&B is, where its server has this address."""

    def found(url):
        monkeypatch.setattr(wandb_server, "_server", lambda: urlparse(url))
        return wandb_server.reachable()

    return found


def test_without_a_key_no_connection_is_tried(asked, reachable, tmp_path, caplog):
    (tmp_path / "netrc").write_text(f"machine example.org\n  login user\n  password {KEY}\n")
    assert not reachable("https://api.wandb.ai")
    assert not reachable("http://example.org:8080")  # W&B looks for the port too, and would ask
    assert asked == []
    assert caplog.messages == []


def test_a_key_of_any_kind_lets_the_server_be_tried(asked, reachable, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text(f"machine one.org:8080\n  login user\n  password {KEY}\n")
    assert not reachable("http://one.org:8080")
    monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", "token")
    assert not reachable("https://two.org")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert not reachable("http://three.org/path")
    assert asked == [("one.org", 8080), ("two.org", 443), ("three.org", 80)]


def test_behind_a_proxy_the_proxy_is_tried(asked, reachable, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("https_proxy", f"http://user:{PASSWORD}@proxy.org:3128")
    monkeypatch.setenv("no_proxy", "inside.org")
    assert not reachable("https://outside.org")
    assert not reachable("https://inside.org")
    assert asked == [("proxy.org", 3128), ("inside.org", 443)]
    assert PASSWORD not in caplog.text


def test_a_name_server_that_hangs_is_not_waited_for(asked, reachable, monkeypatch):
    over = threading.Event()

    def hang(*_):
        over.wait()
        raise OSError

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_server, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(wandb_server.socket, "create_connection", hang)
    assert not reachable("https://api.wandb.ai")
    over.set()
