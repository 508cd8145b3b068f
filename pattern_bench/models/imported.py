"""Any network class by its import path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pattern_bench.configuration.importing import import_object
from pattern_bench.configuration.rules import Rule, check_arguments, text
from pattern_bench.errors import UserError
from pattern_bench.models.base import ModelSource

RULES = (
    text("model.path", "give package.module.Class"),
    Rule("model.arguments", lambda given: isinstance(given, Mapping), "give keyword arguments, or {} for none"),
)


class ImportedModel(ModelSource):
    """A network of the user's own.

    Args:
        path: ``package.module.Class``, a class or function that returns an ``nn.Module``. A configuration must say
            ``allow_any_target: true`` for what ``pattern_bench.configuration.build.build`` would not build itself.
        arguments: keyword arguments for it.

    Raises:
        UserError: where ``path`` cannot be imported, or an argument is not possible.
    """

    def __init__(self, *, path: str, arguments: Mapping[str, Any], **common: Any) -> None:
        check_arguments(RULES, path=path, arguments=arguments)
        super().__init__(**common)
        self.path, self.arguments = path, dict(arguments)
        self.factory = import_object("model.path", path)

    def module(self, sample: Tensor, classes: int | None) -> nn.Module:
        try:
            model = self.factory(**self.arguments)
        except TypeError as error:
            raise UserError(
                f"model.path={self.path} does not take model.arguments={self.arguments}: {error}"
            ) from error
        if not isinstance(model, nn.Module):
            raise UserError(f"model.path={self.path} gave a {type(model).__name__}, not a torch.nn.Module")
        return model
