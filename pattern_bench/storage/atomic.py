"""Files that are whole or missing: each is written under another name and moved into place."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import safetensors


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that nobody ever sees half of it.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_file(file, lambda part: part.write_text("whole"))
    >>> file.read_text()
    'whole'

    Args:
        path: of the file, which replaces any that was there.
        write: makes the file under the path that it is given, beside ``path``.

    Raises:
        OSError: naming ``path``, where it cannot be written.
    """
    if path.exists() and not path.is_file():  # a device, say, which what is moved there would take the place of
        code, what = (errno.EISDIR, "it is a folder") if path.is_dir() else (errno.EINVAL, "it is no regular file")
        raise OSError(code, what, str(path))
    # One name for all who write this file, so that what a killed process leaves is written over by the next.
    name = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        name.unlink(missing_ok=True)
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = name.stat().st_mode
        write(name)
        # safetensors makes files that nobody else can read, whatever the umask.
        name.chmod(stat.S_IMODE(mode))
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            name.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        if isinstance(error, safetensors.SafetensorError):
            # Its number of what the disk refused stands in its words alone.
            number = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(number[1]) if number else None, str(error), str(path)) from error
        raise
