"""Training that pays for every bit: at a given price, or to a given number of bytes.

model ──quantize_(plan)──► latents ──epochs: loss + λ · bits──► freeze ──► Artifact
  ▲                                                                           │
  └──────────── with a budget: once more, at another λ ◄── bytes of the file ─┘
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from bitbook.apply import freeze, quantize_
from bitbook.artifact import Artifact, to_bytes
from bitbook.errors import BudgetError, PlanError
from bitbook.plan import Plan
from bitbook.qat import FakeQuantize, Regime
from bitbook.quantizer import FitOptions
from bitbook.rate.pricing import Pricing

_FIRST_LAM = 1e-5  # where the search for a budget's λ begins
_ROUNDS = 6  # trainings that the search may take
_ENOUGH = 0.93  # of the budget: a file so large ends the search
_AIM = 0.97  # of the budget: what the next λ aims at
_USUAL_SLOPE = 0.6  # of log bytes against log λ, until trainings on both sides tell
_LEAST_STEP = math.log(2.0)  # of log λ from one training to the next, while the budget is beyond all of them
_SQUEEZED = 1.05  # times the budget: a file up to so large loses its least useful codes instead
_LEAST_WEIGHT = 1e-6  # of bits in squared error, with which that begins
_HALVINGS = 5  # of the interval, in logarithms, in which the least weight that is enough lies


@dataclass(frozen=True)
class RateTraining:
    """Adam (Kingma & Ba 2015) on cross-entropy plus λ · bits, its rate falling to zero along a cosine."""

    epochs: int = 30
    batch: int = 256
    lr: float = 4e-3
    """Of weights and everything dense."""
    side_lr: float = 1e-3
    """Of side tensors that learn: reconstruction points, codewords."""
    ramp: float = 0.1
    """Share of the training over which λ rises from zero."""
    smooth: float = 0.2
    """Share of the training, from its beginning, in which weights are priced but not rounded."""
    refit: int = 60
    """Steps between two counts of what codes cost."""
    distill: float = 0.7
    """Weight of the teacher's answers against the labels, where there is a teacher (Hinton et al. 2015, T = 1)."""

    def __post_init__(self) -> None:
        rates = all(lr > 0 and math.isfinite(lr) for lr in (self.lr, self.side_lr))
        shares = all(0 <= share <= 1 for share in (self.ramp, self.smooth, self.distill))
        if self.epochs < 1 or self.batch < 1 or self.refit < 1 or not rates or not shares:
            raise PlanError(f"{self}: use whole numbers from 1, positive rates, and shares from 0 to 1")


class Epoch(NamedTuple):
    """What is reported after an epoch."""

    number: int
    loss: float
    """Mean of the batches' losses, without the price."""
    lam: float
    bits: float
    """Estimate for all priced weights."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A compressed model and how it came about."""

    artifact: Artifact
    model: nn.Module
    """The trained copy, still quantized: it can be evaluated and trained further."""
    lam: float
    """λ at the end, loss per bit."""
    epochs: tuple[Epoch, ...]
    bytes: int
    """Length of the file that `save` writes."""


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    plan: Plan | None,
    *,
    lam: float | None = None,
    budget: int | None = None,
    training: RateTraining = RateTraining(),
    teacher: Float[Tensor, "examples classes"] | nn.Module | None = None,
    options: FitOptions = FitOptions(),
    regime: Regime = Regime(codes="latent"),
    seed: int = 0,
    after_epoch: Callable[[Epoch], None] | None = None,
) -> Trained:
    """Train a copy of `model` under `plan` with a price on bits; `model` stays as it is.

    Args:
        model: trained or fresh; a classifier.  It may be quantized already, in part or, with no plan, as it shall be.
        data: inputs and labels.
        plan: at least one weight's recipe must have something to price, as `ECSQ` and `Codebook` have.
        lam: λ, loss per bit; more of it, fewer bytes.
        budget: bytes that the file may have, instead of `lam`, which is searched for in up to six trainings.
        training: epochs, rates, schedules.
        teacher: logits for every example, or a model that gives them; its answers join the labels.
        options: how side tensors are first found; `options.step` is where the steps of `ECSQ` begin.
        regime: what moves during training; unless codes are "frozen", codebooks are priced.
        seed: of the order of examples, and of k-means.
        after_epoch: called after each epoch, over all rounds.

    Raises:
        PlanError: neither or both of `lam` and `budget` are given, or nothing can be priced.
        BudgetError: no file of at most `budget` bytes was reached; the message says the smallest, and why.
    """
    if (lam is None) == (budget is None):
        raise PlanError("give either lam, the price of a bit, or budget, the bytes that the file may have")
    if lam is not None and not (lam >= 0 and math.isfinite(lam)):
        raise PlanError(f"lam={lam}: use a finite price, zero or more")
    x, y = data
    targets = _answers(teacher, x) if teacher is not None and training.distill else None
    epochs: list[Epoch] = []

    def trained_at(price: float) -> Trained:
        copied, generator = copy.deepcopy(model), Generator().manual_seed(seed)
        if plan is not None:
            quantize_(copied, plan, options=options, regime=regime, generator=generator)
        pricing = _run(copied, x, y, targets, training, price, generator, epochs, after_epoch)
        if budget is not None:
            squeeze(pricing, budget, lambda: _size(copied))
        artifact = freeze(copied)
        return Trained(artifact, copied, price, tuple(epochs), len(to_bytes(artifact)[0]))

    if lam is not None:
        return trained_at(lam)
    assert budget is not None
    return _search(trained_at, budget)


