"""What is measured of the stages of a job."""

import json
import sys

import numpy as np
import pytest

from pattern_bench.engine.progress import StageProgress

SMALL = ["data.limit=300", "model.training.epochs=2", "degradation.images=6", "explanation.images=2"]


def test_what_the_cache_had_counts_for_no_speed(configure, tmp_path):
    from pattern_bench.pipeline.job import run

    cache = f"cache.dir={tmp_path / 'cache'}"
    rates = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(configure(*SMALL, cache, "layer=features.0"), tmp_path / name)
        rates.append(json.loads((tmp_path / name / "summary.json").read_text())["images_per_second"])
    assert {"fit_patterns", "accuracy"} <= rates[0].keys()
    assert "fit_patterns" not in rates[1]
    assert "accuracy" in rates[1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a process's peak")
def test_a_stages_peak_is_its_own():
    stages = StageProgress(quiet=True)
    with stages.run("large", ""):
        np.ones(300 << 17)  # 300 MiB
    with stages.run("small", ""):
        pass
    assert stages.peak_memory_mib["large"] > stages.peak_memory_mib["small"] + 250
