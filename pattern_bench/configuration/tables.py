"""What each setting of the job, the gallery, the sanity checks and the trainer may be, a rule each; and which groups of
settings there must be. Settings of a data set, a model or a method stand in their classes. Imports no torch.

A setting that may be null says so in its rule (``nullable``); any other is refused where it is.
"""

from __future__ import annotations

import math
import os
from typing import Any

from omegaconf import ListConfig

from pattern_bench.configuration.rules import (
    Rule,
    boolean,
    choice,
    is_number,
    is_text,
    is_whole,
    number_from_zero,
    positive_number,
    text,
    whole_number,
)

CHOSEN = ("model", "data", "estimator", "method", "probe", "trainer", "logger")
"""Groups of which one must be chosen, each a folder of ``conf``."""
SECTIONS = ("moments", "bootstrap", "explanation", "degradation", "cache", "checkpoint")
"""Groups that only hold settings."""
LISTS = {"methods": "method", "estimators": "estimator"}
"""Of gallery and sanity checks: groups of groups, and the folder of ``conf`` that each of these is chosen from."""
PROBES = ("closed_form", "sgd", "both")


def most_processes() -> int:
    """How many processes at most a job may start here: eight for each core, and 32 anywhere."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(32, 8 * cores)


def _few_enough(setting: str) -> Rule:
    return Rule(
        setting,
        lambda count: not is_whole(count) or count <= most_processes(),
        lambda _: f"give at most {most_processes()}, which is more than enough",
        problem="is more processes than this machine can hold",
    )


def _is_devices(value: Any) -> bool:
    if isinstance(value, list | ListConfig):
        return bool(value) and all(map(is_whole, value))
    return value in ("auto", -1, "-1") or (is_whole(value) and value >= 1)


def _names_layers(value: Any) -> bool:
    if isinstance(value, list | ListConfig):
        return all(is_text(name) or is_whole(name) for name in value)
    return is_text(value) or is_whole(value)


JOB = (
    Rule("layer", _names_layers, "give all, a layer's name, a glob such as 'features.*', or a list of these"),
    choice("probe.name", PROBES),
    boolean("quiet"),
    boolean("allow_any_target"),
    text("resume", "give the folder of an interrupted run, or null", nullable=True),
    whole_number("explanation.images", 1, nullable=True),
    whole_number("degradation.images", 1, nullable=True),
    whole_number("degradation.patch", 1, nullable=True),
    whole_number("degradation.steps", 1, nullable=True),
    boolean("data.strict"),
    whole_number("data.batch_size", 1),
    whole_number("data.workers", 0),
    _few_enough("data.workers"),
    whole_number("data.limit", 1, nullable=True),
    whole_number("data.data_seed", 0),
    whole_number("seed", 0),
    Rule("seed", lambda seed: seed < 2**32, f"give one below 2**32 = {2**32}", "is too large for NumPy's generator"),
    whole_number("probe.steps", 1),
    whole_number("probe.patience", 1),
    whole_number("probe.neurons", 1, nullable=True),
    whole_number("bootstrap.resamples", 0),
    Rule("bootstrap.resamples", lambda count: count != 1, "give 0 for no bootstrap, or at least 2", "has no spread"),
    whole_number("bootstrap.chunks", 2),
    number_from_zero("checkpoint.seconds", "give a number, 0 for after every batch"),
    positive_number("probe.regularisation"),
    positive_number("probe.learning_rate"),
    positive_number("moments.memory_gib"),
    positive_number("moments.positions"),
    Rule("moments.positions", lambda share: share <= 1, "give up to 1.0, which is exact", "is no share"),
    positive_number("data.fit"),
    positive_number("data.probe"),
    positive_number("data.validation"),
    text("cache.dir", "give a folder"),
    positive_number("cache.gib", nullable=True, remedy="give a positive number of GiB, or null for no bound"),
    Rule("degradation.value", lambda value: is_number(value) and math.isfinite(value), "give one, such as 0.0",
         "is no number"),
    text("logger.kind", "give the name of a tracker, such as csv, or none"),
    text("logger.project", "give the name of a W&B project"),
    text("logger.entity", "give a W&B user or team, or null for your own", nullable=True),
    text("logger.group", "give a name, or null for the sweep's folder", nullable=True),
)  # fmt: skip
"""The job's settings. Which criteria, orders, replacements and trackers there are, is for other packages to say."""

TRAINER = {
    "tf32": boolean("trainer.tf32"),
    "lost_after": positive_number("trainer.lost_after", remedy="give a number of seconds above 0"),
}
"""The suite's own settings of the trainer."""

LIGHTNING = {
    "accelerator": text("trainer.accelerator", "give cpu, gpu or another that Lightning knows"),
    "devices": Rule("trainer.devices", _is_devices, "give a number of processes of at least 1"),
    "num_nodes": whole_number("trainer.num_nodes", 1),
}
"""Settings that Lightning's trainer takes, too."""
FEW_DEVICES = _few_enough("trainer.devices")

GALLERY = (
    Rule("percentile", lambda share: is_number(share) and 0 < share <= 100,
         "give more than 0, up to 100 (the maximum)"),
)  # fmt: skip

SANITY = (
    whole_number("images", 1),
    whole_number("refit", 0),
    whole_number("directions", 2),
)
