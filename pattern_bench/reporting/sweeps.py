"""Hydra's notes beside the results: the command of a run, and the jobs that a sweep was to have."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pattern_bench import methods
from pattern_bench.configuration.location import CONF
from pattern_bench.configuration.resumed_overrides import is_override, may_be_taken, quoted, shell_command
from pattern_bench.errors import UserError
from pattern_bench.results.complete_run import COMMANDS
from pattern_bench.results.labels import estimators
from pattern_bench.storage.untrusted import UNREADABLE, present, read_yaml

MOST_JOBS = 100_000
"""Of a sweep: a range in somebody's folder can be as long as it likes."""
# One of our own files, which says where a sweep's jobs run.
_HARMLESS = re.compile(r"-m|hydra/launcher=\w+")
# What a network of one's own is called, as long as nobody imports it.
_NAME_ALONE = re.compile(r"model\.path=[\w.]+")


@dataclass(frozen=True)
class Sweep:
    """A multirun folder.

    Args:
        folder: the folder.
        kind: a key of COMMANDS.
        arguments: the overrides as they were given, ranges and lists included.
        jobs: the overrides of each of its jobs; None where another sweeper than Hydra's own chose them.
    """

    folder: Path
    kind: str
    arguments: tuple[str, ...]
    jobs: tuple[tuple[str, ...], ...] | None


def read_sweep(folder: Path) -> Sweep | None:
    """Return the sweep of which ``folder`` holds the ``multirun.yaml``; None where it is another program's.

    Raises:
        UserError: where the file is damaged.
    """
    try:
        node = read_yaml(folder / "multirun.yaml")["hydra"]
        kind, sweeper, overrides = node["job"]["name"], node["sweeper"], node["overrides"]
        if kind not in COMMANDS:
            return None
        task = [str(override) for override in overrides["task"]]
        own = [str(override) for override in overrides["hydra"]]
        # With these the sweep's command is started again, in its own folder.
        outer = [text for text in own if not text.startswith(("hydra.mode=", "hydra.sweep.dir="))]
        if sweeper["_target_"].rpartition(".")[2] != "BasicSweeper":
            return Sweep(folder, kind, (*task, *outer), None)
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        return Sweep(folder, kind, (*task, *outer), _jobs([*params, *task]))
    except (*UNREADABLE, HydraException, OmegaConfBaseException) as error:
        raise UserError(f"the sweep in {folder} is damaged (multirun.yaml: {_line(error)}): remove it") from error


def _jobs(arguments: list[str]) -> tuple[tuple[str, ...], ...]:
    """Return the overrides of each job, as Hydra's own sweeper splits them."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()  # for glob(), which asks which choices there are
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
        sizes = [len(list(islice(o.sweep_iterator(), MOST_JOBS))) for o in overrides if o.is_discrete_sweep()]
        if math.prod(sizes) >= MOST_JOBS:
            raise ValueError(f"it has {MOST_JOBS} jobs or more")
        (batch,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return tuple(tuple(job) for job in batch)


def read_overrides(folder: Path) -> tuple[str, ...] | None:
    """Return the overrides of the run in ``folder``; None where Hydra did not start it.

    Raises:
        UserError: where the file is damaged.
    """
    file = folder / ".hydra" / "overrides.yaml"
    try:
        if not present(file):
            return None
        content = read_yaml(file)
        if not isinstance(content, list):
            raise ValueError("it is no list")
        return tuple(str(override) for override in content)
    except UNREADABLE as error:
        raise UserError(f"the run in {folder} is damaged (.hydra/overrides.yaml: {_line(error)}): remove it") from error


def kind_of_run(folder: Path) -> str | None:
    """Return which of COMMANDS started the run in ``folder``, complete or not; None where none of them did."""
    try:
        kind = read_yaml(folder / ".hydra" / "hydra.yaml")["hydra"]["job"]["name"]
    except UNREADABLE:
        return None
    return kind if kind in COMMANDS else None


def command_of(kind: str, arguments: Sequence[str], sweep: Path | None = None) -> str:
    """Return the command line that runs ``arguments``, which a folder gave; as the sweep in the folder ``sweep``, which
    runs what it lacks. What no folder chooses stands behind it, as a comment."""
    left_out = [text for text in arguments if not (_HARMLESS.fullmatch(text) or may_be_taken(text, swept=True))]
    arguments = [text for text in arguments if text not in left_out]
    if sweep is not None:
        arguments = ["-m", *arguments, f"hydra.sweep.dir={_quoted(sweep)}"]
    line = shell_command(["python", "-m", _module(kind), *arguments])
    return f"{line}  # without {shell_command(left_out)}: add what you trust" if left_out else line


def command_to_resume(kind: str, folder: Path) -> str:
    """Return the command line that takes up the unfinished run in ``folder``."""
    return shell_command(["python", "-m", _module(kind), f"resume={_quoted(folder)}"])


def _module(kind: str) -> str:
    return "pattern_bench" if kind == "pattern_bench" else f"pattern_bench.{kind}"


def _quoted(folder: Path) -> str:
    text = str(folder)
    return text if all(c.isalnum() or c in "/._-" for c in text) else quoted(text)


@dataclass(frozen=True)
class Names:
    """The names under which a job's results stand in tables; ``layer`` is the setting, and ``estimator`` that of its
    patterns."""

    model: str
    data: str
    criterion: str
    probes: tuple[str, ...]
    layer: tuple[str, ...]
    estimator: str
    curve: tuple[str, str] | None
    """Estimator and method of its degradation curve; None where only some layers are fitted."""


def expected_names(overrides: Sequence[str]) -> Names | None:
    """Return the names of a job's results from its overrides, which are composed and nothing of them imported; None
    where Hydra does not understand them, or cannot compose them. What no folder chooses is left out."""
    if not all(map(is_override, overrides)):
        return None
    kept = [text for text in overrides if may_be_taken(text) or _NAME_ALONE.fullmatch(text)]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", kept, return_hydra_config=True)
        chosen = cfg.hydra.runtime.choices
        estimator, method = str(chosen.estimator), str(chosen.method)
        layers = [str(layer) for layer in (cfg.layer if OmegaConf.is_list(cfg.layer) else [cfg.layer])]
        probe = str(cfg.probe.name)
        return Names(
            str(cfg.model.name), str(cfg.data.name), str(cfg.criterion),
            ("closed_form", "sgd") if probe == "both" else (probe,), tuple(layers), estimator,
            _curve(cfg, estimator, method, layers),
        )  # fmt: skip
    except (*UNREADABLE, HydraException, OmegaConfBaseException):
        return None


def _curve(cfg: Any, estimator: str, method: str, layers: list[str]) -> tuple[str, str] | None:
    facts, fitted = methods.by_name().get(method), estimators().get(estimator)
    who = "none"
    if facts and facts.needs_patterns:
        if layers != ["all"]:
            return None
        who = estimator
        if fitted and not fitted.has_pattern:
            method = facts.without_patterns or method
    how: Mapping[str, Any] = cfg.degradation
    differs = ["least relevant first"] if how["order"] == "least" else []
    if how["replacement"] != "mean":
        differs.append("blur" if how["replacement"] == "blur" else f"constant {how['value']:g}")
    return who, ", ".join([method, *differs])


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
