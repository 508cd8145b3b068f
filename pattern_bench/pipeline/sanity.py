"""Two checks that an explanation depends on the network it explains: what ``python -m pattern_bench.sanity`` does.

Cascading randomisation (Adebayo et al. 2018): layers get new random weights one after the other, from the output down,
and the heat map of the class first predicted is compared with that of the trained network. A method whose heat map
stays does not depend on what those layers learned. A low similarity alone does not make a method faithful: noise
scores best.

Convergence of directions (Sixt et al. 2020): different vectors are sent back from the output, and compared at the
input of every layer. Where they end up on one line, what the method shows below is the same for every class.

A run leaves ``sanity.csv``, ``randomisation.png``, ``convergence.png`` and ``sanity.json``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from pattern_bench.core.collector import Collector
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.layers import Scratch
from pattern_bench.core.network import collecting
from pattern_bench.data.splits import Split
from pattern_bench.engine.micro_batches import enough_memory
from pattern_bench.engine.progress import Bar, Stages
from pattern_bench.engine.streams import fast_layout
from pattern_bench.engine.trainer import rounding
from pattern_bench.errors import UserError
from pattern_bench.methods.base import Method, kind_of
from pattern_bench.methods.patterns import LrpZ
from pattern_bench.metrics.similarity import convergence, similarities
from pattern_bench.pipeline import explain as explanations
from pattern_bench.pipeline import patterns as fitting
from pattern_bench.pipeline.explainer import SLOW, Explainer, check_methods, chosen_methods, one_process, refuse_unused
from pattern_bench.pipeline.record import Record, begin, recorded
from pattern_bench.pipeline.setup import Setup, prepare
from pattern_bench.plotting import figures
from pattern_bench.results import schema

COLUMNS = (
    "model", "data", "estimator", "method", "check", "layer", "layer_index", "measure", "mean", "std", "n",
)  # fmt: skip
MANY_PASSES = ("smoothgrad", "integrated_gradients", *SLOW)
STARTS = ("gaussian", "classes")
SUMMARY = "sanity.json"
MEASURES = {
    "spearman_signed": "Spearman's ρ of heat maps", "spearman_absolute": "Spearman's ρ of |heat maps|",
    "ssim": "SSIM of heat maps", "cosine": "cosine of heat maps",
}  # fmt: skip


def check_overrides(overrides: Iterable[str]) -> None:
    """
    Raises:
        UserError: where an override has no effect.
    """
    refuse_unused(overrides, "the sanity checks")


@enough_memory()
@rounding
def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Runs both checks, writes their files into ``folder``, and returns the summary.

    Raises:
        UserError: for what the user can mend.
    """
    one_process(cfg)
    begun = begin(cfg, folder, SUMMARY)
    _check(cfg)
    methods = chosen_methods(cfg, [name for name in cfg.methods if name not in MANY_PASSES])
    shown = Stages(cfg.quiet)
    with shown.run("prepare", "prepare data and model") as bar:
        setup = prepare(cfg, folder, bar, explanations.check)
        check_methods(setup, methods)
        if cfg.start == "classes" and cfg.directions > setup.outputs:
            raise UserError(f"directions={cfg.directions} is more than the {setup.outputs} classes: ask for fewer")
        needed = any(kind_of(method).needs_patterns for method in methods.values())
        images = _images(setup.splits["validation"], cfg.images, "images")
        refit = _images(setup.splits["fit"], cfg.refit, "refit") if needed and cfg.refit else None
    title = f"{setup.model_name}/{setup.estimator.name}/sanity"
    names = {"title": title, **setup.names, "estimator": setup.estimator.name}
    with recorded(cfg, folder, begun, "sanity", names) as record:
        return _checks(setup, methods, images, refit, needed, shown, record)


def _check(cfg: DictConfig) -> None:
    for setting, least in (("images", 1), ("refit", 0), ("directions", 2)):
        value = cfg[setting]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{setting}={value} is not possible: give a whole number of at least {least}")
    if cfg.start not in STARTS:
        raise UserError(f"start={cfg.start} is unknown: choose from {', '.join(STARTS)}")


