"""The stages of a gallery: images are explained by every method, or with every estimator's patterns, and drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.models import SqueezeNet1_1_Weights

from pattern_bench.configuration.build import build
from pattern_bench.core.estimators import Estimator, Pattern
from pattern_bench.core.predictions import prediction_of
from pattern_bench.data.splits import Unreadable
from pattern_bench.engine.progress import Bar
from pattern_bench.errors import UserError
from pattern_bench.methods import by_name as methods_by_name
from pattern_bench.methods.base import kind_of
from pattern_bench.metrics.similarity import unit_scale
from pattern_bench.pipeline.accuracy import why_no_accuracy
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.methods import Explainer, reference_images
from pattern_bench.pipeline.patterns import PatternsByEstimator
from pattern_bench.pipeline.run_folder import RunFolder
from pattern_bench.pipeline.setup import Setup
from pattern_bench.pipeline.stage import Done, LeftOut, Result, Stage
from pattern_bench.plotting import figures
from pattern_bench.plotting.figures import Panel
from pattern_bench.results.labels import formula, plain

FIGURES = ("fig1", "fig4b", "fig5")
IMAGES = 6
"""That fig5 shows unless ``images`` says otherwise."""
KINDS = ("function", "signal", "attribution")
TENSORS = "gallery.safetensors"


# --- which images ---


def draw_positions(setup: Setup) -> list[int]:
    """Which validation images are shown; those that cannot be read are passed over where images are drawn."""
    cfg, split = setup.cfg, setup.splits["validation"]
    count = (min(IMAGES, len(split)) if cfg.images is None else cfg.images) if cfg.figure == "fig5" else 1
    if cfg.image is not None:
        if cfg.image >= len(split):
            raise UserError(f"image={cfg.image} is out of range: give 0 to {len(split) - 1}, a validation image")
        if isinstance(item := split[cfg.image], Unreadable):
            name = split.name(item.position)
            raise UserError(f"image={cfg.image} cannot be read ({name}: {item.reason}): choose another")
        return [cfg.image]
    if count > len(split):
        raise UserError(f"images={count} is more than the {len(split)} validation images: ask for fewer")
    found: list[int] = []
    for position in torch.randperm(len(split), generator=torch.Generator().manual_seed(cfg.seed)).tolist():
        if not isinstance(split[position], Unreadable):
            found.append(position)
        if len(found) == count:
            return found
    raise UserError(f"images={count} is more than the {len(found)} validation images that can be read: ask for fewer")


@dataclass(frozen=True)
class Subjects:
    """Images that are explained.

    Attributes:
        images: (n, C, spatial...), as the network takes them.
        outputs: which of the network's outputs is explained, (n,).
        about: what ``gallery.json`` says of each.
    """

    images: Tensor
    outputs: Tensor
    about: list[dict[str, Any]]


def class_names(setup: Setup) -> list[str]:
    """Names of the data's classes: those of their folders, or ImageNet's own where the folders are WordNet's ids;
    numbers where there are no folders."""
    pool = setup.splits["validation"].pool
    if pool.labels is None or pool.classes is None:
        return []
    names = [str(label) for label in range(pool.classes)]
    for name, label in zip(pool.ids, pool.labels, strict=True):
        if "/" in name:
            names[int(label)] = name.split("/")[0]
    if len(names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names):
        return list(SqueezeNet1_1_Weights.DEFAULT.meta["categories"])
    return names


def read_subjects(setup: Setup, device: torch.device, positions: list[int]) -> Subjects:
    """The validation images at ``positions``, with what the network answers to them."""
    split = setup.splits["validation"]
    batch = split.batch(positions)
    images: Any = batch.images
    setup.model.to(device)
    parts = images.split(setup.source.batch_size)
    with torch.no_grad():
        logits = torch.cat([setup.model(part.to(device)) for part in parts])
    outputs, predicted, confidence = prediction_of(setup.model, logits)
    names = class_names(setup)
    comparable = why_no_accuracy(setup) is None
    about = []
    for position, target, p, c in zip(positions, batch.targets.tolist(), predicted.tolist(), confidence.tolist(),
                                      strict=True):  # fmt: skip
        index = int(split.indices[position])
        about.append(
            {
                "position": position,
                "index": index,
                "name": split.pool.ids[index],
                "label": target if names else None,
                "true": names[target] if names else None,
                "predicted": p,
                "predicted_name": names[p] if comparable else str(p),
                "right": p == target if comparable else None,
                "confidence": c,
            }
        )
    return Subjects(images, outputs, about)


# --- what explains them ---


@dataclass(frozen=True)
class Column:
    """Explanations of all images by one method.

    Attributes:
        key: in the files.
        title: above the column.
        kind: what they show, a member of KINDS.
        explanations: (n, C, H, W).
    """

    key: str
    title: str
    kind: str
    explanations: Tensor


@dataclass(frozen=True)
class Task:
    """A column that is to be computed: by ``method`` (None for the image itself) with ``patterns`` by layer."""

    key: str
    title: str
    method: Any
    patterns: Mapping[str, Pattern]


def tasks(
    setup: Setup,
    methods: Mapping[str, Any],
    estimators: Mapping[str, Estimator],
    patterns: Mapping[str, Mapping[str, Pattern]],
) -> list[Task]:
    """The columns of the figure: one for each method, or for each estimator under PatternNet and PatternAttribution."""
    if not estimators:
        own = patterns.get(setup.estimator.name, {})
        return [Task(name, plain(name), method, own) for name, method in methods.items()]
    listed: list[Task] = []
    pattern_net, pattern_attribution = (build(setup.cfg.methods[n]) for n in ("pattern_net", "pattern_attribution"))
    for kind, method in (("signal", pattern_net), ("attribution", pattern_attribution)):
        for name, estimator in estimators.items():
            key, title = f"{kind}/{name}", formula(name)
            if estimator.has_pattern:
                listed.append(Task(key, title, method, patterns[name]))
            elif kind == "signal":
                listed.append(Task(key, f"{title}: the image", None, {}))
            else:
                listed.append(Task(key, f"{title}: z-rule", methods_by_name()[kind_of(method).without_patterns], {}))
    return listed


def column(setup: Setup, device: torch.device, subjects: Subjects, task: Task) -> Column:
    """One column.

    Raises:
        UserError: the method's own, for this network or these images.
    """
    if task.method is None:  # the identity's signal
        return Column(task.key, task.title, "signal", subjects.images.double())
    reference = reference_images(setup, device, [task.method])
    explainer = Explainer(setup.model, task.patterns, reference, setup.source.batch_size)
    explanations = explainer.explain(task.method, subjects.images.to(device), subjects.outputs)
    return Column(task.key, task.title, kind_of(task.method).kind, explanations)


@dataclass(frozen=True, kw_only=True)
class Gallery(Result):
    """Images (n, C, spatial...), what ``gallery.json`` says of each, and their explanations."""

    images: Tensor
    about: list[dict[str, Any]]
    columns: list[Column]


@dataclass(frozen=True)
class ExplainImages(Stage[Gallery]):
    """Explain images by every method, or with every estimator."""

    setup: Setup
    machine: Machine
    methods: Mapping[str, Any]
    estimators: Mapping[str, Estimator]
    positions: list[int]
    name = "explain"
    title = "explain validation images"

    def run(self, done: Done, bar: Bar) -> Gallery:
        setup, device = self.setup, self.machine.device
        subjects = read_subjects(setup, device, self.positions)
        patterns = done[PatternsByEstimator].patterns if PatternsByEstimator in done else {}
        listed = tasks(setup, self.methods, self.estimators, patterns)
        bar.start(len(listed))
        columns: list[Column] = []
        left_out: list[LeftOut] = []
        for task in listed:
            bar.advance(0, detail=task.key)
            try:
                columns.append(column(setup, device, subjects, task))
            except UserError as error:  # settings were checked: this network or these images are not for the method
                left_out.append(LeftOut(task.key, f"explain by {task.key}", str(error)))
            bar.advance()
        if not columns:
            raise UserError(f"nothing can be shown: {'; '.join(part.reason for part in left_out)}")
        return Gallery(images=subjects.images, about=subjects.about, columns=columns, left_out=tuple(left_out))


# --- how it is laid out ---


@dataclass(frozen=True)
class DrawGallery(Stage[Result]):
    """Draw the figure, and keep what it shows."""

    setup: Setup
    run_folder: RunFolder
    name = "draw"
    title = "draw the figure"

    def run(self, done: Done, bar: Bar) -> Result:
        gallery, setup, run_folder = done[Gallery], self.setup, self.run_folder
        figure = str(setup.cfg.figure)
        shown = ", ".join(column.title for column in gallery.columns)
        run_folder.picture(
            f"figures/{figure}", f"{figure}.png", f"Explanations of {setup.model_name} on {setup.source.name}: {shown}",
            lambda file: figures.draw_panels(*_layout(figure, gallery), file, setup.cfg.percentile),
        )  # fmt: skip
        explained = {column.key: unit_scale(column.explanations).float() for column in gallery.columns}
        run_folder.tensors(TENSORS, {"images": gallery.images, **explained}, {**setup.names, "figure": figure})
        return Result()


def _layout(figure: str, gallery: Gallery) -> tuple[list[list[Panel | None]], list[str]]:
    """Rows of panels, and a label for each row."""
    columns = gallery.columns

    def panel(column: Column, image: int, titled: bool = True) -> Panel:
        how = "heat" if column.kind == "attribution" else "colour"
        return Panel(column.title if titled else "", column.explanations[image], how)

    if figure == "fig5":
        rows: list[list[Panel | None]] = [
            [Panel("" if i else "input", image, "input"), *(panel(column, i, titled=not i) for column in columns)]
            for i, image in enumerate(gallery.images)
        ]
        return rows, [_caption(about) for about in gallery.about]
    grouped = {kind: [panel(column, 0) for column in columns if column.kind == kind] for kind in KINDS}
    kept = {kind: panels for kind, panels in grouped.items() if panels}
    first = Panel(_caption(gallery.about[0]), gallery.images[0], "input")
    return [[None if i else first, *panels] for i, panels in enumerate(kept.values())], list(kept)


def _caption(about: Mapping[str, Any]) -> str:
    def short(name: str) -> str:
        return name if len(name) <= 22 else name[:21] + "…"

    lines = [] if about["true"] is None else [f"true: {short(about['true'])}"]
    return "\n".join([*lines, f"predicted: {short(about['predicted_name'])}", f"({about['confidence']:.0%})"])
