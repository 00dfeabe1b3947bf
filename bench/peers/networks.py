"""The networks that peers compress: public weights, the test set, and one way to measure all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitbook.data import load_dataset
from bitbook.loop import evaluate

POINTS, NATS = (0.3, 0.5, 1.0, 2.0), (0.01, 0.02, 0.05, 0.1, 0.2)


class Network(NamedTuple):
    """One public network."""

    name: str
    unit: str
    """Of what is measured: "%" of test images, more is better, or "nats" a token, less is better."""
    allowed: Sequence[float]
    """The losses for which the smallest file is sought, in points or nats."""
    ends: Sequence[str]
    """Weights of the first and the last layer."""
    load: Callable[[], nn.Module]
    measure: Callable[[nn.Module], float]

    def loss(self, before: float, after: float) -> float:
        return before - after if self.unit == "%" else after - before


def checkpoint(model: nn.Module) -> dict[str, Tensor]:
    """What peers get: every float tensor, a tied one by its first name; counters of batches are of no use to anyone."""
    found: dict[int, str] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            found.setdefault(tensor.data_ptr(), name)
    return {name: state[name].contiguous() for name in found.values()}


@torch.no_grad()
def put(model: nn.Module, dense: Mapping[str, Tensor]) -> nn.Module:
    """Give the model these weights."""
    places = model.state_dict()
    for name, w in dense.items():
        places[name].copy_(w)
    return model


def accuracy(model: Any) -> float:
    """Percent of CIFAR-10's test images."""
    x, y = _images()
    return evaluate(model.to(memory_format=torch.channels_last), x, y, batch=100).accuracy


def nats(model: nn.Module) -> float:
    """Nats a token of the test stories."""
    data = _stories()
    return evaluate(model, data.test_x, data.test_y).loss


@cache
def _images() -> tuple[Tensor, Tensor]:
    data = load_dataset("cifar10")
    x = data.test_x.reshape(-1, *data.input_shape)
    return x.contiguous(memory_format=torch.channels_last), data.test_y


@cache
def _stories() -> Any:
    return load_dataset("stories")


def _pretrained(name: str, *arguments: int) -> nn.Module:
    return getattr(importlib.import_module("bitbook.models"), name)(*arguments)


_RESNET_ENDS = ("conv1.weight", "linear.weight")
NETWORKS = {
    network.name: network
    for network in (
        Network("ResNet-20", "%", POINTS, _RESNET_ENDS, partial(_pretrained, "pretrained_resnet", 20), accuracy),
        Network("ResNet-44", "%", POINTS, _RESNET_ENDS, partial(_pretrained, "pretrained_resnet", 44), accuracy),
        Network(
            "ResNet-8",
            "%",
            POINTS,
            ("conv2d.weight", "dense.weight"),
            partial(_pretrained, "pretrained_resnet8"),
            accuracy,
        ),
        Network(
            "stories260K", "nats", NATS, ("tok_embeddings.weight",), partial(_pretrained, "pretrained_stories"), nats
        ),
    )
}
