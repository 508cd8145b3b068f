"""The tracker of a run, by the ``kind`` of the classes."""

import sys

import pytest
from helpers.paths import TESTS
from omegaconf import OmegaConf

from pattern_bench import tracking
from pattern_bench.configuration.location import CONF
from pattern_bench.errors import UserError
from pattern_bench.tracking.base import Tracker, harmless
from pattern_bench.tracking.start import by_kind, check, track

RUN = "abcd1234", "job", {"title": "t"}, {"seed": 1}


def test_every_kind_has_a_file_of_settings_and_the_other_way_round():
    kinds = {OmegaConf.load(file)["kind"] for file in (CONF / "logger").glob("*.yaml")}
    assert kinds == set(by_kind())
    assert all(by_kind()[kind].kind == kind for kind in kinds)


def test_an_unknown_kind_is_refused_with_all_that_there_are():
    with pytest.raises(UserError, match="^logger.kind=mlflow is unknown: choose csv, tensorboard, wandb or none$"):  # noqa: RUF043
        check({"kind": "mlflow"})
    with pytest.raises(UserError, match="choose"):
        check({"kind": None})


def test_none_logs_nothing(tmp_path):
    check({"kind": "none"})
    tracker = track({"kind": "none"}, tmp_path, *RUN)
    assert type(tracker) is Tracker
    with tracker:
        tracker.metrics({"a": 1.0})
        tracker.curve("degradation", 0, {"a": 1.0})
        tracker.uses("data", "digits", {})
        tracker.results("r", {}, {})
    assert not tracker.listens
    assert list(tmp_path.iterdir()) == []


def test_disabled_wandb_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    settings = {"kind": "wandb", "project": "p", "entity": None, "group": None}
    assert type(track(settings, tmp_path, *RUN)) is Tracker


def test_csv_has_numbers_curves_and_settings(tmp_path):
    check({"kind": "csv"})
    with track({"kind": "csv"}, tmp_path, *RUN) as tracker:
        tracker.metrics({"rho/mean": 0.5})
        tracker.curve("degradation", 3, {"gradient": 0.25})
    written = (tmp_path / "csv" / "metrics.csv").read_text()
    assert written.splitlines()[0] == "degradation/gradient,rho/mean,step"
    assert "0.25,,3" in written
    assert "seed: 1" in (tmp_path / "csv" / "hparams.yaml").read_text()


def test_a_module_with_a_class_is_all_that_a_new_tracker_needs(tmp_path, monkeypatch):
    before = list(by_kind())
    (tmp_path / "own.py").write_text(
        "from pattern_bench.tracking.base import Tracker\n\nclass Own(Tracker):\n    kind = 'own'\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "__path__", [*tracking.__path__, str(tmp_path)])
        assert list(by_kind()) == [*sorted([*before[:-1], "own"]), "none"]
        assert type(track({"kind": "own"}, tmp_path, *RUN)).__name__ == "Own"
    del tracking.own
    sys.modules.pop("pattern_bench.tracking.own")
    assert list(by_kind()) == before


def test_a_method_that_fails_is_a_warning_once(caplog):
    class Failing(Tracker):
        failed = False

        @harmless
        def metrics(self, values):
            raise OSError("no room\nand more")

    tracker = Failing()
    tracker.metrics({})
    tracker.metrics({})
    assert caplog.messages == ["not everything can be tracked (no room): the run's folder has all results"]


def test_the_module_of_wandb_does_not_hide_the_package():
    import wandb

    from pattern_bench.tracking import wandb as ours

    assert sys.modules["wandb"] is wandb
    assert wandb is not ours
    assert str(TESTS) not in wandb.__file__
