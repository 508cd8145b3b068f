"""The experiments on cost and loading: what they time and write, at a small size; and the sanity checks' tables."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.paths import ROOT
from PIL import Image
from torch import nn

from experiments.benchmark import tables as benchmark_tables
from experiments.benchmark.moments import RHO, sampling_error
from experiments.benchmark.rows import EVERYTHING, FORWARD, PATTERNS, rows
from experiments.benchmark.subjects import MOBILENET, SQUEEZENET, VGG16, small_vgg
from experiments.benchmark.timing import measure
from experiments.loading import tables as loading_tables
from experiments.loading.images import folder_source, shard_source, split_of, write_folder, write_shards
from experiments.loading.memory import epoch
from experiments.loading.rates import decoders, rate
from experiments.sanity import __main__ as sanity


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


# --- benchmark ---


def test_every_row_is_timed_beside_the_forward_pass_and_has_a_floor():
    torch.manual_seed(0)
    x = torch.rand(4, 1, 8, 8)
    model = small_vgg(x[0]).eval().requires_grad_(False)
    table = measure(rows(model, x), False, 2, 1e12, 1e12).set_index("what")
    assert table.ratio[FORWARD] == 1
    assert (table.seconds > 0).all()
    assert (table.floor_seconds > 0).all()
    assert set(table.floor_is) <= {"operations", "bytes"}
    # Small patches: each cross-moment of both regimes, and u once more.
    assert table.gflop[PATTERNS] > 3 * table.gflop[FORWARD]
    assert table.gflop[EVERYTHING] > table.gflop[PATTERNS] - 1e-9
    assert {"patterns, unfolding", "PatternAttribution", "a degraded image"} <= set(table.index)


def test_patterns_from_sampled_positions_are_near_those_from_all():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval().requires_grad_(False)
    errors = sampling_error(network, torch.rand(4, 1, 32, 32))
    assert errors.layer.tolist() == ["0", "2"]
    assert errors.positions.tolist() == [30**2, 28**2]
    assert errors.a_median.between(1e-6, 0.5).all()


def test_the_benchmarks_tables_have_ratios_with_their_ranges():
    timed = {FORWARD: (0.5, 1, 1, 1), "forward, channels last": (0.4, 0.8, 0.75, 0.85), PATTERNS: (2, 4, 3.96, 12.04),
             EVERYTHING: (2.5, 5, 4, 6), "PatternAttribution": (1, 2, 1.9, 2.1)}  # fmt: skip
    table = pd.DataFrame(
        {"what": what, "network": network, "batch": batch, "of_floor": 1.5}
        | dict(zip(("seconds", "ratio", "least", "most"), values, strict=True))
        for network in (VGG16, SQUEEZENET, MOBILENET)
        for batch in (4, 8)
        for what, values in timed.items()
    )
    lines = benchmark_tables.of_vgg16(table).splitlines()
    assert cells(lines[0])[1:] == ["batch 8: × forward (range)", "seconds", "× floor", "batch 4: × forward (range)"]
    assert cells(lines[2]) == [FORWARD, "1", "0.500", "1.5", "1"]
    assert cells(lines[4]) == [PATTERNS, "4.0 (4.0 to 12.0)", "2.00", "1.5", "4.0 (4.0 to 12.0)"]
    networks = benchmark_tables.by_network(table).splitlines()
    assert cells(networks[2]) == ["forward, seconds", "0.500", "0.500", "0.500"]
    assert cells(networks[3])[1] == "0.80 (0.75 to 0.85)"
    rho = pd.DataFrame([{"what": RHO, "seconds": 8.21, "of_floor": 1.71}])
    assert "8.2 s,\n1.7 times the floor" in benchmark_tables.of_rho(rho)
    errors = pd.DataFrame({"positions": [50176] * 13, "a_median": 0.0081, "a_plus_minus_median": 0.0142})
    shown = benchmark_tables.of_positions(errors).splitlines()
    assert cells(shown[2]) == ["conv1_1", "50,176", "0.8%", "1.4%"]
    assert cells(shown[-1])[0] == "conv5_3"


# --- loading ---


@pytest.fixture
def files(tmp_path):
    """A folder with 6 photographs, and the content of their files."""
    rng = np.random.default_rng(0)
    (tmp_path / "photographs").mkdir()
    for i in range(6):
        pixels = rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((400, 300)).save(tmp_path / "photographs" / f"{i}.jpg")
    return [path.read_bytes() for path in sorted((tmp_path / "photographs").iterdir())]


def test_the_same_images_are_loaded_from_a_folder_and_from_shards(files, tmp_path):
    made = (
        folder_source(write_folder(files, tmp_path / "folder")),
        shard_source(write_shards(files, tmp_path / "shards", len(files), 2)),
    )
    batches = []
    for source in made:
        split = split_of(source, 224)
        (batch,) = split.loader(split.share(32), 32, 0)
        batches.append(batch.images.flatten(1).sum(1).sort().values)
        assert rate(split, 0) > 0
    torch.testing.assert_close(*batches, rtol=0, atol=0)


def test_decoders_give_the_networks_input_and_differ_little_from_the_suites(files):
    reference, *others = (way(files[0]) for way in decoders().values())
    assert reference.shape == (3, 224, 224)
    for other in others:
        assert other.shape == reference.shape
        assert float((other - reference).abs().mean()) < 0.2


def test_a_pass_sees_every_image_once_and_its_memory_is_watched(files, tmp_path):
    watched, index_seconds = epoch(tmp_path / "photographs", tmp_path, 1056, 0)
    assert watched.images.tolist() == [1024]
    assert (watched.job > 0).all()
    assert index_seconds > 0


def test_the_loading_tables_show_rows_of_a_pass_and_what_it_grew_by():
    watched = pd.DataFrame(
        {
            "images": range(1000, 41_000, 1000),
            "seconds": np.arange(1, 41.0),
            "job": 970.0,
            "worker 0": np.arange(20, 60),
        }
    )
    text = loading_tables.of_pass(watched, 40_000, 6.0)
    lines = text.splitlines()
    assert cells(lines[0]) == ["images", "seconds", "job", "worker 0"]
    assert cells(lines[2]) == ["1,000", "1", "970", "20"]
    assert len([line for line in lines if line.startswith("|")]) == 2 + 11
    said = " ".join(text.split())
    assert "40,000 JPEGs (6 s for the index of their shards, once), 1 worker." in said
    assert "970 and 970 (job), 40 and 50 (worker 0). 1000 images per second; *extrapolated*, 1,281,167" in said
    assert "would take 21 minutes" in said
    index = loading_tables.of_index({"arrays": (108.2, 1.1), "lists": (328.0, 275.0)})
    assert cells(index.splitlines()[2]) == ["arrays (the suite)", "108", "1"]


def test_the_loaders_table_is_by_kind_source_and_workers():
    rates = pd.DataFrame(
        [(kind, 61_000, source, workers, 100 * (workers + 1) + step)
         for kind in ("short side 256", "short side 375") for source in ("folder", "shards") for workers in (0, 1, 2)
         for step in (0, 10, 20)],
        columns=["kind", "bytes", "source", "workers", "rate"],
    )  # fmt: skip
    lines = loading_tables.of_loader(rates).splitlines()
    assert cells(lines[0]) == ["images", "from", "0 workers", "1 worker", "2 workers"]
    assert cells(lines[2]) == ["short side 256, 61 KB", "folder", "110 (100 to 120)", "210 (200 to 220)",
                               "310 (300 to 320)"]  # fmt: skip
    said = " ".join("\n".join(lines).split())
    assert "Median (range) of 3." in said
    assert "(210/s at short side 375), would load 3,360 images per second and pass over ImageNet in 6 minutes" in said
    ways = pd.DataFrame({"way": "a", "kind": "short side 256", "rate": [90.0, 100, 120], "apart": [0, 1.2, 1.4]})
    assert cells(loading_tables.of_decoders(ways).splitlines()[2]) == ["a", "100 (90 to 120), 1"]


# --- sanity ---


def made_checks():
    """Rows of sanity.csv: two methods, two layers."""
    rows = [
        {"method": method, "check": "randomisation", "layer_index": index, "measure": measure, "mean": mean, "std": 0.1,
         "n": 10 - index}
        for method, mean in (("pattern_net", 0.9), ("gradient", 0.3))
        for index in (0, 1)
        for measure in (sanity.ABSOLUTE, sanity.SIGNED, "ssim")
    ]  # fmt: skip
    rows += [
        {"method": method, "check": "convergence", "layer_index": index, "measure": sanity.COSINE, "mean": mean / 2,
         "std": float("nan"), "n": 10}
        for method, mean in (("pattern_net", 0.9), ("gradient", 0.3))
        for index in (0, 1, 2)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_sanity_tables_have_the_ends_of_both_checks_with_spread_and_images():
    lines = sanity.randomisation(made_checks()).splitlines()
    assert cells(lines[0]) == ["method", "absolute, last layer random", "absolute, all layers random",
                               "signed, last layer random", "signed, all layers random", "images"]  # fmt: skip
    assert cells(lines[3]) == ["gradient", *["0.30 ± 0.10"] * 4, "9 to 10"]
    assert cells(lines[2])[0] == "PatternNet"
    lines = sanity.convergence(made_checks()).splitlines()
    assert cells(lines[2]) == ["PatternNet", "0.45", "0.45", "10"]


@pytest.mark.slow
def test_the_sanity_checks_of_the_digits_write_their_part_of_the_page(cache_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PATTERN_BENCH_CACHE", str(cache_dir))
    monkeypatch.setattr(sanity, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["experiment", "--runs", str(tmp_path / "runs")])
    page = (ROOT / "experiments" / "sanity" / "README.md").read_text()
    (tmp_path / "README.md").write_text(page)
    sanity.main()
    assert set(pd.read_csv(tmp_path / "sanity.csv").model) == {"small_vgg"}
    assert {"digits-randomisation.png", "digits-convergence.png"} <= {path.name for path in tmp_path.iterdir()}
    mark = "<!-- digits-randomisation -->"
    assert (tmp_path / "README.md").read_text().partition(mark)[0] == page.partition(mark)[0]
