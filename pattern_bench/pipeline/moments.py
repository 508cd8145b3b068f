"""Statistics of the selected layers over a split: summed up in a pass, or read from the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from pattern_bench.core.active_moments import FiringMoments, draw_neurons
from pattern_bench.core.moments import Moments
from pattern_bench.core.network import refusing_other_layers
from pattern_bench.core.probe_closed_form import CLOSED_FORM
from pattern_bench.data.splits import Split
from pattern_bench.engine.progress import Bar
from pattern_bench.engine.statistics_streams import FiringStream, MomentStream
from pattern_bench.engine.streams import WatchingStream
from pattern_bench.errors import UserError
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.run_folder import RunFolder
from pattern_bench.pipeline.run_pass import Visited, stream_over
from pattern_bench.pipeline.setup import Setup, layer_setting
from pattern_bench.pipeline.stage import Done, Result, Stage
from pattern_bench.processes import collectives
from pattern_bench.storage.cache import Cache, key_of

MOMENTS_VERSION = 3
"""Of how moments are summed; those of another are summed again."""

M = TypeVar("M", Moments, FiringMoments)


# --- what is summed ---


@dataclass(frozen=True)
class Sums(Generic[M]):
    """What a pass adds up.

    Attributes:
        key: its part of the cache's keys.
        read: from the tensors of a cache's entry.
        stream: of the layers named.
    """

    key: dict[str, Any]
    read: Callable[[Mapping[str, Tensor]], M]
    stream: Callable[[list[str]], WatchingStream]


def all_samples(setup: Setup, gram: bool) -> Sums[Moments]:
    """Moments of every neuron over all samples; ρ needs them with the Gram matrix, patterns without."""

    def stream(layers: list[str]) -> WatchingStream:
        seeds = {layer: setup.seed(layer) for layer in layers}
        return MomentStream(setup.model, layers, gram, setup.memory, setup.cfg.moments.positions, seeds)

    return Sums({"gram": gram}, Moments.from_tensors, stream)


def active_samples(setup: Setup) -> Sums[FiringMoments]:
    """Moments of the layers' :func:`measured_neurons` over the samples where each fires."""

    def stream(layers: list[str]) -> WatchingStream:
        seeds = {layer: setup.seed(layer) for layer in layers}
        neurons = {layer: measured_neurons(setup, layer) for layer in layers}
        return FiringStream(setup.model, neurons, setup.memory, setup.cfg.moments.positions, seeds)

    key = {"firing": setup.cfg.probe.neurons, "seed": setup.cfg.seed}
    return Sums(key, FiringMoments.from_tensors, stream)


def measured_neurons(setup: Setup, layer: str) -> Tensor:
    """The neurons (K,) whose ρ is measured in closed form where they fire: each has a Gram matrix of its own."""
    generator = torch.Generator().manual_seed(setup.seed(f"{layer} firing"))
    return draw_neurons(len(setup.weight(layer)), setup.cfg.probe.neurons, generator)


# --- where the sums are ---


class SplitMoments(Mapping[str, M]):
    """Moments of a split by layer, in the first process: read from the cache when they are asked for, one layer at a
    time, since a Gram matrix can have gigabytes. Only what the cache did not take is in memory.

    Args:
        cache: that the moments are in.
        read: from the tensors of an entry.
        pieces: of the split; by layer, each piece's moments, or the name of their entry in the cache.
    """

    def __init__(
        self, cache: Cache, read: Callable[[Mapping[str, Tensor]], M], pieces: list[dict[str, M | str]]
    ) -> None:
        self._cache = cache
        self._read: Callable[[Mapping[str, Tensor]], M] = read
        self._pieces: list[dict[str, M | str]] = pieces

    def pieces(self, layer: str) -> list[M]:
        """A layer's moments of each piece."""
        return [self._moments(piece[layer]) for piece in self._pieces]

    def _moments(self, kept: M | str) -> M:
        if not isinstance(kept, str):
            return kept
        entry = self._cache.load("moments", kept, self._read)
        if entry is None:
            raise UserError(
                f"cache.dir={self._cache.folder} has lost moments that were just written: was it emptied? Run "
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
        if isinstance(total, Moments) and not total.n:
            raise UserError(
                f"layer {layer} runs for none of the images of a split, though for the first image of all: leave it "
                "out (layer), or give a network that runs the same layers for all images"
            )
        return total

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces[0] if self._pieces else ())

    def __len__(self) -> int:
        return len(self._pieces[0]) if self._pieces else 0


def collect(setup: Setup, machine: Machine, split: str, sums: Sums[M], bar: Bar) -> tuple[SplitMoments[M], Visited]:
    """Sum up the selected layers over a split; only what no earlier job left in the cache is computed.

    Moments are kept of the whole split, or of its chunks where the bootstrap will draw them again.

    Raises:
        UserError: where fewer than two images can be read, or one of them runs a layer that the first image does not.
    """
    whole = setup.splits[split]
    chunks = setup.cfg.bootstrap.chunks
    pieces = whole.chunks(chunks) if setup.cfg.bootstrap.resamples else [whole]
    bar.start(0, unit="images")
    collected, visited = [], Visited()
    for number, piece in enumerate(pieces):
        moments, here = _collect_piece(setup, machine, piece, sums, f"{split}-{number}", bar)
        collected.append(moments)
        visited = visited + here
    if visited.images < 2:
        raise UserError(
            f"only {visited.images} of the {len(whole)} images of the {split} split can be read: "
            "mend the files, or ask for more images (data.limit, data.fit, data.probe, data.validation)"
        )
    return SplitMoments(machine.cache, sums.read, collected), visited


