"""Complete runs below folders, found and read: each run once, wherever its files lie twice."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from pattern_bench.errors import UserError
from pattern_bench.reporting import whole
from pattern_bench.reporting.sweeps import COMMANDS, kind_of_run, read_overrides
from pattern_bench.results.schema import AREA_COLUMNS, BOOTSTRAP_COLUMNS, DEGRADATION_COLUMNS, RHO_COLUMNS, from_cell
from pattern_bench.storage.untrusted import UNREADABLE, present, read_json, read_yaml, regular

TYPES: dict[str, Any] = {
    "layer_index": int, "neuron": int, "rho": float, "dead": bool, "step": int, "probability_mean": float,
    "probability_std": float, "n": int, "resample": int, "mean": float, "median": float, "area": float,
}  # fmt: skip
"""Of the columns that are no names."""
JOB = "pattern_bench"
MOST_SETTINGS = 5000
MOST_SHOWN = 80
"""Characters of a wrong value in a message."""
ELSEWHERE = ("cache", "logger", "checkpoint", "resume", "quiet")
"""Groups of settings that say where a run keeps things, and change no result."""


@dataclass(frozen=True)
class Run:
    """A complete run of the job.

    Args:
        folder: where its files lie.
        name: what the report calls it.
        ended: when, in seconds since 1970.
        summary, accuracy: of ``summary.json`` and ``accuracy.json``.
        settings: its configuration by dotted key; empty where it is not known.
        overrides: of its command; None where Hydra did not start it.
        rho, degradation, bootstrap: its tables.
    """

    folder: Path
    name: str
    ended: float
    summary: dict[str, Any]
    accuracy: dict[str, Any]
    settings: dict[str, str]
    overrides: tuple[str, ...] | None
    rho: pd.DataFrame
    degradation: pd.DataFrame
    bootstrap: pd.DataFrame


@dataclass(frozen=True)
class Pictures:
    """A complete run of the gallery or of the sanity checks; ``kind`` says which."""

    folder: Path
    name: str
    kind: str
    summary: dict[str, Any]
    overrides: tuple[str, ...] | None


@dataclass
class RunFolders:
    """Folders, with the names that they are called by: complete runs by kind, sweeps, and runs that were begun and
    are not complete."""

    complete: dict[str, dict[Path, str]] = field(default_factory=lambda: {kind: {} for kind in COMMANDS})
    sweeps: dict[Path, str] = field(default_factory=dict)
    begun: dict[Path, str] = field(default_factory=dict)

    def look(self, root: Path, name: str) -> None:
        """Add the runs and sweeps at or below ``root``, which is called ``name``.

        Raises:
            UserError: where it is no folder, holds nothing of ours, or cannot be read.
        """
        if not root.is_dir():
            raise UserError(f"DIR={name} is not a folder: give run folders, or folders of runs")
        before = len(self)
        for place, folders, files in os.walk(root, onerror=_unreadable):
            folder = Path(place).resolve()
            called = name if Path(place) == root else f"{name.rstrip('/')}/{Path(place).relative_to(root)}"
            marks = [kind for kind, mark in COMMANDS.items() if mark in files and (folder / mark).is_file()]
            for kind in marks:
                self.complete[kind].setdefault(folder, called)
            if "multirun.yaml" in files:
                self.sweeps.setdefault(folder, called)
            if ".hydra" in folders and not marks and kind_of_run(folder):
                self.begun.setdefault(folder, called)
        if len(self) == before and not self.knows(root):
            raise UserError(f"DIR={name} holds no complete run (none has a summary.json): run the job first")

    def knows(self, root: Path) -> bool:
        """Return whether anything is at or below ``root``, which may have been found already, from a folder above."""
        known = [*self.sweeps, *self.begun, *(folder for folders in self.complete.values() for folder in folders)]
        return any(folder.is_relative_to(root.resolve()) for folder in known)

    def __len__(self) -> int:
        return len(self.sweeps) + len(self.begun) + sum(map(len, self.complete.values()))


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): mend its permissions, or leave it out")


def read_runs(below: RunFolders) -> list[Run]:
    """Read the complete runs of the job, oldest first. A run that is found twice, in its folder and in that of W&B,
    say, is taken once: by the id in its summary, or where it has none, by what its files hold.

    Raises:
        UserError: where a run's files are damaged.
    """
    once: dict[str, Run] = {}
    # Hydra's own folders last, since they tell most: among equals the last one is kept.
    folders = sorted(below.complete[JOB], key=lambda folder: (folder / ".hydra").is_dir())
    for folder in folders:
        run = read_run(folder, below.complete[JOB][folder])
        key = run.summary.get("run_id") or _content(folder)
        if key not in once or run.ended >= once[key].ended:
            once[key] = run
    return sorted(once.values(), key=lambda run: (run.ended, run.name))


def _content(folder: Path) -> str:
    parts = [regular(folder / name).read_bytes() for name in (COMMANDS[JOB], "rho.csv", "degradation.csv")]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def read_run(folder: Path, name: str) -> Run:
    """Read the complete run in ``folder``, which messages call ``name``.

    Raises:
        UserError: where a file is missing or damaged.
    """
    try:
        summary = _summary(folder / COMMANDS[JOB])
        accuracy = _accuracy(folder / "accuracy.json")
        settings = read_settings(folder / "config.yaml")
        rho = _table(folder / "rho.csv", RHO_COLUMNS)
        degradation = _table(folder / "degradation.csv", DEGRADATION_COLUMNS)
        drawn = folder / "bootstrap.csv"
        bootstrap = (
            _table(drawn, BOOTSTRAP_COLUMNS) if present(drawn) else pd.DataFrame(columns=list(BOOTSTRAP_COLUMNS))
        )
        whole.check_rho(rho, summary)
        whole.check_bootstrap(bootstrap, rho)
        whole.check_degradation(degradation, summary)
        if present(folder / "areas.csv"):  # earlier versions wrote none
            whole.check_areas(_table(folder / "areas.csv", AREA_COLUMNS), degradation, summary)
        ended = (folder / COMMANDS[JOB]).stat().st_mtime
        if "ended" in summary:
            ended = datetime.fromisoformat(summary["ended"]).timestamp()
    except (*UNREADABLE, OverflowError) as error:
        said = str(error).partition("\n")[0]
        raise UserError(f"the run in {name} is damaged ({said}): remove it or run it again") from error
    return Run(folder, name, ended, summary, accuracy, settings, read_overrides(folder), rho, degradation, bootstrap)


def _summary(file: Path) -> dict[str, Any]:
    summary = read_json(file)
    _check_fields(file, summary, SUMMARY)
    for ends in summary.get("area_over_curve_interval", {}).values():
        if not (isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))):
            raise ValueError(f"{file.name} gives {_shown(ends)} as an interval")
    return summary


def _accuracy(file: Path) -> dict[str, Any]:
    """Empty where there is none."""
    if not present(file):
        return {}
    accuracy = read_json(file)
    _check_fields(file, accuracy, {name: _is_text for name in ("model", "data", "skipped")})
    if "top1" in accuracy:
        top1: Any = accuracy["top1"]
        images: Any = accuracy.get("images")
        if not (_is_number(top1) and 0 <= top1 <= 1 and _is_whole(images) and images > 0):
            raise ValueError(f"{file.name} gives an accuracy of {_shown(top1)} on {_shown(images)} images")
        top5: Any = accuracy.get("top5", 1.0)
        if not (_is_number(top5) and top1 <= top5 <= 1):
            raise ValueError(f"{file.name} gives top5 as {_shown(top5)}, beside a top1 of {top1}")
    return accuracy


def _check_fields(file: Path, content: dict[str, Any], fields: dict[str, Callable[[Any], bool]]) -> None:
    """Fields that are missing, as in files of earlier versions, will do.

    Raises:
        ValueError: naming file, field and value, where a field is of another type than ours.
    """
    for name, fits in fields.items():
        if name in content and not fits(content[name]):
            raise ValueError(f"{file.name} gives {name} as {_shown(content[name])}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _dict_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


_EVERY: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("run_id", "ended", "model", "data", "estimator"), _is_text), "seed": _is_whole,
    "versions": _dict_of(_is_text), "seconds": _dict_of(_is_number), "images_per_second": _dict_of(_is_number),
    "peak_memory_mib": _dict_of(_is_number), "peak_gpu_memory_mib": _dict_of(_is_number),
}  # fmt: skip
SUMMARY: dict[str, Callable[[Any], bool]] = {
    **_EVERY, **dict.fromkeys(("method", "criterion", "probe"), _is_text), "positions": _is_number,
    "processes": _is_whole, "splits": _dict_of(_is_whole), "unreadable": _list_of(_is_text), "rho": _is_dict,
    "patch": _or_none(_is_whole), "steps": _or_none(_is_whole), "area_over_curve": _dict_of(_is_number),
    "area_over_curve_interval": _is_dict, "accuracy": _or_none(_is_number),
    "signal_angle_degrees": _or_none(_dict_of(_is_number)), "skipped": _dict_of(_is_text),
}  # fmt: skip
"""Of ``summary.json``: what each field that a run writes can be."""
PICTURES: dict[str, dict[str, Callable[[Any], bool]]] = {
    "gallery": {
        **_EVERY, "figure": lambda value: isinstance(value, str) and re.fullmatch(r"\w+", value) is not None,
        "images": _list_of(_is_dict), "columns": _list_of(_is_dict), "left_out": _dict_of(_is_text),
        "estimators": _list_of(_is_text), "percentile": _is_number,
    },
    "sanity": {**_EVERY, "images": _is_whole, "directions": _is_whole, "left_out": _dict_of(_is_text)},
}  # fmt: skip
"""The same of ``gallery.json`` and ``sanity.json``. ``figure`` is part of a file's name."""


