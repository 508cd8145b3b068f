"""Lightning modules that ask the network: accuracy, explanations, and degraded images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from pattern_bench.core.predictions import prediction_of
from pattern_bench.engine.streams import Stream, answers
from pattern_bench.errors import UserError
from pattern_bench.metrics.degradation import degradation_curve, patch_order, replacement


class AccuracyStream(Stream):
    """Counts right answers: ``right`` (2,), of the first answer and of the first five."""

    remedy = "take smaller images"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.right = torch.zeros(2, dtype=torch.int64)

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        logits = answers(self.model, images, positions)
        first = prediction_of(self.model, logits).label == targets
        if logits.shape[1] == 1:  # both of two classes are among the first five
            among = torch.ones_like(first)
        else:
            among = (logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]).any(1)
        self.right += torch.stack([first.sum(), among.sum()]).cpu()

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"right": self.right}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.right = state["right"].clone()


class Explains(Protocol):
    """Any explanation method: this suite's, captum's, a user's own."""

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor: ...


class RowStream(Stream):
    """Keeps rows of results by position in the split: ``rows`` by name (images, ...), and which are ``known``
    (images,). Rows of images not yet visited are zero, so those of several processes add up.

    Args:
        model: the network.
        images: of the split.

    Raises:
        UserError: naming the images, where a row is NaN or infinite.
    """

    remedy = "choose another method, or a smaller method.batch_size where it has one"

    def __init__(self, model: nn.Module, images: int) -> None:
        super().__init__(model)
        self.rows: dict[str, Tensor] = {}
        self.known = torch.zeros(images, dtype=torch.bool)

    def keep(self, positions: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Takes in the rows (B, ...) of the images at ``positions`` (B,)."""
        where = positions.cpu()
        for name, row in rows.items():
            row = row.detach().cpu()
            if not row.isfinite().all():
                raise UserError(
                    f"{name}: NaN or Inf for images {int(where.min())} to {int(where.max())} of the split: choose "
                    "another method, or mend the weights (model.weights)"
                )
            self.rows.setdefault(name, row.new_zeros(len(self.known), *row.shape[1:]))[where] = row
        self.known[where] = True

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"known": self.known} | {f"rows/{name}": rows for name, rows in self.rows.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.known = state["known"].clone()
        self.rows = {k.removeprefix("rows/"): t.clone() for k, t in state.items() if k.startswith("rows/")}


class ExplanationStream(RowStream):
    """Explanations of the classes predicted: rows ``images``, ``targets``, ``predicted`` and ``confidence`` (as in
    ``core.predictions.Prediction``), and ``explanation/TITLE`` for each of ``methods``."""

    def __init__(self, model: nn.Module, images: int, methods: Mapping[str, Explains]) -> None:
        super().__init__(model, images)
        self.methods = methods

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        output, label, confidence = prediction_of(self.model, answers(self.model, images, positions))
        found = {f"explanation/{title}": m.attribute(images, output) for title, m in self.methods.items()}
        rows = {"images": images, "targets": targets, "predicted": label, "confidence": confidence}
        self.keep(positions, rows | found)


class DegradationStream(RowStream):
    """Degradation curves of heat maps, and of a random order, for the class first predicted: rows (images, steps + 1)
    of probabilities by the method's name, and ``random_order``.

    ``random_order`` (images, grid...) holds the ranks of the random order by position in the split, so that
    it does not depend on batches.

    Args:
        model: the network.
        methods: whatever has ``attribute(inputs, target)``, by name.
        patch: side of a patch.
        steps: patches to replace.
        random_order: see above.
        order, how, value: which patches come first and what replaces them, as in ``core.degradation``.
        baseline: whether to take the random order's curve, too.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Mapping[str, Explains],
        patch: int,
        steps: int,
        random_order: Tensor,
        order: str = "most",
        how: str = "mean",
        value: float = 0.0,
        baseline: bool = True,
    ) -> None:
        super().__init__(model, len(random_order))
        self.baseline = baseline
        self.methods, self.patch, self.steps, self.random_order = methods, patch, steps, random_order
        self.order, self.how, self.value = order, how, value

    def visit(self, images: Tensor, targets: Tensor, positions: Tensor) -> None:
        predicted = answers(self.model, images, positions).argmax(1)
        orders = {"random_order": self.random_order[positions.cpu()].to(images.device)} if self.baseline else {}
        for name, method in self.methods.items():
            orders[name] = patch_order(method.attribute(images, predicted), self.patch, self.order)
        replaced_by = replacement(images, self.patch, self.how, self.value)
        curves = {
            name: degradation_curve(self.model, images, own, predicted, self.patch, self.steps, replaced_by)
            for name, own in orders.items()
        }
        self.keep(positions, curves)
