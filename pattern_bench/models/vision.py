"""torchvision's classification models by name, whole or a part of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision import models

from pattern_bench.configuration.rules import check_arguments
from pattern_bench.errors import UserError, did_you_mean
from pattern_bench.models.base import LIBRARY, ModelSource, load_weights, names_a_file, read_weights, unwrapped

# What torchvision's own builders set, besides the weights, when they are given weights.
_WITH_WEIGHTS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
    "inception_v3": {"transform_input": True, "aux_logits": False, "init_weights": False},
}
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


class TorchvisionModel(ModelSource):
    """A model of ``torchvision.models``.

    Args:
        architecture: its name there, such as ``resnet18``.
        weights: a member of the model's weights enum (``DEFAULT``, ``IMAGENET1K_V1``; downloaded by torch.hub), a
            file, or None for random weights.
        part: keep only this child module, such as ``features``; layer names and weight keys stay as they are.

    Raises:
        UserError: where torchvision has no such architecture or weights.
    """

    def __init__(self, *, architecture: str, weights: str | None, part: str | None, **common: Any) -> None:
        check_arguments(LIBRARY, architecture=architecture, part=part)
        super().__init__(weights=weights, **common)
        known = models.list_models(module=models)
        if architecture not in known:
            raise UserError(
                f"model.architecture={architecture} is no classification model of torchvision: "
                f"{did_you_mean(architecture, known)}"
            )
        self.architecture, self.part = architecture, part
        self.enum = models.get_model_weights(architecture)
        self.is_file = weights is not None and names_a_file(weights)
        if weights is not None and not self.is_file and weights != "DEFAULT" and weights not in self.enum.__members__:
            raise UserError(
                f"model.weights={weights} is neither a file nor weights of {architecture}: "
                f"choose from {', '.join(self.enum.__members__)}, a file, or null for random weights"
            )

    def module(self, sample: Tensor, classes: int | None) -> nn.Module:
        extra = _WITH_WEIGHTS.get(self.architecture, {}) if self.weights is not None else {}
        if self.architecture in _WITH_WEIGHTS and self.training is not None:
            extra = {"aux_logits": False}  # which need images of the size that the network was designed for
        # Weights that come from elsewhere need no initialisation, which takes seconds for the large models.
        with torch.device("meta" if self.weights is not None else "cpu"):
            model = models.get_model(self.architecture, weights=None, **extra, **self.outputs(classes))
        if self.part is not None:
            if self.part not in dict(model.named_children()):
                raise UserError(
                    f"model.part={self.part} is no part of {self.architecture}: "
                    f"{did_you_mean(self.part, [name for name, _ in model.named_children()])}"
                )
            model = nn.Sequential(OrderedDict([(self.part, model.get_submodule(self.part))]))
        return model

    def build(self, sample: Tensor, classes: int | None) -> nn.Module:
        model = self.module(sample, classes)
        if self.weights is None:
            return model
        state = read_weights(self.weights) if self.is_file else self._download()
        state = unwrapped(model, state, f"model.weights={self.weights}")
        if self.part is not None:
            state = {key: tensor for key, tensor in state.items() if key.startswith(f"{self.part}.")}
        if self.architecture in _WITH_WEIGHTS:
            state = {key: tensor for key, tensor in state.items() if not key.startswith(_AUXILIARY)}
        model = model.to_empty(device="cpu")
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_batches_tracked is not None:
                module.num_batches_tracked.zero_()
        load_weights(model, state, f"model.weights={self.weights}", self.name)
        return model

    def _download(self) -> Mapping[str, Tensor]:
        weights = self.enum[self.weights]
        try:
            return torch.hub.load_state_dict_from_url(
                weights.url, map_location="cpu", check_hash=True, weights_only=True
            )
        except (URLError, OSError) as error:
            raise UserError(
                f"model.weights={self.weights} cannot be downloaded ({error}): "
                "give a file instead (model.weights=FILE), or null for random weights"
            ) from error

    def transform(self) -> Callable[[Any], Tensor] | None:
        if self.weights is None:
            return None
        return (self.enum.DEFAULT if self.is_file else self.enum[self.weights]).transforms()
