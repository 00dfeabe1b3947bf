"""torchao: linear layers by `quantize_`, saved by `torch.save`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from job import Layers, Made, Task, run
from torch import nn

quantization: Any = importlib.import_module("torchao.quantization")


def config(setting: dict[str, Any], bits: int) -> Any:
    """`kind`: intx (a byte for each weight, whatever the bits), int8, or int4, the packed form that it has for CPUs.

    `group` 0 is a scale per row.
    """
    group = setting.get("group", 0)
    if setting["kind"] == "int4":
        return importlib.import_module("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(group)
    if setting["kind"] == "int8":
        return quantization.Int8WeightOnlyConfig()
    granularity = quantization.PerGroup(group) if group else quantization.PerAxis(0)
    return quantization.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity)


def takes(layer: nn.Linear, setting: dict[str, Any]) -> bool:
    """Whether the kind serves a layer; int4 wants rows by the sixteen."""
    group = setting.get("group", 0)
    return not ((group and layer.in_features % group) or (setting["kind"] == "int4" and layer.out_features % 16))


def compress(task: Task) -> Made:
    """What int4 and groups do not serve is int8."""
    layers, setting = Layers(task.weights), dict(task.setting)
    linear = [p for p in layers.layer_names if isinstance(layers.get_submodule(p), nn.Linear)]
    for path in linear:
        layer = layers.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        if not takes(layer, setting):
            quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
            continue
        if setting["kind"] == "int4":
            layer.to(torch.bfloat16)
        quantization.quantize_(layer, config(setting, task.bits(f"{path}.weight")))
    torch.save(layers.state_dict(), task.folder / "model.pt")
    state = torch.load(task.folder / "model.pt", weights_only=False)
    done = [f"{path}.weight" for path in linear]
    return Made({n: dequantize(t) if n in done else t for n, t in state.items()}, done)


def dequantize(w: torch.Tensor) -> torch.Tensor:
    if type(w).__name__ != "Int4OpaqueTensor":
        return w.dequantize()
    # Only its matrix product knows its packing.
    return torch.nn.functional.linear(torch.eye(w.shape[1], dtype=torch.bfloat16), w).T


if __name__ == "__main__":
    run(compress)
