"""The state of an unfinished stage is kept at a bounded share of the time."""

import random
import time

import torch

from pattern_bench.storage import stage_state as partial_module
from pattern_bench.storage.stage_state import SHARE, StageState


def test_keeping_takes_its_share_of_the_time_at_most(tmp_path, monkeypatch):
    """With a disk that takes 2 s for every state, over an hour of batches of 1 s; the wall clock jumps."""
    now = [0.0]
    monkeypatch.setattr(partial_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: random.uniform(-1e9, 1e9))

    def slow(*_):
        now[0] += 2.0

    monkeypatch.setattr(partial_module, "write_tensors", slow)
    kept = StageState(tmp_path, "fit", "key", seconds=10)
    state = {"x": torch.zeros(1000)}
    saves, batches = 0, 0
    while now[0] < 3600:
        now[0] += 1.0
        batches += 1
        before = now[0]
        kept.save_now_and_then(lambda: state, batches)
        saves += now[0] > before
    assert 2 * saves <= SHARE * now[0] + 2
    assert saves >= 40


def test_a_large_state_waits_for_its_turn_before_it_was_ever_timed(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(partial_module.time, "monotonic", lambda: now[0])
    kept = StageState(tmp_path, "fit", "key", seconds=1)
    large = {"x": torch.zeros(25_000_000, dtype=torch.float64)}  # 200 MB: a second, it is taken
    now[0] = 30
    kept.save_now_and_then(lambda: large, 1)
    assert kept.load() is None
    now[0] = 40
    kept.save_now_and_then(lambda: large, 2)
    assert kept.load()[1] == 2
