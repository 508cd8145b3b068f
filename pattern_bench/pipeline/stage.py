"""The stages of a run, whichever command it is of: one kind of object, run one after the other.

A stage says what it is called, why it may have to be skipped, what it computes, and which files, metrics, pictures and
tables its result becomes. It finds the results of the stages before it in :class:`Done`, by their class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar, cast

from pattern_bench.engine.progress import Bar, StageProgress
from pattern_bench.pipeline.run_folder import RunFolder
from pattern_bench.pipeline.run_pass import Visited


@dataclass(frozen=True)
class LeftOut:
    """A part of a stage that could not be computed: what the summary and the user call it, and why."""

    name: str
    title: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a stage computed.

    Attributes:
        visited: the images that all processes went through, where the stage went through images.
        skipped: why there is nothing to show; None where there is.
        left_out: parts of it that could not be computed.
    """

    visited: Visited = field(default_factory=Visited)
    skipped: str | None = None
    left_out: tuple[LeftOut, ...] = ()


R = TypeVar("R", bound=Result)


class Done:
    """Results of the stages that have run, by their class; and the images that could not be read."""

    def __init__(self) -> None:
        self._results: dict[type[Result], Result] = {}
        self._unreadable: dict[str, None] = {}

    @property
    def unreadable(self) -> list[str]:
        """Names of the images, each once, as they came."""
        return list(self._unreadable)

    def add(self, result: Result) -> list[str]:
        """Take a result in; return the names of images that it is the first to have found unreadable."""
        self._results[type(result)] = result
        fresh = [name for name in dict.fromkeys(result.visited.unreadable) if name not in self._unreadable]
        self._unreadable |= dict.fromkeys(fresh)
        return fresh

    def __getitem__(self, kind: type[R]) -> R:
        return cast(R, self._results[kind])

    def __contains__(self, kind: type[Result]) -> bool:
        return kind in self._results


class Stage(ABC, Generic[R]):
    """One stage. A new one is a subclass, and a line in the list of its command's stages.

    Attributes:
        name: under which the summary says how long it took, or why it was skipped.
        title: beside its progress bar.
        timed: whether it takes long enough to be shown, and timed in the summary.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    timed: ClassVar[bool] = True

    def why_skipped(self) -> str | None:
        """Why this stage has nothing to do here, for the user; None where it has."""
        return None

    @abstractmethod
    def run(self, done: Done, bar: Bar) -> R:
        """Compute the result, in every process of the job."""

    def without(self, reason: str) -> R:
        """The result where the stage is skipped, which later stages and the summary read."""
        raise NotImplementedError(f"{type(self).__name__} is never skipped, but now: {reason}")

    def write(self, result: R, run_folder: RunFolder) -> None:
        """Write the result: its files, metrics, pictures and tables. By default there are none."""


def run_stages(stages: Iterable[Stage[Any]], progress: StageProgress, run_folder: RunFolder) -> Done:
    """Run the stages, and write each one's result as soon as it is known."""
    done = Done()
    for stage in stages:
        reason = stage.why_skipped()
        if reason is not None:
            result = stage.without(reason)
        elif stage.timed:
            with progress.run(stage.name, stage.title) as bar:
                result = stage.run(done, bar)
        else:
            result = stage.run(done, progress.hidden_bar())
        if result.skipped is not None:
            progress.skip(stage.name, stage.title, result.skipped)
        for part in result.left_out:
            progress.skip(part.name, part.title, part.reason)
        if fresh := done.add(result):
            some = ", ".join(fresh[:5]) + (" …" if len(fresh) > 5 else "")
            count = "1 image" if len(fresh) == 1 else f"{len(fresh)} images"
            progress.say(f"{count} cannot be read and are left out: {some}")
        stage.write(result, run_folder)
    return done
