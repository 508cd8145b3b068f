"""Checks of what callers give: each returns the value in the form that is used, or refuses it with what to give."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pattern_bench.core.estimators import Pattern
from pattern_bench.core.half_precision import wide
from pattern_bench.core.tensor_checks import unusable
from pattern_bench.errors import UserError, told


def whole(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """Return ``value``, where it is a whole number between ``least`` and ``most``, both included.

    >>> whole("steps", 0, 1)
    Traceback (most recent call last):
    pattern_bench.errors.UserError: steps=0 is not possible: give a whole number of at least 1

    Raises:
        UserError: where it is none.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most:
        return int(value)
    large = isinstance(value, Integral) and int(value) > most
    to = f"of at least {least}" if most == 2**63 - 1 and not large else f"from {least} to {most}"
    raise UserError(f"{name}={told(value)} is not possible: give a whole number {to}")


def number(name: str, value: Any, least: float, most: float = 1e30) -> float:
    """Return ``value``, where it is a number between ``least`` and ``most``, both included.

    >>> number("positions", 1, 0)
    1.0

    Raises:
        UserError: where it is none.
    """
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else None
    if number is not None and least <= number <= most:
        return float(value)
    raise UserError(f"{name}={told(value)} is not possible: give a number from {least:g} to {most:g}")


def seed_of(value: Any) -> int:
    """Return a seed that torch takes, also with the number of a layer added.

    >>> seed_of(3)
    3

    Raises:
        UserError: where it is none.
    """
    return whole("seed", value, -(2**63), 2**62)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse what is none of ``choices``.

    >>> check_choice("order", "best", ["most", "least"])
    Traceback (most recent call last):
    pattern_bench.errors.UserError: order=best is unknown: choose from most, least

    Raises:
        UserError: where ``value`` is none of ``choices``.
    """
    if not isinstance(value, str) or value not in choices:
        shown = told(value, quoted=False)
        raise UserError(f"{name}={shown} is unknown: choose from {', '.join(choices)}")


def file_to_write(file: Any) -> Path:
    """Return the path of a file that is to be written, before any work is done for it.

    >>> file_to_write(".")
    Traceback (most recent call last):
    pattern_bench.errors.UserError: file='.' is not possible: give the path of the file to write

    Raises:
        UserError: where it is no path, or of a folder, a device, or a file in a folder that is not there.
    """
    if not isinstance(file, str | Path) or not str(file).strip(".") or "\0" in str(file):
        raise UserError(f"file={told(file)} is not possible: give the path of the file to write")
    path = Path(file).expanduser()
    with writing(file):
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"file={file} is {what}: give the path of the file to write")
        if not path.parent.is_dir():
            raise UserError(f"file={file} is in no folder that is there: make {path.parent}, or give another path")
    return path


@contextmanager
def writing(file: str | Path) -> Iterator[None]:
    """Say which file it was where the disk refuses what is written within.

    >>> with writing("patterns.safetensors"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    pattern_bench.errors.UserError: file=patterns.safetensors cannot be written (No space left on device): free \
space, or give another path

    Raises:
        UserError: where the disk refuses what is written within.
    """
    try:
        yield
    except OSError as error:
        free = "free space, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(
            f"file={file} cannot be written ({error.strerror or error}): {free}give another path"
        ) from error


def check_patterns(patterns: Any) -> None:
    """Refuse what :func:`pattern_bench.fit_patterns` could not have returned.

    >>> check_patterns({"0": Pattern(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([False]))})
    >>> check_patterns([])
    Traceback (most recent call last):
    pattern_bench.errors.UserError: patterns=a list is no patterns by layer: give what pb.fit_patterns returned

    Raises:
        UserError: where ``patterns`` are not patterns by layer, or one of them has other parts than a pattern.
    """
    if not isinstance(patterns, Mapping) or not all(
        isinstance(name, str) and isinstance(pattern, Pattern) for name, pattern in patterns.items()
    ):
        raise UserError(f"patterns={told(patterns)} is no patterns by layer: give what pb.fit_patterns returned")
    for name, pattern in patterns.items():
        for part in (positive := pattern.positive, pattern.negative):
            if not isinstance(part, Tensor) or unusable(part) or not part.is_floating_point():
                what = f"{unusable(part) or part.dtype}" if isinstance(part, Tensor) else told(part)
                raise UserError(
                    f"patterns: that of layer {name} is {what}: give dense tensors of floating-point numbers, as "
                    "pb.fit_patterns does"
                )
            if part.shape != positive.shape:
                raise UserError(
                    f"patterns: that of layer {name} has parts of shape {tuple(positive.shape)} and "
                    f"{tuple(part.shape)}: give both in the shape of its weight"
                )
            if not wide(part).isfinite().all():
                raise UserError(f"patterns: that of layer {name} is not finite: fit it again on finite images")
        dead = pattern.dead
        if not isinstance(dead, Tensor) or dead.dtype != torch.bool or dead.shape != positive.shape[:1]:
            raise UserError(
                f"patterns: that of layer {name} does not tell which of its neurons are dead: give a bool for each, as "
                "pb.fit_patterns does"
            )


def images_of(images: Any, where: str) -> Tensor:
    """Return a batch of images (B, C, ...) that no gradient flows through.

    >>> images_of(torch.ones(2, 3, requires_grad=True), "images is").requires_grad
    False

    Args:
        images: what should be one.
        where: begins the error message, such as ``loader yields``.

    Raises:
        UserError: where ``images`` are no tensor of a floating type.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise UserError(
            f"{where} {kind} where images should be: give batches of float tensors (B, C, ...), or tuples "
            "that start with one"
        )
    if what := unusable(images):
        raise UserError(f"{where} a {what} tensor where images should be: give dense ones, with values")
    if images.ndim < 2:
        raise UserError(f"{where} a tensor of shape {tuple(images.shape)}, which is no batch: give (B, C, ...)")
    return images.detach().clone() if images.is_inference() else images.detach()


def some_images(images: Any) -> Tensor:
    """Return the argument ``images`` as :func:`images_of` does, where it holds at least one.

    >>> some_images(torch.ones(0, 3))
    Traceback (most recent call last):
    pattern_bench.errors.UserError: images has no image (its shape is (0, 3)): give at least one

    Raises:
        UserError: as :func:`images_of`; where there is no image, or none of a single value.
    """
    images = images_of(images, "images is")
    if not images.numel():
        raise UserError(f"images has no image (its shape is {tuple(images.shape)}): give at least one")
    return images
