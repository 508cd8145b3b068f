"""The interface of data sets: one pool of images, or two where validation images are set apart already."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from pattern_bench.configuration.rules import (
    Rule,
    boolean,
    check_arguments,
    is_number,
    positive_number,
    text,
    whole_number,
)
from pattern_bench.storage.cache import Cache

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


LARGEST_SIDE = 2**13
"""Pixels: an image of this side has a fifth of a gibibyte as colours and three quarters as numbers."""
RULES = (
    text("data.name", "give a name"),
    positive_number("data.fit"),
    positive_number("data.probe"),
    positive_number("data.validation"),
    whole_number("data.limit", 1, nullable=True),
    whole_number("data.batch_size", 1),
    whole_number("data.workers", 0),
    boolean("data.strict"),
)
"""Of the settings that all data sets have."""
FILES = (
    text("data.root", "give a folder"),
    text("data.validation_root", "give a folder, or null to draw validation images from data.root", nullable=True),
    whole_number("data.size", 1, remedy=f"give the side in pixels, 1 to {LARGEST_SIDE}"),
    Rule("data.size", lambda size: size <= LARGEST_SIDE, f"give at most {LARGEST_SIDE}", "is too large for a network"),
    boolean("data.download"),
)
"""Of those that several data sets of files have."""
DRAWN = (
    whole_number("data.samples", 2),
    whole_number("data.data_seed", 0),
    Rule(
        "data.data_seed", lambda seed: seed < 2**63, f"give one below 2**63 = {2**63}", "is too large for a generator"
    ),
    Rule("data.angle", lambda angle: is_number(angle) and abs(angle) < 1e9, "give degrees, such as 45"),
)
"""Of those that data sets which are drawn have."""


class Pool:
    """Images with names, and labels where they have some. Base of the pools, one for each kind of storage.

    Attributes:
        ids: one name for each image (a file's path below the root, or an index).
        labels: one class index (or regression target) for each image, or None.
        classes: number of classes, or None.
        fingerprint: a text that is another where the images are others; part of the keys of kept results.
    """

    ids: Sequence[str]
    labels: Sequence[float] | None
    classes: int | None
    fingerprint: str
    # Images that are neighbours in the pool lie beside each other in a file that is cheap to read onwards and dear to
    # jump about in. A pass over a split then visits them by index; sums are the same in any order.
    sequential = False

    def image(self, index: int) -> Any:
        """Return an image: a PIL image in RGB, or a float tensor.

        Args:
            index: its place in ``ids``.

        Raises:
            OSError, ValueError: where it cannot be read; the suite counts it and leaves it out.
        """
        raise NotImplementedError


class TensorPool(Pool):
    """Images that are in memory already.

    Args:
        images: (n, ...) float32.
        labels: (n,) class indices, or regression targets.
        classes: number of classes, or None for regression.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: int | None) -> None:
        self.images, self.classes = images, classes
        self.labels = labels.tolist()
        self.ids = [str(i) for i in range(len(images))]
        content = images.contiguous().numpy().tobytes() + labels.contiguous().numpy().tobytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def image(self, index: int) -> Tensor:
        return self.images[index]


class Source:
    """Base of the data sets. A new one is a subclass with :meth:`pools` and a YAML file in ``conf/data``.

    Args:
        name: as it stands in the results.
        fit, probe, validation: split sizes, a share of the pool that the split is drawn from (up to 1.0) or a
            number of images (from 2). ``fit`` and ``probe`` come from the training images.
        limit: use at most so many images of each pool, drawn with the job's seed.
        batch_size: images per forward pass.
        workers: processes that decode images; 0 decodes in the job itself.
        strict: stop at the first unreadable image instead of counting and leaving out.

    Raises:
        UserError: where one of these is not possible.
    """

    regression = False
    cache: Cache | None = None
    """Where listings and indices of the images are kept; see :meth:`keeping_in`."""
    signal: Tensor | None = None
    """The true signal direction of a layer's input, where the data are made so that it is known."""

    def __init__(
        self,
        *,
        name: str,
        fit: float,
        probe: float,
        validation: float,
        limit: int | None,
        batch_size: int,
        workers: int,
        strict: bool,
    ) -> None:
        check_arguments(
            RULES, name=name, fit=fit, probe=probe, validation=validation, limit=limit, batch_size=batch_size,
            workers=workers, strict=strict,
        )  # fmt: skip
        self.name = name
        self.fit, self.probe, self.validation = fit, probe, validation
        self.limit, self.batch_size, self.workers, self.strict = limit, batch_size, workers, strict

    def keeping_in(self, cache: Cache) -> Self:
        """Return the same data set, which keeps listings and indices of its images in ``cache``."""
        source = copy.copy(self)
        source.cache = cache
        return source

    def pools(self) -> tuple[Pool, Pool | None]:
        """Return training images and validation images; None in place of the latter, where they are to be drawn from
        the former.

        Raises:
            UserError: where the data are missing or damaged; the message names the setting and the remedy.
        """
        raise NotImplementedError

    def transform(self) -> Callable[[Any], Tensor]:
        """Return the function from a pool's image to the network's input (C, ...), float32, for models that bring no
        transform of their own."""
        return v2.Identity()


def photograph_transform(size: int) -> transforms.Compose:
    """Return the transform that torchvision's ImageNet models expect, from a PIL image to (3, size, size) float32.

    It resizes the short side to ``size`` with antialiasing, crops the centre, and normalises: bit for bit what the
    transforms of torchvision's weights do (their v2 counterparts differ in the last bit).

    Args:
        size: side of the input in pixels.
    """
    return transforms.Compose(
        [
            transforms.Resize(size, antialias=True),
            transforms.CenterCrop(size),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float32),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
