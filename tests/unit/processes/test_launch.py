"""How many processes a node gets."""

import pytest

from pattern_bench.errors import UserError
from pattern_bench.processes.launch import processes_per_node


def test_devices_are_counted_as_lightning_counts_them():
    assert processes_per_node({"accelerator": "gpu", "devices": [0, 2, 3]}) == 3
    assert processes_per_node({"accelerator": "cpu", "devices": "auto"}) == 1
    with pytest.raises(UserError, match=r"trainer.devices=True"):
        processes_per_node({"devices": True})
