"""Every argument of Lightning's Trainer is known: the suite's own, harmless, or refused with a remedy."""

import inspect

import pytest
import pytorch_lightning as pl

from pattern_bench.configuration.checks import check_trainer
from pattern_bench.configuration.trainer_arguments import HARMLESS, OWN, REFUSED
from pattern_bench.errors import UserError


def test_every_argument_of_lightnings_is_known():
    arguments = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert arguments == {*OWN, *HARMLESS, *REFUSED} - {"lost_after", "tf32"}
    assert not set(HARMLESS) & set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_argument_that_could_change_a_figure_is_refused_with_a_remedy(name):
    with pytest.raises(UserError, match=rf"trainer\.{name}=1 is not possible: .*(give|leave)"):
        check_trainer({"accelerator": "cpu", name: 1})


def test_an_unknown_argument_gets_a_hint():
    with pytest.raises(UserError, match=r"trainer.profilr=simple is unknown: did you mean profiler\?"):
        check_trainer({"profilr": "simple"})
    with pytest.raises(UserError, match=r"trainer.limit_predict_batchs=1 is unknown"):
        check_trainer({"limit_predict_batchs": 1})


def test_strategies_of_which_the_suite_knows_nothing_are_refused():
    with pytest.raises(UserError, match=r"trainer.strategy=fsdp is not possible: choose from auto, ddp"):
        check_trainer({"strategy": "fsdp"})


def test_a_refused_argument_ends_the_job_before_it_begins(command, tmp_path):
    done = command("logger=none", "+trainer.limit_predict_batches=1", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: trainer.limit_predict_batches=1 is not possible: give data.limit")
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "splits.csv").exists()
