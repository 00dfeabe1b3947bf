from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bitbook
from bitbook import Artifact, Codebook, Plan, Uniform
from bitbook.cli import main
from bitbook.cli.codes import DIFFERENT, MISTAKE
from bitbook.models import build_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.chdir(tmp_path)
    model = build_model("mlp-64-16-10", seed=0)
    save_file(dict(model.state_dict()), "float.safetensors")
    bitbook.save(bitbook.compress(model, Plan({"*.weight": Uniform(4)})), "four.safetensors")
    bitbook.save(
        bitbook.compress(model, Plan({"fc1.weight": Uniform(4), "fc2.weight": Codebook(8)})), "mixed.safetensors"
    )
    return model


def compared(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["diff", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_errors_and_bytes_are_those_of_the_files(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared("float.safetensors", "four.safetensors", capsys=capsys)
    rows = {row["tensor"]: row for row in found["tensors"]}
    ledger, artifact = bitbook.read_ledger("four.safetensors"), bitbook.read("four.safetensors")
    assert rows.keys() == model.state_dict().keys() and found["same"] is False
    assert found["a"]["bytes"] == Path("float.safetensors").stat().st_size and found["b"]["bytes"] == ledger.total
    for name, w in model.state_dict().items():
        error = (w - artifact.decode(name)).double().square().sum() / w.double().square().sum()
        assert rows[name]["relative_mse"] == pytest.approx(error.item()) and rows[name]["same"] == (not error)
        assert rows[name]["a"] == {"stored_as": "float32", "shape": list(w.shape), "bytes": 4 * w.numel()}
        assert rows[name]["b"]["bytes"] == ledger.by_tensor()[name]
    assert rows["fc1.weight"]["b"]["stored_as"] == "Uniform(4)" and rows["fc1.bias"]["snr_db"] is None


def test_only_what_differs_is_listed(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "four.safetensors", "mixed.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "Uniform(4) → Codebook(8)" in said and "fc1.bias" not in said and "the weights of 1 differ" in said
    assert main(["diff", "four.safetensors", "mixed.safetensors", "--all"]) == 0
    assert "fc1.bias" in capsys.readouterr().out


def test_exit_codes_as_of_diff(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "four.safetensors", "four.safetensors", "--exit-code"]) == 0
    assert "the weights are the same" in capsys.readouterr().out
    assert main(["diff", "four.safetensors", "mixed.safetensors", "--exit-code"]) == DIFFERENT
    bitbook.save(Artifact(bitbook.read("four.safetensors").state_dict()), "decoded.safetensors")
    assert (
        main(["diff", "four.safetensors", "decoded.safetensors", "--exit-code"]) == 0
    )  # stored otherwise, yet the same
    Path("damaged.safetensors").write_bytes(Path("four.safetensors").read_bytes()[:-1])
    assert main(["diff", "four.safetensors", "damaged.safetensors", "--exit-code"]) == MISTAKE


def test_tied_missing_and_reshaped_tensors(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    w = torch.arange(6.0).reshape(2, 3)
    bitbook.save(Artifact({"a": w, "c": w, "n": torch.tensor(3)}, aliases={"b": "a"}), "x.safetensors")
    bitbook.save(Artifact({"a": w, "b": w.T.contiguous(), "d": w, "n": torch.tensor(4)}), "y.safetensors")
    rows = {row["tensor"]: row for row in compared("x.safetensors", "y.safetensors", capsys=capsys)["tensors"]}
    assert rows["a"]["same"] and rows["b"]["a"]["stored_as"] == "tied to a" and rows["b"]["a"]["bytes"] == 0
    assert not rows["b"]["same"] and rows["b"]["relative_mse"] is None
    assert rows["c"]["b"] is None and rows["d"]["a"] is None and not rows["c"]["same"] and not rows["n"]["same"]
    assert main(["diff", "x.safetensors", "y.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "float32 → not there" in said and "not there → float32" in said and "2 × 3 → 3 × 2" in said


def test_what_is_not_finite(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.tensor([1.0, float("nan")]), "b": torch.zeros(2)}, "x.safetensors")
    save_file({"a": torch.tensor([1.0, float("inf")]), "b": torch.ones(2)}, "y.safetensors")
    rows = {row["tensor"]: row for row in compared("x.safetensors", "y.safetensors", capsys=capsys)["tensors"]}
    assert not rows["a"]["same"] and rows["a"]["relative_mse"] is None and rows["b"]["relative_mse"] is None
    rows = {row["tensor"]: row for row in compared("x.safetensors", "x.safetensors", capsys=capsys)["tensors"]}
    assert rows["a"]["same"]
