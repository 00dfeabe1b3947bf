"""`bitbook.compress`: by a plan, or to a budget of bytes, of bits per weight, or of accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from glob import escape
from typing import Any, TypeGuard, cast

import torch
from torch import Generator, Tensor, nn

from bitbook.apply import compress_by_plan
from bitbook.artifact import Artifact
from bitbook.artifact.write import to_bytes
from bitbook.budget.candidates import Kind
from bitbook.budget.fit import Fit, FitSettings, Fitted, Progress
from bitbook.budget.report import Choice, Repair
from bitbook.calibration.calls import KEPT, Call, calls, tensors_in
from bitbook.errors import BudgetError, PlanError
from bitbook.feedback.error_feedback import FeedbackOptions, FeedbackReport
from bitbook.loop import Training, evaluate
from bitbook.plan import Plan
from bitbook.qat import Regime
from bitbook.quantizer import FitOptions, Quantized
from bitbook.rate import finetuning
from bitbook.rate.finetuning import Augment, FineTuning
from bitbook.scalar.ecsq import ECSQ
from bitbook.scalar.uniform import Uniform

TRAINABLE = {"scalar": Kind(ECSQ(), priced=True)}
"""What matrices may be stored as where a training with a price on bits follows."""
_VECTORS = Uniform(6, symmetric=False)  # of what fine-tuning leaves dense
CALIBRATION = 512
"""Examples that a model is measured on where the data have more; of sequences fewer, down to `_FEWEST`."""
_PLACES, _FEWEST = 1 << 15, 64  # predictions that are enough
VALIDATION = 5000
"""Examples, others, on which an accuracy is kept."""

Data = tuple[Tensor, Tensor] | Tensor | Iterable[Any]


def compress(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    budget: int | None = None,
    bits: float | None = None,
    max_drop: float | None = None,
    data: Data | None = None,
    finetune: FineTuning | None = None,
    training: Training | None = None,
    options: FitOptions = FitOptions(),
    regime: Regime = Regime(),
    calibration: Tensor | Iterable[Any] | None = None,
    lam: float = 0.0,
    feedback: FeedbackOptions = FeedbackOptions(),
    after_tensor: Callable[[str, FeedbackReport | str], None] | None = None,
    seed: int = 0,
) -> Artifact:
    """Compress a copy of `model` by a plan, or to a budget; `save` writes the result, and `model` stays as it is.

    With a plan, `data` are `(inputs, labels)`; see `compress_by_plan` for what it takes besides.  Without one, `budget`
    (bytes of the file), `bits` (of the whole file, per parameter) or `max_drop` (percentage points of accuracy) say
    what is wanted, and `data` are calibration inputs of any kind; see `fit_budget`, which also says what was chosen
    and why.

    Raises `PlanError` where neither or both of plan and budget are given, and as those two do.
    """
    wanted = {"budget": budget, "bits": bits, "max_drop": max_drop}
    if plan is None:
        if data is None:
            raise PlanError("a budget is fitted to calibration data; pass data, or a plan")
        others = (training, calibration, after_tensor)
        if (
            any(other is not None for other in others)
            or lam
            or options != FitOptions()
            or regime != Regime()
            or feedback != FeedbackOptions()
        ):
            raise PlanError("training, calibration, lam and other options of a plan go with one; pass a plan")
        return fit_budget(model, data, **wanted, finetune=finetune, seed=seed).artifact
    if any(value is not None for value in wanted.values()) or finetune is not None:
        raise PlanError("a plan says what becomes of each tensor; leave out the budget, or the plan")
    if data is not None and not _labelled(data):
        raise PlanError("with a plan, data are (inputs, labels), two tensors; other inputs are passed as calibration")
    return compress_by_plan(
        model,
        plan,
        data=data,
        training=training,
        options=options,
        regime=regime,
        calibration=calibration,
        lam=lam,
        feedback=feedback,
        after_tensor=after_tensor,
        seed=seed,
    )


def fit_budget(
    model: nn.Module,
    data: Data,
    *,
    budget: int | None = None,
    bits: float | None = None,
    max_drop: float | None = None,
    finetune: FineTuning | None = None,
    augment: Augment | None = None,
    settings: FitSettings = FitSettings(),
    progress: Progress | None = None,
    seed: int = 0,
) -> Fitted:
    """Find the best file for a budget: how each tensor is stored follows from what its errors do to the predictions.

    Candidates for each tensor (trellis, scalar, vectors, residual, float, …) are really coded and their loss predicted
    (`budget/`); a knapsack chooses, error feedback encodes, repairs are kept where they help.

    Args:
        model: any trained module; stays as it is.
        data: inputs of the model: `(inputs, labels)`, two tensors, of which a few hundred examples are drawn; a tensor;
            or batches of any kind that `calls` takes, such as a data loader, of which the first hundreds are taken.
        budget: bytes of the whole file.
        bits: the same, as bits per parameter of the model.
        max_drop: percentage points of accuracy that may be lost on examples of `data` that were not calibrated on;
            the smallest file that was found is returned.
        finetune: train for a short time afterwards, taught by the float model; needs a budget and labels.
        augment: of fine-tuning, see `bitbook.finetune`.
        settings: what may be chosen.
        progress: called now and then.
        seed: draws examples, labels and codewords.

    Returns the artifact and a report: what was chosen for each tensor and why.  Where no file is as small as the
    budget, it is the smallest that could be made, and `report.reached` is False.

    Raises `PlanError` where not exactly one of `budget`, `bits` and `max_drop` is given or the data do not serve.
    """
    if sum(value is not None for value in (budget, bits, max_drop)) != 1:
        raise PlanError("give one of budget (bytes), bits (per parameter) and max_drop (points of accuracy)")
    if bits is not None:
        if not (bits > 0 and math.isfinite(bits)):
            raise PlanError(f"bits={bits}: use a positive number of bits per parameter, such as 2.5")
        budget = int(bits * sum(parameter.numel() for parameter in model.parameters()) / 8)
    if budget is not None and (type(budget) is not int or budget < 1):
        raise PlanError(f"budget={budget!r}: use a whole number of bytes")
    if max_drop is not None and not 0 <= max_drop < 100:
        raise PlanError(f"max_drop={max_drop}: use percentage points of accuracy, such as 0.5")
    batches = _calibration(data, seed)
    if finetune is not None:
        if budget is None or not _labelled(data):
            raise PlanError("fine-tuning needs a budget (or bits) and data=(inputs, labels)")
        return _finetuned(model, data, batches, budget, finetune, augment, settings, progress, seed)
    fit = Fit(model, batches, settings, seed=seed, progress=progress)
    if budget is not None:
        return fit.to_size(budget)
    if not _labelled(data) or len(data[0]) <= CALIBRATION:
        raise PlanError(f"max_drop keeps an accuracy; pass data=(inputs, labels), more than {CALIBRATION} examples")
    first = _enough(data[0])
    held = _drawn(len(data[0]), seed)[first : first + VALIDATION]
    x, y = data[0][held], data[1][held]
    least = evaluate(fit.reference, x, y).accuracy - cast(float, max_drop)
    return fit.within(lambda compressed: evaluate(compressed, x, y).accuracy >= least)


def _finetuned(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    batches: Iterable[Any],
    budget: int,
    finetune: FineTuning,
    augment: Augment | None,
    settings: FitSettings,
    progress: Progress | None,
    seed: int,
) -> Fitted:
    """Fitted without training first, in scalars, which can be priced; of both files the better one."""
    plain = Fit(model, batches, settings, seed=seed, progress=progress)
    fitted = plain.to_size(budget)
    if not fitted.report.choices:  # the budget holds the model as it is
        return fitted
    trainable = replace(settings, matrices=TRAINABLE, trust=plain.trust)
    began = Fit(model, batches, trainable, seed=seed, progress=progress).to_size(budget, rounds=1).artifact
    parameters = dict(model.named_parameters())
    start = matrices_alone(model, began)
    dense = Plan(
        {
            escape(name): _VECTORS if name in parameters else tensor.recipe
            for name, tensor in began.tensors.items()
            if isinstance(tensor, Quantized) and isinstance(start.tensors[name], Tensor)
        }
    )
    try:
        tuned = finetuning.finetune(
            model, data, start, budget=budget, training=finetune, dense=dense, augment=augment, seed=seed
        ).artifact
    except BudgetError:
        return fitted
    divergence = plain.divergence(plain.restored(tuned))
    repair = Repair("fine-tuning", fitted.report.divergence, divergence)
    report = replace(fitted.report, repairs=(*fitted.report.repairs, repair))
    if fitted.report.reached and not repair.kept:
        return Fitted(fitted.artifact, report)
    ledger = to_bytes(tuned)[1]
    choices = tuple(
        Choice(name, "fine-tuned", stored.recipe, math.prod(stored.shape), size, 0.0, {})
        for name, stored in tuned.tensors.items()
        if isinstance(stored, Quantized) and (size := ledger.by_tensor().get(name, 0)) and name in parameters
    )
    report = replace(report, size=ledger.total, reached=True, divergence=repair.after, choices=choices, dense={})
    return Fitted(tuned, report)


def matrices_alone(model: nn.Module, fitted: Artifact) -> Artifact:
    """Of a fitted file the matrices, to train on from; everything else as `model` has it."""
    floats = model.state_dict()
    wide = {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    tensors = {name: tensor if name in wide else floats[name] for name, tensor in fitted.tensors.items()}
    return Artifact(tensors, fitted.inputs, fitted.aliases)


def _labelled(data: Data | None) -> TypeGuard[tuple[Tensor, Tensor]]:
    return isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)


def _drawn(count: int, seed: int) -> Tensor:
    """Examples in an order of their own."""
    return torch.randperm(count, generator=Generator().manual_seed(seed))


def _calibration(data: Data, seed: int) -> Iterable[Any]:
    """A few hundred examples."""
    inputs = data[0] if _labelled(data) else data
    if isinstance(inputs, Tensor) and len(inputs):
        return [inputs[_drawn(len(inputs), seed)[: _enough(inputs)]]]
    kept, examples, size = [], 0, 0
    for call in calls(data):
        kept.append(_batch(call))
        tensors = list(tensors_in(kept[-1]))
        examples += max((len(tensor) for tensor in tensors if tensor.dim()), default=0)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if examples >= CALIBRATION or size > KEPT:
            break
    if not kept:
        raise PlanError("there are no calibration inputs; pass at least one batch of the model's inputs")
    return kept


def _enough(inputs: Tensor) -> int:
    """On how many examples a model is measured: of sequences of tokens, each place is a prediction."""
    places = 1 if inputs.is_floating_point() else inputs[0].numel()
    return min(max(_PLACES // max(places, 1), _FEWEST), CALIBRATION)


def _batch(call: Call) -> Any:
    """What `calls` makes the same call of."""
    if call.kwargs:
        return call.kwargs
    return call.args  # not the tensor alone: those are joined to larger batches than a loader gave
