"""No setting of one run reaches the figures of another: each is in the keys of what it changes, or changes nothing."""

import importlib
import itertools
import re
import sys
from collections import defaultdict
from pathlib import Path

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, Phase, example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file

from pattern_bench.configuration.build import build
from pattern_bench.configuration.location import CONF
from pattern_bench.configuration.reach import REACHES, STAGES, reach
from pattern_bench.configuration.trainer_arguments import HARMLESS, OWN, REFUSED
from pattern_bench.data.splits import make_splits
from pattern_bench.engine.progress import StageProgress
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.setup import prepare
from pattern_bench.plotting import figures
from pattern_bench.storage.cache import Cache
from pattern_bench.storage.stage_state import StageState

CONFIGS = ("config", "gallery", "sanity")


def leaves(node, path=""):
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path


@pytest.fixture(scope="module")
def every_setting():
    """Paths of all settings of every configuration, with every choice of every group."""
    choices = {}
    for group in sorted(Path(CONF).iterdir()):
        names = [file.stem for file in sorted(group.glob("*.yaml"))] if group.is_dir() else []
        if names and group.name not in ("curve", "sweep"):  # they only choose from other groups
            choices[group.name] = [name for name in names if name != "common"]
    found = set()

    def compose_and_walk(name, *overrides):
        return set(leaves(OmegaConf.to_container(compose(name, list(overrides)), resolve=False)))

    with initialize_config_dir(str(CONF), version_base="1.3"):
        for number in range(max(map(len, choices.values()))):
            chosen = [f"{group}={names[number % len(names)]}" for group, names in choices.items()]
            found |= compose_and_walk("config", *chosen)
        found |= compose_and_walk("gallery") | compose_and_walk("sanity")
    for file in Path(CONF).rglob("*.yaml"):
        own = OmegaConf.to_container(OmegaConf.load(file), resolve=False).get("hydra", {})
        found |= {f"hydra.{leaf}" for leaf in leaves(own)}
    return found


# --- the declaration ---


def test_every_setting_is_declared(every_setting):
    assert {"seed", "data.limit", "model.training.epochs", "method.sampling", "refit"} <= every_setting
    undeclared = []
    for setting in sorted(every_setting):
        try:
            line = reach(setting)
        except KeyError:
            undeclared.append(setting)
            continue
        assert not set(line.keys.split()) - set(STAGES), line
        assert not set(line.rounding.split()) - set(STAGES), line
        assert line.why, line
    assert undeclared == []


def test_a_setting_that_is_forgotten_is_noticed():
    with pytest.raises(KeyError):
        reach("anything.new")
    with pytest.raises(KeyError):
        reach("moments.new")


def test_every_line_of_the_declaration_is_some_settings(every_setting):
    used = {reach(setting) for setting in [*every_setting, *(f"trainer.{name}" for name in (*HARMLESS, *OWN))]}
    assert [line.setting for line in REACHES if line not in used] == []


# --- Lightning's arguments ---


def test_a_remedy_names_settings_that_there_are(every_setting):
    groups = {"logger", "resume", "quiet", "probe"}
    for remedy in REFUSED.values():
        for name in re.findall(r"\b([a-z_]+(?:\.[a-z_]+)+)\b|\b([a-z_]+)=", remedy):
            assert (name[0] or name[1]) in every_setting | groups


# --- keys ---


TINY = [
    "quiet=true", "data.limit=60", "data.batch_size=20", "model.width=2", "model.blocks=[1]", "model.dense=[4]",
    "model.training.epochs=1", "model.training.batch_size=20", "degradation.images=3", "degradation.steps=2",
    "explanation.images=2", "criterion=positive", "probe=both", "probe.steps=2",
]  # fmt: skip


