"""One file for transformers 4.57 and 5: `python -m tests.bridges.other_version` runs it with the one not installed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bitbook import (
    ECSQ,
    Activation,
    Codebook,
    Plan,
    Rotated,
    Ternary,
    Uniform,
    apply,
    compress,
    freeze,
    quantize_,
    read,
    residence,
    save,
)
from bitbook.artifact import to_bytes
from bitbook.coding.fixed import Fixed
from bitbook.coding.rans import Rans
from bitbook.errors import CorruptArtifact, ModelMismatch, PlanError
from bitbook.runtime import PackedEmbedding, PackedLinear
from bitbook.slot import slots

transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
huggingface = pytest.importorskip("bitbook.bridges.huggingface")

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
QUICK = Fixed()  # where the coder does not matter
IDS = torch.tensor([[5, 1, 60, 3, 3, 17, 42], [9, 8, 7, 6, 5, 4, 3]])
MASK = torch.ones_like(IDS)


def gpt2() -> Any:
    """Its output layer is tied to its embedding."""
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, **special)
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> Any:
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=1, **WIDE)
    return transformers.LlamaForCausalLM(config).eval()


def bert(**changed: Any) -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=64, **WIDE, **changed)).eval()


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert}


def matrices(model: nn.Module, recipe: Any) -> Plan:
    """Every weight with two axes and 16 columns per block, under all of its names."""
    names = [
        name for name, p in model.named_parameters(remove_duplicate=False) if p.dim() == 2 and p.shape[1] % 16 == 0
    ]
    return Plan(dict.fromkeys(names, recipe))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=MASK).logits


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def load_dense(folder: Path, **options: Any) -> Any:
    """As its folder's class."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, **options)


def load_packed(folder: Path, **options: Any) -> Any:
    with pytest.warns(UserWarning, match=r"loading attributes \(e.g. \['resident'\]\) will be overwritten"):
        return load_dense(folder, quantization_config=huggingface.BitbookConfig(resident="packed"), **options)


LOADS = {"dense": load_dense, "packed": load_packed}


def parameter_names(model: nn.Module) -> list[str]:
    """All that a model has, tied names included."""
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def held_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


RECIPES = {"gpt2": Uniform(4, (1, 16)), "llama": Codebook(16, (1, 4), centroids=Uniform(5)), "bert": ECSQ()}


@pytest.mark.parametrize(("kind", "recipe"), RECIPES.items())
def test_reloads_bit_for_bit(kind: str, recipe: Any, tmp_path: Path) -> None:
    model = MODELS[kind]()
    artifact = compress(model, matrices(model, recipe))
    huggingface.pack_(model, artifact).save_pretrained(tmp_path / "one")
    again = type(model).from_pretrained(tmp_path / "one")
    assert torch.equal(logits(again), logits(apply.restore(artifact, MODELS[kind]())))
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert to_bytes(huggingface.to_artifact(again), Rans())[0] == to_bytes(artifact, Rans())[0]


