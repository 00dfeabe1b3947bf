"""coreai-opt: look-up tables of k-means on the PyTorch side, written by coreai-torch as an .aimodel.

The asset holds the layers, each with an input of its own, and no graph of the network; all other tensors lie beside
it, in float16.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from job import Layers, Made, Task, run
from safetensors.torch import load_file, save_file

opt: Any = importlib.import_module("coreai_opt")
palettization: Any = importlib.import_module("coreai_opt.palettization")
coreai_torch: Any = importlib.import_module("coreai_torch")


def module_config(setting: Any, bits: int) -> Any:
    spec = {"n_bits": bits, "cluster_dim": setting.get("dim", 1)}
    if setting.get("table") == 8:
        spec["lut_qspec"] = importlib.import_module("coreai_opt.quantization.spec").QuantizationSpec(dtype=torch.int8)
    weight = palettization.PalettizationSpec(**spec)
    return palettization.ModuleKMeansPalettizerConfig(
        op_state_spec={"weight": weight}, enable_fast_kmeans_mode=setting.get("dim", 1) == 1
    )


def compress(task: Task) -> Made:
    names = task.names(2, 4)
    layers = Layers({n: w for n, w in task.weights.items() if n in names})
    config = palettization.KMeansPalettizerConfig(
        global_config=module_config(task.setting, task.setting["bits"]),
        module_name_configs={
            name.removesuffix(".weight"): module_config(
                {"bits": 8} if "ends" in task.setting else task.setting, task.bits(name)
            )
            for name in task.ends
        },
    )
    palettizer = palettization.KMeansPalettizer(layers, config)
    palettizer.prepare(layers.examples())
    dense = {n: palettizer._model.get_submodule(n.removesuffix(".weight")).weight.detach() for n in names}
    final = palettizer.finalize(backend=opt.ExportBackend.CoreAI)
    exported = torch.export.export(final, args=layers.examples())
    exported = exported.run_decompositions(coreai_torch.get_decomp_table())
    program = coreai_torch.TorchConverter().add_exported_program(exported).to_coreai()
    program.save_asset(Path(task.folder, "model.aimodel"))
    rest = {n: w.half() for n, w in task.weights.items() if n not in names}
    save_file(rest, task.folder / "rest.safetensors")
    dense |= load_file(task.folder / "rest.safetensors")
    return Made(dense, names)


if __name__ == "__main__":
    run(compress)
