"""The protocol's three splits: patterns are fitted on one half of the training images, the probe v on the other,
and everything is reported on the validation images. Halves come from a seeded permutation."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from pattern_bench.data.base import Pool, Source
from pattern_bench.errors import UserError

SPLITS = ("fit", "probe", "validation")


class Batch(NamedTuple):
    """Images with what belongs to them.

    Attributes:
        images: (B, ...), or None where none of the batch can be read.
        targets: (B,) class indices (-1 for none), int64; or regression targets, float32.
        positions: (B,) of the images in their split, int64.
        unreadable: positions of the images that are left out because they cannot be read.
    """

    images: Tensor | None
    targets: Tensor
    positions: Tensor
    unreadable: list[int]


class Unreadable(NamedTuple):
    """In the place of an image that cannot be read: its position in the split, and why."""

    position: int
    reason: str


@dataclass
class Split(Dataset):
    """Some images of a pool, in a fixed order.

    Attributes:
        pool: the images.
        indices: (n,) int64, their places in the pool; one tensor, since a list of a million numbers would be copied
            page by page into every worker.
        regression: whether the labels are regression targets.
        strict: whether an image that cannot be read is an error.
        transform: from a pool's image to the network's input.
    """

    pool: Pool
    indices: Tensor
    regression: bool
    strict: bool
    transform: Callable[[Any], Tensor] = field(default=lambda image: image)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, float, int] | Unreadable:
        position = int(position)  # a loader may count in tensors
        index = int(self.indices[position])
        try:
            image = self.pool.image(index)
        except UserError:
            raise
        except (OSError, ValueError, SyntaxError, MemoryError) as error:
            if self.strict:
                raise UserError(
                    f"data.strict=true, and {self.pool.ids[index]} cannot be read ({error}): mend or remove it"
                ) from error
            return Unreadable(position, str(error))
        target = -1 if self.pool.labels is None else self.pool.labels[index]
        return self.transform(image), float(target), position

    def name(self, position: int) -> str:
        """Return the name of the image at a position of the split."""
        return self.pool.ids[int(self.indices[position])]

    def collate(self, items: list[tuple[Tensor, float, int] | Unreadable]) -> Batch:
        """Stack items of the split into a batch."""
        good = [item for item in items if not isinstance(item, Unreadable)]
        bad = [item.position for item in items if isinstance(item, Unreadable)]
        images = torch.stack([item[0] for item in good]) if good else None
        targets = torch.tensor([t for _, t, _ in good], dtype=torch.float32 if self.regression else torch.int64)
        return Batch(images, targets, torch.tensor([p for _, _, p in good], dtype=torch.int64), bad)

    def batch(self, positions: Iterable[int]) -> Batch:
        """Return the images at these positions of the split.

        Raises:
            UserError: under ``strict``, naming the first that cannot be read.
        """
        return self.collate([self[position] for position in positions])

    def share(self, batch_size: int, rank: int = 0, size: int = 1) -> Tensor:
        """Return the positions that one of several processes visits; each position is in the share of exactly one.

        Each process takes some of the very batches that one process alone would take. What is computed of a batch in
        single precision is then the same to the bit, and only the order differs in which batches are added up in
        double.

        Args:
            batch_size: images in a batch.
            rank: of the process.
            size: number of processes.
        """
        # Sums do not ask for an order, so images that are read best one after the other are.
        order = self.indices.argsort() if self.pool.sequential else torch.arange(len(self))
        batches = -(-len(order) // batch_size)
        start, end = (-(-number * batches // size) * batch_size for number in (rank, rank + 1))
        return order[start:end]

    def loader(self, positions: Iterable[int], batch_size: int, workers: int) -> DataLoader:
        """Return a loader of batches of the images at these positions, in their order.

        Args:
            positions: in the split.
            batch_size: images in a batch; the last may have fewer.
            workers: processes that decode images; 0 decodes in this one.
        """
        order = BatchSampler(positions, batch_size, drop_last=False)
        return DataLoader(_Batches(self), None, sampler=order, num_workers=workers, collate_fn=_as_it_is)

    def shuffled(self, batches: GlobalBatches, workers: int) -> DataLoader:
        """Return a loader of batches of images in random order, for training."""
        return DataLoader(self, batch_sampler=batches, num_workers=workers, collate_fn=self.collate)

    def _with(self, indices: Tensor) -> Split:
        return Split(self.pool, indices, self.regression, self.strict, self.transform)

    def first(self, count: int) -> Split:
        """Return the split of the first ``count`` images; None takes all."""
        return self._with(self.indices[:count])

    def chunks(self, count: int) -> list[Split]:
        """Divide the split into ``count`` parts, whose sizes differ by one image at most."""
        ends = [round(i * len(self) / count) for i in range(count + 1)]
        return [self._with(self.indices[start:end]) for start, end in itertools.pairwise(ends)]

    @property
    def fingerprint(self) -> str:
        """A hash of what the network sees: pool, transform, and which images in which order."""
        digest = hashlib.sha256(f"{self.pool.fingerprint} {self.transform!r} ".encode())
        digest.update(self.indices.numpy().tobytes())
        return digest.hexdigest()


@dataclass
class _Batches(Dataset):
    """A split whose items are batches. Where a loader makes batches of items itself, Lightning keeps the positions in
    all of them as it predicts."""

    split: Split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, positions: list[int]) -> Batch:
        return self.split.batch(positions)


def _as_it_is(batch: Any) -> Any:
    return batch


class GlobalBatches(Sampler[list[int]]):
    """Batches of a random order that all processes agree on, of which each takes its share.

    The order depends on seed and round alone, so training that is taken up again goes on as it would have, and the
    processes together take the very batches that one alone would.

    Args:
        images: number of images.
        batch_size: images in a batch, over all processes.
        seed: of the order.
        rank: of this process.
        size: number of processes.
        most: batches in a round at most; None for one pass over the images.
    """

    def __init__(
        self, images: int, batch_size: int, seed: int, rank: int = 0, size: int = 1, most: int | None = None
    ) -> None:
        self.images, self.batch_size, self.seed, self.rank, self.size = images, batch_size, seed, rank, size
        self.passes = -(-images // batch_size)
        self.length = self.passes if most is None else min(self.passes, most)
        self.round = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to a round; Lightning calls it before each."""
        self.round = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        first = self.round * self.length
        for number in range(first, first + self.length):
            passed, place = divmod(number, self.passes)
            if number == first or place == 0:
                order = torch.randperm(self.images, generator=self._generator(passed))
            batch = order[place * self.batch_size : (place + 1) * self.batch_size]
            yield batch.tensor_split(self.size)[self.rank].tolist()

    def _generator(self, passed: int) -> torch.Generator:
        return torch.Generator().manual_seed(((self.seed << 32) + passed) % 2**63)


def make_splits(source: Source, seed: int) -> dict[str, Split]:
    """Return the splits ``fit``, ``probe`` and ``validation`` of a data set, drawn by a permutation.

    Args:
        source: the data set, with the sizes of its splits.
        seed: of the permutation.

    Raises:
        UserError: where the pools are too small for what the settings ask.
    """
    train, validation = source.pools()
    generator = torch.Generator().manual_seed(seed)
    train_order = _drawn(train, source.limit, generator)
    if validation is None:
        sizes = _sizes(source, {"validation": source.validation, "fit": source.fit, "probe": source.probe}, train_order)
        held, fit, probe = train_order.split([*sizes, len(train_order) - sum(sizes)])[:3]
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
    """Join two splits of one pool into the whole training set, for training a model."""
    return Split(fit.pool, torch.cat([fit.indices, probe.indices]), fit.regression, fit.strict, fit.transform)


def _drawn(pool: Pool, limit: int | None, generator: torch.Generator) -> Tensor:
    return torch.randperm(len(pool.ids), generator=generator)[:limit]


def _sizes(source: Source, wanted: dict[str, float], images: Tensor) -> list[int]:
    total, ends = 0.0, [0]
    for name, size in wanted.items():
        if size > 1 and size != int(size):
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
