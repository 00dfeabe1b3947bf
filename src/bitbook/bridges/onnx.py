"""ONNX: a compressed model as a graph whose weights stay small in the file.

    model, artifact ──torch.onnx.export──► graph of floats ──each weight in its smallest exact form──► file

A weight that a product reads along its blocks becomes `DequantizeLinear`, which ONNX Runtime fuses with the product to
`MatMulNBits`, and computes from the codes.  Any other becomes an expression of constants, codes first, which a runtime
folds to floats as it loads: small in the file, and as fast as the float model.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from bitbook.apply import restore
from bitbook.artifact import Artifact
from bitbook.artifact.write import whole
from bitbook.blocks import Grid, Shape
from bitbook.errors import PlanError, needs
from bitbook.inputs import CHILD, take_away
from bitbook.quantizer import Quantized
from bitbook.scalar.leaves import Float
from bitbook.scalar.levels import Binary, Ternary
from bitbook.scalar.table import PowersOfTwo, Table
from bitbook.scalar.uniform import Uniform
from bitbook.vector.codebook import Codebook

with needs("onnxscript", extra="onnx"):
    import onnx_ir as ir
    import onnxscript as _  # noqa: F401  (torch.onnx.export needs it)

OPSET, IR_VERSION = 21, 10
OPSET_OF_TWO_BITS, IR_VERSION_OF_TWO_BITS = 25, 13
"""The first that know integers of two bits."""

_FUSED = (16, 32, 64, 128, 256)  # rows of a block that MatMulNBits takes
_OUTPUTS_OF_TWO_BITS = 4  # ONNX Runtime 1.32 multiplies wrongly with two bits unless outputs are a multiple of this
_MOST_VALUES = 1 << 16  # of a table that codes of 16 bits choose from


class Row(NamedTuple):
    """What became of one quantized tensor."""

    tensor: str
    recipe: str
    form: str
    bytes: int
    """Of its constants in the file."""
    weights: int


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    bytes: int
    rows: Sequence[Row]

    def __str__(self) -> str:
        rows = [f"{row.tensor}: {row.recipe} as {row.form}, {row.bytes:,} bytes" for row in self.rows]
        return "\n".join([*rows, f"{self.path}: {self.bytes:,} bytes"])


def export(
    model: nn.Module,
    artifact: Artifact,
    path: str | os.PathLike[str],
    args: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
) -> Exported:
    """Write a compressed model as an ONNX file of opset 21, or 25 where a weight has two bits.

    Weights are exactly those of the artifact, whatever their form; outputs differ by the order of additions.

    Args:
        model: a float model of the right architecture, which stays as it is.
        artifact: what it was compressed to.
        path: the file.
        args: example inputs of the model.
        kwargs: more of them, by name.
        input_names: of the graph; None: as `forward` calls them.
        output_names: of the graph.
        dynamic_shapes: which sizes may differ from the examples', as for `torch.export.export`.

    Raises `ModelMismatch` as `restore`, and `PlanError` for inputs quantized in a way that ONNX does not have.
    """
    own = _with_rounded_inputs(restore(artifact, copy.deepcopy(model)).eval(), artifact)
    quantized = {name: t for name, t in artifact.tensors.items() if isinstance(t, Quantized)}
    folded = {name: _Constants.folding_to(name, tensor) for name, tensor in quantized.items()}
    two_bits = any(constants.two_bits for constants in folded.values())
    with warnings.catch_warnings():
        # The exporter's own use of torch, which callers cannot change.
        warnings.filterwarnings("ignore", r".isinstance\(treespec, LeafSpec\)", FutureWarning)
        program = torch.onnx.export(
            own,
            args,
            kwargs=dict(kwargs or {}),
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
            opset_version=OPSET_OF_TWO_BITS if two_bits else OPSET,
            dynamo=True,
            optimize=False,  # which would fold small weights into constants without a name
            verbose=False,
        )
    assert program is not None
    rows, added = [], []
    for name, tensor in quantized.items():
        names = [name, *(alias for alias, tied in artifact.aliases.items() if tied == name)]
        constants = _put(program.model.graph, names, tensor, folded[name])
        added += constants.nodes
        rows.append(Row(name, repr(tensor.recipe), constants.what, constants.bytes, math.prod(tensor.shape)))
    program.model.graph.insert_before(program.model.graph[0], added)
    program.model.ir_version = IR_VERSION_OF_TWO_BITS if two_bits else IR_VERSION
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of Python, which would be most of a small file
    with whole(path) as file:
        file.write(ir.to_proto(program.model).SerializeToString())
    return Exported(Path(path), Path(path).stat().st_size, rows)


class _Constants:
    """An expression of constants that stands for a tensor: initializers, and the operations on them, in order."""

    def __init__(self, name: str) -> None:
        self.name, self.what = name, ""
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.value: ir.Value | None = None
        """The result; None where there is no form that is smaller than floats."""

    @classmethod
    def folding_to(cls, name: str, tensor: Quantized) -> _Constants:
        """The smallest exact form of a tensor, of operations that a runtime folds as it loads."""
        own = cls(name)
        own.value = _small(own, tensor)
        return own

    @property
    def bytes(self) -> int:
        return sum(value.const_value.nbytes for value in self.initializers if value.const_value is not None)

    @property
    def two_bits(self) -> bool:
        return any(value.dtype in (ir.DataType.INT2, ir.DataType.UINT2) for value in self.initializers)

    def put(self, label: str, values: Tensor, dtype: ir.DataType) -> ir.Value:
        """An initializer; integers of fewer than 8 bits are packed when they are written."""
        array = values.detach().cpu().contiguous()
        if dtype == ir.DataType.BFLOAT16:
            data: Any = array.bfloat16().view(torch.int16).numpy().view(dtype.numpy())
        elif dtype.is_floating_point():
            data = array.numpy().astype(dtype.numpy())
        else:
            whole = {8: np.int8 if dtype.is_signed() else np.uint8, 16: np.uint16, 32: np.int32, 64: np.int64}
            data = array.numpy().astype(whole[max(dtype.bitwidth, 8)])
        tensor = ir.Tensor(data, dtype=dtype, name=f"{self.name}.{len(self.initializers)}.{label}")
        shape = ir.Shape(array.shape)
        value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(dtype), shape=shape)
        self.initializers.append(value)
        return value

    def do(self, kind: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        """An operation; its output."""
        node = ir.node(kind, inputs, attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        return self.do("Reshape", value, self.put("shape", torch.tensor(shape, dtype=torch.int64), ir.DataType.INT64))


def _small(own: _Constants, tensor: Quantized) -> ir.Value | None:
    """A tensor as an expression of smaller constants, each side tensor likewise; None where there is none."""
    recipe = tensor.recipe
    if isinstance(recipe, Float):
        kind = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}.get(recipe.torch_dtype)
        if kind is None:
            return None
        value = own.do("Cast", own.put("values", tensor.decode(), kind), to=ir.DataType.FLOAT)
        own.what = kind.name.lower()
    elif isinstance(recipe, Uniform | Binary | Ternary | Table | PowersOfTwo):
        grid = Grid.of(tensor.shape, recipe.block, pad=recipe.pad)
        if isinstance(recipe, Table | PowersOfTwo):
            table = own.put("levels", torch.tensor(recipe.table), ir.DataType.FLOAT)
            value = _gathered(own, table, grid.tiles(tensor.codes["codes"], "zero"), len(recipe.table))
            own.what = f"Gather of {len(recipe.table)} levels, times scales"
        else:
            levels = _levels(tensor)
            codes = own.put("codes", grid.tiles(levels.codes, "zero"), levels.dtype)  # (R, r, C, c)
            value = own.do("Cast", codes, to=ir.DataType.FLOAT)
            if levels.zero is not None:
                zero = own.put("zero_point", levels.zero[:, None, :, None], levels.dtype)
                value = own.do("Sub", value, own.do("Cast", zero, to=ir.DataType.FLOAT))
            own.what = f"{levels.dtype.name.lower()} times scales"
        what, scale = own.what, _side(own, tensor, "scale")
        value = own.do("Mul", value, own.reshape(scale, grid.R, 1, grid.C, 1))
        value = _untiled(own, value, grid, tensor.shape)
        own.what = what
    elif isinstance(recipe, Codebook):
        grid = Grid.of(tensor.shape, recipe.block, pad=recipe.pad)
        words = _side(own, tensor, "centroids")
        size = tensor.side["centroids"].shape[0]
        value = _gathered(own, words, tensor.codes["codes"], size)  # (R, C, r·c)
        if grid.r > 1 and grid.C > 1:
            value = own.reshape(value, grid.R, grid.C, grid.r, grid.c)
            value = own.do("Transpose", value, perm=[0, 2, 1, 3])
        value = _untiled(own, value, grid, tensor.shape)
        own.what = f"Gather of {size} codewords"
    else:
        decoded = tensor.decode()
        values, codes = torch.unique(decoded, return_inverse=True)
        if len(values) > min(_MOST_VALUES, decoded.numel() // 2):
            return None
        table = own.put("values", values, ir.DataType.FLOAT)
        value = _gathered(own, table, codes, len(values))
        own.what = f"Gather of {len(values)} values"
    return value


def _side(own: _Constants, tensor: Quantized, name: str) -> ir.Value:
    side = tensor.side[name]
    value = _small(own, side)
    return own.put(name, side.decode(), ir.DataType.FLOAT) if value is None else value


def _gathered(own: _Constants, table: ir.Value, codes: Tensor, size: int) -> ir.Value:
    """Rows of a table; indices are int64 when they are used, and as narrow as can be in the file."""
    kind = _unsigned(size)
    indices = own.do("Cast", own.put("codes", codes, kind), to=ir.DataType.INT64)
    return own.do("Gather", table, indices, axis=0)


def _untiled(own: _Constants, value: ir.Value, grid: Grid, shape: Shape) -> ir.Value:
    """Tiles in reading order as the tensor that they cover, without padding."""
    if grid.padded:
        value = own.reshape(value, grid.R * grid.r, grid.C * grid.c)
        ends = own.put("ends", torch.tensor([grid.rows, grid.cols]), ir.DataType.INT64)
        value = own.do("Slice", value, own.put("starts", torch.zeros(2), ir.DataType.INT64), ends)
    return own.reshape(value, *shape)


class _Levels(NamedTuple):
    """Integers that a scale is multiplied with."""

    codes: Int[Tensor, "rows cols"]
    zero: Int[Tensor, "R C"] | None
    dtype: ir.DataType


def _levels(tensor: Quantized) -> _Levels:
    recipe, codes = tensor.recipe, tensor.codes["codes"].int()
    if isinstance(recipe, Uniform) and not recipe.symmetric:
        return _Levels(codes, tensor.side["zero_point"].decode().int(), _unsigned(recipe.alphabet))
    if isinstance(recipe, Uniform):
        bits = next(n for n in (2, 4, 8) if n >= recipe.bits)
        return _Levels(codes - recipe.q_max, None, ir.DataType[f"INT{bits}"])
    return _Levels(codes * 2 - 1 if isinstance(recipe, Binary) else codes - 1, None, ir.DataType.INT2)


def _unsigned(size: int) -> ir.DataType:
    """The narrowest type for codes below `size` that an initializer can have."""
    bits = next((n for n in (2, 4, 8, 16) if size <= 1 << n), None)
    return ir.DataType.INT32 if bits is None else ir.DataType[f"UINT{bits}"]


def _put(graph: ir.Graph, names: Sequence[str], tensor: Quantized, folded: _Constants) -> _Constants:
    """Put a tensor in the place of its float initializers, one for each name; returns what stands for it now."""
    floats = [graph.initializers[name] for name in names if name in graph.initializers]
    uses = [use for value in floats for use in value.uses()]
    layouts = {_transposed(node, index) for node, index in uses}
    own = _dequantized(names[0], tensor, transposed=layouts.pop() or False) if layouts in ({True}, {False}) else None
    if own is not None and own.value is not None:
        for node, index in uses:
            _multiply_with(graph, node, index, own)
    elif not uses:
        own = _Constants(names[0])
        own.what = "nothing, since the graph does not read it"
    elif folded.value is None:
        own = _Constants(names[0])
        own.what, own.initializers = "float32, as no exact form is smaller", floats
        return own
    else:
        own = folded
        for value in floats:
            value.replace_all_uses_with(folded.value)
    for value in floats:
        graph.initializers.pop(str(value.name))
    for value in own.initializers:
        graph.register_initializer(value)
    return own


def _dequantized(name: str, tensor: Quantized, *, transposed: bool) -> _Constants | None:
    """A weight as `DequantizeLinear` gives it to a product, (inputs, outputs); None where that would not be fused."""
    recipe = tensor.recipe
    if not isinstance(recipe, Uniform | Binary | Ternary) or len(tensor.shape) != 2:
        return None
    grid, levels = Grid.of(tensor.shape, recipe.block, pad=recipe.pad), _levels(tensor)
    inputs, outputs, deep, wide = grid.rows, grid.cols, grid.r, grid.c
    if transposed:
        inputs, outputs, deep, wide = grid.cols, grid.rows, grid.c, grid.r
    if grid.padded or (deep != inputs and deep not in _FUSED):
        return None
    if levels.dtype.bitwidth == 2 and outputs % _OUTPUTS_OF_TWO_BITS:
        return None
    if (deep, wide) == (inputs, outputs):  # one scale
        shape, where = (), {}
    elif deep == inputs:  # one for each output
        shape, where = (outputs,), {"axis": 1}
    else:  # one for each output and block of inputs
        shape, where = (inputs // deep, outputs), {"axis": 0, "block_size": deep}

    def laid_out(values: Tensor) -> Tensor:
        values = values.T if transposed else values
        return (values if not shape else values.repeat_interleave(wide, 1)).reshape(shape)

    own = _Constants(name)
    codes = own.put("codes", levels.codes.T if transposed else levels.codes, levels.dtype)
    # In float32 and as it is read: an expression, however small, would be folded too late to be fused.
    arguments = [codes, own.put("scale", laid_out(tensor.side["scale"].decode()), ir.DataType.FLOAT)]
    if levels.zero is not None:
        arguments.append(own.put("zero_point", laid_out(levels.zero), levels.dtype))
    own.value = own.do("DequantizeLinear", *arguments, **where)
    own.what = f"DequantizeLinear of {levels.dtype.name.lower()}"
    return own


def _transposed(node: ir.Node, index: int) -> bool | None:
    """Whether a product reads its second factor by rows of outputs, as `nn.Linear` keeps it; None for any other use."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "MatMul" and index == 1:
        return False
    if node.op_type == "Gemm" and index == 1:
        plain = attributes.get("alpha", 1.0) == 1 == attributes.get("beta", 1.0) and not attributes.get("transA", 0)
        return bool(attributes.get("transB", 0)) if plain else None
    if node.op_type == "Transpose" and list(attributes.get("perm", ())) == [1, 0]:
        uses = node.outputs[0].uses()
        return True if uses and all(user.op_type == "MatMul" and at == 1 for user, at in uses) else None
    return None


