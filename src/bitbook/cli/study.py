"""`study`: run a grid of trials, resumably, and write its report."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitbook.cli.arguments import AsJson, complete_study
from bitbook.cli.show import print_json, print_table

if TYPE_CHECKING:
    from bitbook.study.tables import Point


def study(
    dataset: Annotated[
        str,
        typer.Option(
            autocompletion=complete_study,
            help="The grid: digits (a minute or two), mnist (the whole experiment), headline (how few bytes do), "
            "family (every quantizer at equal bytes), or networks (byte budgets on public networks).",
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
    as_json: AsJson = False,
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
        _show_plan(cells, out, as_json=as_json)
        return

    import torch

    from bitbook import __version__
    from bitbook.data import load_dataset
    from bitbook.study.report import write_all
    from bitbook.study.run import join as join_study
    from bitbook.study.run import run_study
    from bitbook.study.tables import finite
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
    done = {"study": dataset, "trials": len(results), "of": len(cells)}
    # Without the storage, here and below: its URL may hold a password, and results do not depend on it.
    if not found.reported:
        kept = "the database" if storage and "://" in storage else storage or out / "study.db"
        print_json(done) if as_json else typer.echo(f"{len(results)} of {len(cells)} trials are done, kept in {kept}")
        return
    command = ["bitbook", "study", "--dataset", dataset, "--out", str(out)]
    command += [] if seeds is None else ["--seeds", str(seeds)]
    written = write_all(results, out, command=shlex.join(command))
    if as_json:
        print_json(
            {**done, "written": list(map(str, written)), "front": [finite(p.to_json()) for p in _front(results)]}
        )
        return
    _show_front(_front(results))
    typer.echo(f"{len(results)} of {len(cells)} trials are done, and reported in:")
    for path in written:
        typer.echo(f"  {path}")


def _show_plan(cells: Sequence[Mapping[str, Any]], out: Path, *, as_json: bool) -> None:
    """How many trials there are of each method, and how many float models they start from."""
    methods = Counter((cell["family"], cell["method"]) for cell in cells)
    starts = {repr([cell.get(key) for key in ("dataset", "holdout", "model", "start", "seed")]) for cell in cells}
    if as_json:
        listed = [{"family": family, "method": name, "trials": n} for (family, name), n in methods.items()]
        print_json({"out": str(out), "trials": len(cells), "starts": len(starts), "methods": listed})
        return
    columns = {"family": "left", "method": "left", "trials": "right"}
    print_table(columns, ([*method, str(count)] for method, count in methods.items()))
    typer.echo(f"{len(cells)} trials from {len(starts)} float models, to be reported in {out}")


def _front(results: Sequence[Mapping[str, Any]]) -> list[Point]:
    """What no other recipe beats in both bytes and validation accuracy, of the report's main group."""
    from bitbook.study.report import main_group
    from bitbook.study.tables import points

    found = points(results)
    group = main_group(found)
    return sorted((p for p in found if p.group == group and p.front), key=lambda p: p.bytes)


def _show_front(front: Sequence[Point]) -> None:
    from bitbook.study.tables import accuracy_text

    if front:
        typer.echo(f"\nBest by validation: {front[0].group}")
    print_table(
        {"recipe": "left", "bytes": "right", "test accuracy %": "right"},
        ([point.recipe, f"{point.bytes:,.0f}", accuracy_text(point.test)] for point in front),
    )
