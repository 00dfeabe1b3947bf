"""What each tensor could be stored as: the bytes that its codes really take, and what that is expected to cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Generator, Tensor

from bitbook.budget.allocate import Option
from bitbook.budget.sensitivity import Sensitivity
from bitbook.coding.choose import Smallest
from bitbook.coding.coder import Coder
from bitbook.coding.rans import Rans
from bitbook.errors import NoFeedback, PlanError
from bitbook.feedback.error_feedback import ErrorFeedback, FeedbackOptions
from bitbook.quantizer import FitOptions, Quantized, Quantizer, quantize
from bitbook.rate.encoding import quantize_priced
from bitbook.scalar.ecsq import ECSQ
from bitbook.scalar.leaves import Float
from bitbook.scalar.uniform import Uniform
from bitbook.transforms.row_scaled import RowScaled
from bitbook.trellis.trellis import Trellis
from bitbook.vector.codebook import Codebook
from bitbook.vector.residual import Residual

_MANY = 1 << 20
"""Elements from which on candidates are counted by a faster coder, a few percent above the file's."""
_QUICK = FeedbackOptions(search=False)  # of candidates; what is written in the end seeks its scales


@dataclass(frozen=True)
class Kind:
    """One way of storing a tensor."""

    recipe: Quantizer
    priced: bool = False
    """Whether codes are chosen for their bits; then there is a candidate for each price."""
    options: FitOptions = FitOptions()


_FUSED = Uniform(5)
_ROW = (1, -1)
MATRIX_KINDS: Mapping[str, Kind] = {
    "trellis": Kind(RowScaled(Trellis(8)), priced=True),
    "scalar": Kind(RowScaled(ECSQ()), priced=True),
    "uniform, 3 bits": Kind(Uniform(3, _ROW, scale=Float("bfloat16")), options=FitOptions(range="mse")),
    "uniform, 4 bits": Kind(Uniform(4, _ROW, scale=Float("bfloat16")), options=FitOptions(range="mse")),
    "vectors, along rows": Kind(Codebook(256, (1, 4), Float("bfloat16")), options=FitOptions(iterations=25)),
    "fused vectors, along rows": Kind(Codebook(256, (1, 4), _FUSED), options=FitOptions(iterations=25)),
    "fused vectors, down columns": Kind(Codebook(256, (4, 1), _FUSED), options=FitOptions(iterations=25)),
    "residual": Kind(
        Residual((Codebook(64, (1, 4), _FUSED), Codebook(64, (1, 4), _FUSED))), options=FitOptions(iterations=15)
    ),
    "16-bit float": Kind(Float("bfloat16")),
    "float": Kind(Float()),
}
"""Of tensors with two or more axes; the first is tried at every price, priced others where they are better."""
VECTOR_KINDS: Mapping[str, Kind] = {
    "scalar": Kind(ECSQ(), priced=True),
    "uniform, 8 bits": Kind(Uniform(8, symmetric=False)),
    "16-bit float": Kind(Float("bfloat16")),
    "float": Kind(Float()),
}


@dataclass(frozen=True, eq=False)
class Candidate:
    """A tensor stored in one way."""

    kind: str
    lam: float
    """The price of a bit, in loss, under which codes were chosen; 0 where they were not."""
    stored: Quantized
    option: Option

    def cost(self, lam: float) -> float:
        """Loss and bits together, at a price."""
        return self.option.loss + lam * 8 * self.option.size


@dataclass(eq=False)
class Tensors:
    """A parameter with its candidates so far."""

    weight: Tensor
    sensitivity: Sensitivity
    kinds: Mapping[str, Kind]
    candidates: list[Candidate] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """Kinds that do not fit the tensor, and why."""

    def find(self, kind: str, lam: float, generator: Generator) -> Candidate | None:
        """The candidate of this kind at this price, made if it is not there; None where the kind does not fit."""
        lam = lam if self.kinds[kind].priced else 0.0
        for candidate in self.candidates:
            if (candidate.kind, candidate.lam) == (kind, lam):
                return candidate
        if kind in self.refused:
            return None
        encoder = self.sensitivity.encoder(options=_QUICK)
        try:
            stored = encode(self.kinds[kind], self.weight, self.sensitivity, encoder, lam, generator)
        except PlanError as error:
            self.refused[kind] = str(error)
            return None
        loss = self.sensitivity.loss(self.weight, stored)
        self.candidates.append(Candidate(kind, lam, stored, Option(coded_size(stored), loss)))
        return self.candidates[-1]


def encode(
    kind: Kind,
    weight: Tensor,
    sensitivity: Sensitivity,
    encoder: ErrorFeedback | None,
    lam: float,
    generator: Generator,
) -> Quantized:
    """The weight in this kind, with feedback where an encoder is given and the recipe has columns to feed back to.

    λ is loss per bit, and squared errors are twice the loss.
    """
    seeded = Generator().set_state(generator.get_state())
    call = partial(quantize_priced, lam=2 * lam) if kind.priced and lam else quantize
    if encoder is not None and not isinstance(kind.recipe, Float):  # whose errors are too small to feed back
        try:
            return call(kind.recipe, weight, encoder=encoder, options=kind.options, generator=seeded)
        except NoFeedback:
            pass
    return call(kind.recipe, weight, importance=sensitivity.fisher, options=kind.options, generator=seeded)


def coded_size(stored: Quantized) -> int:
    """Bytes of a tensor's streams, coded by themselves; floats are stored as they are."""
    if isinstance(stored.recipe, Float):
        return math.prod(stored.shape) * stored.recipe.torch_dtype.itemsize
    streams = list(stored.streams())
    coder: Coder = Smallest() if sum(stream.codes.numel() for stream in streams) <= _MANY else Rans()
    return len(coder.encode(streams))
