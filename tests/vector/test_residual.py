from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from bitbook import Binary, Codebook, FakeQuantize, Float, Quantizer, Residual, Uniform, quantize
from bitbook.artifact import Artifact, from_bytes, to_bytes
from bitbook.errors import PlanError
from bitbook.plan import parse_recipe, recipe_from_json, recipe_to_json


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def mse(recipe: Quantizer, w: Tensor, importance: Tensor | None = None) -> float:
    decoded = quantize(recipe, w, generator=generator(), importance=importance).decode()
    square = (decoded - w).square()
    return float((square if importance is None else square * importance).mean())


def test_each_stage_codes_what_the_ones_before_it_leave() -> None:
    w, first, second = weights(16, 16), Codebook(8, (1, 4)), Uniform(3, (1, 16))
    q = quantize(Residual((first, second)), w, generator=generator())
    one = quantize(first, w, generator=generator())
    two = quantize(second, w - one.decode())
    assert torch.equal(q.decode(), one.decode() + two.decode())
    assert torch.equal(q.codes["codes_1"], one.codes["codes"]) and torch.equal(q.codes["codes_2"], two.codes["codes"])
    assert list(q.side) == ["centroids_1", "scale_2"]
    assert [s.spec.name for s in q.streams()] == ["centroids_1.bits", "scale_2.bits", "codes_1", "codes_2"]


@pytest.mark.parametrize("centroids", [Float(), Uniform(5)], ids=repr)
def test_codebooks_together_beat_codebooks_one_by_one(centroids: Quantizer) -> None:
    w = weights(64, 64)
    stages = tuple(Codebook(16, (1, 4), centroids=centroids) for _ in range(3))
    left = w
    for stage in stages:
        left = left - quantize(stage, left, generator=generator()).decode()
    assert mse(Residual(stages), w) < 0.97 * float(left.square().mean())
    assert mse(Residual(stages), w) <= mse(Residual(stages, beam=1), w)


def test_importance_counts() -> None:
    w = weights(32, 32)
    importance = torch.rand(32, 32, generator=torch.Generator().manual_seed(1)) ** 4
    recipe = Residual((Codebook(8, (1, 4)), Codebook(8, (1, 4))))
    plain = quantize(recipe, w, generator=generator()).decode()
    assert mse(recipe, w, importance) < float(((plain - w).square() * importance).mean())


def test_a_decoder_does_not_know_the_beam() -> None:
    recipe = Residual((Codebook(4), Codebook(4)), beam=2)
    assert quantize(recipe, weights(8, 8), generator=generator()).recipe == Residual((Codebook(4), Codebook(4)))


def test_stages_survive_text_and_file() -> None:
    recipe = Residual((Codebook(0.25, (1, 2), centroids=Uniform(5)), Residual((Uniform(2), Binary()))), beam=3)
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe)))) == recipe
    assert recipe_to_json(Residual((Uniform(4), Binary()))) == ["Residual", [["Uniform", 4], "Binary"]]
    assert parse_recipe(repr(recipe)) == recipe
    q = quantize(recipe, weights(8, 8), generator=generator())
    assert list(q.side) == ["centroids_1", "scale_1_2", "scale_2_2"]
    stored = from_bytes(to_bytes(Artifact({"w": q}))[0])
    assert torch.equal(stored.decode("w"), q.decode())


def test_what_trains() -> None:
    def names(*stages: Quantizer) -> list[str]:
        source = FakeQuantize(Residual(stages), nn.Parameter(weights(8, 8)), generator=generator())
        return [name for name, _ in source.named_parameters()]

    assert names(Codebook(4), Codebook(2)) == ["side.centroids_1.latent", "side.centroids_2.latent"]
    assert names(Uniform(4), Uniform(2)) == ["latent"]
    assert names(Uniform(4), Codebook(2)) == ["latent", "side.scale_1.latent", "side.centroids_2.latent"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Residual((Uniform(4),)), "1 stages: use 2 to 16"),
        (lambda: Residual((Uniform(4),) * 17), "17 stages"),
        (lambda: Residual([Uniform(4), Uniform(4)]), "tuple of quantizers"),  # type: ignore[arg-type]
        (lambda: Residual((Uniform(4), 4)), "tuple of quantizers"),  # type: ignore[arg-type]
        (lambda: Residual((Uniform(4), Uniform(4)), beam=0), "1 to 256"),
        (lambda: recipe_from_json(["Residual", [["Uniform", 4], 4]]), "not a recipe"),
        (lambda: recipe_from_json(["Residual", 4]), "use tuple"),
        (lambda: parse_recipe("Residual((Uniform(4), print(1)))"), "no quantizer print"),
        (lambda: parse_recipe("Residual(" * 12 + "(Uniform(4), Uniform(4))" + ")" * 12), "Residual|deep|recipe"),
    ],
)
def test_refusals(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match=message):
        make()