def _collect_piece(
    setup: Setup, machine: Machine, piece: Split, sums: Sums[M], stage: str, bar: Bar
) -> tuple[dict[str, M | str], Visited]:
    """In the first process, moments by layer or where they are in the cache; what all processes visited."""
    cache = machine.cache
    shared: dict[str, Any] = {"version": MOMENTS_VERSION, "model": setup.model_key, "images": piece.fingerprint}
    shared |= machine.rounding
    if setup.cfg.moments.positions < 1:
        shared |= {"positions": setup.cfg.moments.positions, "seed": setup.cfg.seed}
    keys = {layer: key_of(**{**shared, **sums.key}, layer=layer) for layer in setup.layers}
    with cache.lock("moments", key_of(**shared)) if collectives.is_rank_zero() else nullcontext():
        missing, visited = _missing(cache, sums, keys)
        if not missing:
            bar.add_images(len(piece), len(piece))
            return dict(keys), visited
        stream = sums.stream(missing)
        state = machine.unfinished(stage, **{**shared, **sums.key}, layers=missing)
        with refusing_other_layers(setup.model, setup.all_layers, layer_setting(setup.cfg)):
            visited = stream_over(machine, setup.source, stream, piece, state, bar, keep=not cache.writable)
        metadata = {"images": str(visited.images), "unreadable": json.dumps(visited.unreadable)}
        found: dict[str, M | str] = dict(keys)
        for layer in missing:
            # Added up, stored and released one by one: a layer's Gram matrix can have gigabytes.
            tensors = stream.watchers.pop(layer).moments().tensors()
            for name in list(tensors):
                tensors[name] = collectives.reduce(tensors[name])
            if collectives.is_rank_zero():
                moments = sums.read(tensors).to("cpu")
                if not cache.save("moments", keys[layer], moments.tensors(), {**metadata, "layer": layer}):
                    found[layer] = moments
                del moments
            del tensors
        collectives.barrier()  # what is removed next is not needed any more
        if cache.writable:
            state.remove()
        return found, visited


def _missing(cache: Cache, sums: Sums[M], keys: Mapping[str, str]) -> tuple[list[str], Visited]:
    """The layers whose moments are not in the cache, as the first process sees it; and what those there visited."""
    gone = torch.zeros(len(keys), dtype=torch.int64)
    about: dict[str, str] = {}
    if collectives.is_rank_zero():
        for number, key in enumerate(keys.values()):
            entry = cache.load("moments", key, sums.read)
            gone[number] = entry is None
            about = entry[1] if entry is not None else about
    missing = [layer for layer, is_gone in zip(keys, collectives.broadcast(gone).tolist(), strict=True) if is_gone]
    if missing:
        return missing, Visited()
    about = json.loads(collectives.broadcast_text(json.dumps(about) if about else ""))
    return missing, Visited(int(about["images"]), tuple(json.loads(about["unreadable"])))


# --- the stages ---


@dataclass(frozen=True, kw_only=True)
class Statistics(Result):
    """Moments of a split by layer, and what the cache knows them by."""

    moments: SplitMoments[Any]
    uses: Mapping[str, Any]


class ProbeStatistics(Statistics):
    """Of the second half of the training images, which v is fitted on."""


class ValidationStatistics(Statistics):
    """Of the validation images, which ρ is measured on."""


def statistics_uses(setup: Setup, split: str, sums: Sums[Any]) -> dict[str, Any]:
    """What moments of a split depend on, for the tracker."""
    fingerprint = setup.splits[split].fingerprint
    uses = {"model": setup.model_key, "images": fingerprint, "layers": setup.layers, **sums.key}
    return {**uses, "positions": setup.cfg.moments.positions}


@dataclass(frozen=True)
class CollectProbe(Stage[ProbeStatistics]):
    """Sum up what the closed form needs of the probe split."""

    setup: Setup
    machine: Machine
    name = "fit_probe"
    title = "fit v on the second half"
    split = "probe"
    result: ClassVar[type[Statistics]] = ProbeStatistics

    def run(self, done: Done, bar: Bar) -> Any:
        # Under the criterion positive, the samples of one neuron are not those of the next.
        all_neurons = self.setup.cfg.criterion in CLOSED_FORM
        sums: Sums[Any] = all_samples(self.setup, gram=True) if all_neurons else active_samples(self.setup)
        moments, visited = collect(self.setup, self.machine, self.split, sums, bar)
        uses = statistics_uses(self.setup, self.split, sums)
        return self.result(moments=moments, visited=visited, uses=uses)

    def write(self, result: Statistics, run_folder: RunFolder) -> None:
        run_folder.uses("moments", f"{self.setup.model_name}-{self.setup.source.name}-{self.split}", result.uses)


class CollectValidation(CollectProbe):
    """Sum up what the closed form needs of the validation split."""

    name = "validation_moments"
    title = "moments of the validation images"
    split = "validation"
    result = ValidationStatistics
