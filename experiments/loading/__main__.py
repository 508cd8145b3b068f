"""How images reach the network, how fast and at what cost of memory: ``python -m experiments.loading --help``.

Writes memory.csv and the tables of README.md beside itself. Linux only: memory comes from /proc.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch

from experiments.loading import tables
from experiments.loading.memory import epoch, full_sizes
from experiments.loading.rates import decoder_rates, loader_rates
from experiments.pages import write_block
from pattern_bench.data.folder import FolderPool
from pattern_bench.results.schema import write_csv

HERE = Path(__file__).parent


def main() -> None:
    options = arguments().parse_args()
    torch.set_num_threads(1)
    load, photographs = os.getloadavg()[0], len(FolderPool(str(options.images), "--images").ids)
    sizes = full_sizes()
    print(sizes, flush=True)
    with tempfile.TemporaryDirectory() as work:
        watched, index_seconds = epoch(options.images, Path(work), options.count, options.workers)
    print(watched, flush=True)
    with tempfile.TemporaryDirectory() as work:
        rates = loader_rates(options.images, Path(work), options.repeats)
    print(rates, flush=True)
    ways = decoder_rates(options.images, options.repeats)

    page = options.output / "README.md"
    if options.output.resolve() != HERE.resolve():
        shutil.copyfile(HERE / "README.md", page)
    write_csv(options.output / "memory.csv", watched.round(1))
    write_block(page, "machine", tables.machine(load, photographs))
    write_block(page, "loader", tables.of_loader(rates))
    write_block(page, "decoders", tables.of_decoders(ways))
    write_block(page, "pass", tables.of_pass(watched, options.count, index_seconds))
    write_block(page, "index", tables.of_index(sizes))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG photographs")
    parser.add_argument("--count", type=int, default=50_000, help="images of the pass")
    parser.add_argument("--workers", type=int, default=2, help="its workers")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that the medians and ranges are over")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of README.md and memory.csv")
    return parser


if __name__ == "__main__":
    main()
