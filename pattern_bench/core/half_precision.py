"""The precision that networks are computed in.

Half precision cannot hold what the suite computes: sums over a batch overflow at 65,504, and what is propagated back
vanishes below 6e-8. So a network in float16 or bfloat16 is computed as a copy in float32, and so are its images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pattern_bench.errors import UserError


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it is in half precision or less, otherwise itself."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor


def is_wide(model: nn.Module) -> bool:
    """Whether none of the parameters and buffers is in half precision."""
    return all(wide(tensor) is tensor for tensor in (*model.parameters(), *model.buffers()))


def widen_(network: nn.Module) -> nn.Module:
    """Brings, in place, what is in half precision to float32; float64 stays."""
    return network._apply(wide)


def widened(model: nn.Module) -> nn.Module:
    """The model itself, or a copy in float32 where a parameter or buffer is in half precision.

    Raises:
        UserError: where such a model cannot be copied.
    """
    if is_wide(model):
        return model
    return widen_(copied(model))


def copied(model: nn.Module) -> nn.Module:
    """
    Raises:
        UserError: where the network cannot be copied.
    """
    # Weights that pruning, weight norm and spectral norm compute in hooks are part of an autograd graph, and computed
    # anew in each forward pass: what they are now is enough of a copy.
    computed = {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for tensor in vars(module).values()
        if isinstance(tensor, Tensor) and not tensor.is_leaf
    }
    try:
        return copy.deepcopy(model, computed)
    except RuntimeError as error:  # other tensors that are part of an autograd graph
        raise UserError(
            f"model={type(model).__name__} cannot be copied ({str(error).splitlines()[0]}): take away the tensors that "
            "it keeps of a forward pass"
        ) from error


def images_for(network: nn.Module, images: Tensor) -> Tensor:
    """Images (B, ...) of any floating type as the network takes them: unchanged where one of its parameters has their
    type, otherwise as its first parameter; at least float32 where it has none."""
    types = [parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()]
    if not types:
        return wide(images)
    return images if images.dtype in types else images.to(types[0])


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Within, networks are computed in their own precision and with tensors that can have gradients, whatever
    ``torch.autocast`` and ``torch.inference_mode`` are active outside."""
    with torch.inference_mode(False):
        if not torch.amp.is_autocast_available(device.type):
            yield
            return
        with torch.autocast(device.type, enabled=False):
            yield
