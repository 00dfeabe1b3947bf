"""One trial of training with a price on bits: a cell in, rows of a file's bytes and accuracy out.

    fresh model ──quantize_──► train(λ, teacher) ──fold inputs──► sort hidden units ──► file ──► evaluate the file

A cell is JSON: dataset, holdout, model, plan, step and bias_step (where reconstruction points begin), training (the
fields of `RateTraining`), lam, inputs (scale and shift of the inputs in training), teacher or None, seed; and, where
most units of the model would end up empty, narrow: a smaller model that is trained in its place, and then widened.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from bitbook.apply import freeze, quantize_
from bitbook.models import build_model
from bitbook.plan import Plan
from bitbook.quantizer import FitOptions
from bitbook.rate.training import RateTraining, train
from bitbook.study.priced.teacher import Lessons, lessons
from bitbook.study.trial import load_parts, measure_file
from bitbook.surgery.fold import fold_inputs
from bitbook.surgery.reorder import sort_units
from bitbook.surgery.widen import widen


def run_trial(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Run one cell; the result is that of `trial.run_trial`."""
    clock = time.perf_counter
    began = clock()
    dataset, data = load_parts(cell["dataset"], cell["holdout"])
    taught = Lessons(data.train_x, data.train_y, None)
    if cell["teacher"] is not None:
        taught = lessons(cell["teacher"], cell["dataset"], cell["holdout"], data)
    started = clock()
    model = _quantized(cell.get("narrow", cell["model"]), cell)
    scale, shift = cell["inputs"]
    taught = taught._replace(x=scale * taught.x + shift)  # the images as they were are let go: they may be gigabytes
    trained = train(
        model,
        (taught.x, taught.y),
        None,
        lam=cell["lam"],
        training=RateTraining(**cell["training"]),
        teacher=taught.logits,
        seed=cell["seed"],
    )
    if (scale, shift) != (1.0, 0.0):
        fold_inputs(_first_layer(trained.model), scale, shift, options=FitOptions(step=cell["bias_step"], iterations=0))
    sort_units([module for module in trained.model.modules() if isinstance(module, nn.Linear | nn.Conv2d)])
    whole = trained.model
    if "narrow" in cell:
        whole = _quantized(cell["model"], cell)
        widen(trained.model, whole)
    artifact = freeze(whole)
    fitted = clock()
    return {
        **measure_file(artifact, cell["model"], dataset, data, batch=500),
        "start_losses": [],
        "losses": [epoch.loss for epoch in trained.epochs],
        "seconds": {"start": started - began, "fit": fitted - started, "evaluate": clock() - fitted},
    }


def _quantized(model_name: str, cell: Mapping[str, Any]) -> nn.Module:
    """A fresh model under the cell's plans."""
    model = build_model(model_name, seed=cell["seed"])
    for name, step in (("weights", cell["step"]), ("biases", cell["bias_step"])):
        plan = Plan.from_json({"weights": cell["plan"][name]})
        quantize_(model, plan, options=FitOptions(step=step, iterations=0))
    return model


def _first_layer(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