def read_settings(file: Path) -> dict[str, str]:
    """Return a run's configuration by dotted key; empty where there is no file.

    Raises:
        ValueError, yaml.YAMLError: where it is damaged.
    """
    if not present(file):
        return {}
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is no configuration")
    flat = dict(islice(_flat(content, ""), MOST_SETTINGS + 1))
    if len(flat) > MOST_SETTINGS:
        raise ValueError(f"{file.name} has more than {MOST_SETTINGS} settings")
    return {key: value for key, value in flat.items() if key.split(".")[0] not in ELSEWHERE}


def _flat(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list) and any(isinstance(value, dict | list) for value in node):
        for place, value in enumerate(node):
            yield from _flat(value, f"{path}[{place}]")
    else:
        yield path, node if isinstance(node, str) else json.dumps(node, default=str, ensure_ascii=False)


def differing(settings: Iterable[dict[str, str]]) -> list[str]:
    """Return the dotted keys that differ between ``settings``; configurations that are not known are left out."""
    known = [each for each in settings if each]
    keys = dict.fromkeys(key for each in known for key in each)
    return [key for key in keys if len({each.get(key) for each in known}) > 1]


def _table(file: Path, columns: Sequence[str]) -> pd.DataFrame:
    """
    Raises:
        ValueError: where a column is missing or holds what it cannot.
    """
    regular(file)
    # A model may be called null, or NA: only a number can be missing.
    missing: dict[str, Any] = {"keep_default_na": False, "na_values": {name: ["", "nan", "NaN"] for name in TYPES}}
    # Names as categories: of a million rows, a million strings would be most of the time and memory.
    table = pd.read_csv(file, dtype={column: TYPES.get(column, "category") for column in columns}, **missing)
    if lacking := [column for column in columns if column not in table.columns]:
        raise ValueError(f"{file.name} lacks columns {lacking}: was it written by another version?")
    for column, kind in TYPES.items():
        if kind is float and column in columns and not (table[column].isna() | table[column].between(-1e9, 1e9)).all():
            raise ValueError(f"{file.name} holds what is no number in column {column}")
    if named := [column for column in columns if TYPES.get(column) is None and not (table[column] != "").all()]:
        raise ValueError(f"{file.name} has empty cells in columns {named}")
    if "probability_mean" in columns and table[["probability_mean", "step"]].isna().any(axis=None):
        raise ValueError(f"{file.name} has a step without a probability")
    for column in columns:
        if TYPES.get(column) is None:
            if not all(isinstance(name, str) for name in table[column].cat.categories):  # read as numbers: 007 as 7
                text = pd.read_csv(file, dtype={column: object}, usecols=[column], **missing)[column]
                table[column] = text.astype("category")
            table[column] = table[column].cat.rename_categories(list(map(from_cell, table[column].cat.categories)))
    return table[list(columns)]


def read_pictures(below: RunFolders) -> list[Pictures]:
    """Read the galleries and sanity checks.

    Raises:
        UserError: where a summary is damaged.
    """
    pictures = []
    for kind in ("gallery", "sanity"):
        for folder, name in below.complete[kind].items():
            try:
                summary = read_json(folder / COMMANDS[kind])
                _check_fields(folder / COMMANDS[kind], summary, PICTURES[kind])
            except UNREADABLE as error:
                raise UserError(f"the run in {name} is damaged ({error}): remove it or run it again") from error
            pictures.append(Pictures(folder, name, kind, summary, read_overrides(folder)))
    return pictures
