"""Collectives of ``torch.distributed`` that do nothing in a process that is alone.

All that processes ever exchange are tensors: sums that add up, and tables of which every process fills the rows it
knows. Every process of a job must call the same collectives in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

VALUES_AT_ONCE = 2**22
"""Values of one reduction: it takes a copy of what it sums, and a Gram matrix can have gigabytes."""


def rank() -> int:
    """Return the number of this process, from 0.

    >>> rank(), world_size(), is_rank_zero()
    (0, 1, True)
    """
    return distributed.get_rank() if _together() else 0


def world_size() -> int:
    """Return the number of processes of the job."""
    return distributed.get_world_size() if _together() else 1


def is_rank_zero() -> bool:
    """Whether this process is the one that writes the results."""
    return rank() == 0


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def all_reduce(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, in every process.

    Args:
        tensor: of the same shape and type in all of them; alone, it is returned as it is.
    """
    if world_size() > 1:
        near = _within_reach(tensor)
        distributed.all_reduce(near)
        tensor = near.to(tensor.device)
    return tensor


def reduce(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, in rank 0; in the others, the returned values mean nothing.

    Args:
        tensor: of the same shape and type in all of them; alone, it is returned as it is.
    """
    if world_size() > 1:
        near = _within_reach(tensor)
        for part in near.view(-1).split(VALUES_AT_ONCE):
            distributed.reduce(part, dst=0)
        tensor = near.to(tensor.device)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Return the tensor of rank 0, in every process.

    Args:
        tensor: of the same shape and type in all of them; alone, it is returned as it is.
    """
    if world_size() > 1:
        near = _within_reach(tensor)
        distributed.broadcast(near, src=0)
        tensor = near.to(tensor.device)
    return tensor


def broadcast_text(text: str) -> str:
    """Return the text of the process of the lowest rank that has one, in every process.

    Args:
        text: empty where this process has none.
    """
    if world_size() == 1:
        return text
    lengths = torch.zeros(world_size(), dtype=torch.int64)
    lengths[rank()] = len(text.encode())
    lengths = all_reduce(lengths)
    if not lengths.any():
        return ""
    source = int(lengths.nonzero()[0])
    content = torch.zeros(int(lengths[source]), dtype=torch.int32)
    if rank() == source:
        content = torch.tensor(list(text.encode()), dtype=torch.int32)
    return bytes(all_reduce(content).tolist()).decode()


def barrier() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        all_reduce(torch.zeros(()))


def _within_reach(tensor: Tensor) -> Tensor:
    """The tensor where the processes can exchange it: NCCL knows nothing but GPUs."""
    tensor = tensor.contiguous()
    return tensor.cuda() if distributed.get_backend() == "nccl" and not tensor.is_cuda else tensor
