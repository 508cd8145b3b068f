"""Batches as a loader of the user's own yields them."""

import torch


def loader(seed=0, batches=3, size=12, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, channels, size, size, generator=generator), torch.zeros(8)) for _ in range(batches)]
