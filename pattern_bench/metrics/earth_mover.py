"""Measure how far a heat map lies from the pixels that hold the signal, by the earth mover's distance.

The distance is a linear programme, which scipy solves. Shapes: B images, C channels, H×W pixels, D cells of a grid.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import block_diag, csr_array, kron, vstack
from torch import Tensor
from torch.nn import functional as F

from pattern_bench.metrics.localization import magnitude

GRID = 8
"""Larger images are first summed to this many cells a side."""
TOGETHER = 8
"""Images of one linear programme."""


def closeness(heat: Tensor, truth: Tensor) -> Tensor:
    """Return 1 - EMD / EMD_max, how near the relevance lies to the truth mask (Clark et al. 2024, "XAI-TRIS").

    The EMD is the least mean distance that |relevance|, which sums to 1, must be carried to lie evenly on the mask. It
    is exact, up to the solver's 1e-7, for images of up to 8×8 pixels. Those of larger images are first summed in cells
    of as many pixels as make 8 cells a side, and lie in these cells' centres: shifts inside a cell go unseen.
    EMD_max is the distance of opposite corners.

    Args:
        heat: (B, C, H, W), square, with H a multiple of 8 where it is above 8.
        truth: (B, H, W) bool, at least one pixel in each image.

    Returns:
        (B,) float64, from 0 to 1; NaN where the heat map is zero everywhere.

    Raises:
        ValueError: where the images' shape is not possible, or a mask is empty.
        RuntimeError: where the solver fails.

    >>> truth = torch.tensor([[[True, False], [False, False]]])
    >>> closeness(truth[:, None].float(), truth).item(), closeness(truth[:, None].flip(2, 3).float(), truth).item()
    (1.0, 0.0)
    """
    side = heat.shape[2]
    if side != heat.shape[3] or side < 2 or (side > GRID and side % GRID):
        raise ValueError(f"images of {heat.shape[2]}×{heat.shape[3]} are not square, or no multiple of {GRID} a side")
    mask = truth.double()
    if not mask.flatten(1).any(1).all():
        raise ValueError("a truth mask is empty, so there is nothing to carry relevance to")
    mass = magnitude(heat)
    cell = max(1, side // GRID)
    given, wanted = (F.avg_pool2d(maps[:, None], cell).flatten(1).cpu() for maps in (mass, mask))
    distance = torch.full((len(heat),), torch.nan, dtype=torch.float64)
    live = (given.sum(1) > 0).nonzero().flatten()
    given, wanted = (part / part.sum(1, keepdim=True) for part in (given, wanted))
    for part in live.split(TOGETHER):
        distance[part] = torch.from_numpy(_transport(given[part].numpy(), wanted[part].numpy()))
    cells = side // cell
    return 1 - distance.to(heat.device) / (math.sqrt(2) * (cells - 1))


def _transport(given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the EMD of each pair of distributions (b, D) on a square grid of D cells, in cells: (b,)."""
    cells = given.shape[1]
    side = math.isqrt(cells)
    place = np.stack(np.divmod(np.arange(cells), side), 1).astype(float)
    distance = np.linalg.norm(place[:, None] - place[None], axis=2)
    costs, blocks, sums = [], [], []
    for source, target in zip(given, wanted, strict=True):
        goals = target.nonzero()[0]
        costs.append(distance[:, goals].ravel())
        leaving = kron(csr_array(np.eye(cells)), np.ones((1, len(goals))), "csr")
        arriving = kron(np.ones((1, cells)), csr_array(np.eye(len(goals))), "csr")
        # What leaves is what arrives, so the last of these equations says nothing new.
        blocks.append(vstack([leaving, arriving[:-1]]) if len(goals) > 1 else leaving)
        sums.append(np.concatenate([source, target[goals][:-1]]))
    solved = linprog(
        np.concatenate(costs), A_eq=block_diag(blocks, "csr"), b_eq=np.concatenate(sums), method="highs-ds"
    )
    if solved.x is None:
        raise RuntimeError(f"the transport has no solution: {solved.message}")
    ends = np.cumsum([len(cost) for cost in costs])[:-1]
    return np.array([flow @ cost for flow, cost in zip(np.split(solved.x, ends), costs, strict=True)])
