"""Batch normalisation of compressed networks: its statistics repaired, left alone by training, and stored in less.

A network that computes with other weights has other means and variances in front of every normalisation than those that
were stored, and the error grows from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from bitbook.calibration.calls import calls, evaluating, repeatable, tensors_in
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
def shift_statistics(model: nn.Module, reference: nn.Module, batches: Tensor | Iterable[Any]) -> None:
    """Add to the batch-norm statistics of `model` what its weights changed in them.

    `mean += E_model - E_reference`, and the same for the variance, of which `SMALLEST_SHARE` remains.  Both E are
    measured on the same `examples`, every normalisation using those of its batch, as if all in front of it were
    repaired already.  What is wrong with the examples (few, not moved about as in training) cancels, so a model that
    equals its reference stays as it is, which it would not if statistics were estimated anew.

    Args:
        model: the compressed network; its statistics change, in place.
        reference: the network it was made from.
        batches: inputs as `calls` takes them, without labels or with; some hundreds of examples do.

    Raises `PlanError` where the two have different normalisations, or there are no examples.
    """
    layers, others = normalisations(model), normalisations(reference)
    sizes, expected_sizes = ({n: layer.num_features for n, layer in found.items()} for found in (layers, others))
    if sizes != expected_sizes:
        different = sorted(dict(sizes.items() ^ expected_sizes.items()))
        raise PlanError(f"model and reference differ in their normalisations {', '.join(different)}")
    if not layers:
        return
    batches = repeatable(batches)
    expected, found = _measure(reference, others, batches), _measure(model, layers, batches)
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


@dataclass(frozen=True)
class Folding:
    """What `fold_` did: each normalisation that a layer took in, and why the others stayed."""

    folded: Mapping[str, str]
    """Name of a normalisation → name of its layer."""
    kept: Mapping[str, str]
    """Name of a normalisation → why it stayed."""

    def __str__(self) -> str:
        rows = [f"{name}: folded into {layer}" for name, layer in self.folded.items()]
        return "\n".join(rows + [f"{name}: kept, {reason}" for name, reason in self.kept.items()])


@torch.no_grad()
def fold_(model: nn.Module, batches: Tensor | Iterable[Any]) -> Folding:
    """Fold batch normalisations into the linear layers and convolutions before them, in place.

    `W' = W · γ / √(σ² + ε)` by output channel and `b' = β + (b - μ) · γ / √(σ² + ε)`; a layer without a bias gets one,
    and the normalisation's place is taken by an `Identity`, so that the model evaluates as before, up to rounding.

    What feeds what is seen on `batches` of the model's inputs (as `calls` takes them; one is enough, unless the model's
    way depends on its inputs): a normalisation is folded if what it normalises is the output of one layer, used by
    nothing else, and layer and weight are used once.  Every other normalisation stays, and the result says why.
    A file of a folded model loads into a folded model: call `fold_` on the fresh one, too, with any inputs.

    Raises `PlanError` where there are no inputs.

    Not a step to take before compressing: with one step for all layers, a folded ResNet-20 errs twice as much at equal
    bytes (`bench/fold.py`), because layers lose the scales by which their weights are comparable.  Keep normalisations,
    and call `absorb_statistics`.  Of a network that comes folded, leave the step open, so that it follows each layer's
    weights; scales of rows, taken out again, cost more than they gain.
    """
    watched = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    found: dict[str, str] = {}
    kept: dict[str, str] = {
        name: "it keeps no statistics, but takes those of each batch"
        for name, layer in watched.items()
        if layer.running_mean is None
    }
    ways: list[tuple[set[str], set[str]]] = []  # of each forward, the layers and the normalisations it used
    with evaluating(model):
        for args, kwargs in calls(batches):
            with _Feeds(model) as feeds:
                result = model(*args, **kwargs)
            for name in feeds.normalised:
                layer, reason = feeds.layer_before(name, result)
                if layer is None or found.setdefault(name, layer) != layer:
                    kept.setdefault(name, reason or "its inputs come from several layers")
            ways.append((set(feeds.runs), set(feeds.normalised)))
    if not ways:
        raise PlanError("there are no inputs to see what feeds what; pass at least one batch of the model's inputs")
    for name, layer in found.items():
        if any(layer in layers and name not in norms for layers, norms in ways):
            kept.setdefault(name, f"{layer} is also used without it")
    folded = {name: layer for name, layer in found.items() if name not in kept}
    for name, layer in folded.items():
        _fold_into(model.get_submodule(layer), watched[name])
        for module in model.modules():
            for child, value in module._modules.items():
                if value is watched[name]:
                    module._modules[child] = nn.Identity().train(watched[name].training)
    kept.update({name: "no input reaches it" for name in watched if name not in folded and name not in kept})
    return Folding(folded, kept)


def _fold_into(layer: nn.Module, normalisation: _BatchNorm) -> None:
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    mean, variance = (value.double() for value in _statistics(normalisation))
    scale = (variance + normalisation.eps).rsqrt()
    if normalisation.weight is not None:
        scale = scale * normalisation.weight.double()
    moved = (0 if bias is None else bias.double()) - mean
    moved = moved * scale + (0 if normalisation.bias is None else normalisation.bias.double())
    if isinstance(layer, _ConvTransposeNd):  # (inputs, outputs of each group, …), groups lying along the inputs
        inputs = len(weight) // layer.groups
        along = scale.reshape(layer.groups, 1, -1).expand(-1, inputs, -1).reshape(len(weight), -1)
        along = along.reshape(*along.shape, *[1] * (weight.dim() - 2))
    else:
        along = scale.reshape(-1, *[1] * (weight.dim() - 1))
    weight.copy_(weight.double() * along)
    layer.bias = nn.Parameter(moved.to(weight.dtype), requires_grad=weight.requires_grad)


_LAYERS = (
    F.linear, torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
)  # fmt: skip
_LOOKS = {"__get__", "dim", "ndimension", "size", "numel", "stride", "is_floating_point", "is_contiguous", "__len__"}


class _Feeds(TorchFunctionMode):
    """Sees, while it is entered, which layer's output each normalisation takes, and what else uses that output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        places: dict[int, list[str]] = {}
        self.layers: dict[int, str] = {}
        self.channels: dict[str, int] = {}
        self.norms: dict[int, str] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append(name)
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                self.norms[id(module.running_mean)] = name
                self.channels[name] = module.num_features
            if isinstance(module, nn.Linear | _ConvNd) and module._parameters.get("weight") is not None:
                self.layers.setdefault(id(module.weight), name)
        self.tied = {name for names in places.values() if len(names) > 1 for name in names}
        self.runs: dict[str, int] = {}
        self.normalised: dict[str, list[Tensor]] = {}
        self.outputs: dict[int, tuple[str, Tensor, int | None]] = {}  # holds them, so that no id comes again
        self.users: dict[int, list[str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", repr(func))
        if name in _LOOKS and next(tensors_in(result), None) is None:
            return result
        given = list(tensors_in([args, kwargs]))
        for key in {id(tensor) for tensor in given}:
            if key in self.outputs:
                self.users.setdefault(key, []).append(name)
        if func is F.batch_norm:
            norm = next((self.norms[id(tensor)] for tensor in given if id(tensor) in self.norms), None)
            if norm is not None:
                self.normalised.setdefault(norm, []).append(given[0] if not args else args[0])
        for layer in {self.layers[id(tensor)] for tensor in given if id(tensor) in self.layers}:
            self.runs[layer] = self.runs.get(layer, 0) + 1
            if func in _LAYERS:
                weight = next(tensor for tensor in given if self.layers.get(id(tensor)) == layer)
                batched = result.dim() == weight.dim()
                self.outputs[id(result)] = (layer, result, result.shape[1] if batched else None)
        return result

    def layer_before(self, norm: str, returned: Any) -> tuple[str | None, str]:
        """The layer that can take a normalisation in, or None and the reason."""
        inputs = self.normalised[norm]
        if len(inputs) > 1:
            return None, "it is used several times"
        if id(inputs[0]) not in self.outputs:
            return None, "what it normalises is no output of a linear layer or a convolution with a weight of its own"
        layer, output, channels = self.outputs[id(inputs[0])]
        others = [name for name in self.users[id(output)] if name != "batch_norm"]
        if any(tensor is output for tensor in tensors_in(returned)):
            others.append("the model's result")
        if others or len(self.users[id(output)]) > 1:
            return None, f"the output of {layer} is also used by {', '.join(others) or 'another normalisation'}"
        if self.runs[layer] > 1 or layer in self.tied:
            return None, f"the weight of {layer} is used several times"
        if channels != self.channels[norm]:
            return None, f"its channels are not those of {layer}"
        return layer, ""


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


def _measure(model: nn.Module, layers: dict[str, _BatchNorm], batches: Iterable[Any]) -> dict[str, Moments]:
    """The moments of every normalisation's input, mean over examples; the model stays as it is."""
    totals = {name: Moments(*torch.zeros(2, layer.num_features)) for name, layer in layers.items()}
    seen = dict.fromkeys(layers, 0)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, layer in layers.items():

            def normalise(module: _BatchNorm, inputs: tuple[Tensor], output: Tensor, name=name) -> Tensor:
                (x,) = inputs
                if x.numel() == x.shape[1]:  # one value has no variance
                    return output
                across = [axis for axis in range(x.dim()) if axis != 1]
                variance, mean = torch.var_mean(x, across, correction=0)
                totals[name].mean.add_(mean, alpha=len(x))
                totals[name].variance.add_(variance, alpha=len(x))
                seen[name] += len(x)
                return F.batch_norm(x, None, None, module.weight, module.bias, True, 0.0, module.eps)

            stack.callback(layer.register_forward_hook(normalise).remove)
        forwards = 0
        for args, kwargs in calls(batches, _BATCH):
            model(*args, **kwargs)
            forwards += 1
    if not forwards:
        raise PlanError("statistics are measured on examples; there are none")
    return {
        name: Moments(mean / max(seen[name], 1), variance / max(seen[name], 1))
        for name, (mean, variance) in totals.items()
    }
