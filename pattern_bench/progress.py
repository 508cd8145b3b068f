"""The stages of a job, as progress bars on standard error and as seconds for the summary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pytorch_lightning import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pattern_bench import ranks


@dataclass
class Bar:
    """One stage's bar."""

    progress: Progress
    task: TaskID

    def start(self, total: int, detail: str = "") -> None:
        """Begins again at 0 of ``total``; ``detail`` stands beside the stage's name."""
        self.progress.reset(self.task, total=total, detail=detail)

    def add_images(self, images: int, done: int, batch_size: int) -> None:
        """Batches of so many more images to come, some of them done already."""
        total = self.progress.tasks[self.task].total or 0
        here, before = -(-images // batch_size), -(-done // batch_size)
        self.progress.update(self.task, total=total + here, advance=before)

    def advance(self, by: int = 1, detail: str | None = None) -> None:
        fields: dict[str, Any] = {} if detail is None else {"detail": detail}
        self.progress.update(self.task, advance=by, **fields)


class LightningBar(Callback):
    """Moves a bar with the batches of a Lightning loop."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        self.bar.advance()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.bar.advance()


@dataclass
class Stages:
    """Runs stages one after the other; keeps their seconds, and the reasons of those skipped. Only the first process
    shows them."""

    console: Console = field(default_factory=lambda: Console(stderr=True, quiet=not ranks.first()))
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def run(self, name: str, title: str) -> Iterator[Bar]:
        """Shows ``title`` while the body runs, and counts its seconds under ``name``."""
        columns = (
            TextColumn("{task.description:<42}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[detail]}"),
        )
        start = time.perf_counter()
        with Progress(*columns, console=self.console) as progress:
            bar = Bar(progress, progress.add_task(title, total=None, detail=""))
            yield bar
            task = progress.tasks[0]
            progress.update(bar.task, completed=task.total or 1, total=task.total or 1)
        self.seconds[name] = round(time.perf_counter() - start, 3)

    def skip(self, name: str, title: str, reason: str) -> None:
        """Says that a stage cannot apply, and why."""
        self.skipped[name] = reason
        self.console.print(f"{title:<42} skipped: {reason}", highlight=False, soft_wrap=True)