@pytest.fixture
def keys_of(run_job, monkeypatch, tmp_path):
    """Runs a tiny job in a cache of its own; returns the keys of each stage."""
    found = defaultdict(set)
    caches = (tmp_path / f"cache{number}" for number in itertools.count())
    load, make = Cache.load, StageState.__init__

    def loads(self, kind, key, *more):
        found[kind].add(key)
        return load(self, kind, key, *more)

    def makes(self, folder, stage, key, seconds):
        stage = re.sub(r"^(fit|probe|validation)-\d+$", "moments", stage)
        found["baselines" if stage == "baseline" else stage].add(key)
        make(self, folder, stage, key, seconds)

    monkeypatch.setattr(Cache, "load", loads)
    monkeypatch.setattr(StageState, "__init__", makes)
    for name in ("draw_rho", "draw_degradation", "draw_explanations"):
        monkeypatch.setattr(figures, name, lambda *_: False)

    def start(*overrides):
        found.clear()
        run_job(*TINY, f"cache.dir={next(caches)}", *overrides)
        return {stage: frozenset(keys) for stage, keys in found.items() if stage in STAGES}

    return start


CHANGES = (
    "layer=features.*", "seed=1", "criterion=all", "moments.positions=0.5",
    "bootstrap.resamples=2 bootstrap.chunks=4",
    "explanation.images=1", "degradation.images=2", "degradation.order=least", "degradation.steps=1",
    "degradation.patch=3", "degradation.replacement=blur", "estimator=a", "probe.neurons=2",
    "probe.regularisation=1e-3", "probe.learning_rate=0.02", "probe.steps=1", "probe.patience=1",
    "method=pattern_net", "method.last_layer=weight",
    "model.width=3", "model.batch_norm=true", "model.dropout=0.5", "model.training.epochs=2",
    "model.training.learning_rate=0.02", "model.training.batch_size=30", "data.limit=50", "data.fit=0.3",
    "data.probe=0.3", "data.validation=0.15", "data.batch_size=10",
    # and what is declared to be in no key
    "model.name=other", "data.name=other", "data.workers=1", "data.strict=true", "moments.memory_gib=0.5",
    "checkpoint.seconds=0", "quiet=false", "allow_any_target=true", "logger=csv", "+trainer.detect_anomaly=true",
    "hydra.job.name=other",
    *(["trainer.tf32=true"] if "tf32" in OmegaConf.load(CONF / "trainer" / "cpu.yaml") else []),
)  # fmt: skip


@pytest.fixture(scope="module")
def before():
    """The keys of the job that nothing is changed in."""
    return {}


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_is_in_the_keys_that_are_declared_and_in_no_other(keys_of, before, change):
    before.update(before or keys_of())
    after = keys_of(*change.split())
    both = [stage for stage in STAGES if stage in before and stage in after]
    changed = {stage for stage in both if before[stage] != after[stage]}
    lines = [reach(setting) for setting in _settings_of(change)]
    declared = {stage for line in lines for stage in line.keys.split() if stage in both}
    rounded = {stage for line in lines for stage in line.rounding.split()}
    assert declared <= changed <= declared | rounded


def _settings_of(change):
    """A group's choice stands for its class, or kind."""
    for name in re.findall(r"([\w.]+)=", change):
        yield {"estimator": "estimator._target_", "method": "method._target_", "logger": "logger.kind"}.get(name, name)


def fingerprints(configure, *overrides):
    cfg = configure(*overrides)
    source = build(cfg.data)
    splits = make_splits(source, cfg.seed)
    for split in splits.values():
        split.transform = source.transform()
    return {split.fingerprint for split in splits.values()}


@pytest.mark.parametrize(
    ("data", "change"),
    [
        ("toy", "samples=1000"), ("toy", "angle=30"), ("toy", "data_seed=1"), ("known_signal", "scenario=translation"),
        ("known_signal", "side=9"), ("known_signal", "signal=0.4"), ("known_signal", "suppressor=0.0"),
        ("known_signal", "samples=400"), ("known_signal", "data_seed=1"),
        ("digits", "limit=500"), ("folder", "size=32"),
        ("folder", "validation_root=ROOT/class0"), ("folder", "root=ROOT/class1"),
    ],
)  # fmt: skip
def test_what_makes_the_images_is_in_their_fingerprint(configure, photographs, tmp_path, data, change):
    base = [f"data={data}"]
    if data == "folder":
        base += [f"data.root={photographs(tmp_path, 24)}", "data.size=16"]
    before = fingerprints(configure, *base)
    assert before == fingerprints(configure, *base, "data.workers=3", "data.batch_size=7", "data.name=other")
    assert not before & fingerprints(configure, *base, "data." + change.replace("ROOT", str(tmp_path)))


