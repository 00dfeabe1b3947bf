"""A small convolutional network with batch normalisation: a teacher for networks without convolutions."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Three convolutions and two linear layers, 257,882 parameters; takes images of 28 x 28, flattened or not."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 24, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(48, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
        )  # fmt: skip
        self.classify = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(48 * 7 * 7, 96), nn.ReLU(), nn.Linear(96, 10)
        )

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch 10"]:
        return self.classify(self.features(x.reshape(-1, 1, 28, 28)))
