"""A trained network, trained on for a short time under a price on bits, with its own answers as the lesson.

plan or artifact ──► latents, statistics shifted
inputs ──augment──┬─► teacher ─► answers ─┐
                  └─► model ───► logits ──┴─► T² · KL + λ · bits ──► normalisations absorbed ──► `dense` ──► Artifact
budget ─► sizes on the way there ─► λ up while bits are above them, down while they are below

One training reaches a budget: λ is steered, since a search over whole trainings would cost several of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, ItemsView, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from bitbook.apply import dequantize_, freeze, quantize_, quantize_dense, restore, with_dense
from bitbook.artifact import Artifact, to_bytes
from bitbook.calibration.outputs import Categorical
from bitbook.errors import BudgetError, PlanError
from bitbook.loop import IGNORED, cross_entropy
from bitbook.plan import Plan
from bitbook.qat import FakeQuantize, Regime
from bitbook.quantizer import FitOptions, Quantized
from bitbook.rate.pricing import Pricing
from bitbook.rate.training import Epoch, Trained, descend, heaviest, squeeze
from bitbook.slot import slots
from bitbook.surgery.batchnorm import absorb_statistics, fixed_statistics, normalisations, shift_statistics

Augment = Callable[[Tensor, Generator], Tensor]
"""Inputs of a batch, moved about as in the network's own training."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Of logits and targets, a mean over the batch."""

_CALIBRATION = 500  # examples on which statistics are shifted
_NEARER = (0.25, 0.5, 0.75, 1.0)  # of the way from levels back to float weights; a code may end anywhere between
_WEIGHINGS = 24  # of the file while it is trained: what it has beyond the estimate of its codes shrinks to the end
_SQUEEZED = 1.5  # times the budget: better a worse file than none after a long training
_AIM = 1.0  # of the budget: rates that fall to zero leave bits some 3 % below, and what is above is squeezed
_INTEGRAL, _PROPORTIONAL = 60.0, 15.0  # of ln λ, for each unit of ln(bits / goal): over a whole training, and at once
_DEAREST = 0.0  # ln λ: at a nat per bit nothing is worth its bits
_MOST_CHANGE = math.log(2.0)  # of what adds up, from one count to the next


@dataclass(frozen=True)
class FineTuning:
    """Adam (Kingma & Ba 2015) on a teacher's answers plus λ · bits, after a short warm-up along a cosine to zero."""

    epochs: int = 10
    batch: int = 64
    lr: float = 1e-3
    """Of weights and everything dense."""
    side_lr: float = 3e-4
    """Of side tensors that learn, such as steps."""
    warm: float = 0.05
    """Share of the training over which the rates rise from zero: Adam's first steps would undo the network."""
    temperature: float = 2.0
    """T of the teacher's answers (Hinton et al. 2015)."""
    distill: float = 1.0
    """Weight of the teacher's answers; what is left is the loss on the targets."""
    statistics: Literal["batch", "stored"] = "batch"
    """What normalisations use: the statistics of each batch, which go on into the stored ones, or these as they are."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of products (`torch.autocast`); weights and their gradients are float32 either way."""
    arrival: float = 0.5
    """Share of the training in which the bits come down to a budget."""
    ramp: float = 0.1
    """Share of the training over which a given λ rises from zero."""
    refit: int = 60
    """Steps between two counts of what codes cost."""

    def __post_init__(self) -> None:
        positive = all(v > 0 and math.isfinite(v) for v in (self.lr, self.side_lr, self.temperature))
        shares = all(0 <= v <= 1 for v in (self.warm, self.distill, self.ramp, self.arrival))
        if self.epochs < 1 or self.batch < 1 or self.refit < 1 or not positive or not shares:
            raise PlanError(f"{self}: use whole numbers from 1, positive rates and temperature, and shares from 0 to 1")
        if self.statistics not in ("batch", "stored") or self.precision not in ("float32", "bfloat16"):
            raise PlanError(f"{self}: statistics are 'batch' or 'stored', precision 'float32' or 'bfloat16'")


