"""`rd`: rate and distortion of every method beside Shannon's bound."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitbook.cli.arguments import AsJson, Tensors, TensorsFile, chosen_tensors
from bitbook.cli.progress import interruptible, progress
from bitbook.cli.show import print_json
from bitbook.errors import PlanError

if TYPE_CHECKING:
    from bitbook.study.rd.rd import Method, Subject


def rd(
    weights: TensorsFile = None,
    tensors: Tensors = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of rd.csv, rd.md and rd.svg.")] = Path("runs/rd"),
    samples: Annotated[int, typer.Option(min=1000, help="Drawn from each source; at most, of a tensor.")] = 1_000_000,
    bits: Annotated[
        list[float] | None,
        typer.Option(min=0.1, max=8, help="Target rates; may be repeated.", show_default="0.25 to 4"),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="Only methods whose names contain this; may be repeated.", show_default="all"),
    ] = None,
    sources: Annotated[
        list[str] | None,
        typer.Option("--source", help="Only these: Gauss, Laplace, 'Student-t 5', or none; may be repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of each source; tables give mean and spread.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Compare methods by mean squared error at the bytes of real files, on known sources and on weights.

    Rows that rd.csv holds already are not measured again: the same command goes on where it was.

    Examples:
      bitbook rd --out runs/rd
      bitbook rd --weights net.safetensors --tensor fc1.weight --source none --samples 100000
    """
    from bitbook.study.rd import rd as study
    from bitbook.study.rd.plots import distance_plot
    from bitbook.study.tables import finite

    targets = tuple(bits or study.TARGETS)
    chosen = _methods(study.METHODS, methods)
    names = {source.name: source for source in study.SOURCES}
    for name in sources or ():
        if name not in names and name != "none":
            raise PlanError(f"no source {name!r}; there are {', '.join(names)}, or none")
    subjects: list[Subject] = [
        study.drawn(source, samples) for name, source in names.items() if not sources or name in sources
    ]
    if weights is not None:
        subjects += [study.tensor(name, w, samples) for name, w in chosen_tensors(weights, tensors).items()]
    elif tensors:
        raise PlanError("--tensor goes with --weights")
    if not subjects:
        raise PlanError("there is no source: leave --source out, or pass --weights")
    out.mkdir(parents=True, exist_ok=True)
    table = study.Rows(out / "rd.csv")
    kept = f"what was measured is kept in {out / 'rd.csv'}; the same command goes on from there"
    with interruptible(kept), progress("rows", shown=not as_json) as update:
        measured = 0
        for subject in subjects:
            update(f"measuring {subject.source.name}", measured, None)
            repeats = 1 if subject.repeats is False else seeds
            for row in study.rows(subject, targets, repeats, chosen, table.__contains__):
                table.add(row)
                measured += 1
                update(f"measuring {subject.source.name}", measured, None)
                if not as_json:
                    typer.echo(f"{row['source']}: {row['method']}, {row['bits']:.3f} bits, mse {row['mse']:.5f}")
    bounds = {subject.source.name: study.bound_of(subject, targets) for subject in subjects}
    found = [row for row in table.rows if row["source"] in bounds]
    points = study.summarised(found, bounds)
    shown = {method.name: method.fixed for method in study.METHODS}
    picture = distance_plot(points, shown, out / "rd.svg")
    (out / "rd.md").write_text(
        study.document(points, bounds, command=_command(weights, tensors, samples, seeds), picture=picture.name),
        encoding="utf-8",
    )
    if as_json:
        print_json({"folder": str(out), "points": [finite(point._asdict()) for point in points]})
        return
    least = min((p.above for p in points), default=math.nan)
    typer.echo(f"{len(points)} points, the nearest {least:.2f} dB above the bound, in {out}: rd.csv, rd.md, rd.svg")


def _methods(known: Sequence[Method], wanted: Sequence[str] | None) -> list[Method]:
    found = [m for m in known if not wanted or any(word in m.name for word in wanted)]
    for word in wanted or ():
        if not any(word in m.name for m in known):
            raise PlanError(f"no method's name contains {word!r}; there are {'; '.join(m.name for m in known)}")
    return found


def _command(weights: Path | None, tensors: Sequence[str] | None, samples: int, seeds: int) -> str:
    parts = ["bitbook", "rd", "--samples", str(samples), "--seeds", str(seeds)]
    parts += [] if weights is None else ["--weights", weights.name]
    for name in tensors or ():
        parts += ["--tensor", name]
    return shlex.join(parts)
