"""What a complete run has measured is not written over by a run of other settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pattern_bench.configuration.reach import HOW
from pattern_bench.configuration.resumed_overrides import shell_command
from pattern_bench.errors import UserError, told
from pattern_bench.storage.untrusted import UNREADABLE, read_yaml

COMMANDS = {"pattern_bench": "summary.json", "gallery": "gallery.json", "sanity": "sanity.json"}
"""By the name that Hydra knows each command under: the file that says that its run is complete."""
CONFIG = "config.yaml"
"""A run's configuration, in its folder."""
MOST_NAMED = 4


def refuse_other_settings(cfg: DictConfig, folder: Path, setting: str, again: Sequence[str]) -> None:
    """
    Args:
        cfg: of the run that is about to begin in ``folder``.
        folder: its own.
        setting: that names the folder, for the message.
        again: the command that starts the same run in another folder; none where it is a sweep's job.

    Raises:
        UserError: where the folder holds a complete run that has other settings, of those that decide what it shows.
    """
    marks = [folder / mark for mark in COMMANDS.values() if (folder / mark).is_file()]
    if not marks:
        return
    try:
        then = dict(_leaves(read_yaml(folder / CONFIG)))
    except UNREADABLE:  # nobody knows, and the job will take it for no complete run
        return
    now = dict(_leaves(OmegaConf.to_container(cfg, resolve=True)))
    others = [key for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key) and not _is_how(key)]
    if others:
        more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
        what = ", ".join(
            f"{told(key, quoted=False)}={told(then.get(key))}, now {told(now.get(key))}" for key in others[:MOST_NAMED]
        )
        own = f"start this one in a folder of its own, {shell_command(again)}" if again else f"give another {setting}"
        raise UserError(
            f"{setting}={folder} holds a complete run of other settings ({what}{more}), which would be written over: "
            f"{own}, or remove {marks[0]} to have this one there"
        )


def _is_how(setting: str) -> bool:
    return setting != "trainer.tf32" and any(fnmatchcase(setting, how) for how in HOW)


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted paths; lists as a whole."""
    if isinstance(node, dict) and (node or not path):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node
