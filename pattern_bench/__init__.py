"""pattern_bench: tells which explanation of a neural network to believe. ``import pattern_bench as pb``."""

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


def __getattr__(name: str) -> Any:
    # The command line must answer --help without importing torch.
    if name in __all__:
        from pattern_bench import api

        return getattr(api, name)
    raise AttributeError(f"module 'pattern_bench' has no attribute {name!r}")
