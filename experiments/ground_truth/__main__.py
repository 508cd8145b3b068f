"""Which explanation is right where the truth is known: ``python -m experiments.ground_truth --help``.

Scores every method, and asks whether ρ and degradation could have told.

Writes by_seed.csv, scores.csv, correlations.csv, predicts.png and sweep.png beside itself, and the tables into
README.md. Settings that are complete below --runs are left alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.ground_truth.figures import draw_predicts, draw_sweep
from experiments.ground_truth.scoring import Setting, keep_score
from experiments.ground_truth.tables import accuracies, by_scenario, correlations, other_scores, predictions, summary
from experiments.jobs import folder
from experiments.pages import write_block
from pattern_bench.results.schema import write_csv

HERE = Path(__file__).parent
SEEDS = range(5)
MAIN = [
    Setting("linear", 8, 0.3, 1.0),
    Setting("multiplicative", 8, 0.9, 1.0),
    Setting("translation", 8, 0.5, 1.0),
    Setting("linear", 64, 0.2, 1.0, epochs=10),
    Setting("multiplicative", 64, 0.9, 1.0, epochs=10),
    Setting("translation", 64, 0.7, 1.0, epochs=10),
]
SWEEP = [Setting("linear", 8, signal, 1.0) for signal in (0.1, 0.15, 0.2, 0.3, 0.5)] + [
    Setting("linear", 8, 0.3, suppressor) for suppressor in (0.0, 0.5, 2.0, 4.0)
]
QUICK = Setting("linear", 8, 0.5, 1.0, train=600, validation=200, epochs=10, explained=4)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/ground_truth"), help="where runs are kept")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each; 1 starts none")
    parser.add_argument("--quick", action="store_true", help="one small setting, written to --runs/quick instead")
    options = parser.parse_args(arguments)
    runs = folder(options.runs / "quick" if options.quick else options.runs)
    main_settings, sweep, seeds, out = (MAIN, SWEEP, SEEDS, HERE)
    if options.quick:
        main_settings, sweep, seeds, out = [QUICK], [QUICK], SEEDS[:2], runs
    raw = collect(list(dict.fromkeys([*main_settings, *sweep])), seeds, runs, options.workers)
    write_csv(out / "by_seed.csv", raw, "%.3g")
    table = summary(raw)
    write_csv(out / "scores.csv", table, "%.4g")
    chosen = of_settings(raw, main_settings)
    found = correlations(chosen)
    write_csv(out / "correlations.csv", found, "%.4g")
    draw_predicts(of_settings(table, main_settings), found, out / "predicts.png")
    draw_sweep(of_settings(table, sweep), out / "sweep.png")
    if not options.quick:
        page = HERE / "README.md"
        write_block(page, "accuracy", accuracies(of_settings(table, main_settings)))
        for score in ("precision", "on_suppressors"):
            write_block(page, score, by_scenario(of_settings(table, main_settings), score))
        write_block(page, "scores", other_scores(chosen))
        write_block(page, "predicts", predictions(found))


def collect(settings: list[Setting], seeds: Sequence[int], runs: Path, workers: int) -> pd.DataFrame:
    """A row for each setting, seed, model, estimator and method (``scoring.score``)."""
    jobs = [(setting, seed, runs / f"{setting.name(seed)}.csv") for setting, seed in product(settings, seeds)]
    left = [job for job in jobs if not job[2].exists()]
    # The largest first, so that no process ends long before the other.
    left.sort(key=lambda job: -job[0].side)
    if left:
        _keep(left, workers)
    return pd.concat([pd.read_csv(file, keep_default_na=False, na_values=[""]) for *_, file in jobs], ignore_index=True)


def _keep(left: list[tuple[Setting, int, Path]], workers: int) -> None:
    with ExitStack() as stack:
        each: Any = map
        if workers > 1:
            processes = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
            each = stack.enter_context(processes).map
        for number, file in enumerate(each(keep_score, *zip(*left, strict=True)), start=1):
            print(f"{number} of {len(left)}: {file.stem}", flush=True)


def of_settings(table: pd.DataFrame, settings: list[Setting]) -> pd.DataFrame:
    """The rows of these settings."""
    columns = ["scenario", "side", "signal", "suppressor"]
    wanted = pd.MultiIndex.from_tuples([tuple(getattr(setting, name) for name in columns) for setting in settings])
    return table[pd.MultiIndex.from_frame(table[columns]).isin(wanted)]


if __name__ == "__main__":
    main()
