"""Files may hold tensors without elements, and recipes that would pad them to any size."""

from __future__ import annotations

import pytest
import torch
from tests.laws.cases import QUANTIZERS

from bitbook import Balanced, Permuted, Quantizer, Rotated, Trellis, Uniform
from bitbook.artifact import Artifact, from_bytes, to_bytes
from bitbook.errors import CorruptArtifact, PlanError
from bitbook.quantizer import Quantized, code_dtype, stream_specs
from bitbook.testing import padded


def zeros(recipe: Quantizer, shape: tuple[int, ...]) -> Quantized:
    """All codes zero, all side values zero."""
    side = {name: zeros(child.recipe, child.shape) for name, child in recipe.children(shape).items()}
    codes = {s.name: torch.zeros(s.grid, dtype=code_dtype(s.alphabet)) for s in recipe.layout(shape)}
    return Quantized(recipe, shape, codes, side)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (4, 0), (4, 0, 3)])
@pytest.mark.parametrize("recipe", {type(case.recipe): case.recipe for case in QUANTIZERS}.values(), ids=repr)
def test_tensors_without_elements_are_read_or_refused_by_name(recipe: Quantizer, shape: tuple[int, ...]) -> None:
    try:
        data, _ = to_bytes(Artifact({"w": zeros(padded(recipe).resolve(shape), shape)}))
    except PlanError:
        return
    try:
        assert from_bytes(data).state_dict()["w"].shape == shape
    except CorruptArtifact:
        return


@pytest.mark.parametrize("kind", [Rotated, Balanced, Permuted])
@pytest.mark.parametrize(
    "inner", [Uniform(4, (1, 10**8), pad=True), Trellis(8, 1, (10**8, 1), pad=True)], ids=["uniform", "trellis"]
)
def test_padding_inside_a_transform_counts(kind: type, inner: Quantizer) -> None:
    recipe = kind(inner)
    assert list(stream_specs(recipe, (1, 1)))
    data, _ = to_bytes(Artifact({"w": zeros(recipe, (1, 1))}))
    with pytest.raises(CorruptArtifact, match="elements"):
        from_bytes(data, max_elements=1 << 16)