def _search(trained_at: Callable[[float], Trained], budget: int) -> Trained:
    """The largest file within the budget over a few trainings, each at the λ that those before it suggest.

    Sizes fall with λ about as a power of it: between two trainings on either side of the budget, and beyond all of
    them, λ is read off a straight line of logarithms.
    """
    found: list[Trained] = []
    price = _FIRST_LAM
    for _ in range(_ROUNDS):
        found.append(trained_at(price))
        if _ENOUGH * budget <= found[-1].bytes <= budget:
            break
        price = _next_price(found, budget)
    within = [result for result in found if result.bytes <= budget]
    if within:
        return max(within, key=lambda result: result.bytes)
    smallest = min(found, key=lambda result: result.bytes)
    raise BudgetError(
        f"no file of {budget} bytes after {len(smallest.epochs)} epochs; the smallest has {smallest.bytes}, at λ "
        f"{smallest.lam:.2g}. {heaviest(smallest.artifact)} Plan a quantizer for what is dense, use a smaller model, "
        "or train longer"
    )


def _next_price(found: Sequence[Trained], budget: int) -> float:
    """λ at which a line through the nearest trainings on either side meets the budget, on logarithmic axes.

    With all on one side it goes on to the other, further each time.
    """
    goal = math.log(_AIM * budget)
    at = [(math.log(result.bytes) - goal, math.log(result.lam)) for result in found]
    # Chance can give a larger λ the larger file, so the sides are told by the λ next to the other side.
    above = max((p for p in at if p[0] > 0), key=lambda p: p[1], default=None)
    below = min((p for p in at if p[0] <= 0), key=lambda p: p[1], default=None)
    if above is not None and below is not None:
        share = above[0] / (above[0] - below[0])
        return math.exp(above[1] + share * (below[1] - above[1]))
    if above is not None:
        return math.exp(above[1] + max(above[0] / _USUAL_SLOPE, len(found) * _LEAST_STEP))
    assert below is not None
    return math.exp(below[1] + min(below[0] / _USUAL_SLOPE, -len(found) * _LEAST_STEP))


def _run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    targets: Tensor | None,
    training: RateTraining,
    lam: float,
    generator: Generator,
    epochs: list[Epoch],
    after_epoch: Callable[[Epoch], None] | None,
) -> Pricing:
    """One training from the first step to the last; returns the pricing as it ended."""
    steps = training.epochs * math.ceil(len(x) / training.batch)
    pricing = Pricing(model, lam, steps=steps, ramp=training.ramp, smooth=training.smooth, refit=training.refit)

    def loss_of(batch: Tensor) -> Tensor:
        answers = model(x.index_select(0, batch)).flatten(0, -2).log_softmax(1)  # of sequences, place by place
        loss = F.nll_loss(answers, y.index_select(0, batch).flatten())
        if targets is None:
            return loss
        taught = -(targets.index_select(0, batch) * answers).sum(1).mean()
        return (1 - training.distill) * loss + training.distill * taught

    descend(model, len(x), loss_of, training, pricing, generator, epochs, after_epoch=after_epoch)
    return pricing


