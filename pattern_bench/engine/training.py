"""Lightning modules that learn: the readers v of ρ(S), and models that come without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pattern_bench.core.memory import is_out_of_memory
from pattern_bench.core.network import collecting, first_not_finite
from pattern_bench.core.outputs import heads, independent
from pattern_bench.core.probe_sgd import Reader
from pattern_bench.data.splits import Batch, GlobalBatches
from pattern_bench.engine.micro_batches import Halving
from pattern_bench.engine.streams import Seen, fast_layout, not_finite
from pattern_bench.errors import UserError
from pattern_bench.models.base import Training

AUXILIARY = 0.3
"""What the loss of an auxiliary head counts for (Szegedy et al. 2015, section 5)."""


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


class Descending(Halving, pl.LightningModule):
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


class ReaderDescent(Descending):
    """Fits the readers v of the selected layers together: Adam on their least-squares problems.

    Several processes take their share of each batch; Lightning averages their gradients, which makes that of the batch.

    Args:
        model: canonical network; it is not trained.
        readers: by layer name, calibrated.
        learning_rate: of the first step; it falls to 0 along a cosine over ``steps``.
        steps: at most.
        batches: of the probe split; one that is smaller than the others counts for less.

    Attributes:
        rounds: what is told of each so far.

    Raises:
        UserError: naming layer and batch, where an activation or a loss is NaN or infinite.
    """

    strict_loading = False

    def __init__(
        self, model: nn.Module, readers: Mapping[str, Reader], learning_rate: float, steps: int, batches: GlobalBatches
    ) -> None:
        super().__init__(batches)
        self._model = (model,)  # in a tuple: it belongs in no checkpoint
        self.names = list(readers)
        self.readers = nn.ModuleList(readers.values())
        self.learning_rate, self.steps = learning_rate, steps
        self.seen = Seen()
        self.rounds: list[dict[str, float]] = []

    def calibrate(self, images: Tensor, positions: Tensor) -> None:
        """Shows each reader the first call of its layer, on images (B, ...) at ``positions`` (B,) of the split."""
        watched = {name: _Calibration(reader) for name, reader in zip(self.names, self.readers, strict=True)}  # type: ignore[arg-type]
        if layer := first_not_finite(self._model[0], fast_layout(images)):
            raise not_finite(layer, positions)
        with torch.no_grad(), collecting(self._model[0], watched):
            self._model[0](fast_layout(images))

    def on_fit_start(self) -> None:
        self._model[0].to(self.device)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        if self.current_epoch == 0:
            self.seen.add(batch)
        if batch.images is None:
            # The other processes wait for gradients of every parameter.
            return sum(parameter.sum() for parameter in self.parameters()) * 0.0  # type: ignore[return-value]
        images, count, terms = batch.images, len(batch.images), 0

        def loss(part: slice) -> Tensor:
            nonlocal terms
            losses = self._losses(fast_layout(images[part]), batch.positions[part])
            terms = len(losses)
            return losses.sum() * (len(images[part]) / count)

        total = self.descend(count, loss)
        self.log("loss", total.detach() / terms, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        # Without the weight, the images of a last, smaller batch would count for more than the others.
        return total * (self.trainer.world_size * count / self.batches.batch_size)

    def _losses(self, images: Tensor, positions: Tensor) -> Tensor:
        """Every neuron's, of every call of its layer, in a row."""
        watched = {name: _Objective(reader) for name, reader in zip(self.names, self.readers, strict=True)}  # type: ignore[arg-type]
        with torch.no_grad(), collecting(self._model[0], watched):
            self._model[0](images)
        losses = torch.cat([loss for objective in watched.values() for loss in objective.losses])
        if not losses.isfinite().all():
            layer = first_not_finite(self._model[0], images)
            if layer is not None:
                raise not_finite(layer, positions)
            raise UserError(
                f"probe.learning_rate={self.learning_rate}: the loss of v is NaN or infinite in step "
                f"{self.global_step}: give a smaller one, or mend the weights (model.weights)"
            )
        return losses

    # Lightning's own max_steps repeats a batch when training is taken up again.
    def on_train_start(self) -> None:
        stopped = any(callback.wait_count >= callback.patience for callback in self.trainer.early_stopping_callbacks)
        self.trainer.should_stop = stopped or self.trainer.global_step >= self.steps

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step >= self.steps:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = self.seen.tensors()
        checkpoint["rounds"] = list(self.rounds)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.seen = Seen.from_tensors(checkpoint["seen"])
        self.rounds = list(checkpoint["rounds"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Calibration:
    """Shows a reader the first call of its layer."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.done = reader, False

    def add(self, x: Tensor, y: Tensor) -> None:
        if not self.done:
            self.reader.calibrate(x, y)
        self.done = True


class _Objective:
    """Keeps a layer's loss, with its graph, as the layer runs: later its tensors may be overwritten in place."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.losses: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        with torch.enable_grad():
            self.losses.append(self.reader.loss(x.clone(), y))


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
        if not independent(self.model, outputs):
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
