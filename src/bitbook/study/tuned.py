"""A public network tuned to a few bytes: error feedback first, then a short training that pays for every bit.

    bitbook study --dataset tuned

    public network ──error feedback, λ──► codes ──finetune(budget)──► file ──► evaluate the file

A cell is JSON: dataset, holdout, model, start, weights and ends (plans: of what error feedback encodes, and of the
first and last layer), step, end_step (share of their root mean square) and lam of the encoding, calibration (images),
training (the fields of `FineTuning`), crop (the fields of `crop_images`), budget, dense (the plan of everything else),
seed, and, where not all training images are used, examples.  A result is that of `trial.run_trial`, and `divergence`:
KL from the float network's answers on the images held out, which is what configurations are chosen by.  The public
network knows these images, so accuracy on them says little.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bitbook.apply import compress_by_plan, restore
from bitbook.artifact import Artifact
from bitbook.data import crop_images
from bitbook.data.cifar import BLACK
from bitbook.models import build_model
from bitbook.plan import Plan
from bitbook.quantizer import FitOptions, quantize
from bitbook.rate.finetuning import FineTuning, finetune
from bitbook.scalar.ecsq import ECSQ
from bitbook.scalar.leaves import Integer
from bitbook.scalar.uniform import Uniform
from bitbook.study.family import float_start
from bitbook.study.trial import load_parts, measure_file

_BATCH = 250  # images that are evaluated at once
_VECTORS = Uniform(6, symmetric=False)
_DENSE = Plan({"*bn?.weight": _VECTORS, "*bn?.bias": _VECTORS, "linear.bias": _VECTORS, "*.running_mean": Integer(1),
               "*.running_var": Integer(2), "*.num_batches_tracked": Integer(1)})  # fmt: skip
STEPS: Mapping[int, float] = {34_000: 0.18, 20_000: 0.3, 26_000: 0.24, 48_000: 0.14}
"""Where the steps of weights begin, by the bytes to be reached: error feedback alone then ends a little above them."""
TRAINING: Mapping[str, Any] = {"epochs": 40, "batch": 64, "lr": 1e-3, "precision": "bfloat16"}


def tuned_cell(budget: int, step: float, seed: int, **training: Any) -> dict[str, Any]:
    """ResNet-20 in `budget` bytes, written out completely."""
    return {
        "dataset": "cifar10",
        "holdout": 2000,
        "model": "resnet-20",
        "start": {"file": "resnet20_cifar10.safetensors"},
        "family": "entropy-coded scalar",
        "method": "error feedback, then fine-tuned",
        "recipe": f"{budget} bytes",
        "weights": Plan({"layer*.conv?.weight": ECSQ()}).to_json(),
        "ends": Plan({"conv1.weight": ECSQ(), "linear.weight": ECSQ()}).to_json(),
        "step": step,
        "end_step": 0.25,
        "lam": ECSQ.price_of_step * step**2,
        "calibration": 500,
        "training": {**TRAINING, **training},
        "crop": {"margin": 4, "mirror": True, "background": list(BLACK)},
        "budget": budget,
        "dense": _DENSE.to_json(),
        "seed": seed,
    }


def tuned_cells(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every budget."""
    return [tuned_cell(budget, step, seed) for seed in seeds for budget, step in STEPS.items()]


def run_trial(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Run one cell."""
    clock = time.perf_counter
    began = clock()
    dataset, data = load_parts(cell["dataset"], cell["holdout"])
    model, start_losses = float_start(cell, data)
    model = model.eval()
    started = clock()
    crop = {**cell["crop"], "background": torch.tensor(cell["crop"]["background"])}
    moved = partial(_moved, shape=dataset.input_shape, crop=crop)
    generator = Generator().manual_seed(cell["seed"])
    chosen = torch.randperm(len(data.train_x), generator=generator)
    start = encoded(cell, model, moved(data.train_x[chosen[: cell["calibration"]]], generator))
    chosen = chosen[: cell.get("examples")]
    found = finetune(
        model,
        (data.train_x[chosen], data.train_y[chosen]),
        start,
        budget=cell["budget"],
        training=FineTuning(**cell["training"]),
        dense=Plan.from_json(cell["dense"]),
        augment=moved,
        seed=cell["seed"],
        after_epoch=lambda epoch: print(epoch, flush=True),  # into the worker's log, for it takes more than an hour
    )
    fitted = clock()
    fresh = restore(found.artifact, build_model(cell["model"], seed=0))
    return {
        **measure_file(found.artifact, cell["model"], dataset, data, batch=_BATCH),
        "divergence": divergence(fresh, model, data.val_x),
        "start_losses": start_losses,
        "losses": [epoch.loss for epoch in found.epochs],
        "lam": found.lam,
        "seconds": {"start": started - began, "fit": fitted - started, "evaluate": clock() - fitted},
    }


def encoded(cell: Mapping[str, Any], model: nn.Module, calibration: Tensor) -> Artifact:
    """Weights with error feedback; the first and last layer, a hundredth of them, rounded to finer steps."""
    options = FitOptions(step=cell["step"])
    plan = Plan.from_json(cell["weights"])
    artifact = compress_by_plan(
        model, plan, options=options, calibration=calibration, lam=cell["lam"], seed=cell["seed"]
    )
    tensors = dict(artifact.tensors)
    dense = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    for name, recipe in Plan.from_json(cell["ends"]).recipes(dense).items():
        if recipe is not None:
            step = cell["end_step"] * float(dense[name].square().mean().sqrt())
            tensors[name] = quantize(recipe, dense[name], options=FitOptions(step=step, iterations=0))
    return Artifact(tensors, artifact.inputs, artifact.aliases)


@torch.no_grad()
def divergence(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    """KL(reference ‖ model) of the answers, mean over the examples, in nats."""
    both = (copy.deepcopy(net).eval() for net in (model, reference))
    given, taught = (torch.cat([net(part) for part in x.split(_BATCH)]).log_softmax(1) for net in both)
    return float(F.kl_div(given, taught, reduction="batchmean", log_target=True))


def _moved(x: Tensor, generator: Generator, *, shape: tuple[int, ...], crop: Mapping[str, Any]) -> Tensor:
    channels, rows, cols = shape
    return crop_images(x, (channels, rows, cols), generator=generator, **crop)
