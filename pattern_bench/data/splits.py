"""The protocol's three splits: patterns are fitted on one half of the training images, the probe v on the other,
and everything is reported on the validation images. Halves come from a seeded permutation."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pattern_bench.data.source import Pool, Source
from pattern_bench.errors import UserError

SPLITS = ("fit", "probe", "validation")


class Batch(NamedTuple):
    """Images (B, ...) with targets (B,) (class indices, regression targets, or -1 where there is none), positions
    in the split, and the names of those left out because they cannot be read. ``images`` is None when all were."""

    images: Tensor | None
    targets: Tensor
    positions: Tensor
    unreadable: list[str]


class Unreadable(NamedTuple):
    name: str
    reason: str


@dataclass
class Split(Dataset):
    """Some images of a pool, in a fixed order."""

    pool: Pool
    indices: list[int]
    regression: bool
    strict: bool
    transform: Callable[[Any], Tensor] = field(default=lambda image: image)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, float, int] | Unreadable:
        index = self.indices[position]
        try:
            image = self.pool.image(index)
        except (OSError, ValueError, SyntaxError, MemoryError) as error:
            if self.strict:
                raise UserError(
                    f"data.strict=true, and {self.pool.ids[index]} cannot be read ({error}): mend or remove it"
                ) from error
            return Unreadable(self.pool.ids[index], str(error))
        target = -1 if self.pool.labels is None else self.pool.labels[index]
        return self.transform(image), target, position

    def collate(self, items: list[tuple[Tensor, float, int] | Unreadable]) -> Batch:
        good = [item for item in items if not isinstance(item, Unreadable)]
        bad = [item.name for item in items if isinstance(item, Unreadable)]
        images = torch.stack([item[0] for item in good]) if good else None
        targets = torch.tensor([t for _, t, _ in good], dtype=torch.float32 if self.regression else torch.int64)
        return Batch(images, targets, torch.tensor([p for _, _, p in good]), bad)

    def batch(self, positions: Iterable[int]) -> Batch:
        """The images at these positions."""
        return self.collate([self[position] for position in positions])

    def loader(self, batch_size: int, workers: int, shuffle: bool = False) -> DataLoader:
        return DataLoader(self, batch_size=batch_size, shuffle=shuffle, num_workers=workers, collate_fn=self.collate)

    def first(self, count: int) -> Split:
        """The first ``count`` images."""
        return Split(self.pool, self.indices[:count], self.regression, self.strict, self.transform)

    def chunks(self, count: int) -> list[Split]:
        """The images in ``count`` parts of the same size, or nearly so."""
        ends = [round(i * len(self) / count) for i in range(count + 1)]
        return [
            Split(self.pool, self.indices[start:end], self.regression, self.strict, self.transform)
            for start, end in itertools.pairwise(ends)
        ]

    @property
    def fingerprint(self) -> str:
        content = f"{self.pool.fingerprint} {self.indices} {self.transform!r}"
        return hashlib.sha256(content.encode()).hexdigest()


def make_splits(source: Source, seed: int) -> dict[str, Split]:
    """The splits ``fit``, ``probe`` and ``validation``, by a permutation with ``seed``.

    Raises:
        UserError: where the pools are too small for what the settings ask.
    """
    train, validation = source.pools()
    generator = torch.Generator().manual_seed(seed)
    train_order = _drawn(train, source.limit, generator)
    if validation is None:
        sizes = _sizes(source, {"validation": source.validation, "fit": source.fit, "probe": source.probe}, train_order)
        parts = torch.tensor(train_order).split([*sizes, len(train_order) - sum(sizes)])
        held, fit, probe = (part.tolist() for part in parts[:3])
        validation = train
    else:
        sizes = _sizes(source, {"fit": source.fit, "probe": source.probe}, train_order)
        fit, probe = train_order[: sizes[0]], train_order[sizes[0] : sum(sizes)]
        order = _drawn(validation, source.limit, generator)
        held = order[: _sizes(source, {"validation": source.validation}, order)[0]]
    return {
        "fit": Split(train, fit, source.regression, source.strict),
        "probe": Split(train, probe, source.regression, source.strict),
        "validation": Split(validation, held, source.regression, source.strict),
    }


def joined(fit: Split, probe: Split) -> Split:
    """The whole training set, for training a model."""
    return Split(fit.pool, fit.indices + probe.indices, fit.regression, fit.strict, fit.transform)


def _drawn(pool: Pool, limit: int | None, generator: torch.Generator) -> list[int]:
    if limit is not None and limit < 1:
        raise UserError(f"data.limit={limit} leaves no image: give a positive number, or null for all")
    return torch.randperm(len(pool.ids), generator=generator).tolist()[:limit]


def _sizes(source: Source, wanted: dict[str, float], images: list[int]) -> list[int]:
    total, ends = 0.0, [0]
    for name, size in wanted.items():
        if size <= 0 or (size > 1 and size != int(size)):
            raise UserError(f"data.{name}={size} is no split size: give a share up to 1.0 or a whole number of images")
        # Rounding where splits end, not their sizes, leaves no image over when the shares add up to 1.
        total += size if size > 1 else size * len(images)
        ends.append(round(total))
    sizes = [end - start for start, end in itertools.pairwise(ends)]
    asked = ", ".join(f"data.{name}={size}" for name, size in wanted.items())
    limit = "" if source.limit is None else f" (data.limit={source.limit})"
    if sum(sizes) > len(images):
        raise UserError(
            f"{asked} ask for {sum(sizes)} images, but data={source.name} has {len(images)}{limit}: "
            "ask for less, or give it more images"
        )
    if min(sizes) < 2:
        raise UserError(
            f"{asked} leave fewer than 2 images to a split, of the {len(images)} that data={source.name} "
            f"has{limit}: every split needs at least 2"
        )
    return sizes
