from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitbook
from bitbook import Artifact, Codebook, Pruned, Uniform, quantize
from bitbook.errors import ModelMismatch, PlanError
from bitbook.quantizer import FitOptions
from bitbook.runtime import PackedEmbedding, PackedLinear, native
from bitbook.runtime.layers import Decoded
from bitbook.runtime.restore import decode_
from bitbook.slot import slots


class Everything(nn.Module):
    """Layers of all kinds: an embedding that is the output layer, too, attention, convolution, recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.rnn = nn.GRU(32, 32, batch_first=True)
        self.out = nn.Linear(32, 40, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder(self.embedding(tokens))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.out(self.rnn(x)[0])


def build(seed: int = 0) -> Everything:
    torch.manual_seed(seed)
    return Everything().eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights by several recipes, vectors among them."""
    model, path = build(), tmp_path_factory.mktemp("packed") / "model.safetensors"
    recipes = {"embedding": Uniform(4, (1, -1)), "linear1": Codebook(16, (1, -1)), "linear2": Codebook(16, (1, 4))}
    tensors: dict[str, bitbook.Quantized | Tensor] = {}
    for name, w in model.state_dict().items():
        if name == "out.weight":
            continue
        recipe = next((r for part, r in recipes.items() if part in name), Uniform(6, (1, -1)))
        tensors[name] = quantize(recipe, w, options=FitOptions(iterations=5)) if "norm" not in name and (
            w.dim() > 1 or name.endswith("bias_ih_l0")) else w  # fmt: skip
    bitbook.save(Artifact(tensors, {}, {"out.weight": "embedding.weight"}), path)
    return path


TOKENS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("layout", ["one", "per-tensor"])
def test_packed_computes_what_dense_does(file: Path, layout: bitbook.artifact.Layout, tmp_path: Path) -> None:
    bitbook.save(bitbook.read(file), tmp_path / "copy.safetensors", layout=layout)
    dense = bitbook.load(tmp_path / "copy.safetensors", build(1))
    packed = bitbook.load(tmp_path / "copy.safetensors", build(2), resident="packed")
    torch.testing.assert_close(packed(TOKENS), dense(TOKENS).detach(), rtol=1e-4, atol=1e-5)
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        module, _, attribute = name.rpartition(".")
        assert torch.equal(getattr(packed.get_submodule(module), attribute), parameter), name


def test_one_class_for_each_operation_and_a_slot_for_the_others(file: Path) -> None:
    model = bitbook.load(file, build(1), resident="packed")
    assert isinstance(model, Everything)
    assert type(model.embedding) is PackedEmbedding
    assert type(model.out) is PackedLinear and model.out.packed is model.embedding.packed
    assert isinstance(model.conv, nn.Conv1d) and isinstance(slots(model.conv)["weight"], Decoded)
    assert isinstance(slots(model.encoder.self_attn.out_proj)["weight"], Decoded)  # attention reads its weight itself
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_report_names_every_tensor_and_why(file: Path) -> None:
    model = bitbook.load(file, build(1), resident="packed")
    report = bitbook.residence(model)
    held = {tensor.name: tensor for tensor in report.tensors}
    assert held.keys() == build().state_dict().keys()
    assert "Levels" in held["embedding.weight"].how
    assert held["encoder.linear1.weight"].why == "products with centroids"
    assert "Conv1d has no packed form" in held["conv.weight"].why
    assert held["rnn.bias_ih_l0"].how == "dense" and "vector" in held["rnn.bias_ih_l0"].why
    assert held["encoder.norm1.weight"].why == "as it is in the file"
    assert report.bytes == sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    assert report.bytes < 0.4 * report.float_bytes == 0.4 * sum(p.nbytes for p in build().parameters())
    assert str(report).count("\n") == len(held)
    with pytest.raises(PlanError, match="was not loaded packed"):
        bitbook.residence(build())


def test_copies_and_pickles_compute_the_same(file: Path) -> None:
    model = bitbook.load(file, build(1), resident="packed")
    y = model(TOKENS)
    assert torch.equal(copy.deepcopy(model)(TOKENS), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(TOKENS), y)
    assert torch.equal(model.to("cpu")(TOKENS), y)


def test_a_state_dict_goes_into_a_model_of_the_same_file_only(file: Path, tmp_path: Path) -> None:
    model, other = (bitbook.load(file, build(1), resident="packed") for _ in range(2))
    for buffer in other.buffers():
        buffer.zero_()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(TOKENS), model(TOKENS))
    w = build().conv.weight.detach()
    artifact = bitbook.read(file)
    third = bitbook.runtime.restore_packed(
        Artifact({**artifact.tensors, "conv.weight": quantize(Uniform(3), w)}, {}, artifact.aliases), build(1)
    )
    with pytest.raises((ModelMismatch, RuntimeError), match="does not fit|size mismatch"):
        third.load_state_dict(model.state_dict())


