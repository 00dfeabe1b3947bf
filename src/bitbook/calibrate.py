"""Error feedback for a whole model: each weight encoded by what its inputs are on calibration examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Generator, Tensor, nn

from bitbook.errors import NoFeedback, PlanError, WeightError
from bitbook.feedback import ErrorFeedback, FeedbackOptions, FeedbackReport
from bitbook.importance import parameters_by_name, run, second_moments
from bitbook.quantizer import FitOptions, Quantized, Quantizer, quantize
from bitbook.rate.encoding import quantize_priced


@torch.no_grad()
def encode_calibrated_(
    model: nn.Module,
    recipes: Mapping[str, Quantizer],
    batches: Iterable[Tensor],
    *,
    lam: float = 0.0,
    feedback: FeedbackOptions = FeedbackOptions(),
    options: FitOptions = FitOptions(),
    generator: Generator | None = None,
    after_tensor: Callable[[str, FeedbackReport | str], None] | None = None,
) -> dict[str, Quantized]:
    """Quantize parameters of `model` by name, in place, in the order of their use; returns them in compressed form.

    Under `feedback.sequential`, each weight's inputs are those that the model gives with everything before it
    quantized; the model then runs once for each weight, as far as that weight.  Otherwise it runs once.
    What no linear layer or convolution uses (biases, embeddings), or a recipe that encodes all columns together, is
    encoded plainly, and first; `after_tensor` gets each tensor's report, or the reason for there being none.

    With `lam`, codes are chosen for their bits, too: λ is squared error per bit of a weight whose error matters as much
    as its tensor's on average (`ErrorFeedback.average`), so that one λ suits all layers, as one step would.

    Raises as `quantize` and `second_moments`, with the tensor's name.
    """
    batches = list(batches)
    parameters = {name: model.get_parameter(name) for name in recipes}
    uses, forwards = _uses(model, batches, list(recipes))
    encoded: dict[str, Quantized] = {}

    def encode_one(name: str, encoder: ErrorFeedback | None, reason: str = "") -> None:
        recipe, weight = recipes[name], parameters[name]
        price = lam * (1.0 if encoder is None else encoder.average)
        try:
            encode = partial(quantize_priced, lam=price) if lam else quantize
            encoded[name] = encode(recipe, weight, encoder=encoder, options=options, generator=generator)
        except NoFeedback as error:
            return encode_one(name, None, str(error))
        except (PlanError, WeightError) as error:
            raise type(error)(f"{name}: {error}") from error
        parameters[name].copy_(encoded[name].decode())
        if after_tensor is not None:
            report = None if encoder is None else encoder.report
            after_tensor(name, f"no error feedback: {reason}" if report is None else report)

    for name in recipes:
        if name not in uses:
            encode_one(name, None, "no calibration input reaches it through a linear layer or a convolution")
    together = {} if feedback.sequential else second_moments(model, batches, list(uses))
    for name, count in uses.items():
        moments = together.get(name)
        if moments is None:
            moments = second_moments(model, batches, [name], first_use=count == forwards)[name]
        encode_one(name, ErrorFeedback(moments, feedback))
    return {name: encoded[name] for name in recipes}


def _uses(model: nn.Module, batches: Iterable[Tensor], names: list[str]) -> tuple[dict[str, int], int]:
    """How often each parameter is used, in the order of first use, and how many forwards that took."""
    uses: dict[str, int] = {}

    def count(name: str, weight: Tensor, patches: Iterator[Tensor]) -> None:
        uses[name] = uses.get(name, 0) + 1

    forwards = run(model, batches, parameters_by_name(model, names), count)
    if not forwards:
        raise PlanError("there are no calibration inputs; pass at least one batch of the model's inputs")
    return uses, forwards
