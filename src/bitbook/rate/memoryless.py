"""Rate-aware encoding under a memoryless code: each symbol costs what its frequency says, wherever it is.

What theory calls an entropy-constrained quantizer: codes, their bits and the points that they stand for, in turn, until
squared error + λ · bits no longer falls (Chou, Lookabaugh & Gray 1989).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from bitbook.quantizer import FitOptions, Price, Quantized, Quantizer, StreamSpec, quantize
from bitbook.rate.encoding import recentred

_SETTLED = 2e-5  # of the sum by which a round must improve to be followed by another


@dataclass(frozen=True, eq=False)
class Frequencies:
    """Bits of each code by how often it occurs: `table[code + offset]`; rarer ones than any cost as the rarest."""

    table: Float[Tensor, " codes"]
    offset: int
    ordered: bool
    bits: float
    """Of the whole stream, as it was counted."""

    def __call__(self, codes: Int[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        return self.table[(codes.long() + self.offset).clamp(0, len(self.table) - 1)]

    @property
    def symbols(self) -> Float[Tensor, " codes"] | None:
        return None if self.ordered else self.table

    def columns(self, start: int, stop: int) -> Frequencies:
        """The same: places make no difference."""
        return self


def frequencies(spec: StreamSpec, codes: Int[Tensor, "rows cols"]) -> Frequencies:
    """Count a stream's codes; of numbers around zero, a code and its negative alike."""
    ordered = spec.alphabet is None or spec.centre > 0
    flat = codes.reshape(-1).long()
    offset = max(-int(flat.min()), int(flat.max())) if spec.alphabet is None else 0
    counts = torch.bincount(
        flat + offset, minlength=2 * offset + 1 if spec.alphabet is None else spec.alphabet
    ).double()
    if spec.alphabet is None:
        counts = (counts + counts.flip(0)) / 2
    # Half an occurrence more, so that codes which a round emptied may come back.
    bits = -torch.log2((counts + 0.5) / (counts + 0.5).sum())
    return Frequencies(bits.float(), offset, ordered, float((counts * bits).sum()))


def quantize_memoryless(
    recipe: Quantizer,
    w: Tensor,
    lam: float,
    *,
    options: FitOptions = FitOptions(),
    generator: Generator | None = None,
    rounds: int = 20,
) -> Quantized:
    """Quantize `w` so that squared error plus `lam` · bits is small, with side tensors that follow the codes.

    As `quantize_priced`, for codes in no order: bits are by frequency, wherever a code lies.  That is all that there
    is on independent samples, and takes a fraction of the time.  The best of `rounds` is returned, without codewords
    that nothing uses.  Raises as `quantize`, and `PlanError` where a recipe's codes leave no choice.
    """
    found = quantize(recipe, w, options=options, generator=generator)
    w = w.detach().float()
    best, least = found, float("inf")
    for _ in range(rounds):
        counted = {s.name: frequencies(s, found.codes[s.name]) for s in found.recipe.layout(found.shape)}
        error = float((found.decode() - w).double().square().sum())
        cost = error + lam * sum(stream.bits for stream in counted.values())
        settled = cost > least * (1 - _SETTLED)
        if cost < least:
            best, least = found, cost
        if settled:
            break
        found = recentred(found, w, None, FitOptions())
        side = {child: stored.decode() for child, stored in found.side.items()}
        found = replace(found, codes=found.recipe.encode_priced(w, side, Price(lam, counted)))
    return best.recipe.without_unused(best)
