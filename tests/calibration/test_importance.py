"""Second moments against a slow reference: outputs' energy is the weights' in the metric of H."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bitbook import Activation, Plan, Uniform, quantize_, second_moments
from bitbook.calibration.importance import diagonal
from bitbook.errors import PlanError


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(0))


LAYERS: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (lambda: nn.Linear(5, 3), inputs(6, 5)),
    (lambda: nn.Linear(5, 3), inputs(4, 7, 5)),
    (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), inputs(5, 4, 9, 8)),
    (lambda: nn.Conv2d(4, 4, 3, padding="valid", groups=4), inputs(5, 4, 6, 6)),
    (lambda: nn.Conv2d(4, 8, (3, 2), padding="same", dilation=(1, 2)), inputs(3, 4, 7, 7)),
    (lambda: nn.Conv2d(2, 3, 3, padding=(2, 0), padding_mode="reflect"), inputs(3, 2, 7, 7)),
    (lambda: nn.Conv1d(3, 6, 3, groups=3, padding=1), inputs(4, 3, 10)),
    (lambda: nn.Conv1d(3, 6, 4, stride=3), inputs(3, 10)),
    (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), inputs(2, 2, 4, 5, 4)),
]


@pytest.mark.parametrize(("make", "x"), LAYERS)
def test_energy_of_outputs(make: Callable[[], nn.Module], x: Tensor) -> None:
    layer = make()
    (moments,) = second_moments(layer, [x[:1], x[1:]] if x.dim() > 2 or isinstance(layer, nn.Linear) else [x]).values()
    with torch.no_grad():
        weight = layer.get_parameter("weight")
        bias = layer.get_parameter("bias")
        y = layer(x) - (bias if isinstance(layer, nn.Linear) else bias.reshape(-1, *[1] * (weight.dim() - 2)))
        w = weight.double().reshape(len(moments), -1, moments.shape[1])
        channels = y.shape[-1] if isinstance(layer, nn.Linear) else len(weight)
        expected = float(y.double().square().sum()) / (y.numel() / channels)
    assert float(((w @ moments) * w).sum()) == pytest.approx(expected, rel=1e-5)
    assert diagonal(moments, tuple(weight.shape)).shape == weight.shape


def test_batches_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layer = inputs(300, 3, 6, 6), nn.Conv2d(3, 4, 3, padding=1)
    whole = second_moments(layer, [x])["weight"]
    monkeypatch.setattr("bitbook.calibration.uses._MOST_PATCHES", 5000)
    torch.testing.assert_close(second_moments(layer, x.split(7))["weight"], whole, rtol=1e-5, atol=1e-7)
    rows = inputs(1000, 5)
    expected = rows.double().mT @ rows.double() / 1000
    torch.testing.assert_close(second_moments(nn.Linear(5, 2), [rows])["weight"][0], expected, rtol=1e-5, atol=1e-7)


def test_tied_weights_add_up() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    model, x = Tied(), inputs(50, 4)
    found = second_moments(model, [x])
    assert list(found) == ["first.weight"]
    with torch.no_grad():
        both = torch.cat([x, model.first(x).relu()]).double()
    torch.testing.assert_close(found["first.weight"][0], both.mT @ both / 100, rtol=1e-5, atol=1e-7)
    assert list(second_moments(model, [x], ["second.weight"])) == ["second.weight"]


def test_a_function_of_ones_own_is_seen_and_modes_come_back() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(3, 4))
            self.drop = nn.Dropout(0.9)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(input=self.drop(x), weight=self.matrix)

    model, x = Own(), inputs(20, 4)
    found = second_moments(model, [x])["matrix"][0]
    torch.testing.assert_close(found, x.double().mT @ x.double() / 20, rtol=1e-5, atol=1e-7)
    assert model.training and model.drop.training


def test_quantized_inputs_are_measured_as_the_layer_sees_them() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    quantize_(model, Plan(inputs={"0": Activation(Uniform(2))}))
    found = second_moments(model, [inputs(64, 4)])["0.weight"]
    assert not torch.allclose(found[0].float(), inputs(64, 4).mT @ inputs(64, 4) / 64, rtol=0.01)


def test_what_is_not_reached_says_so() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    tokens = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(PlanError, match=r"0.weight: an embedding has its inputs along the first axis .* in Embedding"):
        second_moments(model, [tokens], ["0.weight"])
    with pytest.raises(PlanError, match="no parameter 'x' of its own; it has 0.weight"):
        second_moments(model, [tokens], ["x"])
    with pytest.raises(PlanError, match="no calibration inputs"):
        second_moments(model, [])
    with pytest.raises(PlanError, match="NaN or infinity"):
        second_moments(nn.Linear(2, 2), [torch.full((3, 2), float("nan"))])
    with pytest.raises(PlanError, match="do not fit a weight"):
        diagonal(torch.eye(3), (2, 4))
