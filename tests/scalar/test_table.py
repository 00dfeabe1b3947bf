from __future__ import annotations

import json
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from bitbook import NF4, FitOptions, PowersOfTwo, Table, quantize
from bitbook.artifact import Artifact, from_bytes, to_bytes
from bitbook.errors import PlanError
from bitbook.plan import parse_recipe, recipe_from_json, recipe_to_json
from bitbook.scalar.lloyd_max import GAUSS, lloyd_max

f32 = np.float32


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(w: Tensor, levels: tuple[float, ...], scale: float) -> list[int]:
    table = [float(f32(level)) for level in levels]
    gaps = [[abs(float(f32(v) / f32(scale)) - level) for level in table] for v in w.flatten().tolist()]
    return [gap.index(min(gap)) for gap in gaps]


@pytest.mark.parametrize("recipe", [Table(NF4), Table((-2.0, 0.5, 1.0)), Table((1.0, 3.0)), PowersOfTwo(4)], ids=repr)
def test_each_weight_is_the_nearest_level(recipe: Table | PowersOfTwo) -> None:
    w = weights(6, 8)
    q = quantize(recipe, w)
    scale = q.side["scale"].decode().item()
    expected = nearest(w, recipe.table, scale)
    assert q.codes["codes"].flatten().tolist() == expected
    assert torch.equal(q.decode().flatten(), torch.tensor(recipe.table)[expected] * scale)


def test_absmax_is_the_least_scale_that_clips_nothing() -> None:
    w = torch.tensor([[-3.0, 1.0], [2.0, -0.5]])
    assert quantize(Table(NF4), w).side["scale"].decode().item() == 3
    assert quantize(Table((-2.0, 0.0, 1.0)), w).side["scale"].decode().item() == 2
    assert quantize(Table((0.0, 1.0)), w).side["scale"].decode().item() == 2
    assert quantize(PowersOfTwo(3, (1, -1)), w).side["scale"].decode().flatten().tolist() == [3, 2]


def test_nf4_is_what_its_paper_says() -> None:
    """8 and 9 quantiles of either half, from 0.9677083 on, zero shared; divided by the largest."""
    offset = 0.9677083
    positive = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*positive, 0.0, *negative])) / max(positive)
    assert np.allclose(levels, NF4, atol=1e-6)


def test_powers_of_two() -> None:
    assert PowersOfTwo(2).table == (-1, 0, 1)
    assert PowersOfTwo(3).table == (-1, -0.5, -0.25, 0, 0.25, 0.5, 1)
    assert len(PowersOfTwo(5).table) == 31
    ratios = quantize(PowersOfTwo(4, (1, 8)), weights(8, 8))
    steps = (ratios.decode() / ratios.side["scale"].decode()).abs().unique()
    assert set(steps[steps > 0].log2().tolist()) <= {-float(k) for k in range(7)}


def test_the_mse_range_is_not_worse() -> None:
    w, options = weights(20, 30), FitOptions(range="mse")
    for recipe in (Table(NF4, (1, -1)), PowersOfTwo(3), Table(lloyd_max(GAUSS, 8).levels)):
        errors = [(quantize(recipe, w, options=o).decode() - w).square().sum() for o in (options, FitOptions())]
        assert errors[0] <= errors[1]


def test_lloyd_max_levels_reach_their_error() -> None:
    w = weights(300, 400)
    best = lloyd_max(GAUSS, 8)
    found = quantize(Table(best.levels), w, options=FitOptions(range="mse")).decode()
    assert (found - w).square().mean().item() == pytest.approx(best.error, rel=0.01)


def test_levels_survive_text_and_file() -> None:
    recipe = Table(NF4, (1, 8))
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe)))) == recipe
    assert parse_recipe(repr(recipe)) == recipe
    assert Table((-1, 0, 1)) == Table((-1.0, 0.0, 1.0)) and repr(Table((-1, 0.1, 1))) == "Table((-1.0, 0.1, 1.0))"
    q = quantize(recipe, weights(4, 16))
    data, _ = to_bytes(Artifact({"w": q}))
    stored = from_bytes(data)
    assert stored.tensors["w"].recipe == recipe  # type: ignore[union-attr]
    assert torch.equal(stored.decode("w"), q.decode())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Table((1.0,)), "2 to 256 finite numbers"),
        (lambda: Table((1.0, float("inf"))), "finite"),
        (lambda: Table((1.0, float("nan"))), "finite"),
        (lambda: Table(("a", "b")), "finite"),  # type: ignore[arg-type]
        (lambda: Table(([1], 2.0)), "finite"),  # type: ignore[arg-type]
        (lambda: Table((True, 2.0)), "finite"),
        (lambda: Table((1.0, 1.0)), "ascending"),
        (lambda: Table((1.0, 1.0 + 1e-7)), "ascending"),
        (lambda: Table((2.0, 1.0)), "ascending"),
        (lambda: Table(NF4, (0, 1)), "block="),
        (lambda: PowersOfTwo(1), "2 to 5"),
        (lambda: PowersOfTwo(6), "2 to 5"),
        (lambda: quantize(Table(NF4), torch.ones(2, 2), options=FitOptions(range="lsq")), "absmax or mse"),
        (lambda: recipe_from_json(["Table", [[1], 2]]), "finite"),
    ],
)
def test_refusals(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match=message):
        make()