@pytest.mark.parametrize("kind", MODELS)
def test_shards_and_device_maps(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    huggingface.pack_(model, compress(model, matrices(model, Uniform(4, (1, 16)))), QUICK)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for device_map in ("cpu", "auto", {"": "cpu"}):
        again = type(model).from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", MODELS)
def test_the_folder_holds_packed_bytes_and_no_floats_beside_them(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    plan = matrices(model, ECSQ())
    artifact = compress(model, plan)
    floats = sum(p.numel() * 4 for p in model.parameters())
    huggingface.pack_(model, artifact, Rans()).save_pretrained(tmp_path)
    stored = contents(tmp_path)
    sizes = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["tensors"]
    packed = {name.removesuffix("_packed"): t for name, t in stored.items() if name.endswith("_packed")}
    assert {name: t.numel() for name, t in packed.items()} == sizes
    assert not stored.keys() & plan.weights.keys()
    assert all(t.dtype == torch.uint8 for t in packed.values())
    dense = sum(t.numel() * t.element_size() for name, t in stored.items() if not name.endswith("_packed"))
    file = save(artifact, tmp_path / "one.bitbook", Rans()).total
    # Each tensor alone: its own header, statistics and name, beside what one file holds.
    assert sum(sizes.values()) + dense < file + 250 * len(sizes)
    assert (tmp_path / "model.safetensors").stat().st_size < floats / 3


def test_tied_weights_are_one_buffer_and_stay_tied(tmp_path: Path) -> None:
    model = gpt2()
    huggingface.pack_(model, compress(model, matrices(model, Uniform(4, (1, 16)))), QUICK).save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in contents(tmp_path))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    # A body that gets a tied head as it is loaded.
    again.transformer.save_pretrained(tmp_path / "body")
    with_head = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "body")
    assert torch.equal(logits(with_head), logits(model))
    with_head.save_pretrained(tmp_path / "again")
    assert not any("lm_head" in name for name in contents(tmp_path / "again"))


def test_a_body_loads_from_a_folder_with_a_head(tmp_path: Path) -> None:
    model = bert()
    huggingface.pack_(model, compress(model, matrices(model, Ternary((1, 16)))), QUICK).save_pretrained(tmp_path)
    body = transformers.AutoModel.from_pretrained(tmp_path)
    want = model.bert(IDS, attention_mask=MASK).last_hidden_state
    assert torch.equal(body(IDS, attention_mask=MASK).last_hidden_state, want)


def test_floats_are_quantized_as_they_are_loaded(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "floats")
    plan = Plan({"model.layers.*.weight": None, "lm_head.weight": Uniform(4, (1, 16))})
    config = huggingface.BitbookConfig(plan, coder="Fixed")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "floats", quantization_config=config)
    quantize_(model, plan)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "small")
    assert "lm_head.weight_packed" in contents(tmp_path / "small")
    assert torch.equal(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small")), logits(model))


def test_a_quantized_model_is_packed_as_it_is() -> None:
    model = bert()
    quantize_(model, matrices(model, Uniform(3, (1, 16))))
    want = logits(model)
    assert torch.equal(logits(huggingface.pack_(model, coder=QUICK)), want)
    assert not any(
        p.requires_grad for p in model.bert.encoder.layer[0].attention.self.query.parameters() if p.dim() > 1
    )


def test_quantized_inputs_come_back(tmp_path: Path) -> None:
    model = bert()
    inputs = {"bert.encoder.*.dense": Activation(Uniform(8), "calibrated"), "classifier": Activation(Uniform(4))}
    artifact = compress(
        model, Plan(matrices(model, Uniform(8, (1, 16))).weights, inputs), data=(IDS, torch.zeros(2, dtype=torch.long))
    )
    huggingface.pack_(model, artifact, QUICK).save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(apply.restore(apply.Artifact(artifact.tensors, {}, {}), bert())))
    assert huggingface.to_artifact(again).inputs.keys() == artifact.inputs.keys()


def test_half_precision_and_copies(tmp_path: Path) -> None:
    model = llama()
    artifact = compress(model, matrices(model, Uniform(4, (1, 16))))
    huggingface.pack_(model, artifact, QUICK).save_pretrained(tmp_path)
    half = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    want = artifact.decode("lm_head.weight").bfloat16()
    assert torch.equal(half.lm_head.weight, want)
    twin = copy.deepcopy(half)
    twin.save_pretrained(tmp_path / "twin")
    with torch.no_grad():
        twin.lm_head.weight.add_(1)
    half.save_pretrained(tmp_path / "half")
    with pytest.raises(ModelMismatch, match="lm_head.weight was changed after it was packed"):
        twin.save_pretrained(tmp_path / "twin")
    with pytest.raises(ModelMismatch, match=r"call pack_ with a new artifact, or unpack_"):
        huggingface.to_artifact(twin)


