"""A pass that keeps rows of results by image, laid together from all processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pattern_bench.core.estimators import Pattern
from pattern_bench.data.splits import Split
from pattern_bench.engine.explanation_streams import RowStream
from pattern_bench.engine.progress import Bar
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.run_pass import Visited, stream_over
from pattern_bench.pipeline.setup import Setup
from pattern_bench.processes import collectives
from pattern_bench.storage.tensor_files import checksum


def collect_rows(
    setup: Setup,
    machine: Machine,
    stream: RowStream,
    split: Split,
    stage: str,
    patterns: Mapping[str, Pattern],
    bar: Bar,
    batch_size: int | None,
    **depends_on: Any,
) -> tuple[dict[str, Tensor], Visited]:
    """Show the stream a split, and return its rows of all images that can be read, by name; and the images visited.

    Args:
        setup: network and settings.
        machine: where it computes and keeps the unfinished stage.
        stream: makes the rows.
        split: the images.
        stage: names the unfinished state.
        patterns: that the rows depend on.
        bar: moved image by image.
        batch_size: another than the data's.
        depends_on: what else the rows depend on, besides network, images, patterns and seed.
    """
    used = {f"{layer}/{part}": tensor for layer, p in patterns.items() for part, tensor in vars(p).items()}
    state = machine.unfinished(
        stage, model=setup.model_key, images=split.fingerprint, patterns=checksum(used, {}), seed=setup.cfg.seed,
        **depends_on,
    )  # fmt: skip
    bar.start(0, unit="images")
    visited = stream_over(machine, setup.source, stream, split, state, bar, batch_size)
    return _joined(stream), visited


def _joined(stream: RowStream) -> dict[str, Tensor]:
    """The rows of all processes; those of images that none could read are left out."""
    known = collectives.all_reduce(stream.known.to(torch.int32)).bool()
    # A process without images knows neither names nor shapes: it learns them from one that does.
    described = {name: [str(rows.dtype).removeprefix("torch."), list(rows.shape)] for name, rows in stream.rows.items()}
    described = json.loads(collectives.broadcast_text(json.dumps(described) if described else "") or "{}")
    joined = {}
    for name, (kind, shape) in described.items():
        mine = stream.rows.get(name)
        rows = torch.zeros(shape, dtype=getattr(torch, kind)) if mine is None else mine
        joined[name] = collectives.all_reduce(rows)[known]
    return joined
