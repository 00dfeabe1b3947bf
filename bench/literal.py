"""The source material's experiment, written as its notebook is: one image, one batch, one layer at a time.

    PIL image ─► ToTensor ─► Normalize ─► DataLoader ─► MLP ─► (every Linear replaced) ─► MLP

It is the reference that tests compare `bitbook` with, and the alternative that `bench/train.py` times. So it stays
as naive as its model; what torchvision would do for an image is done here with Pillow and numpy, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Batches = Iterable[tuple[Tensor, Tensor]]


# -- data ------------------------------------------------------------------------------------------------
class ToTensor:
    """Turn a PIL image of 8-bit pixels into float32 in [0, 1], channels first."""

    def __call__(self, image: Image.Image) -> Float[Tensor, "1 rows cols"]:
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
        pixels = pixels.view(image.size[1], image.size[0], 1).permute(2, 0, 1).contiguous()
        return pixels.to(torch.get_default_dtype()).div(255)


class Normalize(nn.Module):
    """Subtract the mean and divide by the standard deviation, per channel; a module, as torchvision's is."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, image: Float[Tensor, "channels rows cols"]) -> Float[Tensor, "channels rows cols"]:
        image = image.clone()
        mean = torch.as_tensor(self.mean, dtype=image.dtype, device=image.device)
        std = torch.as_tensor(self.std, dtype=image.dtype, device=image.device)
        if (std == 0).any():  # torchvision looks each time, so the time counts
            raise ValueError("a standard deviation is zero")
        return image.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


class Images(Dataset):
    """Images and labels in memory, as tensors; each access makes a PIL image and transforms it."""

    def __init__(self, images: UInt8[np.ndarray, "n rows cols"], labels: Int[Tensor, " n"]) -> None:
        self.images, self.labels = torch.from_numpy(images), labels
        self.transforms = [ToTensor(), Normalize((0.5,), (0.5,))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "1 rows cols"], int]:
        image: Any = Image.fromarray(self.images[index].numpy())  # mode "L"
        for transform in self.transforms:
            image = transform(image)
        return image, int(self.labels[index])


def loader(images: UInt8[np.ndarray, "n rows cols"], labels: Int[Tensor, " n"], shuffle: bool) -> DataLoader:
    return DataLoader(Images(images, labels), batch_size=64, shuffle=shuffle, num_workers=0)


# -- model and training ----------------------------------------------------------------------------------
class Network(nn.Module):
    """The MLP; its layers are named as in `bitbook.models.MLP`."""

    def __init__(self, sizes: tuple[int, int, int, int] = (784, 128, 64, 10)) -> None:
        super().__init__()
        self.inputs = sizes[0]
        self.fc1 = nn.Linear(sizes[0], sizes[1])
        self.fc2 = nn.Linear(sizes[1], sizes[2])
        self.fc3 = nn.Linear(sizes[2], sizes[3])

    def forward(self, x: Tensor) -> Float[Tensor, "batch classes"]:
        x = x.view(-1, self.inputs)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def train(model: nn.Module, batches: Batches, lr: float, epochs: int = 5) -> list[float]:
    """Train by plain SGD; returns each epoch's mean of batch means."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return [train_epoch(model, batches, optimizer) for _ in range(epochs)]


def train_epoch(model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer) -> float:
    criterion = nn.CrossEntropyLoss()
    model.train()
    running_loss, count = 0.0, 0
    for images, labels in batches:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        count += 1
    return running_loss / count


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Percent of the images whose largest logit is the label's."""
    model.eval()
    correct = total = 0
    for images, labels in batches:
        predicted = model(images).argmax(dim=1)
        correct += (predicted == labels).sum().item()
        total += len(labels)
    return 100 * correct / total


# -- scalar quantization ---------------------------------------------------------------------------------
class Quantize(torch.autograd.Function):
    """A tensor at `bits` bits with one scale, and its straight-through gradient.

    Two bits and more: `s · clip(round(x / s), -q, q)`, `q = 2^(bits-1) - 1`, `s = (max - min) / 2q`, gradient zero
    where `|x| > q · s`. One bit: `mean|x| · sign(x)`, the gradient itself clipped to [-1, 1]; or, as a later
    revision has it, `s · sign(x)`, `s = (max - min) / 2`, gradient zero where `|x| > s`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, revision: bool) -> Tensor:
        q_max = 1 if bits == 1 else 2 ** (bits - 1) - 1
        scale = torch.clamp((x.max() - x.min()) / (2 * q_max), min=1e-8)
        ctx.clips_gradient = bits == 1 and not revision
        ctx.save_for_backward(x, q_max * scale)
        if bits == 1:
            return (scale if revision else x.abs().mean()) * torch.sign(x)
        return scale * torch.clamp(torch.round(x / scale), -q_max, q_max)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.clips_gradient:
            return torch.clamp(grad, -1, 1), None, None
        x, limit = ctx.saved_tensors
        return grad * (x.abs() <= limit).float(), None, None


class QuantizedLinear(nn.Module):
    """A Linear layer whose weight, and input where `act_bits` says so, is quantized in every forward."""

    def __init__(self, linear: nn.Linear, bits: int, act_bits: int | None = None, revision: bool = False) -> None:
        super().__init__()
        self.bits, self.act_bits, self.revision = bits, act_bits, revision
        self.weight = nn.Parameter(linear.weight.data.clone())
        self.bias = nn.Parameter(linear.bias.data.clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.act_bits is not None:
            x = Quantize.apply(x, self.act_bits, self.revision)
        return F.linear(x, Quantize.apply(self.weight, self.bits, self.revision), self.bias)


# -- vector quantization ---------------------------------------------------------------------------------
class ClusteredLinear(nn.Module):
    """A Linear layer whose rows share `max(int(rows · percent / 100), 1)` centroids; the assignments stay.

    With `bits`, the fused variant: the centroids are quantized in every forward.
    """

    def __init__(self, linear: nn.Linear, percent: float, bits: int | None = None) -> None:
        from sklearn.cluster import KMeans

        super().__init__()
        rows = linear.weight.data.numpy()
        k = max(int(len(rows) * percent / 100), 1)
        clusters: Any = KMeans(n_clusters=k, n_init=10, random_state=0).fit(rows)  # type: ignore[arg-type]
        self.bits = bits
        self.inertia = float(clusters.inertia_)
        self.centroids = nn.Parameter(torch.from_numpy(clusters.cluster_centers_).float())
        self.labels: Tensor
        self.register_buffer("labels", torch.from_numpy(clusters.labels_).long())
        self.bias = nn.Parameter(linear.bias.data.clone())

    def forward(self, x: Tensor) -> Tensor:
        centroids = self.centroids
        if self.bits is not None:
            centroids = Quantize.apply(centroids, self.bits, False)
        return F.linear(x, centroids[self.labels], self.bias)


def replace_layers(model: nn.Module, quantized: Callable[[nn.Linear], nn.Module]) -> None:
    """Put `quantized(layer)` in the place of every Linear layer, the output layer included."""
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            setattr(model, name, quantized(module))