def test_a_change_of_type_leaves_codes_and_scales_alone(file: Path) -> None:
    model = bitbook.load(file, build(1), resident="packed")
    w = model.get_submodule("out").weight
    model.to(torch.bfloat16)
    assert torch.equal(model.get_submodule("out").packed.decode(), w)
    assert torch.equal(model.get_submodule("out").weight, w.bfloat16())
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    y = model.get_submodule("out")(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x.float() @ w.T, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("late", [False, True])
def test_a_model_of_another_type_computes_in_it(file: Path, late: bool) -> None:
    dense = bitbook.load(file, build(1)).to(torch.bfloat16)
    fresh = build(2) if late else build(2).to(torch.bfloat16)
    packed = bitbook.load(file, fresh, resident="packed").to(torch.bfloat16)
    y = packed(TOKENS)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, dense(TOKENS).detach(), rtol=0.1, atol=0.1)


def test_packing_is_undone(file: Path) -> None:
    dense, packed = bitbook.load(file, build(1)), bitbook.load(file, build(2), resident="packed")
    model = decode_(packed)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in build().named_modules()]
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
    assert packed.out.weight is packed.embedding.weight
    with pytest.raises(PlanError, match="was not loaded packed"):
        bitbook.residence(model)


def test_an_input_that_wants_a_gradient_is_refused(file: Path) -> None:
    layer = bitbook.load(file, build(1), resident="packed").get_submodule("out")
    x = torch.randn(2, 32, requires_grad=True)
    with pytest.raises(PlanError, match=r"torch.no_grad\(\)"):
        layer(x)
    with torch.no_grad():
        layer(x)


def test_embeddings_refuse_what_they_do_not_have(file: Path) -> None:
    embedding = bitbook.load(file, build(1), resident="packed").get_submodule("embedding")
    assert embedding(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 32)
    assert embedding(torch.tensor(5)).shape == (32,)
    for index in (-1, 40):
        with pytest.raises(IndexError, match="40 rows"):
            embedding(torch.tensor([index]))


def test_a_model_that_does_not_fit_stays_as_it_was(file: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelMismatch):
        bitbook.load(file, model, resident="packed")
    assert type(model[0]) is nn.Linear and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(PlanError, match="'dense' or 'packed'"):
        bitbook.load(file, model, resident="sparse")  # type: ignore[arg-type]


def test_what_packing_does_not_shrink_stays_dense(tmp_path: Path) -> None:
    w = torch.randn(8, 8)
    bitbook.save(Artifact({"weight": quantize(Pruned(64), w), "bias": w[0]}), tmp_path / "kept.safetensors")
    model = bitbook.load(tmp_path / "kept.safetensors", nn.Linear(8, 8), resident="packed")
    assert type(model) is nn.Linear
    assert "packed it would take" in {held.name: held for held in bitbook.residence(model).tensors}["weight"].why
    assert torch.equal(model(w), nn.functional.linear(w, w, w[0]))


@pytest.mark.parametrize(
    "change", [bitbook.freeze, bitbook.dequantize_, lambda m: bitbook.quantize_(m, bitbook.Plan())]
)
def test_packed_models_are_for_inference(file: Path, change: Callable[[nn.Module], object]) -> None:
    model = bitbook.load(file, build(1), resident="packed")
    with pytest.raises(PlanError, match=r"\w: computes from packed codes.*resident='dense'"):
        change(model)


def test_a_root_layer_becomes_packed_in_place(tmp_path: Path) -> None:
    w = torch.randn(32, 16)
    bitbook.save(Artifact({"weight": quantize(Uniform(4), w)}), tmp_path / "root.safetensors")
    model = nn.Linear(16, 32, bias=False)
    assert bitbook.load(tmp_path / "root.safetensors", model, resident="packed") is model
    assert isinstance(model, PackedLinear)


def test_nothing_is_compiled_at_import() -> None:
    code = (
        "import bitbook.runtime, sys; from bitbook.runtime import native; "
        "print(native.compiled.cache_info().currsize, 'numba' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0", "False"]


def test_without_a_compiler_a_warning_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="no C compiler"):
        assert native._file() is None
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho cannot >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(native.shutil, "which", lambda name: str(broken))
    with pytest.warns(UserWarning, match="does not compile native.c.*cannot"):
        assert native._file() is None
    assert not list(tmp_path.rglob("*.so"))
