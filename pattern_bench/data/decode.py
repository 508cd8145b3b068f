"""Decodes image files: whole, upright and in RGB, or one OSError that says why not."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

BITS_PER_SAMPLE, PHOTOMETRIC_INTERPRETATION = 258, 262  # tags of TIFF 6.0

LONGEST = 100
"""A side may be so many times the other: where the short one is scaled up to 224 pixels, the long one grows along."""


def decode(file: Path | BinaryIO) -> Image.Image:
    """Decode a file, or the rest of a stream, to an RGB image.

    Of several frames or pages it is the first. As in torchvision's ``pil_loader``, transparency is dropped (what lies
    under it shows), and colour profiles are not applied. Other than there,

    - an image stands upright where EXIF says how the camera was held; broken EXIF leaves it as it is stored;
    - grey of more than 8 bits is scaled to 8, see :func:`_eight_bits`, instead of clipped to white;
    - half an image is an error, even where ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` is set. Not noticed is damage that
      the format cannot tell: wrong data of the right length, and a JPEG cut short but closed by an end marker.

    Args:
        file: a path, or an open binary file.

    Raises:
        OSError: whatever is wrong: no such file, no image, cut short, broken, more pixels than twice
            ``PIL.Image.MAX_IMAGE_PIXELS``, one side more than ``LONGEST`` times the other, or more than memory holds.
    """
    try:
        with _strict(), _stream(file) as stream, _opened(stream) as image:
            return _rgb(image)
    except OSError:
        raise
    except Exception as error:  # a broken file makes PIL raise almost anything
        raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")) from error


def _stream(file: Path | BinaryIO) -> BinaryIO:
    # Given a path, PIL may map the file into memory: were it cut short meanwhile, the process would die.
    # Given a member of an archive, PIL cannot read compressed TIFF.
    return file.open("rb") if isinstance(file, Path) else io.BytesIO(file.read())


def _opened(stream: BinaryIO) -> Image.Image:
    try:
        image = Image.open(stream)
        if image.format == "PNG":
            image.verify()  # compares the checksums of the image data, which reading them does not
            image = Image.open(stream)
    except UnidentifiedImageError as error:
        stream.seek(0)
        raise OSError("no image, or cut short" if stream.read(1) else "empty file") from error
    if image.format == "EPS":
        raise OSError("PostScript, a program for Ghostscript to run")
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if max(image.size) > LONGEST * min(image.size):
        raise OSError(f"{image.width}×{image.height} pixels, a side more than {LONGEST} times the other")
    image.load()
    with contextlib.suppress(Exception):  # broken EXIF; the pixels are whole
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as 8 bits.

    Unsigned integers of up to 16 bits are divided by their range. Floats within [0, 1] are multiplied by 255. All else
    (other floats, signed and longer integers) says nowhere what is white: it is stretched from its least value, black,
    to its greatest.

    Raises:
        OSError: where a value is not finite.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise OSError("values that are not finite")
    tags = getattr(image, "tag_v2", {})
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        low, high = 0, 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0, 1
    shares = (values - low) / ((high - low) or 1)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white; PIL inverts 8 bits alone
        shares = 1 - shares
    return Image.fromarray((255 * shares).round().astype(np.uint8))


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    """No half images, and none of PIL's warnings: of sizes that it reads all the same, and of data not asked for.

    For the whole process meanwhile: images are decoded in parallel by processes, not by threads.
    """
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
