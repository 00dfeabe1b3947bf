from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.cases import QUANTIZERS, Case
from tests.runtime.engines import ENGINES, only

from bitbook import ECSQ, Binary, Codebook, Float, Quantized, Quantizer, Trellis, Uniform, quantize
from bitbook.quantizer import FitOptions
from bitbook.runtime.books import MOST_LOOKED_UP, Rows, Vectors
from bitbook.runtime.forms import KERNELS, pack_tensor
from bitbook.runtime.levels import Levels
from bitbook.runtime.packed import Packed, Streams
from bitbook.testing import padded

FAST = [
    *(Uniform(bits, (1, -1)) for bits in range(2, 9)),
    *(Uniform(bits, (-1, -1), symmetric=False) for bits in (1, 3, 5, 8)),
    *(Uniform(bits, (1, 32), symmetric=False, pad=True) for bits in (2, 3, 4, 8)),
    Binary((1, 64), pad=True),
    ECSQ(3),
    Trellis(),
    Codebook(16, (1, 2)),
    Codebook(8, (1, 4)),
    Codebook(300, (1, 3)),
    Codebook(0.25, (1, -1)),
    Codebook(0.5, (1, -1), centroids=Uniform(4, (1, -1))),
]


def matrix(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def compressed(case: Case, w: torch.Tensor) -> Quantized:
    return quantize(case.recipe, w, options=case.options, generator=torch.Generator().manual_seed(0))


def check_product(packed: Packed, w: torch.Tensor, batch: int, *, bias: bool = True) -> None:
    """`x · wᵀ + b` up to the rounding of sums, whatever their order: a few ulps of the sum of magnitudes."""
    x, b = matrix(batch, w.shape[1], 1), matrix(1, w.shape[0], 2)[0] if bias else None
    y = packed.linear(x, b)
    exact = x.double() @ w.double().T
    largest = x.double().abs() @ w.double().abs().T + w.abs().max() * x.double().abs().sum(1, keepdim=True)
    if b is not None:
        exact, largest = exact + b, largest + b.abs()
    assert y.shape == exact.shape and y.dtype == torch.float32
    assert bool(((y - exact).abs() <= 2e-6 * largest + 1e-30).all())


@pytest.mark.parametrize("case", QUANTIZERS, ids=str)
def test_every_recipe_packs_and_multiplies(case: Case) -> None:
    w = matrix(48, 96)
    quantized = compressed(case, w.abs() if "Integer" in str(case) else w)
    packed, decoded = pack_tensor(quantized), quantized.decode()
    assert torch.equal(packed.decode(), decoded)
    assert torch.equal(packed.tile(16, 37), decoded[16:37])
    rows = torch.tensor([3, 47, 0, 16, 3])
    assert torch.equal(packed.select(rows), decoded[rows])
    for batch in (1, 3, 9):
        check_product(packed, decoded, batch)


def test_kernels_are_named_for_every_operation() -> None:
    assert {operation for operation, _ in KERNELS} == {"linear", "embedding"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recipe", FAST, ids=repr)
def test_engines_agree(recipe: Uniform, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(engine, monkeypatch)
    w = matrix(40, 96)
    quantized = quantize(recipe, w, options=FitOptions(iterations=5), generator=torch.Generator().manual_seed(0))
    packed, decoded = pack_tensor(quantized), quantized.decode()
    assert not isinstance(packed, Streams)
    assert torch.equal(packed.decode(), decoded)
    for batch in (1, 2, MOST_LOOKED_UP + 1, 17):
        check_product(packed, decoded, batch, bias=batch != 2)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 70), cols=st.integers(1, 140), batch=st.integers(1, 20), bits=st.integers(2, 8),
    symmetric=st.booleans(), block=st.sampled_from([(1, -1), (-1, -1), (4, -1), (1, 32), (2, 16)]),
)  # fmt: skip
def test_any_shape(rows: int, cols: int, batch: int, bits: int, symmetric: bool, block: tuple[int, int]) -> None:
    quantized = quantize(Uniform(bits, block, symmetric=symmetric, pad=True), matrix(rows, cols, rows + cols))
    packed, decoded = pack_tensor(quantized), quantized.decode()
    assert torch.equal(packed.decode(), decoded)
    check_product(packed, decoded, batch)


@settings(max_examples=15)
@given(
    rows=st.integers(8, 70), vectors=st.integers(1, 70), dims=st.integers(2, 8), size=st.integers(1, 300),
    batch=st.integers(1, 8),
)  # fmt: skip
def test_any_vectors(rows: int, vectors: int, dims: int, size: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(size)
    recipe = Codebook(min(size, rows * vectors), (1, dims))
    codes = torch.randint(recipe.size, (rows, vectors), generator=generator).to(  # type: ignore[arg-type]
        torch.uint8 if size <= 256 else torch.int32
    )
    side = quantize(recipe.centroids, matrix(int(recipe.size), dims))
    quantized = Quantized(recipe, (rows, vectors * dims), {"codes": codes}, {"centroids": side})
    packed = pack_tensor(quantized)
    assert isinstance(packed, Vectors | Rows)
    assert torch.equal(packed.decode(), quantized.decode())
    check_product(packed, quantized.decode(), batch)


@settings(max_examples=40)
@given(
    rows=st.integers(8, 70), cols=st.integers(2, 140), size=st.integers(1, 70), batch=st.integers(0, 20),
    centroids=st.sampled_from([Float(), Float("float16"), Uniform(4, (1, -1))]), bias=st.booleans(),
)  # fmt: skip
def test_any_rows(rows: int, cols: int, size: int, batch: int, centroids: Quantizer, bias: bool) -> None:
    """Few centroids, which registers hold, and many; labels of every kind."""
    generator = torch.Generator().manual_seed(size)
    recipe = Codebook(min(size, rows), (1, -1), centroids=centroids)
    codes = torch.randint(recipe.size, (rows, 1), generator=generator).to(torch.uint8)  # type: ignore[arg-type]
    side = quantize(centroids, matrix(int(recipe.size), cols))
    quantized = Quantized(recipe, (rows, cols), {"codes": codes}, {"centroids": side})
    packed = pack_tensor(quantized)
    assert isinstance(packed, Rows)
    assert torch.equal(packed.decode(), quantized.decode())
    check_product(packed, quantized.decode(), batch, bias=bias)


def test_the_form_follows_from_recipe_and_blocks() -> None:
    w = matrix(64, 128)

    def form(recipe: Uniform | Codebook) -> type[Packed]:
        return type(pack_tensor(quantize(padded(recipe), w, options=FitOptions(iterations=3))))

    assert form(Uniform(4, (1, 32))) is Levels
    assert form(Uniform(4, (1, 4))) is Streams  # scales that change within what an instruction serves
    assert form(Uniform(4, (2, 32))) is Streams
    assert form(Codebook(16, (1, 4))) is Vectors
    assert form(Codebook(16, (1, -1))) is Rows
    assert form(Codebook(16, (1, 1))) is Levels
    assert form(Codebook(16, (2, 2))) is Streams


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_memory_is_near_the_fixed_width(bits: int) -> None:
    recipe = Uniform(bits, (1, -1), symmetric=False)
    packed = pack_tensor(quantize(recipe, matrix(256, 1024)))
    assert 8 * packed.nbytes / (256 * 1024) <= bits + 0.1


@pytest.mark.parametrize(
    "recipe",
    [
        Uniform(4, (1, -1)),
        Codebook(16, (1, 2)),
        Codebook(0.25, (1, -1)),
        Codebook(0.25, (1, -1), centroids=Uniform(4, (1, -1))),
    ],
    ids=repr,
)
def test_threads_do_not_change_a_product(recipe: Uniform | Codebook) -> None:
    packed = pack_tensor(quantize(recipe, matrix(128, 512), options=FitOptions(iterations=2)))
    before = torch.get_num_threads()
    for batch in (4, 41):
        x, bias = matrix(batch, 512, 1), matrix(1, 128, 2)[0]
        one = packed.linear(x, bias)
        try:
            torch.set_num_threads(2)
            assert torch.equal(packed.linear(x, bias), one)
        finally:
            torch.set_num_threads(before)


def test_a_bias_of_other_strides_or_of_another_type_is_added_as_torch_would() -> None:
    packed = pack_tensor(quantize(Uniform(4, (1, -1)), matrix(40, 64)))
    x, values = matrix(3, 64, 1), matrix(40, 2, 2)
    for bias in (values[:, 0], values[:, 0].half()):
        assert torch.equal(packed.linear(x, bias), packed.linear(x, None) + bias)
