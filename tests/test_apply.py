"""Plans meet models: what was trained is what is stored, and what is restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitbook import (
    Activation,
    Artifact,
    Binary,
    Codebook,
    Float,
    Plan,
    Pruned,
    Regime,
    Ternary,
    Training,
    Uniform,
    calibrate,
    compress,
    dequantize_,
    freeze,
    ledger,
    load,
    quantize_,
    run_epochs,
    save,
)
from bitbook.apply import restore
from bitbook.artifact import from_bytes, to_bytes
from bitbook.errors import ModelMismatch, PlanError, WeightError
from bitbook.slot import slots


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def mlp(seed: int = 0) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), seed)


def convnet(seed: int = 0) -> nn.Module:
    def make() -> nn.Module:
        body = (nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(8 * 4, 4))

    return seeded(make, seed)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(tokens)).relu())


def tied(seed: int = 0) -> nn.Module:
    return seeded(Tied, seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


DATA = {
    mlp: (noise(100, 12), torch.arange(100) % 4),
    convnet: (noise(100, 1, 4, 4), torch.arange(100) % 4),
    tied: (torch.randint(9, (100,), generator=generator()), torch.randint(9, (100,), generator=generator(1))),
}
PLANS = {
    "scalar": Plan({"*.weight": Uniform(4)}),
    "scalar per channel, with biases": Plan({"*.bias": Float("bfloat16"), "*weight": Uniform(3, (1, -1))}),
    "binary": Plan({"*.weight": Binary()}),
    "rows": Plan({"*.weight": Codebook(0.5, (1, -1))}),
    "fused": Plan({"*.weight": Codebook(8, (1, 4), centroids=Uniform(5), pad=True)}),
    "mixed": Plan({"0.*": Ternary(), "*.weight": Pruned(0.5, Uniform(4))}),
}
RANGES: dict[str, dict[str, Any]] = {
    "no inputs": {},
    "batch": {"*": Uniform(4)},
    "running": {"*": Activation(Uniform(4, symmetric=False), "running")},
    "calibrated": {"*": Activation(Uniform(8), "calibrated")},
    "one bit": {"*": Activation(Binary(), "running", "minmax")},
}


def leaf_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The activation of each linear or convolutional layer."""
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return {name: activation for name in layers for activation in inputs.values()}


def trained(make: Callable[[], nn.Module], plan: Plan, **arguments: Any) -> nn.Module:
    model = make()
    quantize_(model, plan, generator=generator(), **arguments)
    x, y = DATA[make]  # type: ignore[index]
    if any(a is not None and a.range == "calibrated" for a in plan.inputs.values()):
        calibrate(model, [x])
    run_epochs(model, x, y, Training(epochs=2, lr=0.05, batch=16), generator=generator())
    return model.eval()


@pytest.mark.parametrize("inputs", RANGES)
@pytest.mark.parametrize("plan", PLANS)
def test_a_file_gives_the_trained_model_bit_for_bit(plan: str, inputs: str, tmp_path: Path) -> None:
    model = trained(mlp, Plan(PLANS[plan].weights, leaf_inputs(mlp(), RANGES[inputs])))
    path = tmp_path / "model.safetensors"
    written = save(freeze(model), path)
    assert written.total == path.stat().st_size == ledger(path).total
    fresh = load(path, mlp(seed=1)).eval()
    x = DATA[mlp][0]
    for batch in (x, x[:7]):
        assert torch.equal(fresh(batch), model(batch))
    assert not slots(fresh[0]) and isinstance(fresh[0].weight, nn.Parameter)


@pytest.mark.parametrize("make", [convnet, tied])
@pytest.mark.parametrize("plan", ["scalar", "fused", "rows"])
def test_buffers_and_tied_weights_come_back(make: Callable[..., nn.Module], plan: str) -> None:
    recipe = PLANS[plan].weights["*.weight"]
    model = trained(make, Plan({"*.weight" if make is tied else "[05].weight": recipe}))
    fresh = restore(from_bytes(to_bytes(freeze(model))[0]), make(seed=1)).eval()
    x = DATA[make][0]  # type: ignore[index]
    assert torch.equal(fresh(x), model(x))
    for name, buffer in model.named_buffers():
        if name in fresh.state_dict():
            assert torch.equal(fresh.state_dict()[name], buffer)
    assert model.training is False and (make is tied or model[1].running_mean.any())


def test_coverage_says_what_stayed_dense_and_why() -> None:
    model = convnet()
    plan = Plan({"0.weight": Uniform(4), "0.bias": None, "5.*": Codebook(4, (1, 4))})
    coverage = quantize_(model, plan, lambda module, name: not name.endswith("5.bias"), generator=generator())
    assert coverage.quantized == {"0.weight": Uniform(4), "5.weight": Codebook(4, (1, 4))}
    assert coverage.dense == {
        "0.bias": "by plan",
        "1.weight": "no pattern names it",
        "1.bias": "no pattern names it",
        "5.bias": "refused by filter_fn",
    }
    assert "0.weight: Uniform(4)" in str(coverage) and "0.bias: dense, by plan" in str(coverage)


