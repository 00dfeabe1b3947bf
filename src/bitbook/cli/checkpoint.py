"""`compress` and `decompress` of checkpoints: what the options stand for, progress, and what was done."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from bitbook.cli.progress import interruptible, progress
from bitbook.cli.show import bits_text, dry_run_kind, dry_run_text, print_json, print_table, shape_text
from bitbook.errors import PlanError

if TYPE_CHECKING:
    from bitbook.checkpoints import Engine
    from bitbook.checkpoints.compress import Compressed, Row


class Hooks(NamedTuple):
    """What is called at the start and after each tensor."""

    start: Callable[[int, int], None]
    after_tensor: Callable[[str, int], None]


def compress_files(
    checkpoint: Path,
    output: Path,
    bits: float | None,
    recipe: str | None,
    plan: Path | None,
    layers: Sequence[str] | None,
    workers: int | None,
    scheduler: str | None,
    coder: str | None,
    *,
    seed: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compress a checkpoint, and say what became of each tensor."""
    from bitbook.checkpoints import compress_checkpoint, plan_checkpoint
    from bitbook.plan import Plan, parse_recipe

    if sum(option is not None for option in (bits, recipe, plan)) != 1:
        raise PlanError("pass one of --bits, --recipe and --plan")
    chosen: Any = None if recipe is None else parse_recipe(recipe)
    if plan is not None:
        try:
            chosen = Plan.from_json(json.loads(plan.read_text()))
        except ValueError as error:  # a PlanError too
            raise PlanError(f"{plan}: {error}") from error
    if dry_run:
        planned = plan_checkpoint(checkpoint, output, bits=bits, plan=chosen, layers=layers or ())
        _show_planned(planned, bits, coder, as_json=as_json)
        return
    kept = f"finished tensors are kept in {output}.parts; the same command goes on from there"
    with interruptible(kept), _progress("compressing", shown=not as_json) as hooks:
        done = compress_checkpoint(
            checkpoint,
            output,
            bits=bits,
            plan=chosen,
            layers=layers or (),
            coder=coder and coder.capitalize(),
            engine=_engine(workers, scheduler),
            seed=seed,
            start=hooks.start,
            after_tensor=hooks.after_tensor,
        )
    if as_json:
        print_json(_to_json(done))
    else:
        _show(done)


def decompress_files(source: Path, output: Path, dtype: str | None, workers: int | None, *, as_json: bool) -> None:
    """Decompress a file or a folder of shards, and say what was written."""
    from bitbook.checkpoints import decompress_checkpoint

    nothing = f"{output} was not written; the same command begins anew"
    with interruptible(nothing), _progress("decompressing", shown=not as_json) as hooks:
        done = decompress_checkpoint(
            source,
            output,
            dtype=dtype,
            engine=_engine(workers, None),
            start=hooks.start,
            after_tensor=hooks.after_tensor,
        )
    if as_json:
        found = {"file": str(output), "tensors": done.tensors, "bytes": done.bytes, "source_bytes": done.source_bytes}
        print_json({**found, "quantized_inputs": list(done.inputs)})
    else:
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
    """Hooks that move a bar, with bytes and their rate."""
    with progress("bytes", shown=shown) as update:
        done = total = 0
        name = what

        def start(tensors: int, size: int) -> None:
            nonlocal total, name
            total, name = size, f"{what} {tensors} tensors"
            update(name, 0, total)

        def after_tensor(_: str, size: int) -> None:
            nonlocal done
            done += size
            update(name, done, total)

        yield Hooks(start, after_tensor)


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


def _show_rows(done: Compressed) -> None:
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


def _show(done: Compressed) -> None:
    _show_rows(done)
    if done.reused:
        typer.echo(f"{done.reused} tensors were finished before")
    if done.beside:
        typer.echo(f"not copied: {', '.join(done.beside)}")
    typer.echo(
        f"{done.output}: {done.bytes:,} bytes, {done.bits:.4g} bits per quantized weight, "
        f"{done.source_bytes / done.bytes:.3g} times smaller than the source of {done.source_bytes:,} bytes"
    )


def _show_planned(planned: Compressed, bits: float | None, coder: str | None, *, as_json: bool) -> None:
    """What a dry run found, and what its sizes are: exact, aimed at, or a bound."""
    sizes = dry_run_kind(bits, coder)
    # Other coders may need a mark for each tensor, and a digit more in two places of the header.
    total = planned.bytes + (3 * len(planned.rows) if sizes == "at most" else 0)
    if as_json:
        print_json({**_to_json(planned), "bytes": total, "dry_run": True, "sizes": sizes, "fixed_width": planned.bytes})
        return
    _show_rows(planned)
    typer.echo(f"{planned.output}: {dry_run_text(total, sizes)}; of {planned.source_bytes:,} in the source")


def _snr(row: Row) -> float | None:
    return -10 * math.log10(row.relative_error) if row.relative_error else None
