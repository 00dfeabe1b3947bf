"""Every quantizer and coder in the forms that matter; a new one adds a line and inherits all laws."""

from __future__ import annotations

import sys
from typing import NamedTuple

from bitbook import (
    E8P,
    ECSQ,
    GAUSS,
    NF4,
    TCQ,
    Balanced,
    Binary,
    Codebook,
    FitOptions,
    Float,
    GainShape,
    Integer,
    Lattice,
    Permuted,
    PowersOfTwo,
    Pruned,
    Quantizer,
    Residual,
    Rotated,
    RowScaled,
    SignMagnitude,
    Table,
    Ternary,
    Trellis,
    Uniform,
    lloyd_max,
)
from bitbook.coding.choose import Smallest
from bitbook.coding.coder import Coder
from bitbook.coding.context import Context
from bitbook.coding.fixed import Fixed
from bitbook.coding.rans import Rans
from bitbook.quantizer import Range
from bitbook.testing import fingerprint


class Case(NamedTuple):
    recipe: Quantizer
    range: Range | None = None
    doubles: bool = True
    learns: bool = True

    @property
    def options(self) -> FitOptions:
        return FitOptions(range=self.range, iterations=20)

    def __str__(self) -> str:
        return f"{self.recipe!r}{f' {self.range}' if self.range else ''}"


QUANTIZERS = [
    Case(Float()),
    Case(Float("bfloat16")),
    Case(Float("float16"), doubles=False),  # its subnormals round differently
    Case(Integer(7), doubles=False),
    *(Case(Uniform(bits)) for bits in range(2, 9)),
    *(Case(Uniform(bits, symmetric=False)) for bits in (1, 2, 4, 8)),
    *(Case(Uniform(4), range) for range in ("absmax", "mse", "lsq")),
    Case(Uniform(3, (1, 4), symmetric=False), "mse"),
    *(Case(Uniform(4, block)) for block in ((1, -1), (-1, 1), (1, 4), (3, 4), (4, -1), (-1, 8))),
    Case(Uniform(4, scale=Float("bfloat16"))),
    Case(Uniform(4, (1, 4), scale=Float("float16")), doubles=False),
    Case(Uniform(4, (1, 4), scale=Uniform(8))),
    Case(Uniform(4, (1, 4), scale=Uniform(8, (1, -1), scale=Float("bfloat16")))),
    Case(Uniform(4, (1, 4), symmetric=False, scale=Uniform(6))),
    Case(Binary()),
    Case(Binary(), "minmax"),
    Case(Binary((1, 4))),
    Case(Binary((1, -1), scale=Uniform(8))),
    Case(Ternary()),
    Case(Ternary((1, 8), scale=Float("bfloat16"))),
    Case(Pruned(0.5)),
    Case(Pruned(1)),
    Case(Pruned(0.25, Uniform(3, (1, 8), pad=True))),
    Case(Pruned(0.5, Codebook(4, (1, 2)))),
    Case(Codebook(1, (1, 4))),
    Case(Codebook(8)),
    Case(Codebook(0.25, (1, -1))),
    Case(Codebook(0.25, (-1, 1))),
    Case(Codebook(5, (3, 2))),
    Case(Codebook(4, (1, 1))),
    Case(Codebook(1000, (1, 2))),
    Case(Codebook(8, (1, 4), centroids=Float("bfloat16"))),
    Case(Codebook(8, (1, 4), centroids=Uniform(5))),
    Case(Codebook(0.5, (1, -1), centroids=Uniform(4, (1, -1)))),
    Case(Codebook(8, (1, 4), centroids=Uniform(4, (1, 2), scale=Uniform(8)))),
    Case(Codebook(8, (1, 4), centroids=Ternary())),
    Case(Codebook(8, (1, 4), centroids=Codebook(6, (1, 2)))),
    Case(ECSQ()),
    Case(ECSQ(3)),
    Case(ECSQ(2, points=Float())),
    Case(ECSQ(1, (1, -1))),
    Case(ECSQ(2, (3, 4), points=Uniform(8, (1, -1)))),
    Case(Uniform(4, (1, 4), scale=ECSQ())),
    Case(Trellis()),
    Case(Trellis(4, 3)),
    Case(Trellis(256, 2, (1, -1), Float(), Float())),
    Case(Trellis(16, 1, (3, 4), step=Uniform(8), points=Uniform(8))),
    Case(Codebook(8, (1, 4), centroids=Trellis(4))),
    Case(TCQ(1)),
    Case(TCQ(3, 16, (1, -1), points=Float())),
    Case(TCQ(2, 4, (3, 4), points=Uniform(8, (1, -1)))),
    Case(Lattice("D4")),
    Case(Lattice("D4", (3, 8), scale=Uniform(8))),
    Case(Lattice("E8")),
    Case(Lattice("E8", (1, -1), scale=Float())),
    Case(E8P()),
    Case(E8P((1, -1), scale=Uniform(8)), "mse"),
    Case(Rotated(Uniform(4))),
    Case(Rotated(Uniform(4, (1, -1), scale=Uniform(8)), seed=7)),
    Case(Rotated(Codebook(8, centroids=Uniform(5)))),
    Case(Rotated(ECSQ(2))),
    Case(Rotated(E8P())),
    Case(Balanced(Uniform(4))),
    Case(Balanced(Uniform(3, (1, 4)), rows=Uniform(8), cols=Uniform(8))),
    Case(Balanced(Codebook(0.25), cols=Float())),
    Case(Permuted(Codebook(8))),
    Case(Permuted(Uniform(4, (1, 4)))),
    Case(Permuted(Rotated(Balanced(Lattice("D4"))))),
    Case(RowScaled(ECSQ())),
    Case(RowScaled(Trellis(4, size=1))),
    Case(RowScaled(Uniform(3, (1, 4)), rows=Float())),
    Case(Residual((Codebook(8, (1, 4)), Codebook(4, (1, 4))))),
    Case(Residual((Codebook(8, (1, 4), centroids=Uniform(5)), Codebook(0.25, (1, 4), Float("bfloat16"))), beam=1)),
    Case(Residual((Codebook(4, (1, 4)), Uniform(2, (1, 16), pad=True)))),
    Case(Residual((Uniform(3, (1, 8), scale=Uniform(8)), Codebook(4, (1, 2)), Binary()))),
    Case(SignMagnitude(Uniform(3, (1, 8), symmetric=False))),
    Case(SignMagnitude(Codebook(8, (1, 4), centroids=Uniform(5)))),
    Case(SignMagnitude(ECSQ(2))),
    Case(SignMagnitude(Residual((Codebook(4, (1, 4)), Codebook(4, (1, 4)))))),
    Case(GainShape(8, (1, 4))),
    Case(GainShape(5, (2, 8), centroids=Uniform(6), gains=Uniform(4, symmetric=False, scale=Float("bfloat16")))),
    Case(Table(NF4)),
    Case(Table(NF4, (1, 4), scale=Uniform(8))),
    Case(Table((-1, 0.5, 2), (3, 4)), "mse"),
    Case(PowersOfTwo(4, (1, -1), scale=Float("bfloat16"))),
]

