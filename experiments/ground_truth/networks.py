"""The networks that are explained, small enough to be trained in seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODELS = ("linear", "mlp", "cnn")
BATCH = 128


def network(model: str, side: int) -> nn.Sequential:
    """A classifier of images (B, 1, side, side) into two classes, with random weights."""
    if model == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(side**2, 2))
    if model == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(side**2, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 2)
        )
    # Larger images are halved until 8×8 positions are left: what a network sees of them is then about the same.
    features: list[nn.Module] = []
    channels = 1
    for _ in range((side // 8).bit_length() - 1):
        features += [nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.ReLU()]
        channels = 8
    features += [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    features += [nn.MaxPool2d(2), nn.Flatten()]
    positions = (-(-side // 2 ** ((side // 8).bit_length() - 1)) // 2) ** 2
    return nn.Sequential(*features, nn.Linear(16 * positions, 32), nn.ReLU(), nn.Linear(32, 2))


def trained(model: str, images: Tensor, labels: Tensor, epochs: int, rate: float, seed: int) -> nn.Sequential:
    """The network after so many passes with Adam and a one-cycle schedule that peaks at ``rate``, in evaluation mode.

    Args:
        model: one of ``MODELS``.
        images: (n, 1, side, side).
        labels: (n,).
        epochs: passes.
        rate: learning rate.
        seed: of the first weights and of the order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = network(model, images.shape[2])
        optimiser = torch.optim.Adam(module.parameters(), rate, weight_decay=1e-4)
        steps = epochs * -(-len(images) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
        for _ in range(epochs):
            for part in torch.randperm(len(images)).split(BATCH):
                optimiser.zero_grad()
                F.cross_entropy(module(images[part]), labels[part]).backward()
                optimiser.step()
                schedule.step()
    return module.eval().requires_grad_(False)