class Schedule(Protocol):
    """What `descend` reads of `RateTraining` and of `FineTuning`."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def side_lr(self) -> float: ...


def descend(
    model: nn.Module,
    count: int,
    loss_of: Callable[[Tensor], Tensor],
    training: Schedule,
    pricing: Pricing,
    generator: Generator,
    epochs: list[Epoch],
    *,
    warm: float = 0.0,
    after_step: Callable[[Tensor], None] | None = None,
    after_epoch: Callable[[Epoch], None] | None = None,
) -> None:
    """Adam (Kingma & Ba 2015) on a loss and the price of bits, through all epochs.

    `loss_of` gets the numbers of a batch's examples, of `count`.  Rates rise from zero over a share `warm` of the steps
    and fall along a cosine.  `epochs` grows by one entry after the other; `after_step` is given the loss of each batch.
    """
    side, rest = trained_parameters(model)
    groups = [{"params": rest, "lr": training.lr}, {"params": side, "lr": training.side_lr}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
    first_rates = [group["lr"] for group in optimizer.param_groups]
    for _ in range(training.epochs):
        model.train()
        total, batches = torch.zeros(()), torch.randperm(count, generator=generator).split(training.batch)
        for batch in batches:
            rising = min(1.0, (pricing.done + 1) / (warm * pricing.steps + 1))
            falling = (1 + math.cos(math.pi * pricing.done / pricing.steps)) / 2
            for group, first in zip(optimizer.param_groups, first_rates, strict=True):
                group["lr"] = first * rising * falling
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            pricing.add()
            optimizer.step()
            pricing.step()
            if after_step is not None:
                after_step(loss.detach())
            total += loss.detach()
        epochs.append(Epoch(len(epochs), float(total) / len(batches), pricing.lam, pricing.bits))
        if after_epoch is not None:
            after_epoch(epochs[-1])
    pricing.finish()


def squeeze(pricing: Pricing, budget: int, size_of: Callable[[], int], most: float = _SQUEEZED) -> None:
    """Take the last percents of a file that is hardly too large by choosing cheaper codes, the least useful first.

    The price of a bit is the least that is enough. A file of more than `most` times the budget is left alone.
    """
    if not budget < size_of() <= most * budget:
        return
    latents = pricing.latents()  # what is on its level already would move all at once, at one price

    def too_large(weight: float) -> bool:
        pricing.encode_(weight, latents)
        return size_of() > budget

    low, high = 0.0, _LEAST_WEIGHT
    while too_large(high):
        if high >= 1:
            return
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high) if low else high / 2
        low, high = (middle, high) if too_large(middle) else (low, middle)
    pricing.encode_(high, latents)


def _answers(teacher: Tensor | nn.Module, x: Tensor) -> Tensor:
    """The teacher's probabilities for every example."""
    if isinstance(teacher, nn.Module):
        was_training = teacher.training
        teacher.eval()
        with torch.no_grad():
            teacher_logits = torch.cat([teacher(part) for part in x.split(1024)])
        teacher.train(was_training)
    else:
        teacher_logits = teacher
    if teacher_logits.dim() != 2 or len(teacher_logits) != len(x):
        raise PlanError(f"the teacher gives {tuple(teacher_logits.shape)}; {len(x)} rows of logits are needed")
    return teacher_logits.softmax(1)


def trained_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of side tensors, and all others that train."""
    side = {
        id(parameter)
        for source in model.modules()
        if isinstance(source, FakeQuantize)
        for parameter in source.side.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in trained if id(p) in side], [p for p in trained if id(p) not in side]


def _size(model: nn.Module) -> int:
    return len(to_bytes(freeze(model))[0])


def heaviest(artifact: Artifact) -> str:
    """What takes most of a file that came out too large."""
    sizes = to_bytes(artifact)[1].by_tensor()
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    return "Most is taken by " + ", ".join(f"{name} ({sizes[name]} bytes)" for name in largest) + "."
