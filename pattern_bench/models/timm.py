"""timm's image models by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pattern_bench.configuration.rules import check_arguments
from pattern_bench.errors import UserError, did_you_mean
from pattern_bench.models.base import LIBRARY, ModelSource, names_a_file


class TimmModel(ModelSource):
    """A model of the optional package ``timm``.

    Args:
        architecture: its name there, such as ``resnet18``, without a pretrained tag.
        weights: a pretrained tag (``a1_in1k``) or ``DEFAULT``, downloaded by timm; a file; or None for random weights.

    Raises:
        UserError: where timm is missing, or has no such architecture or weights.
    """

    def __init__(self, *, architecture: str, weights: str | None, **common: Any) -> None:
        check_arguments(LIBRARY, architecture=architecture)
        super().__init__(weights=weights, **common)
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError as error:
            raise UserError(
                f"model.architecture={architecture} needs the package timm, which cannot be imported ({error}): "
                "pip install 'pattern_bench[timm]'"
            ) from error
        known = timm.list_models()
        if architecture not in known:
            raise UserError(
                f"model.architecture={architecture} is no model of timm: {did_you_mean(architecture, known)}"
            )
        self.architecture = architecture
        self.is_file = weights is not None and names_a_file(weights)
        self.full_name = architecture
        if weights is None or self.is_file:
            return
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
        if weights not in ["DEFAULT", *tags] or not tags:
            choices = ", ".join([*(["DEFAULT"] if tags else []), *tags, "a file", "or null for random weights"])
            raise UserError(
                f"model.weights={weights} is neither a file nor pretrained weights of timm's {architecture}: "
                f"choose from {choices}"
            )
        if weights != "DEFAULT":
            self.full_name = f"{architecture}.{weights}"

    def module(self, sample: Tensor, classes: int | None) -> nn.Module:
        return importlib.import_module("timm").create_model(
            self.architecture, pretrained=False, **self.outputs(classes)
        )

    def build(self, sample: Tensor, classes: int | None) -> nn.Module:
        if self.weights is None or self.is_file:
            return super().build(sample, classes)
        try:
            return importlib.import_module("timm").create_model(self.full_name, pretrained=True)
        # timm downloads through several libraries, each with errors of its own.
        except Exception as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"model.weights={self.weights} of timm's {self.architecture} cannot be downloaded ({why}): "
                "give a file instead (model.weights=FILE), or null for random weights"
            ) from error

    def transform(self) -> Callable[[Any], Tensor] | None:
        if self.weights is None:
            return None
        data, models = importlib.import_module("timm.data"), importlib.import_module("timm.models")
        settings = models.get_pretrained_cfg(self.full_name).to_dict()
        return data.create_transform(**data.resolve_data_config(pretrained_cfg=settings), is_training=False)
