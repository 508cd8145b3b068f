"""What a model is to the suite, and how weights are read."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pattern_bench.core.network import without_weights
from pattern_bench.errors import UserError


@dataclass(frozen=True)
class Training:
    """How a model without weights is trained, once; the result is cached.

    ``epochs`` passes over the training images with Adam and a one-cycle schedule that peaks at ``learning_rate``.
    """

    epochs: int
    learning_rate: float
    batch_size: int


class ModelSource:
    """Base of the models. A new one is a subclass with ``module`` and a YAML file in ``conf/model``.

    Args:
        name: as it stands in the results.
        weights: a safetensors file or a state dict; None trains where ``training`` says how, or else leaves the
            random initialisation.
        training: the settings of :class:`Training`, or None.
        classifier: whether the outputs are logits of classes; without it nothing is explained or degraded.
        output: which of several outputs are the logits, a key or an index; None for the only one.
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
        if isinstance(output, bool) or not isinstance(output, str | int | None):
            raise UserError(f"model.output={output} is not possible: give the key or the index of an output, or null")
        self.training = None if training is None or weights is not None else Training(**training)

    def module(self, sample: Tensor, classes: int | None) -> nn.Module:
        """The network for inputs like ``sample`` (one image, no batch dimension), with random weights."""
        raise NotImplementedError

    def outputs(self, classes: int | None) -> dict[str, int]:
        """What a library's builder is told of the outputs: as many as there are classes, where the network is trained
        on them; else its own number stays."""
        return {} if self.training is None or classes is None else {"num_classes": classes}

    def build(self, sample: Tensor, classes: int | None) -> nn.Module:
        """The network with its weights.

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
        """The transform that the weights were trained with, or None where the data's own will do."""
        return None


def names_a_file(weights: str) -> bool:
    """Whether ``weights`` is meant as a file rather than the name of pretrained weights."""
    return Path(weights).suffix != "" or Path(weights).expanduser().exists()


def read_weights(file: str) -> dict[str, Tensor]:
    """Tensors by name, from a safetensors file or a state dict; nothing is unpickled but tensors.

    Raises:
        UserError: where the file is missing or is neither.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"model.weights={file} is not a file: give a safetensors file or a PyTorch state dict")
    kind = "safetensors" if path.suffix == ".safetensors" else "a state dict"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file fails wherever in safetensors, pickle, zip or torch its damage is met first.
    except Exception as error:
        raise UserError(
            f"model.weights={file} cannot be read as {kind}"
            f" ({str(error).splitlines()[0] if str(error) else type(error).__name__}): "
            "save it again with safetensors.torch.save_file(model.state_dict(), ...)"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        for key, tensor in state.items()
    ):
        raise UserError(f"model.weights={file} holds no state dict: save model.state_dict() and nothing else")
    return dict(state)


def _check_archive(path: Path) -> None:
    """torch.save does not compress, so a zip archive that holds more than its size is not its work, and may be made to
    fill the memory."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # what torch.load goes by; older state dicts are no archives
            return
    with zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
            raise ValueError("it unpacks to more than its own size")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], setting: str, name: str) -> None:
    """Copies ``weights`` into ``model`` in the model's precision.

    Raises:
        UserError: naming the keys that are missing, too many, or of another shape.
    """
    own = model.state_dict()
    # The batch counter of batch norm has no use in evaluation, and older files lack it.
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    extra = [key for key in weights if key not in own]
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    problems = [
        f"{what} {_some(keys)}"
        for what, keys in (("missing", missing), ("not in the model", extra), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise UserError(f"{setting} does not fit model={name}: {'; '.join(problems)}. Choose the model they belong to.")
    model.load_state_dict(weights, strict=False)


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def fingerprint(model: nn.Module) -> str:
    """Changes when the architecture or any weight does."""
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__} {model}".encode())
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
