"""An installed wheel brings its configuration with it and runs from any folder."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers.paths import ROOT


def run(*command, cwd=None, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder, ROOT)
    return next(folder.glob("*.whl"))


def check(python, tmp_path, cache_dir):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(python, "-c", "import pattern_bench; print(pattern_bench.__file__)", cwd=elsewhere).stdout
    assert str(tmp_path) in where
    run(python, "-m", "pattern_bench", "estimator=a_plus_minus", cwd=elsewhere, PATTERN_BENCH_CACHE=str(cache_dir))
    (folder,) = (elsewhere / "runs").glob("*/*")
    assert (folder / "summary.json").is_file()
    run(python, "-m", "pattern_bench.report", "runs", cwd=elsewhere)
    assert "</html>" in (elsewhere / "report" / "index.html").read_text()


@pytest.mark.slow
def test_the_wheel_runs_the_default_job(wheel, tmp_path, cache_dir):
    """In an environment that borrows this one's dependencies, but not this checkout."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    (Path(site) / "zz_borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    check(python, tmp_path, cache_dir)


@pytest.mark.very_slow
def test_the_wheel_runs_in_an_empty_environment(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", wheel)
    check(python, tmp_path, tmp_path / "cache")
