from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitbook import FakeQuantize, Float, Integer, quantize
from bitbook.errors import PlanError, WeightError

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(finite, min_size=1, max_size=20))
def test_float32_is_exact_and_its_codes_are_ieee_754(values: list[float]) -> None:
    q = quantize(Float(), torch.tensor(values))
    assert [struct.pack("<f", v) for v in q.decode().tolist()] == [struct.pack("<f", v) for v in values]
    assert q.codes["bits"].flatten().tolist() == [struct.unpack("<I", struct.pack("<f", v))[0] for v in values]


@given(st.lists(st.floats(-60_000, 60_000, width=16), min_size=1, max_size=20))
def test_float16_codes_are_ieee_754(values: list[float]) -> None:
    q = quantize(Float("float16"), torch.tensor(values))
    assert q.decode().tolist() == values
    assert q.codes["bits"].flatten().tolist() == [struct.unpack("<H", struct.pack("<e", v))[0] for v in values]


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_narrow_types_round_as_torch_does_and_pass_the_gradient(name: str) -> None:
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    source = FakeQuantize(Float(name), torch.nn.Parameter(w))  # type: ignore[arg-type]
    expected = w.to(getattr(torch, name)).float()
    assert torch.equal(source(), expected) and torch.equal(source.freeze().decode(), expected)
    source().sum().backward()
    assert torch.equal(source.latent.grad, torch.ones(5, 7))


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(WeightError, match="100000 does not fit into float16; store it as bfloat16"):
        quantize(Float("float16"), torch.tensor([1.0, 1e5]))


@given(st.lists(st.integers(0, 299), min_size=1, max_size=20))
def test_integers_are_exact(values: list[int]) -> None:
    q = quantize(Integer(300), torch.tensor(values).float())
    assert q.decode().tolist() == values == q.codes["codes"].flatten().tolist()


@pytest.mark.parametrize("alphabet", [0, 65_537, 2.0, True])
def test_integer_refusals(alphabet: int) -> None:
    with pytest.raises(PlanError, match="1 to 65536"):
        Integer(alphabet)


def test_float_refusals() -> None:
    with pytest.raises(PlanError, match="float32, bfloat16, float16"):
        Float("float8")  # type: ignore[arg-type]