def _images(split: Split, count: int, setting: str) -> Tensor:
    """The first ``count`` images of a split, (count, C, H, W); fewer where some cannot be read."""
    if count > len(split):
        raise UserError(f"{setting}={count} is more than the {len(split)} images of the split: ask for fewer")
    images = split.batch(range(count)).images
    if images is None:
        raise UserError(f"none of the first {count} images of the split can be read: ask for more ({setting})")
    return images


def _checks(
    setup: Setup,
    methods: Mapping[str, Any],
    images: Tensor,
    refit: Tensor | None,
    needed: bool,
    shown: Stages,
    record: Record,
) -> dict[str, Any]:
    patterns: dict[str, Pattern] = {}
    if needed:
        with shown.run("fit_patterns", "fit patterns on the first half") as bar:
            moments, _ = fitting.collect(setup, "fit", fitting.all_samples(setup, gram=False), bar)
            patterns = fitting.fit_patterns(setup, moments)
    setup.model.to(setup.device)
    images = images.to(setup.device)
    reference = explanations.reference_images(setup, methods.values())
    explainer = Explainer(setup.model, patterns, reference, setup.source.batch_size)
    left_out: dict[str, str] = {}

    with shown.run("randomisation", "cascading randomisation") as bar:
        rows = randomisation(setup, methods, explainer, images, refit, left_out, bar)
    with shown.run("convergence", "convergence of directions") as bar:
        rows += directions(setup, methods, explainer, images, left_out, bar)
    for key, reason in left_out.items():
        shown.skip(key, key, reason)
    table = pd.DataFrame(rows)
    if table.empty:
        raise UserError(f"nothing can be checked: {'; '.join(left_out.values())}")
    table = table.assign(
        **setup.names,
        estimator=[setup.estimator.name if kind_of(methods[m]).needs_patterns else "none" for m in table.method],
    )[list(COLUMNS)]
    record.csv("sanity.csv", table)
    title = f"{setup.model_name} on {setup.source.name} (n = {len(images)})"
    if needed:
        title += f", patterns {figures.LABELS.get(setup.estimator.name, setup.estimator.name)}"
    for check, xlabel, ylabels in (
        ("randomisation", "layers randomised from the output down to", MEASURES),
        ("convergence", "at the input of layer", {"cosine_absolute": "mean |cosine| of directions"}),
    ):
        if len(part := table[table.check == check]):
            more = ""
            if needed and check == "randomisation":
                more = " of the trained network" if refit is None else " fitted again after each layer"
            draw = functools.partial(figures.draw_similarity, part, title=title + more, xlabel=xlabel, ylabels=ylabels)
            record.picture(f"figures/{check}", f"{check}.png", f"{check} of {title}{more}", draw)
    record.table("sanity", table)
    summary = {
        **setup.names,
        "estimator": setup.estimator.name,
        "seed": setup.cfg.seed,
        "images": len(images),
        "patterns": "refitted" if refit is not None else "kept" if needed else None,
        "refit_images": None if refit is None else len(refit),
        "start": setup.cfg.start,
        "directions": setup.cfg.directions,
        # The end of each curve: every layer randomised, and directions at the image.
        "all_layers_randomised": _ends(table[table.check == "randomisation"]),
        "at_the_image": _ends(table[table.check == "convergence"]),
        "left_out": left_out,
        **shown.figures(),
        "versions": schema.versions(),
    }
    return record.end(SUMMARY, summary, "-".join([*setup.names.values(), setup.estimator.name, "sanity"]))


