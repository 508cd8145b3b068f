"""The stages of a job: as progress bars on standard error, and measured for the summary."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from pattern_bench.processes import collectives


@dataclass
class Bar:
    """One stage's bar.

    Attributes:
        unit: what the bar counts, such as ``images``.
        images: that this process has visited.
    """

    progress: Progress
    task: TaskID
    unit: str = ""
    images: int = 0

    def start(self, total: int, detail: str = "", unit: str = "") -> None:
        """Begin again at 0 of ``total``; ``detail`` stands beside the stage's name."""
        self.unit = unit
        self.progress.reset(self.task, total=total, detail=detail, unit=unit, done=0)

    def add_images(self, images: int, done: int) -> None:
        """Add so many images to those to come, some of them done already."""
        task = self.progress.tasks[self.task]
        total, before = (task.total or 0) + images, task.fields["done"] + done
        self.progress.update(self.task, total=total, advance=done, done=before)

    def advance(self, by: int = 1, detail: str | None = None) -> None:
        """Move on by so much; ``detail`` replaces what stands beside the stage's name."""
        fields: dict[str, Any] = {} if detail is None else {"detail": detail}
        self.progress.update(self.task, advance=by, **fields)


class LightningBar(Callback):
    """Moves a bar with the batches of a Lightning loop."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def on_predict_batch_end(self, _t: Any, _m: Any, _outputs: Any, batch: Any, _index: int, _loader: int = 0) -> None:
        self._took(batch)

    def on_train_batch_end(self, _t: Any, _m: Any, _outputs: Any, batch: Any, _index: int) -> None:
        self._took(batch)

    def _took(self, batch: Any) -> None:
        images = len(batch.positions) + len(batch.unreadable)
        self.bar.images += images
        self.bar.advance(images if self.bar.unit == "images" else 1)


class _Speed(ProgressColumn):
    """How many a second, for what is counted in units."""

    def render(self, task: Task) -> Text:
        unit, speed = task.fields["unit"], task.speed
        if task.finished_time:
            speed = (task.completed - task.fields["done"]) / task.finished_time
        return Text(f"{speed:,.0f} {unit}/s" if unit and speed else "", "progress.data.speed", no_wrap=True)


@dataclass
class StageProgress:
    """Runs stages one after the other, and shows how far they are; keeps what each took, and the reasons of those
    skipped. Only the first process shows them.

    Attributes:
        quiet: whether to show nothing.
        seconds: by stage.
        images_per_second: by stage, of all processes together; what was done before an interruption does not count.
        peak_memory_mib: by stage, of this process; where the system cannot say it for a stage, since the process began.
        peak_gpu_memory_mib: by stage, that tensors took on this process's GPU; empty without one.
        skipped: reasons by stage.
    """

    quiet: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    images_per_second: dict[str, float] = field(default_factory=dict)
    peak_memory_mib: dict[str, int] = field(default_factory=dict)
    peak_gpu_memory_mib: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    console: Console = field(init=False)

    def __post_init__(self) -> None:
        self.console = Console(stderr=True, quiet=self.quiet or not collectives.is_rank_zero())

    @contextmanager
    def run(self, name: str, title: str) -> Iterator[Bar]:
        """Show ``title`` while the body runs, and measures it under ``name``."""
        columns = (
            TextColumn("{task.description:<34}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            _Speed(),
            TextColumn("{task.fields[detail]}"),
        )
        _forget_peak_memory()
        start = time.perf_counter()
        with Progress(*columns, console=self.console) as progress:
            bar = Bar(progress, progress.add_task(title, total=None, detail="", unit="", done=0))
            yield bar
            task = progress.tasks[0]
            progress.update(bar.task, completed=task.total or 1, total=task.total or 1)
        seconds = time.perf_counter() - start
        self.seconds[name] = round(seconds, 3)
        if images := int(collectives.all_reduce(torch.tensor(bar.images))):
            self.images_per_second[name] = round(images / seconds, 1)
        self.peak_memory_mib[name] = _peak_memory_mib()
        if torch.cuda.is_available():
            self.peak_gpu_memory_mib[name] = torch.cuda.max_memory_allocated() >> 20

    def hidden_bar(self) -> Bar:
        """A bar for what takes no time: it is not shown, and nothing is measured."""
        progress = Progress(disable=True)
        return Bar(progress, progress.add_task("", total=None, detail="", unit="", done=0))

    def skip(self, name: str, title: str, reason: str) -> None:
        """Say that a stage cannot apply, and why."""
        self.skipped[name] = reason
        self.say(f"{title:<34} skipped: {reason}")

    def say(self, line: str) -> None:
        """Print a line among the bars."""
        self.console.print(line, highlight=False, soft_wrap=True)

    def figures(self) -> dict[str, dict[str, float]]:
        """What the stages took, for the summary."""
        found: dict[str, Any] = {
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "peak_memory_mib": self.peak_memory_mib,
        }
        return found | ({"peak_gpu_memory_mib": self.peak_gpu_memory_mib} if self.peak_gpu_memory_mib else {})


def _forget_peak_memory() -> None:
    """Lets Linux, and CUDA, count the peak from here on."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory_mib() -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
