"""Which files below a folder, or in an archive, are images, told by their names alone."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping

from PIL import Image, ImageFile, features

# Formats that Pillow opens and cannot decode, or would have another program decode, by their names in it. (Those that
# it only knows by their first bytes, such as HDF5, are stubs.)
_NOT_DECODED = ("EPS", "MPEG")
_OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
# What operating systems, file servers and synchronisers leave beside a user's files, besides names that begin with a
# dot (".DS_Store", "._0.jpg", ".ipynb_checkpoints").
_SYSTEM = frozenset(
    (
        "__macosx", "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "~snapshot",
        "lost+found", "found.000", "$recycle.bin", "recycler", "recycled", "system volume information", "thumbs.db",
        "ehthumbs.db", "desktop.ini", "icon\r", "network trash folder", "temporary items", "__pycache__",
    )
)  # fmt: skip
OTHER_IMAGES = frozenset(
    (
        ".heic", ".heif", ".jxl", ".jxr", ".svg", ".svgz", ".exr", ".hdr", ".psb", ".eps", ".ps", ".wmf", ".emf",
        ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".raw", ".xcf", ".avif", ".webp", ".jp2",
        ".dcm", ".nii",
    )
)  # fmt: skip
"""Suffixes of images that not every Pillow reads: their files are meant, and missed."""
NO_SUFFIX = "no suffix"
LINKED, NO_FILE, NAMED_AS_IMAGE = "linked folder", "no file", "folder named as an image"
REASONS = {
    "hidden": "hidden or of a system", "unreadable folder": "folders that cannot be read",
    LINKED: "links to folders, which are not followed", NO_FILE: "pipes, sockets, devices or links",
    NAMED_AS_IMAGE: "folders that are named as images and hold none",
}  # fmt: skip
"""Why files and folders are left out, whatever their suffix, and how that is said of a number of them."""


@functools.cache
def suffixes() -> tuple[str, ...]:
    """Return the suffixes of every format that this Pillow decodes by itself: in lower case, sorted, with dots.

    >>> {".jpg", ".png", ".tif"} <= set(suffixes())
    True
    """
    known = Image.registered_extensions()  # imports its plugins
    return tuple(sorted(suffix for suffix, kind in known.items() if _decoded(kind)))


def _decoded(kind: str) -> bool:
    kind = "JPEG" if kind == "MPO" else kind  # opened as JPEG, of which it has several
    if kind in _NOT_DECODED or kind not in Image.OPEN or not features.check(_OPTIONAL.get(kind, "zlib")):
        return False
    opened_by = Image.OPEN[kind][0]
    return not (isinstance(opened_by, type) and issubclass(opened_by, ImageFile.StubImageFile))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or a system's, and so none of the user's images.

    >>> is_hidden(".DS_Store"), is_hidden("Thumbs.db"), is_hidden("cat.jpg")
    (True, True, False)
    """
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _SYSTEM


def suffix_of(name: str) -> str:
    """Return a file name's suffix, in lower case and with its dot, or ``no suffix``.

    >>> suffix_of("cat.JPG"), suffix_of("README")
    ('.jpg', 'no suffix')
    """
    stem, dot, ending = name.rpartition(".")
    return f".{ending.lower()}" if dot and stem and ending else NO_SUFFIX


def counted(left_out: Mapping[str, int]) -> str:
    """Say how many files and folders are left out, and of which types; nothing where there are none.

    >>> counted({".txt": 2, "hidden": 1})
    '3 files or folders are left out: 2 of types that are no images here (.txt 2), 1 hidden or of a system'

    Args:
        left_out: numbers by suffix, or by a reason of REASONS.
    """
    kinds = Counter(left_out)
    others = {reason: number for reason in REASONS if (number := kinds.pop(reason, 0))}
    parts = []
    if types := kinds.total():
        named = ", ".join(f"{suffix} {number}" for suffix, number in kinds.most_common(8))
        more = f" and {len(kinds) - 8} more types" if len(kinds) > 8 else ""
        parts.append(f"{types} of types that are no images here ({named}{more})")
    parts += [f"{number} {REASONS[reason]}" for reason, number in others.items()]
    return f"{types + sum(others.values())} files or folders are left out: {', '.join(parts)}" if parts else ""
