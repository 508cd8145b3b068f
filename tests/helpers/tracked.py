"""A tracker that is told something of everything."""

import pandas as pd
from PIL import Image

from pattern_bench.tracking.start import track

SETTINGS = {"kind": "wandb", "project": "p", "entity": "e", "group": None}
TITLE = {"title": "a/b/c", "model": "a"}


def begin(folder):
    return track(SETTINGS, folder, "abcd1234", "job", TITLE, {"seed": 1})


def log_everything(tracker, folder):
    tracker.uses("data", "d", {"splits": 1})
    (folder / "patterns.safetensors").write_bytes(b"patterns")
    tracker.uses("patterns", "d", {"model": 2}, folder / "patterns.safetensors")
    tracker.metrics({"rho/mean": 0.5})
    for step in range(3):
        tracker.curve("degradation", step, {"method": 0.5 / (1 + step)})
    tracker.table("rho", pd.DataFrame({"rho": [1.0, 2.0]}))
    Image.new("RGB", (3, 3)).save(folder / "rho.png")
    tracker.image("figures/rho", folder / "rho.png", "a caption")
    tracker.results("r", {"rho.png": folder / "rho.png"}, {"run_id": 3})
    tracker.finish(succeeded=True)
