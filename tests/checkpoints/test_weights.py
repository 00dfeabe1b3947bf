from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bitbook
from bitbook.checkpoints.weights import load_weights, read_weights
from bitbook.errors import CorruptArtifact, ModelMismatch
from bitbook.models import mlp


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.embed.weight


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def write(tensors: object, path: Path) -> Path:
    if path.suffix == ".safetensors":
        assert isinstance(tensors, dict)
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_weights_survive_each_kind_of_file(tmp_path: Path, suffix: str) -> None:
    model, fresh = mlp((4, 3, 2)), mlp((4, 3, 2))
    path = write(dict(model.state_dict()), tmp_path / f"m{suffix}")
    assert not same(model, fresh)
    assert load_weights(path, fresh) is fresh and same(model, fresh)
    assert read_weights(path).keys() == model.state_dict().keys()


def test_of_tied_weights_one_name_is_enough_and_they_stay_tied(tmp_path: Path) -> None:
    model, fresh = Tied(), Tied()
    state = {name: t for name, t in model.state_dict().items() if name != "embed.weight"}
    load_weights(write(state, tmp_path / "m.safetensors"), fresh)
    assert same(model, fresh) and fresh.embed.weight is fresh.head.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc1.bias": None}, r"lacks fc1\.bias of the model$"),
        ({"more": torch.ones(2)}, "has more beside it"),
        ({"fc1.weight": torch.ones(4, 3)}, r"fc1\.weight is \(4, 3\) in the file, \(3, 4\) in the model"),
        ({"fc1.weight": torch.ones(3, 4, dtype=torch.int8)}, "torch.int8 in the file, torch.float32 in the"),
    ],
)
def test_what_does_not_fit_leaves_the_model_untouched(tmp_path: Path, change: dict, message: str) -> None:
    model = mlp((4, 3, 2))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    changed = {n: t for n, t in {**mlp((4, 3, 2)).state_dict(), **change}.items() if t is not None}
    with pytest.raises(ModelMismatch, match=message):
        load_weights(write(changed, tmp_path / "m.safetensors"), model)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


class Harmful:
    def __reduce__(self) -> tuple:
        return Path("harmed").touch, ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Harmful(), "holds more than tensors"),
        ({"state_dict": {"w": torch.ones(1)}, "epoch": 3}, "state_dict, epoch: not a tensor; write it with"),
        ([torch.ones(1)], "holds a list, not a dict"),
    ],
)
def test_anything_but_tensors_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorruptArtifact, match=message):
        read_weights(write(content, tmp_path / "m.pt"))
    assert not Path("harmed").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = write({"w": torch.ones(100)}, tmp_path / f"m{suffix}")
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptArtifact, match=path.name):
            read_weights(path)


def test_other_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match=r"weights come from \.safetensors, \.pt"):
        read_weights(tmp_path / "m.onnx")
    for suffix in (".pt", ".safetensors"):
        with pytest.raises(FileNotFoundError):
            read_weights(tmp_path / f"none{suffix}")
    path = tmp_path / "small.safetensors"
    model = mlp((4, 3, 2))
    bitbook.save(bitbook.compress(model, bitbook.Plan({"*.weight": bitbook.Uniform(4)})), path)
    with pytest.raises(CorruptArtifact, match="compressed already; first run 'bitbook decompress'"):
        load_weights(path, model)
