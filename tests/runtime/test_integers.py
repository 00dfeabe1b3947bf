from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitbook import (
    Activation,
    Binary,
    Codebook,
    Plan,
    Quantizer,
    Ternary,
    Uniform,
    calibrate,
    freeze,
    quantize,
    quantize_,
)
from bitbook.apply import restore
from bitbook.artifact import QuantizedInput
from bitbook.quantizer import FitOptions
from bitbook.runtime import PackedLinear, restore_packed
from bitbook.runtime.forms import pack_tensor
from bitbook.runtime.integers import Integers
from bitbook.runtime.levels import Levels

WEIGHTS: list[Quantizer] = [
    *(Uniform(bits, (1, -1)) for bits in range(2, 9)),
    *(Uniform(bits, symmetric=False) for bits in (1, 2, 3, 4, 8)),
    Uniform(4, (4, -1), symmetric=False, pad=True),
    Binary((1, -1)),
    Ternary(),
]
INPUTS = [Activation(Uniform(8)), Activation(Uniform(8, symmetric=False)), Activation(Uniform(4, symmetric=False)),
          Activation(Uniform(8), rule="absmax"), Activation(Uniform(2))]  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(recipe: Quantizer, activation: Activation, w: Tensor) -> Integers:
    packed = pack_tensor(quantize(recipe, w))
    assert isinstance(packed, Levels)
    made = Integers.of(packed, QuantizedInput(activation))
    assert made is not None
    return made


@pytest.mark.parametrize("activation", INPUTS, ids=str)
@pytest.mark.parametrize("recipe", WEIGHTS, ids=repr)
def test_sums_are_those_of_the_integers(recipe: Quantizer, activation: Activation) -> None:
    """Codes multiplied in 64 bits, and both scales once: bit for bit."""
    w = random(37, 83)
    layer = integers(recipe, activation, w)
    packed, quantized = layer.weights, quantize(recipe, w)
    whole = quantized.decode() / packed.scale.float()[torch.arange(37) // packed.block[0]]
    assert bool((whole - whole.round()).abs().max() < 1e-4)
    for batch in (1, 5, 16):
        x = random(batch, 83, seed=batch)
        steps, scale = layer.rounded(x)
        sums = steps.long() @ whole.round().long().T
        expected = sums.float() * (scale * layer._row_scales())
        found, product = layer.reference(x)
        assert torch.equal(found.long(), sums)
        assert torch.equal(product, expected)
        assert torch.equal(layer.linear(x, None), expected)
        for bias in (w[:, 0], w[:, 0].contiguous()):
            assert torch.equal(layer.linear(x, bias), expected + bias)


@settings(max_examples=40)
@given(
    rows=st.integers(8, 50), cols=st.integers(1, 90), batch=st.integers(0, 40), bits=st.integers(1, 8),
    activation=st.sampled_from(INPUTS), biased=st.booleans(), threads=st.sampled_from([1, 1, 1, 2]),
)  # fmt: skip
def test_any_shape(
    rows: int, cols: int, batch: int, bits: int, activation: Activation, biased: bool, threads: int
) -> None:
    layer = integers(Uniform(bits, symmetric=False), activation, random(rows, cols, seed=rows))
    x, bias = random(batch, cols, seed=cols), random(rows) if biased else None
    expected = layer.reference(x)[1] if batch else torch.empty(0, rows)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = layer.linear(x, bias)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, expected if bias is None else expected + bias)


@pytest.mark.parametrize("at", [0, 15, 16, 70, 82])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_input_without_a_range_has_no_product(value: float, at: int) -> None:
    layer = integers(Uniform(4), Activation(Uniform(8)), random(37, 83))
    x = random(9, 83)
    x[5, at] = value
    assert not bool(layer.linear(x, None).isfinite().any())


@pytest.mark.parametrize("width", ["batch", "running", "calibrated"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_packed_model_is_what_training_simulated(width: str, symmetric: bool) -> None:
    torch.manual_seed(0)
    make = lambda: torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10))  # noqa: E731
    model, x = make(), random(200, 64)
    activation = Activation(Uniform(8, symmetric=symmetric), range=width)  # type: ignore[arg-type]
    quantize_(model, Plan({"*.weight": Uniform(4, (1, -1))}, {"0": activation, "2": activation}))
    if width == "calibrated":
        calibrate(model, x)
    with torch.no_grad():
        model.train()(x)
        simulated = model.eval()(x)
        packed = restore_packed(freeze(model), make()).eval()
        assert isinstance(packed[0], PackedLinear) and packed[0].integers is not None
        y = packed(x)
        assert float((y - simulated).abs().max() / simulated.abs().max()) < 1e-3
        best = simulated.gather(1, y.argmax(1, keepdim=True))[:, 0]
        assert bool((best >= simulated.amax(1) - 1e-3 * simulated.abs().max()).all())  # the same class, up to ties


def test_inputs_of_more_axes_share_one_range() -> None:
    layer = torch.nn.Linear(32, 24)
    quantize_(layer_ := torch.nn.Sequential(layer), Plan({"*.weight": Uniform(4)}, {"0": Uniform(8)}))
    artifact, x = freeze(layer_), random(3, 5, 32)
    with torch.no_grad():
        packed = restore_packed(artifact, torch.nn.Sequential(torch.nn.Linear(32, 24)))
        dense = restore(artifact, torch.nn.Sequential(torch.nn.Linear(32, 24)))
        assert packed(x).shape == (3, 5, 24)
        torch.testing.assert_close(packed(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "activation"),
    [
        (Uniform(4, (1, 16)), Activation(Uniform(8))),  # scales change along the sum
        (Codebook(16, (1, 1)), Activation(Uniform(8))),  # no whole numbers
        (Uniform(4), Activation(Binary(), rule="mean")),
    ],
    ids=str,
)
def test_other_layers_round_their_input_as_floats(recipe: Quantizer, activation: Activation) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 24))
    quantize_(model, Plan({"*.weight": recipe}, {"0": activation}), options=FitOptions(iterations=3))
    artifact, x = freeze(model), random(4, 32)
    with torch.no_grad():
        packed = restore_packed(artifact, torch.nn.Sequential(torch.nn.Linear(32, 24)))
        assert isinstance(packed[0], PackedLinear) and packed[0].integers is None
        dense = restore(artifact, torch.nn.Sequential(torch.nn.Linear(32, 24)))
        torch.testing.assert_close(packed(x), dense(x), rtol=1e-5, atol=1e-5)


def test_sums_that_could_overflow_stay_floats() -> None:
    packed = pack_tensor(quantize(Uniform(8), random(16, 40_000)))
    assert isinstance(packed, Levels)
    assert Integers.of(packed, QuantizedInput(Activation(Uniform(8)))) is None
