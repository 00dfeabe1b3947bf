"""One trial: from a cell that says everything to a result that says what came out.

    cell ──► start (float training, cached) ──► quantize_ ──► tune ──► freeze ──► file ──► evaluate the file

A `Cell` is JSON: dataset, holdout, model, start, phases (a plan and how to tune under it), fit options,
regime, seed.  A phase may have a "price" instead: `lam` and the fields of `RateTraining`; it is the last, and its
file is entropy-coded, since prices mean nothing to fixed widths.  The accuracy reported is that of the file, read
back into a fresh model.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, nn

from bitbook.apply import dequantize_, freeze, quantize_, restore
from bitbook.artifact import Artifact, Layout, read, save, to_bytes
from bitbook.coding.choose import Smallest
from bitbook.coding.coder import Coder
from bitbook.coding.fixed import Fixed
from bitbook.data import Split, load_dataset, split
from bitbook.data.dataset import Dataset
from bitbook.inputs import CALIBRATION_EXAMPLES, calibrate
from bitbook.loop import Training, evaluate, run_epochs
from bitbook.models import build_model
from bitbook.plan import Plan
from bitbook.qat import Regime
from bitbook.quantizer import FitOptions, Quantized
from bitbook.rate.training import RateTraining, train
from bitbook.study.sketch import sketch
from bitbook.study.storage import cell_id

Cell = Mapping[str, Any]
DRAWN_SEED = 0
"""The training seed whose files are also entropy-coded and sketched for the report, which shows one of each recipe."""
STARTS_FOLDER = "BITBOOK_STARTS"
"""Environment variable naming the folder in which trained float models are kept between trials."""


def run_trial(cell: Cell) -> dict[str, Any]:
    """Run one cell; returns its rows, ledger, times and the correct test answers (packed, for paired tests)."""
    clock = time.perf_counter
    began = clock()
    dataset, data = load_parts(cell["dataset"], cell["holdout"])
    model, start_losses = trained_start(cell, data)
    drawn = cell["seed"] == DRAWN_SEED
    before = {name: w.detach().clone() for name, w in model.named_parameters() if drawn}
    started = clock()

    generator = Generator().manual_seed(cell["seed"])
    losses: list[float] = []
    for phase in cell["phases"]:
        plan = Plan.from_json(phase["plan"])
        quantize_(
            dequantize_(model),
            plan,
            options=FitOptions(**cell.get("fit", {})),
            regime=Regime(**cell.get("regime", {})),
            generator=generator,
        )
        if any(a is not None and a.range == "calibrated" for a in plan.inputs.values()):
            calibrate(model, [data.train_x[:CALIBRATION_EXAMPLES]])
        if "tune" in phase:
            losses += run_epochs(model, data.train_x, data.train_y, Training(**phase["tune"]), generator=generator)
        if "price" in phase:
            how = dict(phase["price"])
            lam, examples = how.pop("lam"), (data.train_x, data.train_y)
            trained = train(model, examples, None, lam=lam, training=RateTraining(**how), seed=cell["seed"])
            model, losses = trained.model, losses + [epoch.loss for epoch in trained.epochs]
    fitted = clock()
    if losses and not math.isfinite(losses[-1]):
        untrained = run_trial({**cell, "phases": [{"plan": phase["plan"]} for phase in cell["phases"]]})
        return diverged(untrained, data, dataset, losses)

    artifact = freeze(model)
    priced = "price" in cell["phases"][-1]
    how = (Smallest(), None) if priced else (Fixed(), "per-tensor")
    found = measure_file(artifact, cell["model"], dataset, data, *how)
    evaluated = clock()
    if cell.get("coded") or (drawn and not priced):
        found["coded_bytes"] = len(to_bytes(artifact)[0])  # of the same content, entropy-coded
    if drawn:
        found["sketch"] = sketch(before, artifact, dataset.input_shape)
    return {
        **found,
        "start_losses": start_losses,
        "losses": losses,
        "seconds": {"start": started - began, "fit": fitted - started, "evaluate": evaluated - fitted},
    }


def measure_file(
    artifact: Artifact,
    model: str,
    dataset: Dataset,
    data: Split,
    coder: Coder = Smallest(),
    layout: Layout | None = None,
    *,
    batch: int = 64,
) -> dict[str, Any]:
    """Write an artifact, read it into a fresh model, and report the file's bytes and that model's accuracies.

    coder, layout: as for `save`; batch: examples that are evaluated at once.  Which answers were correct is not told of
    sequences: those are bits for some hundred thousand places, which nothing compares one by one.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        ledger = save(artifact, path, coder, layout)
        size = path.stat().st_size
        fresh = restore(read(path), build_model(model, seed=0))
    rows = []
    parts = {"test": (dataset.test_x, dataset.test_y), "validation": (data.val_x, data.val_y)}
    answers = ""
    for name, (x, y) in parts.items():
        if len(x):
            outcome = evaluate(fresh, x, y, batch=batch)
            rows.append({"split": name, "accuracy": outcome.accuracy, "loss": outcome.loss})
            if name == "test" and y.dim() == 1:
                answers = _pack(outcome.correct)
    weights = sum(q.decode().numel() for q in artifact.tensors.values() if isinstance(q, Quantized))
    return {
        "objectives": [size, rows[-1]["accuracy"]],  # validation's, where there is one
        "bytes": size,
        "rows": rows,
        "ledger": ledger.to_json(),
        "quantized_weights": weights,
        "correct": answers,
        "images": len(dataset.test_y),
        "versions": {"torch": torch.__version__},
    }


