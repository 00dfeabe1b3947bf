from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bitbook import Codebook, FakeQuantize, FitOptions, Plan, Uniform, quantize_
from bitbook.errors import PlanError
from bitbook.slot import attach, detach, slots
from bitbook.testing import check_source


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded_make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make()

    return seeded_make


class Tied(nn.Module):
    """An embedding and an output layer that share one weight, and one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(self.embedding(tokens)).relu()))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    attribute: str
    inputs: Sequence[Any]
    once: bool = True


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


CASES = {
    "linear": Case(lambda: nn.Linear(8, 6), "weight", [noise(3, 8)]),
    "linear bias": Case(lambda: nn.Linear(8, 6), "bias", [noise(3, 8)]),
    "conv1d": Case(lambda: nn.Conv1d(3, 4, 3, padding=1), "weight", [noise(2, 3, 9)]),
    "conv2d": Case(lambda: nn.Conv2d(3, 4, 3, stride=2), "weight", [noise(2, 3, 9, 9)]),
    "conv2d circular": Case(
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), "weight", [noise(2, 3, 9, 9)]
    ),
    "conv3d": Case(lambda: nn.Conv3d(2, 3, 2), "weight", [noise(2, 2, 4, 4, 4)]),
    "transposed conv": Case(lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), "weight", [noise(2, 3, 5, 5)]),
    "embedding": Case(lambda: nn.Embedding(10, 6), "weight", [torch.tensor([[1, 2, 3], [9, 1, 0]])]),
    "attention in": Case(SelfAttention, "attention.in_proj_weight", [noise(2, 5, 8)]),
    "attention out": Case(SelfAttention, "attention.out_proj.weight", [noise(2, 5, 8)]),
    "lstm": Case(lambda: nn.LSTM(5, 4, num_layers=2), "weight_hh_l0", [noise(3, 2, 5)]),
    "lstm both ways": Case(lambda: nn.LSTM(5, 4, bidirectional=True), "weight_ih_l0_reverse", [noise(3, 2, 5)]),
    "gru": Case(lambda: nn.GRU(5, 4), "weight_ih_l0", [noise(3, 2, 5)]),
    "lstm cell": Case(lambda: nn.LSTMCell(5, 4), "weight_ih", [noise(3, 5)]),
    "layer norm": Case(lambda: nn.LayerNorm(8), "weight", [noise(3, 8)]),
    "used twice": Case(Tied, "twice.weight", [torch.tensor([[1, 2, 3]])], once=False),
}


@pytest.mark.parametrize("name", CASES)
def test_battery(name: str) -> None:
    case = CASES[name]
    # Gains of one sit far from zero, where the range (max - min) / 2 does not reach.
    gain = (lambda t: FakeQuantize(Uniform(4), t, options=FitOptions(range="absmax"))) if "norm" in name else None
    check_source(seeded(case.make), case.attribute, case.inputs, make_source=gain, once=case.once)


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "lstm"])
def test_battery_with_frozen_codes(name: str) -> None:
    case = CASES[name]

    def clustered(tensor: Tensor) -> FakeQuantize:
        return FakeQuantize(Codebook(4, (1, -1)), tensor, generator=torch.Generator().manual_seed(0))

    check_source(seeded(case.make), case.attribute, case.inputs, make_source=clustered)


class Constant(nn.Module):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(tensor.detach() * 2)

    def forward(self) -> Tensor:
        return self.values


def test_any_module_is_a_source() -> None:
    check_source(seeded(CASES["linear"].make), "weight", [noise(3, 8)], make_source=Constant)


def test_several_tensors_of_one_module_have_sources() -> None:
    lstm = seeded(lambda: nn.LSTM(5, 4))()
    expected = lstm(noise(3, 2, 5))[0]
    names = ["weight_ih_l0", "bias_hh_l0", "weight_hh_l0"]
    for name in names:
        attach(lstm, name, Constant(getattr(lstm, name) / 2))
    assert list(slots(lstm)) == names
    assert torch.equal(lstm(noise(3, 2, 5))[0], expected)
    for name in names:
        detach(lstm, name)
        assert torch.equal(lstm(noise(3, 2, 5))[0], expected)
    assert type(lstm) is nn.LSTM and all(isinstance(w, nn.Parameter) for w in lstm._flat_weights)
    lstm.double()
    assert lstm(noise(3, 2, 5).double())[0].dtype == torch.float64


def test_a_buffer_can_have_a_source() -> None:
    norm = nn.BatchNorm1d(4).eval()
    attach(norm, "running_var", Constant(torch.ones(4)))
    with torch.no_grad():  # batch normalization does not differentiate in it
        normed = norm(torch.ones(2, 4))
    assert torch.allclose(normed, torch.ones(2, 4) / (2 + norm.eps) ** 0.5)


def test_a_child_named_slots_is_refused_and_nothing_changes() -> None:
    module = nn.Linear(2, 2)
    module.add_module("slots", nn.Identity())
    with pytest.raises(PlanError, match="rename"):
        attach(module, "weight", Constant(module.weight))
    assert type(module) is nn.Linear
    module(torch.ones(1, 2))


def test_the_cache_does_not_outlive_a_failing_forward() -> None:
    module = nn.Linear(4, 2)
    attach(module, "weight", Constant(module.weight))
    with pytest.raises(RuntimeError, match="shape"):
        module(torch.ones(1, 3))
    with torch.no_grad():
        slots(module)["weight"].values.zero_()
    assert not module.weight.any()


# Both are torch's own, while it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["linear", pytest.param("conv2d", marks=pytest.mark.slow)])
def test_compile(name: str) -> None:
    case = CASES[name]
    module = seeded(case.make)()
    attach(module, "weight", FakeQuantize(Uniform(4), module.weight))
    expected = module(*case.inputs)
    expected.sum().backward()
    gradient = slots(module)["weight"].latent.grad.clone()
    module.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager")
    output = compiled(*case.inputs)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert torch.equal(slots(module)["weight"].latent.grad, gradient)
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert torch.equal(compiled(*case.inputs), module(*case.inputs))


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding"])
@pytest.mark.parametrize("recipe", [Uniform(4), Codebook(4, (1, -1))], ids=repr)
def test_export(name: str, recipe: Any) -> None:
    case = CASES[name]
    module = seeded(case.make)().eval()
    generator = torch.Generator().manual_seed(0)
    attach(module, "weight", FakeQuantize(recipe, module.weight, generator=generator))
    expected = module(*case.inputs)
    exported = torch.export.export(module, tuple(case.inputs)).module()
    assert torch.equal(exported(*case.inputs), expected)
    assert torch.equal(module(*case.inputs), expected)  # tracing left the model alone


def test_distributed_data_parallel(tmp_path: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Sequential(seeded(lambda: nn.Linear(8, 6))(), nn.ReLU(), nn.Linear(6, 3))
        quantize_(model, Plan({"*.weight": Uniform(4)}))
        alone = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
            parallel = nn.parallel.DistributedDataParallel(model)
        for step in range(3):
            for each in (parallel, alone):
                each.zero_grad()
                each(noise(4, 8) + step).square().sum().backward()
                torch.optim.SGD(each.parameters(), lr=0.01).step()
        assert torch.equal(parallel(noise(4, 8)), alone(noise(4, 8)))
    finally:
        torch.distributed.destroy_process_group()
