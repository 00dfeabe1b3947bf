"""`compress` and `decompress` of checkpoints: what the options stand for, progress, and what was done."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from bitbook.cli.show import bits_text, print_json, print_table, shape_text
from bitbook.errors import PlanError

if TYPE_CHECKING:
    from bitbook.checkpoints import Engine
    from bitbook.checkpoints.compress import Compressed, Row


class Hooks(NamedTuple):
    """What is called at the start and after each tensor."""

    start: Callable[[int, int], None] | None = None
    after_tensor: Callable[[str, int], None] | None = None


def compress_files(
    checkpoint: Path,
    output: Path,
    bits: float | None,
    recipe: str | None,
    plan: Path | None,
    layers: Sequence[str] | None,
    workers: int | None,
    scheduler: str | None,
    *,
    seed: int,
    as_json: bool,
) -> None:
    """Compress a checkpoint, and say what became of each tensor."""
    from bitbook.checkpoints import compress_checkpoint
    from bitbook.plan import Plan, parse_recipe

    if sum(option is not None for option in (bits, recipe, plan)) != 1:
        raise PlanError("pass one of --bits, --recipe and --plan")
    chosen: Any = None if recipe is None else parse_recipe(recipe)
    if plan is not None:
        try:
            chosen = Plan.from_json(json.loads(plan.read_text()))
        except ValueError as error:  # a PlanError too
            raise PlanError(f"{plan}: {error}") from error
    with _progress("compressing", shown=not as_json) as hooks:
        done = compress_checkpoint(
            checkpoint,
            output,
            bits=bits,
            plan=chosen,
            layers=layers or (),
            engine=_engine(workers, scheduler),
            seed=seed,
            start=hooks.start,
            after_tensor=hooks.after_tensor,
        )
    if as_json:
        print_json(_to_json(done))
    else:
        _show(done)


def decompress_files(source: Path, output: Path, dtype: str | None, workers: int | None) -> None:
    """Decompress a file or a folder of shards, and say what was written."""
    from bitbook.checkpoints import decompress_checkpoint

    with _progress("decompressing", shown=True) as hooks:
        done = decompress_checkpoint(
            source,
            output,
            dtype=dtype,
            engine=_engine(workers, None),
            start=hooks.start,
            after_tensor=hooks.after_tensor,
        )
    typer.echo(f"{output}: {done.tensors} tensors, {done.bytes:,} bytes (was {done.source_bytes:,})")
    if done.inputs:
        typer.echo(
            f"note: the file also quantizes the inputs of {', '.join(done.inputs)}, plain weights cannot", err=True
        )


def _engine(workers: int | None, scheduler: str | None) -> Engine | None:
    from bitbook.checkpoints import Here, Processes

    if scheduler is not None:
        from bitbook.checkpoints.dask import Dask

        if workers is not None:
            raise PlanError("--workers are of this machine; a --scheduler has its own")
        return Dask(scheduler)
    return None if workers is None else Here() if workers == 1 else Processes(workers)


@contextmanager
def _progress(what: str, *, shown: bool) -> Iterator[Hooks]:
    """Hooks that move a bar on a terminal, with bytes and their rate; nowhere else."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    if not shown or not sys.stderr.isatty():
        yield Hooks()
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)

        def start(tensors: int, size: int) -> None:
            bar.reset(task, total=size, description=f"{what} {tensors} tensors")

        yield Hooks(start, lambda name, size: bar.advance(task, size))


def _to_json(done: Compressed) -> dict[str, Any]:
    return {
        "file": str(done.output),
        "bytes": done.bytes,
        "weights": done.weights,
        "bits_per_weight": 8 * done.bytes / done.weights if done.weights else None,
        "bits_per_quantized_weight": None if math.isnan(done.bits) else done.bits,
        "source_bytes": done.source_bytes,
        "reused": done.reused,
        "not_copied": list(done.beside),
        "tensors": [row._asdict() | {"shape": list(row.shape), "snr_db": _snr(row)} for row in done.rows],
    }


def _show(done: Compressed) -> None:
    columns = {"tensor": "left", "stored as": "left", "shape": "right", "bytes": "right", "bits per weight": "right"}
    print_table(
        {**columns, "SNR dB": "right"},
        (
            [
                row.tensor,
                f"{row.stored_as}, dense: {row.dense}" if row.dense else row.stored_as,
                shape_text(row.shape),
                f"{row.bytes:,}",
                bits_text(8 * row.bytes / row.weights if row.weights else None),
                "" if (snr := _snr(row)) is None else f"{snr:.1f}",
            ]
            for row in done.rows
        ),
    )
    if done.reused:
        typer.echo(f"{done.reused} tensors were finished before")
    if done.beside:
        typer.echo(f"not copied: {', '.join(done.beside)}")
    typer.echo(
        f"{done.output}: {done.bytes:,} bytes, {done.bits:.4g} bits per quantized weight, "
        f"{done.source_bytes / done.bytes:.3g} times smaller than the source of {done.source_bytes:,} bytes"
    )


def _snr(row: Row) -> float | None:
    return -10 * math.log10(row.relative_error) if row.relative_error else None
