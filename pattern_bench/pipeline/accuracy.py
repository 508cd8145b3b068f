"""How often the network is right: without that, an explanation of it says little."""

from __future__ import annotations

from dataclasses import dataclass

from pattern_bench.engine.explanation_streams import AccuracyStream
from pattern_bench.engine.progress import Bar
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.run_folder import RunFolder
from pattern_bench.pipeline.run_pass import stream_over
from pattern_bench.pipeline.setup import Setup
from pattern_bench.pipeline.stage import Done, Result, Stage
from pattern_bench.processes import collectives


def why_no_accuracy(setup: Setup) -> str | None:
    """Why the network's accuracy cannot be measured, or None."""
    pool = setup.splits["validation"].pool
    if setup.source.regression:
        return f"data={setup.source.name} is a regression"
    if not setup.classifier:
        return f"model={setup.model_name} has no classifier"
    if pool.labels is None:
        return f"data={setup.source.name} has no labels"
    if pool.classes != setup.outputs and (pool.classes, setup.outputs) != (2, 1):
        return (
            f"data={setup.source.name} has {pool.classes} classes and model={setup.model_name} {setup.outputs} outputs"
        )
    return None


@dataclass(frozen=True, kw_only=True)
class Accuracy(Result):
    """Shares of the validation images whose label is the network's first answer, and among its first five."""

    top1: float | None = None
    top5: float | None = None


@dataclass(frozen=True)
class MeasureAccuracy(Stage[Accuracy]):
    """Measure the network's accuracy on the validation images."""

    setup: Setup
    machine: Machine
    name = "accuracy"
    title = "accuracy on the validation images"

    def why_skipped(self) -> str | None:
        return why_no_accuracy(self.setup)

    def without(self, reason: str) -> Accuracy:
        return Accuracy(skipped=reason)

    def run(self, done: Done, bar: Bar) -> Accuracy:
        setup, split = self.setup, self.setup.splits["validation"]
        stream = AccuracyStream(setup.model)
        bar.start(0, unit="images")
        state = self.machine.unfinished("accuracy", model=setup.model_key, images=split.fingerprint)
        visited = stream_over(self.machine, setup.source, stream, split, state, bar)
        if not visited.images:
            return Accuracy(skipped=f"none of the {len(split)} validation images can be read", visited=visited)
        top1, top5 = collectives.all_reduce(stream.right).tolist()
        return Accuracy(top1=top1 / visited.images, top5=top5 / visited.images, visited=visited)

    def write(self, result: Accuracy, run_folder: RunFolder) -> None:
        if result.skipped is not None:
            run_folder.json("accuracy.json", {**self.setup.names, "skipped": result.skipped})
            return
        shares: dict[str, float] = {"top1": result.top1, "top5": result.top5}  # type: ignore[dict-item]
        run_folder.metrics({f"accuracy/{name}": share for name, share in shares.items()})
        run_folder.json("accuracy.json", {**self.setup.names, **shares, "images": result.visited.images})
