"""`inspect`, `decompress` and `evaluate`: what can be done with a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bitbook.cli.arguments import (
    DATA_HELP,
    AsJson,
    Batch,
    Holdout,
    InputFile,
    Model,
    OutputPath,
    build,
    compared,
    complete_data,
    held_out,
    load_data,
)
from bitbook.cli.show import (
    bits_text,
    print_json,
    print_table,
    shape_text,
    sizes,
    summaries,
    total_line,
)
from bitbook.errors import DataError


def inspect(file: InputFile, as_json: AsJson = False) -> None:
    """Say what each byte of a file is for; nothing is decoded.

    Example:
      bitbook inspect small.safetensors
    """
    from bitbook.artifact import read_ledger

    ledger = read_ledger(file)
    if as_json:
        print_json({"file": str(file), **sizes(ledger), "rows": ledger.to_json()["rows"]})
        return
    columns = {"tensor": "left", "stored as": "left", "shape": "right", "bytes of each part": "left"}
    print_table(
        {**columns, "bytes": "right", "bits per weight": "right"},
        (
            [
                s.tensor,
                s.stored_as,
                shape_text(s.shape),
                ", ".join(f"{part} {size:,}" for part, size in s.parts.items()),
                f"{s.bytes:,}",
                bits_text(s.bits_per_weight),
            ]
            for s in summaries(ledger).values()
        ),
    )
    typer.echo(total_line(file, ledger))


def decompress(
    file: Annotated[Path, typer.Argument(exists=True, help="A file that bitbook wrote, or a folder of shards.")],
    output: OutputPath,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of quantized tensors.", show_default="float32; of shards, each tensor's own"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes.", show_default="one per processor; for small files 1")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a file's tensors as a plain safetensors file that any program reads; of shards, as such shards.

    Dense tensors stay as stored, and each name of a tied tensor gets a copy.

    Examples:
      bitbook decompress small.safetensors -o plain.safetensors
      bitbook decompress small.safetensors --dtype bfloat16 -o plain.safetensors
    """
    from bitbook.cli.checkpoint import decompress_files

    decompress_files(file, output, dtype, workers, as_json=as_json)


def evaluate(
    file: InputFile,
    model: Model,
    data: Annotated[str, typer.Option(help=DATA_HELP, autocompletion=complete_data)],
    split: Annotated[
        Literal["test", "validation", "train"],
        typer.Option(help="Which examples; train is without validation."),
    ] = "test",
    holdout: Holdout = None,
    batch: Batch = 64,
    as_json: AsJson = False,
) -> None:
    """Load a file into its model and measure accuracy and loss.

    Example:
      bitbook evaluate small.safetensors --model mlp-784-128-64-10 --data mnist
    """
    from bitbook.apply import load

    network = load(file, build(model))
    dataset = load_data(data, network)
    parts = held_out(dataset, holdout)
    x, y = {
        "test": (dataset.test_x, dataset.test_y),
        "validation": (parts.val_x, parts.val_y),
        "train": (parts.train_x, parts.train_y),
    }[split]
    if len(x) == 0:
        raise DataError(f"{data} has no {split} examples with --holdout {holdout}")
    found = compared({"": network}, {split: (x, y)}, batch=batch, shown=not as_json)[split][""]
    if as_json:
        size = {"file": str(file), "bytes": file.stat().st_size, "data": data, "split": split}
        print_json({**size, "examples": len(x), "accuracy": found.accuracy, "loss": found.loss})
        return
    typer.echo(f"{file}: {split} accuracy {found.accuracy:.2f} %, loss {found.loss:.4f} ({len(x):,} examples)")
