"""What the engine costs, in plain forward passes of the same batch: ``python -m experiments.benchmark --help``.

Everything runs in one process, interleaved, on the same batch: each repeat times every row once, and a row's ratio is
taken repeat by repeat against that repeat's forward pass, so that a machine whose speed drifts does not mislead. Writes
DEVICE.csv, positions.csv and the tables of README.md beside itself.
"""

from __future__ import annotations

import argparse
import platform
import resource
from pathlib import Path

import pandas as pd
import torch

from experiments.benchmark import tables
from experiments.benchmark.moments import sampling_error, solving
from experiments.benchmark.rows import POSITIONS, rows
from experiments.benchmark.subjects import VGG16, networks
from experiments.benchmark.timing import measure, rates
from experiments.pages import write_block
from pattern_bench.core.rounding import float32_products
from pattern_bench.results.schema import write_csv

HERE = Path(__file__).parent


@float32_products()
def main() -> None:
    options = arguments().parse_args()
    matrix, copy = rates(options.device)
    subjects = {
        (name, batch): subject
        for batch in options.batch
        for name, subject in networks(options.weights, options.images, batch, options.device).items()
    }
    measured = []
    for (name, _), (model, x) in subjects.items():
        table = measure(rows(model, x), x.is_cuda, options.repeats, matrix, copy)
        print(f"{name}, batch {len(x)}\n{table.round(3).to_string(index=False)}\n", flush=True)
        measured.append(table.assign(network=name, batch=len(x)))
    measured.append(solving(options.device))
    print(measured[-1].round(2).to_string(index=False))
    errors = sampling_error(*subjects[VGG16, options.batch[-1]])
    print(f"\n{POSITIONS:.0%} of positions, error of a\n{errors.round(3).to_string(index=False)}")

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    said = f"{machine(options.device)}; {matrix / 1e9:.0f} GFLOP/s float32, {copy / 1e9:.1f} GB/s"
    print(f"\n{said}; peak memory {peak:.0f} MiB")
    everything = pd.concat(measured).assign(machine=said)
    write_csv(options.output / f"{options.device}.csv", everything)
    write_csv(options.output / "positions.csv", errors)
    if options.output.resolve() == HERE.resolve():
        write_tables(options.device, everything, errors)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="safetensors with VGG-16's features.*; random otherwise")
    parser.add_argument("--images", help="folder of photographs for VGG-16; Gaussian noise otherwise")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8], help="images; 64 times as many for small_vgg")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that the medians and ranges are over")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what is measured")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the CSV files; the page stays elsewhere")
    return parser


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.system()}"


def write_tables(device: str, measured: pd.DataFrame, errors: pd.DataFrame) -> None:
    """Puts the tables of a device between its marks on the page."""
    page = HERE / "README.md"
    write_block(page, device, f"{tables.of_vgg16(measured)}\n\n{tables.of_rho(measured)}")
    write_block(page, f"{device}, other networks", tables.by_network(measured))
    write_block(page, "positions", tables.of_positions(errors))


if __name__ == "__main__":
    main()
