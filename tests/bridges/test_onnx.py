from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitbook import (
    ECSQ,
    NF4,
    TCQ,
    Activation,
    Artifact,
    Binary,
    Codebook,
    Float,
    Plan,
    Residual,
    Rotated,
    Table,
    Ternary,
    Uniform,
    apply,
    compress,
)
from bitbook.errors import ModelMismatch, PlanError

onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
runtime = pytest.importorskip("onnxruntime")
bridge = pytest.importorskip("bitbook.bridges.onnx")

PRODUCTS: dict[str, Any] = {
    "groups": Uniform(4, (1, 16)),
    "tensor": Uniform(4),
    "rows": Uniform(8, (1, -1), symmetric=False),
    "two_bits": Uniform(2, (1, 32)),
    "three_bits": Uniform(3, (1, 16), symmetric=False),
    "tall": Uniform(8, (4, 32), scale=Uniform(8)),
    "signs": Binary((1, -1)),
    "trits": Ternary((1, 16), scale=Float("float16")),
}
"""Recipes of linear layers that are fused with their products."""

OTHERS: dict[str, Any] = {
    "narrow": Uniform(4, (1, 8)),
    "padded": Uniform(4, (1, 24), pad=True),
    "normal_float": Table(NF4, (1, 16)),
    "vectors": Codebook(16, (1, 4), centroids=Uniform(5)),
    "tiles": Codebook(8, (2, 4)),
    "ragged": Codebook(8, (3, 5), pad=True),
    "many": Codebook(300, (1, 2)),
    "step": ECSQ(),
    "trellis": TCQ(2),
    "f16": Float("float16"),
    "bf16": Float("bfloat16"),
}
"""Recipes whose weights runtimes fold to floats."""

DENSE: dict[str, Any] = {
    "rotated": Rotated(Uniform(4, (1, 16))),
    "stages": Residual((Uniform(8, (1, 16)), Uniform(8, (1, 16)))),
}


class Chain(nn.Module):
    """A linear layer of 64 for each recipe, all followed by a ReLU, after an embedding and a convolution."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 64)
        self.convolution = nn.Conv1d(64, 64, 3, padding=1)
        self.layers = nn.ModuleDict({name: nn.Linear(64, 64) for name in names})
        self.odd = nn.Linear(64, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.convolution(self.embedding(ids).transpose(1, 2)).mean(-1)
        for layer in self.layers.values():
            x = torch.relu(layer(x)) + x
        return self.odd(x)


def run(path: Path, *, optimized: bool = True, **feeds: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Outputs of ONNX Runtime at float accuracy, and the operations that it came to."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, feeds)
    return output, [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_every_form_gives_our_outputs_and_stays_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipes = {**PRODUCTS, **OTHERS, **DENSE}
    model = Chain(tuple(recipes)).eval()
    weights = {f"layers.{name}.weight": recipe for name, recipe in recipes.items()}
    extra = {"embedding.weight": Uniform(4, (1, 16)), "convolution.weight": Uniform(4, (1, -1)), "odd.weight": Binary()}
    artifact = compress(model, Plan({**weights, **extra}))
    before = copy.deepcopy(model.state_dict())
    ids = torch.randint(0, 20, (3, 5))
    done = bridge.export(model, artifact, tmp_path / "model.onnx", (ids,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert done.bytes == (tmp_path / "model.onnx").stat().st_size

    want = apply.restore(artifact, Chain(tuple(recipes)).eval())(ids).detach().numpy()
    output, operations = run(done.path, ids=ids.numpy())
    assert distance(output, want) < 1e-5
    assert distance(run(done.path, optimized=False, ids=ids.numpy())[0], want) < 1e-5
    assert operations.count("MatMulNBits") == len(PRODUCTS)
    assert not {"DequantizeLinear", "Cast"} & set(operations)  # fused or folded, so nothing is decoded in each run

    rows = {row.tensor.split(".")[-2]: row for row in done.rows}
    assert {name for name, row in rows.items() if "DequantizeLinear" in row.form} == PRODUCTS.keys()
    assert {name for name, row in rows.items() if "no exact form is smaller" in row.form} == DENSE.keys()
    n = 64 * 64
    most = {"two_bits": n / 4 + 4 * n / 32, "groups": n / 2 + 4 * n / 16, "tensor": n / 2 + 4, "signs": n / 4 + 4 * 64}
    most |= {"vectors": n / 8 + 16 * 4 + 80, "step": n / 2 + 4 * 16, "f16": 2 * n, "trellis": n / 2 + 4 * 16}
    assert {name: rows[name].bytes for name in most if rows[name].bytes > most[name] + 60} == {}
    assert {rows[name].bytes for name in DENSE} == {4 * n}


class Pair(nn.Module):
    """A layer whose output weight is its embedding, and `x @ W` beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 64)
        self.square = nn.Parameter(torch.randn(64, 64) / 8)
        self.out = nn.Linear(64, 32, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.embedding(ids) @ self.square)