def test_filter_fn_sees_the_module_and_the_name() -> None:
    seen = []
    quantize_(mlp(), Plan({"*.weight": Uniform(4)}), lambda module, name: bool(seen.append((type(module), name))))
    assert seen == [(nn.Linear, "0.weight"), (nn.Linear, "2.weight")]


def test_layers_keep_their_class_and_untouched_ones_are_untouched() -> None:
    model = mlp()
    bias = model[0].bias
    quantize_(model, Plan({"0.weight": Uniform(4)}))
    assert isinstance(model[0], nn.Linear) and type(model[2]) is nn.Linear and model[0].bias is bias


def test_importance_reaches_the_fit_by_name() -> None:
    importance = {"0.weight": torch.rand(16, 12, generator=generator()) ** 8}
    plan = Plan({"*.weight": Codebook(4, (1, 4))})
    plain, weighted = mlp(), mlp()
    quantize_(plain, plan, generator=generator())
    quantize_(weighted, plan, generator=generator(), importance=importance)
    error = [((m[0].weight - mlp()[0].weight) ** 2 * importance["0.weight"]).sum() for m in (weighted, plain)]
    assert error[0] < error[1]


# -- tied weights ------------------------------------------------------------------------------
def test_a_tied_weight_has_one_source_one_row_and_an_alias() -> None:
    model = tied()
    coverage = quantize_(model, Plan({"embedding.weight": Uniform(4)}))
    assert list(coverage.quantized) == ["embedding.weight"] and list(coverage.dense) == ["mix.weight", "mix.bias"]
    assert slots(model.embedding)["weight"] is slots(model.head)["weight"]
    artifact = freeze(model)
    assert artifact.aliases == {"head.weight": "embedding.weight"}
    dense = freeze(tied())
    assert dense.aliases == {"head.weight": "embedding.weight"}
    dequantize_(model)
    assert model.head.weight is model.embedding.weight


def test_two_recipes_for_one_tied_tensor_are_a_plan_error() -> None:
    model = tied()
    with pytest.raises(PlanError, match=r"embedding.weight: Uniform\(4\), head.weight: Uniform\(3\).*one tied tensor"):
        quantize_(model, Plan({"embedding.*": Uniform(4), "head.*": Uniform(3)}))
    assert not slots(model.embedding)


def test_a_module_used_under_two_names_is_stored_once() -> None:
    def make(seed: int = 0) -> nn.Module:
        layer = seeded(lambda: nn.Linear(4, 4), seed)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = make()
    quantize_(model, Plan({"*.weight": Uniform(4)}))
    artifact = freeze(model)
    assert sorted(artifact.tensors) == ["0.bias", "0.weight"]
    assert artifact.aliases == {"2.weight": "0.weight", "2.bias": "0.bias"}
    x = noise(3, 4)
    assert torch.equal(restore(artifact, make(1))(x), model(x))


# -- in place, or not at all -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan({"fc9.*": Uniform(4)}), "'fc9.*' names no tensor"),
        (Plan({"*.weight": Uniform(4)}, {"nothing": Uniform(8)}), "'nothing' names no module"),
        (Plan({"0.weight": Uniform(4), "2.weight": Uniform(4, (1, 7))}), "2.weight: 16 columns do not divide"),
    ],
)
def test_a_plan_that_fails_leaves_the_model_as_it_was(plan: Plan, message: str) -> None:
    model = mlp()
    before = model.state_dict()
    with pytest.raises(PlanError, match=message):
        quantize_(model, plan)
    assert model.state_dict().keys() == before.keys()
    assert all(type(m) is not type(m).__mro__[1] and not slots(m) for m in model.modules())


def test_a_bad_weight_is_named() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 3] = torch.nan
    with pytest.raises(WeightError, match=r"2.weight: the value at \(1, 3\) is nan"):
        quantize_(model, Plan({"*.weight": Uniform(4)}))
    assert not slots(model[0])


def test_dequantize_keeps_the_values_and_the_shape_of_the_model() -> None:
    model = mlp()
    quantize_(model, Plan({"*": Uniform(4)}, {"0": Uniform(8)}), generator=generator())
    values = {"0.weight": model[0].weight.detach().clone(), "2.bias": model[2].bias.detach().clone()}
    assert dequantize_(model) is model
    assert model.state_dict().keys() == mlp().state_dict().keys()
    for name, value in values.items():
        assert torch.equal(model.state_dict()[name], value)
    assert all(type(m).__module__.startswith("torch.nn") for m in model.modules())


def test_an_artifact_does_not_change_while_the_model_trains_on() -> None:
    model = mlp()
    quantize_(model, Plan({"*.weight": Codebook(4, (1, 4))}), generator=generator())
    artifact = freeze(model)
    before = to_bytes(artifact)[0]
    run_epochs(model, *DATA[mlp], Training(epochs=1, lr=0.5), generator=generator())
    assert to_bytes(artifact)[0] == before != to_bytes(freeze(model))[0]


