"""Files that vanish or are spoilt during a run, and clocks that jump."""

import itertools
import json
import pkgutil
import re
import shutil
import time

import pandas as pd
import pytest
from helpers.small_jobs import SMALL, summary_of, tables_of

from pattern_bench.configuration.build import build
from pattern_bench.data.splits import make_splits
from pattern_bench.errors import UserError


@pytest.fixture
def folder_job(photographs, configure, run_job, tmp_path):
    """A job on 40 photographs, and their names by split."""
    root = photographs(tmp_path / "photographs", count=40)
    job = [
        "data=folder", f"data.root={root}", "data.size=16", "model=small_vgg", "model.width=2", "data.batch_size=8",
        "model.training.epochs=1", "model.training.batch_size=8", "estimator=a", "explanation.images=3",
        "degradation.images=null", f"cache.dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    setup = make_splits(build(configure(*job).data), 0)
    names = {name: [split.name(position) for position in range(len(split))] for name, split in setup.items()}
    return job, root, names


def before(monkeypatch, place, act, wanted=lambda *_: True):
    """Lets ``act`` happen before the first call of ``place`` whose arguments are ``wanted``."""
    function, done = pkgutil.resolve_name(place), []

    def first(*arguments, **settings):
        if not done and wanted(*arguments):
            done.append(act())
        return function(*arguments, **settings)

    monkeypatch.setattr(place, first)


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_vanish_or_are_spoilt_during_a_run_are_left_out_and_named(
    folder_job, run_job, monkeypatch, workers, capsys
):
    job, root, names = folder_job
    gone = [names["fit"][0], names["fit"][5], names["probe"][-1]]
    spoilt = [names["probe"][2], names["validation"][1]]
    later = names["validation"][2:5]

    def spoil():
        for name in gone:
            (root / name).unlink()
        for name in spoilt:
            (root / name).write_bytes(b"\xff\xd8\xff no JPEG after all")

    before(monkeypatch, "pattern_bench.pipeline.job.run_prepared", spoil)
    before(
        monkeypatch, "pattern_bench.pipeline.moments.collect", lambda: [(root / name).unlink() for name in later],
        lambda setup, machine, split, *_: split == "validation",
    )  # fmt: skip
    folder = run_job(*job, f"data.workers={workers}")
    expected = sorted(gone + spoilt + later)
    assert summary_of(folder)["unreadable"] == expected
    splits = pd.read_csv(folder / "splits.csv")
    assert sorted(splits.name[~splits.used]) == expected
    rho, degradation = tables_of(folder)
    assert rho.rho.isna().equals(rho.dead)
    assert set(degradation.n) == {8 - 4}
    said = capsys.readouterr().err
    assert re.findall(r"(\d+ images?) cannot be read and", said) == ["1 image", "2 images", "2 images", "3 images"]
    assert "Traceback" not in said


def test_files_that_only_the_networks_answers_need_are_named_too(folder_job, run_job):
    """An estimator without patterns visits the validation images alone."""
    job, root, names = folder_job
    spoilt = [names["validation"][1], names["validation"][6]]
    for name in spoilt:
        (root / name).write_bytes(b"no image")
    folder = run_job(*job, "estimator=x")
    assert summary_of(folder)["unreadable"] == sorted(spoilt)
    assert json.loads((folder / "accuracy.json").read_text())["images"] == 8 - 2
    splits = pd.read_csv(folder / "splits.csv")
    assert sorted(splits.name[~splits.used]) == sorted(spoilt)


def test_no_accuracy_is_told_of_no_readable_image(folder_job, run_job, tmp_path):
    job, root, names = folder_job
    for name in names["validation"]:
        (root / name).write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the first validation images can be read"):
        run_job(*job, "estimator=x")
    accuracy = json.loads((tmp_path / "run0" / "accuracy.json").read_text())
    assert accuracy["skipped"] == "none of the 8 validation images can be read"
    assert "top1" not in accuracy


@pytest.mark.parametrize(
    ("probe", "place", "expected"),
    [
        ("closed_form", "pattern_bench.pipeline.setup._sample", "none of the 16 images of the fit split can be read"),
        (
            "closed_form",
            "pattern_bench.pipeline.patterns.collect",
            "only 0 of the 16 images of the fit split can be read",
        ),
        ("sgd", "pattern_bench.pipeline.descent.descend", "none of the 16 images of the probe split can be read: mend"),
    ],
)
def test_files_that_all_vanish_are_one_error(folder_job, run_job, monkeypatch, probe, place, expected):
    job, root, _ = folder_job
    before(monkeypatch, place, lambda: shutil.rmtree(root))
    with pytest.raises(UserError, match=expected):
        run_job(*job, f"probe={probe}", "data.workers=0")


def test_a_clock_that_jumps_changes_nothing(trained, run_job, own_cache, monkeypatch):
    """By a year, either way, at every look at it."""
    start, jumps = time.time(), itertools.cycle([0, 3e7, -3e7, 5.0, -1e9])
    monkeypatch.setattr(time, "time", lambda: start + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * (start + next(jumps))))
    folder = run_job(*SMALL, own_cache, "checkpoint.seconds=0.01", "logger=csv")
    for name in ("rho.csv", "degradation.csv", "accuracy.json", "splits.csv"):
        assert (folder / name).read_bytes() == (trained[0] / name).read_bytes()
    assert all(0 <= seconds < 600 for seconds in summary_of(folder)["seconds"].values())
