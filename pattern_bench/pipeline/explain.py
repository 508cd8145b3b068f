"""Pictures of what explains the network's answers: the run's method, and the signal, of a few validation images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from pattern_bench.core.estimators import Pattern
from pattern_bench.engine.explanation_streams import ExplanationStream
from pattern_bench.engine.progress import Bar
from pattern_bench.errors import UserError
from pattern_bench.methods.base import Method, kind_of
from pattern_bench.methods.patterns import PatternNet
from pattern_bench.pipeline.accuracy import why_no_accuracy
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.methods import build_method
from pattern_bench.pipeline.patterns import FittedPatterns
from pattern_bench.pipeline.rows import collect_rows
from pattern_bench.pipeline.run_folder import RunFolder
from pattern_bench.pipeline.run_pass import Visited
from pattern_bench.pipeline.setup import Setup
from pattern_bench.pipeline.stage import Done, Result, Stage
from pattern_bench.plotting.figures import draw_explanations


def why_no_explanation(setup: Setup) -> str | None:
    """Why the network's answers cannot be explained, or None."""
    if not setup.classifier:
        return f"model={setup.model_name} has no classifier, so there is no answer to explain"
    if setup.sample.ndim < 2:
        return f"data={setup.source.name} has no images"
    if setup.layers != setup.all_layers and setup.method_uses_estimator and setup.estimator.has_pattern:
        return (
            f"layer={setup.cfg.layer} selects {len(setup.layers)} of {len(setup.all_layers)} layers, and a whole "
            "network's explanation needs the patterns of all"
        )
    return None


def depends_on(setup: Setup) -> dict[str, Any]:
    """What explanations depend on besides the network, its patterns and the images: a part of their keys."""
    reference = kind_of(setup.method).takes_reference
    return {
        "method": OmegaConf.to_container(setup.cfg.method, resolve=True),
        "estimator": setup.estimator.name,
        "reference": setup.splits["fit"].fingerprint if reference else None,
    }


@dataclass(frozen=True, kw_only=True)
class Explanations(Result):
    """The first validation images, and what explains the network's answers to them.

    Attributes:
        images: (n, C, ...), as the network takes them.
        columns: explanations by title, shaped as the images.
        captions: of each image: what was predicted, and what is true where that is known.
    """

    images: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)


def explain(
    setup: Setup, machine: Machine, patterns: Mapping[str, Pattern], bar: Bar
) -> tuple[dict[str, Tensor], Visited]:
    """Explain the first validation images.

    Args:
        setup: network, method and settings.
        machine: where it computes and keeps the unfinished stage.
        patterns: by layer, shaped as the weights.
        bar: moved image by image.

    Returns:
        Rows by image, as of :class:`~pattern_bench.engine.explanation_streams.ExplanationStream`; what was visited.

    Raises:
        UserError: where none of the images can be read.
    """
    split = setup.splits["validation"].first(setup.cfg.explanation.images)
    method = build_method(setup, machine.device, patterns)
    methods: dict[str, Method] = {}
    if setup.estimator.has_pattern and setup.layers == setup.all_layers and not isinstance(method, PatternNet):
        methods[PatternNet.panel] = PatternNet(setup.model, patterns)
    methods[method.panel] = method
    stream = ExplanationStream(setup.model, len(split), methods)
    # One image at a time: some methods take minutes for each.
    rows, visited = collect_rows(
        setup, machine, stream, split, "explain", patterns, bar, batch_size=1, **depends_on(setup)
    )
    if "images" not in rows:
        raise UserError("none of the first validation images can be read: give more (explanation.images)")
    return rows, visited


@dataclass(frozen=True)
class Explain(Stage[Explanations]):
    """Explain some validation images, and draw them."""

    setup: Setup
    machine: Machine
    name = "explain"
    title = "explain validation images"

    def why_skipped(self) -> str | None:
        return why_no_explanation(self.setup)

    def without(self, reason: str) -> Explanations:
        return Explanations(skipped=reason)

    def run(self, done: Done, bar: Bar) -> Explanations:
        rows, visited = explain(self.setup, self.machine, done[FittedPatterns].shaped, bar)
        unknown = why_no_accuracy(self.setup) is not None
        captions = [
            f"predicted {p} ({c:.0%})" + ("" if t < 0 or unknown else f"\ntrue {t}")
            for p, c, t in zip(
                rows["predicted"].tolist(), rows["confidence"].tolist(), rows["targets"].tolist(), strict=True
            )
        ]
        start = "explanation/"
        columns = {name.removeprefix(start): row for name, row in rows.items() if name.startswith(start)}
        return Explanations(images=rows["images"], columns=columns, captions=captions, visited=visited)

    def write(self, result: Explanations, run_folder: RunFolder) -> None:
        if (images := result.images) is None:
            return
        setup = self.setup
        about = f"{setup.model_name} on {setup.source.name}, {setup.estimator.name}"
        run_folder.picture(
            "figures/explanations", "explanations.png", f"Validation images and what explains {about}",
            lambda file: draw_explanations(images, result.columns, result.captions, file),
        )  # fmt: skip
