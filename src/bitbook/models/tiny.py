"""The image classifier of MLPerf Tiny (Banbury et al. 2021), which was trained with Keras."""

from __future__ import annotations

import os

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bitbook.data.cifar import DEVIATION, MEAN
from bitbook.models.pretrained import Weights, load_weights

_EPS = 1e-3  # Keras' own

RESNET_8 = Weights(
    "resnet8_cifar10.safetensors",
    "the weights of mlcommons/tiny's image classification (Apache-2.0), in PyTorch's layout",
    "577ec8a137509e9e7a6ee93dc77a4cc4462bb3fd56feeeefd24f6a7f716914b5",
)


class ResNet8(nn.Module):
    """MLPerf Tiny's ResNet-8 for CIFAR-10, 78,186 parameters, layers named as in the Keras original.

    It was trained on pixels from 0 to 255, but takes images as `load_cifar10` normalises them, and undoes that itself,
    so that one data set serves all networks.  Images are 3 x 32 x 32, flattened or not.

    Unlike `ResNet(8)`, convolutions have biases, the shortcuts of the second and third stage are convolutions, and
    where a stride is 2, Keras pads below and to the right only.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)  # not in any file
        self.conv2d = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2d_1 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv2d_2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv2d_3 = nn.Conv2d(16, 32, 3, stride=2)
        self.conv2d_4 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv2d_5 = nn.Conv2d(16, 32, 1, stride=2)
        self.conv2d_6 = nn.Conv2d(32, 64, 3, stride=2)
        self.conv2d_7 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv2d_8 = nn.Conv2d(32, 64, 1, stride=2)
        self.batch_normalization = nn.BatchNorm2d(16, _EPS)
        self.batch_normalization_1 = nn.BatchNorm2d(16, _EPS)
        self.batch_normalization_2 = nn.BatchNorm2d(16, _EPS)
        self.batch_normalization_3 = nn.BatchNorm2d(32, _EPS)
        self.batch_normalization_4 = nn.BatchNorm2d(32, _EPS)
        self.batch_normalization_5 = nn.BatchNorm2d(64, _EPS)
        self.batch_normalization_6 = nn.BatchNorm2d(64, _EPS)
        self.dense = nn.Linear(64, 10)

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch 10"]:
        x = (x.reshape(-1, 3, 32, 32) * self.deviation + self.mean) * 255
        x = F.relu(self.batch_normalization(self.conv2d(x)))
        y = F.relu(self.batch_normalization_1(self.conv2d_1(x)))
        x = F.relu(x + self.batch_normalization_2(self.conv2d_2(y)))
        y = F.relu(self.batch_normalization_3(self.conv2d_3(_padded(x))))
        x = F.relu(self.conv2d_5(x) + self.batch_normalization_4(self.conv2d_4(y)))
        y = F.relu(self.batch_normalization_5(self.conv2d_6(_padded(x))))
        x = F.relu(self.conv2d_8(x) + self.batch_normalization_6(self.conv2d_7(y)))
        return self.dense(x.mean((2, 3)))


def _padded(x: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch channels _ _"]:
    """What 'same' means for an even size, a kernel of 3 and a stride of 2: one row, one column, at the end."""
    return F.pad(x, (0, 1, 0, 1))


def pretrained_resnet8(folder: str | os.PathLike[str] | None = None) -> ResNet8:
    """Load MLPerf Tiny's ResNet-8, ready to evaluate: 87.19 % of CIFAR-10's test images.

    Taken and checked as `pretrained.load_weights` says; it is not downloaded, as its original is a file of Keras.
    Raises `DataError` as that does.
    """
    model = ResNet8()
    model.load_state_dict(load_weights(RESNET_8, folder))
    return model.eval()
