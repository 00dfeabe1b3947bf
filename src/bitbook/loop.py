"""Training and evaluation: a plain loop over data that stay in memory as one tensor.

Batches are rows of a tensor picked by index: no per-image work, so a small network trains as fast as
its matrix products allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.optim.sgd import sgd

from bitbook.errors import PlanError

IGNORED = -100
"""A label that is none, as PyTorch's cross-entropy has it: neither trained on nor measured."""

Labels = Int[Tensor, " examples"] | Int[Tensor, "examples length"]
"""Of sequences, a label for every place, `IGNORED` where there is none."""
Inputs = Float[Tensor, "examples *features"] | Int[Tensor, "examples length"]

_MOST_PLACES = 16_384  # of sequences that are evaluated together: some ten megabytes of logits


@dataclass(frozen=True)
class Training:
    """Stochastic gradient descent on cross-entropy."""

    epochs: int = 5
    lr: float = 1e-3
    batch: int = 64
    momentum: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    """"cosine" falls from `lr` to zero over all steps (Loshchilov & Hutter 2017, without restarts)."""

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch < 1 or not (self.lr > 0 and math.isfinite(self.lr)):
            raise PlanError(f"{self}: use epochs ≥ 0, batch ≥ 1 and a positive learning rate")
        if not self.momentum >= 0:
            raise PlanError(f"momentum={self.momentum!r}: use 0 or more")
        if self.schedule not in ("constant", "cosine"):
            raise PlanError(f"schedule={self.schedule!r}: use 'constant' or 'cosine'")


class Evaluation(NamedTuple):
    """How a model does on a labelled set."""

    accuracy: float
    """Percent."""
    loss: float
    """Mean of the batch means, as the source material prints it; of sequences, mean over all labels."""
    correct: Bool[Tensor, " labels"]
    """Of sequences, for every label that is not ignored, one example after the other."""


def run_epochs(
    model: nn.Module,
    x: Inputs,
    y: Labels,
    training: Training,
    *,
    generator: Generator,
    after_epoch: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` in place; returns each epoch's loss, the mean of its batch means.

    `generator` decides the order of the examples; every epoch sees each of them once, the last batch may be
    smaller.  `after_epoch(epoch, loss)` is called after each.
    """
    model.train()
    descent = _Descent([p for p in model.parameters() if p.requires_grad], training.momentum)
    steps = training.epochs * math.ceil(len(x) / training.batch)
    step = 0
    losses = []
    for epoch in range(training.epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        total = torch.zeros((), device=x.device)
        batches = order.split(training.batch)
        for batch in batches:
            lr = training.lr
            if training.schedule == "cosine":
                lr = training.lr * (1 + math.cos(math.pi * step / steps)) / 2
            loss = cross_entropy(model(x.index_select(0, batch)), y.index_select(0, batch))
            loss.backward()
            descent.step(lr)
            total += loss.detach()
            step += 1
        losses.append(total.item() / len(batches))
        if after_epoch is not None:
            after_epoch(epoch, losses[-1])
    return losses


def cross_entropy(
    logits: Float[Tensor, "*labels classes"], labels: Int[Tensor, "*labels"], reduction: str = "mean"
) -> Tensor:
    """PyTorch's, with classes on the last axis, whether an example has one label or a sequence of them."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


class _Descent:
    """`torch.optim.SGD` to the bit, since it is the same function, without a bookkeeping that costs as much again.

    `v = momentum · v + ∇`, `w = w - lr · v`; a parameter without a gradient stays.  A step takes the gradients.
    """

    def __init__(self, parameters: Sequence[Tensor], momentum: float) -> None:
        self.parameters, self.momentum = parameters, momentum
        self.velocities: dict[Tensor, Tensor | None] = {}
        self._take()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        moved, gradients = self._take()
        velocities = [self.velocities.get(parameter) for parameter in moved]
        sgd(
            moved, gradients, velocities, lr=lr, momentum=self.momentum, weight_decay=0.0, dampening=0.0,
            nesterov=False, maximize=False,
        )  # fmt: skip
        if self.momentum:
            self.velocities.update(zip(moved, velocities, strict=True))

    def _take(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, and these gradients; they have none afterwards."""
        moved, gradients = [], []
        for parameter in self.parameters:
            if parameter.grad is not None:
                moved.append(parameter)
                gradients.append(parameter.grad)
                parameter.grad = None
        return moved, gradients


@torch.no_grad()
def evaluate(
    model: nn.Module,
    x: Inputs,
    y: Labels,
    *,
    batch: int = 64,
    after_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Accuracy and loss on a labelled set; `after_batch(examples)` is called after each batch.

    The batch size matters where inputs are quantized with a range per batch; 64 is the source material's.

    A model of sequences must be causal: sequences of like length are evaluated together, and cut behind the last label
    that any of them has.  Fewer than `batch` of them share a batch where they are long.
    """
    model.eval()
    if y.dim() > 1:
        return _evaluate_sequences(model, x, y, batch, after_batch)
    losses, correct = [], []
    for inputs, labels in zip(x.split(batch), y.split(batch), strict=True):
        logits = model(inputs)
        losses.append(F.cross_entropy(logits, labels))
        correct.append(logits.argmax(1) == labels)
        if after_batch is not None:
            after_batch(len(labels))
    hits = torch.cat(correct)
    return Evaluation(100 * hits.double().mean().item(), torch.stack(losses).double().mean().item(), hits)


def _evaluate_sequences(
    model: nn.Module,
    x: Int[Tensor, "examples length"],
    y: Int[Tensor, "examples length"],
    batch: int,
    after_batch: Callable[[int], None] | None,
) -> Evaluation:
    labelled = y != IGNORED
    lengths = (labelled * torch.arange(1, y.shape[1] + 1, device=y.device)).amax(1)  # up to the last label
    hits = torch.zeros_like(labelled)
    total = torch.zeros((), dtype=torch.float64, device=y.device)
    rest = lengths.argsort(descending=True, stable=True)
    while len(rest) and (longest := int(lengths[rest[0]])):
        rows, rest = rest.tensor_split([min(batch, max(1, _MOST_PLACES // longest))])
        labels = y[rows, :longest]
        logits = model(x[rows, :longest])
        total += cross_entropy(logits, labels, "sum")
        hits[rows, :longest] = logits.argmax(-1) == labels
        if after_batch is not None:
            after_batch(len(rows))
    correct = hits[labelled]
    return Evaluation(100 * correct.double().mean().item(), (total / len(correct)).item(), correct)
