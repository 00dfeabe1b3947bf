"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from bitbook.artifact import Ledger


@dataclass
class Summary:
    """The ledger's rows of one tensor, of one quantized input, or of the header."""

    tensor: str
    stored_as: str = ""
    shape: tuple[int, ...] = ()
    parts: dict[str, int] = field(default_factory=dict)
    weights: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per element; None where there is no tensor."""
        return 8 * self.bytes / self.weights if self.weights else None

    def to_json(self) -> dict[str, Any]:
        return {
            "tensor": self.tensor,
            "stored_as": self.stored_as,
            "shape": list(self.shape),
            "parts": self.parts,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
        }


def summaries(ledger: Ledger) -> dict[str, Summary]:
    """One summary per tensor, in the order of the file; together they hold all of its bytes."""
    found: dict[str, Summary] = {}
    for row in ledger.rows:
        summary = found.setdefault(row.tensor, Summary(row.tensor))
        summary.parts[row.part] = row.bytes
        summary.stored_as, summary.shape = row.recipe, row.shape  # the last part is the tensor's own
        summary.weights += row.weights
    return found


def sizes(ledger: Ledger) -> dict[str, Any]:
    """The sums of a ledger as JSON, and how they compare with plain float32 tensors."""
    return {
        "bytes": ledger.total,
        "weights": ledger.weights,
        "bits_per_weight": ledger.bits_per_weight if ledger.weights else None,
        "float32_bytes": 4 * ledger.weights,
        "ratio_to_float32": 4 * ledger.weights / ledger.total,
    }


def total_line(name: object, ledger: Ledger) -> str:
    """The same sums in words."""
    return (
        f"{name}: {ledger.total:,} bytes, {ledger.bits_per_weight:.3g} bits per weight, "
        f"{4 * ledger.weights / ledger.total:.3g} times smaller than {ledger.weights:,} weights in float32"
    )


def dry_run_kind(bits: float | None, coder: str | None) -> str:
    """What the sizes of a dry run are: "exactly" at fixed width, "about" where bits are aimed at, else "at most"."""
    return "about" if bits is not None else "exactly" if coder == "fixed" else "at most"


def dry_run_text(total: int, kind: str) -> str:
    """The size of a file that was not written, and what kind of number it is."""
    why = {
        "exactly": "fixed width",
        "about": "what --bits aims at",
        "at most": "an upper bound, fixed width; the entropy coder is chosen where it is smaller",
    }
    return f"would have {kind} {total:,} bytes ({why[kind]})"


def print_table(columns: Mapping[str, str], rows: Iterable[Iterable[str]]) -> None:
    """Print rows of text under `columns`, name → "left" or "right"; only a terminal limits the width."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for name, justify in columns.items():
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(Text, row))  # names of tensors are no markup
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def print_json(value: Any) -> None:
    """Print strict JSON: it has neither infinity nor NaN, so None must stand for them."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def shape_text(shape: Iterable[int]) -> str:
    """128 × 784."""
    return " × ".join(map(str, shape))


def bits_text(bits: float | None) -> str:
    """Bits per weight with two decimals; empty where there is no weight."""
    return "" if bits is None else f"{bits:.2f}"
