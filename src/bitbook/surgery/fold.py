"""An affine change of a layer's inputs, folded into the layer: train where it is easy, deploy where the data are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitbook.errors import PlanError
from bitbook.qat import FakeQuantize
from bitbook.quantizer import FitOptions
from bitbook.slot import slots

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def fold_inputs(layer: nn.Module, scale: float, shift: float, *, options: FitOptions = FitOptions()) -> None:
    """Change `layer` so that it gives for `x` what it gave for `scale · x + shift`, exactly in its weights.

    The layer is a `Linear` or a convolution that pads nothing, with a bias.  The weight becomes `scale · W`, the bias
    `b + shift · Σ W` over the inputs of each output.  Quantized weights keep their codes: the
    float side tensors are scaled, which is exact because `scale` is a power of two.  The side tensors of
    a quantized bias are fitted anew, by `options`: its values are others now.

    Raises `PlanError` for another layer or scale.
    """
    mantissa, _ = torch.frexp(torch.tensor(abs(scale)))
    pads = isinstance(layer, _CONVOLUTIONS) and any(layer.padding)
    if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)) or pads or layer.bias is None:
        what = f"{type(layer).__name__} cannot take in a change of its inputs"
        raise PlanError(f"{what}; it must be a Linear or a convolution without padding, with a bias")
    if mantissa.item() != 0.5 or scale < 0:
        raise PlanError(f"scale={scale}: use a positive power of two, by which every float can be scaled exactly")
    moved = shift * layer.weight.double().flatten(1).sum(1)
    weight = slots(layer).get("weight")
    for value in [layer.weight] if weight is None else _values(weight):
        value.mul_(scale)
    bias = slots(layer).get("bias")
    if bias is None:
        layer.bias.add_(moved.to(layer.bias.dtype))
        return
    latent = _latent(bias)
    latent.add_(moved.to(latent.dtype))
    assert isinstance(bias, FakeQuantize)
    bias.refit_(options)


def _values(source: nn.Module) -> list[Tensor]:
    """Everything that scales with a source's weight: its latents, and those of its float side tensors."""
    latent = _latent(source)
    assert isinstance(source, FakeQuantize)
    return [latent, *(_latent(side) for side in source.side.children())]


def _latent(source: nn.Module) -> Tensor:
    if not isinstance(source, FakeQuantize) or source.latent is None:
        raise PlanError("inputs are folded into latent weights only; a layer with frozen codes has none")
    return source.latent
