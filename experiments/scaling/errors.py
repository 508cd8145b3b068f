"""How far patterns and ρ from few images, or from sampled positions, are from those of all.

Moments add up: those of every chunk of images are collected once, and any number of images is a sum of chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import pattern_bench as pb
from experiments.neurons import over_same_neurons
from pattern_bench.api import LayerMoments, Pattern
from pattern_bench.engine.streams import fast_layout

CHUNK = 10
"""Images that are added or left out together."""
ESTIMATORS = ("w", "a", "a_plus_minus")
CRITERIA = ("all", "rectified")
SHARES = (0.5, 0.25, 0.1, 0.05)
Vectors = Mapping[str, Mapping[str, Tensor]]
"""By layer and name, ``a``, ``a₊`` or ``a₋`` (N, D), NaN for neurons without it."""


def collected(network: nn.Module, chunks: Sequence[Tensor], **settings: Any) -> list[LayerMoments]:
    """Moments of each chunk of images (B, C, H, W)."""
    return [pb.collect_moments(network, [fast_layout(images)], **settings) for images in chunks]


def without_gram(moments: LayerMoments) -> LayerMoments:
    """The sums that patterns need, not a copy."""
    kept = {}
    for layer, sums in moments.items():
        tensors = sums.tensors()
        tensors.pop("gram", None)
        kept[layer] = type(sums)(**tensors)
    return LayerMoments(kept, moments.example)


def total(chunks: Sequence[LayerMoments]) -> LayerMoments:
    """The sums over all chunks."""
    for sums in running(chunks):
        found = sums
    return found


def running(chunks: Sequence[LayerMoments]) -> Iterator[LayerMoments]:
    """The sums over the first chunk, the first two, and so on: the same object, which goes on changing."""
    sums = LayerMoments({layer: own.times(1.0) for layer, own in chunks[0].items()}, chunks[0].example)
    yield sums
    for chunk in chunks[1:]:
        for layer, own in sums.items():
            own.add_(chunk[layer])
        yield sums


def vectors(network: nn.Module, moments: LayerMoments) -> Vectors:
    """S_a's and S_a+-'s patterns."""

    def defined(part: Tensor, dead: Tensor) -> Tensor:
        return part.flatten(1).double().masked_fill(dead[:, None], torch.nan)

    linear, regimes = (pb.fit_patterns(network, moments, name) for name in ("a", "a_plus_minus"))
    return {
        layer: {
            "a": defined(linear[layer].positive, linear[layer].dead),
            "a₊": defined(regimes[layer].positive, regimes[layer].dead),
            "a₋": defined(regimes[layer].negative, regimes[layer].dead),
        }
        for layer in moments
    }


def relative(found: Vectors, other: Vectors, truth: Vectors) -> Iterator[tuple[str, str, float]]:
    """By layer and pattern, |found - other| / |truth|, the median over neurons that have all three."""
    for layer, parts in truth.items():
        for name, true in parts.items():
            distance = (found[layer][name] - other[layer][name]).norm(dim=1) / true.norm(dim=1)
            yield layer, name, float(distance.nanmedian())


def pattern_errors(
    network: nn.Module, chunks: Sequence[LayerMoments], counts: Sequence[int], draws: int, seed: int = 0
) -> pd.DataFrame:
    """Errors of patterns from n images, n up to half of all.

    ``full``: against the fit of all images, of which the n are a part. ``disjoint``: between two fits of n images each
    that have none in common.

    Returns:
        Columns ``draw, n, layer, pattern, full, disjoint``.
    """
    truth = vectors(network, total(chunks))
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for draw in range(draws):
        order = [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()]
        middle = len(order) // 2
        for number, (one, other) in enumerate(zip(running(order[:middle]), running(order[middle:]), strict=True), 1):
            if (n := number * CHUNK) not in counts:
                continue
            found, apart = vectors(network, one), vectors(network, other)
            full, disjoint = relative(found, truth, truth), relative(found, apart, truth)
            rows += [
                {"draw": draw, "n": n, "layer": layer, "pattern": name, "full": error, "disjoint": difference}
                for (layer, name, error), (_, _, difference) in zip(full, disjoint, strict=True)
            ]
    return pd.DataFrame(rows)


def rhos(
    network: nn.Module, fit: LayerMoments, probe: LayerMoments, test: LayerMoments
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """ρ of every neuron by estimator and criterion, and layer."""
    patterns: dict[str, Mapping[str, Pattern]] = {name: pb.fit_patterns(network, fit, name) for name in ESTIMATORS}
    return {
        (name, criterion): pb.evaluate(network, patterns[name], probe, test, criterion)
        for name in ESTIMATORS
        for criterion in CRITERIA
    }


def rho_rows(found: Any, truth: Any, **common: Any) -> list[dict[str, Any]]:
    """By estimator, criterion and layer: the median over neurons of |ρ - ρ_truth| as ``off``, the mean of ρ - ρ_truth
    as ``shift``, and the median of ρ as ``rho``; of the neurons that are live under all estimators, found and true."""
    rows = []
    pairs = {(what, *key): layers for what, side in (("found", found), ("true", truth)) for key, layers in side.items()}
    compared = over_same_neurons(pairs)
    for estimator, criterion in truth:
        for layer, true in compared["true", estimator, criterion].items():
            rho = compared["found", estimator, criterion][layer]
            rows.append(
                {**common, "estimator": estimator, "criterion": criterion, "layer": layer,
                 "off": float((rho - true).abs().nanmedian()), "shift": float((rho - true).nanmean()),
                 "rho": float(rho.nanmedian())}
            )  # fmt: skip
    return rows


def rho_errors(
    network: nn.Module,
    fit: Sequence[LayerMoments],
    probe: Sequence[LayerMoments],
    test: LayerMoments,
    counts: Sequence[int],
    draws: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Errors of ρ with patterns from n images and v from n others, against all of both; always measured on ``test``.

    Returns:
        Columns ``draw, n, estimator, criterion, layer, off, shift, rho``.
    """
    plain = [without_gram(chunk) for chunk in fit]
    truth = rhos(network, total(plain), total(probe), test)
    rows = rho_rows(truth, truth, draw=0, n=len(probe) * CHUNK)
    generator = torch.Generator().manual_seed(seed)
    for draw in range(draws):
        fits, probes = (
            [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()] for chunks in (plain, probe)
        )
        for number, sums in enumerate(zip(running(fits), running(probes), strict=True), 1):
            if (n := number * CHUNK) in counts and number < len(probe):
                rows += rho_rows(rhos(network, *sums, test), truth, draw=draw, n=n)
    return pd.DataFrame(rows)


