"""pattern_bench: tells which explanation of a neural network to believe. ``import pattern_bench as pb``."""

import importlib
from typing import Any

# Loaded when asked for; in the order of their use.
__all__ = [
    "Logits",
    "PatternAttribution",
    "PatternNet",
    "collect_moments",
    "degradation",
    "draw_gallery",
    "evaluate",
    "fit_patterns",
    "load_patterns",
]

_MOVED = {module: f"pattern_bench.commands.{module}" for module in ("resume_hint", "sweep_table")}
"""Modules that configurations of earlier versions name, by ``hydra.callbacks``."""


def __getattr__(name: str) -> Any:
    # The command line must answer --help without importing torch.
    if name in __all__:
        from pattern_bench import api

        return getattr(api, name)
    if name in _MOVED:
        return importlib.import_module(_MOVED[name])
    raise AttributeError(f"module 'pattern_bench' has no attribute {name!r}")
