"""Batch normalisation of compressed networks: its statistics repaired, left alone by training, and stored in less.

A network that computes with other weights has other means and variances in front of every normalisation than those that
were stored, and the error grows from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitbook.errors import PlanError

SMALLEST_SHARE = 0.3
"""Of a stored variance: what remains of it at least, however much smaller the weights made it."""

_CONSTANT = 1e-3  # of ε: a variance that small is none
_BATCH = 125  # examples that are looked at together


class Moments(NamedTuple):
    """Mean and variance by channel of what one normalisation sees."""

    mean: Float[Tensor, " channels"]
    variance: Float[Tensor, " channels"]


@torch.no_grad()
def shift_statistics(model: nn.Module, reference: nn.Module, examples: Tensor) -> None:
    """Add to the batch-norm statistics of `model` what its weights changed in them.

    `mean += E_model - E_reference`, and the same for the variance, of which `SMALLEST_SHARE` remains.  Both E are
    measured on the same `examples`, every normalisation using those of its batch, as if all in front of it were
    repaired already.  What is wrong with the examples (few, not moved about as in training) cancels, so a model that
    equals its reference stays as it is, which it would not if statistics were estimated anew.

    Args:
        model: the compressed network; its statistics change, in place.
        reference: the network it was made from.
        examples: (n, …) inputs without labels; some hundreds do.

    Raises `PlanError` where the two have different normalisations, or there are no examples.
    """
    if not len(examples):
        raise PlanError("statistics are measured on examples; there are none")
    layers, others = normalisations(model), normalisations(reference)
    sizes, expected_sizes = ({n: layer.num_features for n, layer in found.items()} for found in (layers, others))
    if sizes != expected_sizes:
        different = sorted(dict(sizes.items() ^ expected_sizes.items()))
        raise PlanError(f"model and reference differ in their normalisations {', '.join(different)}")
    if not layers:
        return
    expected, found = _measure(reference, others, examples), _measure(model, layers, examples)
    for name, layer in layers.items():
        mean, variance = _statistics(layer)
        mean += found[name].mean - expected[name].mean
        shifted = variance + (found[name].variance - expected[name].variance)
        torch.maximum(shifted, SMALLEST_SHARE * variance, out=variance)


@torch.no_grad()
def absorb_statistics(model: nn.Module) -> None:
    """Turn every normalisation's four vectors into two: means become 0, variances 1, and weight and bias take them in.

    `γ' = γ · √(1 + ε) / √(σ² + ε)` and `β' = β - γ · μ / √(σ² + ε)`, so that the network evaluates as before, up to
    rounding.  Constants cost a file nothing that stores them as codes.  A constant channel, as zero weights leave it,
    gets γ' = 0 and β' = β: a γ' hundreds of times those of others would leave them no steps of a common scale.

    Raises `PlanError` for a normalisation whose weight or bias is no plain parameter.
    """
    for name, layer in normalisations(model).items():
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        mean, variance = _statistics(layer)
        if weight is None or bias is None:
            raise PlanError(f"{name} has no weight and bias of its own that could take its statistics in")
        deviation = (variance.double() + layer.eps).sqrt()
        weight.masked_fill_(variance < _CONSTANT * layer.eps, 0)
        bias -= (weight * mean / deviation).to(bias.dtype)
        weight *= ((1 + layer.eps) ** 0.5 / deviation).to(weight.dtype)
        mean.zero_()
        variance.fill_(1)


@contextmanager
def fixed_statistics(model: nn.Module) -> Iterator[None]:
    """Within this context, normalisations use their stored statistics and keep them, in training too."""
    with ExitStack() as stack:
        for layer in normalisations(model).values():
            handle = layer.register_forward_pre_hook(lambda module, _: module.eval() and None)
            stack.callback(handle.remove)
        yield


def normalisations(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalisations of a model that keep statistics, by name, in the order of the model's definition."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {name: layer for name, layer in found.items() if layer.running_mean is not None}


def _statistics(layer: _BatchNorm) -> Moments:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return Moments(layer.running_mean, layer.running_var)


def _measure(model: nn.Module, layers: dict[str, _BatchNorm], examples: Tensor) -> dict[str, Moments]:
    """The moments of every normalisation's input, mean over batches; the model stays as it is."""
    totals = {name: Moments(*torch.zeros(2, layer.num_features)) for name, layer in layers.items()}
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        stack.callback(lambda: [setattr(module, "training", mode) for module, mode in modes.items()])
        model.eval()
        for name, layer in layers.items():
            mean, variance = totals[name]

            def normalise(module: _BatchNorm, inputs: tuple[Tensor], _: Tensor, mean=mean, variance=variance) -> Tensor:
                (x,) = inputs
                share = len(x) / len(examples)
                across = [axis for axis in range(x.dim()) if axis != 1]
                of_batch = torch.var_mean(x, across, correction=0)
                variance.add_(of_batch[0], alpha=share)
                mean.add_(of_batch[1], alpha=share)
                return F.batch_norm(x, None, None, module.weight, module.bias, True, 0.0, module.eps)

            stack.callback(layer.register_forward_hook(normalise).remove)
        for batch in examples.split(_BATCH):
            model(batch)
    return totals
