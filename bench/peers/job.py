"""What the programs of all peers share: reading a job, the layers of a checkpoint, writing results.

They run in the peers' environments, so that this needs nothing but torch and safetensors.

    job.json ─► weights, settings ─► the tool ─► OUT/0/file/…           what the tool itself saves
                                                 OUT/0/dense.safetensors its weights, read back and made float again
                                                 OUT/0/done.json         or error.txt

A peer knows a checkpoint by its tensors, not by its network: a matrix or an embedding becomes a linear layer, a tensor
of four dimensions a convolution.  So tools that want modules get some, and none sees data.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Task(NamedTuple):
    """One setting on one checkpoint."""

    network: str
    weights: dict[str, Tensor]
    setting: Mapping[str, Any]
    ends: Sequence[str]
    """Weights of the first and the last layer."""
    folder: Path
    """Where the tool saves; every byte in it counts."""

    def bits(self, name: str) -> int:
        """What a weight gets: the setting's `bits`, or `ends`, where it has that, in the first and last layer."""
        return self.setting.get("ends", self.setting["bits"]) if name in self.ends else self.setting["bits"]

    def names(self, *dimensions: int) -> list[str]:
        """The weights of that many dimensions."""
        return [name for name, w in self.weights.items() if w.ndim in dimensions]


class Made(NamedTuple):
    """What a tool made of it: all weights, read back from its file, and the names of those that it quantized."""

    dense: Mapping[str, Tensor]
    quantized: Sequence[str]


class Layers(nn.Module):
    """A tree of layers with the names of the weights; all that belongs to no layer is a parameter of its own.

    Called with one input for each layer, it gives one output for each.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layer_names, self._shapes = [], []
        for name, w in weights.items():
            path, _, leaf = name.rpartition(".")
            if leaf == "weight" and w.ndim in (2, 4):
                _put(self, path, _layer(w, weights.get(f"{path}.bias")))
                self.layer_names.append(path)
                self._shapes.append(w.shape)
        for name, w in weights.items():
            path, _, leaf = name.rpartition(".")
            if path not in self.layer_names:
                if path and not _has(self, path):
                    _put(self, path, nn.Module())
                owner = self.get_submodule(path)
                owner.register_parameter(leaf, nn.Parameter(w.clone(), requires_grad=False))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [self.get_submodule(name)(x) for name, x in zip(self.layer_names, inputs, strict=True)]

    def examples(self) -> tuple[Tensor, ...]:
        """Inputs that `forward` takes."""
        return tuple(torch.zeros(1, *shape[1:]) for shape in self._shapes)


def _layer(w: Tensor, bias: Tensor | None) -> nn.Module:
    outputs, inputs, *kernel = w.shape
    if kernel:
        layer = nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]), bias=bias is not None)
    else:
        layer = nn.Linear(inputs, outputs, bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(w)
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
    return layer.requires_grad_(False)


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(last, module)


def run(compress: Callable[[Task], Made]) -> None:
    """Do every setting of the job that the command line names."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    weights = load_file(job["checkpoint"])
    for i, setting in enumerate(job["settings"]):
        out = Path(job["out"], str(i))
        (out / "file").mkdir(parents=True)
        try:
            torch.manual_seed(0)
            made = compress(Task(job["network"], dict(weights), setting, job["ends"], out / "file"))
            _write(made, weights, out)
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip().splitlines()
            (out / "error.txt").write_text(f"{type(error).__name__}: {text[-1] if text else ''}")


def _write(made: Made, weights: Mapping[str, Tensor], out: Path) -> None:
    for name, w in weights.items():
        if made.dense[name].shape != w.shape:
            raise ValueError(f"{name} came back as {list(made.dense[name].shape)}, not {list(w.shape)}")
    save_file({name: made.dense[name].detach().float().contiguous() for name in weights}, out / "dense.safetensors")
    share = sum(weights[name].numel() for name in made.quantized) / sum(w.numel() for w in weights.values())
    (out / "done.json").write_text(json.dumps({"share": share}))
