from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws import cases
from tests.laws.cases import LADDERS, QUANTIZERS, Case
from torch import Tensor

from bitbook import FitOptions, Quantizer, Uniform, plan, quantize
from bitbook.scalar.leaves import Float, Integer
from bitbook.testing import check_finer, check_quantizer, check_tensor, fingerprint, padded

SMALL = [case for case in QUANTIZERS if not isinstance(case.recipe, Float | Integer)]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any rank and shape, a scale of 1e-5 to 1e5, optionally with many ties."""
    shape = draw(st.lists(st.integers(1, 9), min_size=0, max_size=4))
    w = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    if draw(st.booleans()):
        w = (w * 2).round() / 2  # a few different values, half of them between two levels
    return w * 10.0 ** draw(st.floats(-5, 5))


@pytest.mark.parametrize("case", QUANTIZERS, ids=str)
def test_laws(case: Case) -> None:
    check_quantizer(case.recipe, options=case.options, doubles=case.doubles, learns=case.learns)


@settings(max_examples=6)
@given(w=tensors())
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_laws_hold_for_any_tensor(case: Case, w: Tensor) -> None:
    recipe = padded(case.recipe)
    # Blocks of few equal weights meet the floor of scales at any magnitude, so doubling has its own test.
    check_tensor(recipe, w, options=case.options, doubles=False)


# The floor of scales, 1e-8, does not double: magnitudes here stay well above it.
@settings(max_examples=8)
@given(st.integers(0, 10**6), st.floats(0, 4), st.integers(-2, 8))
@pytest.mark.parametrize("case", [c for c in SMALL if c.doubles], ids=str)
def test_powers_of_two_scale_exactly(case: Case, seed: int, magnitude: float, power: int) -> None:
    w = torch.randn(12, 16, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude
    a, b = (
        quantize(case.recipe, x, options=case.options, generator=torch.Generator().manual_seed(0)).decode()
        for x in (w, w * 2.0**power)
    )
    assert torch.equal(a * 2.0**power, b)


@pytest.mark.parametrize("recipes", LADDERS, ids=lambda recipes: f"{recipes[0]!r}…{recipes[-1]!r}")
def test_finer_is_not_worse(recipes: list[Quantizer]) -> None:
    check_finer(recipes, options=FitOptions(iterations=10))


def test_every_kind_has_a_case() -> None:
    assert {type(case.recipe) for case in QUANTIZERS} == set(plan.KINDS.values())


def test_another_process_writes_the_same_bytes() -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}", "PYTHONHASHSEED": "7"}
    run = subprocess.run(
        [sys.executable, "-m", cases.__name__], env=environment, capture_output=True, text=True, check=True
    )
    here = [fingerprint(case.recipe, options=case.options) for case in QUANTIZERS]
    assert run.stdout.split() == here


def test_a_broken_quantizer_is_found() -> None:
    class Biased(Uniform):
        def decode(self, codes, side, shape):  # type: ignore[no-untyped-def]
            return super().decode(codes, side, shape) + side["scale"].mean()

    with pytest.raises(AssertionError, match="quantizing its own result changes it"):
        check_tensor(Biased(4), torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
