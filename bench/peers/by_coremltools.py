"""coremltools: look-up tables of k-means, in an .mlpackage.

Each weight stands in an operation of its own with an input of its own, and all vectors are one constant: the package
holds no graph of the network.  What is not compressed is float16, as the converter has it.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from job import Made, Task, run

ct: Any = importlib.import_module("coremltools")
cto: Any = importlib.import_module("coremltools.optimize.coreml")
mil: Any = importlib.import_module("coremltools.converters.mil.mil")
mb: Any = mil.Builder


def package(task: Task) -> Any:
    """The model before compression; the weight of layer i belongs to the operation `w<i>`."""
    names = task.names(2, 4)
    shapes = [task.weights[name].shape for name in names]
    rest = torch.cat([w.reshape(-1) for n, w in task.weights.items() if n not in names])
    inputs = {f"x{i}": mb.TensorSpec((1, s[1], *s[2:])) for i, s in enumerate(shapes)}
    with mil.Function(inputs | {"x": mb.TensorSpec((len(rest),))}, ct.target.iOS18) as function:
        outputs = []
        for i, name in enumerate(names):
            w = task.weights[name].numpy()
            operation = mb.conv if w.ndim == 4 else mb.linear
            outputs.append(operation(x=function.inputs[f"x{i}"], weight=mb.const(val=w), name=f"w{i}"))
        outputs.append(mb.mul(x=function.inputs["x"], y=mb.const(val=rest.numpy()), name="vectors"))
        function.set_outputs(outputs)
    program = mil.Program()
    program.add_function("main", function)
    return ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)


def compress(task: Task) -> Made:
    """`group`: channels that share a table, 0 for all; `dim`: coordinates of an entry; `table`: its bits, 16 or 8."""
    names, setting = task.names(2, 4), task.setting
    model = package(task)
    constants = {operation: constant for operation, (constant, _) in _constants(model).items()}
    ends = [constants[f"w{i}"] for i, name in enumerate(names) if name in task.ends and "ends" in setting]
    done = [constants[f"w{i}"] for i in range(len(names)) if constants[f"w{i}"] not in ends]
    if ends:
        int8 = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
        model = cto.linear_quantize_weights(model, cto.OptimizationConfig(op_name_configs=dict.fromkeys(ends, int8)))
    grouped = {"granularity": "per_grouped_channel", "group_size": setting["group"]} if setting.get("group") else {}
    palette = cto.OpPalettizerConfig(
        nbits=setting["bits"], cluster_dim=setting.get("dim", 1), weight_threshold=0, **grouped
    )
    model = cto.palettize_weights(model, cto.OptimizationConfig(op_name_configs=dict.fromkeys(done, palette)))
    if setting.get("table") == 8:
        int8 = cto.OpLinearQuantizerConfig(mode="linear_symmetric", granularity="per_tensor", weight_threshold=0)
        config = cto.OptimizationConfig(global_config=int8, op_name_configs={constants["vectors"]: None})
        model = cto.linear_quantize_weights(model, config, joint_compression=True)
    path = str(task.folder / "model.mlpackage")
    model.save(path)
    saved = cto.decompress_weights(ct.models.MLModel(path, skip_model_load=True))
    by_operation = {operation: value for operation, (_, value) in _constants(saved).items()}
    dense = {n: torch.from_numpy(by_operation[f"w{i}"].astype(np.float32)) for i, n in enumerate(names)}
    rest = torch.from_numpy(by_operation["vectors"].astype(np.float32))
    plain = [name for name in task.weights if name not in names]
    parts = rest.split([task.weights[name].numel() for name in plain])
    dense |= {name: part.reshape(task.weights[name].shape) for name, part in zip(plain, parts, strict=True)}
    same = [n for n in names if torch.equal(dense[n], task.weights[n].half().float())]
    return Made(dense, [name for name in names if name not in same])


def _constants(model: Any) -> dict[str, tuple[str, np.ndarray]]:
    """The name and value of the constant that each operation uses, but for the zero biases that linear layers get."""
    return {
        meta.child_ops[0].name.split("_")[0]: (name, meta.val)
        for name, meta in cto.get_weights_metadata(model, weight_threshold=0).items()
        if meta.val.ndim > 1 or meta.child_ops[0].name.startswith("vectors")
    }


if __name__ == "__main__":
    run(compress)
