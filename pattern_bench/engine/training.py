"""The Lightning module that trains models which come without weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pattern_bench.core.memory import is_out_of_memory
from pattern_bench.core.outputs import heads
from pattern_bench.core.predictions import has_independent_outputs
from pattern_bench.data.splits import Batch, GlobalBatches
from pattern_bench.engine.descent import Descending
from pattern_bench.errors import UserError
from pattern_bench.models.base import Training

AUXILIARY = 0.3
"""What the loss of an auxiliary head counts for (Szegedy et al. 2015, section 5)."""


class Learner(Descending):
    """Trains a model on class labels (cross-entropy; binary for a single logit) or real targets (squared error).

    The losses of auxiliary heads, which some networks have in training, are added with the weight ``AUXILIARY``.

    What is drawn in a step, by dropout, is a function of the batches' seed and the step, so that training that is taken
    up again goes on as it would have.

    Raises:
        UserError: where the loss is NaN or infinite; where memory is too small for a batch and the model has batch
            norm, which would take other statistics from its parts.
    """

    setting = "model.training.batch_size"
    remedy = "choose a smaller model"

    def __init__(self, model: nn.Module, training: Training, regression: bool, batches: GlobalBatches) -> None:
        super().__init__(batches)
        self.model, self.settings, self.regression, self.seed = model, training, regression, batches.seed

    def training_step(self, batch: Batch, batch_index: int) -> Tensor | None:
        if batch.images is None or (len(batch.images) == 1 and self.batch_norms()):  # one image has no variance
            return None
        images, targets = batch.images, batch.targets
        # Not once an epoch: Lightning draws too, between an epoch's start and its first batch, but for the first epoch.
        torch.manual_seed(((self.seed << 32) + self.global_step) % 2**63)

        def loss(part: slice) -> Tensor:
            own, *auxiliary = heads(self._outputs(images[part]))
            value = self._loss(own, targets[part])
            for other in auxiliary:
                value = value + AUXILIARY * self._loss(other, targets[part])
            return value * (len(images[part]) / len(images))

        total = self.descend(len(images), loss)
        if not total.isfinite():
            raise UserError(
                f"model.training.learning_rate={self.settings.learning_rate}: the loss is NaN or infinite in epoch "
                f"{self.current_epoch}: give a smaller one, or mend the images"
            )
        return total

    def _outputs(self, images: Tensor) -> Any:
        try:
            return self.model(images)
        except RuntimeError as error:  # auxiliary heads need larger images than the rest
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"model.training: {type(self.model).__name__} cannot be trained on images of shape "
                f"{tuple(images.shape[1:])} ({str(error).splitlines()[0]}): give larger images, leave auxiliary heads "
                "out, or give weights"
            ) from error

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over images of one head's loss."""
        if self.regression:
            return F.mse_loss(outputs.squeeze(1), targets)
        if not has_independent_outputs(self.model, outputs):
            return F.cross_entropy(outputs, targets)
        classes = targets[:, None] if outputs.shape[1] == 1 else F.one_hot(targets, outputs.shape[1])
        return F.binary_cross_entropy_with_logits(outputs, classes.to(outputs))

    def batch_norms(self) -> list[str]:
        """Names of the layers that take statistics of a batch."""
        return [name for name, module in self.model.named_modules() if isinstance(module, _BatchNorm)]

    def halve(self, images: int) -> None:
        if norms := self.batch_norms():
            raise UserError(
                f"{self.setting}={self.settings.batch_size}: out of memory with {images} images at once, and batch "
                f"norm ({norms[0]}) would take other statistics from parts of a batch: give a smaller one, or use a "
                "device with more memory (trainer=cpu)"
            )
        super().halve(images)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.settings.learning_rate)
        steps = self.settings.epochs * len(self.batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.settings.learning_rate, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
