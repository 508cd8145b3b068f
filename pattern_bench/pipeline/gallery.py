"""Galleries after Fig. 1, Fig. 4b and Fig. 5 of Kindermans et al. 2018: what ``python -m pattern_bench.gallery`` does.

A run leaves ``FIGURE.png``, the explanations in ``gallery.safetensors`` (each divided by its largest absolute value,
which ``gallery.json`` holds as its scale, so that they fit float32), and in ``gallery.json`` what is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchvision.models import SqueezeNet1_1_Weights

from pattern_bench.configuration.build import build
from pattern_bench.core.estimators import Estimator, Pattern
from pattern_bench.core.outputs import answer
from pattern_bench.data.splits import Unreadable
from pattern_bench.engine.micro_batches import enough_memory
from pattern_bench.engine.progress import Stages
from pattern_bench.engine.trainer import rounding
from pattern_bench.errors import UserError
from pattern_bench.methods.base import kind_of
from pattern_bench.methods.patterns import LrpZ
from pattern_bench.metrics.similarity import unit_scale
from pattern_bench.pipeline import explain as explanations
from pattern_bench.pipeline import patterns as fitting
from pattern_bench.pipeline.explainer import (
    JOB_ONLY,
    SLOW,
    Explainer,
    check_methods,
    chosen_methods,
    names_shown,
    one_process,
    refuse_unused,
)  # fmt: skip
from pattern_bench.pipeline.record import Record, begin, recorded
from pattern_bench.pipeline.setup import Setup, prepare
from pattern_bench.plotting import figures
from pattern_bench.plotting.figures import Panel
from pattern_bench.results import schema
from pattern_bench.results.labels import plain

FIGURES = ("fig1", "fig4b", "fig5")
IMAGES = 6
KINDS = ("function", "signal", "attribution")
TENSORS, SUMMARY = "gallery.safetensors", "gallery.json"


@dataclass
class Shown:
    """Images that are explained: network inputs (n, C, spatial...), outputs to explain (n,), and what is known of
    each."""

    images: Tensor
    outputs: Tensor
    about: list[dict[str, Any]]


@dataclass
class Column:
    """Explanations (n, C, H, W) by one method; ``key`` in the files, and what they show: a member of KINDS."""

    key: str
    title: str
    kind: str
    explanations: Tensor


def check_overrides(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """
    Raises:
        UserError: where an override has no effect.
    """
    unused = (*JOB_ONLY, "estimator", "methods") if cfg.figure == "fig4b" else (*JOB_ONLY, "estimators")
    refuse_unused(overrides, f"figure={cfg.figure}", unused)


@enough_memory()
@rounding
def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Draws one figure into ``folder``, and returns what is shown.

    Raises:
        UserError: for what the user can mend.
    """
    one_process(cfg)
    begun = begin(cfg, folder, SUMMARY)
    _check(cfg)
    shown = Stages(cfg.quiet)
    estimators: dict[str, Estimator] = {}
    methods: dict[str, Any] = {}
    if cfg.figure == "fig4b":
        names = names_shown(cfg, cfg.estimators, list(cfg.estimators))
        estimators = {name: build(cfg.estimators[name]) for name in names}
    else:
        methods = chosen_methods(cfg, [name for name in cfg.methods if name not in SLOW])
    with shown.run("prepare", "prepare data and model") as bar:
        setup = prepare(cfg, folder, bar, explanations.check)
        if estimators:
            # Whatever the job's estimator: the figure has its own.
            setup = replace(setup, estimator=next((e for e in estimators.values() if e.has_pattern), setup.estimator))
        check_methods(setup, methods)
        positions = _positions(setup)
    found_by = {"title": f"{setup.model_name}/{cfg.figure}", **setup.names, "figure": str(cfg.figure)}
    with recorded(cfg, folder, begun, "gallery", found_by) as record:
        return _explain_and_draw(setup, methods, estimators, positions, shown, record)


def _check(cfg: DictConfig) -> None:
    if cfg.figure not in FIGURES:
        raise UserError(f"figure={cfg.figure} is unknown: choose from {', '.join(FIGURES)}")
    if not (isinstance(cfg.percentile, int | float) and 0 < cfg.percentile <= 100):
        raise UserError(f"percentile={cfg.percentile} is not possible: give more than 0, up to 100 (the maximum)")
    used, other, least = ("images", "image", 1) if cfg.figure == "fig5" else ("image", "images", 0)
    if cfg[other] is not None:
        raise UserError(f"{other}={cfg[other]} has no effect on figure={cfg.figure}: give {used} instead")
    value = cfg[used]
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise UserError(f"{used}={value} is not possible: give a whole number of at least {least}, or null")


def _positions(setup: Setup) -> list[int]:
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


# --- what is shown ---


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


def _read(setup: Setup, positions: list[int]) -> Shown:
    split = setup.splits["validation"]
    batch = split.batch(positions)
    images: Any = batch.images
    setup.model.to(setup.device)
    parts = images.split(setup.source.batch_size)
    with torch.no_grad():
        logits = torch.cat([setup.model(part.to(setup.device)) for part in parts])
    outputs, predicted, confidence = answer(setup.model, logits)
    names = class_names(setup)
    comparable = explanations.why_no_accuracy(setup) is None
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
    return Shown(images, outputs, about)


def _patterns(
    setup: Setup, estimators: Mapping[str, Estimator], needed: bool, shown: Stages
) -> dict[str, dict[str, Pattern]]:
    """Patterns by estimator and layer, (N, D) float64."""
    fitted = {name: estimator for name, estimator in estimators.items() if estimator.has_pattern}
    if not needed or not fitted:
        return {}
    with shown.run("fit_patterns", "fit patterns on the first half") as bar:
        moments, _ = fitting.collect(setup, "fit", fitting.all_samples(setup, gram=False), bar)
        return {
            name: fitting.fit_patterns(replace(setup, estimator=estimator), moments)
            for name, estimator in fitted.items()
        }


