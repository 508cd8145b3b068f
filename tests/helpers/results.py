"""Comparison of the results of two runs."""

import torch
from safetensors.torch import load_file

RESULTS = ("rho.csv", "degradation.csv", "accuracy.json", "splits.csv")


def same(one, other):
    """Names of the results that differ in a bit. (The header of a safetensors file has no fixed order.)"""
    differ = [name for name in RESULTS if (one / name).read_bytes() != (other / name).read_bytes()]
    ours, theirs = (load_file(folder / "patterns.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return differ + [name for name in ours if not torch.equal(ours[name], theirs[name])]
