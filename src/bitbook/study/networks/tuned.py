"""Public networks tuned to a few bytes: error feedback first, then a short training that pays for every bit.

    bitbook study --dataset tuned

    public network ──error feedback, λ──► codes ──finetune(budget)──► file ──► evaluate the file

A cell is JSON: dataset, holdout, model, start (where the model's name does not say which weights), calibration
(examples), crop (the fields of `crop_images`) or length (of sequences that calibrate), training (the fields of
`FineTuning`), budget, dense (the plan of what has no codes at first), seed, where not all training examples are used,
examples, and how codes begin.  That is either with one step for all layers, step and lam, under plans: weights, of what
error feedback encodes, and ends, of the first and last layer, their steps end_step, a share of their root mean square.
Or it is with a `Fit` to the budget in scalars, at a trust, whose steps are those that sensitivities ask for.

A result is that of `trial.run_trial`, and `divergence`: KL from the float network's answers on the examples held out,
which is what configurations are chosen by.  The public networks know these examples, so accuracy on them says little.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from bitbook.apply import compress_by_plan, restore
from bitbook.artifact import Artifact
from bitbook.budget.compress import TRAINABLE, matrices_alone
from bitbook.budget.fit import Fit, FitSettings
from bitbook.data.cifar import BLACK
from bitbook.models import build_model
from bitbook.plan import Plan
from bitbook.quantizer import FitOptions, quantize
from bitbook.rate.finetuning import FineTuning, finetune
from bitbook.scalar.ecsq import ECSQ
from bitbook.scalar.leaves import Integer
from bitbook.scalar.uniform import Uniform
from bitbook.study.family.trial import float_start
from bitbook.study.networks.trial import calibration_inputs, cropping, divergence
from bitbook.study.trial import load_parts, measure_file

_BATCH = 250  # examples that are evaluated at once
_VECTORS = Uniform(6, symmetric=False)


@dataclass(frozen=True)
class Tuning:
    """A public network, and how it is tuned to each of some budgets."""

    cell: Mapping[str, Any]
    """What its cells have in common."""
    budgets: Mapping[int, Mapping[str, Any]]
    """The bytes to be reached, and what else depends on them."""


def _begins(step: float) -> dict[str, float]:
    """With a step at which error feedback alone ends a little above the budget."""
    return {"step": step, "lam": ECSQ.price_of_step * step**2}


RESNET = Tuning(
    {
        "dataset": "cifar10",
        "holdout": 2000,
        "model": "resnet-20",
        "start": {"file": "resnet20_cifar10.safetensors"},
        "family": "entropy-coded scalar",
        "method": "error feedback, then fine-tuned",
        "weights": Plan({"layer*.conv?.weight": ECSQ()}).to_json(),
        "ends": Plan({"conv1.weight": ECSQ(), "linear.weight": ECSQ()}).to_json(),
        "end_step": 0.25,
        "calibration": 500,
        "training": {"epochs": 40, "batch": 64, "lr": 5e-4, "precision": "bfloat16"},
        "crop": {"margin": 4, "mirror": True, "background": list(BLACK)},
        "dense": Plan({
            "*bn?.weight": _VECTORS, "*bn?.bias": _VECTORS, "linear.bias": _VECTORS, "*.running_mean": Integer(1),
            "*.running_var": Integer(2), "*.num_batches_tracked": Integer(1),
        }).to_json(),
    },
    {34_000: _begins(0.18), 20_000: _begins(0.3), 26_000: _begins(0.24), 48_000: _begins(0.14)},
)  # fmt: skip
STORIES = Tuning(
    {
        "dataset": "stories",
        "holdout": 200,
        "model": "stories260k",
        "family": "entropy-coded scalar",
        "method": "error feedback, then fine-tuned",
        "trust": 1.0,
        "calibration": 100,
        "length": 256,
        "training": {"epochs": 10, "batch": 8, "lr": 1e-3, "temperature": 1.0, "refit": 20},
        "dense": Plan({"*norm.weight": Uniform(8, symmetric=False)}).to_json(),
    },
    {108_000: {}, 90_000: {}, 75_000: {}},
)
TUNINGS = (RESNET, STORIES)


def tuned_cell(tuning: Tuning, budget: int, seed: int, **training: Any) -> dict[str, Any]:
    """A network in one of its budgets, written out completely."""
    return {
        **tuning.cell,
        **tuning.budgets[budget],
        "recipe": f"{budget} bytes",
        "training": {**tuning.cell["training"], **training},
        "budget": budget,
        "seed": seed,
    }


def tuned_cells(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every budget of every network."""
    return [tuned_cell(tuning, budget, seed) for seed in seeds for tuning in TUNINGS for budget in tuning.budgets]


def run_trial(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Run one cell."""
    clock = time.perf_counter
    began = clock()
    dataset, data = load_parts(cell["dataset"], cell["holdout"])
    model, start_losses = float_start(cell, data)
    model = model.eval()
    started = clock()
    how = {"examples": cell["calibration"], **{key: cell[key] for key in ("crop", "length") if key in cell}}
    calibration = calibration_inputs(how, data, dataset.input_shape, cell["seed"])
    start = (fitted if "trust" in cell else encoded)(cell, model, calibration)
    generator = Generator().manual_seed(cell["seed"])
    chosen = torch.randperm(len(data.train_x), generator=generator)[: cell.get("examples")]
    found = finetune(
        model,
        (data.train_x[chosen], data.train_y[chosen]),
        start,
        budget=cell["budget"],
        training=FineTuning(**cell["training"]),
        dense=Plan.from_json(cell["dense"]),
        augment=cropping(cell["crop"], dataset.input_shape) if "crop" in cell else None,
        seed=cell["seed"],
        after_epoch=lambda epoch: print(epoch, flush=True),  # into the worker's log, for it takes more than an hour
    )
    ended = clock()
    fresh = restore(found.artifact, build_model(cell["model"], seed=0)).eval()
    return {
        **measure_file(found.artifact, cell["model"], dataset, data, batch=_BATCH),
        "divergence": divergence(fresh, model, data.val_x),
        "start_losses": start_losses,
        "losses": [epoch.loss for epoch in found.epochs],
        "lam": found.lam,
        "seconds": {"start": started - began, "fit": ended - started, "evaluate": clock() - ended},
    }


def fitted(cell: Mapping[str, Any], model: nn.Module, calibration: Tensor) -> Artifact:
    """Matrices at the steps that their sensitivities ask for."""
    fit = Fit(model, calibration, FitSettings(matrices=TRAINABLE, trust=cell["trust"]), seed=cell["seed"])
    return matrices_alone(model, fit.to_size(cell["budget"], rounds=1).artifact)


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