def finetune(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    start: Plan | Artifact | None,
    *,
    lam: float | None = None,
    budget: int | None = None,
    training: FineTuning = FineTuning(),
    teacher: nn.Module | None = None,
    dense: Plan | None = None,
    augment: Augment | None = None,
    loss: Loss = cross_entropy,
    options: FitOptions = FitOptions(),
    seed: int = 0,
    after_epoch: Callable[[Epoch], None] | None = None,
) -> Trained:
    """Train a copy of a trained `model` for a short time with a price on bits; `model` stays as it is.

    Where few bits are left, start from an artifact of about the size that is wanted, encoded with error feedback
    (`compress(…, calibration=…, lam=…)`): weights that a price alone has to move to other codes take hundreds of steps.

    Args:
        model: gives logits, `(batch, classes)` or `(batch, tokens, classes)`.
        data: inputs and targets; where targets have the logits' shape without the last axis, the teacher is not asked
            where they are `IGNORED`.
        start: a plan, as for `train`; or what `compress` made of `model`, whose weights and side tensors train on from
            where they are; or None for a model that is quantized already.
        lam: λ, loss per bit.
        budget: bytes that the file may have, instead of `lam`, which is then steered.
        training: epochs, rates, schedules.
        teacher: gives logits for the same inputs; None: `model` as it came, which must then not be quantized.
        dense: how the rest is stored in the end; normalisations are absorbed first (`absorb_statistics`), so that their
            statistics are constants.  None: as it is.
        augment: makes of a batch's inputs what model and teacher see.
        loss: on the targets, where the teacher's answers have not all the weight.
        options: how side tensors are first found.
        seed: of the order of examples, of `augment`, and of k-means.
        after_epoch: called after each epoch.

    Raises:
        PlanError: neither or both of `lam` and `budget` are given, nothing can be priced, or there is no example.
        BudgetError: the file came out larger than `budget`; the message says by how much, and why.
    """
    if (lam is None) == (budget is None):
        raise PlanError("give either lam, the price of a bit, or budget, the bytes that the file may have")
    if lam is not None and not (lam >= 0 and math.isfinite(lam)):
        raise PlanError(f"lam={lam}: use a finite price, zero or more")
    if not len(data[0]):
        raise PlanError("there is no example to train on")
    # Before weights are quantized, so that a model that is not yet may teach itself.
    teacher = copy.deepcopy(model if teacher is None else teacher).eval().requires_grad_(False)
    plain, generator = dequantize_(copy.deepcopy(model)), Generator().manual_seed(seed)
    tuned = started(model, start, options, generator, dense)
    examples = data[0][:_CALIBRATION]
    shift_statistics(tuned, model, examples if augment is None else augment(examples, generator))

    def finish() -> Artifact:
        return _finished(freeze(tuned), copy.deepcopy(plain), dense)

    def size() -> int:
        return len(to_bytes(finish())[0])

    steps = training.epochs * math.ceil(len(data[0]) / training.batch)
    ramp = training.ramp if budget is None else 0.0
    pricing = Pricing(tuned, lam or 0.0, steps=steps, ramp=ramp, smooth=0.0, refit=training.refit)
    steering = None if budget is None else _Steering(pricing, budget, training, size)
    epochs = _run(tuned, teacher, data, training, pricing, steering, augment, loss, generator, after_epoch)
    if budget is not None:
        squeeze(pricing, budget, size, _SQUEEZED)
    artifact = finish()
    result = Trained(artifact, tuned, pricing.lam, tuple(epochs), len(to_bytes(artifact)[0]))
    if budget is not None and result.bytes > budget:
        raise BudgetError(
            f"no file of {budget} bytes after {len(epochs)} epochs; it has {result.bytes}, at λ {result.lam:.2g}. "
            f"{heaviest(artifact)} Plan larger steps or a quantizer for what is dense, or train longer"
        )
    return result


@torch.no_grad()
def started(
    model: nn.Module,
    start: Plan | Artifact | None,
    options: FitOptions,
    generator: Generator,
    dense: Plan | None = None,
) -> nn.Module:
    """A copy of the model with latents, quantized as `start` says; what `dense` is about trains as floats."""
    latent, tuned = Regime(codes="latent"), copy.deepcopy(model)
    if isinstance(start, Plan):
        quantize_(tuned, start, options=options, regime=latent, generator=generator)
    if not isinstance(start, Artifact):
        return tuned
    floats = {name: tensor.detach().clone() for name, tensor in dequantize_(tuned).named_parameters()}
    tuned = restore(start, tuned)
    stored = {
        name: tensor
        for name, tensor in start.tensors.items()
        if isinstance(tensor, Quantized) and name in floats and not (dense is not None and dense.names(name))
    }
    plan = Plan({name: tensor.recipe for name, tensor in stored.items()})
    quantize_(tuned, plan, options=FitOptions(iterations=0), regime=latent, generator=generator)
    for prefix, module in tuned.named_modules():
        for attribute, source in slots(module).items():
            name = f"{prefix}.{attribute}" if prefix else attribute
            if isinstance(source, FakeQuantize) and name in stored:
                _take(source, stored[name], name)
                if name in floats:
                    _loosen(source, stored[name], floats[name])
    return tuned


def _loosen(source: FakeQuantize, stored: Quantized, w: Tensor) -> None:
    """Let latents be as near to the float weights as they may be with the codes that are stored.

    On their levels, all of them would be half a step from any other code, hundreds of steps of training away.
    """
    latent, shape = cast(Tensor, source.latent), stored.shape
    (spec, *others) = stored.recipe.layout(shape)
    if others or spec.states or math.prod(spec.grid) != latent.numel():  # codes are not of one weight each
        return
    side, codes, level = source.side_values(), stored.codes[spec.name], latent.clone()
    for share in _NEARER:
        nearer = level + share * (w.float() - level)
        kept = (stored.recipe.encode(nearer, side)[spec.name] == codes).reshape(shape)
        latent.copy_(torch.where(kept, nearer, latent))


