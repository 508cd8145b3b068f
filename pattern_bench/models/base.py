"""The interface of models, and how weights are read."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pattern_bench.configuration.rules import (
    Rule,
    boolean,
    check_arguments,
    check_fields,
    is_whole,
    positive_number,
    text,
    whole_number,
)
from pattern_bench.core.network import without_weights
from pattern_bench.errors import UserError

log = logging.getLogger(__name__)

# Names that trainers give the network's state dict in a checkpoint, the first of which is taken; then averages of it.
_STATES = (
    "state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params", "model_state",
    "ema", "state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "params_ema",
)  # fmt: skip
# What wraps a module, anywhere in a network: torch.compile, DataParallel and DDP, FSDP, activation checkpointing.
_WRAPPERS = frozenset(("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_COUNTERS = ("num_batches_tracked", "n_averaged")
"""Of batch norm and of averaged weights: of no use in evaluation, and not in every file."""


@dataclass(frozen=True)
class Training:
    """How a model without weights is trained, once: with Adam and a one-cycle schedule. The result is cached.

    Attributes:
        epochs: passes over the training images.
        learning_rate: at the schedule's peak.
        batch_size: images in a batch.
    """

    epochs: int
    learning_rate: float
    batch_size: int


RULES = (
    text("model.name", "give a name"),
    text("model.weights", "give a file or the name of weights, or null for none", nullable=True),
    Rule("model.training", lambda how: isinstance(how, Mapping), "give epochs, learning_rate and batch_size, or null",
         nullable=True),
    boolean("model.classifier"),
    Rule("model.output", lambda output: isinstance(output, str) or is_whole(output),
         "give the key or the index of an output, or null", nullable=True),
)  # fmt: skip
TRAINING_RULES = (
    whole_number("model.training.epochs", 1),
    positive_number("model.training.learning_rate"),
    whole_number("model.training.batch_size", 1),
)
LIBRARY = (
    text("model.architecture", "give the name that the library has for it"),
    text("model.part", "give the name of a child module, or null for the whole network", nullable=True),
)
"""Of models of a library."""


class ModelSource:
    """Base of the models. A new one is a subclass with :meth:`module` and a YAML file in ``conf/model``.

    Args:
        name: as it stands in the results.
        weights: a safetensors file or a state dict; None trains where ``training`` says how, or else leaves the
            random initialisation.
        training: the settings of :class:`Training`, or None.
        classifier: whether the outputs are logits of classes; without it nothing is explained or degraded.
        output: which of several outputs are the logits, a key or an index; None for the only one.

    Raises:
        UserError: where one of these is not possible.
    """

    def __init__(
        self,
        *,
        name: str,
        weights: str | None,
        training: Mapping[str, Any] | None,
        classifier: bool = True,
        output: str | int | None = None,
    ) -> None:
        self.name, self.weights, self.classifier, self.output = name, weights, classifier, output
        check_arguments(RULES, name=name, weights=weights, training=training, classifier=classifier, output=output)
        if training is not None:
            check_fields("model.training", training, TRAINING_RULES)
        self.training = None if training is None or weights is not None else Training(**training)

    def module(self, sample: Tensor, classes: int | None) -> nn.Module:
        """Return the network with random weights.

        Args:
            sample: (C, ...), one image without a batch dimension, of the shape and type that the network is for.
            classes: number of the data's classes; None where they have none.

        Raises:
            UserError: where there is no such network.
        """
        raise NotImplementedError

    def outputs(self, classes: int | None) -> dict[str, int]:
        """Return the argument that sets the number of outputs in a library's builder: the number of classes, where the
        network is trained on them; nothing, where its own number stays."""
        return {} if self.training is None or classes is None else {"num_classes": classes}

    def build(self, sample: Tensor, classes: int | None) -> nn.Module:
        """Return the network with its weights.

        Args:
            sample: see :meth:`module`.
            classes: see :meth:`module`.

        Raises:
            UserError: where the weights cannot be read or do not fit.
        """
        model = self.module(sample, classes)
        if without_weights(model):
            with torch.no_grad():
                model.eval()(sample[None])
        if self.weights is not None:
            load_weights(model, read_weights(self.weights), f"model.weights={self.weights}", self.name)
        return model

    def transform(self) -> Callable[[Any], Tensor] | None:
        """Return the transform that the weights were trained with, from a PIL image to the input; None for the data's
        own."""
        return None


def names_a_file(weights: str) -> bool:
    """Whether ``weights`` stands for a file rather than for pretrained weights of a library.

    >>> names_a_file("net.safetensors"), names_a_file("IMAGENET1K_V1")
    (True, False)
    """
    return Path(weights).suffix != "" or os.path.exists(os.path.expanduser(weights))


def read_weights(file: str) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file, a state dict, or the state dict in a trainer's checkpoint.

    Nothing is unpickled but tensors, so that no file can run code.

    Args:
        file: its path.

    Raises:
        UserError: where the file is missing or is none of these.
    """
    path = Path(os.path.expanduser(file))  # Path's own raises where there is no such user
    if not path.is_file():
        raise UserError(f"model.weights={file} is not a file: give a safetensors file or a PyTorch state dict")
    kind = "safetensors" if path.suffix == ".safetensors" else "a state dict"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # of kinds of tensors, which load_weights judges
            state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file fails wherever in safetensors, pickle, zip or torch its damage comes up first.
    except Exception as error:
        raise UserError(
            f"model.weights={file} cannot be read as {kind} ({_why(path, error)}): "
            "save it again with safetensors.torch.save_file(model.state_dict(), ...)"
        ) from error
    candidates = list(_state_dicts(state, ""))
    if not candidates:
        raise UserError(f"model.weights={file} holds no state dict: save model.state_dict() and nothing else")
    name, chosen = candidates[0]
    if len(candidates) > 1:
        others = ", ".join(other for other, _ in candidates[1:])
        log.info("model.weights=%s: %s of the checkpoint is used; %s is left", file, name, others)
    return chosen


