"""bitsandbytes: linear layers by its 4-bit tables and its row-wise int8, saved as safetensors as `Linear4bit` does."""

from __future__ import annotations

import importlib
from typing import Any

from job import Layers, Made, Task, run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

bnb: Any = importlib.import_module("bitsandbytes.functional")


def compress(task: Task) -> Made:
    """`kind`: nf4 or fp4, with `block` and `double` (scales in 8 bits), or int8."""
    layers = Layers(task.weights)
    done = [f"{p}.weight" for p in layers.layer_names if isinstance(layers.get_submodule(p), nn.Linear)]
    state: dict[str, Tensor] = {name: w for name, w in task.weights.items() if name not in done}
    setting = task.setting
    for name in done:
        w = task.weights[name]
        if setting["kind"] == "int8":
            state[name], state[f"{name}.SCB"], _ = bnb.int8_vectorwise_quant(w.half())
        else:
            state[name], quant_state = bnb.quantize_4bit(
                w, blocksize=setting["block"], compress_statistics=setting["double"], quant_type=setting["kind"]
            )
            state |= {f"{name}.{key}": value for key, value in quant_state.as_dict(packed=True).items()}
    save_file({name: t.contiguous() for name, t in state.items()}, task.folder / "model.safetensors")
    saved = load_file(task.folder / "model.safetensors")
    dense = dict(saved)
    for name in done:
        side = {key.removeprefix(f"{name}."): t for key, t in saved.items() if key.startswith(f"{name}.")}
        if setting["kind"] == "int8":
            dense[name] = bnb.int8_vectorwise_dequant(saved[name], side["SCB"])
        else:
            quant_state = bnb.QuantState.from_dict(side, device=saved[name].device)
            dense[name] = bnb.dequantize_4bit(saved[name], quant_state)
    return Made(dense, done)


if __name__ == "__main__":
    run(compress)
