"""What Lightning modules that learn have in common: a step for each batch, in parts where memory is small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from pattern_bench.data.splits import GlobalBatches
from pattern_bench.engine.micro_batches import MicroBatches


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None or other is None else one + other


class _WithGradients(torch.autograd.Function):
    """A loss () whose gradients are known: on the way back, each parameter is given its own."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return None, None, *(None if g is None else g * grad_outputs[0] for g in ctx.gradients)


class Descending(MicroBatches, pl.LightningModule):
    """Takes a step for each batch. Its gradient is taken at once: where the device's memory is too small for a batch,
    the gradients of its parts are added up.

    Args:
        batches: that the loader will take, in rounds.
    """

    def __init__(self, batches: GlobalBatches) -> None:
        super().__init__()
        self.batches = batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning says which round it is when the loader's processes have asked for its first batches.
        self.batches.set_epoch(checkpoint["epoch"] + 1)

    def descend(self, images: int, loss: Callable[[slice], Tensor]) -> Tensor:
        """The loss of a batch of so many images, (), with its gradients.

        Args:
            images: in the batch.
            loss: of a part of it, (); those of all parts add up to the batch's.

        Raises:
            UserError: where memory is too small for a single image.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        total: Tensor | None = None
        gradients: list[Tensor | None] = [None] * len(parameters)

        def take(part: slice) -> None:
            nonlocal total, gradients
            value = loss(part)
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            sums = [_sum(sofar, more) for sofar, more in zip(gradients, found, strict=True)]
            total, gradients = _sum(total, value.detach()), sums

        self.in_parts(images, take)
        return _WithGradients.apply(total, gradients, *parameters)
