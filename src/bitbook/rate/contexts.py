"""Where the non-zeros of a grid are: a causal model of it, and what one more non-zero would cost.

    p(non-zero) = σ(θ · f)        f: log densities of its row, its column and the columns around it, and how many of
                                  the neighbours before it are non-zero
    cost = bits with it less bits without it, of its own flag and of all flags that come after and see it

The features are those that a coder's contexts are made of (`coding/small.py`).  θ is the maximum of the likelihood, so
that a change of one flag moves the length through the features alone.  What comes after counts: the odds of a place
given neighbours on all sides (the pseudo-likelihood of Besag 1975) charge nothing for what a cluster makes its empty
places cost, and training under them fills whole images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

_STRENGTH = 0.5  # of the mean, in elements, in the density of a row or column
_SURROUNDINGS = 2.0  # of the density around a column, in elements, in its own
_LEAST_SHARE = 1e-3  # of the mean, in the density around a column
_RIDGE = 2.0  # keeps coefficients where they begin unless the flags say otherwise
_ITERATIONS = 6  # of Newton's method
_MOST_STEP = 2.0  # of a coefficient in one of them
_LONGEST_STRIDE = 255
_CERTAIN = 6.0  # standard deviations beyond which pairs at a distance are no chance
_LEAST_BITS, _MOST_BITS = -2.0, 18.0  # of one flag's cost
_RINGS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, -1), (-1, 0)),
    ((-1, -1), (-1, 1)),
    ((0, -2), (-2, 0), (-1, -2), (-1, 2), (-2, -1), (-2, 1)),
)
"""Neighbours before a place, (image rows, columns) away, nearest first."""


class Flags(NamedTuple):
    """The zero flags of a grid, priced."""

    cost: Float[Tensor, "rows cols"]
    """Bits by which the grid grows if the place is a non-zero instead of a zero; all else as it is."""
    bits: float
    """Of all flags as they are."""


def price_flags(nonzero: Bool[Tensor, "rows cols"]) -> Flags:
    """Fit the model to a grid's zero flags, and price every one of them."""
    x = nonzero.float()
    mean = (x.sum() + 0.5) / (x.numel() + 1)
    stride = image_stride(x)
    known = _densities(x, mean, stride)
    rings = [_sum_at(x, ring, stride) for ring in _RINGS] if stride else []
    features = torch.stack([f.expand_as(x).reshape(-1) for f in (*known, *rings)], 1)
    prior = torch.zeros(features.shape[1], device=x.device)
    prior[0] = torch.log(mean / (1 - mean))
    prior[1:3] = 1  # row × column / mean, were they independent
    theta = _fit(features, x.reshape(-1), prior)
    odds = (features @ theta).view_as(x)
    cost = -odds
    for ring, weight in zip(_RINGS, theta[len(known) :].tolist(), strict=False):
        cost = cost + _consequences(x, odds, ring, weight, stride)
    bits = (softplus(odds) - x * odds).sum(dtype=torch.float64)
    return Flags((cost / math.log(2)).clamp(_LEAST_BITS, _MOST_BITS), float(bits) / math.log(2))


def image_stride(x: Float[Tensor, "rows cols"]) -> int:
    """The distance between columns at which non-zeros come in pairs most surely: the length of an image's rows.

    1 where columns have neighbours left and right alone, and 0 where the grid shows no order of its columns.
    """
    cols = x.shape[1]
    most = min(cols - 1, _LONGEST_STRIDE)
    if cols < 3 or not bool(x.any()):
        return 0
    centred = x - x.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, 2 * cols)
    pairs = torch.fft.irfft(spectrum.abs().square(), 2 * cols).sum(0)[: most + 1]
    # Were the columns in no order, the sums at distance s would scatter by σ² · √(rows · (cols − s)).
    spread = pairs[0] / x.numel() * (len(x) * (cols - torch.arange(most + 1, device=x.device))).sqrt()
    certain = pairs / spread.clamp_min(1e-12)
    certain[0] = 0
    peak = (certain[4:-1] > certain[3:-2]) & (certain[4:-1] > certain[5:])
    if bool(peak.any()):
        beyond = int(torch.where(peak, certain[4:-1], 0.0).argmax()) + 4
        if certain[beyond] > _CERTAIN:
            return beyond
    return 1 if certain[1] > _CERTAIN else 0