def _explain_and_draw(
    setup: Setup,
    methods: Mapping[str, Any],
    estimators: Mapping[str, Estimator],
    positions: list[int],
    shown: Stages,
    record: Record,
) -> dict[str, Any]:
    figure = str(setup.cfg.figure)
    needed = bool(estimators) or any(kind_of(method).needs_patterns for method in methods.values())
    patterns = _patterns(setup, estimators or {setup.estimator.name: setup.estimator}, needed, shown)
    with shown.run("explain", "explain validation images") as bar:
        chosen = _read(setup, positions)
        tasks = _tasks(setup, methods, estimators, patterns)
        bar.start(len(tasks))
        columns, left_out = [], {}
        for key, title, method, its_patterns in tasks:
            bar.advance(0, detail=key)
            try:
                columns.append(_column(setup, chosen, key, title, method, its_patterns))
            except UserError as error:  # settings were checked: this network or these images are not for the method
                left_out[key] = str(error)
            bar.advance()
    for key, reason in left_out.items():
        shown.skip(key, f"explain by {key}", reason)
    if not columns:
        raise UserError(f"nothing can be shown: {'; '.join(left_out.values())}")
    with shown.run("draw", f"draw {figure}"):
        about = f"Explanations of {setup.model_name} on {setup.source.name}: {', '.join(c.title for c in columns)}"
        record.picture(
            f"figures/{figure}", f"{figure}.png", about,
            lambda file: figures.draw_panels(*_layout(figure, chosen, columns), file, setup.cfg.percentile),
        )  # fmt: skip
        explained = {c.key: unit_scale(c.explanations).float() for c in columns}
        names = {**setup.names, "figure": figure}
        record.tensors(TENSORS, {"images": chosen.images, **explained}, names)
    summary = {
        **setup.names,
        "figure": figure,
        "estimators": list(estimators) or ([setup.estimator.name] if needed else []),
        "seed": setup.cfg.seed,
        "percentile": setup.cfg.percentile,
        "images": chosen.about,
        "columns": [
            {
                "key": column.key,
                "kind": column.kind,
                "scale": [float(scale) for scale in column.explanations.abs().flatten(1).amax(1)],
            }
            for column in columns
        ],
        "left_out": left_out,
        **shown.figures(),
        "versions": schema.versions(),
    }
    return record.end(SUMMARY, summary, "-".join(names.values()))


def _tasks(
    setup: Setup,
    methods: Mapping[str, Any],
    estimators: Mapping[str, Estimator],
    patterns: Mapping[str, Mapping[str, Pattern]],
) -> list[tuple[str, str, Any, Mapping[str, Pattern]]]:
    """Key, title, method (None for the image itself) and patterns of every column."""
    if not estimators:
        own = patterns.get(setup.estimator.name, {})
        return [(name, plain(name), method, own) for name, method in methods.items()]
    found: list[tuple[str, str, Any, Mapping[str, Pattern]]] = []
    pattern_net, pattern_attribution = (build(setup.cfg.methods[n]) for n in ("pattern_net", "pattern_attribution"))
    for kind, method in (("signal", pattern_net), ("attribution", pattern_attribution)):
        for name, estimator in estimators.items():
            title = figures.LABELS.get(name, name)
            if estimator.has_pattern:
                found.append((f"{kind}/{name}", title, method, patterns[name]))
            elif kind == "signal":
                found.append((f"{kind}/{name}", f"{title}: the image", None, {}))
            else:
                found.append((f"{kind}/{name}", f"{title}: z-rule", LrpZ, {}))
    return found


def _column(setup: Setup, chosen: Shown, key: str, title: str, method: Any, patterns: Mapping[str, Pattern]) -> Column:
    if method is None:  # the identity's signal
        return Column(key, title, "signal", chosen.images.double())
    reference = explanations.reference_images(setup, [method])
    explainer = Explainer(setup.model, patterns, reference, setup.source.batch_size)
    found = explainer.explain(method, chosen.images.to(setup.device), chosen.outputs)
    return Column(key, title, kind_of(method).kind, found)


# --- how it is laid out ---


def _layout(figure: str, chosen: Shown, columns: list[Column]) -> tuple[list[list[Panel | None]], list[str]]:
    """Rows of panels, and a label for each row."""

    def panel(column: Column, image: int, titled: bool = True) -> Panel:
        how = "heat" if column.kind == "attribution" else "colour"
        return Panel(column.title if titled else "", column.explanations[image], how)

    if figure == "fig5":
        rows: list[list[Panel | None]] = [
            [Panel("" if i else "input", image, "input"), *(panel(column, i, titled=not i) for column in columns)]
            for i, image in enumerate(chosen.images)
        ]
        return rows, [_caption(about) for about in chosen.about]
    grouped = {kind: [panel(column, 0) for column in columns if column.kind == kind] for kind in KINDS}
    kept = {kind: panels for kind, panels in grouped.items() if panels}
    first = Panel(_caption(chosen.about[0]), chosen.images[0], "input")
    return [[None if i else first, *panels] for i, panels in enumerate(kept.values())], list(kept)


def _caption(about: Mapping[str, Any]) -> str:
    def short(name: str) -> str:
        return name if len(name) <= 22 else name[:21] + "…"

    lines = [] if about["true"] is None else [f"true: {short(about['true'])}"]
    return "\n".join([*lines, f"predicted: {short(about['predicted_name'])}", f"({about['confidence']:.0%})"])
