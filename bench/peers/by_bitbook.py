"""bitbook itself, in the interpreter that runs the bench: `ECSQ` or a trellis at one step, entropy-coded.

Without data, or (`examples`) with so many training examples: error feedback under a price of bits, and shifted
statistics of batch normalisation.  What is no weight is stored in bfloat16.
"""

from __future__ import annotations

import copy

import torch
from job import Made, Task, run
from networks import NETWORKS, checkpoint, put
from torch import Generator, nn

import bitbook
from bitbook import ECSQ, Float, Integer, Plan, Trellis
from bitbook.apply import compress_by_plan as compressed
from bitbook.apply import freeze, quantize_dense, restore
from bitbook.artifact import Artifact
from bitbook.data import load_dataset
from bitbook.quantizer import FitOptions, Quantized
from bitbook.surgery.batchnorm import absorb_statistics, normalisations, shift_statistics


def compress(task: Task) -> Made:
    """`step` is relative to the root mean square of all weights."""
    network = NETWORKS[task.network]
    model = put(network.load(), task.weights).eval()
    names = task.names(2, 4)
    rms = torch.cat([task.weights[name].flatten() for name in names]).square().mean().sqrt().item()
    step = task.setting["step"] * rms
    recipe = Trellis(8) if task.setting.get("trellis") else ECSQ()
    plan, options = Plan(dict.fromkeys(names, recipe)), FitOptions(step=step, iterations=10)
    seen = _examples(network.unit, task.setting.get("examples", 0))
    if seen is None:
        artifact = compressed(model, plan, options=options)
    else:
        artifact = compressed(model, plan, options=options, calibration=seen, lam=type(recipe).price_of_step * step**2)
    artifact = _finished(artifact, model, seen)
    bitbook.save(artifact, task.folder / "model.safetensors")
    loaded = bitbook.load(task.folder / "model.safetensors", copy.deepcopy(model))
    return Made(checkpoint(loaded), list(task.weights))


def _examples(unit: str, count: int) -> torch.Tensor | None:
    """Training examples, drawn by the seed 0."""
    if not count:
        return None
    data = load_dataset("cifar10" if unit == "%" else "stories")
    return data.train_x[torch.randperm(len(data.train_x), generator=Generator().manual_seed(0))[:count]]


def _finished(artifact: Artifact, model: nn.Module, seen: torch.Tensor | None) -> Artifact:
    """The artifact as it is written: normalisations absorbed into two vectors, all that is no weight in bfloat16."""
    plain = restore(artifact, copy.deepcopy(model)).eval()
    if normalisations(plain):
        if seen is not None:
            shift_statistics(plain, model, seen)
        absorb_statistics(plain)
    weights = {name: tensor for name, tensor in artifact.tensors.items() if isinstance(tensor, Quantized)}
    rest = {name: tensor for name, tensor in freeze(plain).tensors.items() if name not in weights}
    # Absorbed statistics are zeros and ones, which cost nothing as integers.
    kinds = {"running_mean": Integer(1), "running_var": Integer(2), "num_batches_tracked": Integer(1)}
    dense = Plan({name: kinds.get(name.rpartition(".")[2], Float("bfloat16")) for name in rest})
    return quantize_dense(Artifact({**rest, **weights}, artifact.inputs, artifact.aliases), dense)


if __name__ == "__main__":
    run(compress)
