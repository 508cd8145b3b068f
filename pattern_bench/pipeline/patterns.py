"""The stages that fit patterns: moments of the selected layers over a split, and what the estimator makes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pattern_bench.core.active_moments import FiringMoments, draw_neurons
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.moments import Moments
from pattern_bench.data.splits import Split
from pattern_bench.engine.progress import Bar
from pattern_bench.engine.streams import FiringStream, MomentStream, WatchingStream
from pattern_bench.errors import UserError
from pattern_bench.pipeline.run_pass import Met, met, stream_over
from pattern_bench.pipeline.setup import Setup
from pattern_bench.processes import collectives
from pattern_bench.storage.cache import key_of

MOMENTS_VERSION = 3


M = TypeVar("M", Moments, FiringMoments)


@dataclass(frozen=True)
class Sums(Generic[M]):
    """What a pass adds up: its part of the cache's keys, how an entry is read, and the stream for some layers."""

    key: dict[str, Any]
    read: Callable[[Mapping[str, Tensor]], M]
    stream: Callable[[list[str]], WatchingStream]


def all_samples(setup: Setup, gram: bool) -> Sums[Moments]:
    """Moments of every neuron over all samples; ρ needs them with the Gram matrix, patterns without."""

    def stream(layers: list[str]) -> WatchingStream:
        seeds = {layer: setup.seed(layer) for layer in layers}
        return MomentStream(setup.model, layers, gram, setup.memory, setup.cfg.moments.positions, seeds)

    return Sums({"gram": gram}, Moments.from_tensors, stream)


def where_firing(setup: Setup) -> Sums[FiringMoments]:
    """Moments of the layers' :func:`measured` neurons over the samples where each fires."""

    def stream(layers: list[str]) -> WatchingStream:
        seeds = {layer: setup.seed(layer) for layer in layers}
        neurons = {layer: measured(setup, layer) for layer in layers}
        return FiringStream(setup.model, neurons, setup.memory, setup.cfg.moments.positions, seeds)

    key = {"firing": setup.cfg.probe.neurons, "seed": setup.cfg.seed}
    return Sums(key, FiringMoments.from_tensors, stream)


def measured(setup: Setup, layer: str) -> Tensor:
    """The neurons (K,) whose ρ is measured in closed form where they fire: each has a Gram matrix of its own."""
    generator = torch.Generator().manual_seed(setup.seed(f"{layer} firing"))
    return draw_neurons(len(setup.weight(layer)), setup.cfg.probe.neurons, generator)


class SplitMoments(Mapping[str, M]):
    """Moments of a split by layer, in the first process: read from the cache when they are asked for, one layer at a
    time, since a Gram matrix can have gigabytes. Only what the cache did not take is in memory.

    Args:
        setup: see there.
        sums: what they are.
        pieces: of the split; by layer, each piece's moments, or the name of their entry in the cache.
    """

    def __init__(self, setup: Setup, sums: Sums[M], pieces: list[dict[str, M | str]]) -> None:
        self.setup = setup
        self.sums: Sums[M] = sums
        self._pieces: list[dict[str, M | str]] = pieces

    def pieces(self, layer: str) -> list[M]:
        """A layer's moments of each piece."""
        return [self._moments(piece[layer]) for piece in self._pieces]

    def _moments(self, kept: M | str) -> M:
        if not isinstance(kept, str):
            return kept
        entry = self.setup.cache.load("moments", kept, self.sums.read)
        if entry is None:
            raise UserError(
                f"cache.dir={self.setup.cfg.cache.dir} has lost moments that were just written: was it emptied? Run "
                "again, or choose another cache.dir"
            )
        return entry[0]

    def __getitem__(self, layer: str) -> M:
        total: M | None = None
        for piece in self._pieces:
            more = self._moments(piece[layer])
            if total is not None:
                total.add_(more)
            elif isinstance(piece[layer], str) or len(self._pieces) == 1:
                total = more
            else:  # a copy to add to, since the piece is asked for again
                total = more.times(1)
        if total is None:
            raise KeyError(layer)
        return total

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces[0] if self._pieces else ())

    def __len__(self) -> int:
        return len(self._pieces[0]) if self._pieces else 0


def collect(setup: Setup, split: str, sums: Sums[M], bar: Bar) -> tuple[SplitMoments[M], Met]:
    """What ``sums`` adds up, for the selected layers over a split; only what no earlier job left in the cache is
    computed.

    Moments are kept of the whole split, or of its chunks where the bootstrap will draw them again.
    """
    whole = setup.splits[split]
    chunks = setup.cfg.bootstrap.chunks
    pieces = whole.chunks(chunks) if setup.cfg.bootstrap.resamples else [whole]
    bar.start(0, unit="images")
    found, everything = [], Met(0, [])
    for number, piece in enumerate(pieces):
        moments, here = _collect_piece(setup, piece, sums, f"{split}-{number}", bar)
        found.append(moments)
        everything = everything + here
    if everything.images < 2:
        raise UserError(
            f"only {everything.images} of the {len(whole)} images of the {split} split can be read: "
            "mend the files, or ask for more images (data.limit, data.fit, data.probe, data.validation)"
        )
    return SplitMoments(setup, sums, found), everything


