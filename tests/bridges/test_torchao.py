from __future__ import annotations

import pytest
import torch
from torch import nn

from bitbook import Activation, FitOptions, Plan, Uniform, freeze, quantize_
from bitbook.errors import PlanError

# Its own registrations of enums, and libraries of other platforms that it tries to load.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao", "ignore::FutureWarning:torchao")

torchao = pytest.importorskip("torchao.quantization", reason="the extra 'torchao' is not installed")
bridge = pytest.importorskip("bitbook.bridges.torchao")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval()


def test_quantize_is_ours_module_by_module() -> None:
    theirs, ours = model(), model()
    torchao.quantize_(theirs, bridge.BitbookConfig(Uniform(4, (1, 16)), FitOptions(range="mse")))
    quantize_(ours, Plan({"*.weight": Uniform(4, (1, 16))}), options=FitOptions(range="mse"))
    x = torch.randn(4, 32)
    assert torch.equal(theirs(x), ours(x))
    assert freeze(theirs).tensors.keys() == freeze(ours).tensors.keys()
    theirs(x).sum().backward()  # it trains on


def test_plans_inputs_and_names() -> None:
    theirs = model()
    plan = Plan({"weight": Uniform(4), "bias": Uniform(8)}, {"*": Activation(Uniform(8))})
    torchao.quantize_(theirs, bridge.BitbookConfig(plan), filter_fn=lambda module, name: name == "2")
    ours = model()
    quantize_(ours, Plan({"2.weight": Uniform(4), "2.bias": Uniform(8)}, {"2": Uniform(8)}))
    x = torch.randn(4, 32)
    assert torch.equal(theirs(x), ours(x))
    assert freeze(theirs).inputs.keys() == {"2"}
    fqn = torchao.FqnToConfig({"0": bridge.BitbookConfig(Uniform(3))})
    torchao.quantize_(theirs, fqn, filter_fn=None)
    assert not torch.equal(theirs(x), ours(x))
    with pytest.raises(PlanError, match="the pattern 'fc' names no tensor; there are weight, bias"):
        torchao.quantize_(model(), bridge.BitbookConfig(Plan({"fc": Uniform(4)})))
