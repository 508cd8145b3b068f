"""Methods that take parts of an image away and look what becomes of the answer; they need no gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from captum.attr import Occlusion as CaptumOcclusion
from torch import Tensor, nn

from pattern_bench.core.predictions import probabilities
from pattern_bench.errors import UserError
from pattern_bench.methods.base import Method

_Box = tuple[slice, ...]

_PLACES = 32
"""Windows along a side that prediction difference takes unless told otherwise."""


class _Windowed(Method):
    """Slides a window over the spatial dimensions, or over the features of inputs (B, D)."""

    def __init__(self, model: nn.Module, window: int | None, stride: int | None, batch_size: int) -> None:
        super().__init__(model)
        self._check_whole("batch_size", batch_size)
        for setting, value in (("window", window), ("stride", stride)):
            if value is not None:
                self._check_whole(setting, value)
        self.window, self.stride, self.batch_size = window, stride, batch_size

    def _side(self, spatial: Sequence[int]) -> int:
        """The window's side: as set, or 16 at 224 pixels scaled to the image's size."""
        side = self.window or max(1, round(16 / 224 * min(spatial)))
        if side > min(spatial):
            raise UserError(
                f"{self.name}: window={side} does not fit into images of {'×'.join(map(str, spatial))}: give a "
                "smaller one, or null"
            )
        return side

    def _checked_stride(self, stride: int, side: int) -> int:
        if stride > side:
            raise UserError(
                f"{self.name}: stride={stride} leaves pixels between windows of side {side}: give a stride of at most "
                f"{side}, or null"
            )
        return stride


class Occlusion(_Windowed):
    """The output's loss when a window is replaced by a constant, averaged over the windows that cover a pixel
    (Zeiler and Fergus 2014).

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    >>> _ = model[2].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    >>> Occlusion(model, window=1).attribute(torch.tensor([[3.0, 1.0]]), target=0)  # of 4: -2 without the first input
    tensor([[ 6., -2.]])

    Args:
        model: as for every method.
        window: side of the window in pixels; None scales 16 at 224 pixels.
        stride: pixels from one window to the next; None takes half a window.
        baseline: what the window is filled with, in the network's (normalised) input.
        batch_size: images in a forward pass; at least as many as there are inputs.

    Raises:
        UserError: where a setting is not possible, also for the inputs' size.
    """

    name = "occlusion"
    place = 10
    passes = "hundreds"
    kind = "attribution"

    def __init__(
        self,
        model: nn.Module,
        window: int | None = None,
        stride: int | None = None,
        baseline: float = 0.0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, window, stride, batch_size)
        self._check_setting("baseline", baseline, isinstance(baseline, int | float), "a number")
        self.baseline = float(baseline)

    def _attribute(self, x: Tensor, target: Tensor | None) -> Tensor:
        spatial = x.shape[2:] or x.shape[1:]
        channels = x.shape[1:2] if x.ndim > 2 else ()
        side = self._side(spatial)
        stride = self._checked_stride(self.stride or max(1, side // 2), side)
        result = CaptumOcclusion(self._logits).attribute(
            x,
            sliding_window_shapes=(*channels, *[side] * len(spatial)),
            strides=(*channels, *[stride] * len(spatial)),
            baselines=self.baseline,
            target=self._resolved(x, target),
            perturbations_per_eval=max(1, self.batch_size // len(x)),
        )
        return result.to(x)  # captum's windows are float32 whatever the images are


class PredictionDifference(_Windowed):
    """Prediction difference analysis (Zintgraf et al. 2017): how much evidence for the class each window holds.

    The weight of evidence of a window w is log₂ odds(c | x) - log₂ odds(c | x without w), where p(c | x without w) is
    the mean probability over samples of what else might stand in the window; a pixel has the mean over the windows
    that cover it, the same in every channel. Probabilities are softmax outputs with the Laplace correction
    (p N + 1) / (N + K).

    The samples come from ``reference``, or without one from the *other* images of the batch, and then an image's
    explanation depends on these. Each image gets the same draws.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    >>> method = PredictionDifference(model, reference=torch.zeros(3, 2), window=1)
    >>> method.attribute(torch.tensor([[1.0, 5.0]]), target=0).round(decimals=3)  # odds fall from e to 1: log₂ e
    tensor([[1.4430, 0.0000]])

    Args:
        model: as for every method.
        reference: (R, ...) other images, as the network takes them, or None.
        sampling: ``marginal``, the same window of other images; or ``conditional``, a Gaussian of all channels,
            fitted to patches of other images, given the ``margin`` of pixels around the window.
        window: side of the window in pixels; None scales 16 at 224 pixels.
        stride: pixels from one window to the next; None takes the smallest that gives at most 32 windows a side.
        samples: of each window's content.
        margin: pixels around the window that conditional sampling looks at.
        patches: patches of other images that the Gaussian is fitted to.
        training_images: N of the Laplace correction.
        seed: of all draws; the same seed gives the same result.
        batch_size: images in a forward pass.

    Raises:
        UserError: where a setting is not possible, also for the inputs' size; where there are no other images; where
            the network has a single output.
    """

    name = "prediction_difference"
    label = "prediction difference"
    place = 11
    passes = "hundreds"
    kind = "attribution"
    takes_reference = True

    def __init__(
        self,
        model: nn.Module,
        reference: Tensor | None = None,
        sampling: str = "marginal",
        window: int | None = None,
        stride: int | None = None,
        samples: int = 10,
        margin: int = 2,
        patches: int = 5000,
        training_images: int = 1_000_000,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, window, stride, batch_size)
        self._check_setting("sampling", sampling, sampling in ("marginal", "conditional"), "marginal or conditional")
        for setting, value in (("samples", samples), ("patches", patches), ("training_images", training_images)):
            self._check_whole(setting, value)
        self._check_whole("margin", margin, 0)
        self._check_whole("seed", seed, 0)
        if reference is not None and not (
            isinstance(reference, Tensor) and reference.numel() and reference.isfinite().all()
        ):
            raise UserError(f"{self.name}: reference must be a tensor of images (R, ...) with finite values: give one")
        self.reference, self.sampling, self.samples, self.margin = reference, sampling, samples, margin
        self.patches, self.training_images, self.seed = patches, training_images, seed

    def _attribute(self, x: Tensor, target: Tensor | None) -> Tensor:
        shape = x.shape
        spatial = shape[2:] or shape[1:]
        side = self._side(spatial)
        widest = min(side, max(1, math.ceil((max(spatial) - side) / (_PLACES - 1))))
        stride = self._checked_stride(self.stride or widest, side)
        places = [[*range(0, size - side, stride), size - side] for size in spatial]
        corners = list(itertools.product(*places))
        images = x.reshape(len(x), -1, *spatial)
        evidence = []
        with torch.no_grad():
            logits = self._logits(x)
            if logits.shape[1] < 2:
                raise UserError(
                    f"{self.name}: {type(self.model).__name__} has one output, and a class's probability needs at "
                    "least two: choose another method, such as occlusion"
                )
            if self.reference is None and len(x) == 1:
                raise UserError(
                    f"{self.name}: one image and no reference: the window's other contents come from other images, so "
                    "give a reference, or a batch of at least two"
                )
            if self.reference is not None and self.reference.shape[1:] != shape[1:]:
                raise UserError(
                    f"{self.name}: reference has shape {tuple(self.reference.shape)} and inputs {tuple(shape)}: give "
                    "reference images of the inputs' size"
                )
            classes = self._target(logits, target).tolist()
            content: _Marginal | _Conditional | None = None
            for i, image in enumerate(images):
                if content is None or self.reference is None:
                    content = self._content(images, i, side)
                evidence.append(self._evidence(image, shape[1:], classes[i], logits[i], corners, side, content))
        return torch.stack(evidence).expand_as(images).reshape(shape).to(x)

    def _content(self, images: Tensor, i: int, side: int) -> _Marginal | _Conditional:
        """What else may stand in the windows of image ``i``."""
        if self.reference is None:
            others = torch.cat([images[:i], images[i + 1 :]])
        else:
            others = self.reference.detach().to(images).reshape(-1, *images.shape[1:])
        if self.sampling == "marginal":
            return _Marginal(others)
        return _Conditional(others, side, self.margin, self.patches, self.seed)

    def _evidence(
        self,
        image: Tensor,
        shape: torch.Size,
        target: int,
        logits: Tensor,
        corners: list[tuple[int, ...]],
        side: int,
        content: _Marginal | _Conditional,
    ) -> Tensor:
        """The weight of evidence of each pixel, (1, spatial...), float64."""
        generator = torch.Generator().manual_seed(self.seed)
        boxes = [(slice(None), *(slice(at, at + side) for at in corner)) for corner in corners]
        sums = torch.zeros(len(boxes), dtype=torch.float64, device=image.device)
        # Whole windows in each forward pass, as many as fit; one window's samples may exceed batch_size.
        for start in range(0, len(boxes), max(1, self.batch_size // self.samples)):
            chosen = boxes[start : start + max(1, self.batch_size // self.samples)]
            changed = image.expand(len(chosen), self.samples, *image.shape).clone()
            for copies, box in zip(changed, chosen, strict=True):
                copies[(slice(None), *box)] = content.draw(image, box, self.samples, generator)
            probabilities = [
                self._probability(self._logits(part.reshape(len(part), *shape)), target)
                for part in changed.flatten(0, 1).split(self.batch_size)
            ]
            sums[start : start + len(chosen)] = torch.cat(probabilities).view(len(chosen), -1).sum(1)
        outputs = len(logits)
        before = self._log_odds(self._probability(logits[None], target), outputs)
        evidence = before - self._log_odds(sums / self.samples, outputs)
        total = torch.zeros(1, *image.shape[1:], dtype=torch.float64, device=image.device)
        count = torch.zeros_like(total)
        for box, value in zip(boxes, evidence, strict=True):
            total[box] += value
            count[box] += 1
        return total / count

    def _probability(self, logits: Tensor, target: int) -> Tensor:
        return probabilities(self.model, logits.double())[:, target]

    def _log_odds(self, probability: Tensor, outputs: int) -> Tensor:
        corrected = (probability * self.training_images + 1) / (self.training_images + outputs)
        return torch.log2(corrected / (1 - corrected))


class _Marginal:
    """The same window of other images (R, C, spatial...)."""

    def __init__(self, others: Tensor) -> None:
        self.others = others

    def draw(self, image: Tensor, box: _Box, samples: int, generator: torch.Generator) -> Tensor:
        """Contents for ``box``, (samples, C, side...)."""
        chosen = torch.randint(len(self.others), (samples,), generator=generator)
        where: tuple[Any, ...] = (chosen.to(image.device), *box)
        return self.others[where]


class _Conditional:
    """A Gaussian over patches of other images, given the pixels around the window.

    At an image's border the patch is moved inside, so that the window is not in its middle. Samples are kept within
    the values that occur.
    """

    ridge = 1e-4
    """Added to the covariance, as a multiple of its mean diagonal: patches may be fewer than their values."""

    def __init__(self, others: Tensor, side: int, margin: int, patches: int, seed: int) -> None:
        self.spatial, self.side, self.margin = tuple(others.shape[2:]), side, margin
        self.size = tuple(min(side + 2 * margin, size) for size in self.spatial)
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randint(len(others), (patches,), generator=generator)]
        for size, box in zip(self.spatial, self.size, strict=True):
            draws.append(torch.randint(size - box + 1, (patches,), generator=generator))
        seen = torch.stack(
            [
                others[(image, slice(None), *(slice(a, a + n) for a, n in zip(at, self.size, strict=True)))]
                for image, *at in zip(*(draw.tolist() for draw in draws), strict=True)
            ]
        )
        dims = tuple(range(2, others.ndim))
        self.low, self.high = others.amin((0, *dims)), others.amax((0, *dims))
        values = seen.flatten(1).double()
        self.mean = values.mean(0)
        centred = values - self.mean
        self.covariance = centred.mT @ centred / len(centred)
        diagonal = self.covariance.diagonal()
        diagonal += self.ridge * diagonal.mean() + 1e-12
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def draw(self, image: Tensor, box: _Box, samples: int, generator: torch.Generator) -> Tensor:
        """Contents for ``box``, (samples, C, side...)."""
        corner = [s.start for s in box[1:]]
        outer = [
            min(max(at - self.margin, 0), size - n) for at, size, n in zip(corner, self.spatial, self.size, strict=True)
        ]
        inside, gain, spread = self._given(tuple(a - b for a, b in zip(corner, outer, strict=True)), len(image))
        around = image[(slice(None), *(slice(a, a + n) for a, n in zip(outer, self.size, strict=True)))]
        deviation = around.flatten().double() - self.mean
        mean = self.mean[inside] + gain @ deviation[~inside]
        noise = torch.randn(samples, len(mean), generator=generator, dtype=torch.float64).to(mean)
        drawn = (mean + noise @ spread.mT).view(samples, *image[box].shape).to(image)
        ends: Any = (1, -1, *[1] * len(corner))
        return torch.minimum(torch.maximum(drawn, self.low.view(ends)), self.high.view(ends))

    def _given(self, at: tuple[int, ...], channels: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which values of the patch are in the window at ``at`` of it, the regression of these on the others, and a
        root of the covariance that is left."""
        if at not in self.known:
            mask = torch.zeros(channels, *self.size, dtype=torch.bool, device=self.mean.device)
            mask[(slice(None), *(slice(a, a + self.side) for a in at))] = True
            inside = mask.flatten()
            across = self.covariance[inside][:, ~inside]
            gain = torch.linalg.solve(self.covariance[~inside][:, ~inside], across.mT).mT
            left = self.covariance[inside][:, inside] - gain @ across.mT
            self.known[at] = inside, gain, torch.linalg.cholesky((left + left.mT) / 2)
        return self.known[at]