def _collect_piece(setup: Setup, piece: Split, sums: Sums[M], stage: str, bar: Bar) -> tuple[dict[str, M | str], Met]:
    """In the first process, moments by layer or where they are in the cache; what all processes met."""
    shared: dict[str, Any] = {"version": MOMENTS_VERSION, "model": setup.model_key, "images": piece.fingerprint}
    shared |= setup.arithmetic
    if setup.cfg.moments.positions < 1:
        shared |= {"positions": setup.cfg.moments.positions, "seed": setup.cfg.seed}
    keys = {layer: key_of(**{**shared, **sums.key}, layer=layer) for layer in setup.layers}
    with setup.cache.lock("moments", key_of(**shared)) if collectives.first() else nullcontext():
        missing, there = _missing(setup, sums, keys)
        if not missing:
            bar.add_images(len(piece), len(piece))
            return dict(keys), there
        stream = sums.stream(missing)
        partial = setup.partial(stage, **{**shared, **sums.key}, layers=missing)
        stream_over(setup, stream, piece, partial, bar, keep=not setup.cache.writable)
        here = met(piece, stream.seen)
        metadata = {"images": str(here.images), "unreadable": json.dumps(here.unreadable)}
        found: dict[str, M | str] = dict(keys)
        for layer in missing:
            # Added up, stored and released one by one: a layer's Gram matrix can have gigabytes.
            moments = stream.watchers.pop(layer).moments()
            for name, tensor in moments.tensors().items():
                setattr(moments, name, collectives.total_in_first(tensor))
            if collectives.first():
                moments = moments.to("cpu")
                kept = setup.cache.save("moments", keys[layer], moments.tensors(), {**metadata, "layer": layer})
                if not kept:
                    found[layer] = moments
            del moments
        collectives.wait()  # what is removed next is not needed any more
        if setup.cache.writable:
            partial.remove()
        return found, here


def _missing(setup: Setup, sums: Sums[M], keys: Mapping[str, str]) -> tuple[list[str], Met]:
    """The layers whose moments are not in the cache, as the first process sees it; and what those there met."""
    gone = torch.zeros(len(keys), dtype=torch.int64)
    seen: dict[str, str] = {}
    if collectives.first():
        for number, key in enumerate(keys.values()):
            entry = setup.cache.load("moments", key, sums.read)
            gone[number] = entry is None
            seen = entry[1] if entry is not None else seen
    missing = [layer for layer, is_gone in zip(keys, collectives.from_first(gone).tolist(), strict=True) if is_gone]
    if missing:
        return missing, Met(0, [])
    seen = json.loads(collectives.text_from_any(json.dumps(seen) if seen else ""))
    return missing, Met(int(seen["images"]), json.loads(seen["unreadable"]))


def fit_pattern(setup: Setup, layer: str, moments: Moments) -> Pattern:
    """A layer's patterns, (N, D) float64."""
    return setup.estimator.fit(setup.weight(layer), moments, torch.Generator().manual_seed(setup.seed(layer)))


def fit_patterns(setup: Setup, moments: Mapping[str, Moments]) -> dict[str, Pattern]:
    """Patterns of every selected layer, (N, D) float64, in every process."""
    patterns = {}
    for layer in moments:
        weight = setup.weight(layer)
        dead = torch.zeros(len(weight), dtype=torch.uint8)
        parts = [weight.clone(), weight.clone(), dead]
        if collectives.first():
            fitted = fit_pattern(setup, layer, moments[layer])
            parts = [fitted.positive, fitted.negative, fitted.dead.to(torch.uint8)]
        positive, negative, dead = (collectives.from_first(part) for part in parts)
        patterns[layer] = Pattern(positive, negative, dead.bool())
    return patterns


def in_weight_shape(setup: Setup, patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """The patterns as they are used and saved: shaped and typed as the weights."""
    weights: dict[str, Any] = {layer: setup.model.get_submodule(layer).weight for layer in patterns}
    return {layer: pattern.shaped_like(weights[layer]) for layer, pattern in patterns.items()}


def signal_angles(setup: Setup, patterns: Mapping[str, Pattern]) -> dict[str, float] | None:
    """Degrees between the known signal and the first layer's filter and pattern, where the data know their signal."""
    truth, layer = setup.source.signal, setup.layers[0]
    if truth is None or setup.weight(layer).shape[1] != len(truth):
        return None

    def degrees(direction: Tensor) -> float:
        cosine = (direction @ truth).abs() / (direction.norm() * truth.norm())
        return math.degrees(math.acos(min(1.0, float(cosine))))

    angles = {"filter": degrees(setup.weight(layer)[0])}
    if layer in patterns:
        angles["pattern"] = degrees(patterns[layer].positive[0])
    return angles
