"""hqq: linear layers by `HQQLinear`, saved as safetensors, which its state is made for."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from job import Layers, Made, Task, run
from safetensors.torch import load_file, save_file
from torch import nn

hqq: Any = importlib.import_module("hqq.core.quantize")


def compress(task: Task) -> Made:
    layers = Layers(task.weights)
    state: dict[str, Any] = dict(task.weights)
    done = []
    for path in layers.layer_names:
        layer, name = layers.get_submodule(path), f"{path}.weight"
        if isinstance(layer, nn.Linear) and layer.weight.numel() % task.setting["group"] == 0:
            config = hqq.BaseQuantizeConfig(nbits=task.bits(name), group_size=task.setting["group"], axis=1)
            quantized = hqq.HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
            del state[name]
            state |= {f"{name}.{key}": value for key, value in quantized.state_dict().items()}
            done.append(name)
    save_file({key: t.contiguous() for key, t in state.items()}, task.folder / "model.safetensors")
    saved = load_file(task.folder / "model.safetensors")
    dense = dict(saved)
    for name in done:
        fresh = hqq.HQQLinear(None, None, compute_dtype=torch.float16, device="cpu")
        own = {key.removeprefix(f"{name}."): t for key, t in saved.items() if key.startswith(f"{name}.")}
        fresh.load_state_dict(own)
        dense[name] = fresh.dequantize()
    return Made(dense, done)


if __name__ == "__main__":
    run(compress)