def _why(path: Path, error: Exception) -> str:
    """In one line, without torch's advice to run what the file says."""
    if "TorchScript" in str(error):
        return "a TorchScript program"
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no archive, or damaged
        objects = []
    if objects:
        return (
            f"besides tensors it holds {_some(sorted(objects))}: a whole pickled model, or a checkpoint with objects "
            "in it, and reading those could run code"
        )
    text = str(error).partition("\n")[0] or type(error).__name__
    return "reading it could run code" if text.startswith("Weights only load failed") else text


def _state_dicts(node: Any, name: str, depth: int = 3) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state dicts in the content of a file, the likeliest first, each after its name there."""
    if not isinstance(node, Mapping) or not node or not all(isinstance(key, str) for key in node):
        return
    if all(isinstance(value, Tensor) for value in node.values()):
        yield name, dict(node)
    elif depth:
        known = [key for key in _STATES if key in node]
        # By another name only where there is but one.
        for group in (known, [key for key in node if key not in known]):
            below = [
                state for key in group for state in _state_dicts(node[key], f"{name}.{key}".lstrip("."), depth - 1)
            ]
            if group is known or len(below) == 1:
                yield from below
            if below:
                return


def _check_archive(path: Path) -> None:
    """torch.save does not compress, so a zip archive that holds more than its size is not of its making, and may be
    there to fill the memory."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # what torch.load goes by; older state dicts are no archives
            return
    with zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
            raise ValueError("it unpacks to more than its own size")


