"""The suite from Python: statistics, patterns, ρ, explanations and degradation of any network, in a few calls.

What stands in ``pattern_bench.__all__`` is exported by ``pattern_bench`` itself: ``import pattern_bench as pb``.
"""

from pattern_bench.api.curves import RANDOM_ORDER, degradation
from pattern_bench.api.evaluation import evaluate
from pattern_bench.api.explanations import PatternAttribution, PatternNet
from pattern_bench.api.moments import LayerMoments, collect_moments
from pattern_bench.api.networks import canonical_form
from pattern_bench.api.patterns import ESTIMATORS, Patterns, fit_patterns, load_patterns
from pattern_bench.api.pictures import draw_gallery
from pattern_bench.core.estimators import Estimator, Pattern
from pattern_bench.core.moments import Moments
from pattern_bench.core.outputs import Logits
from pattern_bench.errors import UserError
from pattern_bench.methods.base import Method

__all__ = [
    "ESTIMATORS",
    "RANDOM_ORDER",
    "Estimator",
    "LayerMoments",
    "Logits",
    "Method",
    "Moments",
    "Pattern",
    "PatternAttribution",
    "PatternNet",
    "Patterns",
    "UserError",
    "canonical_form",
    "collect_moments",
    "degradation",
    "draw_gallery",
    "evaluate",
    "fit_patterns",
    "load_patterns",
]