def _multiply_with(graph: ir.Graph, node: ir.Node, index: int, weight: _Constants) -> None:
    """Let a product that `_transposed` knows read `weight`, which is (inputs, outputs)."""
    assert weight.value is not None
    if node.op_type == "Transpose":
        node.outputs[0].replace_all_uses_with(weight.value)
        graph.remove(node)
        return
    node.replace_input_with(index, weight.value)
    node.attributes.pop("transB", None)
    for user, at in list(node.outputs[0].uses()):
        if user.op_type == "Relu":  # directly behind a Gemm it would keep ONNX Runtime 1.32 from fusing this product
            same = weight.put("same_shape", torch.tensor((0, -1)), ir.DataType.INT64)
            reshape = ir.node("Reshape", [node.outputs[0], same])
            graph.insert_before(user, reshape)
            user.replace_input_with(at, reshape.outputs[0])


class _Rounded(nn.Module):
    """A module's input as `InputQuantizer` rounds it, step by step.

    Not as `QuantizeLinear` and `DequantizeLinear`: beside those, ONNX Runtime rounds float weights to 8 bits.
    """

    def __init__(self, recipe: Uniform, scale: float, zero: int) -> None:
        super().__init__()
        low, high = (-recipe.q_max, recipe.q_max) if recipe.symmetric else (-zero, recipe.alphabet - 1 - zero)
        self.scale, self.low, self.high = scale, low, high

    def forward(self, x: Tensor) -> Tensor:
        return (x / self.scale).round().clamp(self.low, self.high) * self.scale

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self(args[0]), *args[1:])


def _with_rounded_inputs(model: nn.Module, artifact: Artifact) -> nn.Module:
    for name, quantized in artifact.inputs.items():
        recipe = quantized.activation.recipe
        if not isinstance(recipe, Uniform):
            raise PlanError(f"the input of {name}: {recipe!r} has no ONNX operation; use Uniform, or leave it out")
        if quantized.activation.range == "batch":
            raise PlanError(f"the input of {name}: a range from each batch cannot be exported; use range='calibrated'")
        side = {key: float(value.decode()) for key, value in quantized.side.items()}
        module = model.get_submodule(name)
        take_away(module)
        rounded = _Rounded(recipe, side["scale"], int(side.get("zero_point", 0)))
        module.add_module(CHILD, rounded)
        module.register_forward_pre_hook(rounded.hook)
    return model
