"""What a model's outputs mean: how far a changed model is from the one it was made from, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bitbook.errors import PlanError


class Total(NamedTuple):
    """A sum over predictions, and their number."""

    sum: Tensor
    predictions: int


class Outputs(Protocol):
    """A kind of output; a *prediction* is what counts as one: an example, or a place of a sequence."""

    def divergence(self, outputs: Tensor, reference: Tensor) -> Total:
        """How much the model would be surprised by what the reference predicts; differentiable, zero where equal."""
        ...

    def drawn(self, outputs: Tensor, generator: Generator) -> Total:
        """A loss against labels drawn from the model's own predictions.

        Its gradient has a mean of zero, and its square has that of the Fisher information.
        """
        ...


@dataclass(frozen=True)
class Categorical:
    """Scores of classes: the Kullback–Leibler divergence from the reference, in nats.

    Raises `PlanError` for a single score, and for four and more axes if `axis` is not given: it might be 1.
    """

    temperature: float = 1.0
    """By which scores are divided.  A network that is sure of its calibration inputs, because it was trained on them,
    says more about its scores at 2 to 4."""
    axis: int | None = None
    """That of the classes; None: the last, of outputs with two or three axes."""

    def divergence(self, outputs: Tensor, reference: Tensor) -> Total:
        found, expected = (self._scores(scores).log_softmax(-1) for scores in (outputs, reference))
        return Total(F.kl_div(found, expected, reduction="sum", log_target=True), len(found))

    def drawn(self, outputs: Tensor, generator: Generator) -> Total:
        scores = self._scores(outputs)
        labels = torch.multinomial(scores.detach().softmax(-1), 1, generator=generator)[:, 0]
        return Total(F.cross_entropy(scores, labels, reduction="sum"), len(scores))

    def _scores(self, outputs: Tensor) -> Tensor:
        if self.axis is None and outputs.dim() > 3:
            raise PlanError(
                f"outputs of {tuple(outputs.shape)}: say which axis is that of the classes, outputs=Categorical(axis=1)"
            )
        scores = outputs.float().movedim(-1 if self.axis is None else self.axis, -1)
        if scores.shape[-1] < 2:
            raise PlanError(
                f"outputs of {tuple(outputs.shape)}: a single score says nothing of classes; pass outputs=Gaussian()"
            )
        return scores.flatten(0, -2) / self.temperature


class Gaussian:
    """Numbers with errors of variance one, an example a prediction: half the squared distance from the reference."""

    def divergence(self, outputs: Tensor, reference: Tensor) -> Total:
        return Total((outputs.float() - reference.float()).square().sum() / 2, len(outputs))

    def drawn(self, outputs: Tensor, generator: Generator) -> Total:
        noise = torch.randn(outputs.shape, generator=generator, device=outputs.device)
        return Total((outputs.float() * noise).sum(), len(outputs))


@torch.no_grad()
def mean_divergence(outputs: Outputs, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The divergence per prediction over pairs of what a model and its reference give, in the unit of `outputs`."""
    total, predictions = 0.0, 0
    for found, reference in pairs:
        part = outputs.divergence(found, reference)
        total, predictions = total + float(part.sum), predictions + part.predictions
    return total / predictions


def tensor_of(outputs: Any) -> Tensor:
    """The tensor that a model gives, be it alone, the only one of a tuple, or under the name `logits`.

    Raises `PlanError` for outputs without axes of examples and values, and for several: what is not looked at would be
    thrown away.
    """
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if isinstance(found, tuple | list):
        several = [one for one in found if isinstance(one, Tensor) and one.is_floating_point() and one.dim() > 1]
        if len(several) > 1:
            raise PlanError(
                f"the model gives {len(several)} tensors; wrap it in a module that gives the one to be kept, or all of "
                "them in one"
            )
        found = several[0] if several else found
    if not isinstance(found, Tensor) or found.dim() < 2:
        what = f"a tensor of {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise PlanError(f"the model gives {what}; it must give a tensor whose first axis is that of the examples")
    return found
