"""What ONNX Runtime does to quantized weights that the exporter works around: whether it still does.

    python -m bench.bridges.findings

Each line says what was found with this version, as distances from exact products or as what became of a graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

RNG = np.random.default_rng(0)
INPUTS = 64


def run(nodes: Sequence[Any], constants: Sequence[Any], x: np.ndarray, opset: int = 25) -> tuple[np.ndarray, list[str]]:
    """The graph's output `y`, and the operations that the runtime made of it."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", x.shape), ("y", None))
    ]
    graph = helper.make_graph(list(nodes), "graph", ends[:1], ends[1:], list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=13)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        operations = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    return np.asarray(session.run(None, {"x": x})[0]), operations


def weight(name: str, bits: int, outputs: int) -> tuple[list[Any], Any, np.ndarray]:
    """Constants and node of a dequantized weight, an output's scale each, and its values."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes, scale = RNG.integers(low, high, (INPUTS, outputs)), RNG.uniform(0.5, 1, outputs).astype(np.float32)
    kind = {2: TensorProto.INT2, 4: TensorProto.INT4}[bits]
    flat = codes.reshape(-1, 1) >> np.arange(bits) & 1
    packed = np.packbits(flat.astype(np.uint8).reshape(-1), bitorder="little").tobytes()
    constants = [
        helper.make_tensor(f"{name}_codes", kind, codes.shape, packed, raw=True),
        onnx.numpy_helper.from_array(scale, f"{name}_scale"),
    ]
    return (
        constants,
        helper.make_node("DequantizeLinear", [f"{name}_codes", f"{name}_scale"], [name], axis=1),
        codes * scale,
    )


def gap(y: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(y - want).max() / np.abs(want).max())


def two_bits() -> str:
    x = RNG.standard_normal((3, INPUTS)).astype(np.float32)
    wrong = []
    for outputs in range(1, 33):
        constants, node, values = weight("w", 2, outputs)
        y, _ = run([node, helper.make_node("MatMul", ["x", "w"], ["y"])], constants, x)
        if gap(y, x @ values) > 1e-5:
            wrong.append(outputs)
    return f"products of two bits are wrong with these numbers of outputs, of 1 to 32: {wrong or 'none'}"


def behind_a_relu() -> str:
    x = RNG.standard_normal((3, INPUTS)).astype(np.float32)
    found = {}
    for activation in ("Relu", "Sigmoid"):
        first, one, _ = weight("a", 4, INPUTS)
        second, two, _ = weight("b", 4, 8)
        zeros = [onnx.numpy_helper.from_array(np.zeros(n, np.float32), f"bias{n}") for n in (INPUTS, 8)]
        chain = [
            helper.make_node("Gemm", ["x", "a", f"bias{INPUTS}"], ["h"]),
            helper.make_node(activation, ["h"], ["g"]),
            helper.make_node("Gemm", ["g", "b", "bias8"], ["y"]),
        ]
        found[activation] = run([one, two, *chain], [*first, *second, *zeros], x)[1]
    return f"Gemm, activation, Gemm, all weights of four bits: {found}"


def beside_quantized_inputs() -> str:
    x = RNG.standard_normal((64, INPUTS)).astype(np.float32)
    matrices = [RNG.standard_normal(shape).astype(np.float32) for shape in ((INPUTS, 48), (48, 8))]
    bias = RNG.standard_normal(48).astype(np.float32)
    scales = [np.float32(np.abs(x).max() / 127), np.float32(0.5)]
    zero = np.int8(0)

    def rounded(values: np.ndarray, scale: np.float32) -> np.ndarray:
        return np.clip(np.round(values / scale), -128, 127).astype(np.float32) * scale

    want = rounded(np.maximum(rounded(x, scales[0]) @ matrices[0] + bias, 0), scales[1]) @ matrices[1]
    names = {"v": matrices[0], "w": matrices[1], "b": bias, "s": scales[0], "t": scales[1], "z": zero}
    constants = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in names.items()]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x8"]),
        helper.make_node("DequantizeLinear", ["x8", "s", "z"], ["xr"]),
        helper.make_node("Gemm", ["xr", "v", "b"], ["h"]),
        helper.make_node("Relu", ["h"], ["g"]),
        helper.make_node("QuantizeLinear", ["g", "t", "z"], ["g8"]),
        helper.make_node("DequantizeLinear", ["g8", "t", "z"], ["gr"]),
        helper.make_node("MatMul", ["gr", "w"], ["y"]),
    ]
    y, operations = run(nodes, constants, x)
    return f"float weights beside quantized inputs: outputs are off by {gap(y, want):.1e} of the largest; {operations}"


if __name__ == "__main__":
    print(f"ONNX Runtime {onnxruntime.__version__}")
    for finding in (two_bits, behind_a_relu, beside_quantized_inputs):
        print(finding())
