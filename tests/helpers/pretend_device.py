"""A device that is none: its tensors lie on the host, and whatever forgets that they might not is an error.

``Pretend`` is a tensor that claims the device ``meta`` and wraps a tensor of the host. Within ``pretending()``, every
tensor that is made on, or moved to, ``meta`` is one, and an operation raises ``MixedDevices`` where it

- takes tensors of one dimension or more from both places,
- draws with a generator of the host for a tensor of the device, or
- asks a tensor of the device for its memory (``numpy()``).

What it computes is what the host computes, to the bit. Lightning moves modules and batches there and, when a loop ends,
modules back, as with a GPU. Indexing a tensor of the device by one of the host, which CUDA allows, is an error here: it
waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_MOVES = ("_to_copy", "copy_", "copy", "_local_scalar_dense", "_copy_from", "_has_compatible_shallow_copy_type")


class MixedDevicesError(RuntimeError):
    """What a GPU would have refused."""


class Pretend(torch.Tensor):
    """A tensor of the device, around one of the host."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=DEVICE, requires_grad=False, dispatch_device=True,
        )  # fmt: skip
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        raise MixedDevicesError("numpy() of a tensor of the device: call cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise MixedDevicesError("numpy() of a tensor of the device: call cpu() first")

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_indices(index), value)

    def tolist(self) -> Any:
        return self.host.tolist()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def new_tensor(self, data: Any, **settings: Any) -> Tensor:
        return self.host.new_tensor(data, **settings).to(DEVICE)

    def __deepcopy__(self, memo: Any) -> Any:
        if id(self) not in memo:
            made = Pretend(self.host.detach().clone()).requires_grad_(self.requires_grad)
            if hasattr(self, "_is_param"):
                made._is_param = self._is_param
            memo[id(self)] = made
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.detach().__reduce_ex__(protocol)

    def __format__(self, spec: str) -> str:
        return format(self.host, spec)

    def __repr__(self) -> str:
        return f"Pretend({self.host!r})"


def _indices(index: Any) -> Any:
    """Lists as tensors of the device, which torch would make without content there."""
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    return torch.tensor(index).to(DEVICE) if isinstance(index, list) else index


def _inner(value: Any) -> Any:
    if isinstance(value, Pretend):
        return value.host
    return torch.device("cpu") if isinstance(value, torch.device) and value == DEVICE else value


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation's result: on the device where its operands are, or where it was told to put it.

    Raises:
        MixedDevicesError: see the module's docstring.
    """
    name = func._schema.name.partition("::")[2]
    if name == "device" and "prim" in func._schema.name:
        return DEVICE
    operands = tree_flatten((args, kwargs))[0]
    here = [t for t in operands if isinstance(t, Pretend)]
    there = [t for t in operands if isinstance(t, Tensor) and not isinstance(t, Pretend) and t.ndim]
    if here and there and name not in _MOVES:
        raise MixedDevicesError(f"{func}: tensors of {[tuple(t.shape) for t in here]} are on the device and of "
                                f"{[tuple(t.shape) for t in there]} on the host")  # fmt: skip
    told = kwargs.get("device")
    on_device = bool(here) if told is None else torch.device(told) == DEVICE
    if name in ("copy_", "_local_scalar_dense"):
        on_device = isinstance(args[0], Pretend)
    if on_device and any(isinstance(value, torch.Generator) for value in operands):
        raise MixedDevicesError(f"{func}: a generator of the host draws for a tensor of the device")
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not on_device:
        return found
    known = {id(t.host): t for t in here}

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Pretend(value)

    return tree_map(outer, found)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class PretendAccelerator(Accelerator):
    """Lightning's view of the device."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE] * int(devices)

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "pretend"

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}


class _OnDevice(DDPStrategy):
    """DDP whose processes all have the device."""

    @property
    def root_device(self) -> torch.device:
        return DEVICE

    def determine_ddp_device_ids(self) -> None:
        return None

    def setup_distributed(self) -> None:
        with mock.patch.object(_OnDevice, "root_device", torch.device("cpu")):  # which gloo wants to know
            super().setup_distributed()


def _trainer(made: Any) -> Any:
    """A ``Trainer`` that takes the device for whatever it was asked for."""

    def make(*arguments: Any, **settings: Any) -> Any:
        strategy = settings.get("strategy", "auto")
        if isinstance(strategy, DDPStrategy):
            strategy = _OnDevice(timeout=strategy._timeout)
        else:
            strategy = SingleDeviceStrategy(DEVICE)
        settings |= {"accelerator": PretendAccelerator(), "strategy": strategy}
        return made(*arguments, **settings)

    return make


@contextlib.contextmanager
def pretending() -> Iterator[torch.device]:
    """Within, there is the device."""
    tensor, as_tensor, autocast, trainer = torch.tensor, torch.as_tensor, torch.autocast, pl.Trainer

    def elsewhere(make: Any) -> Any:
        def made(*arguments: Any, device: Any = None, **settings: Any) -> Tensor:
            if arguments and isinstance(arguments[0], Pretend):
                return arguments[0] if device is None else arguments[0].to(device)
            if device is None or torch.device(device) != DEVICE:
                return make(*arguments, device=device, **settings)
            return make(*arguments, **settings).to(DEVICE)

        return made

    class Autocast(autocast):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, **settings: Any) -> None:
            super().__init__("cpu" if device_type == DEVICE.type else device_type, **settings)

    with (
        mock.patch.object(torch, "tensor", elsewhere(tensor)),
        mock.patch.object(torch, "as_tensor", elsewhere(as_tensor)),
        mock.patch.object(torch, "autocast", Autocast),
        mock.patch.object(pl, "Trainer", _trainer(trainer)),
        _new_parameters(),
        _Mode(),
    ):
        yield DEVICE


@contextlib.contextmanager
def _new_parameters() -> Iterator[None]:
    """Within, a module that is moved or converted gets new parameters: what a wrapper wraps cannot be exchanged."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def run_there(cfg: Any, folder: Any) -> None:
    """The job on the device, in a process that is started for it."""
    from pattern_bench.pipeline.job import run

    with pretending():
        run(cfg, folder)
