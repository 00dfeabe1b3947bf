"""coreai-opt: look-up tables of k-means on the PyTorch side, written by coreai-torch as an .aimodel.

The asset holds the layers, each with an input of its own, and no graph of the network; all other tensors lie beside
it, in float16.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from job import Layers, Made, Task, run
from safetensors.torch import load_file, save_file

opt: Any = importlib.import_module("coreai_opt")
palettization: Any = importlib.import_module("coreai_opt.palettization")
spec: Any = importlib.import_module("coreai_opt.palettization.spec")
coreai_torch: Any = importlib.import_module("coreai_torch")


def module_config(setting: Mapping[str, Any], bits: int) -> Any:
    """`group`: channels that share a table, 0 for all; `dim`: coordinates of an entry; `table`: its bits, if fewer."""
    parts: dict[str, Any] = {"n_bits": bits, "cluster_dim": setting.get("dim", 1)}
    if setting.get("group"):
        parts["granularity"] = spec.PerGroupedChannelGranularity(group_size=setting["group"])
    if setting.get("table") == 8:
        parts["lut_qspec"] = importlib.import_module("coreai_opt.quantization.spec").QuantizationSpec(dtype=torch.int8)
    return palettization.ModuleKMeansPalettizerConfig(
        op_state_spec={"weight": palettization.PalettizationSpec(**parts)},
        enable_fast_kmeans_mode=parts["cluster_dim"] == 1,
    )


def exceptions(task: Task) -> dict[str, Any]:
    """First and last layers with bits of their own, and one table for all rows where groups do not divide them."""
    found = {}
    for name in task.names(2, 4):
        if name in task.ends and "ends" in task.setting:
            found[name.removesuffix(".weight")] = module_config({}, task.bits(name))
        elif len(task.weights[name]) % task.setting.get("group", 1):
            found[name.removesuffix(".weight")] = module_config({**task.setting, "group": 0}, task.bits(name))
    return found


def compress(task: Task) -> Made:
    names = task.names(2, 4)
    layers = Layers({n: w for n, w in task.weights.items() if n in names})
    config = palettization.KMeansPalettizerConfig(
        global_config=module_config(task.setting, task.setting["bits"]),
        module_name_configs=exceptions(task),
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