# --- networks ---


NETWORK = """
from torch import nn
from torch.nn import functional as F

class Own(nn.Module):
    def __init__(self, slope=0.0):
        super().__init__()
        self.slope = slope
        self.layer = nn.Linear(64, 10)
        nn.init.eye_(self.layer.weight)

    def forward(self, x):
        return F.leaky_relu(self.layer(x.flatten(1)), self.slope)
"""


@pytest.fixture
def model_key(configure, tmp_path, monkeypatch):
    """The key of a network of the user's own, with this code and these settings."""
    names = (f"own_code_{number}" for number in itertools.count())
    monkeypatch.syspath_prepend(str(tmp_path))

    def key(code, *overrides, name=None):
        name = name or next(names)
        (tmp_path / f"{name}.py").write_text(code)
        importlib.invalidate_caches()
        sys.modules.pop(name, None)
        overrides = ["model=imported", f"model.path={name}.Own", "allow_any_target=true", "data.limit=60", *overrides]
        with StageProgress(True).run("prepare", "prepare") as bar:
            cfg = configure(*overrides)
            return prepare(cfg, Machine.from_settings(cfg, tmp_path), bar, lambda _: None).model_key

    return key


def test_an_argument_that_no_weight_and_no_printed_form_shows_is_in_the_networks_key(model_key):
    one = model_key(NETWORK, name="own_code")
    assert one == model_key(NETWORK, "model.name=other", name="own_code")
    assert one != model_key(NETWORK, "+model.arguments.slope=0.5", name="own_code")


def test_the_code_of_the_users_network_is_in_its_key(model_key):
    before = model_key(NETWORK, name="own_code")
    assert before != model_key(NETWORK.replace("F.leaky_relu", "2 * F.leaky_relu"), name="own_code")


# --- results ---


BASE = [
    "quiet=true", "data.limit=250", "data.batch_size=50", "model.width=4", "model.blocks=[1]", "model.dense=[8]",
    "model.training.epochs=6", "model.training.batch_size=20", "degradation.images=4", "explanation.images=1",
]  # fmt: skip
SAME = {
    "data.workers": ["1", "2"], "data.strict": ["true"], "checkpoint.seconds": ["0", "1000"], "logger": ["csv"],
    "allow_any_target": ["true"], "cache.gib": ["0.00001", "5"], "quiet": ["false"], "explanation.images": ["2"],
    "+trainer.detect_anomaly": ["true"], "+trainer.log_every_n_steps": ["1"], "+trainer.num_sanity_val_steps": ["0"],
    "+trainer.limit_val_batches": ["1", "0.5"], "+trainer.check_val_every_n_epoch": ["2"],
    "+trainer.limit_test_batches": ["1"], "+trainer.enable_autolog_hparams": ["false"],
}  # fmt: skip
"""Declared to change nothing in the results compared, to the bit."""
ROUNDED = {
    "moments.memory_gib": ["0.00001", "0.01"], "+trainer.benchmark": ["true"],
    "+trainer.deterministic": ["true", "warn"],
}  # fmt: skip
"""Declared to change nothing but rounding."""
OTHER = {
    "seed": ["3"], "data.limit": ["90"], "data.batch_size": ["7"], "data.fit": ["0.3"], "estimator": ["a", "w", "x"],
    "criterion": ["rectified"], "moments.positions": ["0.5"], "degradation.order": ["least"],
    "degradation.patch": ["3"], "degradation.replacement": ["blur", "constant"], "layer": ["features.*"],
    "method": ["pattern_net", "gradient"],
    "model.training.epochs": ["1"], "model.width": ["3"], "model.training.learning_rate": ["0.02"],
}  # fmt: skip
"""Of a run that another shares the cache with, and that is to reach nothing of the other's."""