def _take(source: FakeQuantize, stored: Quantized, name: str) -> None:
    """Let the side tensors be those that are stored."""
    for child, below in cast(ItemsView[str, FakeQuantize], source.side._modules.items()):
        value = stored.side[child].decode()
        if below.latent is None or below.latent.shape != value.shape:
            raise PlanError(f"{name}: {child} of {stored.recipe!r} cannot be trained on from a file; start from a plan")
        below.latent.copy_(value)
        _take(below, stored.side[child], name)


class _Steering:
    """λ from step to step so that bits follow a path from where they begin to the budget, and stay there.

    The path is straight in the logarithm of bits.  λ answers to what bits are above it: what has added up, since sizes
    follow a price slowly, and what there is now, so that they do not overshoot.
    """

    def __init__(self, pricing: Pricing, budget: int, training: FineTuning, size: Callable[[], int]) -> None:
        self.pricing, self.budget, self.size = pricing, budget, size
        self.arrival, self.refit = max(training.arrival, training.refit / pricing.steps), training.refit
        self.first = max(pricing.bits, 1.0)
        self.every = max(pricing.steps // _WEIGHINGS, 1)
        self.loss, self.counted = 0.0, 0
        self.integral: float | None = None
        self._weigh()

    def step(self, loss: Tensor) -> None:
        """After each step of training, with its loss."""
        done, pricing = self.pricing.done, self.pricing
        if self.integral is None:
            self.loss, self.counted = self.loss + float(loss), self.counted + 1
        if done % self.every == 0:
            self._weigh()
        if done % self.refit or pricing.bits <= 0:
            return
        if self.integral is None:  # d loss / d bits, were the loss all of rounding: it falls by 2^(-2 bits / weights)
            self.integral = math.log(max(2 * math.log(2) * self.loss / self.counted / pricing.weights, 1e-12))
        share = min(done / (self.arrival * pricing.steps), 1.0)
        goal = (1 - share) * math.log(self.first) + share * math.log(max(8 * (_AIM * self.budget - self.rest), 1.0))
        above = math.log(pricing.bits) - goal
        change = _INTEGRAL * above * self.refit / pricing.steps
        self.integral = min(self.integral + max(-_MOST_CHANGE, min(change, _MOST_CHANGE)), _DEAREST)
        pricing.lam = math.exp(min(self.integral + _PROPORTIONAL * above, _DEAREST))

    def _weigh(self) -> None:
        """Bytes of the file beyond the estimate of its codes."""
        self.rest = self.size() - self.pricing.bits / 8


def _run(
    model: nn.Module,
    teacher: nn.Module,
    data: tuple[Tensor, Tensor],
    training: FineTuning,
    pricing: Pricing,
    steering: _Steering | None,
    augment: Augment | None,
    loss: Loss,
    generator: Generator,
    after_epoch: Callable[[Epoch], None] | None,
) -> Sequence[Epoch]:
    """The training from the first step to the last."""
    x, y = data
    half = training.precision == "bfloat16"
    epochs: list[Epoch] = []

    def loss_of(batch: Tensor) -> Tensor:
        inputs, targets = x.index_select(0, batch), y.index_select(0, batch)
        if augment is not None:
            inputs = augment(inputs, generator)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            with torch.no_grad():
                answers = teacher(inputs).float() if training.distill else None
            logits = model(inputs).float()
        value = torch.zeros(())
        if answers is not None:
            value = training.distill * divergence(logits, answers, targets, training.temperature)
        if training.distill < 1:
            value = value + (1 - training.distill) * loss(logits, targets)
        return value

    with fixed_statistics(model) if training.statistics == "stored" else nullcontext():
        descend(
            model, len(x), loss_of, training, pricing, generator, epochs,
            warm=training.warm, after_step=None if steering is None else steering.step, after_epoch=after_epoch,
        )  # fmt: skip
    model.eval()
    return epochs


def divergence(
    logits: Float[Tensor, "*places classes"],
    answers: Float[Tensor, "*places classes"],
    targets: Tensor,
    temperature: float,
) -> Tensor:
    """T² · KL(teacher ‖ pupil) at temperature T, mean over the places whose target is not `IGNORED`."""
    logits, answers = logits.flatten(0, -2), answers.flatten(0, -2)
    if not targets.is_floating_point() and targets.numel() == len(logits):
        kept = targets.flatten() != IGNORED
        if not bool(kept.all()):
            logits, answers = logits[kept], answers[kept]
    found = Categorical(temperature).divergence(logits, answers)
    return temperature**2 * found.sum / max(found.predictions, 1)


def _finished(artifact: Artifact, model: nn.Module, dense: Plan | None) -> Artifact:
    """The artifact with normalisations absorbed and everything dense stored by `dense`; `model` is a plain one."""
    if dense is None:
        return artifact
    if not normalisations(model):
        return quantize_dense(artifact, dense)
    plain = restore(artifact, model)
    absorb_statistics(plain)
    return quantize_dense(with_dense(artifact, plain), dense)
