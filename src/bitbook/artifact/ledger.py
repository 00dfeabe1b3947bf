"""The ledger: every byte of a file, in exactly one row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bitbook.blocks import Shape

HEADER = "header"
"""What stands in a row's `tensor` for the bytes that belong to no tensor."""


class Row(NamedTuple):
    """Some bytes of the file and what they are for."""

    tensor: str
    """A tensor's name, a module's name (its quantized input), or "header"."""
    part: str
    """"codes", "scale.bits", …; "values" of a dense tensor; "length", "index", "plan" or "padding"."""
    recipe: str
    """How this part is stored: a quantizer, or a dense tensor's type; empty in the header."""
    shape: Shape
    """Shape of what this part decodes to, with the parts it needs."""
    bytes: int
    weights: int
    """Elements of the tensor, on its last row only, so that the column adds up to the model's weights."""


@dataclass(frozen=True)
class Ledger:
    """All rows, in the order of the file."""

    rows: tuple[Row, ...]

    @property
    def total(self) -> int:
        """Bytes of the whole file."""
        return sum(row.bytes for row in self.rows)

    @property
    def weights(self) -> int:
        """Elements of all tensors; tied ones count once."""
        return sum(row.weights for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file, header included, per element; NaN for a file without tensors."""
        return 8 * self.total / self.weights if self.weights else float("nan")

    def by_tensor(self) -> dict[str, int]:
        """Bytes of each tensor, of each quantized input, and of "header"; they add up to `total`."""
        return self._sums((row.tensor, row.bytes) for row in self.rows)

    def by_part(self) -> dict[str, int]:
        """Bytes of each kind of part over all tensors; the header's are named "header.plan" and so on."""
        return self._sums(
            (f"{HEADER}.{row.part}" if row.tensor == HEADER else row.part, row.bytes) for row in self.rows
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: the sums, and one object per row."""
        return {
            "bytes": self.total,
            "weights": self.weights,
            "bits_per_weight": self.bits_per_weight if self.weights else None,
            "rows": [row._asdict() | {"shape": list(row.shape)} for row in self.rows],
        }

    @staticmethod
    def _sums(amounts: Iterable[tuple[str, int]]) -> dict[str, int]:
        sums: dict[str, int] = {}
        for key, amount in amounts:
            sums[key] = sums.get(key, 0) + amount
        return sums
