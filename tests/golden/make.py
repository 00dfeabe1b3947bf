"""Write the golden files: one content each, by hand and without any fitting, so that it is the same for ever.

    python tests/golden/make.py

Files that exist are left alone: a released format never changes.  A new format gets new names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitbook.artifact import Artifact, Layout, QuantizedInput, save, to_bytes
from bitbook.blocks import Shape
from bitbook.coding.choose import Smallest
from bitbook.coding.coder import Coder
from bitbook.coding.context import Context
from bitbook.coding.fixed import Fixed
from bitbook.coding.rans import Rans
from bitbook.plan import Activation
from bitbook.quantizer import Quantized, Quantizer, code_dtype
from bitbook.scalar.ecsq import ECSQ
from bitbook.scalar.leaves import Float
from bitbook.scalar.levels import Binary, Ternary
from bitbook.scalar.uniform import Uniform
from bitbook.trellis.machine import next_states
from bitbook.trellis.tcq import TCQ
from bitbook.trellis.trellis import Trellis
from bitbook.vector.codebook import Codebook

HERE = Path(__file__).parent


def counted(recipe: Quantizer, shape: Shape) -> Quantized:
    """Codes 3, 10, 17, … modulo the alphabet, or within ±7; floats 1/8, 2/8, 3/8, …, which every float type holds."""
    side = {name: counted(child.recipe, child.shape) for name, child in recipe.children(shape).items()}
    codes = {}
    for spec in recipe.layout(shape):
        count = torch.arange(spec.grid[0] * spec.grid[1])
        if isinstance(recipe, Float):
            codes |= recipe.encode(((count + 1) / 8).reshape(shape), {})
        else:
            numbers = (3 + 7 * count) % spec.alphabet if spec.alphabet else (3 + 7 * count) % 15 - 7
            if spec.states:
                numbers = path(numbers.tolist(), spec.states)
            codes[spec.name] = numbers.to(code_dtype(spec.alphabet)).reshape(spec.grid)
    return Quantized(recipe, shape, codes, side)


def path(numbers: list[int], states: int) -> Tensor:
    """The numbers, one more where the machine's state asks for another parity."""
    levels, state = [], 0
    for number in numbers:
        levels.append(number + (number ^ state & 1) % 2)
        state = int(next_states(states)[state, levels[-1] - (state & 1) >> 1 & 1])
    return torch.tensor(levels)


class Golden(NamedTuple):
    """What a golden file holds, and how it is written."""

    artifact: Artifact
    coder: Coder
    layout: Layout

    def to_bytes(self) -> bytes:
        return to_bytes(*self)[0]


def golden() -> dict[str, Golden]:
    """Every golden file by its name."""
    files = {
        f"format{number}-{name}.safetensors": Golden(artifact, Fixed(), layout)
        for name, artifact in contents().items()
        for number, layout in ((1, "per-tensor"), (2, "one"))
    }
    whole = Artifact({"fc.weight": counted(ECSQ(2), (20, 30)), "fc.bias": counted(ECSQ(), (20,))})
    return files | {
        "format2-whole.safetensors": Golden(whole, Smallest(), "one"),
        "format2-mixed.safetensors": Golden(mixed(), Smallest(), "one"),
        **{
            f"format2-trellis-{name}.safetensors": Golden(trellis(), coder, "one")
            for name, coder in (("rans", Rans()), ("fast", Context("fast")), ("small", Context("small")))
        },
    }


def mixed() -> Artifact:
    """Few non-zeros on a grid, and few of many levels in no order: no coder is best for both."""
    square = torch.arange(1200).square()
    sparse, levels = counted(ECSQ(2), (30, 40)), counted(Uniform(8), (30, 40))
    few = ((square % 97 == 1) * (square % 5 - 1)).to(code_dtype(None)).reshape(30, 40)
    wide = (square % 7 * 60).to(code_dtype(255)).reshape(30, 40)
    return Artifact(
        {
            "sparse": replace(sparse, codes=dict.fromkeys(sparse.codes, few)),
            "levels": replace(levels, codes=dict.fromkeys(levels.codes, wide)),
        }
    )


def trellis() -> Artifact:
    """Levels whose parity follows from a machine, and codes of which a machine chooses the meaning."""
    return Artifact(
        {
            "many.weight": counted(Trellis(8, 2), (30, 20)),
            "few.weight": counted(Trellis(256, 0, (1, -1)), (4, 9)),
            "fixed.weight": counted(TCQ(2), (6, 5)),
        }
    )


def contents() -> dict[str, Artifact]:
    """One model of scalar and dense tensors, inputs and aliases, and one of codebooks."""
    scalar = Artifact(
        tensors={
            "fc1.weight": counted(Uniform(4), (6, 5)),
            "fc1.bias": torch.arange(6.0) / 4,
            "fc2.weight": counted(Uniform(3, (1, 2), symmetric=False, scale=Uniform(8)), (3, 6)),
            "fc2.bias": counted(Float("bfloat16"), (3,)),
            "conv.weight": counted(Ternary((1, -1), scale=Float("float16")), (2, 3, 3, 3)),
            "sign.weight": counted(Binary((1, 4), pad=True), (3, 5)),
            "steps": torch.tensor(1000),
            "mask": torch.tensor([True, False, True]),
            "Größe": torch.tensor([[1.5, float("nan")]], dtype=torch.float64),
        },
        inputs={
            "fc1": QuantizedInput(Activation(Uniform(8))),
            "fc2": QuantizedInput(
                Activation(Uniform(4, symmetric=False), "calibrated"),
                {n: counted(c.recipe, c.shape) for n, c in Uniform(4, symmetric=False).children((1, 1)).items()},
            ),
        },
        aliases={"decoder.weight": "fc1.weight"},
    )
    vector = Artifact(
        tensors={
            "rows.weight": counted(Codebook(2, (1, -1), centroids=Float("bfloat16")), (5, 3)),
            "fused.weight": counted(Codebook(5, (1, 4), centroids=Uniform(5, (1, -1))), (4, 8)),
            "shared.weight": counted(Codebook(1, (-1, 1)), (3, 7)),
            "padded.weight": counted(Codebook(3, (2, 2), pad=True), (3, 5)),
        }
    )
    return {"scalar": scalar, "vector": vector}


if __name__ == "__main__":
    for file, (artifact, coder, layout) in golden().items():
        if (HERE / file).exists():
            print(f"{file} exists and stays as it is")
        else:
            print(f"{file}: {save(artifact, HERE / file, coder, layout).total} bytes")