def diverged(untrained: dict[str, Any], data: Split, dataset: Dataset, losses: list[float]) -> dict[str, Any]:
    """What is reported of a training that ended in NaN: the untrained file's size, and one answer for every input.

    A file holds finite weights only, so there is none to evaluate.
    """
    labels = {"test": dataset.test_y, "validation": data.val_y}
    for row in untrained["rows"]:
        row |= {"accuracy": 100 * (labels[row["split"]] == 0).double().mean().item(), "loss": math.nan}
    return {
        **untrained,
        "objectives": [untrained["bytes"], untrained["rows"][-1]["accuracy"]],
        "losses": losses,
        "correct": _pack(dataset.test_y == 0),
        "diverged": True,
    }


def trained_start(cell: Cell, data: Split) -> tuple[nn.Module, list[float]]:
    """The float model that a cell starts from, trained once per (dataset, model, start, seed) and kept.

    Two workers that need the same one at the same time both train it, and both get the same bits.
    """
    keys = ("dataset", "holdout", "model", "start", "seed")
    model = build_model(cell["model"], seed=cell["seed"])
    folder = os.environ.get(STARTS_FOLDER)
    path = Path(folder) / f"{cell_id({k: cell[k] for k in keys})}.safetensors" if folder else None
    if path is not None and path.exists():
        stored = load_file(path)
        losses = stored.pop("losses").tolist()
        model.load_state_dict(stored)
        return model, losses
    generator = Generator().manual_seed(cell["seed"])
    losses = run_epochs(model, data.train_x, data.train_y, Training(**cell["start"]), generator=generator)
    if path is not None:
        keep({**model.state_dict(), "losses": torch.tensor(losses, dtype=torch.float64)}, path)
    return model, losses


def keep(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors for later trials; other workers see the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
    save_file(tensors, temporary)
    temporary.replace(path)


@cache
def load_parts(name: str, holdout: int) -> tuple[Dataset, Split]:
    """A data set with its training and validation parts, loaded once per process."""
    dataset = load_dataset(name)
    return dataset, split(dataset, holdout)


def _pack(correct: torch.Tensor) -> str:
    """Booleans as hexadecimal bits, least significant first: a quarter of a character each."""
    return np.packbits(correct.numpy(), bitorder="little").tobytes().hex()


def unpack_correct(text: str, count: int) -> Any:
    """Undo the packing of `correct`: a numpy boolean array of `count` answers."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count, bitorder="little").astype(bool)
