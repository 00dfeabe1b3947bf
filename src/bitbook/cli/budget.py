"""`compress --budget`, `--bits` and `--max-drop`: a model to a size or an accuracy, without a plan."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bitbook.cli.arguments import check_output, compared, held_out, load_data
from bitbook.cli.codes import MISSED
from bitbook.cli.progress import interruptible, progress
from bitbook.cli.show import bits_text, print_json, print_table, sizes, total_line
from bitbook.errors import PlanError

if TYPE_CHECKING:
    from torch import nn

    from bitbook.budget.report import Report


def compress_to(
    model: nn.Module,
    output: Path,
    *,
    budget: str | None,
    bits: float | None,
    max_drop: float | None,
    time_limit: str | None,
    finetune: int | None,
    data: str | None,
    holdout: int | None,
    seed: int,
    as_json: bool,
    weights: Path | None,
) -> None:
    """Fit, write, read back, evaluate, and say what was chosen for each tensor."""
    from bitbook.apply import load
    from bitbook.artifact import save
    from bitbook.budget.compress import fit_budget
    from bitbook.budget.fit import FitSettings
    from bitbook.rate.finetuning import FineTuning

    check_output(output, weights)
    if data is None:
        raise PlanError("--budget, --bits and --max-drop need --data: examples on which the model is measured")
    dataset = load_data(data, model)
    parts = held_out(dataset, holdout)
    settings = FitSettings(seconds=None if time_limit is None else seconds_of(time_limit))
    nothing = f"{output} was not written; the same command begins anew"
    with interruptible(nothing), progress("steps", shown=not as_json) as update:
        artifact, report = fit_budget(
            model,
            (parts.train_x, parts.train_y),
            budget=None if budget is None else bytes_of(budget),
            bits=bits,
            max_drop=max_drop,
            finetune=None if finetune is None else FineTuning(finetune),
            settings=settings,
            progress=update,
            seed=seed,
        )
    ledger = save(artifact, output)
    loaded = load(output, copy.deepcopy(model))
    measured = {"test": (dataset.test_x, dataset.test_y)}
    if len(parts.val_x):
        measured["validation"] = (parts.val_x, parts.val_y)
    accuracies, losses = {}, {}
    for split, both in compared({"before": model, "after": loaded}, measured, shown=not as_json).items():
        accuracies[split] = {when: found.accuracy for when, found in both.items()}
        losses[split] = {when: found.loss for when, found in both.items()}
    if as_json:
        whole = {"file": str(output), **sizes(ledger), "accuracy": accuracies, "loss": losses}
        print_json({**whole, "report": report.to_json()})
    else:
        _show(report)
        for split, percent in accuracies.items():
            loss = losses[split]
            typer.echo(
                f"{split}: accuracy {percent['before']:.2f} % before, {percent['after']:.2f} % after; "
                f"loss {loss['before']:.4f} before, {loss['after']:.4f} after"
            )
        typer.echo(total_line(output, ledger))
    if not report.reached:
        typer.echo(f"no file of {report.budget:,} bytes could be made; {report.size:,} is the smallest found", err=True)
        raise typer.Exit(MISSED)


def bytes_of(text: str) -> int:
    """A size such as 4000, 4KB or 1.5MB in bytes; raises `PlanError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)[bB]?\s*", text)
    if found is None or not float(found[1]):
        raise PlanError(f"{text!r} is no size; write bytes, KB or MB: 4000, 4KB, 1.5MB")
    return int(float(found[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[found[2].lower()])


def seconds_of(text: str) -> float:
    """A time such as 90s, 10m or 1.5h in seconds; raises `PlanError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if found is None or not float(found[1]):
        raise PlanError(f"{text!r} is no time; write seconds, minutes or hours: 90s, 10m, 1.5h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _show(report: Report) -> None:
    columns = {"tensor": "left", "kind": "left", "stored as": "left", "bytes": "right", "bits per weight": "right"}
    print_table(
        {**columns, "expected loss": "right", "why": "left"},
        (
            [
                choice.name,
                choice.kind,
                repr(choice.recipe),
                f"{choice.size:,}",
                bits_text(choice.bits),
                f"{choice.loss:.2g}",
                choice.why,
            ]
            for choice in report.choices
        ),
    )
    for name, reason in report.dense.items():
        typer.echo(f"{name}: stored as it is, {reason}")
    for repair in report.repairs:
        typer.echo(str(repair))
    typer.echo(
        f"divergence from the float model on the calibration examples: {report.divergence:.4g} nats per prediction, "
        f"{report.predicted:.4g} expected"
    )