def test_tied_weights_and_products_of_columns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Pair().eval()
    plan = Plan(
        {"embedding.weight": Uniform(4, (1, 16)), "out.weight": Uniform(4, (1, 16)), "square": Uniform(4, (16, 1))}
    )
    artifact = compress(model, plan)
    ids = torch.randint(0, 32, (2, 6))
    batch = torch.export.Dim("batch")
    done = bridge.export(
        model,
        artifact,
        tmp_path / "m.onnx",
        (),
        kwargs={"ids": ids},
        output_names=["logits"],
        dynamic_shapes={"ids": {0: batch}},
    )
    assert [graph_output.name for graph_output in onnx.load(done.path).graph.output] == ["logits"]
    ids = torch.randint(0, 32, (5, 6))
    output, operations = run(done.path, ids=ids.numpy())
    assert distance(output, apply.restore(artifact, Pair())(ids).detach().numpy()) < 1e-5
    assert operations.count("MatMulNBits") == 1  # the tied weight is read as a table, too, and so folded
    assert len(done.rows) == 2


ACTIVATIONS = {
    "symmetric": Activation(Uniform(8), "calibrated"),
    "shifted": Activation(Uniform(4, symmetric=False), "calibrated"),
}


def test_rounded_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).eval()  # noqa: E731
    model, data = make(), torch.randn(256, 64)
    inputs = dict(zip(("0", "2"), ACTIVATIONS.values(), strict=True))
    artifact = compress(
        model, Plan({"*.weight": Uniform(8, (1, 16))}, inputs), data=(data, torch.zeros(256, dtype=torch.long))
    )
    done = bridge.export(model, artifact, tmp_path / "m.onnx", (data[:4],), input_names=["x"])
    wide = 2 * torch.randn(4, 64)  # beyond the range
    output, operations = run(done.path, x=wide.numpy())
    assert distance(output, apply.restore(artifact, make())(wide).detach().numpy()) < 1e-5
    assert operations.count("MatMulNBits") == 2
    for activation, message in (
        (Activation(Uniform(8)), "the input of 0: a range from each batch cannot be exported; use range='calibrated'"),
        (Activation(Binary()), "the input of 0: Binary() has no ONNX operation; use Uniform"),
    ):
        refused = compress(make(), Plan({"0.weight": Uniform(8)}, {"0": activation}))
        with pytest.raises(PlanError) as caught:
            bridge.export(model, refused, tmp_path / "m.onnx", (data[:4],))
        assert message in str(caught.value)


def test_what_the_graph_does_not_read_is_said(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    artifact = compress(Half(), Plan({"*.weight": Uniform(4)}))
    done = bridge.export(Half(), artifact, tmp_path / "m.onnx", (torch.ones(2, 16),))
    assert "unused.weight: Uniform(4) as nothing, since the graph does not read it, 0 bytes" in str(done)
    assert "used.weight: Uniform(4) as DequantizeLinear of int4, 68 bytes" in str(done)
    with pytest.raises(ModelMismatch, match="the file lacks"):
        bridge.export(Half(), Artifact({}), tmp_path / "m.onnx", (torch.ones(2, 16),))