def test_unpacked_models_are_as_any_other(tmp_path: Path) -> None:
    model, stock = llama(), llama()
    artifact = compress(model, matrices(model, Uniform(4, (1, 16))))
    huggingface.pack_(model, artifact, QUICK)
    huggingface.unpack_(model).save_pretrained(tmp_path / "floats")
    apply.restore(artifact, stock).save_pretrained(tmp_path / "stock")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "floats" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("resident", LOADS)
def test_damage_is_found(resident: str, tmp_path: Path) -> None:
    model = llama()
    huggingface.pack_(model, compress(model, matrices(model, Uniform(4, (1, 16)))), QUICK).save_pretrained(tmp_path)
    tensors = contents(tmp_path)
    tensors["lm_head.weight_packed"][-3] ^= 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptArtifact, match="lm_head.weight: the checksum does not match"):
        LOADS[resident](tmp_path)


@pytest.mark.parametrize("resident", LOADS)
def test_a_buffer_of_another_tensor_is_refused(resident: str, tmp_path: Path) -> None:
    model = llama()
    huggingface.pack_(model, compress(model, matrices(model, Uniform(4, (1, 16)))), QUICK).save_pretrained(tmp_path)
    tensors = contents(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    tensors[f"{name}_packed"] = tensors[f"{other}_packed"].clone()
    config["quantization_config"]["tensors"][name] = tensors[f"{name}_packed"].numel()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelMismatch, match=r"up_proj.weight: \(32, 64\) in the folder, \(64, 32\) in the model"):
        LOADS[resident](tmp_path)


