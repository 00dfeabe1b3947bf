"""Models as plain functions: a new one is a function and a line in `MODELS`, or `PRETRAINED_MODELS` with weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from bitbook.errors import PlanError
from bitbook.models.convnet import ConvNet as ConvNet
from bitbook.models.lenet import LeNet5 as LeNet5
from bitbook.models.lenet import lenet_5 as lenet_5
from bitbook.models.lenet import lenet_300_100 as lenet_300_100
from bitbook.models.llama import Llama as Llama
from bitbook.models.llama import pretrained_stories as pretrained_stories
from bitbook.models.mlp import MLP as MLP
from bitbook.models.mlp import mlp as mlp
from bitbook.models.resnet import ResNet as ResNet
from bitbook.models.resnet import pretrained_resnet as pretrained_resnet
from bitbook.models.tiny import ResNet8 as ResNet8
from bitbook.models.tiny import pretrained_resnet8 as pretrained_resnet8

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp-784-128-64-10": mlp,
    "mlp-64-32-16-10": partial(mlp, (64, 32, 16, 10)),
    "lenet-300-100": lenet_300_100,
    "lenet-5": lenet_5,
    "convnet": ConvNet,
    "resnet-20": ResNet,
}

PRETRAINED_MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet-20-cifar10": partial(pretrained_resnet, 20),
    "resnet-44-cifar10": partial(pretrained_resnet, 44),
    "resnet-8-cifar10": pretrained_resnet8,
    "stories260k": pretrained_stories,
}
"""Public networks with the weights that their authors published; the first use may download them."""


def build_model(name: str, seed: int) -> nn.Module:
    """Build a model with freshly initialised weights, a name in `MODELS` or one with sizes of its own, or a public one.

    `mlp-A-B-…` is a perceptron of any sizes, `lenet-5-A-B-C` a LeNet-5 of A and B channels and C hidden units,
    `resnet-D` a ResNet of D layers for CIFAR-10.

    Fresh weights depend on `seed` alone, and PyTorch's own generator is left as it was. A name in `PRETRAINED_MODELS`
    has the weights of its author, whatever the seed. Raises `PlanError` for an unknown name, and `DataError` where
    weights cannot be had.
    """
    if name in MODELS:
        factory = MODELS[name]
    elif name in PRETRAINED_MODELS:
        factory = PRETRAINED_MODELS[name]
    elif re.fullmatch(r"mlp(-[1-9]\d*){2,}", name):
        factory = partial(mlp, [int(size) for size in name.split("-")[1:]])
    elif re.fullmatch(r"lenet-5(-[1-9]\d*){3}", name):
        factory = partial(lenet_5, *(int(size) for size in name.split("-")[2:]))
    elif re.fullmatch(r"resnet-[1-9]\d*", name):
        factory = partial(ResNet, int(name.removeprefix("resnet-")))
    else:
        sized = "with any sizes mlp-A-B-…, lenet-5-A-B-C and resnet-D"
        raise PlanError(f"no model {name!r}; there are {', '.join((*MODELS, *PRETRAINED_MODELS))}, {sized}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed accelerators too, for good
        return factory()