def position_errors(
    network: nn.Module,
    fit: Sequence[Tensor],
    probe: Sequence[Tensor],
    exact: tuple[LayerMoments, LayerMoments],
    test: LayerMoments,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Errors of patterns and ρ from sampled positions, against all positions of the same images.

    Args:
        network: see there.
        fit: batches of images for the patterns.
        probe: batches of images for v.
        exact: moments of ``fit`` and of ``probe`` over all positions.
        test: moments that ρ is measured on, over all positions.

    Returns:
        Patterns: ``share, layer, pattern, full``. ρ: ``share`` and the columns of :func:`rho_rows`.
    """
    patterns, rows = [], []
    truth, true_rho = vectors(network, exact[0]), rhos(network, *exact, test)
    for share in SHARES:
        sampled = pb.collect_moments(network, map(fast_layout, fit), gram=False, positions=share)
        of_v = pb.collect_moments(network, map(fast_layout, probe), positions=share, seed=1)
        patterns += [
            {"share": share, "layer": layer, "pattern": name, "full": error}
            for layer, name, error in relative(vectors(network, sampled), truth, truth)
        ]
        rows += rho_rows(rhos(network, sampled, of_v, test), true_rho, share=share)
    return pd.DataFrame(patterns), pd.DataFrame(rows)
