"""Soft codes: each block becomes the mean of all codewords, weighed by how near they are.

    A_ij = softmax_j(-|x_i - c_j|² / τ),   ŷ_i = Σ_j A_ij c_j        (DKM, Cho et al. 2022, section 3)

The table A has blocks × codewords entries.  It is made in chunks, and made again in the backward pass, so that memory
does not grow with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 1 << 20
"""Entries of A that are held at once."""


def soft_codewords(
    blocks: Float[Tensor, "n d"],
    codewords: Float[Tensor, "k d"],
    temperature: float,
    weights: Float[Tensor, "n d"] | None = None,
) -> Float[Tensor, "n d"]:
    """The mean codeword of each block, differentiable in blocks and codewords.

    `temperature`, τ, is a squared distance; towards zero, the nearest codeword is all.  `weights` are those of the
    squared differences of coordinates.
    """
    return _Soft.apply(blocks, codewords, temperature, weights)


class _Soft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, temperature: float, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, c, weights)
        ctx.temperature = temperature
        out = torch.empty_like(x)
        for rows in _chunks(x, c):
            torch.mm(_attention(x[rows], c, temperature, _part(weights, rows)), c, out=out[rows])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, c, weights = ctx.saved_tensors
        grad_x, grad_c = torch.empty_like(x), torch.zeros_like(c)
        for rows in _chunks(x, c):
            part, own = _part(weights, rows), x[rows]
            attention = _attention(own, c, ctx.temperature, part)
            grad_c.addmm_(attention.T, grad[rows])
            slope = grad[rows] @ c.T
            slope -= (attention * slope).sum(1, keepdim=True)
            slope *= attention  # of the logits; each row sums to zero
            torch.mm(slope, c, out=grad_x[rows])
            if part is None:
                pull = slope.T @ own - c * slope.sum(0)[:, None]
            else:
                grad_x[rows] *= part
                pull = slope.T @ (own * part) - c * (slope.T @ part)
            grad_c.add_(pull, alpha=2 / ctx.temperature)
        return grad_x.mul_(2 / ctx.temperature), grad_c, None, None


def _chunks(x: Tensor, c: Tensor) -> Iterator[slice]:
    step = max(CHUNK // len(c), 1)
    return (slice(i, i + step) for i in range(0, len(x), step))


def _part(weights: Tensor | None, rows: slice) -> Tensor | None:
    return None if weights is None else weights[rows]


def _attention(x: Tensor, c: Tensor, temperature: float, weights: Tensor | None) -> Tensor:
    """(chunk, k); |x|² is the same for all codewords and left out."""
    square = c.square()
    norms = square.sum(1) if weights is None else weights @ square.T
    return ((2 * (x if weights is None else x * weights) @ c.T - norms) / temperature).softmax(1)