def chosen(choices):
    pairs = [(name, value) for name, values in choices.items() for value in values]
    return st.lists(st.sampled_from(pairs), max_size=4, unique_by=lambda pair: pair[0])


def results(folder):
    tables = {name: (folder / name).read_bytes() for name in ("rho.csv", "degradation.csv", "areas.csv")}
    return tables | {name: t.numpy().tobytes() for name, t in load_file(folder / "patterns.safetensors").items()}


def near(one, other):
    """Whether two runs agree up to rounding."""
    for name, column in (("rho.csv", "rho"), ("degradation.csv", "probability_mean")):
        a, b = (pd.read_csv(folder / name)[column] for folder in (one, other))
        np.testing.assert_allclose(a, b, atol=1e-3)
    a, b = (load_file(folder / "patterns.safetensors") for folder in (one, other))
    for name, tensor in a.items():
        largest = float(b[name].double().abs().max())
        torch.testing.assert_close(tensor.double(), b[name].double(), atol=1e-4 * largest, rtol=0)


def check_a_run_reaches_no_other(run_job, folders, clean, same, rounded, other):
    """A run with harmless settings has the results of one without, and a run that shares the cache with both, and with
    one of settings that are not harmless, has the results of one alone."""
    cache = f"cache.dir={next(folders)}"
    harmless = [f"{name}={value}" for name, value in [*same, *rounded]]
    run_job(*BASE, cache, *(f"{name}={value}" for name, value in other))
    changed = run_job(*BASE, cache, *harmless)
    after = run_job(*BASE, cache)
    torch.use_deterministic_algorithms(False)
    for found in (changed, after):
        if rounded:
            near(found, clean)
        else:
            assert results(found) == results(clean)


@pytest.fixture
def alone(run_job, tmp_path, monkeypatch):
    """Folders for caches, and the run that shares its cache with none."""
    for name in ("draw_rho", "draw_degradation", "draw_explanations"):
        monkeypatch.setattr(figures, name, lambda *_: False)
    folders = (tmp_path / f"cache{number}" for number in itertools.count())
    folder = run_job(*BASE, f"cache.dir={next(folders)}")
    assert not pd.read_csv(folder / "rho.csv").dead.all()
    return folders, folder


EXAMPLES = given(chosen(SAME), chosen(ROUNDED), chosen(OTHER))
SETTINGS = {
    "deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate],
}  # fmt: skip


@pytest.mark.slow
@example([(name, values[0]) for name, values in SAME.items()], [], [("data.limit", "90"), ("seed", "3")])
@example([], [("moments.memory_gib", "0.00001")], [("moments.positions", "0.5"), ("degradation.patch", "3")])
@hypothesis.settings(max_examples=2, **SETTINGS | {"phases": [Phase.explicit, Phase.generate]})
@EXAMPLES
def test_no_setting_of_one_run_reaches_the_results_of_another(run_job, alone, same, rounded, other):
    check_a_run_reaches_no_other(run_job, *alone, same, rounded, other)


@pytest.mark.very_slow
@hypothesis.settings(max_examples=60, **SETTINGS)
@EXAMPLES
def test_no_settings_of_one_run_reach_the_results_of_another(run_job, alone, same, rounded, other):
    check_a_run_reaches_no_other(run_job, *alone, same, rounded, other)


def test_what_is_tried_is_declared_so():
    for name in SAME:
        keys = reach(name.lstrip("+") if "." in name else f"{name}.kind" if name == "logger" else name).keys
        assert keys in ("", "explain"), name
    for name in ROUNDED:
        line = reach(name.lstrip("+"))
        assert line.rounding, name
        assert not line.keys, name