def _ends(table: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    first = table[table.layer_index == 0]
    return {
        str(method): {str(m): None if pd.isna(v) else float(v) for m, v in zip(rows.measure, rows["mean"], strict=True)}
        for method, rows in first.groupby("method", sort=False)
    }


def _row(method: str, check: str, layer: str, index: int, measure: str, values: Tensor) -> dict[str, Any]:
    """Mean and spread over the images that have a value."""
    values = values[~values.isnan()]
    return {
        "method": method, "check": check, "layer": layer, "layer_index": index, "measure": measure,
        "mean": float(values.mean()) if len(values) else float("nan"),
        "std": float(values.std()) if len(values) > 1 else float("nan"), "n": len(values),
    }  # fmt: skip


# --- cascading randomisation ---


def randomisation(
    setup: Setup,
    methods: Mapping[str, Any],
    explainer: Explainer,
    images: Tensor,
    refit: Tensor | None,
    left_out: dict[str, str],
    bar: Bar,
) -> list[dict[str, Any]]:
    """A row per method, layer and measure: how alike the heat maps of the trained network and of its copy are, whose
    layers from the output down to that one are random. Heat maps are explanations summed over channels. Methods that
    start from the output's value turn their sign with it, and signed measures see that.

    A pattern is made for its weights (wᵀa = 1) and for what reaches its layer. So with ``refit`` images (F, C, H, W)
    the patterns of the randomised layers, and only theirs, are fitted again: nothing below them has changed. With None
    the trained network's patterns stay. Learned parameters outside of Conv and Linear layers stay too.
    """
    target = _predicted(setup.model, images, setup.source.batch_size)
    bar.start(len(methods) * (len(setup.all_layers) + 1), "trained network")
    originals: dict[str, Tensor] = {}
    for name, method in methods.items():
        try:
            originals[name] = explainer.explain(method, images, target).sum(1)
        except UserError as error:
            left_out[f"{name}, randomisation"] = str(error)
        bar.advance()
    model, patterns = copy.deepcopy(setup.model), dict(explainer.patterns)
    rows: list[dict[str, Any]] = []
    for index in reversed(range(len(setup.all_layers))):
        layer = setup.all_layers[index]
        randomise(model.get_submodule(layer), setup.seed(f"randomised {layer}"))
        if refit is not None:
            patterns |= _refitted(setup, model, setup.all_layers[index:], refit)
        randomised = Explainer(model, patterns, explainer.reference, explainer.batch_size)
        for name, original in originals.items():
            bar.advance(detail=f"{layer}, {name}")
            try:
                found = similarities(original, randomised.explain(methods[name], images, target).sum(1))
            except UserError as error:
                left_out[f"{name}, randomised down to {layer}"] = str(error)
                found = {measure: torch.full((1,), torch.nan) for measure in MEASURES}
            rows += [_row(name, "randomisation", layer, index, m, values) for m, values in found.items()]
    return rows


def randomise(layer: nn.Module, seed: int) -> None:
    """Gives a layer the weights that PyTorch would begin its training with: ``reset_parameters`` with ``seed``."""
    fresh: Any = copy.deepcopy(layer).cpu()  # the same numbers whatever the device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh.reset_parameters()
    layer.load_state_dict(fresh.state_dict())


def _predicted(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(fast_layout(part)).argmax(1) for part in images.split(batch_size)])


def _refitted(setup: Setup, model: nn.Module, layers: list[str], images: Tensor) -> dict[str, Pattern]:
    """Patterns of the named layers of ``model``, on ``images``."""
    scratch = Scratch()
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
    positions = setup.cfg.moments.positions
    collectors = {
        name: Collector(module, False, setup.memory, positions, setup.seed(name), scratch)
        for name, module in modules.items()
    }
    with torch.no_grad(), collecting(model, collectors):
        for part in images.split(setup.source.batch_size):
            model(fast_layout(part.to(setup.device)))
    moments = {name: collector.moments().to("cpu") for name, collector in collectors.items()}
    return fitting.fit_patterns(replace(setup, model=model), moments)


# --- convergence of directions ---


