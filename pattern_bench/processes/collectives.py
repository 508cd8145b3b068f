"""The processes of one job: which this is, and what they tell each other. Alone, a process tells itself nothing.

All that is ever exchanged are tensors: sums that add up, and tables of which every process fills the rows it knows.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

VALUES_AT_ONCE = 2**22
"""The exchange takes a copy of what it sums, and a Gram matrix can have gigabytes."""


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if _together() else 0


def size() -> int:
    """How many processes the job has."""
    return distributed.get_world_size() if _together() else 1


def first() -> bool:
    """Whether this process writes the results."""
    return rank() == 0


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in every process; where there is but one, the tensor itself."""
    if size() > 1:
        there = _within_reach(tensor)
        distributed.all_reduce(there)
        tensor = there.to(tensor.device)
    return tensor


def total_in_first(tensor: Tensor) -> Tensor:
    """The sum over all processes, in the first; elsewhere what is left is of no use."""
    if size() > 1:
        there = _within_reach(tensor)
        for part in there.view(-1).split(VALUES_AT_ONCE):
            distributed.reduce(part, dst=0)
        tensor = there.to(tensor.device)
    return tensor


def from_first(tensor: Tensor) -> Tensor:
    """The first process's tensor, in every process; shapes and types must agree."""
    if size() > 1:
        there = _within_reach(tensor)
        distributed.broadcast(there, src=0)
        tensor = there.to(tensor.device)
    return tensor


def text_from_any(text: str) -> str:
    """The text of the lowest-numbered process that has one, in every process."""
    if size() == 1:
        return text
    lengths = torch.zeros(size(), dtype=torch.int64)
    lengths[rank()] = len(text.encode())
    lengths = total(lengths)
    if not lengths.any():
        return ""
    speaker = int(lengths.nonzero()[0])
    content = torch.zeros(int(lengths[speaker]), dtype=torch.int32)
    if rank() == speaker:
        content = torch.tensor(list(text.encode()), dtype=torch.int32)
    return bytes(total(content).tolist()).decode()


def wait() -> None:
    """Returns when every process has come here."""
    if size() > 1:
        total(torch.zeros(()))


def _within_reach(tensor: Tensor) -> Tensor:
    """The tensor where the processes can exchange it: NCCL knows nothing but GPUs."""
    tensor = tensor.contiguous()
    return tensor.cuda() if distributed.get_backend() == "nccl" and not tensor.is_cuda else tensor
