"""The two networks of LeCun et al. (1998) in the form that the compression literature measures on."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bitbook.models.mlp import MLP, mlp


class LeNet5(nn.Module):
    """LeNet-5 as Caffe ships it, 431,080 parameters, or with other numbers of units.

    Two convolutions of 5 x 5, with `first` and `second` kernels, each followed by 2 x 2 max-pooling and, as in Caffe,
    by no other nonlinearity; then `hidden` units with ReLU, and the logits. Takes images of 28 x 28, flattened or not.
    """

    def __init__(self, first: int = 20, second: int = 50, hidden: int = 500) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * 4 * 4, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch 10"]:
        x = x.reshape(-1, 28, 28, 1).movedim(3, 1)  # channels last in memory: convolutions run twice as fast on CPUs
        x = F.max_pool2d(self.conv1(x), 2)  # (batch, first, 12, 12)
        x = F.max_pool2d(self.conv2(x), 2)  # (batch, second, 4, 4)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def lenet_300_100() -> MLP:
    """Build LeNet-300-100: 266,610 parameters."""
    return mlp((784, 300, 100, 10))


def lenet_5(first: int = 20, second: int = 50, hidden: int = 500) -> LeNet5:
    """Build LeNet-5-Caffe, by default with its 431,080 parameters."""
    return LeNet5(first, second, hidden)