def directions(
    setup: Setup,
    methods: Mapping[str, Any],
    explainer: Explainer,
    images: Tensor,
    left_out: dict[str, str],
    bar: Bar,
) -> list[dict[str, Any]]:
    """A row per method and layer: the mean absolute cosine of vectors sent back from the output, at the layer's input;
    and one, with layer ``output``, for the vectors as they start."""
    bar.start(len(methods) * len(images))
    starts = start_vectors(setup.cfg.start, setup.cfg.directions, setup.outputs, setup.seed("directions"))
    layers = setup.all_layers
    rows: list[dict[str, Any]] = []
    for name, method in methods.items():
        found: list[list[Tensor]] = []
        try:
            made, dtype = explainer.make(method)
            for image in images.split(1):
                vectors = back_propagated(made, layers, image.to(dtype or image.dtype), starts)
                found.append([convergence(vectors[layer].cpu()) for layer in layers])
                bar.advance(detail=name)
        except UserError as error:
            left_out[f"{name}, convergence"] = str(error)
            bar.advance(len(images) - len(found))
            continue
        rows.append(
            _row(name, "convergence", "output", len(layers), "cosine_absolute", convergence(starts).expand(len(images)))
        )
        for index, values in reversed(list(enumerate(zip(*found, strict=True)))):
            rows.append(_row(name, "convergence", layers[index], index, "cosine_absolute", torch.stack(values)))
    return rows


def start_vectors(start: str, count: int, outputs: int, seed: int) -> Tensor:
    """What is sent back from the output, (count, outputs) float64: Gaussian vectors, or distinct classes."""
    generator = torch.Generator().manual_seed(seed)
    if start == "classes":
        return torch.eye(outputs, dtype=torch.float64)[torch.randperm(outputs, generator=generator)[:count]]
    return torch.randn(count, outputs, generator=generator, dtype=torch.float64)


def back_propagated(method: Method, layers: list[str], image: Tensor, starts: Tensor) -> dict[str, Tensor]:
    """What a method sends back from the outputs to the input of every layer, from one image (1, C, H, W).

    It is the method's own way back: only what it starts from (``starts``, (J, K)) and where it is looked at differ.
    For the z-rule it is the relevance, not the relevance per unit of activation that it is computed with.

    Returns:
        By layer, (J, D).

    Raises:
        UserError: where the method does not work by one pass back through the network.
    """
    edges: dict[str, tuple[Any, Tensor]] = {}
    found: dict[str, Tensor] = {}
    outputs: list[Tensor] = []

    def output(x: Tensor, _target: Tensor | None) -> Tensor:
        with _watching(method.model, layers, edges):
            outputs.append(method._logits(x))
        return outputs[0].sum(1)

    def gradient(_output: Tensor, x: Tensor, _start: Tensor | None = None) -> Tensor:
        wanted = [edge for edge, _ in edges.values()]
        passes = [
            torch.autograd.grad(outputs[0], wanted, start[None].to(outputs[0]), retain_graph=True, allow_unused=True)
            for start in starts
        ]
        for i, (name, (_, value)) in enumerate(edges.items()):
            rows = [torch.zeros_like(value) if grads[i] is None else grads[i] for grads in passes]
            vectors = torch.cat([row.flatten(1) for row in rows])
            found[name] = vectors * value.flatten(1) if isinstance(method, LrpZ) else vectors
        return torch.zeros_like(x)

    own: Any = method
    own._output, own._gradient = output, gradient
    try:
        method.attribute(image, 0)
    finally:
        del own._output, own._gradient
    if not found:
        raise UserError(f"{method.name} does not work by one pass back through the network, so it has no directions")
    return found


@contextmanager
def _watching(model: nn.Module, layers: list[str], edges: dict[str, tuple[Any, Tensor]]) -> Iterator[None]:
    """Within, keeps where the graph stands and what the value is at the input of each layer's first call.

    The edge, rather than the tensor, because the tensor may be overwritten in place later on.
    """

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name not in edges:
                edges[name] = torch.autograd.graph.get_gradient_edge(inputs[0]), inputs[0].detach().clone()

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
