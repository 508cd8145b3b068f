"""How many images and positions patterns and ρ need, and what they cost: ``python -m experiments.scaling``.

Writes the CSV files, error.png, cost.png and the tables of README.md beside itself; with ``--quick`` a small network on
handwritten digits is measured instead, and everything but the tables is written below ``--runs``.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision import models

import pattern_bench as pb
from experiments import jobs
from experiments.pages import write_block
from experiments.scaling import cost, errors, figures, projection, tables
from experiments.scaling.errors import CHUNK, collected, total, without_gram
from pattern_bench.core.collector import LEAST_POSITIONS
from pattern_bench.data.folder import FolderPool
from pattern_bench.models.small import VGG
from pattern_bench.models.vision import TorchvisionModel
from pattern_bench.results.schema import write_csv

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plan:
    """How much is measured. Chunks are of ``CHUNK`` images."""

    fit: int  # chunks that patterns of ρ are fitted on
    probe: int  # chunks that v is fitted on
    test: int  # chunks that ρ is measured on
    counts: tuple[int, ...]  # images
    draws: int  # of the images that patterns are fitted on
    rho_draws: int
    sampled: int  # chunks that positions are sampled from, of fit and of probe each
    timed: tuple[int, ...]  # images
    layers: tuple[int, ...]
    widths: tuple[int, ...]
    repeats: int
    tabled: tuple[int, ...]  # images in the table of layers

    @property
    def chunks(self) -> int:
        return self.fit + self.probe + self.test


FULL = Plan(
    fit=40, probe=40, test=20, counts=(10, 20, 50, 100, 200, 400, 500), draws=5, rho_draws=3, sampled=10,
    timed=(10, 40, 100, 400), layers=(1, 2, 4, 7, 10, 13), widths=(64, 128, 256, 512, 1024), repeats=3,
    tabled=(10, 100),
)  # fmt: skip
QUICK = Plan(
    fit=4, probe=4, test=2, counts=(10, 20, 50), draws=2, rho_draws=1, sampled=2, timed=(10, 20), layers=(1, 2),
    widths=(4, 8), repeats=1, tabled=(10, 20),
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is measured: a network and chunks of its images, by number; a chain of layers; more networks for rates."""

    network: nn.Module
    chunk: Callable[[int], Tensor]
    chain: nn.Sequential
    others: dict[str, nn.Module]


def photographs(options: argparse.Namespace) -> Subject:
    """SqueezeNet 1.1 on photographs, in an order that a seed draws; VGG-16's and two ResNets' layers for the cost."""
    source = _torchvision("squeezenet1_1", options.squeezenet, None)
    network = source.build(torch.zeros(3, 224, 224), None).eval().requires_grad_(False)
    pool, transform = FolderPool(str(options.photographs), "--photographs"), source.transform()
    if transform is None or len(pool.ids) < FULL.chunks * CHUNK:
        raise SystemExit(f"--photographs holds {len(pool.ids)} images: give at least {FULL.chunks * CHUNK}")
    order = torch.randperm(len(pool.ids), generator=torch.Generator().manual_seed(0)).tolist()

    def chunk(number: int) -> Tensor:
        return torch.stack([transform(pool.image(i)) for i in order[number * CHUNK : (number + 1) * CHUNK]])

    file = options.vgg16
    layers: Any = _torchvision("vgg16", file, "features").build(torch.zeros(3, 224, 224), None)
    chain = layers.features.eval().requires_grad_(False)
    torch.manual_seed(0)
    others = {
        name: models.get_model(name, weights=None).eval().requires_grad_(False) for name in ("resnet18", "resnet50")
    }
    return Subject(network, chunk, chain, {"squeezenet1_1": network, "vgg16 conv layers": chain, **others})


def _torchvision(architecture: str, file: Path | None, part: str | None) -> TorchvisionModel:
    weights = None if file is None else str(file)
    return TorchvisionModel(name=architecture, architecture=architecture, weights=weights, part=part, training=None)


