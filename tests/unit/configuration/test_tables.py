"""Every setting of ``conf``, set to null, to a list and a group where there is none, to a word for a number: either it
may be so, or it is refused in one line."""

import functools

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn

from pattern_bench.configuration.build import build
from pattern_bench.configuration.checks import (
    check_choices,
    check_complete,
    check_gallery,
    check_sanity,
    check_settings,
    names_shown,
)
from pattern_bench.configuration.location import CONF
from pattern_bench.configuration.tables import most_processes
from pattern_bench.core.estimators import Pattern
from pattern_bench.errors import UserError
from pattern_bench.methods.base import create
from pattern_bench.metrics.degradation import ORDERS, REPLACEMENTS
from pattern_bench.tracking import start

ROUNDS = (
    ["logger=none"], ["data=cifar10", "data.root=here", "model=imported", "model.path=torchvision.models.AlexNet"],
    ["data=folder", "data.root=here", "model=timm", "model.architecture=resnet18", "probe=sgd", "logger=csv"],
    ["data=imagenet", "data.root=here", "model=vgg16_features", "probe=both", "trainer=gpu", "logger=tensorboard"],
    ["data=shards", "data.root=here", "model=linear", "trainer=ddp", "logger=wandb"],
    ["data=known_signal", "trainer=ddp_cpu"], ["data=toy"],
)  # fmt: skip
"""Choices that together bring every setting of the job; the gallery brings every method and every estimator."""
NULLABLE = {
    "resume", "explanation.images", "degradation.images", "degradation.patch", "degradation.steps", "probe.neurons",
    "cache.gib", "data.limit", "data.validation_root", "data.classes", "model.weights", "model.training",
    "model.output", "model.part", "logger.entity", "logger.group", "image", "show", "method.window", "method.stride",
}  # fmt: skip
"""The settings that may be null."""
NULLABLE_OF = {"gallery": {"images"}}
TAKEN = "taken"
NETWORK = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
PATTERNS = {"1": Pattern(NETWORK[1].weight, NETWORK[1].weight, torch.zeros(2, dtype=torch.bool))}


@functools.cache
def composed(name, number=0):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, [*ROUNDS[number]])


def settings_of(node, path=""):
    for key in node:
        yield (below := f"{path}.{key}" if path else str(key))
        if isinstance(value := node[key], DictConfig):
            yield from settings_of(value, below)


@functools.cache
def cases():
    """Each setting of each class, once: with the command and the round of choices that bring it."""
    known, found = set(), []
    places = [*(("config", number) for number in range(len(ROUNDS))), ("gallery", 0), ("sanity", 0)]
    for name, number in places:
        cfg = composed(name, number)
        for setting in settings_of(cfg):
            group = setting.split(".")[0]
            kind = cfg[group].get("_target_", cfg[group].get("kind")) if isinstance(cfg[group], DictConfig) else ""
            own = (name if setting in ("images", "show") else "", kind, setting)
            if own not in known:
                known.add(own)
                found.append((name, number, setting))
    return found


def checked(cfg, name, groups=("estimator", "model", "data", "method", "methods", "estimators", "logger")):
    """All that looks at the settings of ``groups`` before a job begins."""
    check_complete(cfg)
    if name == "gallery":
        check_gallery(cfg, ("fig1", "fig4b", "fig5"))
    if name == "sanity":
        check_sanity(cfg, ("gaussian", "classes"))
    if "show" in cfg:
        names_shown(cfg.show, cfg.methods, list(cfg.methods))
    if "logger" in groups:
        start.check(cfg.logger)
    check_settings(cfg, ("all", "rectified", "positive"), ORDERS, REPLACEMENTS)
    for group in groups:
        if group not in cfg:
            continue
        nodes = {"methods": [*cfg.get("methods", {}).values()], "estimators": [*cfg.get("estimators", {}).values()]}
        for node in nodes.get(group, [cfg[group]] if group != "logger" else []):
            built = build(node)
            if group in ("method", "methods"):
                create(built, NETWORK, PATTERNS, torch.rand(1, 1, 4, 4))


def outcome(name, number, setting, value):
    cfg = composed(name, number).copy()
    OmegaConf.update(cfg, setting, value, merge=False, force_add=True)
    group = setting.split(".")[0]
    try:
        checked(cfg, name, {group} & {"estimator", "model", "data", "method", "methods", "estimators", "logger"})
    except UserError as error:
        return str(error)
    return TAKEN


