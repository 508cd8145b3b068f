"""``python -m pattern_bench.cache``: what the cache holds, by kind, and how it is emptied."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from pattern_bench.commands.entry import run_command, say
from pattern_bench.errors import UserError
from pattern_bench.storage.cache_entries import KINDS, Entry, entries, in_use, remove, sweep_up

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
TIMES = {"m": 60, "h": 3600, "d": 86400}


def size_of(text: str) -> int:
    """Return the bytes of a number with a unit.

    >>> size_of("10GiB"), size_of("1.5k")
    (10737418240, 1536)

    Raises:
        UserError: where it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", text.strip(), re.IGNORECASE)
    units = {unit[0].upper(): factor for unit, factor in UNITS.items()}
    if not found or (found[2] and found[2][0].upper() not in units):
        raise UserError(f"--down-to={text} is no size: give a number with a unit, such as 10GiB")
    return round(float(found[1]) * units[(found[2] or "B")[0].upper()])


def age_of(text: str) -> float:
    """Return the seconds of a number with a unit.

    >>> age_of("90m"), age_of("30d")
    (5400.0, 2592000.0)

    Raises:
        UserError: where it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mhd])", text.strip())
    if not found:
        raise UserError(
            f"--older-than={text} is no age: give a number of minutes, hours or days, such as 90m, 12h or 30d"
        )
    return float(found[1]) * TIMES[found[2]]


def shown_size(size: int) -> str:
    """Write bytes for people.

    >>> shown_size(1536)
    '1.5 KiB'
    """
    unit = max((u for u in UNITS if UNITS[u] <= max(size, 1)), key=lambda u: UNITS[u])
    return f"{size} B" if unit == "B" else f"{size / UNITS[unit]:.1f} {unit}"


def shown_age(seconds: float) -> str:
    """Write seconds for people.

    >>> shown_age(10800)
    '3 h'
    """
    if seconds < 60:
        return "now"
    unit = "d" if seconds >= 2 * 86400 else "h" if seconds >= 2 * 3600 else "m"
    return f"{seconds / TIMES[unit]:.0f} {'min' if unit == 'm' else unit}"


def table(found: Sequence[Entry], used: set[tuple[str, str]], now: float) -> list[str]:
    """Return a heading, a line for each kind of entries, and one for all.

    Args:
        found: the entries.
        used: kinds and keys of those that running jobs use.
        now: in seconds since 1970.
    """
    rows = [("kind", "entries", "size", "in use", "used last", "and first")]
    for kind in (*KINDS, "all"):
        of = [entry for entry in found if kind in (entry.kind, "all")]
        ages = [now - entry.used for entry in of]
        ends = (shown_age(min(ages)), shown_age(max(ages))) if of else ("", "")
        busy = sum((entry.kind, entry.key) in used for entry in of)
        rows.append((kind, str(len(of)), shown_size(sum(entry.size for entry in of)), str(busy), *ends))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def chosen(found: Sequence[Entry], older: float | None, down_to: int | None, now: float) -> list[Entry]:
    """Choose entries to remove, those that were used longest ago first.

    Args:
        found: the entries.
        older: only those that were not used for so many seconds; None for any.
        down_to: only as many as leave so many bytes; None for all.
        now: in seconds since 1970.
    """
    oldest_first = sorted(found, key=lambda entry: entry.used)
    left = sum(entry.size for entry in found)
    picked = []
    for entry in oldest_first:
        if (older is None or now - entry.used > older) and (down_to is None or left > down_to):
            picked.append(entry)
            left -= entry.size
    return picked


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pattern_bench.cache", description=__doc__)
    default = os.environ.get("PATTERN_BENCH_CACHE") or "~/.cache/pattern_bench"
    parser.add_argument("--dir", default=default, help="the cache, as cache.dir (default: %(default)s)")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS, help="only these kinds")
    parser.add_argument("--remove", action="store_true", help="remove what --older-than and --down-to leave over")
    parser.add_argument("--older-than", metavar="AGE", help="only what was not used for 90m, 12h or 30d")
    parser.add_argument("--down-to", metavar="SIZE", help="only as much as leaves 10GiB; used longest ago first")
    parser.add_argument("--all", action="store_true", help="with --remove: everything of the kinds")
    parser.add_argument("--dry-run", action="store_true", help="say what --remove would, and remove nothing")
    options = parser.parse_args(arguments)
    limited = options.older_than is not None or options.down_to is not None
    if options.remove and not (limited or options.all or options.kind is not KINDS):
        parser.error("--remove needs --kind, --older-than or --down-to, or --all for everything")
    if not options.remove and (limited or options.all or options.dry_run):
        parser.error("--older-than, --down-to, --all and --dry-run say what to remove: give --remove too")
    if options.all and limited:
        parser.error("--all removes everything: leave out --older-than and --down-to")

    def explain(error: Exception) -> str | None:
        if isinstance(error, OSError):
            return f"--dir={options.dir} cannot be changed ({error.filename}: {error.strerror})"
        return None

    run_command(lambda: say("\n".join(show_or_remove(options))), explain)


def show_or_remove(options: argparse.Namespace) -> list[str]:
    """Do what the options ask for; return lines that say it.

    Raises:
        UserError: where the folder is none, or an age or a size cannot be read.
        OSError: where something cannot be removed.
    """
    folder, now = Path(options.dir).expanduser().absolute(), time.time()
    older = None if options.older_than is None else age_of(options.older_than)
    down_to = None if options.down_to is None else size_of(options.down_to)
    if not options.dir or not folder.is_dir():
        raise UserError(f"--dir={options.dir} is no folder: give the one that cache.dir names")
    found = list(entries(folder, options.kind))
    if not options.remove:
        return [str(folder), *table(found, in_use(folder), now)]
    picked = chosen(found, older, down_to, now)
    if options.dry_run or not picked:
        used = in_use(folder)
        gone = [entry for entry in picked if (entry.kind, entry.key) not in used]
    else:
        gone = remove(folder, picked)
        sweep_up(folder, options.kind)
    busy = len(picked) - len(gone)
    verb = "would remove" if options.dry_run else "removed"
    lines = [f"{verb} {len(gone)} of {len(found)} entries, {shown_size(sum(entry.size for entry in gone))}"]
    return lines + ([f"kept {busy} that running jobs use"] if busy else [])
