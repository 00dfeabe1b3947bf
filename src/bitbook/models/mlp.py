"""Multi-layer perceptrons with ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bitbook.errors import PlanError


class MLP(nn.Module):
    """Linear layers `fc1`, `fc2`, … with ReLU between them; the last one gives the logits.

    Args:
        sizes: features of the input, of each hidden layer, and number of classes.

    Raises `PlanError` for fewer than two sizes, or one below 1.
    """

    def __init__(self, sizes: Sequence[int]):
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise PlanError(f"an MLP needs two or more sizes of at least 1, but got {tuple(sizes)}")
        self.sizes = tuple(sizes)
        for i, (features, outputs) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"fc{i}", nn.Linear(features, outputs))

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch classes"]:
        last = len(self.sizes) - 1
        layers: dict[str, Any] = self._modules  # as attributes, they would take a tenth of a small call to find
        x = x.flatten(1)
        for i in range(1, last):
            x = F.relu(layers[f"fc{i}"](x))
        return layers[f"fc{last}"](x)


def mlp(sizes: Sequence[int] = (784, 128, 64, 10)) -> MLP:
    """Build an MLP; the default is the network of the MNIST study, (784, 300, 100, 10) is LeNet-300-100."""
    return MLP(sizes)
