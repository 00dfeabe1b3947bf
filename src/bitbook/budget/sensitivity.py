"""What an error of each tensor does to the model's predictions.

    loss(E) ≈ ½ Σ_i r_i (E H Eᵀ)_ii        H = E[x xᵀ] of the inputs,  r_i = Σ_j F_ij / tr H

H says how errors of one row add up in its output, the Fisher information F how much that output matters: a
Kronecker-factored approximation (Martens & Grosse 2015) of which the outputs' factor is kept diagonal, so that error
feedback can lower it.  Where no H is known, ½ Σ F e² is what remains.  F of rows that inputs choose (embeddings, tied
or not) is that after one more choice of each, since other inputs will choose others: `chosen_once_more`.

That is a model of small changes, one at a time.  Where statistics of batch normalisation are repaired afterwards, or
the calibration inputs were learned by heart, equal errors of all weights may do better.  `weighted` says how far F is
trusted, and `fit.py` chooses that by what files of the model really lose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float as F32
from jaxtyping import Float64 as F64
from torch import Generator, Tensor, nn

from bitbook.blocks import matrix_shape
from bitbook.calibration.calls import repeatable
from bitbook.calibration.fisher import fisher_diagonal
from bitbook.calibration.importance import Survey, second_moments, survey
from bitbook.calibration.outputs import Categorical, Outputs
from bitbook.errors import PlanError
from bitbook.feedback.error_feedback import ErrorFeedback, FeedbackOptions
from bitbook.quantizer import Quantized

_LEAST = 1e-3
"""Of a tensor's mean weight: what a row or an element has at least, however little the calibration inputs used it."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What errors of one tensor cost, in the unit of `Outputs.divergence` per prediction."""

    fisher: F32[Tensor, "..."]
    moments: F64[Tensor, "groups cols cols"] | None
    """H of the float model's inputs; None where inputs do not tell of each other's errors."""
    rows: F64[Tensor, " rows"] | None
    """r, with H."""
    silent: bool = False
    """Whether no prediction on the calibration inputs depends on the tensor; it then has a little of the others' F."""

    def encoder(
        self, moments: Tensor | None = None, options: FeedbackOptions = FeedbackOptions()
    ) -> ErrorFeedback | None:
        """An encoder whose error is twice the loss, for the inputs of `moments` where they are others by now."""
        known = self.moments if moments is None else moments
        return None if known is None else ErrorFeedback(known, options, rows=self.rows)

    def loss(self, w: Tensor, stored: Quantized) -> float:
        """What storing `w` as this is expected to cost."""
        encoder = self.encoder()
        if encoder is not None:
            return encoder.error(w, stored) / 2
        error = (stored.decode() - w.detach().float()).double()
        return float((self.fisher.double() * error.square()).sum()) / 2

    def left_out(self, w: Tensor) -> float:
        """What leaving out the tensor would cost, if that were a small change."""
        if self.moments is None or self.rows is None:
            return float((self.fisher * w.square()).sum()) / 2
        matrix = w.double().reshape(len(self.moments), -1, self.moments.shape[1])
        outputs = ((matrix @ self.moments) * matrix).sum(2).flatten()
        return float((self.rows * outputs).sum()) / 2


def weighted(found: Mapping[str, Sensitivity], trust: float) -> dict[str, Sensitivity]:
    """Sensitivities between equal errors of all weights (`trust` 0) and what the Fisher information says (1).

    Each matrix's weights are a geometric mean of both; their scale is such that errors of one size in all weights would
    cost the same.  What has no H (biases, normalisations, embeddings) keeps its Fisher information.
    """
    if trust == 1:
        return dict(found)
    mixed = {name: _mixed(s, trust) for name, s in found.items() if s.moments is not None}
    before = sum(float(found[name].fisher.double().sum()) for name in mixed)
    after = sum(float(s.fisher.double().sum()) for s in mixed.values())
    scale = before / after if after > 0 else 1.0
    return {name: _scaled(mixed[name], scale) if name in mixed else s for name, s in found.items()}


def _mixed(sensitivity: Sensitivity, trust: float) -> Sensitivity:
    """Of one matrix, up to a factor that all have in common."""
    assert sensitivity.moments is not None
    assert sensitivity.rows is not None
    # Under a price, errors of such rows are as large in every tensor (`ErrorFeedback.average`).
    equal = 1 / max(ErrorFeedback(sensitivity.moments).average, 1e-30)
    rows = equal ** (1 - trust) * sensitivity.rows.clamp_min(1e-30) ** trust
    energies = sensitivity.moments.diagonal(dim1=1, dim2=2)[:, None]
    fisher = rows.reshape(len(sensitivity.moments), -1, 1) * energies
    return replace(sensitivity, fisher=fisher.reshape(sensitivity.fisher.shape).float(), rows=rows)


def _scaled(s: Sensitivity, scale: float) -> Sensitivity:
    return replace(s, fisher=s.fisher * scale, rows=None if s.rows is None else s.rows * scale)


def measure(
    model: nn.Module,
    batches: Tensor | Iterable[Any],
    names: Iterable[str],
    *,
    outputs: Outputs = Categorical(),
    generator: Generator | None = None,
) -> tuple[Mapping[str, Sensitivity], Survey]:
    """The sensitivity of each named parameter, and which of them error feedback reaches, in the order of their use.

    Raises `PlanError` as `fisher_diagonal` and `second_moments` do.
    """
    batches, names = repeatable(batches), list(names)
    seen = survey(model, batches, names)
    moments = second_moments(model, batches, list(seen.columns)) if seen.columns else {}
    information = fisher_diagonal(model, batches, outputs=outputs, generator=generator)
    sums = {name: float(information[name].double().sum()) for name in names}
    if names and not sum(sums.values()) > 0:
        raise PlanError(
            "no prediction on the calibration inputs depends on any weight; if the model is that sure of them, try "
            "outputs=Categorical(temperature=4), or other inputs"
        )
    mean = sum(sums.values()) / sum(information[name].numel() for name in names) if names else 0.0
    found = {}
    for name in names:
        silent = not sums[name] > 0
        fisher = torch.full_like(information[name], mean * _LEAST) if silent else information[name]
        if name in seen.choices and not silent:
            fisher = chosen_once_more(fisher, seen.choices[name])
        found[name] = replace(_sensitivity(fisher, moments.get(name)), silent=silent)
    return found, seen


def chosen_once_more(fisher: F32[Tensor, "rows ..."], choices: F64[Tensor, " rows"]) -> F32[Tensor, "rows ..."]:
    """Information of rows that inputs choose, as of an embedding, after one more choice of each (Laplace's rule).

    The information of a row adds up over its choices, so that of one never chosen is not small, it is unknown: here it
    is that of one choice, which is in each column the mean over all choices there were.
    """
    return (fisher.double() + fisher.double().sum(0) / choices.sum().clamp_min(1)).float()


def _sensitivity(fisher: Tensor, moments: Tensor | None) -> Sensitivity:
    fisher = fisher.clamp_min(float(fisher.mean()) * _LEAST)
    if moments is None:
        return Sensitivity(fisher, None, None)
    energy = moments.diagonal(dim1=1, dim2=2).sum(1)  # of each group
    of_rows = fisher.reshape(matrix_shape(tuple(fisher.shape))).double().sum(1).reshape(len(moments), -1)
    rows = torch.where(energy[:, None] > 0, of_rows / energy[:, None].clamp_min(1e-300), 0.0).flatten()
    return Sensitivity(fisher, moments, rows.clamp_min(float(rows.mean()) * _LEAST))
