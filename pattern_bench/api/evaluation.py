"""The criterion of the paper, for every neuron."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pattern_bench.api.arguments import check_patterns, number, whole
from pattern_bench.api.moments import LayerMoments, check_moments, check_moments_given
from pattern_bench.api.networks import canonical_form, in_own_precision
from pattern_bench.api.patterns import Patterns, changed
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.moments import MEMORY
from pattern_bench.core.probe_closed_form import CLOSED_FORM, MOST_REGULARISATION, Probe, Target, rho
from pattern_bench.core.rounding import float32_products
from pattern_bench.errors import UserError, told


@float32_products()
@in_own_precision
def evaluate(
    model: nn.Module,
    patterns: Mapping[str, Pattern],
    probe: LayerMoments,
    test: LayerMoments,
    criterion: str = "all",
    *,
    regularisation: float = 1e-4,
    memory: int = MEMORY,
) -> dict[str, Tensor]:
    """Measure ρ(S) = 1 - max corr(y, vᵀd) of every neuron (Kindermans et al. 2018, Eq. 1), in closed form
    (``core.probe_closed_form``).

    The filter (1, -1) below answers y, and cancels the distractor e of x = (y + e, e). S_a leaves nothing of y in its
    residual d, while S_w leaves (y/2 + e) (1, 1), whose correlation with y is 1/√5.

    >>> import pattern_bench as pb
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).eval()
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    >>> images = torch.tensor([[2.0, 1.0], [0.0, -1.0], [0.0, 1.0], [-2.0, -1.0]])
    >>> moments = pb.collect_moments(model, [images])
    >>> fitted = [pb.fit_patterns(model, moments, estimator) for estimator in ("a", "w")]
    >>> [round(float(pb.evaluate(model, patterns, moments, moments)["0"]), 3) for patterns in fitted]
    [1.0, 0.553]

    Args:
        model: the network that patterns and moments belong to.
        patterns: by layer.
        probe: moments with Gram matrices, of the images that v is fitted on.
        test: the same, of other images, that ρ is measured on.
        criterion: ``all`` or ``rectified``.
        regularisation: λ as a multiple of Σ's mean diagonal, up to 10,000.
        memory: bytes for temporaries.

    Returns:
        By layer, one value per neuron (N,); NaN for dead neurons.

    Raises:
        UserError: where a layer's moments are missing, have no Gram matrix or belong to another network or other
            weights, or the criterion is another.
    """
    if not isinstance(criterion, str) or criterion not in CLOSED_FORM:
        shown = told(criterion, quoted=False)
        raise UserError(f"criterion={shown} is not measured here: give one of {', '.join(CLOSED_FORM)}")
    regularisation = number("regularisation", regularisation, 0, MOST_REGULARISATION)
    memory = whole("memory", memory, 1)
    check_moments_given("probe", probe)
    check_moments_given("test", test)
    check_patterns(patterns)
    if not patterns:
        raise UserError("patterns has none: give what pb.fit_patterns returned")
    network, values = canonical_form(model, probe.example), {}
    check_moments(model, network, {"probe": probe, "test": test})
    if isinstance(patterns, Patterns) and (what := changed(patterns, model)):
        raise UserError(f"patterns: {what} than when they were fitted: fit them again, or give the network of then")
    for name, pattern in patterns.items():
        _check_layer(name, pattern, probe, test)
        bias: Any = network.get_submodule(name).bias
        target = Target(criterion, None if bias is None else bias.detach().double())
        flat = Pattern(pattern.positive.flatten(1).double(), pattern.negative.flatten(1).double(), pattern.dead)
        try:
            direction = Probe(probe[name], regularisation, memory).direction(flat, target)
        except ValueError as error:
            raise UserError(f"layer {name}: {error}") from error
        values[name] = rho(direction, test[name], flat, target, memory).masked_fill(pattern.dead, torch.nan)
    return values


def _check_layer(name: str, pattern: Pattern, probe: LayerMoments, test: LayerMoments) -> None:
    """
    Raises:
        UserError: where the moments of the layer ``name`` are missing or do not fit its pattern.
    """
    for setting, moments in (("probe", probe), ("test", test)):
        if name not in moments:
            raise UserError(f"{setting} has no moments of layer {name}: collect them with layers=None")
        if moments[name].gram is None:
            raise UserError(f"{setting} has no Gram matrix of layer {name}: collect it with gram=True")
    if pattern.positive.flatten(1).shape != probe[name].xg.shape:
        raise UserError(
            f"patterns: that of layer {name} has shape {tuple(pattern.positive.shape)}, and the layer "
            f"{probe[name].xg.shape[0]} neurons with {probe[name].xg.shape[1]} inputs: give this network's"
        )
