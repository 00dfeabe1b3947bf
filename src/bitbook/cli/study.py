"""`study`: run a grid of trials, resumably, and write its report."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bitbook.cli.show import print_table


def study(
    dataset: Annotated[
        str,
        typer.Option(
            help="The grid: digits (a minute or two), mnist (the whole experiment), headline (how few bytes do), "
            "family (every quantizer at equal bytes), or networks (byte budgets on public networks)."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder of everything written.", show_default="runs/DATASET"),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Training seeds of each recipe.", show_default="the grid's own")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine.", show_default="one per core")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            envvar="BITBOOK_STORAGE",
            help="What holds the trials: a file ending in .db, or a database URL for several machines.",
            show_default="OUT/study.db",
        ),
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Report what there is although trials failed.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run trials again that failed before.")] = False,
    join: Annotated[
        bool, typer.Option("--join", help="Be one worker of a study that was begun elsewhere; report nothing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and stop.")] = False,
) -> None:
    """Run a study: many recipes, several seeds, and a report of file size against accuracy.

    However a study ends, the same command goes on where it was; only the running trials are lost.

    Examples:
      bitbook study --dataset digits --out runs/digits
      bitbook study --dataset mnist --workers 8 --dry-run
    """
    from bitbook.study.catalogue import find_study

    out = out or Path("runs", dataset)
    found = find_study(dataset)
    cells = found.cells(range(found.seeds if seeds is None else seeds))
    if dry_run:
        _show_plan(cells, out)
        return

    import torch

    from bitbook import __version__
    from bitbook.data import load_dataset
    from bitbook.study.report import write_all
    from bitbook.study.run import join as join_study
    from bitbook.study.run import run_study
    from bitbook.study.trial import STARTS_FOLDER

    for name in {cell["dataset"] for cell in cells}:
        load_dataset(name)  # so that missing data says so once, here, and not in every worker
    out.mkdir(parents=True, exist_ok=True)
    os.environ[STARTS_FOLDER] = str((out / "starts").resolve())
    if join:
        raise typer.Exit(join_study(storage or out / "study.db", dataset, found.trial))
    results = run_study(
        cells,
        found.trial,
        storage or out / "study.db",
        name=dataset,
        settings={"bitbook": __version__, "torch": torch.__version__},
        workers=workers,
        retry_failed=retry_failed,
        keep_going=keep_going,
    )
    if not found.reported:
        typer.echo(f"{len(results)} of {len(cells)} trials are done, and kept in {storage or out / 'study.db'}")
        return
    # Without the storage: its URL may hold a password, and results do not depend on it.
    command = ["bitbook", "study", "--dataset", dataset, "--out", str(out)]
    command += [] if seeds is None else ["--seeds", str(seeds)]
    written = write_all(results, out, command=shlex.join(command))
    _show_front(results)
    typer.echo(f"{len(results)} of {len(cells)} trials are done, and reported in:")
    for path in written:
        typer.echo(f"  {path}")


def _show_plan(cells: Sequence[Mapping[str, Any]], out: Path) -> None:
    """How many trials there are of each method, and how many float models they start from."""
    methods = Counter((cell["family"], cell["method"]) for cell in cells)
    columns = {"family": "left", "method": "left", "trials": "right"}
    print_table(columns, ([*method, str(count)] for method, count in methods.items()))
    starts = {repr([cell.get(key) for key in ("dataset", "holdout", "model", "start", "seed")]) for cell in cells}
    typer.echo(f"{len(cells)} trials from {len(starts)} float models, to be reported in {out}")


def _show_front(results: Sequence[Mapping[str, Any]]) -> None:
    """What no other recipe beats in both bytes and validation accuracy, of the report's main group."""
    from bitbook.study.report import main_group
    from bitbook.study.tables import accuracy_text, points

    found = points(results)
    group = main_group(found)
    front = sorted((p for p in found if p.group == group and p.front), key=lambda p: p.bytes)
    typer.echo(f"\nBest by validation: {group}")
    print_table(
        {"recipe": "left", "bytes": "right", "test accuracy %": "right"},
        ([point.recipe, f"{point.bytes:,.0f}", accuracy_text(point.test)] for point in front),
    )
