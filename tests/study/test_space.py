from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitbook.coding.fixed import Fixed
from bitbook.errors import PlanError
from bitbook.models import build_model
from bitbook.quantizer import FitOptions, quantize
from bitbook.study.grid import DIGITS, cell, digits_recipes
from bitbook.study.search.space import FIT, LADDERS, RUNGS, Space

SPACE = Space.of(build_model("mlp-64-32-16-10", 0), epochs=10, batch=32)


def chosen(space):
    """Any parameters of a space."""
    return st.fixed_dictionaries({
        name: st.sampled_from(d.choices) if hasattr(d, "choices") else st.integers(d.low, d.high)
        for name, d in space.distributions.items()
    })  # fmt: skip


def of_grid(recipe):
    tune = DIGITS.starts[0][1](recipe)
    return cell(recipe, dataset="digits", model=DIGITS.model, start={}, tune=tune, seed=0, holdout=287)


@pytest.mark.parametrize("kind", LADDERS)
def test_rungs_lead_from_few_bytes_to_many(kind):
    w = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    assert len(LADDERS[kind]) == RUNGS
    sizes = [
        len(Fixed().encode(list(quantize(recipe, w, options=FitOptions(**{**FIT, "iterations": 2})).streams())))
        for recipe in LADDERS[kind]
    ]
    assert sizes == sorted(set(sizes))


@given(chosen(SPACE))
def test_a_cell_says_its_parameters(parameters):
    said = SPACE.said(parameters)
    found = SPACE.parameters(said)
    assert SPACE.said(found) == said
    # More codewords than blocks are as many as blocks: of such rungs, the first.
    assert all(found[name] == value for name, value in parameters.items() if not name.endswith(" rung"))


def test_what_a_grid_has_in_common_with_the_space():
    recipes = {f"{recipe.method}, {recipe.name}": recipe for recipe in digits_recipes() if recipe.model is None}
    shared = {name for name, recipe in recipes.items() if SPACE.parameters(of_grid(recipe)) is not None}
    scalar = {"scalar, 2 bits", "scalar, 3 bits", "scalar, 4 bits", "scalar, 6 bits"}
    learned = {"scalar, learned scale, 2 bits", "scalar, learned scale, 3 bits"}
    fused = {f"vectors of 4, 5-bit centroids, {k} codewords" for k in (16, 32, 64)}
    assert shared == scalar | learned | fused | {"pruned, 4 bits, 20 % kept", "pruned, 4 bits, 50 % kept"}
    untrained = {**of_grid(recipes["scalar, 3 bits"]), "phases": [{"plan": {"weights": {"fc*": ["Uniform", 3]}}}]}
    assert SPACE.parameters(untrained) is None
    other = replace(recipes["scalar, 3 bits"], before=recipes["scalar, 4 bits"].plan)
    assert SPACE.parameters(of_grid(other)) is None


def test_kinds_whose_blocks_do_not_divide_a_tensor_are_left_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4, bias=False))
    space = Space.of(model, epochs=1, batch=8)
    assert set(space.ladders["0.weight"]) == {"uniform", "uniform, a scale per row", "pruned"}  # 27 columns
    assert set(space.ladders["3.weight"]) == set(LADDERS)
    assert space.others == ["0.bias", "1.weight", "1.bias"]
    with pytest.raises(PlanError, match="nothing to search for"):
        Space.of(nn.BatchNorm1d(3), epochs=1, batch=8)


def test_the_allocator_fills_its_bytes_and_gives_more_bits_where_errors_cost_more():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    with torch.no_grad():
        model[2].weight.mul_(4)
    space = Space.of(model, epochs=1, batch=8)
    x = torch.randn(64, 16, generator=generator)
    bits = (0.1, 3.0, 6.0)
    chosen = space.allocated(model, x, bits, rate=1e-2, seed=0)
    assert len(chosen) == 2  # a tenth of a bit is less than the lowest rungs need
    losses = []
    for parameters, target in zip(chosen, bits[1:], strict=True):
        size, loss = 0, 0.0
        for name, w in model.named_parameters():
            recipe = space.ladders[name][parameters[f"{name} kind"]][parameters[f"{name} rung"]]
            stored = quantize(recipe, w.detach(), options=FitOptions(**FIT))
            size += len(Fixed().encode(list(stored.streams())))
            loss += float((stored.decode() - w).detach().square().sum())
        assert size <= target * 320 / 8
        losses.append(loss)
        assert space.parameters(space.said(parameters)) is not None
    assert losses[1] < losses[0] / 4
