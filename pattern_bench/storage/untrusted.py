"""Reads small files that somebody else may have written: YAML and JSON as plain data, of bounded size and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Names no objects; ten times as fast where PyYAML was built with libyaml, as its wheels are."""
MOST_BYTES = 32 * 2**20
DEEPEST = 100
"""Levels of nesting, at most; libyaml's parser would go on until the stack ends."""
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError)
"""The exceptions that reading a damaged file can raise."""


def regular(file: Path) -> Path:
    """Return a file that is one: what is read of others may be a pipe or a device, whose reading would never end.

    Raises:
        FileNotFoundError: where it is none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.name} is no file")
    return file


def present(file: Path) -> bool:
    """Return whether there is a file.

    Raises:
        FileNotFoundError: where there is something else of its name.
    """
    return file.exists() and regular(file) == file


def read_text(file: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        OSError, ValueError: where it cannot be read, is longer than MOST_BYTES, or is no text.
    """
    if regular(file).stat().st_size > MOST_BYTES:
        raise ValueError(f"{file.name} has more than {MOST_BYTES >> 20} MiB")
    return file.read_text(encoding="utf-8")


def read_yaml(file: Path) -> Any:
    """Read a YAML file as plain data.

    Raises:
        OSError, ValueError, yaml.YAMLError: where it is damaged, nested too deep, or has aliases: no file of the suite
            does, and a few lines of them stand for more than memory holds.
    """
    text = read_text(file)
    loader = LOADER(text)
    try:
        depth = 0
        while loader.check_event():
            event = loader.get_event()
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{file.name} has aliases, which can stand for more than memory holds")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"{file.name} is nested more than {DEEPEST} deep")
    finally:
        loader.dispose()
    loader = LOADER(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        OSError, ValueError, RecursionError: where it is damaged, or holds something else.
    """
    content = json.loads(read_text(file))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is no object")
    return content
