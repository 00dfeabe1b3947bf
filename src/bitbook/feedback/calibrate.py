"""Error feedback for a whole model: each weight encoded by what its inputs are on calibration examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from bitbook.calibration.calls import repeatable
from bitbook.calibration.importance import importance_of_rows, second_moments, survey
from bitbook.errors import NoFeedback, PlanError, WeightError
from bitbook.feedback.error_feedback import ErrorFeedback, FeedbackOptions, FeedbackReport
from bitbook.quantizer import FitOptions, Quantized, Quantizer, quantize
from bitbook.rate.encoding import quantize_priced


@torch.no_grad()
def encode_calibrated_(
    model: nn.Module,
    recipes: Mapping[str, Quantizer],
    batches: Tensor | Iterable[Any],
    *,
    lam: float = 0.0,
    feedback: FeedbackOptions = FeedbackOptions(),
    options: FitOptions = FitOptions(),
    generator: Generator | None = None,
    after_tensor: Callable[[str, FeedbackReport | str], None] | None = None,
) -> dict[str, Quantized]:
    """Quantize parameters of `model` by name, in place, in the order of their use; returns them in compressed form.

    `batches` are as `calls` takes them, and gone through once for each weight; an iterator's are kept (`repeatable`).
    Under `feedback.sequential`, each weight's inputs are those that the model gives with everything before it
    quantized; the model then runs once for each weight, as far as that weight.  Otherwise it runs once.

    What no inputs are multiplied with column by column (biases, embeddings), or a recipe that encodes all columns
    together, is encoded plainly, and first; `after_tensor` gets each tensor's report, or the reason for there being
    none.  Where inputs lie along the first axis, as those of an embedding, errors weigh as `row_energies` says.  A
    weight that is tied between an embedding and a linear layer has its feedback from the linear layer's inputs: there
    every row is used at every place, and an embedding's choice of rows would not change how one row is encoded.

    With `lam`, codes are chosen for their bits, too: λ is squared error per bit of a weight whose error matters as much
    as its tensor's on average (`ErrorFeedback.average`), so that one λ suits all layers, as one step would.

    Raises as `quantize` and `second_moments`, with the tensor's name.
    """
    batches = repeatable(batches)
    parameters = {name: model.get_parameter(name) for name in recipes}
    seen = survey(model, batches, list(recipes))
    encoded: dict[str, Quantized] = {}

    def encode_one(name: str, encoder: ErrorFeedback | None, reason: str = "") -> None:
        recipe, weight = recipes[name], parameters[name]
        price = lam * (1.0 if encoder is None else encoder.average)
        importance = None
        if encoder is None and name in seen.rows:
            importance = importance_of_rows(seen.rows[name], tuple(weight.shape))
            reason += "; errors weigh as each row's inputs do"
        try:
            encode = partial(quantize_priced, lam=price) if lam else quantize
            encoded[name] = encode(
                recipe, weight, encoder=encoder, importance=importance, options=options, generator=generator
            )
        except NoFeedback as error:
            return encode_one(name, None, str(error))
        except (PlanError, WeightError) as error:
            raise type(error)(f"{name}: {error}") from error
        parameters[name].copy_(encoded[name].decode())
        if after_tensor is not None:
            report = None if encoder is None else encoder.report
            after_tensor(name, f"no error feedback: {reason}" if report is None else report)

    for name in recipes:
        if name not in seen.columns:
            encode_one(name, None, seen.others.get(name, "no calibration input reaches it"))
    together = {} if feedback.sequential else second_moments(model, batches, list(seen.columns))
    for name, count in seen.columns.items():
        moments = together.get(name)
        if moments is None:
            moments = second_moments(model, batches, [name], first_use=count == seen.forwards)[name]
        encode_one(name, ErrorFeedback(moments, feedback))
    return {name: encoded[name] for name in recipes}
