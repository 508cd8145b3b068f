"""A real GPU finds what the CPU finds: patterns to 1e-4, ρ and degradation curves to 1e-3."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from helpers.paths import ROOT
from safetensors.torch import load_file
from torch import nn

import pattern_bench as pb

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none here"),
]


def close(found, expected, tolerance):
    """Within ``tolerance`` of the largest value."""
    scale = float(expected.abs().nan_to_num(0).max()) or 1.0
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=0, atol=tolerance * scale, equal_nan=True)


def compare(one, other):
    """Two run folders."""
    patterns, others = (load_file(folder / "patterns.safetensors") for folder in (one, other))
    for name, tensor in patterns.items():
        if tensor.is_floating_point():
            close(others[name], tensor, 1e-4)
    for table, columns in (("rho", ["rho"]), ("degradation", ["probability_mean", "probability_std"])):
        a, b = (pd.read_csv(folder / f"{table}.csv") for folder in (one, other))
        assert len(a) == len(b) > 0
        pd.testing.assert_frame_equal(a[columns], b[columns], rtol=0, atol=1e-3, obj=table)


@pytest.mark.parametrize("settings", [[], ["criterion=positive", "probe.neurons=8"], ["moments.positions=0.5"]])
def test_a_job_on_a_gpu_finds_what_it_finds_on_the_cpu(run_job, settings, cache_dir, tmp_path):
    expected = run_job(*settings)
    # The same network, but moments of its own.
    shutil.copytree(cache_dir / "models", tmp_path / "cache" / "models")
    compare(expected, run_job("trainer=gpu", *settings, f"cache.dir={tmp_path / 'cache'}"))


def test_ddp_with_nccl_finds_what_one_process_on_the_cpu_finds(run_job, command, cache_dir, tmp_path):
    expected, folder = run_job(), tmp_path / "ddp"
    # With the network that the first job left in the cache, but with moments of its own.
    shutil.copytree(cache_dir / "models", tmp_path / "cache" / "models")
    done = command("trainer=ddp", f"hydra.run.dir={folder}", "logger=none", f"cache.dir={tmp_path / 'cache'}")
    assert done.returncode == 0, done.stderr
    compare(expected, folder)


def test_the_api_on_a_gpu_finds_what_it_finds_on_the_cpu():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(384, 10),
    ).eval()  # fmt: skip
    splits = [[torch.randn(32, 3, 32, 32) for _ in range(3)] for _ in range(3)]
    found = {}
    for device in ("cpu", "cuda"):
        net = net.to(device)
        fit, probe, test = (pb.collect_moments(net, split) for split in splits)
        patterns = pb.fit_patterns(net, fit)
        images = splits[2][0].to(device)
        methods = {"attribution": pb.PatternAttribution(net, patterns), "signal": pb.PatternNet(net, patterns)}
        found[device] = (
            {name: pattern.positive for name, pattern in patterns.items()},
            pb.evaluate(net, patterns, probe, test) | pb.evaluate(net, patterns, probe, test, criterion="rectified"),
            pb.degradation(net, images, methods, patch=4, steps=8),
        )
    for expected, values, tolerance in zip(found["cpu"], found["cuda"], (1e-4, 1e-3, 1e-3), strict=True):
        for name, tensor in expected.items():
            assert values[name].is_cuda
            close(values[name], tensor, tolerance)


def test_the_benchmark_runs_on_a_gpu(tmp_path):
    command = [sys.executable, "-m", "experiments.benchmark", "--device", "cuda", "--batch", "2", "--repeats", "1"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "cuda.csv")
    assert (table.seconds > 0).all()
    assert {"forward", "everything that exact rho needs", "PatternAttribution"} <= set(table.what)