def digits() -> Subject:
    """A small random VGG on handwritten digits."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    torch.manual_seed(0)
    source = VGG(
        name="small", weights=None, training=None, width=8, blocks=[1, 1], dense=[], batch_norm=False, dropout=0.0
    )
    network: Any = source.module(images[0], 10).eval().requires_grad_(False)
    return Subject(network, lambda i: images[i * CHUNK : (i + 1) * CHUNK], network.features, {"small": network})


def main() -> None:
    parser = jobs.arguments(__doc__, [jobs.SQUEEZENET, jobs.VGG16])
    parser.add_argument("--quick", action="store_true", help="a small network on digits, written below --runs instead")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    if not options.quick and not jobs.given([jobs.SQUEEZENET], options):
        raise SystemExit("give these, or --quick")
    subject = digits() if options.quick else photographs(options)
    place = jobs.folder(options.runs / "scaling") if options.quick else HERE

    start = time.perf_counter()
    found = costs(subject, plan)
    keep(found, place)
    found |= images_needed(subject, plan)
    found["gpus"], found["about_gpus"] = projection.projection(found["networks"], found["machine"].storing[0])
    found["machine"]["run_seconds"] = time.perf_counter() - start
    keep(found, place)
    names = found["about"].layer.tolist()
    figures.draw_errors(
        found["patterns"], found["rho"], found["positions"], found["rho_positions"], names, place / "error.png"
    )
    figures.draw_cost(found["cost_images"], found["cost_layers"], found["cost_width"], found["cost_positions"],
                      found["gpus"], place / "cost.png")  # fmt: skip
    for name, text in texts(found, plan).items():
        if options.quick:
            print(f"{name}\n{text}\n")
        else:
            write_block(HERE / "README.md", name, text)


def keep(found: dict[str, pd.DataFrame], place: Path) -> None:
    for name, table in found.items():
        write_csv(place / f"{name}.csv", table, "%.5g")


def said(name: str, table: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """The same, and a word on the terminal: the whole takes minutes."""
    print(f"{name}: {len(table)} rows", flush=True)
    return name, table


def costs(subject: Subject, plan: Plan) -> dict[str, pd.DataFrame]:
    """What is timed; first, while the process holds little."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")  # not on Windows
    start = time.perf_counter()
    batches = [subject.chunk(i) for i in range(max(plan.timed) // CHUNK)]
    decoding = max(plan.timed) / (time.perf_counter() - start)
    moments = pb.collect_moments(subject.chain, batches[:1])
    with tempfile.TemporaryDirectory() as folder:
        storing = cost.storing(moments, folder)
    machine = f"{torch.get_num_threads()} threads of {platform.machine()}, PyTorch {torch.__version__}"
    return dict([
        said("cost_images", cost.by_images(subject.network, batches, plan.timed, plan.repeats)),
        said("cost_layers", cost.by_layers(subject.chain, batches[0][:4], plan.layers, plan.repeats)),
        said("cost_width", cost.by_width(plan.widths, 4, plan.repeats)),
        said("cost_positions", cost.by_positions(subject.network, batches[0], (1.0, *errors.SHARES), plan.repeats)),
        said("networks", cost.by_network(subject.others, batches[0][:8], plan.repeats)),
        ("machine", pd.DataFrame([{"machine": machine, "load": load, "decoding": decoding, "storing": storing}])),
    ])  # fmt: skip


def images_needed(subject: Subject, plan: Plan) -> dict[str, pd.DataFrame]:
    """Errors of patterns and ρ over images and positions, by layer."""
    network = subject.network

    def chunks(numbers: Sequence[int], gram: bool) -> Iterator[Any]:
        for number in numbers:
            yield from collected(network, [subject.chunk(number)], gram=gram)

    fit = list(chunks(range(plan.fit), gram=False))
    rest = list(chunks(range(plan.fit, plan.chunks), gram=True))
    probe, test = rest[: plan.probe], total(rest[plan.probe :])
    positions, rho_positions = errors.position_errors(
        network,
        [subject.chunk(i) for i in range(plan.sampled)],
        [subject.chunk(plan.fit + i) for i in range(plan.sampled)],
        (total(fit[: plan.sampled]), total(probe[: plan.sampled])),
        test,
    )
    every = [*fit, *map(without_gram, rest)]
    names = list(every[0])
    about = pd.DataFrame(
        {"layer": name, "d": sums.x.shape[1], "neurons": len(sums.g), "positions": int(sums.n) // CHUNK}
        for name, sums in every[0].items()
    ).assign(layer_index=range(len(names)))
    return dict([
        said("positions", positions),
        ("rho_positions", rho_positions),
        ("about", about),
        said("patterns", errors.pattern_errors(network, every, plan.counts, plan.draws)),
        said("rho", errors.rho_errors(network, fit, probe, test, plan.counts, plan.rho_draws)),
    ])  # fmt: skip


def texts(found: dict[str, pd.DataFrame], plan: Plan) -> dict[str, str]:
    """The page's tables, by the name of their place."""
    machine, about = found["machine"].iloc[0], found["about"]
    sampled = about[about.positions > LEAST_POSITIONS].layer.tolist()
    solves = dict(zip(found["about_gpus"].network, found["about_gpus"].solve_tflop, strict=True))
    return {
        "machine": f"Measured on {machine.machine}, in {machine.run_seconds / 60:.0f} minutes, with a load average of "
        f"{machine.load:.1f} at the start (what is above 0 is others' work: take ranges seriously). Decoding: "
        f"{machine.decoding:.0f} images per second in one process. Moments to the cache and back: "
        f"{machine.storing / 1e9:.2f} GB/s.",
        "images": tables.by_images(found["patterns"], found["rho"]),
        "law": tables.law(found["patterns"]),
        "layers": tables.by_layer(found["patterns"], found["rho"], about, plan.tabled),
        "positions": tables.by_share(found["positions"], found["rho_positions"], found["cost_positions"], sampled),
        "growth": tables.growth(found["cost_images"], found["cost_width"]),
        "networks": tables.networks(found["networks"]),
        "projection": tables.on_gpus(found["gpus"], found["about_gpus"], machine.decoding),
        "processor": tables.on_this_machine(found["networks"], solves, found["cost_width"]),
    }


if __name__ == "__main__":
    main()
