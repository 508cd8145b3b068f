"""The precision that networks are computed in.

Half precision cannot hold what is computed here: sums over a batch overflow at 65,504, and gradients vanish below 6e-8.
So a network in float16 or bfloat16 is computed as a copy in float32, and its images are brought to float32 too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pattern_bench.core.copies import copied


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 where it is floating point of less than 32 bits, otherwise the tensor itself.

    >>> [wide(torch.ones(1, dtype=kind)).dtype for kind in (torch.float16, torch.float64, torch.int8)]
    [torch.float32, torch.float64, torch.int8]
    """
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor


def is_wide(model: nn.Module) -> bool:
    """Return whether no parameter or buffer is in half precision.

    >>> is_wide(nn.Linear(2, 1)), is_wide(nn.Linear(2, 1).half())
    (True, False)
    """
    return all(wide(tensor) is tensor for tensor in (*model.parameters(), *model.buffers()))


def widen_(network: nn.Module) -> nn.Module:
    """Bring parameters and buffers in half precision to float32, in place, and return the network; float64 stays.

    >>> widen_(nn.Linear(2, 1).half()).weight.dtype
    torch.float32
    """
    return network._apply(wide)


def widened(model: nn.Module) -> nn.Module:
    """Return the model itself, or a copy in float32 where a parameter or buffer is in half precision.

    Raises:
        UserError: where a model in half precision cannot be copied.

    >>> model, half = nn.Linear(2, 1), nn.Linear(2, 1).half()
    >>> widened(model) is model, widened(half).weight.dtype, half.weight.dtype
    (True, torch.float32, torch.float16)
    """
    if is_wide(model):
        return model
    return widen_(copied(model))


def images_for(network: nn.Module, images: Tensor) -> Tensor:
    """Return images (B, ...) of any floating type in a type that the network takes.

    Unchanged where one of its parameters has their type; otherwise in the type of its first parameter; where it has
    none, in at least float32.

    >>> images_for(nn.Linear(2, 1).double(), torch.ones(1, 2)).dtype
    torch.float64
    """
    types = [parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()]
    if not types:
        return wide(images)
    return images if images.dtype in types else images.to(types[0])


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Compute networks in their own precision, with tensors that can have gradients, whatever ``torch.autocast`` and
    ``torch.inference_mode`` are active outside; a context manager.

    >>> with torch.inference_mode(), own_precision(torch.device("cpu")):
    ...     torch.ones(1).is_inference()
    False
    """
    with torch.inference_mode(False):
        if not torch.amp.is_autocast_available(device.type):
            yield
            return
        with torch.autocast(device.type, enabled=False):
            yield
