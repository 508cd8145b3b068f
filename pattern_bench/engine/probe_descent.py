"""The Lightning module that fits the readers v of ρ(S) by gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pattern_bench.core.network import collecting, first_not_finite
from pattern_bench.core.probe_sgd import Reader
from pattern_bench.data.splits import Batch, GlobalBatches
from pattern_bench.engine.descent import Descending
from pattern_bench.engine.streams import Seen, fast_layout, not_finite
from pattern_bench.errors import UserError


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