def _densities(x: Tensor, mean: Tensor, stride: int) -> list[Tensor]:
    """A constant and logarithms of densities over `mean`; what a place holds is left out of those of its own lines."""
    rows, cols = x.shape
    columns = x.sum(0, keepdim=True)
    row = (x.sum(1, keepdim=True) - x + _STRENGTH * mean) / (cols - 1 + _STRENGTH)
    if not stride:
        column = (columns - x + _STRENGTH * mean) / (rows - 1 + _STRENGTH)
        return [torch.ones_like(x), (row / mean).log(), (column / mean).log()]
    found = [_both_sides(columns, ring, stride) for ring in _RINGS]
    there = [_both_sides(torch.ones_like(columns), ring, stride) for ring in _RINGS]
    near = (found[0] + 0.5 * found[1]) / (there[0] + 0.5 * there[1]) / rows
    wide = sum(found, torch.zeros_like(columns)) / sum(there, torch.zeros_like(columns)) / rows
    column = (columns - x + _SURROUNDINGS * near.clamp_min(_STRENGTH * mean / rows)) / (rows - 1 + _SURROUNDINGS)
    around = [(density / mean).clamp_min(_LEAST_SHARE).log() for density in (near, wide)]
    return [torch.ones_like(x), (row / mean).log(), (column / mean).log(), *around]


def _fit(features: Float[Tensor, "n k"], x: Float[Tensor, " n"], prior: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Logistic regression with a Gaussian prior, by Newton's method."""
    theta, ridge = prior.clone(), _RIDGE * torch.eye(len(prior), device=x.device)
    for _ in range(_ITERATIONS):
        p = torch.sigmoid(features @ theta)
        slope = features.T @ (x - p) - _RIDGE * (theta - prior)
        curvature = features.T @ (features * (p * (1 - p))[:, None]) + ridge
        step = torch.linalg.solve(curvature, slope).clamp_(-_MOST_STEP, _MOST_STEP)
        theta += step
        if float(step.abs().max()) < 1e-2:
            break
    return theta


def _consequences(x: Tensor, odds: Tensor, ring: Sequence[tuple[int, int]], weight: float, stride: int) -> Tensor:
    """Nats that the flags after each place, which have it in their `ring`, cost more with it than without."""
    present = x > 0
    with_it = softplus(odds + weight) - softplus(odds)  # seen from a place that is zero now
    without = softplus(odds) - softplus(odds - weight)  # from one that is not
    after = [(-dy, -dx) for dy, dx in ring]
    gained = weight * x  # a non-zero that its neighbour made likelier
    return torch.where(present, _sum_at(without - gained, after, stride), _sum_at(with_it - gained, after, stride))


def _both_sides(x: Tensor, ring: Sequence[tuple[int, int]], stride: int) -> Tensor:
    return _sum_at(x, ring, stride) + _sum_at(x, [(-dy, -dx) for dy, dx in ring], stride)


def _sum_at(x: Float[Tensor, "rows cols"], places: Sequence[tuple[int, int]], stride: int) -> Tensor:
    """For each column the sum of the columns at `places` from it, zero outside the image.

    At a stride of 1 there is one image row, and places in others are outside.
    """
    rows, cols = x.shape
    width = stride if stride > 1 else cols
    height = -(-cols // width)
    image = torch.nn.functional.pad(x, (0, height * width - cols)).view(rows, height, width)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    total = torch.zeros_like(image)
    for dy, dx in places:
        total += padded[:, 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width]
    return total.reshape(rows, height * width)[:, :cols]
