"""Copies of networks that leave the original as it was."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pattern_bench.core.network import refuse_training, refuse_without_weights, unwrapped
from pattern_bench.errors import UserError


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network, also of one whose weights are computed in hooks (pruning, weight norm).

    Raises:
        UserError: where the network cannot be copied.

    >>> model = nn.Linear(2, 1)
    >>> copied(model).weight is model.weight, torch.equal(copied(model).weight, model.weight)
    (False, True)
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


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, without gradients and without the wrappers of ``torch.compile``.

    Raises:
        UserError: where the network cannot be copied, is in training mode, was compiled by TorchScript, or lacks
            weights.

    >>> model = nn.Linear(2, 1).eval()
    >>> model.weight.requires_grad, plain_copy(model).weight.requires_grad
    (True, False)
    """
    model = unwrapped(model)
    name = type(model).__name__
    refuse_training(model)
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise UserError(
            f"model={name}: module {scripted[0] or 'the network itself'} is compiled by TorchScript, which hides its "
            "layers: give the Python module it was made from"
        )
    refuse_without_weights(model)
    network = copied(model)
    for module in list(network.modules()):
        network = with_replaced(network, module, unwrapped(module))
    return network.eval().requires_grad_(False)


def with_replaced(network: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` in the place of ``old`` wherever that is registered, under all of its names, and return the network:
    the same object, unless ``old`` is the network itself.

    >>> model = nn.Sequential(nn.Tanh(), nn.ReLU())
    >>> with_replaced(model, model[0], nn.Identity())
    Sequential(
      (0): Identity()
      (1): ReLU()
    )
    """
    if old is new:
        return network
    if old is network:
        return new
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if module is old:
            network.set_submodule(name, new)
    return network