LADDERS: list[list[Quantizer]] = [
    [Uniform(bits) for bits in range(2, 9)],
    [Uniform(bits, (1, 16)) for bits in range(2, 9)],
    [Uniform(bits, symmetric=False) for bits in range(1, 9)],
    [Binary(), Ternary()],
    [Table(lloyd_max(GAUSS, size).levels, (1, 16)) for size in (3, 7, 15, 31)],
    [Codebook(2**bits, (1, 1)) for bits in range(1, 6)],
    [Codebook(size, (1, 4)) for size in (1, 4, 16, 64)],
    [Codebook(32, (1, 4), centroids=Uniform(bits)) for bits in range(2, 8)],
    [Residual((Codebook(16, (1, 4)), Codebook(size, (1, 4)))) for size in (1, 4, 16)],
    [SignMagnitude(Codebook(size, (1, 4))) for size in (1, 4, 16)],
    [GainShape(size, (1, 4)) for size in (1, 4, 16, 64)],
    [Pruned(share, Uniform(6)) for share in (0.1, 0.5, 1.0)],
    [ECSQ(size) for size in (1, 2, 4, 8)],
    [Trellis(states) for states in (4, 8, 16, 32, 64, 128, 256)],
    [TCQ(bits) for bits in range(1, 6)],
    [Float("bfloat16"), Float("float16"), Float()],
]

CODERS: list[Coder] = [Fixed(), Rans(), Context("fast"), Context("small"), Smallest()]


if __name__ == "__main__":  # tests compare this with what their own process gives
    print("\n".join(fingerprint(case.recipe, options=case.options) for case in QUANTIZERS), file=sys.stdout)
