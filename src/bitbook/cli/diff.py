"""`diff`: two files side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from bitbook.cli.arguments import AsJson
from bitbook.cli.codes import DIFFERENT
from bitbook.cli.progress import progress
from bitbook.cli.show import print_json, print_table, shape_text

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_HELP = "A file that bitbook wrote, or weights: .safetensors, .pt."


class _Side(NamedTuple):
    """A file: what each of its tensors decodes to, how it is stored, and its bytes."""

    tensors: Mapping[str, Tensor]
    stored_as: Mapping[str, str]
    bytes: Mapping[str, int]
    total: int


def diff(
    a: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help=WEIGHTS_HELP)],
    b: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Another such file, measured against it.")],
    every: Annotated[bool, typer.Option("--all", help="List equal tensors, too.")] = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="End with exit code 1 where any weights differ.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two files tensor by tensor: recipes, bytes, and the error of the second one's weights.

    The error is that of B relative to A: squared error over A's squared weights, and as a signal-to-noise ratio in dB.

    Examples:
      bitbook diff float.safetensors small.safetensors
      bitbook diff four-bits.safetensors three-bits.safetensors --json
    """
    with progress("tensors", shown=not as_json) as update:
        update("reading", 0, None)
        sides = _read(a), _read(b)
        names = sorted(sides[0].tensors.keys() | sides[1].tensors.keys())
        rows = []
        for i, name in enumerate(names):
            update("comparing", i, len(names))
            rows.append(_row(name, *sides))
    same = all(row["same"] for row in rows)
    if as_json:
        totals = [{"file": str(path), "bytes": side.total} for path, side in zip((a, b), sides, strict=True)]
        print_json({"a": totals[0], "b": totals[1], "same": same, "tensors": rows})
    else:
        _show(rows if every else [row for row in rows if _differs(row)])
        equal = sum(not _differs(row) for row in rows)
        if equal and not every:
            typer.echo(f"{equal} of {len(rows)} tensors are equal in values, recipe and bytes (--all lists them)")
        difference = sides[1].total - sides[0].total
        share = f"{100 * difference / sides[0].total:+.1f} %" if sides[0].total else "all"
        typer.echo(f"{a}: {sides[0].total:,} bytes; {b}: {sides[1].total:,} bytes, {difference:+,} ({share})")
        typer.echo("the weights are the same" if same else f"the weights of {sum(not r['same'] for r in rows)} differ")
    if exit_code and not same:
        raise typer.Exit(DIFFERENT)


def _read(path: Path) -> _Side:
    from bitbook.artifact import read, read_ledger
    from bitbook.checkpoints.weights import read_weights
    from bitbook.errors import AlreadyCompressed
    from bitbook.quantizer import Quantized

    total = path.stat().st_size
    try:
        tensors: Mapping[str, Any] = read_weights(path)
    except AlreadyCompressed:
        artifact = read(path)
        ledger = read_ledger(path).by_tensor()
        own = artifact.tensors
        names = {**{name: name for name in own}, **artifact.aliases}
        stored = {
            name: f"tied to {of}" if name != of else repr(t.recipe) if isinstance(t := own[of], Quantized) else _type(t)
            for name, of in names.items()
        }
        sizes = {name: 0 if name != of else ledger.get(name, 0) for name, of in names.items()}
        return _Side(artifact.state_dict(), stored, sizes, total)
    stored = {name: _type(tensor) for name, tensor in tensors.items()}
    return _Side(tensors, stored, {n: t.numel() * t.element_size() for n, t in tensors.items()}, total)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _row(name: str, a: _Side, b: _Side) -> dict[str, Any]:
    from bitbook.cli.compress import weight_error

    row: dict[str, Any] = {
        "tensor": name,
        **{
            key: {
                "stored_as": side.stored_as[name],
                "shape": list(side.tensors[name].shape),
                "bytes": side.bytes[name],
            }
            if name in side.tensors
            else None
            for key, side in (("a", a), ("b", b))
        },
        "same": False,
        "relative_mse": None,
        "snr_db": None,
    }
    if row["a"] is None or row["b"] is None or row["a"]["shape"] != row["b"]["shape"]:
        return row
    ours, theirs = a.tensors[name], b.tensors[name]
    if bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all()):
        return {**row, "same": True, "relative_mse": 0.0}
    return row | weight_error(ours, theirs)


def _differs(row: Mapping[str, Any]) -> bool:
    return not row["same"] or row["a"] != row["b"]


def _show(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return

    def both(row: Mapping[str, Any], key: str, text: Any) -> str:
        a, b = (None if row[side] is None else text(row[side][key]) for side in "ab")
        return str(a) if a == b else f"{a or 'not there'} → {b or 'not there'}"

    columns = {"tensor": "left", "stored as": "left", "shape": "right", "bytes": "right"}
    print_table(
        {**columns, "relative squared error": "right", "SNR dB": "right"},
        (
            [
                row["tensor"],
                both(row, "stored_as", str),
                both(row, "shape", shape_text),
                both(row, "bytes", lambda n: f"{n:,}"),
                "0" if row["same"] else "" if row["relative_mse"] is None else f"{row['relative_mse']:.3g}",
                "" if row["snr_db"] is None else f"{row['snr_db']:.1f}",
            ]
            for row in rows
        ),
    )
