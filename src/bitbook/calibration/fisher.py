"""Diagonal Fisher information: how fast predictions part from what they were, for a squared error of each weight.

    model ──► outputs ──labels drawn from them──► loss ──backward──► g        F = Σ g² / predictions

Moving the weights by e takes the predictions ½ Σ F e² nats away, to second order and if errors do not add up
(Amari 1998; LeCun, Denker & Solla 1990 use it to prune).  Any parameter has one, whatever layer it is in and however
often it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from bitbook.calibration.calls import Call, calls, evaluating
from bitbook.calibration.outputs import Categorical, Outputs, tensor_of
from bitbook.errors import PlanError

_TOGETHER = 8
"""Examples of a backward pass.  Drawn labels make gradients independent, with a mean of zero, so that the square of a
sum has the sum of the squares as its mean; few at a time are more draws of it."""


def fisher_diagonal(
    model: nn.Module,
    batches: Tensor | Iterable[Any],
    *,
    outputs: Outputs = Categorical(),
    generator: Generator | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """Estimate the Fisher information's diagonal of every parameter, per prediction, by its first name.

    The model evaluates, and stays as it is.  Labels are drawn from its own predictions, not taken from the data: with
    those it would be another matrix, and vanish where the model fits them (Kunstner, Hennig & Balles 2019).

    Args:
        model: any module.
        batches: inputs of the model, see `calls`.
        outputs: what its outputs mean.
        generator: draws the labels.

    Integer parameters get zeros.  Raises `PlanError` where there are no inputs, or gradients are missing or not finite.
    """
    generator = generator or Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    moving = {name: parameter for name, parameter in parameters.items() if parameter.is_floating_point()}
    if not moving:
        raise PlanError("the model has no floating-point parameters")
    asked = {name: parameter.requires_grad for name, parameter in parameters.items()}
    found = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    predictions = 0
    try:
        for parameter in moving.values():
            parameter.requires_grad_()
        with evaluating(model), torch.enable_grad():
            for call in calls(batches, _TOGETHER):
                for part in _parts(call):
                    loss, count = outputs.drawn(tensor_of(model(*part.args, **part.kwargs)), generator)
                    if not loss.requires_grad:
                        raise PlanError(
                            "the model's outputs have no gradient; look for no_grad or detach in its forward"
                        )
                    gradients = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
                    for name, gradient in zip(moving, gradients, strict=True):
                        if gradient is not None:
                            found[name] += gradient.float().square()
                    predictions += count
    finally:
        for name, parameter in moving.items():
            parameter.requires_grad_(asked[name])
    if not predictions:
        raise PlanError("there are no calibration inputs; pass at least one batch of the model's inputs")
    for name, square in found.items():
        square /= predictions
        if not square.isfinite().all():
            raise PlanError(f"{name}: its gradient is not finite on the calibration inputs; look for such inputs")
    return found


def _parts(call: Call) -> Iterator[Call]:
    """A few examples at a time, where all arguments are tensors of as many examples."""
    values = [*call.args, *call.kwargs.values()]
    sizes = {len(value) if isinstance(value, Tensor) and value.dim() else -1 for value in values}
    if len(sizes) != 1 or max(sizes) <= _TOGETHER:
        yield call
        return
    for at in range(0, max(sizes), _TOGETHER):
        kwargs = {name: value[at : at + _TOGETHER] for name, value in call.kwargs.items()}
        yield Call(tuple(value[at : at + _TOGETHER] for value in call.args), kwargs)
