"""What a fit to a budget chose for each tensor, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bitbook.quantizer import Quantizer


@dataclass(frozen=True)
class Choice:
    """What became of one parameter."""

    name: str
    kind: str
    recipe: Quantizer
    weights: int
    size: int
    """Bytes in the file."""
    loss: float
    """What its errors were expected to cost, when it was chosen."""
    others: Mapping[str, float]
    """Loss and bytes together of other kinds, at their best, as a multiple of the chosen one's."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Kinds that do not fit it, and why."""
    silent: bool = False
    """Whether no prediction on the calibration inputs depends on it."""

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.size / self.weights

    @property
    def why(self) -> str:
        """The reason in words."""
        if self.silent:
            return f"no prediction on the calibration inputs depends on it; {self._compared}"
        return self._compared

    @property
    def _compared(self) -> str:
        if not self.others:
            return "nothing else fits" if self.refused else "nothing else was tried"
        name = min(self.others, key=lambda name: self.others[name])
        ratio = self.others[name]
        if ratio >= 1:
            return f"loss and bytes together: {name} {ratio:.2f} times as much"
        return f"fills the budget; {name} would be {ratio:.2f} of its loss and bytes"


class Repair(NamedTuple):
    """A repair that was tried after encoding, by its effect on the divergence."""

    name: str
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Only where the divergence on the calibration inputs fell."""
        return self.after < self.before

    def __str__(self) -> str:
        what = "kept" if self.kept else "not kept"
        return f"{self.name}: divergence {self.before:.5g} before, {self.after:.5g} after; {what}"


@dataclass(frozen=True)
class Report:
    """How a model came to fit."""

    budget: int | None
    """Bytes that were asked for; None where an accuracy was."""
    size: int
    """Bytes of the file."""
    reached: bool
    """False where no file that small could be made; then it is the smallest that could."""
    predicted: float
    """What the errors were expected to cost, per prediction."""
    divergence: float
    """What they cost on the calibration inputs, in the file read back."""
    lam: float
    """The price of a bit, in loss, at which bytes and loss were balanced."""
    choices: Sequence[Choice]
    dense: Mapping[str, str]
    """Tensors that are stored as they are, and why."""
    repairs: Sequence[Repair]
    rounds: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "budget": self.budget,
            "size": self.size,
            "reached": self.reached,
            "predicted": self.predicted,
            "divergence": self.divergence,
            "lam": self.lam,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "repairs": [{**repair._asdict(), "kept": repair.kept} for repair in self.repairs],
            "choices": [
                {
                    "tensor": choice.name, "kind": choice.kind, "recipe": repr(choice.recipe), "bytes": choice.size,
                    "bits_per_weight": choice.bits, "loss": choice.loss, "why": choice.why,
                    "refused": dict(choice.refused),
                }
                for choice in self.choices
            ],
            "dense": dict(self.dense),
        }  # fmt: skip
