"""One cell of the family study; every file is written by the smallest coder, and its length is what is compared.

start ──► weights through the plan ──► batch-norm statistics shifted ──► (trained) ──► file ──► evaluate
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from bitbook.apply import compress_by_plan, freeze, quantize_, quantize_dense, restore, with_dense
from bitbook.artifact import Artifact
from bitbook.data import Split
from bitbook.errors import PlanError, WeightError
from bitbook.loop import Training, run_epochs
from bitbook.models import PRETRAINED_MODELS, build_model, pretrained_resnet
from bitbook.plan import Plan
from bitbook.qat import Regime
from bitbook.quantizer import FitOptions
from bitbook.study.trial import diverged, load_parts, measure_file, trained_start
from bitbook.surgery.batchnorm import absorb_statistics, fixed_statistics, normalisations, shift_statistics


def run_trial(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Run one cell; the result is that of `trial.run_trial`."""
    clock = time.perf_counter
    began = clock()
    dataset, data = load_parts(cell["dataset"], cell["holdout"])
    model, start_losses = float_start(cell, data)
    started = clock()
    generator = Generator().manual_seed(cell["seed"])
    chosen = torch.randperm(len(data.train_x), generator=generator)[: cell["calibration"]]
    calibration = data.train_x[chosen]
    artifact, losses = compressed(cell, model, data, calibration, generator)
    if artifact is None:
        untrained = run_trial({**cell, "phases": [{"plan": phase["plan"]} for phase in cell["phases"]]})
        return diverged(untrained, data, dataset, losses)
    artifact = finished(cell, artifact, model, calibration)
    fitted = clock()
    return {
        **measure_file(artifact, cell["model"], dataset, data),
        "start_losses": start_losses,
        "losses": losses,
        "seconds": {"start": started - began, "fit": fitted - started, "evaluate": clock() - fitted},
    }


def float_start(cell: Mapping[str, Any], data: Split) -> tuple[nn.Module, list[float]]:
    """The float network that a cell starts from: a public one, by its name or a file, or one trained once and kept."""
    if cell["model"] in PRETRAINED_MODELS:
        return build_model(cell["model"], seed=0), []
    if "file" not in cell["start"]:
        return trained_start(cell, data)
    if cell["start"]["file"] != "resnet20_cifar10.safetensors" or cell["model"] != "resnet-20":
        raise PlanError(f"start={cell['start']!r} of {cell['model']}: use resnet20_cifar10.safetensors of resnet-20")
    return pretrained_resnet(20), []


def compressed(
    cell: Mapping[str, Any], model: nn.Module, data: Split, calibration: Tensor, generator: Generator
) -> tuple[Artifact | None, list[float]]:
    """The weights through the plan, and the loss of each epoch that they were trained; `model` stays as it is.

    Statistics are shifted before a training, which then keeps them.  No artifact: the training diverged.
    """
    (phase,) = cell["phases"]
    options, regime = FitOptions(**cell.get("fit", {})), Regime(**cell.get("regime", {}))
    if "feedback" in cell:
        lam = cell["feedback"]["lam"]
        plan, seed = Plan.from_json(phase["plan"]), cell["seed"]
        return compress_by_plan(model, plan, options=options, calibration=calibration, lam=lam, seed=seed), []
    trained = copy.deepcopy(model)
    quantize_(trained, Plan.from_json(phase["plan"]), options=options, regime=regime, generator=generator)
    if "tune" not in phase:
        return freeze(trained), []
    if cell["repair"]:
        shift_statistics(trained, model, calibration)
    how = dict(phase["tune"])
    order = torch.randperm(len(data.train_x), generator=generator)[: how.pop("examples", None)]
    x, y = data.train_x[order], data.train_y[order]
    losses = [math.nan]
    try:
        with fixed_statistics(trained):
            losses = run_epochs(trained, x, y, Training(**how), generator=generator)
        artifact = freeze(trained)
    except WeightError:  # weights that are not finite have no codes
        return None, losses
    return (artifact if all(map(math.isfinite, losses)) else None), losses


def finished(cell: Mapping[str, Any], artifact: Artifact, model: nn.Module, calibration: Tensor) -> Artifact:
    """The artifact as it is written: statistics shifted where that was not done before a training, absorbed into
    weight and bias where the cell has a plan for what is no weight, and that stored by this plan.
    """
    plain = restore(artifact, build_model(cell["model"], seed=0)).eval()
    if cell["repair"] and "tune" not in cell["phases"][-1]:
        shift_statistics(plain, model, calibration)
    if cell["dense"] and normalisations(plain):
        absorb_statistics(plain)
    return quantize_dense(with_dense(artifact, plain), Plan.from_json(cell["dense"]))
