"""How estimators and methods are written for people."""

from __future__ import annotations

ESTIMATORS = {"random": "random", "x": "S_x", "w": "S_w", "a": "S_a", "a_plus_minus": "S_a+-"}
METHODS = {
    "random_order": "random order", "pattern_net": "PatternNet", "pattern_attribution": "PatternAttribution",
    "lrp_z": "LRP z-rule", "dtd_w2": "w²-rule", "gradient": "gradient", "deconvnet": "DeConvNet",
    "guided_backprop": "Guided BackProp", "integrated_gradients": "Integrated Gradients", "smoothgrad": "SmoothGrad",
    "occlusion": "occlusion", "prediction_difference": "prediction difference",
}  # fmt: skip


def plain(name: str) -> str:
    """An estimator's or a method's name in plain text; what comes after a comma stays."""
    first, *rest = name.split(",")
    return ",".join([ESTIMATORS.get(first) or METHODS.get(first, first), *rest])
