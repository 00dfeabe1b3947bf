"""`search`: look for recipes for each layer that a grid does not hold."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from bitbook.cli.arguments import MODEL_HELP, AsJson
from bitbook.cli.show import print_json, print_table
from bitbook.errors import PlanError


def search(
    dataset: Annotated[str, typer.Option(help="digits, mnist, cifar10 or stories.")],
    model: Annotated[
        str | None,
        typer.Option(help=MODEL_HELP.partition(", or package")[0] + ".", show_default="the grid's on this data set"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder of everything written.", show_default="runs/DATASET"),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            envvar="BITBOOK_STORAGE",
            help="What holds the trials, those of the grid too: a file ending in .db, or a database URL.",
            show_default="OUT/study.db",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, those of earlier calls included.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds of what is on the front in the end.")] = 3,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of training under a plan.", show_default="the grid's, or 5")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, show_default="the grid's, or 64")] = None,
    holdout: Annotated[
        int | None, typer.Option(min=1, help="Validation examples.", show_default="the grid's, or one in ten")
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe, nsga2 or random.")] = "tpe",
    margin: Annotated[
        float, typer.Option(min=0, help="Points of accuracy below the front at which a trial is given up halfway.")
    ] = 3.0,
    prune: Annotated[bool, typer.Option("--prune/--no-prune", help="Whether hopeless trials are given up.")] = True,
    grid: Annotated[
        str | None,
        typer.Option(help="The study in the same storage to begin with, or 'none'.", show_default="DATASET, if there"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampler and of training.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine.", show_default="one per core")
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Be one worker of a search that was begun elsewhere; report nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Search for recipes, layer by layer, and training settings: few bytes and much accuracy at once.

    Begins with the results of a grid in the same storage (`bitbook study`) and with what the allocator would choose.
    However a search ends, the same command goes on where it was, with more --trials too.

    Examples:
      bitbook search --dataset digits --out runs/digits --trials 60
      bitbook search --dataset cifar10 --model resnet-20-cifar10 --epochs 2 --trials 200
    """
    from dataclasses import replace

    import torch

    from bitbook import __version__
    from bitbook.data import load_dataset
    from bitbook.study.report import installed_versions
    from bitbook.study.run import join as join_study
    from bitbook.study.search import search as searching
    from bitbook.study.search.report import Findings, write_search
    from bitbook.study.storage import has_study, open_storage
    from bitbook.study.trial import STARTS_FOLDER

    load_dataset(dataset)  # so that missing data says so once, here, and not in every worker
    out = out or Path("runs", dataset)
    held = storage or str(out / "study.db")
    os.environ[STARTS_FOLDER] = str((out / "starts").resolve())
    opened = open_storage(held)
    wanted = None if grid == "none" else grid or dataset
    there = wanted is not None and has_study(opened, wanted)
    opened.engine.dispose()
    if grid not in (None, "none") and not there:
        raise PlanError(f"there is no study {grid!r} in {out / 'study.db' if storage is None else 'the storage'}")
    settings = searching.SearchSettings.usual(
        dataset, model, holdout=holdout, epochs=epochs, batch=batch, seed=seed, sampler=sampler,
        grid=wanted if there else None,
    )  # fmt: skip
    settings = replace(settings, margin=margin if prune else None)
    if join:
        code = join_study(held, settings.name, searching.TRIAL, propose=searching.PROPOSER, limit=trials)
        raise typer.Exit(code)
    found = searching.search(
        settings, held, trials=trials, seeds=seeds, workers=workers, progress=not as_json,
        versions={"bitbook": __version__, "torch": torch.__version__},
    )  # fmt: skip

    # Without the storage, whose URL may hold a password; the rest is what the results depend on.
    options: dict[str, object] = {
        "dataset": dataset, "model": settings.model, "out": out, "trials": trials, "seeds": seeds,
        "epochs": settings.epochs, "batch": settings.batch, "holdout": settings.holdout, "sampler": sampler,
        "grid": settings.grid or "none", "seed": seed, **({"margin": margin} if prune else {}),
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = shlex.join(["bitbook", "search", *words, *([] if prune else ["--no-prune"])])
    written = write_search(found, out, command=command, versions=installed_versions())
    findings = Findings(found)
    if as_json:
        print_json({**findings.to_json(), "files": [str(path) for path in written]})
        return
    sides = {"trial": "right", "recipes": "left", "bytes": "right", "validation, %": "right", "test, %": "right"}
    print_table(sides, ([row["trial"], row["recipes"], f"{row['bytes']:,}", row["validation, %"], row["test, %"]]
                        for row in findings.front_rows()))  # fmt: skip
    for sentence in findings.sentences():
        typer.echo(sentence)
    typer.echo("written: " + ", ".join(map(str, written)))