def unwrapped(model: nn.Module, weights: Mapping[str, Tensor], setting: str) -> dict[str, Tensor]:
    """Return weights by the names that a model has for them.

    Prefixes of trainers and names of wrappers (DDP, torch.compile, FSDP, …) are taken off where the rest then has every
    weight of the model, and the log says which; otherwise the names stay.

    Args:
        model: the network.
        weights: by the names of a file.
        setting: that names the file, for the log.
    """
    needed = [key for key in model.state_dict() if not key.endswith(_COUNTERS)]
    if not needed or all(key in weights for key in needed):
        return dict(weights)
    plain = {key: _bare(key) for key in weights}
    own = {_bare(key): key for key in model.state_dict()}
    first = _bare(needed[0])
    prefixes = {name.removesuffix(first) for name in plain.values() if f".{name}".endswith(f".{first}")}
    fits = [prefix for prefix in prefixes if all(prefix + _bare(key) in plain.values() for key in needed)]
    if len(fits) != 1 or len(set(plain.values())) < len(plain) or len(own) < len(model.state_dict()):
        return dict(weights)
    (prefix,) = fits
    renamed, taken_off = {}, set[str]()
    for key, name in plain.items():
        below = name.removeprefix(prefix)
        renamed[own.get(below, below) if name.startswith(prefix) else key] = weights[key]
        taken_off |= {part for part in key.split(".") if part in _WRAPPERS}
    off = " and ".join([*([f"the prefix {prefix}"] if prefix else []), *sorted(taken_off)])
    log.info("%s: %s is taken off the names of the weights", setting, off or "nothing")
    return renamed


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], setting: str, name: str) -> None:
    """Copy weights into a model, in the model's precision, whatever trainers put before their names (see
    :func:`unwrapped`).

    Args:
        model: the network.
        weights: by name.
        setting: that names their file, for messages.
        name: of the model, for messages.

    Raises:
        UserError: naming the keys that are missing, too many, of another shape, or not in floating point.
    """
    weights = unwrapped(model, weights, setting)
    own = model.state_dict()
    missing = [key for key in own if key not in weights and not key.endswith(_COUNTERS)]
    extra = [key for key in weights if key not in own and not key.endswith(_COUNTERS)]
    both = [key for key in own if key in weights]
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in both
        if weights[key].shape != own[key].shape
    ]
    kinds = [f"{key} ({kind})" for key in both if (kind := _unlike(weights[key], own[key])) is not None]
    problems = [
        f"{what} {_some(keys)}"
        for what, keys in (("missing", missing), ("not in the model", extra), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise UserError(f"{setting} does not fit model={name}: {'; '.join(problems)}. Choose the model they belong to.")
    if kinds:
        raise UserError(
            f"{setting} has weights that are no plain real numbers in floating point: {_some(kinds)}. Give the weights "
            "from before they were quantised or packed, or turn them back and save them again"
        )
    model.load_state_dict({key: weights[key] for key in both}, strict=False)


def _unlike(weight: Tensor, own: Tensor) -> str | None:
    """Why a weight's values are not those of the network's tensor; None where copying them is all there is to do."""
    if weight.is_quantized:
        return "quantised"
    if weight.layout is not torch.strided:
        return "sparse"
    if weight.is_meta:
        return "without values"
    real = weight.is_floating_point() or (weight.is_complex() and own.is_complex())
    if (own.is_floating_point() or own.is_complex()) and not real:
        return str(weight.dtype).removeprefix("torch.")
    return None


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


PRINTED = ("torch", "torchvision", "timm", "pattern_bench")
"""Packages whose modules are known by their printed form, settings and version: no run of one changes their code."""


def fingerprint(model: nn.Module, settings: Mapping[str, Any] | None = None) -> str:
    """Return a hash of a network: its architecture, settings and weights, and the code of the user's own modules.

    >>> first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> fingerprint(first) == fingerprint(second)
    False
    >>> second.load_state_dict(first.state_dict())
    <All keys matched successfully>
    >>> fingerprint(first) == fingerprint(second)
    True

    Args:
        model: the network.
        settings: of the model, which neither its printed form nor its weights may show.
    """
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__} {model}".encode())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    own = {kind for module in model.modules() for kind in type(module).__mro__}
    for file in sorted({file for kind in own if (file := _file_of(kind)) is not None}):
        digest.update(file.read_bytes())
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _file_of(kind: type) -> Path | None:
    """The file with the code of a class, where that is the user's own."""
    if kind.__module__.partition(".")[0] in (*PRINTED, "builtins"):
        return None
    try:
        file = Path(inspect.getfile(kind))
    except (TypeError, OSError):  # made in an interactive session
        return None
    return file if file.is_file() else None
