"""Residual networks for CIFAR-10, and the public pretrained ones."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bitbook.errors import DataError, PlanError
from bitbook.models.pretrained import Origin, Weights, load_weights

_REVISIONS = ("d5489e8", "master")  # the files are in both; their names carry a part of their hash


def read_original(data: bytes) -> dict[str, Tensor]:
    """The tensors of a checkpoint of akamaster/pytorch_resnet_cifar10; nothing but tensors is unpickled.

    Its names begin with `module.`, as it was trained by `nn.DataParallel`.  The counters that batch normalisation has
    in newer versions of PyTorch are left out.  Raises `DataError` for anything else.
    """
    try:
        stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)["state_dict"]
        return {
            name.removeprefix("module."): tensor.float()
            for name, tensor in stored.items()
            if not name.endswith("num_batches_tracked")
        }
    except Exception as error:  # torch has no error of its own for files that are not its own
        raise DataError(f"no checkpoint of a ResNet ({type(error).__name__}: {error})") from error


def _weights(depth: int, file: str, sha256: str) -> Weights:
    urls = tuple(
        f"https://github.com/akamaster/pytorch_resnet_cifar10/raw/{revision}/pretrained_models/{file}"
        for revision in _REVISIONS
    )
    source = "the weights of akamaster/pytorch_resnet_cifar10 (BSD-2-Clause)"
    return Weights(f"resnet{depth}_cifar10.safetensors", source, sha256, Origin(urls, 10_000_000, read_original))


PRETRAINED = {
    20: _weights(20, "resnet20-12fca82f.th", "2ff35a78ec5fa46f7c6b8799339f83ca52a90b60954b870f15340876fb6cf923"),
    44: _weights(44, "resnet44-014dd654.th", "9c87d71cb05049711cedc9fa3ca51b139546e876366b1618fa6200e4cc70128a"),
}
"""By depth, the networks that `pretrained_resnet` loads."""


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters.

    Where the block changes its shape, the shortcut takes every `stride`-th pixel and pads channels with zeros on both
    sides: option A of He et al. (2016), in the layout of the public weights.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.margin = stride, (outputs - inputs) // 2

    def forward(self, x: Float[Tensor, "batch inputs rows cols"]) -> Float[Tensor, "batch outputs _ _"]:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.margin:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.margin, self.margin))
        return F.relu(y + x)


class ResNet(nn.Module):
    """The CIFAR-10 network of He et al. (2016), section 4.2; takes images of 3 x 32 x 32, flattened or not.

    Args:
        depth: 6n + 2 layers, n blocks in each of three stages of 16, 32 and 64 channels.

    Raises `PlanError` for another depth.
    """

    def __init__(self, depth: int = 20) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise PlanError(f"a ResNet for CIFAR-10 has 6n + 2 layers: 8, 14, 20, …, 44, 56, …; not {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*_stage(16, 16, 1, blocks))
        self.layer2 = nn.Sequential(*_stage(16, 32, 2, blocks))
        self.layer3 = nn.Sequential(*_stage(32, 64, 2, blocks))
        self.linear = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch 10"]:
        x = x.reshape(-1, 3, 32, 32)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> Iterator[ResidualBlock]:
    yield ResidualBlock(inputs, outputs, stride)
    for _ in range(blocks - 1):
        yield ResidualBlock(outputs, outputs, 1)


def pretrained_resnet(depth: int, folder: str | os.PathLike[str] | None = None) -> ResNet:
    """Load a network of `PRETRAINED`, ready to evaluate: 91.73 % of CIFAR-10's test images at 20 layers, 93.10 at 44.

    Taken and checked as `pretrained.load_weights` says, its origin being the author's checkpoint.  Raises `DataError`
    as that does, and where the depth has none.
    """
    if depth not in PRETRAINED:
        raise DataError(f"no pretrained ResNet of {depth} layers; there are {', '.join(map(str, PRETRAINED))}")
    model = ResNet(depth)
    model.load_state_dict(load_weights(PRETRAINED[depth], folder))
    return model.eval()
