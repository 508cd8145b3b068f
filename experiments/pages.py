"""What the experiments' pages have in common: results stand between marks, and the commands write them there."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from pattern_bench.results.schema import from_cell, in_cells


def write_block(page: Path, name: str, text: str) -> None:
    """Puts ``text`` between ``<!-- name -->`` and ``<!-- /name -->`` in a Markdown file.

    Raises:
        SystemExit: where the file lacks the marks.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = page.read_text()
    if content.count(start) != 1 or content.count(end) != 1:
        raise SystemExit(f"{page} lacks the marks {start} and {end}, once each: put them where the results belong")
    block = f"{start}\n{text.strip()}\n{end}"
    page.write_text(re.sub(f"{re.escape(start)}.*{re.escape(end)}", lambda _: block, content, flags=re.DOTALL))


def beside_others(file: Path, new: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The new rows, after those of the table in ``file`` that have other ``keys``: what another run measured stays."""
    if not file.exists():
        return new
    old = in_cells(pd.read_csv(file), from_cell)
    measured = pd.MultiIndex.from_frame(old[keys]).isin(pd.MultiIndex.from_frame(new[keys]))
    return pd.concat([old[~measured], new], ignore_index=True)


def markdown(table: pd.DataFrame) -> str:
    """The table, as Markdown: cells as they are, numbers should be text already."""
    return str(table.to_markdown(index=False, disable_numparse=True))


def with_error(value: float, error: float, digits: int = 2) -> str:
    """``0.94 ± 0.01``; a dash where there is no value."""
    if pd.isna(value):
        return "–"
    return f"{value:.{digits}f}" if pd.isna(error) else f"{value:.{digits}f} ± {error:.{digits}f}"
