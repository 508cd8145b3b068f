"""What the folder of a run may say: its settings, and nothing that is imported or run, or read from the environment."""

import os
import shlex

import pytest
import yaml
from hydra import compose, initialize_config_dir

from pattern_bench.commands.hydra_entry import arguments
from pattern_bench.configuration.location import CONF
from pattern_bench.configuration.resumed_overrides import may_be_taken, quoted, shell_command
from pattern_bench.errors import UserError

REFUSED = [
    # classes, and the check of them
    "allow_any_target=true", "++allow_any_target=true", "+allow_any_target=True", "~allow_any_target",
    "estimator._target_=os.system", "++estimator._target_=os.system", "+estimator._recursive_=false",
    "+estimator={_target_: os.system}", "+x=[a, {b: {_target_: os.system}}]", r"+x={\_target\_: os.system}",
    "+x={ _target_ : os.system}", "+x={a._target_: b}", "model.path=mine.Net", "++model.path=mine.Net",
    "model={path: mine.Net}", "data.path=os.system", "+trainer.plugins=[{path: a.b}]",
    # groups from elsewhere
    "estimator=../../../tmp/evil", "estimator=/tmp/evil", "estimator='/tmp/evil'", r"estimator=..\\evil",
    "estimator=[/tmp/evil]", "+extra@_global_=evil", "+extra@hydra=evil", "model@data=imported", "+@hydra=x",
    "method@methods.gradient=../evil",
    # flags
    "-m", "--multirun", "-cn", "--config-dir=/tmp", "--config-d=/tmp", "-cd=/tmp", "--cfg=job", "-",
    # Hydra's own
    "hydra.run.dir=/tmp", "+hydra.searchpath=[/tmp]", "hydra.searchpath=[file:///tmp]", "hydra={searchpath: [/tmp]}",
    "++hydra={run: {dir: x}}", "hydra/launcher=joblib", "+hydra/callbacks=x", "hydra/launcher@hydra=x",
    "hydra.job.env_set.LD_PRELOAD=x", "hydra.callbacks.x._target_=os.system", "~hydra.callbacks",
    # the environment
    "data.root=${oc.env:HOME}", "data.root='${oc.env:HOME}'", 'model.name="a ${oc.env:HOME}"', "+x={a: [${b}]}",
    "data.root=${data.name}", "+x={a: '${oc.decode:b}'}", "data.root=${hydra:runtime.cwd}",
    # several, or none
    "seed=1,2", "estimator=choice(a,b)", "seed=range(0,9)", "estimator=glob(*)", "=1", "+=1", "x", "", "a=[", "a={b",
    "a=b\n--config-dir=/tmp", "\u200b--multirun", " --multirun", "ｈydra.run.dir=x",
]  # fmt: skip
TAKEN = [
    "estimator=w", "data=folder", "data.root=/my photos/a", "data.root='/a,b'", "layer='features.*'", "layer=[a, b]",
    "+trainer.max_time=1", "++seed=3", "~curve", "curve=null", "model.weights=/a/w.pt", "model.training.epochs=3",
    "+model.arguments={soft: none, sizes: [1, 2]}", "method@methods.gradient=null", "+sweep=fig3", "show=[a,b]",
    "data.root='s3://a/b-{000..003}.tar'", "figure=fig1", "data.root=C\\:a", "degradation.value=-1",
]  # fmt: skip


def run_folder(folder, *overrides):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    return folder


@pytest.mark.parametrize("text", REFUSED)
def test_what_names_code_flags_hydra_or_the_environment_is_refused_by_name(tmp_path, text):
    folder = run_folder(tmp_path / "run", "estimator=w", text)
    with pytest.raises(UserError) as caught:
        arguments([f"resume={folder}", "quiet=true"])
    said = str(caught.value)
    assert said.startswith(f"resume={folder} says ")
    assert "\n" not in said
    if text.isascii() and text.isprintable():
        again = shlex.split(said.partition("give it anew: ")[2])
        assert again == ["python", "-m", "pattern_bench", f"resume={folder}", "quiet=true", text]


@pytest.mark.parametrize("text", TAKEN)
def test_settings_are_taken(tmp_path, text):
    folder = run_folder(tmp_path / "run", text)
    assert arguments([f"resume={folder}"]) == [text, f"hydra.run.dir='{folder}'"]


