"""The experiment runs as its page says, at a small size."""

import pandas as pd
import pytest
from helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "experiments").is_dir(), reason="experiments are not part of the source distribution")
def test_the_quick_run_scores_every_method(command, tmp_path):
    page = (ROOT / "experiments/ground_truth/README.md").read_text()
    done = command("--quick", "--workers", 1, "--runs", tmp_path / "all", module="experiments.ground_truth", cwd=ROOT)
    tmp_path = tmp_path / "all" / "quick"
    assert done.returncode == 0, done.stderr
    scores = pd.read_csv(tmp_path / "scores.csv", keep_default_na=False, na_values=[""])
    assert len(scores) == 3 * 21
    assert set(scores.seeds) == {2}
    best = scores.set_index(["model", "estimator", "method"]).precision
    assert best["linear", "a", "pattern_net"] > 0.9 > 0.4 > best["linear", "none", "random_map"]
    assert scores.rho_first.notna().sum() == 3 * 8
    assert scores.rectified_first.notna().sum() == 3 * 8
    assert not scores.rectified_first.dropna().equals(scores.rho_first.dropna())
    correlations = pd.read_csv(tmp_path / "correlations.csv")
    assert correlations.correlation.abs().max() <= 1
    for figure in ("predicts.png", "sweep.png"):
        assert (tmp_path / figure).stat().st_size > 10_000
    assert (ROOT / "experiments/ground_truth/README.md").read_text() == page