def test_parameters_that_the_model_calls_otherwise_are_named(tmp_path: Path) -> None:
    model = llama()
    huggingface.pack_(model, compress(model, matrices(model, Uniform(4, (1, 16)))), QUICK).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = config["quantization_config"]["tensors"]
    tensors["model.layers.0.mlp.w1.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelMismatch, match="mlp.w1.weight is packed in the folder, but LlamaForCausalLM has no such"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_each_buffer_is_a_bitbook_file(tmp_path: Path) -> None:
    model = llama()
    artifact = compress(model, matrices(model, Uniform(4, (1, 16))))
    huggingface.pack_(model, artifact, QUICK).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        data = file.get_tensor("lm_head.weight_packed").numpy().tobytes()
    (tmp_path / "weight.bitbook").write_bytes(data)
    assert torch.equal(read(tmp_path / "weight.bitbook").decode("weight"), artifact.decode("lm_head.weight"))


def test_offloading_is_refused(tmp_path: Path) -> None:
    model = llama()
    huggingface.pack_(model, compress(model, matrices(model, Uniform(4, (1, 16)))), QUICK).save_pretrained(tmp_path)
    where = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(PlanError, match="packed weights are decoded once, where they are used"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map=where, offload_folder=tmp_path / "off")


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(CorruptArtifact, match="config.json: fc.weight is said to have -1 bytes"):
        huggingface.BitbookConfig.from_dict({"quant_method": "bitbook", "tensors": {"fc.weight": -1}})
    with pytest.raises(CorruptArtifact, match="quantization_config has the unknown keys layers"):
        huggingface.BitbookConfig.from_dict({"quant_method": "bitbook", "layers": 3})
    with pytest.raises(PlanError, match="no coder 'Zip'; there are Fixed, Rans"):
        huggingface.BitbookConfig(Plan(), coder="Zip")
    model = llama()
    artifact = freeze(bert())
    with pytest.raises(ModelMismatch, match="the file lacks"):
        huggingface.pack_(model, artifact)
    model.lm_head.weight_packed = 1
    with pytest.raises(PlanError, match="Linear has an attribute 'weight_packed' already; rename it"):
        huggingface.pack_(model, compress(model, Plan({"lm_head.weight": Uniform(4)})))


@pytest.mark.parametrize(("kind", "recipe"), RECIPES.items())
def test_packed_computes_what_dense_does_and_saves_the_same_bytes(kind: str, recipe: Any, tmp_path: Path) -> None:
    model = MODELS[kind]()
    plan = matrices(model, recipe)
    huggingface.pack_(model, compress(model, plan), Rans()).save_pretrained(tmp_path / "one", max_shard_size="4KB")
    dense = type(model).from_pretrained(tmp_path / "one")
    dense.save_pretrained(tmp_path / "dense", max_shard_size="4KB")
    for n, device_map in enumerate((None, "cpu", {"": "cpu"})):
        packed = load_packed(tmp_path / "one", device_map=device_map)
        torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-5, atol=1e-6)
        packed.save_pretrained(tmp_path / str(n), max_shard_size="4KB")
        assert files(tmp_path / str(n)) == files(tmp_path / "dense")
        again, once = (to_bytes(huggingface.to_artifact(m), Rans())[0] for m in (packed, dense))
        assert again == once
        assert not any(parameter.requires_grad for parameter in packed.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_packed_holds_codes_and_reports_each_tensor(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    plan = matrices(model, Uniform(4, (1, -1)))
    huggingface.pack_(model, compress(model, plan), QUICK).save_pretrained(tmp_path)
    dense, packed = type(model).from_pretrained(tmp_path), load_packed(tmp_path)
    report = residence(packed)
    *tensors, files = report.tensors
    assert {tensor.name for tensor in tensors} == set(parameter_names(model))
    assert files.bytes == sum(t.nbytes for name, t in contents(tmp_path).items() if name.endswith("_packed"))
    # To the byte, but for what is in no file, such as the angles of rotary embeddings.
    assert held_bytes(dense) - held_bytes(packed) == report.float_bytes - (report.bytes - files.bytes)
    weights = {model.get_parameter(name) for name in plan.weights}
    codes = sum(w.numel() / 2 for w in weights)
    scales = sum(4 * len(w) for w in weights)
    assert codes < sum(t.bytes for t in tensors if t.name in plan.weights) <= codes + scales + 80 * len(weights)
    for module in packed.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert type(module) in (PackedLinear, PackedEmbedding)
        assert type(module).__name__ != "Conv1D" or slots(module).keys() == {"weight"}
    why = {tensor.name: tensor.why for tensor in tensors}
    if kind == "gpt2":
        assert why["transformer.h.0.mlp.c_fc.weight"] == "decoded in each call: Conv1D has no packed form"
        assert packed.lm_head.packed is packed.transformer.wte.packed
    for without in (False, True):
        assert packed.num_parameters(exclude_embeddings=without) == dense.num_parameters(exclude_embeddings=without)
    if kind != "bert":
        options: Any = {"max_new_tokens": 6, "do_sample": False, "attention_mask": MASK}
        assert torch.equal(packed.generate(IDS, **options), dense.generate(IDS, **options))


def test_how_a_model_is_held_is_chosen_as_it_is_loaded(tmp_path: Path) -> None:
    model = llama()
    plan = matrices(model, Uniform(4, (1, 16)))
    huggingface.pack_(model, compress(model, plan), QUICK, resident="packed").save_pretrained(tmp_path / "small")
    assert type(model.lm_head) is PackedLinear
    assert "resident" not in (tmp_path / "small" / "config.json").read_text()
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").lm_head) is nn.Linear
    config = transformers.AutoConfig.from_pretrained(tmp_path / "small")
    config.quantization_config["resident"] = "packed"  # without a warning
    by_config = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", config=config)
    assert torch.equal(logits(by_config), logits(model))
    llama().save_pretrained(tmp_path / "floats")
    at_once = huggingface.BitbookConfig(plan, coder="Fixed", resident="packed")
    from_floats = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "floats", quantization_config=at_once)
    for held in (by_config, from_floats):
        assert type(held.lm_head) is PackedLinear
    assert repr(at_once).endswith("'Fixed', 0 tensors, 'packed')")
    with pytest.raises(PlanError, match="resident='sparse': use 'dense' or 'packed'"):
        huggingface.BitbookConfig(resident="sparse")
    with pytest.raises(PlanError, match="held on one device; name that one, or load with resident='dense'"):
        load_packed(tmp_path / "small", device_map={"model": "cuda:0", "lm_head": "cuda:1"})


def test_packed_becomes_floats_again(tmp_path: Path) -> None:
    model = gpt2()
    artifact = compress(model, matrices(model, Uniform(4, (1, 16))))
    huggingface.pack_(model, artifact, QUICK).save_pretrained(tmp_path / "small")
    for name, load in LOADS.items():
        again = load(tmp_path / "small")
        huggingface.unpack_(again).save_pretrained(tmp_path / name)
        assert again.lm_head.weight is again.transformer.wte.weight and type(again.lm_head) is nn.Linear
        assert all(parameter.requires_grad for parameter in again.parameters())
    assert files(tmp_path / "packed") == files(tmp_path / "dense")
    held = load_packed(tmp_path / "small")
    other = compress(gpt2(), matrices(model, Ternary((1, 16))))
    assert torch.equal(logits(huggingface.pack_(held, other, QUICK)), logits(apply.restore(other, gpt2())))


def test_packed_computes_with_quantized_inputs_in_integers(tmp_path: Path) -> None:
    model = bert()
    inputs = {"bert.encoder.*.dense": Activation(Uniform(8), "calibrated"), "classifier": Activation(Uniform(4))}
    plan = Plan(matrices(model, Uniform(8, (1, -1))).weights, inputs)
    artifact = compress(model, plan, data=(IDS, torch.zeros(2, dtype=torch.long)))
    huggingface.pack_(model, artifact, QUICK).save_pretrained(tmp_path / "small")
    packed = load_packed(tmp_path / "small")
    assert packed.bert.encoder.layer[0].output.dense.integers is not None
    torch.testing.assert_close(logits(packed), logits(model), rtol=1e-3, atol=1e-4)
    packed.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "small")
    assert huggingface.to_artifact(packed).inputs.keys() == artifact.inputs.keys()
    assert torch.equal(logits(huggingface.unpack_(packed)), logits(model))
    half = load_packed(tmp_path / "small", dtype=torch.bfloat16)
    assert half.bert.encoder.layer[0].output.dense.integers is not None
    assert logits(half).dtype == torch.bfloat16
    torch.testing.assert_close(logits(half).float(), logits(model), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", MODELS)
def test_packed_in_half_precision(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    huggingface.pack_(model, compress(model, matrices(model, Rotated(Uniform(6, (1, -1))))), QUICK).save_pretrained(
        tmp_path
    )
    dense = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    packed = copy.deepcopy(load_packed(tmp_path, dtype=torch.bfloat16))
    assert logits(packed).dtype == torch.bfloat16
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0.05, atol=0.01)
    dense.save_pretrained(tmp_path / "dense")
    packed.save_pretrained(tmp_path / "packed")
    assert files(tmp_path / "packed") == files(tmp_path / "dense")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what memory is")
@pytest.mark.parametrize("resident", LOADS)
def test_the_bytes_of_a_loaded_model_are_pages_of_its_folder(resident: str, tmp_path: Path) -> None:
    model = llama()
    huggingface.pack_(model, compress(model, matrices(model, Uniform(4, (1, 16)))), QUICK).save_pretrained(tmp_path)
    address = LOADS[resident](tmp_path).lm_head.weight_packed.data_ptr()
    ranges = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    (found,) = (r for r in ranges if int(r[0].split("-")[0], 16) <= address < int(r[0].split("-")[1], 16))
    assert found[-1] == str(tmp_path / "model.safetensors")
