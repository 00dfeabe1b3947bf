"""`compress`: a model's weights to a small file, and what that costs."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bitbook.cli.arguments import (
    DATA_HELP,
    MODEL_HELP,
    AsJson,
    Holdout,
    OutputPath,
    build,
    check_output,
    compared,
    complete_data,
    complete_model,
    complete_recipe,
    held_out,
    load_data,
    refuse,
)
from bitbook.cli.budget import bytes_of
from bitbook.cli.progress import interruptible, progress
from bitbook.cli.show import (
    Summary,
    bits_text,
    dry_run_kind,
    dry_run_text,
    print_json,
    print_table,
    shape_text,
    sizes,
    summaries,
    total_line,
)
from bitbook.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitbook.artifact import Artifact
    from bitbook.feedback.error_feedback import FeedbackReport
    from bitbook.plan import Plan
    from bitbook.rate.training import Epoch

Accuracies = Mapping[str, Mapping[str, float]]
"""Split → "before" and "after" → percent."""


def compress(
    output: OutputPath,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            exists=True,
            help="Instead of --model: a .safetensors file, or a folder of shards with its index, compressed tensor by "
            "tensor with --bits, --recipe or --plan.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, autocompletion=complete_model)] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits per weight, such as 2.5: of a checkpoint those of each tensor, of a model those of the whole "
            "file, as with --budget."
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Instead of a budget: percentage points of accuracy that may be lost on examples of --data that are "
            "not calibrated on; gives the smallest file found."
        ),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            "--time", help="With --budget, --bits or --max-drop: after how long nothing more is tried: 90s, 10m."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Of a checkpoint: processes.", show_default="one per processor; for small ones 1"),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Of a checkpoint: the address of a Dask scheduler, tcp://host:8786.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Trained weights: .safetensors, or .pt as torch.save(model.state_dict(), …) writes it. "
            "Needed unless the model is a public trained one, or your callable returns one.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A plan as JSON, as Plan.to_json gives it."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Instead of a plan: one recipe as in Python, such as 'Uniform(4)'.", autocompletion=complete_recipe
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="With --recipe: the tensors it takes, a pattern such as 'fc*.weight'; may be repeated.",
            show_default="all with two or more dimensions",
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(help="With --recipe: a recipe for the inputs of the same layers, such as 'Uniform(8)'."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help=f"To measure accuracy, and to train on: {DATA_HELP}", autocompletion=complete_data),
    ] = None,
    calibrate: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Examples, say 1000, of --data whose inputs decide how weights are rounded: each column makes up for "
            "the errors of those before it (error feedback). Instead of training.",
        ),
    ] = None,
    finetune: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --budget or --bits: epochs of fine-tuning afterwards, taught by the float model's answers.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Bytes that the file may have, such as 4000, 4KB or 1.5MB (1 KB = 1,000 bytes). How each tensor is "
            "stored follows from what its errors do to the answers to some of --data. With --epochs, the model is "
            "trained a few times instead, each at another price of a bit."
        ),
    ] = None,
    lam: Annotated[
        float | None,
        typer.Option(
            help="Instead of a budget: the price of a bit, in loss, say 1e-5, to train at; with --calibrate in squared "
            "error of a weight, say a tenth of the square of a step."
        ),
    ] = None,
    distill: Annotated[
        bool,
        typer.Option("--distill", help="Trained to a budget or at a price: the float model's answers join the labels."),
    ] = False,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Epochs of quantization-aware training; needs --data.",
            show_default="0; at a price 30",
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", show_default="0.001; to a budget or at a price 0.004")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Examples per batch.", show_default="64; to a budget or at a price 256")
    ] = None,
    momentum: Annotated[float, typer.Option(min=0, help="Momentum.")] = 0.0,
    schedule: Annotated[
        Literal["constant", "cosine"], typer.Option(help="How the learning rate goes on.")
    ] = "constant",
    holdout: Holdout = None,
    seed: Annotated[int, typer.Option(help="Of k-means and of the order of training examples.")] = 0,
    coder: Annotated[
        Literal["smallest", "rans", "context", "fixed"] | None,
        typer.Option(
            help="What writes the codes: 'fixed' width is what shapes alone say.",
            show_default="smallest; of large checkpoints rans",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Write nothing, need neither weights nor data, and say what a --recipe or --plan will take: exactly "
            "with --coder fixed, otherwise at most.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    r"""Compress a trained model into a file, and say what it costs in bytes, weight error and accuracy.

    Accuracy is that of the file, read back. Which examples are held out for validation is always the same.

    Examples:
      bitbook compress --model lenet-5 --weights lenet.pt \
        --recipe 'Uniform(4)' --data mnist -o small.safetensors
      bitbook compress --model my.models:net --weights net.safetensors \
        --recipe 'Codebook(256, (1, 4), centroids=Uniform(5))' \
        --data my.data:photos --epochs 5 --lr 0.001 -o small.safetensors
      bitbook compress --model lenet-5 --weights lenet.pt \
        --recipe 'Trellis()' --lam 1e-4 --data mnist --calibrate 1000 -o small.safetensors
      bitbook compress --model resnet-20-cifar10 --budget 66KB --data cifar10 -o small.safetensors
      bitbook compress --model mlp-784-128-64-10 --weights net.safetensors \
        --budget 4KB --epochs 30 --data mnist -o small.safetensors
      bitbook compress model.safetensors --bits 3 -o small.safetensors
      bitbook compress model.safetensors --recipe 'Uniform(4, (1, 64))' --dry-run -o small.safetensors
    """
    if checkpoint is not None:
        from bitbook.cli.checkpoint import compress_files

        why = "a checkpoint is compressed without its model; leave that out, or pass --model"
        refuse(why, model=model, weights=weights, inputs=inputs, data=data, calibrate=calibrate, budget=budget, lam=lam)
        refuse(why, epochs=epochs, lr=lr, batch=batch, holdout=holdout, distill=distill or None)
        refuse(why, max_drop=max_drop, time=time_limit, finetune=finetune)
        return compress_files(
            checkpoint, output, bits, recipe, plan, layers, workers, scheduler, coder, seed=seed, dry_run=dry_run,
            as_json=as_json,
        )  # fmt: skip
    if model is None or workers is not None or scheduler is not None:
        raise PlanError("pass --model, or a checkpoint, which alone takes --workers and --scheduler")
    if dry_run:
        why = "a dry run needs a --recipe or a --plan alone; a budget is the size of its own file"
        refuse(why, budget=budget, bits=bits, max_drop=max_drop, lam=lam)
        network = build(model)
        return _show_dry_run(network, _plan(network, plan, recipe, layers, inputs), output, coder, as_json=as_json)
    if bits is not None or max_drop is not None or (budget is not None and not epochs):
        from bitbook.cli.budget import compress_to

        why = "without --epochs, what becomes of each tensor follows from the budget; leave that out"
        refuse(why, coder=coder, lam=lam, calibrate=calibrate, recipe=recipe, plan=plan, layers=layers, inputs=inputs)
        refuse(why, epochs=epochs or None, lr=lr, batch=batch, momentum=momentum or None, distill=distill or None)
        return compress_to(
            _trained(model, weights), output, budget=budget, bits=bits, max_drop=max_drop, time_limit=time_limit,
            finetune=finetune, data=data, holdout=holdout, seed=seed, as_json=as_json, weights=weights,
        )  # fmt: skip
    if time_limit is not None or finetune is not None:
        raise PlanError("--time and --finetune go with --budget or --bits, without --epochs")
    from bitbook.apply import compress_by_plan as compress_model
    from bitbook.apply import load
    from bitbook.artifact import save
    from bitbook.artifact.contents import CODERS
    from bitbook.loop import Training
    from bitbook.rate.training import RateTraining, train

    check_output(output, weights, plan)
    if epochs and data is None:
        raise PlanError("--epochs needs --data: the examples to train on")
    priced = budget is not None or (lam is not None and calibrate is None)
    if priced and (data is None or momentum or schedule != "constant"):
        raise PlanError(
            "--budget and --lam need --data to train on, and have no --momentum or --schedule: they use Adam"
        )
    if distill and not priced:
        raise PlanError("--distill goes with --budget or --lam")
    if calibrate is not None and (data is None or epochs or priced):
        raise PlanError("--calibrate needs --data, and is instead of training: no --epochs or --budget")
    training = Training(epochs, lr or 1e-3, batch or 64, momentum, schedule) if epochs and not priced else None
    network = _trained(model, weights)
    chosen = (
        _priced_plan(network)
        if priced and plan is None and recipe is None
        else _plan(network, plan, recipe, layers, inputs)
    )
    dataset = None if data is None else load_data(data, network)
    parts = None if dataset is None else held_out(dataset, holdout)
    examples = None if parts is None else (parts.train_x, parts.train_y)
    nothing = f"{output} was not written; the same command begins anew"
    unit = "tensors" if calibrate is not None else "epochs"
    with interruptible(nothing), progress(unit, shown=not as_json) as update:
        if priced and examples is not None:
            given = {"epochs": epochs, "lr": lr, "batch": batch}

            def after_priced(epoch: Epoch) -> None:
                _show_epoch(epoch)
                update("training", epoch.number + 1, None)

            artifact = train(
                network,
                examples,
                chosen,
                lam=lam,
                budget=None if budget is None else bytes_of(budget),
                training=RateTraining(**{name: value for name, value in given.items() if value is not None}),
                teacher=network if distill else None,
                seed=seed,
                after_epoch=None if as_json else after_priced,
            ).artifact
        else:
            encoded = 0

            def after_tensor(name: str, report: FeedbackReport | str) -> None:
                nonlocal encoded
                encoded += 1
                typer.echo(f"{name}: {report}")
                update("encoding", encoded, None)

            artifact = compress_model(
                network,
                chosen,
                data=examples,
                training=training,
                calibration=None if calibrate is None or examples is None else examples[0][:calibrate],
                lam=0.0 if calibrate is None or lam is None else lam,
                after_tensor=None if as_json else after_tensor,
                after_epoch=lambda epoch, _: update("training", epoch + 1, epochs),
                seed=seed,
            )
        update("writing", 0, None)
        ledger = save(artifact, output, CODERS[(coder or "smallest").capitalize()])
    accuracies: Accuracies = {}
    if dataset is not None and parts is not None:
        measured = {"test": (dataset.test_x, dataset.test_y)}
        if (training is not None or priced) and len(parts.val_x):
            measured["validation"] = (parts.val_x, parts.val_y)
        both = {"before": network, "after": load(output, copy.deepcopy(network))}
        found = compared(both, measured, shown=not as_json)
        accuracies = {split: {when: one.accuracy for when, one in of.items()} for split, of in found.items()}
    rows = _rows(network, chosen, artifact, summaries(ledger))
    if as_json:
        whole = {"file": str(output), "plan": chosen.to_json(), **sizes(ledger)}
        print_json({**whole, "accuracy": accuracies, "aliases": dict(artifact.aliases), "tensors": rows})
        return
    _show(rows)
    for alias, name in artifact.aliases.items():
        typer.echo(f"{alias} is tied to {name} and stored once")
    for name, quantized in artifact.inputs.items():
        activation = quantized.activation
        typer.echo(f"the input of {name} is quantized by {activation.recipe!r}, range: {activation.range}")
    for split, percent in accuracies.items():
        typer.echo(f"{split} accuracy: {percent['before']:.2f} % before, {percent['after']:.2f} % after")
    typer.echo(total_line(output, ledger))


def _trained(model: str, weights: Path | None) -> nn.Module:
    from bitbook.checkpoints.weights import load_weights
    from bitbook.models import PRETRAINED_MODELS

    network = build(model)
    if weights is not None:
        return load_weights(weights, network)
    if ":" not in model and model not in PRETRAINED_MODELS:
        raise PlanError(f"the weights of a fresh {model} are random; pass trained ones with --weights")
    return network


def _plan(
    model: nn.Module, plan: Path | None, recipe: str | None, layers: Sequence[str] | None, inputs: str | None
) -> Plan:
    """The plan that the options spell out."""
    from bitbook.plan import Activation, Plan, parse_recipe

    if (plan is None) == (recipe is None):
        raise PlanError("pass either --plan or --recipe")
    if plan is not None:
        if layers or inputs:
            raise PlanError("--layers and --inputs go with --recipe; a plan says both itself")
        try:
            return Plan.from_json(json.loads(plan.read_text()))
        except ValueError as error:  # a PlanError too
            raise PlanError(f"{plan}: {error}") from error
    assert recipe is not None
    parsed = parse_recipe(recipe)
    if layers:
        names = [
            name
            for name, _ in model.named_parameters(remove_duplicate=False)
            if any(fnmatchcase(name, pattern) for pattern in layers)
        ]
        patterns = layers
    else:
        names = [name for name, w in model.named_parameters(remove_duplicate=False) if w.dim() >= 2]
        patterns = [escape(name) for name in names]
    if not patterns:
        raise PlanError("no tensor of the model has two or more dimensions; name those to quantize with --layers")
    modules = dict.fromkeys(escape(name.rpartition(".")[0]) for name in names) if inputs else {}
    activation = Activation(parse_recipe(inputs)) if inputs else None
    return Plan(dict.fromkeys(patterns, parsed), dict.fromkeys(modules, activation))


def _priced_plan(model: nn.Module) -> Plan:
    """Everything entropy-coded: four reconstruction points where there are many weights, a step where few."""
    from bitbook.plan import Plan
    from bitbook.scalar.ecsq import ECSQ

    parameters = model.named_parameters(remove_duplicate=False)
    return Plan({escape(name): ECSQ(4, dead_zone=0.8) if w.dim() >= 2 else ECSQ() for name, w in parameters})


def _show_epoch(epoch: Epoch) -> None:
    size = f"about {epoch.bits / 8:,.0f} bytes of codes"
    typer.echo(f"epoch {epoch.number + 1}: loss {epoch.loss:.4f}, {size} at λ {epoch.lam:.2g}")


def _show_dry_run(model: nn.Module, plan: Plan, output: Path, coder: str | None, *, as_json: bool) -> None:
    """What a plan will take, without weights and data."""
    from bitbook.artifact.contents import CODERS
    from bitbook.sizes import fixed_width, most_bytes

    ledger = fixed_width(model, plan)
    kind = dry_run_kind(None, coder)
    total = most_bytes(ledger, CODERS[(coder or "smallest").capitalize()])
    rows = [summary.to_json() for summary in summaries(ledger).values()]
    if as_json:
        whole = {"file": str(output), "dry_run": True, "sizes": kind, "plan": plan.to_json(), **sizes(ledger)}
        print_json({**whole, "bytes": total, "fixed_width": ledger.total, "tensors": rows})
        return
    columns = {"tensor": "left", "stored as": "left", "shape": "right", "bytes at fixed width": "right"}
    print_table(
        {**columns, "bits per weight": "right"},
        (
            [row["tensor"], row["stored_as"], shape_text(row["shape"]), f"{row['bytes']:,}",
             bits_text(row["bits_per_weight"])]
            for row in rows
        ),
    )  # fmt: skip
    typer.echo(f"{output}: {dry_run_text(total, kind)}; {4 * ledger.weights:,} in float32")


def _rows(model: nn.Module, plan: Plan, artifact: Artifact, stored: Mapping[str, Summary]) -> list[dict[str, Any]]:
    """What the file has of each tensor: bytes, and either the error of its weights or why it is dense."""
    from bitbook.quantizer import Quantized

    originals = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    rows = []
    for name, summary in stored.items():
        row = summary.to_json()
        tensor = artifact.tensors.get(name)
        if isinstance(tensor, Quantized):
            row["stored_as"] = repr(tensor.recipe)
            row |= weight_error(originals[name], tensor.decode())
        elif tensor is not None:
            reason = "by plan" if plan.names(name) else "no pattern names it"
            row["dense"] = reason if name in parameters else "a buffer"
        rows.append(row)
    return rows


def weight_error(w: Tensor, stored: Tensor) -> dict[str, float | None]:
    """`relative_mse` = ‖w − ŵ‖² / ‖w‖², and the same as a signal-to-noise ratio in dB.

    None stands for what is no number: the ratio where both are equal, the error where w is zero and ŵ is not, and
    both where values are not finite.
    """
    w = w.double()
    error, power = (w - stored.double()).square().sum().item(), w.square().sum().item()
    relative = error / power if power and math.isfinite(error / power) else None
    if not error:
        return {"relative_mse": 0.0, "snr_db": None}
    return {"relative_mse": relative, "snr_db": -10 * math.log10(relative) if relative else None}


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = {
        "tensor": "left",
        "stored as": "left",
        "shape": "right",
        "bytes": "right",
        "bits per weight": "right",
    }
    print_table(
        {**columns, "relative squared error": "right", "SNR dB": "right"},
        (
            [
                row["tensor"],
                f"{row['stored_as']}, dense: {row['dense']}" if "dense" in row else row["stored_as"],
                shape_text(row["shape"]),
                f"{row['bytes']:,}",
                bits_text(row["bits_per_weight"]),
                _number_text(row, "relative_mse", ".3g"),
                _number_text(row, "snr_db", ".1f"),
            ]
            for row in rows
        ),
    )


def _number_text(row: Mapping[str, Any], key: str, style: str) -> str:
    if key not in row:
        return ""
    return "∞" if row[key] is None else format(row[key], style)