def test_a_quantized_model_can_be_planned_further() -> None:
    model = mlp()
    quantize_(model, Plan({"0.weight": Uniform(4)}))
    coverage = quantize_(model, Plan({"2.weight": Uniform(3)}))
    assert coverage.quantized == {"2.weight": Uniform(3)} and slots(model[0]) and slots(model[2])


# -- files and models that do not belong together ----------------------------------------------
def _artifact() -> Artifact:
    model = mlp()
    quantize_(model, Plan({"*.weight": Uniform(4)}, {"2": Uniform(8)}))
    return freeze(model)


class Other(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def _input_quantized() -> nn.Module:
    model = mlp()
    quantize_(model, Plan({}, {"2": Uniform(8)}))
    return model


def _weight_quantized() -> nn.Module:
    model = mlp()
    quantize_(model, Plan({"0.weight": Uniform(8)}))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)),
            r"2.weight: \(4, 16\) in the file, \(5, 16\) in the model",
        ),
        (lambda: nn.Sequential(nn.Linear(12, 16)), r"lacks nothing .* has \['2.bias', '2.weight'\]"),
        (lambda: nn.Sequential(*mlp(), nn.Linear(4, 2)), r"lacks \['3.bias', '3.weight'\]"),
        (_weight_quantized, "quantized already"),
        (_input_quantized, "inputs of the model are quantized already"),
    ],
)
def test_another_models_file_leaves_the_model_untouched(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelMismatch, match=message):
        restore(_artifact(), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unknown_inputs_and_untied_tensors_do_not_fit() -> None:
    artifact = _artifact()
    renamed = Artifact(artifact.tensors, {"9": artifact.inputs["2"]})
    model = mlp(1)
    weight = model[0].weight.detach().clone()
    with pytest.raises(ModelMismatch, match=r"inputs of \['9'\]"):
        restore(renamed, model)
    assert torch.equal(model[0].weight, weight)
    loose = tied()
    loose.head.weight = nn.Parameter(loose.head.weight + 1)
    fresh = tied(1)
    weight = fresh.head.weight.detach().clone()
    with pytest.raises(ModelMismatch, match="embedding.weight and head.weight are one tied tensor in the model"):
        restore(freeze(loose), fresh)
    assert torch.equal(fresh.head.weight, weight)


# -- compress ----------------------------------------------------------------------------------
def test_compress_leaves_the_model_alone_and_repeats_itself() -> None:
    model, (x, y) = mlp(), DATA[mlp]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = Plan({"*.weight": Codebook(4, (1, 4))}, {"2": Activation(Uniform(8), "calibrated")})
    arguments: dict[str, Any] = {"data": (x, y), "training": Training(epochs=1, lr=0.1), "seed": 3}
    first, second = (to_bytes(compress(model, plan, **arguments))[0] for _ in range(2))
    assert first == second
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    other = to_bytes(compress(model, plan, **(arguments | {"seed": 4})))[0]
    assert other != first


def test_compress_without_training_is_quantize_and_freeze() -> None:
    plan = Plan({"*.weight": Uniform(3)})
    model = mlp()
    quantize_(model, plan)
    assert to_bytes(compress(mlp(), plan))[0] == to_bytes(freeze(model))[0]


def test_compress_says_when_it_needs_data() -> None:
    with pytest.raises(PlanError, match="training needs data"):
        compress(mlp(), Plan(), training=Training())
    with pytest.raises(PlanError, match="calibrated input range needs data"):
        compress(mlp(), Plan({}, {"0": Activation(Uniform(8), "calibrated")}))


@pytest.mark.parametrize(
    "regime", [Regime(side="learned"), Regime(codes="frozen"), Regime(codes="latent", reassign_every=3)]
)
def test_every_regime_is_stored_as_trained(regime: Regime) -> None:
    for recipe in (Uniform(3, (1, 4)), Codebook(8, (1, 4), centroids=Uniform(5))):
        model = trained(mlp, Plan({"*.weight": recipe}), regime=regime)
        fresh = restore(from_bytes(to_bytes(freeze(model))[0]), mlp(1)).eval()
        assert torch.equal(fresh(DATA[mlp][0]), model(DATA[mlp][0]))


def test_other_layer_types_need_nothing() -> None:
    class Zoo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.conv = nn.Conv1d(5, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.lstm(x)[0]
            return self.conv(self.attention(h, h, h)[0])

    model = seeded(Zoo)
    quantize_(model, Plan({"*weight*": Uniform(4, (1, -1))}))
    x = noise(3, 5, 6)
    model(x).sum().backward()
    fresh = restore(from_bytes(to_bytes(freeze(model))[0]), seeded(Zoo, 1))
    assert torch.equal(fresh(x), model(x))
