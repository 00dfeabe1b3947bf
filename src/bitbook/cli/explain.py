"""`explain`: where vectors and entropy coding would gain on a model's weights, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitbook.cli.arguments import AsJson, Tensors, chosen_tensors
from bitbook.cli.progress import progress
from bitbook.cli.show import print_json, print_table, shape_text


def explain(
    weights: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="Weights: .safetensors, .pt, or a file that bitbook wrote."),
    ],
    tensors: Tensors = None,
    bits: Annotated[float, typer.Option(min=0.5, max=6, help="Bits per weight at which methods are compared.")] = 2.0,
    picture: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="Draw the gains of the largest tensor as bars: a file ending in .svg or .png."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what vectors and entropy coding would gain over plain scalars on these weights, in dB, and what follows.

    Gains are measured at equal bits: 6.02 dB are one bit per weight. Tensors are looked at one by one.

    Examples:
      bitbook explain net.safetensors --picture gains.svg
      bitbook explain net.pt --tensor fc1.weight --bits 3 --json
    """
    from bitbook.theory.gains import LEAST_WEIGHTS
    from bitbook.theory.gains import explain as measure

    chosen = chosen_tensors(weights, tensors)
    small = [name for name, w in chosen.items() if w.numel() < LEAST_WEIGHTS]
    if len(small) == len(chosen):
        small = []  # whose error says why
    found = {}
    looked_at = [name for name in chosen if name not in small]
    with progress("tensors", shown=not as_json) as update:
        for done, name in enumerate(looked_at):
            update(f"measuring {name}", done, len(looked_at))
            found[name] = measure(name, chosen[name], bits)
    largest = max(found.values(), key=lambda gains: gains.weights)
    if picture is not None:
        from bitbook.study.rd.plots import gains_plot

        title = f"{largest.name}: {largest.weights:,} weights at {largest.bits:g} bits"
        gains_plot(largest.bars, picture, title=title)
    if as_json:
        print_json({"file": str(weights), "left_out": small, "tensors": [gains.to_json() for gains in found.values()]})
        return
    columns = (
        "bits", "vectors of", "vectors", "space filling", "shape", "memory", "memory, any", "entropy coding",
        "ECSQ to bound", "codewords", "precision",
    )  # fmt: skip
    print_table(
        {"tensor": "left", "axes": "right", **dict.fromkeys(columns, "right")},
        (
            [
                name,
                shape_text(chosen[name].shape),
                f"{g.bits:g}",
                str(g.dimension),
                *(f"{value:.2f}" for value in (g.vectors, g.space_filling, g.shape, g.memory, g.memory_neighbours)),
                f"{g.entropy_coding:.2f}",
                f"{g.above_bound:.2f}",
                f"{g.best_size.codewords} of {g.best_size.dimension}",
                f"{g.best_precision.precision} bits",
            ]
            for name, g in found.items()
        ),
    )
    typer.echo("Gains in dB of squared error over fixed-rate scalars at the same bits; 6.02 dB are one bit per weight.")
    typer.echo(
        "'memory' is measured at this rate; 'memory, any' is what the entropies of neighbours promise at high rates.\n"
    )
    if small:
        typer.echo(f"Left out, as they have fewer than {LEAST_WEIGHTS:,} weights: {', '.join(small)}.\n")
    typer.echo(f"{largest.name}, the largest:")
    for sentence in largest.advice():
        typer.echo(f"- {sentence}")
    if picture is not None:
        typer.echo(f"\nThe gains of {largest.name} are drawn in {picture}")
