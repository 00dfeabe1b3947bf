"""optimum-quanto: linear layers and convolutions by `quantize` and `freeze`, saved as safetensors."""

from __future__ import annotations

import importlib
from typing import Any

from job import Layers, Made, Task, run
from safetensors.torch import load_file, save_file

quanto: Any = importlib.import_module("optimum.quanto")


def compress(task: Task) -> Made:
    """`optimizer`: "max", the default, or "hqq", of the scales of 2 and 4 bits."""
    layers = Layers(task.weights)
    optimizer = quanto.HqqOptimizer() if task.setting.get("optimizer") == "hqq" else None
    for bits in sorted({task.bits(f"{path}.weight") for path in layers.layer_names}):
        paths = [path for path in layers.layer_names if task.bits(f"{path}.weight") == bits]
        chosen = {"optimizer": optimizer} if optimizer and bits < 8 else {}
        quanto.quantize(layers, weights=getattr(quanto, f"qint{bits}"), include=paths, **chosen)
    quanto.freeze(layers)
    # Activations are float: their scales are ones that say nothing.
    state = {n: t for n, t in layers.state_dict().items() if not n.endswith(("input_scale", "output_scale"))}
    save_file({n: t.contiguous() for n, t in state.items()}, task.folder / "model.safetensors")
    saved = load_file(task.folder / "model.safetensors")
    layers.load_state_dict(saved, strict=False)
    dense = dict(saved)
    for path in layers.layer_names:
        layer: Any = layers.get_submodule(path)
        dense[f"{path}.weight"] = layer.weight.dequantize()
    return Made(dense, [f"{path}.weight" for path in layers.layer_names])


if __name__ == "__main__":
    run(compress)
