"""Everything trains and runs where the model is: on a GPU where there is one, and on a pretended one everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests import pretended
from tests.laws.cases import QUANTIZERS, Case
from torch import nn

from bitbook import Activation, FakeQuantize, Integer, Plan, Training, Uniform, freeze, quantize, quantize_, run_epochs
from bitbook.apply import restore
from bitbook.runtime import restore_packed
from bitbook.runtime.forms import pack_tensor

CASES = list({type(case.recipe): case for case in QUANTIZERS if not isinstance(case.recipe, Integer)}.values())
"""One of each kind."""


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "pretended":
        with pretended.device() as device:
            yield device
        return
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    yield torch.device("cuda")


def weights() -> torch.Tensor:
    return torch.randn(48, 96, generator=torch.Generator().manual_seed(0))


def source(case: Case, w: torch.Tensor) -> FakeQuantize:
    generator = torch.Generator().manual_seed(0)
    return FakeQuantize(case.recipe, nn.Parameter(w), options=case.options, generator=generator)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_recipe_trains_there(case: Case, device: torch.device) -> None:
    here, there = source(case, weights()), source(case, weights().to(device))
    value = there()
    assert value.device.type == device.type
    value.square().sum().backward()
    torch.testing.assert_close(value.detach().cpu(), here().detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(there.freeze().decode().cpu(), here().detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_recipe_runs_packed_there(case: Case, device: torch.device) -> None:
    packed = pack_tensor(quantize(case.recipe, weights(), options=case.options))
    x = weights()[:3]
    y = packed.linear(x, None)
    there = packed.to(device).linear(x.to(device), None)
    assert there.device.type == device.type
    torch.testing.assert_close(there.cpu(), y, rtol=1e-4, atol=1e-4)


def test_quantizing_moves_nothing(device: torch.device) -> None:
    quantized = quantize(Uniform(4, (1, 32), scale=Uniform(8)), weights().to(device))
    assert quantized.decode().device.type == device.type
    assert torch.equal(quantized.decode().cpu(), quantize(Uniform(4, (1, 32), scale=Uniform(8)), weights()).decode())


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.mark.gpu
def test_a_model_trains_freezes_and_loads_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    model, x = make().cuda(), torch.randn(256, 16).cuda()
    y = (x[:, :4] * 2).argmax(1)
    activation = Activation(Uniform(8), range="running")
    quantize_(model, Plan({"*.weight": Uniform(4, (1, -1))}, {"2": activation}))
    run_epochs(model, x, y, Training(4, 0.1))
    artifact = freeze(model)
    trained, dense = model.eval()(x), restore(artifact, make().cuda())(x)
    torch.testing.assert_close(dense, trained, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(restore_packed(artifact, make().cuda())(x), trained, rtol=1e-3, atol=1e-3)
