"""Error feedback for whole models: what it gains, in which order, and what is left out aloud."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Generator, Tensor, nn

from bitbook import (
    ECSQ,
    Activation,
    Artifact,
    Codebook,
    FeedbackOptions,
    FeedbackReport,
    Plan,
    Quantized,
    Training,
    Uniform,
    compress,
    freeze,
    load,
    save,
)
from bitbook.errors import PlanError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def images(count: int, seed: int) -> Tensor:
    smooth = torch.randn(count, 1, 3, 3, generator=Generator().manual_seed(seed))
    return nn.functional.interpolate(smooth, (8, 8), mode="bilinear")


@torch.no_grad()
def outputs_error(model: nn.Module, artifact: Artifact, tmp_path: object) -> float:
    path = f"{tmp_path}/file.safetensors"
    save(artifact, path)
    loaded = load(path, copy.deepcopy(model))
    x = images(200, 9)
    return float((loaded(x) - model(x)).square().mean())


@pytest.mark.parametrize("recipe", [Uniform(3), Codebook(32, (1, 3), pad=True), ECSQ()])
def test_a_model_answers_more_like_the_original(recipe: Uniform | Codebook | ECSQ, tmp_path: object) -> None:
    model, plan = network(), Plan({"*.weight": recipe})
    before = copy.deepcopy(model.state_dict())
    plain = compress(model, plan)
    errors = [
        outputs_error(
            model, compress(model, plan, calibration=images(300, 1), feedback=FeedbackOptions(sequential=s)), tmp_path
        )
        for s in (True, False)
    ]
    assert max(errors) < 0.6 * outputs_error(model, plain, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_layers_are_encoded_in_the_order_of_use_and_exceptions_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.unused = nn.Linear(6, 3), nn.Linear(4, 6), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    seen: dict[str, FeedbackReport | str] = {}
    plan = Plan({"first.weight": Codebook(2, (1, -1)), "*": Uniform(4)})
    x = torch.randn(50, 4, generator=Generator().manual_seed(0))
    artifact = compress(Odd(), plan, calibration=x, after_tensor=seen.__setitem__)
    assert list(seen) == ["last.bias", "first.bias", "unused.weight", "unused.bias", "first.weight", "last.weight"]
    assert "no calibration input reaches it" in str(seen["unused.weight"])
    assert "encodes all columns together" in str(seen["first.weight"])
    assert isinstance(seen["last.weight"], FeedbackReport)
    assert list(artifact.tensors) == list(freeze(Odd()).tensors)
    assert all(isinstance(tensor, Quantized) for tensor in artifact.tensors.values())


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second)
    artifact = compress(model, Plan({"*.weight": Uniform(3)}), calibration=torch.randn(30, 4))
    assert dict(artifact.aliases) == {"2.weight": "0.weight"}
    assert isinstance(artifact.tensors["0.weight"], Quantized)


def test_input_ranges_are_calibrated_first(tmp_path: object) -> None:
    plan = Plan({"*.weight": Uniform(4)}, {"7": Activation(Uniform(4), "calibrated")})
    artifact = compress(network(), plan, calibration=images(100, 1))
    assert list(artifact.inputs) == ["7"]
    assert outputs_error(network(), artifact, tmp_path) > 0


def test_mistakes_are_named() -> None:
    model, x = network(), images(10, 1)
    with pytest.raises(PlanError, match="calibration or training, not both"):
        compress(model, Plan(), data=(x, torch.zeros(10).long()), training=Training(1), calibration=x)
    with pytest.raises(PlanError, match="no calibration inputs"):
        compress(model, Plan({"*.weight": Uniform(4)}), calibration=x[:0])
    with pytest.raises(PlanError, match=r"5.weight: 128 columns do not divide"):
        compress(model, Plan({"5.weight": Uniform(4, (1, 48))}), calibration=x)
