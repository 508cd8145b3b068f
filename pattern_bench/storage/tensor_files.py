"""Files of tensors. They carry a checksum, so that damage done to them later is noticed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from pattern_bench.storage.atomic import write_file

log = logging.getLogger(__name__)
CHECKSUM = "checksum"


class Damaged(ValueError):
    """A file of tensors that cannot be read, or holds something else than was written. The message says what."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a checksum in its metadata.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> write_tensors(file, {"a": torch.ones(2)}, {"seed": "0"})
    >>> read_tensors(file)
    ({'a': tensor([1., 1.])}, {'seed': '0'})

    Args:
        path: of the file, which replaces any that was there.
        tensors: by name, of any device.
        metadata: text by name.

    Raises:
        OSError: naming ``path``, where it cannot be written.
    """
    content: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        content[name] = tensor.detach().cpu().contiguous()
        storage = content[name].untyped_storage().data_ptr()
        if storage in storages:  # safetensors refuses it; a₊ and a₋ of an estimator with one regime may be the same
            content[name] = content[name].clone()
        storages.add(storage)
    signed = {**metadata, CHECKSUM: checksum(content, metadata)}
    write_file(path, lambda file: save_file(content, file, signed))


def read_tensors(path: Path, *, unsigned: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a file of :func:`write_tensors`, as they were written.

    Args:
        path: the file.
        unsigned: whether a file without a checksum, of an earlier version or another program, will do; its content is
            then taken as it is, and the log says so.

    Raises:
        FileNotFoundError: where there is no file.
        Damaged: where it is not whole, not what was written, or no safetensors file at all.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors' own, and torch's for what safetensors lets pass
        raise Damaged(str(error).partition("\n")[0] or type(error).__name__) from error
    said = metadata.pop(CHECKSUM, None)
    if said is None:
        if not unsigned:
            raise Damaged("it has no checksum")
        log.warning("%s has no checksum, so damage to it would not be noticed", path)
    elif said != checksum(tensors, metadata):
        raise Damaged("its content does not match its checksum")
    return tensors, metadata


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a checksum of the tensors' names, types, shapes and bytes, and of the metadata.

    Args:
        tensors: by name.
        metadata: text by name.
    """
    ordered = sorted(tensors.items())
    about = [sorted(metadata.items()), [[name, str(tensor.dtype), [*tensor.shape]] for name, tensor in ordered]]
    digest = hashlib.sha256(json.dumps(about).encode())
    for _, tensor in ordered:
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
