"""Sums of codewords: beam search for the codes, and all codebooks at once by least squares.

    ŵ_i = Σ_m C_m[code_im]      codes: beam search, stage by stage      C: normal equations of the 0/1 matrix of codes

(Babenko & Lempitsky 2014, "Additive quantization"; Martinez et al. 2016, LSQ.)  `weights`, where given, are those of
squared errors, one per coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

_CHUNK_BYTES = 32 << 20
_DAMPING = 1e-9  # of the mean count: codebooks may trade a constant, so that the equations are singular


def beam_search(
    blocks: Float[Tensor, "n d"],
    codebooks: Sequence[Float[Tensor, "_ d"]],
    beam: int,
    weights: Float[Tensor, "n d"] | None = None,
) -> Int[Tensor, "n stages"]:
    """Codes with a small `Σ_j w_ij (x_ij - Σ_m c_mj)²`: after each stage the `beam` best choices go on; 1 is greedy."""
    largest = max(map(len, codebooks))
    step = max(_CHUNK_BYTES // (4 * beam * (largest + blocks.shape[1])), 1)
    parts = [
        _search(blocks[i : i + step], codebooks, beam, None if weights is None else weights[i : i + step])
        for i in range(0, len(blocks), step)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, len(codebooks), dtype=torch.int64)


def _search(blocks: Tensor, codebooks: Sequence[Tensor], beam: int, weights: Tensor | None) -> Tensor:
    n = len(blocks)
    left = blocks[:, None, :]  # (n, beam, d): what the codewords so far leave
    codes = torch.zeros(n, 1, 0, dtype=torch.int64, device=blocks.device)
    for place, book in enumerate(codebooks):
        width = beam if place + 1 < len(codebooks) else 1
        scaled = left if weights is None else left * weights[:, None, :]
        norms = book.square().sum(1) if weights is None else (weights @ book.square().T)[:, None, :]
        error = (scaled * left).sum(2, keepdim=True) - 2 * scaled @ book.T + norms  # (n, beam, size)
        flat = error.reshape(n, -1)
        chosen = flat.argmin(1, keepdim=True) if width == 1 else flat.topk(min(width, flat.shape[1]), 1, False)[1]
        parent, symbol = chosen // len(book), chosen % len(book)
        left = left.gather(1, parent[..., None].expand(-1, -1, left.shape[2])) - book[symbol]
        codes = torch.cat([codes.gather(1, parent[..., None].expand(-1, -1, place)), symbol[..., None]], 2)
    return codes[:, 0]


def least_squares(
    blocks: Float[Tensor, "n d"],
    codes: Int[Tensor, "n stages"],
    codebooks: Sequence[Float[Tensor, "_ d"]],
    weights: Float[Tensor, "n d"] | None = None,
) -> list[Float[Tensor, "_ d"]]:
    """The codebooks with the least weighted squared error for fixed codes; codewords that no block uses stay."""
    sizes = [len(book) for book in codebooks]
    offsets = torch.tensor([sum(sizes[:m]) for m in range(len(sizes))])
    columns, total = codes + offsets, sum(sizes)
    old = torch.cat(list(codebooks)).double()
    gap = blocks.double() - sum(old[columns[:, m]] for m in range(len(sizes)))
    mass = torch.ones(len(blocks), 1, dtype=torch.float64) if weights is None else weights.double()
    change = torch.empty_like(old)
    for part in range(mass.shape[1]):  # one system for all coordinates, or one for each
        own = slice(None) if weights is None else slice(part, part + 1)
        gram = torch.zeros(total * total, dtype=torch.float64)
        moment = torch.zeros_like(old[:, own])
        for a in range(len(sizes)):
            moment.index_add_(0, columns[:, a], mass[:, part : part + 1] * gap[:, own])
            for b in range(len(sizes)):
                gram.index_add_(0, columns[:, a] * total + columns[:, b], mass[:, part])
        gram = gram.reshape(total, total)
        damping = _DAMPING * gram.diagonal().mean().clamp_min(1e-300)
        unused = gram.diagonal() == 0
        gram += torch.diag(damping + unused.double())
        change[:, own] = torch.linalg.solve(gram, moment)
    return list((old + change).float().split(sizes))
