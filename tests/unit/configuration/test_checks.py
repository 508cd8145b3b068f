"""The checks of settings, each against the message that a user sees, without data, networks or torch."""

import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from pattern_bench.configuration.checks import (
    check_bootstrap,
    check_gallery,
    check_gallery_overrides,
    check_one_process,
    check_sanity,
    check_sanity_overrides,
    check_settings,
    check_trainer,
    names_shown,
)
from pattern_bench.configuration.location import CONF
from pattern_bench.errors import UserError

CHOICES = ("all", "rectified", "positive"), ("most", "least"), ("mean", "blur", "constant")
FIGURES, STARTS = ("fig1", "fig4b", "fig5"), ("gaussian", "classes")


def configured(*overrides, name="config"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


def refusal(check, *given):
    with pytest.raises(UserError) as refused:
        check(*given)
    return str(refused.value)


@pytest.mark.parametrize("overrides", [
    [], ["probe=sgd"], ["probe=both"], ["data=known_signal"], ["data=toy"], ["data.limit=null"], ["cache.gib=null"],
    ["degradation.images=null"], ["explanation.images=null"], ["bootstrap.resamples=10"], ["cache.gib=0.5"],
    ["checkpoint.seconds=0"], ["seed=4294967295"], ["moments.positions=1"], ["degradation.value=-3"],
    ["data.fit=100", "data.probe=0.3"], ["bootstrap.resamples=0", "probe=sgd"],
])  # fmt: skip
def test_possible_settings_pass(overrides):
    check_settings(configured(*overrides), *CHOICES)


WHOLE = "give a whole number of at least"
REFUSED = [
    (["explanation.images=0"], f"explanation.images=0 is not possible: {WHOLE} 1"),
    (["degradation.images=0"], f"degradation.images=0 is not possible: {WHOLE} 1"),
    (["degradation.patch=2.5"], f"degradation.patch=2.5 is not possible: {WHOLE} 1"),
    (["degradation.steps=true"], f"degradation.steps=True is not possible: {WHOLE} 1"),
    (["data.batch_size=0"], f"data.batch_size=0 is not possible: {WHOLE} 1"),
    (["data.batch_size=null"], f"data.batch_size=None is not possible: {WHOLE} 1"),
    (["data.workers=-1"], f"data.workers=-1 is not possible: {WHOLE} 0"),
    (["data.limit=many"], f"data.limit=many is not possible: {WHOLE} 1"),
    (["data=toy", "data.data_seed=null"], f"data.data_seed=None is not possible: {WHOLE} 0"),
    (["seed=some"], f"seed=some is not possible: {WHOLE} 0"),
    (["seed=null"], f"seed=None is not possible: {WHOLE} 0"),
    (["seed=4294967296"], "seed=4294967296 is too large for NumPy's generator: give one below 2**32 = 4294967296"),
    (["probe=sgd", "probe.steps=0"], f"probe.steps=0 is not possible: {WHOLE} 1"),
    (["probe=sgd", "probe.patience=0"], f"probe.patience=0 is not possible: {WHOLE} 1"),
    (["probe.neurons=0"], f"probe.neurons=0 is not possible: {WHOLE} 1"),
    (["bootstrap.resamples=-1"], f"bootstrap.resamples=-1 is not possible: {WHOLE} 0"),
    (["bootstrap.resamples=1"], "bootstrap.resamples=1 has no spread: give 0 for no bootstrap, or at least 2"),
    (["bootstrap.chunks=1"], f"bootstrap.chunks=1 is not possible: {WHOLE} 2"),
    (["checkpoint.seconds=-1"], "checkpoint.seconds=-1 is not possible: give a number, 0 for after every batch"),
    (["probe.regularisation=-1"], "probe.regularisation=-1 is not possible: give a positive number"),
    (["probe=sgd", "probe.learning_rate=fast"], "probe.learning_rate=fast is not possible: give a positive number"),
    (["moments.memory_gib=0"], "moments.memory_gib=0 is not possible: give a positive number"),
    (["moments.positions=0"], "moments.positions=0 is not possible: give a positive number"),
    (["moments.positions=2"], "moments.positions=2 is no share: give up to 1.0, which is exact"),
    (["data.fit=half"], "data.fit=half is not possible: give a positive number"),
    (["data.probe=0"], "data.probe=0 is not possible: give a positive number"),
    (["data.validation=.inf"], "data.validation=.inf is not possible: give a positive number"),
    (["cache.gib=0"], "cache.gib=0 is not possible: give a positive number of GiB, or null for no bound"),
    (["degradation.value=white"], "degradation.value=white is no number: give one, such as 0.0"),
    (["criterion=positiv"], "criterion=positiv is unknown: did you mean positive?"),
    (["degradation.order=worst"], "degradation.order=worst is unknown: choose from most, least"),
    (["degradation.replacement=noise"], "degradation.replacement=noise is unknown: choose from mean, blur, constant"),
    (["bootstrap.resamples=5", "probe=sgd"],
     "bootstrap.resamples needs the closed form, which the moments of chunks are enough for: give probe=closed_form or "
     "probe=both, or bootstrap.resamples=0"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_a_setting_that_is_not_possible_is_refused(overrides, said):
    assert refusal(check_settings, configured(*overrides), *CHOICES) == said


def test_the_bootstrap_needs_images_and_a_cache():
    check_bootstrap(configured(), 1, False)
    cfg = configured("bootstrap.resamples=5", "bootstrap.chunks=4", "cache.dir=/c")
    check_bootstrap(cfg, 4, True)
    assert refusal(check_bootstrap, cfg, 3, True) == (
        "bootstrap.chunks=4 is more than the 3 images of the smallest split: give fewer chunks, or more images"
    )
    assert refusal(check_bootstrap, cfg, 4, False) == (
        "bootstrap.resamples keeps the moments of chunks in cache.dir=/c, which cannot be written: choose another "
        "cache.dir"
    )


@pytest.mark.parametrize(("trainer", "said"), [
    ({"tf32": "maybe"}, "trainer.tf32=maybe is not possible: give true or false"),
    ({"lost_after": 0}, "trainer.lost_after=0 is not possible: give a number of seconds above 0"),
    ({"lost_after": True}, "trainer.lost_after=True is not possible: give a number of seconds above 0"),
    ({"strategy": "fsdp"}, "trainer.strategy=fsdp is not possible: choose from auto, ddp"),
    ({"max_epochs": 3},
     "trainer.max_epochs=3 is not possible: give model.training.epochs, and probe.steps for probe=sgd"),
    ({"profilr": 1}, "trainer.profilr=1 is unknown: did you mean profiler?"),
])  # fmt: skip
def test_a_trainer_that_is_not_possible_is_refused(trainer, said):
    check_trainer({"accelerator": "cpu", "devices": 1, "tf32": False, "lost_after": 600, "profiler": "simple"})
    assert refusal(check_trainer, trainer) == said


@pytest.mark.parametrize(("overrides", "said"), [
    (["figure=fig2"], "figure=fig2 is unknown: choose from fig1, fig4b, fig5"),
    (["percentile=0"], "percentile=0 is not possible: give more than 0, up to 100 (the maximum)"),
    (["percentile=101"], "percentile=101 is not possible: give more than 0, up to 100 (the maximum)"),
    (["image=1"], "image=1 has no effect on figure=fig5: give images instead"),
    (["figure=fig1", "images=2"], "images=2 has no effect on figure=fig1: give image instead"),
    (["images=0"], "images=0 is not possible: give a whole number of at least 1, or null"),
    (["figure=fig1", "image=-1"], "image=-1 is not possible: give a whole number of at least 0, or null"),
])  # fmt: skip
def test_settings_of_the_gallery(overrides, said):
    check_gallery(configured("figure=fig1", "image=0", "percentile=99.5", name="gallery"), FIGURES)
    check_gallery(configured("images=3", name="gallery"), FIGURES)
    assert refusal(check_gallery, configured(*overrides, name="gallery"), FIGURES) == said


@pytest.mark.parametrize(("overrides", "said"), [
    (["images=0"], "images=0 is not possible: give a whole number of at least 1"),
    (["images=null"], "images=None is not possible: give a whole number of at least 1"),
    (["refit=-1"], "refit=-1 is not possible: give a whole number of at least 0"),
    (["directions=1"], "directions=1 is not possible: give a whole number of at least 2"),
    (["start=ones"], "start=ones is unknown: choose from gaussian, classes"),
])  # fmt: skip
def test_settings_of_the_sanity_checks(overrides, said):
    check_sanity(configured("start=classes", name="sanity"), STARTS)
    assert refusal(check_sanity, configured(*overrides, name="sanity"), STARTS) == said


def test_overrides_without_an_effect_are_refused():
    fig5, fig4b = configured(name="gallery"), configured("figure=fig4b", name="gallery")
    check_gallery_overrides(fig5, ["estimator=a", "methods.gradient.name=g", "seed=1"])
    check_gallery_overrides(fig4b, ["estimators.a.name=b"])
    check_sanity_overrides(["estimator=a", "show=gradient"])
    said = "probe=sgd has no effect on figure=fig5: leave it out"
    assert refusal(check_gallery_overrides, fig5, ["seed=1", "probe=sgd"]) == said
    said = "+estimators.x=1 has no effect on figure=fig5: leave it out"
    assert refusal(check_gallery_overrides, fig5, ["+estimators.x=1"]) == said
    said = "estimator=a has no effect on figure=fig4b: leave it out"
    assert refusal(check_gallery_overrides, fig4b, ["estimator=a"]) == said
    said = "degradation.steps=3 has no effect on the sanity checks: leave it out"
    assert refusal(check_sanity_overrides, ["degradation.steps=3"]) == said


def test_one_process_is_all_that_the_gallery_and_the_sanity_checks_take():
    check_one_process(configured("trainer=ddp_cpu", "trainer.devices=1").trainer)
    said = "trainer.devices=2: this command runs in one process; give trainer.devices=1"
    assert refusal(check_one_process, configured("trainer=ddp_cpu").trainer) == said
    cfg = configured("trainer=ddp_cpu", "trainer.devices=1", "trainer.num_nodes=2")
    assert refusal(check_one_process, cfg.trainer) == said.replace("2:", "1:", 1)


def test_names_to_show():
    choices = {"gradient": 1, "lrp_z": 2, "occlusion": 3}
    assert names_shown(None, choices, ["gradient"]) == ["gradient"]
    assert names_shown("lrp_z", choices, []) == ["lrp_z"]
    show = configured("show=[lrp_z,gradient,lrp_z]", name="gallery").show
    assert names_shown(show, choices, []) == ["lrp_z", "gradient"]
    assert refusal(names_shown, [], choices, []) == ("show=[] shows nothing: name some, or give null for the default")
    assert refusal(names_shown, ["gradients"], choices, []) == "show=gradients is unknown: did you mean gradient?"


def test_checks_import_no_torch():
    code = "import sys, pattern_bench.configuration.checks as checks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