def test_what_is_given_anew_takes_the_folders_place_however_it_is_written(tmp_path):
    overrides = ["++allow_any_target=true", "+model.path=evil.Net", "model=imported", "seed=1"]
    folder = run_folder(tmp_path / "run", *overrides)
    given = ["allow_any_target=true", "model.path=mine.Net"]
    assert arguments([f"resume={folder}", *given])[:4] == ["model=imported", "seed=1", *given]
    with pytest.raises(UserError) as caught:
        arguments([f"resume={folder}", "model.path=mine.Net"], "pattern_bench.gallery")
    assert str(caught.value).endswith(
        f"python -m pattern_bench.gallery resume={folder} model.path=mine.Net ++allow_any_target=true"
    )


def test_the_error_of_a_network_of_ones_own_is_the_command_that_resumes_it(tmp_path):
    folder = run_folder(tmp_path / "run", "allow_any_target=true", "model=imported", "model.path=mine.Net")
    with pytest.raises(UserError) as caught:
        arguments([f"resume={folder}"])
    command = f"python -m pattern_bench resume={folder} allow_any_target=true model.path=mine.Net"
    assert str(caught.value).endswith(command)
    assert "model=imported" in arguments(shlex.split(command)[3:])


def test_no_code_of_a_folder_runs(command, tmp_path):
    """Neither by its overrides nor by a configuration beside it, which a group's name could lead to."""
    evil = f"# @package _global_\nallow_any_target: true\nestimator: {{_target_: os.mkdir, path: {tmp_path}/ran}}\n"
    (tmp_path / "evil.yaml").write_text(evil)
    up = os.path.relpath(tmp_path / "evil", CONF / "estimator")
    done = command(f"resume={run_folder(tmp_path / 'run', f'+estimator={up}', 'logger=none')}")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", ["a: &a [1]\nb: *a", "{a: b}", "- !!python/object/apply:os.system [x]", "[" * 9000, "\x00", "- " * 900]
)
def test_damaged_overrides_are_one_error(tmp_path, content):
    folder = run_folder(tmp_path / "run")
    (folder / ".hydra" / "overrides.yaml").write_text(content)
    with pytest.raises(UserError, match=r"cannot be taken up.*damaged"):
        arguments([f"resume={folder}"])


@pytest.mark.parametrize("link", ["rho.csv", "partial", ".hydra/config.yaml", "pattern_bench.log", "wandb"])
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path, link):
    folder = run_folder(tmp_path / "run", "seed=1")
    (tmp_path / "victim").mkdir()
    (folder / link).symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=f"link that leads out of it, '{link}'"):
        arguments([f"resume={folder}"])


def test_links_within_the_folder_and_those_of_wandb_are_not(tmp_path):
    folder = run_folder(tmp_path / "run", "seed=1")
    (folder / "rho.csv").write_text("")
    (folder / "same.csv").symlink_to("rho.csv")
    (folder / "wandb" / "files").mkdir(parents=True)
    (folder / "wandb" / "files" / "rho.csv").symlink_to("/elsewhere/before/it/moved/rho.csv")
    assert arguments([f"resume={folder}"])[0] == "seed=1"
    (folder / "wandb" / "settings").write_text("[default]\nbase_url = http://evil\n")
    with pytest.raises(UserError, match="send your key elsewhere"):
        arguments([f"resume={folder}"])


@pytest.mark.parametrize(
    "name", ["it's", "a b", "${oc.env:HOME}", "a\\", r"\${x}", "é=ü,{1}", 'x"y', r"a\'b", "[a]", "a:b", "$"]
)
def test_a_folder_is_taken_by_its_very_name(tmp_path, name):
    folder = run_folder(tmp_path / name, "seed=1")
    (given,) = [text for text in arguments([f"resume={folder}"]) if text.startswith("hydra.run.dir=")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [given.replace("hydra.run.dir=", "+x="), f"+y={quoted(name)}"])
    assert (cfg.x, cfg.y) == (str(folder), name)


# --- the report ---


def test_a_message_holds_no_control_characters():
    assert shell_command(["a\x1b[2J\n", "b" * 10_000]).isprintable()
    assert len(shell_command(["b" * 10_000])) < 300
    assert not may_be_taken("--x")


@pytest.mark.parametrize(
    "given", ["cache.dir=", "hydra.run.dir=''", 'data.root=""', "resume=", "+resume=", "++model.weights="]
)
def test_a_setting_without_a_value_is_refused(given):
    """As a shell makes it of an unset variable: an empty path would be the current folder."""
    with pytest.raises(UserError, match="has no value: give one, or leave it out"):
        arguments(["estimator=a", given])


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_resume_is_understood_however_it_is_written(tmp_path, prefix):
    with pytest.raises(UserError, match="is not the folder of a run"):
        arguments([f"{prefix}resume={tmp_path}"])