def test_all_that_is_composed_passes():
    for name in ("config", "gallery", "sanity"):
        checked(composed(name), name)


def test_the_rounds_have_every_class_and_tracker():
    def named(cfg, group):
        node = OmegaConf.to_container(cfg[group])
        return node.get("_target_") or node.get("kind") or node.get("name")

    for group in ("data", "model", "probe", "logger"):
        files = [OmegaConf.load(file) for file in (CONF / group).glob("*.yaml") if file.stem != "toy"]
        every = {named({group: file}, group) for file in files} - {None}
        every -= {"cifar_vgg", "vgg16_features"}  # which have the class of another
        assert {named(composed("config", number), group) for number in range(len(ROUNDS))} >= every


def test_a_setting_is_null_where_a_rule_says_so_and_else_refused():
    wrong = []
    for name, number, setting in cases():
        plain = f"method.{setting.split('.', 2)[-1]}" if setting.startswith("methods.") else setting
        may = plain in NULLABLE or setting in NULLABLE_OF.get(name, ())
        said = outcome(name, number, setting, None)
        if (said == TAKEN) != may or "\n" in said or (not may and setting.split(".")[-1] not in said):
            wrong.append((name, number, setting, said))
    assert wrong == []


def test_a_group_is_no_value_and_a_word_is_no_number():
    wrong = []
    for name, number, setting in cases():
        if setting.startswith(("methods.", "estimators.")):
            continue
        before = OmegaConf.select(composed(name, number), setting)
        if not isinstance(before, DictConfig) and outcome(name, number, setting, {"a": 1}) == TAKEN:
            wrong.append((name, number, setting, "a group"))
        if isinstance(before, int | float) and outcome(name, number, setting, "wrong") == TAKEN:
            wrong.append((name, number, setting, "a word"))
    assert wrong == []


@pytest.mark.parametrize(("override", "said"), [
    ("~probe", "probe=null is not possible: choose from both, closed_form, sgd"),
    ("cache=null", "cache=null is not possible: it holds settings; give one of these, cache.…"),
    ("degradation=3", "degradation=3 is not possible: it holds settings; give one of these, degradation.…"),
    ("data.strict=maybe", "data.strict=maybe is not possible: give true or false"),
    ("quiet=null", "quiet=None is not possible: give true or false"),
    ("layer=null",
     "layer=None is not possible: give all, a layer's name, a glob such as 'features.*', or a list of these"),
    ("data.workers=100000", "data.workers=100000 is more processes than this machine can hold: give at most "
     f"{most_processes()}, which is more than enough"),
    ("trainer.devices=100000", "trainer.devices=100000 is more processes than this machine can hold: give at most "
     f"{most_processes()}, which is more than enough"),
])  # fmt: skip
def test_what_is_said_of_a_setting_that_cannot_be(override, said):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [override])
    with pytest.raises(UserError) as refused:
        check_complete(cfg)
    assert str(refused.value) == said


@pytest.mark.parametrize(("override", "said"), [
    ("data=null",
     "data=null is not possible: choose from cifar10, digits, folder, imagenet, known_signal, shards, toy"),
    ("estimator=NULL", "estimator=NULL is not possible: choose from a, a_plus_minus, random, w, x"),
    ("logger={kind: csv}", "logger={kind: csv} is not possible: choose from csv, none, tensorboard, wandb"),
    ("probe=sgd,null", "probe=sgd,null is not possible: choose from both, closed_form, sgd"),
    ("method@methods.gradient=null", None), ("model.weights=null", None), ("data=digits", None), ("-m", None),
])  # fmt: skip
def test_a_choice_of_nothing_is_refused_before_hydra_stumbles_over_it(override, said):
    if said is None:
        check_choices([override])
        return
    with pytest.raises(UserError) as refused:
        check_choices(["seed=null", override])
    assert str(refused.value) == said


def test_an_image_that_no_network_takes_is_refused_before_it_is_made():
    for side in (0, 2**13 + 1):
        with pytest.raises(UserError, match=rf"^data\.size={side} is "):
            checked(OmegaConf.merge(composed("config", 2), {"data": {"size": side}}), "config")
