"""A complete run is not written over by a run of other settings, whichever command and however it is started."""

import pytest
from helpers.made_runs import hydra, make_run
from omegaconf import OmegaConf

from pattern_bench.configuration.reach import HOW, REACHES
from pattern_bench.errors import UserError
from pattern_bench.results.complete_run import COMMANDS, refuse_other_settings

SMALL = [
    "logger=none", "data.limit=100", "model.training.epochs=1", "degradation.images=2", "degradation.steps=2",
    "explanation.images=1",
]  # fmt: skip


@pytest.fixture
def run(configure, tmp_path):
    """The folder of a run that is there, and a function that begins one with more overrides."""
    folder = tmp_path / "run"
    make_run(folder)
    OmegaConf.save(configure(*SMALL), folder / "config.yaml", resolve=True)
    return folder, lambda *more: refuse_other_settings(configure(*SMALL, *more), folder, "hydra.run.dir", ["again"])


@pytest.mark.parametrize("other", [
    "seed=3", "estimator=w", "layer=features.0", "layer=[features.0,features.3]", "degradation.value=1.5",
    "probe=both", "trainer.tf32=true", "method.last_layer=weight", "model.name=mine", "data.batch_size=7",
    "model.training=null",
])  # fmt: skip
def test_settings_that_decide_figures_are_refused(run, other):
    folder, begin = run
    name = other.lstrip("+").partition("=")[0]
    with pytest.raises(UserError, match=rf"^hydra.run.dir={folder} holds a complete run of other settings \(.*"
                                        rf"{name}.*, now .*start this one in a folder of its own, again"):  # fmt: skip
        begin(other)


@pytest.mark.parametrize("other", [
    "seed=0", "quiet=true", "logger=csv", "cache.dir=/elsewhere", "cache.gib=3", "checkpoint.seconds=0",
    "trainer.devices=2", "+trainer.detect_anomaly=true",
    "data.workers=3", "moments.memory_gib=0.5", "allow_any_target=true",
])  # fmt: skip
def test_settings_of_how_it_is_done_are_not(run, other):
    _, begin = run
    begin(other)


def test_how_is_what_no_key_has_but_for_rounding():
    for line in REACHES:
        if line.setting in HOW or line.setting.partition(".")[0] + ".*" in HOW:
            assert line.setting == "trainer.tf32" or set(line.keys.split()) <= {"baselines"}, line.setting


def test_a_run_that_is_not_complete_or_not_known_is_no_hindrance(run):
    folder, begin = run
    (folder / "config.yaml").write_text("[")
    begin("seed=3")
    (folder / "config.yaml").unlink()
    begin("seed=3")
    (folder / "config.yaml").write_text("seed: 0")
    for mark in COMMANDS.values():
        (folder / mark).write_text("{}")
        with pytest.raises(UserError, match=r"and [0-9]+ more"):
            begin("seed=3")
        (folder / mark).unlink()
    begin("seed=3")


@pytest.mark.parametrize(("module", "given", "said"), [
    ("pattern_bench", ["-m", "seed=3", "hydra.sweep.dir=.", "hydra.sweep.subdir=run"], "give another hydra.sweep.dir"),
    ("pattern_bench", ["hydra.run.dir=run", "seed=3"], "of its own, python -m pattern_bench seed=3, or remove"),
    ("pattern_bench", ["resume=run", "seed=3"], "python -m pattern_bench data.limit=100 seed=3, or remove"),
    ("pattern_bench.gallery", ["hydra.run.dir=run"], "of its own, python -m pattern_bench.gallery, or remove"),
])  # fmt: skip
def test_commands_leave_a_run_of_other_settings_as_it_is(run, command, tmp_path, module, given, said):
    folder, _ = run
    hydra(folder, ["data.limit=100"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = command(*given, module=module)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: hydra.")
    assert "run holds a complete run of other settings (" in error
    assert said in error
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"} == before
