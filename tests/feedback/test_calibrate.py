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


# -- layers of every kind ----------------------------------------------------------------------
class LastState(nn.Module):
    def __init__(self, recurrent: nn.RNNBase, outputs: int) -> None:
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(outputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0].mean(1))


class Language(nn.Module):
    """An embedding tied to the output layer, and named after it."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.embedding = nn.Linear(12, 30, bias=False), nn.Embedding(30, 12)
        self.block = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)
        self.embedding.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.shared, self.leave = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.shared(self.shared(self.enter(x).relu()).relu()).relu())


def attention() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)


def separable() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(),
        nn.ConvTranspose2d(16, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(324, 5),
    )  # fmt: skip


def correlated(*shape: int) -> Tensor:
    """Vectors whose coordinates go together, as hidden activations do."""
    generator = Generator().manual_seed(3)
    mix = torch.randn(shape[-1], shape[-1], generator=generator) / shape[-1] ** 0.5
    return torch.randn(shape, generator=generator) @ mix + 0.5


KINDS = {
    "LSTM": (lambda: LastState(nn.LSTM(8, 12, 2, batch_first=True), 12), correlated(150, 7, 8)),
    "GRU": (lambda: LastState(nn.GRU(8, 12, bidirectional=True, batch_first=True), 24), correlated(150, 7, 8)),
    "attention": (attention, correlated(100, 5, 8)),
    "separable": (separable, correlated(100, 6, 6, 8).movedim(-1, 1)),
    "tied": (Language, torch.randint(30, (100, 6), generator=Generator().manual_seed(0))),
    "shared": (Twice, correlated(300, 8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_gains_end_to_end(kind: str, tmp_path: object) -> None:
    make, x = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    plan, seen = Plan({name: Uniform(4) for name, value in model.named_parameters() if value.dim() > 1}), {}
    errors = []
    for inputs in (None, [(x, None)]):
        artifact = compress(model, plan, calibration=inputs, after_tensor=seen.__setitem__)
        save(artifact, f"{tmp_path}/file.safetensors")
        loaded = load(f"{tmp_path}/file.safetensors", copy.deepcopy(model)).eval()
        with torch.no_grad():
            errors.append(float((loaded(x) - model(x)).square().mean()))
    assert errors[1] < 0.9 * errors[0]
    plain = {name for name, report in seen.items() if isinstance(report, str) and model.get_parameter(name).dim() > 1}
    assert plain == ({"4.weight"} if kind == "separable" else set())
    if kind == "separable":
        assert "transposed convolution has its inputs along the first axis" in str(seen["4.weight"])
        assert "errors weigh as each row's inputs do" in str(seen["4.weight"])


def test_a_tied_embedding_is_stored_once_for_the_output_layer(tmp_path: object) -> None:
    model, x = Language().eval(), KINDS["tied"][1]
    seen: dict[str, FeedbackReport | str] = {}
    plan = Plan({"*embedding.weight": Uniform(4), "head.weight": Uniform(4), "*": None})
    artifact = compress(model, plan, calibration=x, after_tensor=seen.__setitem__)
    assert dict(artifact.aliases) == {"embedding.weight": "head.weight"}
    assert isinstance(artifact.tensors["head.weight"], Quantized) and "embedding.weight" not in artifact.tensors
    assert list(seen) == ["head.weight"] and isinstance(seen["head.weight"], FeedbackReport)
    save(artifact, f"{tmp_path}/file.safetensors")
    loaded = load(f"{tmp_path}/file.safetensors", Language())
    assert loaded.embedding.weight is loaded.head.weight
    assert torch.equal(loaded.head.weight, artifact.tensors["head.weight"].decode())
    with pytest.raises(PlanError, match="one tied tensor; give them one recipe"):
        compress(model, Plan({"head.weight": Uniform(4), "embedding.weight": Uniform(3)}), calibration=x)


@pytest.mark.parametrize("lam", [0.0, 1e-3])
def test_rows_of_an_embedding_that_are_used_much_err_less(lam: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 4))
    tokens = (torch.rand(4000, generator=Generator().manual_seed(0)) ** 4 * 48).long()  # 48 to 63 are never chosen
    seen: dict[str, FeedbackReport | str] = {}
    recipe = ECSQ() if lam else Codebook(16, (1, 4))
    plan = Plan({"0.weight": recipe})
    artifact = compress(model, plan, calibration=tokens, lam=lam, after_tensor=seen.__setitem__)
    error = (artifact.tensors["0.weight"].decode() - model[0].weight).square().mean(1)  # type: ignore[union-attr]
    assert error[:4].mean() < 0.7 * error[48:].mean()
    assert "an embedding has its inputs along the first axis; errors weigh" in str(seen["0.weight"])


PARAMETRIZED = {
    "original1": nn.utils.parametrizations.weight_norm,
    "original": nn.utils.parametrizations.spectral_norm,
    "orthogonal.original": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_what_a_parametrization_computes_from_is_quantized(kind: str, tmp_path: object) -> None:
    def make() -> nn.Module:
        return nn.Sequential(PARAMETRIZED[kind](nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3)).eval()

    model, x = make(), correlated(50, 8)
    seen: dict[str, FeedbackReport | str] = {}
    name = f"0.parametrizations.weight.{kind.rpartition('.')[2]}"
    plan = Plan({name: Uniform(6), "2.weight": Uniform(6)})
    for calibration in (None, x):
        artifact = compress(model, plan, calibration=calibration, after_tensor=seen.__setitem__)
        save(artifact, f"{tmp_path}/file.safetensors")
        loaded = load(f"{tmp_path}/file.safetensors", make())
        assert (loaded(x) - model(x)).square().mean() < 0.05 * model(x).var()
    assert "remove_parametrizations makes the weight a plain one" in str(seen[name])
    with pytest.raises(PlanError, match=r"'0.weight' names no tensor.*0.weight is computed by a parametrization"):
        compress(model, Plan({"0.weight": Uniform(6)}))


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
