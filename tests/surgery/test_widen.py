"""A narrow network in a wide one: the same function, in a file whose zeros cost next to nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitbook import ECSQ, FitOptions, Plan, Uniform, quantize_
from bitbook.apply import freeze, restore
from bitbook.artifact import to_bytes
from bitbook.errors import PlanError
from bitbook.models import build_model
from bitbook.surgery.widen import widen

PLAN = Plan({"*.weight": ECSQ(3), "*.bias": ECSQ()})


def quantized(name: str, seed: int, plan: Plan = PLAN) -> nn.Module:
    model = build_model(name, seed=seed)
    quantize_(model, plan, options=FitOptions(step=0.02, iterations=0))
    return model


@settings(max_examples=8)
@given(st.tuples(*[st.integers(1, 6)] * 3), st.tuples(*[st.integers(0, 5)] * 3), st.booleans())
def test_the_wide_network_computes_what_the_narrow_one_does(
    sizes: tuple[int, ...], more: tuple[int, ...], by_plan: bool
) -> None:
    names = ["-".join(["lenet-5", *map(str, units)]) for units in (sizes, map(sum, zip(sizes, more, strict=True)))]
    narrow, wide = (quantized(name, i) if by_plan else build_model(name, i) for i, name in enumerate(names))
    x = torch.randn(4, 784, generator=torch.Generator().manual_seed(0))
    widen(narrow, wide)
    torch.testing.assert_close(wide(x), narrow(x))
    nonzero = [sum(int(p.count_nonzero()) for p in model.parameters()) for model in (narrow, wide)]
    assert nonzero[0] == nonzero[1]


def test_zeros_are_all_but_free() -> None:
    narrow, wide = quantized("lenet-5-4-6-9", 0), quantized("lenet-5", 1)
    widen(narrow, wide)
    artifact = freeze(wide)
    assert len(to_bytes(artifact)[0]) < len(to_bytes(freeze(narrow))[0]) + 60  # for 428,000 weights
    x = torch.randn(4, 784, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(restore(artifact, build_model("lenet-5", seed=2))(x), narrow(x))


def test_networks_that_do_not_fit_are_refused() -> None:
    small, large = "mlp-9-4-3", "mlp-9-6-3"
    with pytest.raises(PlanError, match=r"fc1\.weight: \(6, 9\) does not fit into \(4, 9\)"):
        widen(build_model(large, 0), build_model(small, 0))
    with pytest.raises(PlanError, match="the same plan"):
        widen(quantized(small, 0), build_model(large, 0))
    rows = Plan({"*.weight": Uniform(4, block=(1, -1))})
    with pytest.raises(PlanError, match="share side tensors"):
        widen(quantized(small, 0, rows), quantized(large, 0, rows))
