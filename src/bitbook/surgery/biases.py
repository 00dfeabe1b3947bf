"""Biases of compressed networks: what other weights changed in the mean of a layer's outputs, taken back."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from bitbook.calibration.calls import calls, evaluating, repeatable
from bitbook.errors import PlanError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def correct_biases(model: nn.Module, reference: nn.Module, batches: Tensor | Iterable[Any]) -> list[str]:
    """Add to the biases of `model` what its weights took from the mean outputs of its layers (Nagel et al. 2019).

    The means of every layer that has a bias are compared on the same inputs, layer by layer within one forward, each
    seeing what the layers before it give with their corrections.  Only plain layers have biases of this kind: linear
    ones and convolutions.

    Args:
        model: the compressed network; its biases change, in place.
        reference: the network it was made from.
        batches: inputs as `calls` takes them.

    Returns the names of the corrected biases.  Raises `PlanError` where there are no inputs.
    """
    batches = repeatable(batches)
    names = [name for name, layer in model.named_modules() if isinstance(layer, _LAYERS) and layer.bias is not None]
    expected: dict[str, list[Tensor]] = {name: [] for name in names}
    totals: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
    places = dict.fromkeys(names, 0)
    forwards = 0
    with ExitStack() as stack:
        for network in (reference, model):
            stack.enter_context(evaluating(network))
        for name in names:

            def note(layer: nn.Module, _: Any, output: Tensor, name=name) -> None:
                expected[name].append(_mean(layer, output))

            def correct(layer: nn.Module, _: Any, output: Tensor, name=name) -> Tensor:
                if not expected[name]:  # the reference took another way
                    return output
                change = expected[name].pop(0) - _mean(layer, output)
                count = output.numel() // len(change)
                totals[name] = totals[name] + count * change
                places[name] += count
                channel = _channel(layer, output)
                return output + change.reshape([-1 if i == channel else 1 for i in range(output.dim())])

            stack.callback(reference.get_submodule(name).register_forward_hook(note).remove)
            stack.callback(model.get_submodule(name).register_forward_hook(correct).remove)
        for args, kwargs in calls(batches):
            for left in expected.values():
                left.clear()
            reference(*args, **kwargs)
            model(*args, **kwargs)
            forwards += 1
    if not forwards:
        raise PlanError("biases are corrected on examples; there are none")
    reached = [name for name in names if places[name]]
    for name in reached:
        bias = model.get_submodule(name).bias
        assert isinstance(bias, Tensor)
        bias += torch.as_tensor(totals[name], dtype=bias.dtype) / places[name]
    return [f"{name}.bias" for name in reached]


def _mean(layer: nn.Module, output: Tensor) -> Tensor:
    """The mean of each output channel."""
    channel = _channel(layer, output)
    return output.movedim(channel, -1).flatten(0, -2).mean(0) if output.dim() > 1 else output


def _channel(layer: nn.Module, output: Tensor) -> int:
    """The axis of a layer's output that its bias lies along."""
    if isinstance(layer, nn.Linear):
        return output.dim() - 1
    assert isinstance(layer.weight, Tensor)
    return output.dim() - layer.weight.dim() + 1  # an example alone has no axis of examples
