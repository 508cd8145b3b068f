"""The overrides that a run takes from the folder of an earlier one: settings, and never what is imported or run.

A run's folder may come from somebody else. Of its overrides, each is parsed as Hydra will, and judged by the key and
value that come of it. What a user gives on the command line is the user's own, and takes the place of the folder's.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Sweep
from hydra.errors import HydraException

from pattern_bench.errors import UserError
from pattern_bench.storage.untrusted import UNREADABLE, read_yaml

OVERRIDES = Path(".hydra") / "overrides.yaml"
MOST_SHOWN = 200
"""Characters of an override in a message, at most."""
# Names that configurations give their own meaning: what is imported (model.path is imported and called, wherever it
# comes to stand), whether that is checked, and Hydra's and OmegaConf's own keys, such as _target_ and _recursive_.
_RESERVED = re.compile(r"path|allow_any_target|_\w*_")
# The gallery and the sanity checks have several methods and estimators, each a group in a package of its own.
_PACKAGED = re.compile(r"method@methods\.\w+|estimator@estimators\.\w+")


def resumed_overrides(folder: str, given: Sequence[str], module: str) -> list[str]:
    """Return the overrides of the run in a folder, but for those that are given anew.

    Args:
        folder: of the earlier run.
        given: the command line, without ``resume=``.
        module: that it starts, for the remedy.

    Raises:
        UserError: where ``folder`` is no run's, its links lead out of it, or its overrides name classes, flags,
            Hydra's own settings or the environment, or switch checks off.
    """
    file = Path(folder) / OVERRIDES
    if not file.is_file():
        raise UserError(
            f"resume={folder} is not the folder of a run ({file} is missing): give the one that it printed, or repeat "
            "a sweep's command with hydra.sweep.dir=DIR"
        )
    check_links(folder)
    try:
        overrides = read_yaml(file)
        if not isinstance(overrides, list):
            raise ValueError("it is no list")
    except UNREADABLE as error:
        raise UserError(
            f"resume={folder} cannot be taken up, since {file} is damaged ({str(error).partition(chr(10))[0]}): "
            "give the settings on the command line, with hydra.run.dir=DIR"
        ) from error
    new = {key_of(argument) for argument in given}
    kept = [text for text in map(str, overrides) if key_of(text) not in new]
    if refused := [text for text in kept if not may_be_taken(text)]:
        again = shell_command(["python", "-m", module, f"resume={folder}", *given, *refused])
        raise UserError(
            f"resume={folder} says {', '.join(map(_shown, refused))}: no folder chooses classes, flags, Hydra's own "
            f"settings or what is read from the environment. If you want this, give it anew: {again}"
        )
    return kept


def may_be_taken(text: str, swept: bool = False) -> bool:
    """Whether a folder may bring an override.

    It must parse as a single setting, and neither name code, flags, Hydra's own settings or files of configurations,
    nor have an interpolation, which could read the environment.

    >>> [may_be_taken(text) for text in ("seed=1", "model._target_=os.system", "data.root=${oc.env:HOME}")]
    [True, False, False]

    Args:
        text: the override.
        swept: whether it may stand for several values, as in ``seed=1,2``.
    """
    override = _parsed(text)
    if override is None or (override.is_sweep_override() and not swept):
        return False
    key, value = override.key_or_group, _value(override)
    if override.package is not None and not _PACKAGED.fullmatch(f"{key}@{override.package}"):
        return False
    parts = re.split(r"[./]", key)
    if parts[0] in ("", "hydra"):
        return False
    # What has no dot may be a choice of a group, that is a file's name: no path of another file.
    if "." not in key and any("/" in word or "\\" in word for word in _words(value)):
        return False
    names = [*parts, *(part for name in _keys(value) for part in name.split("."))]
    return not any(_RESERVED.fullmatch(name.replace("\\", "").strip()) for name in names) and not any(
        "${" in word for word in [*_words(value), *_keys(value)]
    )


def is_override(text: str) -> bool:
    """Whether Hydra understands a text as an override; flags are none."""
    return _parsed(text) is not None


def key_of(text: str) -> str:
    """Return the setting of an override, however it is written.

    >>> key_of("seed=1"), key_of("+sweep=fig3"), key_of("~model.training")
    ('seed', 'sweep', 'model.training')
    """
    override = _parsed(text)
    if override is None:
        return text.lstrip("+~").split("=")[0]
    return override.get_key_element().lstrip("+~")


def folder_of(argument: str) -> str:
    """Return the folder in ``resume=FOLDER``, as a shell gives it or as Hydra would read it.

    >>> folder_of("resume='runs/a b'")
    'runs/a b'
    """
    text = argument.removeprefix("resume=")
    override = None if Path(text).is_dir() else _parsed(argument)
    return str(override.value()) if override is not None and isinstance(override.value(), str) else text


def quoted(text: str) -> str:
    """Quote a text for Hydra's grammar of overrides, so that it stands for exactly this.

    >>> quoted("it's")
    "'it\\\\'s'"
    """
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return "'" + re.sub(r"(\\*)\$\{", r"\1\1\\${", escaped) + "'"


def check_links(folder: str) -> None:
    """Check that what a job writes into a folder will not land elsewhere.

    W&B's own folder is left out: it links to files of the run by their absolute paths, which change with the folder,
    and writes through none of them.

    Raises:
        UserError: where the folder holds a link that leads out of it, or settings for W&B.
    """
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(root):
        if place == root and "wandb" in folders and not os.path.islink(os.path.join(root, "wandb")):
            folders.remove("wandb")
        for name in [*folders, *files]:
            path = os.path.join(place, name)
            if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(root):
                raise UserError(
                    f"resume={folder} holds a link that leads out of it, {os.path.relpath(path, root)!r}: remove the "
                    "link, or put what it leads to in its place"
                )
    if os.path.lexists(os.path.join(root, "wandb", "settings")):
        raise UserError(
            f"resume={folder} holds settings for W&B, wandb/settings, which could send your key elsewhere: remove them"
        )


def _parsed(text: str) -> Override | None:
    """None for flags, and where Hydra would not understand it."""
    if text.startswith("-"):
        return None
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, RecursionError, ValueError):
        return None


def _value(override: Override) -> Any:
    """The value of an override; of a choice, the list of all."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return [Override._convert_value(each) for each in value.list]
    return None if isinstance(value, Sweep) else value  # ranges are numbers, and globs the names of our own files


def _words(value: Any) -> Iterator[str]:
    """All text in a value, however deep, but for keys."""
    if isinstance(value, dict):
        for below in value.values():
            yield from _words(below)
    elif isinstance(value, list):
        for below in value:
            yield from _words(below)
    elif isinstance(value, str):
        yield value


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield str(key)
            yield from _keys(below)
    elif isinstance(value, list):
        for below in value:
            yield from _keys(below)


def _shown(text: str) -> str:
    """In one line that no terminal takes for a command."""
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return line if len(line) <= MOST_SHOWN else f"{line[:MOST_SHOWN]}…"


def shell_command(arguments: Sequence[str]) -> str:
    """Join words into a line that a shell takes for these words, and a terminal for one line.

    >>> shell_command(["python", "-m", "pattern_bench", "resume=a b"])
    "python -m pattern_bench 'resume=a b'"
    """
    return shlex.join(map(_shown, arguments))
