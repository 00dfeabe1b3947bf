"""The price of codewords: its gradient against a difference, codes, dead codewords, and training on the digits."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Generator, Tensor, nn

from bitbook import ECSQ, Binary, Codebook, FitOptions, Plan, Pruned, Quantizer, Regime, Uniform, load, quantize_, save
from bitbook.apply import freeze
from bitbook.data import load_dataset
from bitbook.errors import PlanError
from bitbook.loop import evaluate
from bitbook.models import build_model
from bitbook.qat import FakeQuantize
from bitbook.quantizer import Quantized, quantize, select_rows
from bitbook.rate.pricing import Pricing
from bitbook.rate.training import RateTraining, Trained, train
from bitbook.rate.vectors import Book, PricedCodebook, soft_pull
from bitbook.vector import cheapest as search

RECIPES = [
    Codebook(16, (1, 4)),
    Codebook(16, (1, 8), Uniform(5)),
    Codebook(16, (2, 2), ECSQ()),
    Codebook(8, (1, 4), Uniform(5, (1, -1))),
]


def book(generator: Generator, blocks: int, size: int = 3, used: int = 7) -> Book:
    codewords, bits = torch.randn(used, size, generator=generator), 8 * torch.rand(used, generator=generator)
    bits[2] = 0
    working = torch.rand(blocks, generator=generator) * 3
    return Book(codewords, torch.arange(used), 2, bits, working, 0.7)


def source_of(recipe: Quantizer) -> FakeQuantize:
    w = torch.randn(16, 24, generator=Generator().manual_seed(0)).pow(3)
    regime = Regime(codes="latent")
    return FakeQuantize(recipe, nn.Parameter(w), regime=regime, generator=Generator().manual_seed(0))


def test_the_pull_is_the_slope_of_the_expected_bits() -> None:
    generator = Generator().manual_seed(0)
    blocks, rows = torch.randn(9, 3, generator=generator), slice(2, 7)
    b = book(generator, 9)

    def expected_bits(x: Tensor) -> Tensor:
        bits = (b.bits + b.working[rows, None]).double()
        bits[:, b.idle] = 0
        distance = (x[:, None] - b.codewords.double()).square().sum(2)
        return (torch.exp(-distance / b.temperature) * 2**-bits).div_(
            (torch.exp(-distance / b.temperature) * 2**-bits).sum(1, keepdim=True)
        ).mul(bits).sum(1)  # fmt: skip

    found = soft_pull(b, blocks[rows], rows)
    for axis in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[axis] = 1e-5
        x = blocks[rows].double()
        slope = (expected_bits(x + step) - expected_bits(x - step)) / 2e-5
        torch.testing.assert_close(found[:, axis].double(), slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 4, 5), (130, 7, 16), (200, 2, 300)], ids=str)
@pytest.mark.parametrize("served", [True, False])
def test_the_cheapest_codeword_is_found(
    shape: tuple[int, int, int], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not served:
        monkeypatch.setattr(search, "serve", lambda w: False)
        monkeypatch.setattr(search, "_CHUNK", 64)
    n, d, k = shape
    generator = Generator().manual_seed(n)
    x, c = (torch.randn(m, d, generator=generator) for m in (n, k))
    cost, own = (torch.rand(m, generator=generator) for m in (k, n))
    total = (x[:, None].double() - c.double()).square().sum(2) + cost
    total[:, k // 2] += own - cost[k // 2]
    labels = search.cheapest(x, c, cost, k // 2, own)
    found = total.gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(found, total.min(1).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_without_a_price_codes_are_the_nearest(recipe: Quantizer) -> None:
    source = source_of(recipe)
    nearest = source.recipe.encode(cast(Tensor, source.latent), source.side_values())["codes"]
    priced = PricedCodebook(source)
    priced.assign(0.0)
    assert torch.equal(source.codes["codes"], nearest)
    before = priced.bits
    priced.assign(1.0)
    assert priced.bits <= before
    priced.encode_(10.0)
    assert priced.bits < before


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_dead_codewords_leave_the_file_and_nothing_else_changes(recipe: Quantizer) -> None:
    source = source_of(recipe)
    codes = source.recipe.encode(cast(Tensor, source.latent), source.side_values())["codes"].clone()
    kept = len(source.side_values()["centroids"])
    codes[codes == 3] = 0
    codes[codes == 5] = 1
    source.assign_({"codes": codes})
    value = source().detach()
    frozen = source.freeze()
    assert torch.equal(frozen.decode(), value)
    assert cast(Codebook, frozen.recipe).size == kept - 2 and frozen.side["centroids"].shape[0] == kept - 2
    assert int(frozen.codes["codes"].max()) == kept - 3


def test_a_count_gives_up_the_unused_for_good() -> None:
    source = source_of(Codebook(16, (1, 4), Uniform(5)))
    codes = source.recipe.encode(cast(Tensor, source.latent), source.side_values())["codes"].clone()
    codes[codes == 3] = 0
    priced = PricedCodebook(source)
    source.assign_({"codes": codes})
    priced.count()
    assert 3 not in priced.book.symbols
    priced.assign(0.0)
    assert not bool((source.codes["codes"] == 3).any())


@pytest.mark.parametrize("recipe", [Uniform(4), Uniform(4, (1, -1)), Uniform(4, (-1, 1)), ECSQ(2, (1, -1))], ids=str)
def test_selected_rows_are_what_they_were(recipe: Quantizer) -> None:
    whole = quantize(recipe, torch.randn(12, 6, generator=Generator().manual_seed(0)))
    rows = torch.tensor([0, 3, 4, 11])
    assert torch.equal(cast(Quantized, select_rows(whole, rows)).decode(), whole.decode()[rows])


@pytest.mark.parametrize("recipe", [Uniform(4, (4, -1)), Pruned(0.5), Codebook(12, (1, 2))], ids=str)
def test_rows_that_are_not_stored_apart_stay_together(recipe: Quantizer) -> None:
    whole = quantize(recipe, torch.randn(12, 6, generator=Generator().manual_seed(0)))
    assert select_rows(whole, torch.tensor([0, 3, 4])) is None


@pytest.mark.parametrize("recipe", [Binary(), Codebook(4, (1, 4))], ids=str)
def test_what_has_no_price_is_refused(recipe: Quantizer) -> None:
    model = nn.Sequential(nn.Linear(12, 20))
    quantize_(model, Plan({"*.weight": recipe}))  # frozen codes, in the codebook's case
    with pytest.raises(PlanError, match=r"ECSQ\(\), a learned scale, or a Codebook"):
        Pricing(model, 1.0, steps=10)


def test_codewords_that_are_themselves_priced_are_pulled_to_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    quantize_(model, Plan({"*.weight": Codebook(16, (1, 4), ECSQ())}), regime=Regime(codes="latent"))
    Pricing(model, 1.0, steps=10, ramp=0.0, smooth=0.0).add()
    source = cast(FakeQuantize, model[0].slots.weight)  # type: ignore[union-attr]
    codewords = cast(Tensor, cast(FakeQuantize, source.side.centroids).latent)
    assert codewords.grad is not None and bool((codewords.grad * codewords >= 0).all())


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_dataset("digits")
    return (data.train_x + 1) / 2, data.train_y, (data.test_x + 1) / 2, data.test_y


@pytest.mark.parametrize("recipe", [Codebook(32, (1, 4), Uniform(5)), Codebook(32, (1, 2), ECSQ())], ids=str)
def test_a_higher_price_gives_a_smaller_file(recipe: Quantizer, digits: tuple[Tensor, ...], tmp_path: Path) -> None:
    plan = Plan({"*.weight": recipe})
    training = RateTraining(epochs=12, batch=64, lr=4e-3, side_lr=1e-3, smooth=0.5)
    found: list[Trained] = []
    for lam in (1e-5, 3e-5, 1e-4, 3e-4):
        model = build_model("mlp-64-32-16-10", seed=0)
        found.append(train(model, digits[:2], plan, lam=lam, training=training, options=FitOptions(iterations=20)))
    sizes = [result.bytes for result in found]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.96 * sizes[0]  # biases are floats
    for result in found:
        save(result.artifact, tmp_path / "net.safetensors")
        fresh = load(tmp_path / "net.safetensors", build_model("mlp-64-32-16-10", seed=1))
        assert torch.equal(fresh(digits[2]), result.model.eval()(digits[2]))  # the file is what training saw
        assert all(torch.equal(a, b) for a, b in zip(
            freeze(result.model).state_dict().values(), result.artifact.state_dict().values(), strict=True
        ))  # fmt: skip
    assert evaluate(found[0].model, *digits[2:]).accuracy > 75
