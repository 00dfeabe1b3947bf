from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bitbook import evaluate
from bitbook.data import Dataset
from bitbook.data.cifar import normalise
from bitbook.models import ResNet8, pretrained_resnet8


def test_size_names_and_a_gradient_for_every_parameter(generator: torch.Generator) -> None:
    model = ResNet8()
    assert sum(p.numel() for p in model.parameters()) == 78_186
    assert not {"mean", "deviation"} & model.state_dict().keys()  # a file does not hold constants
    logits = model(torch.randn(5, 3072, generator=generator))
    F.cross_entropy(logits, torch.arange(5)).backward()
    assert logits.shape == (5, 10) and all(p.grad is not None for p in model.parameters())


def test_normalisation_is_undone(generator: torch.Generator) -> None:
    pixels = torch.randint(256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    model, seen = ResNet8().eval(), []
    model.conv2d.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    model(normalise(pixels.numpy()))
    torch.testing.assert_close(seen[0], pixels.float(), rtol=0, atol=1e-3)


def test_the_graph_of_the_original(pretrained_folder: Path, generator: torch.Generator) -> None:
    """Layer by layer as the original lists them, padding as TensorFlow documents it."""
    model = pretrained_resnet8(pretrained_folder)
    state = model.state_dict()
    x = torch.randn(4, 3072, generator=generator)
    values = {}
    for layer in json.loads((pretrained_folder / "resnet8_cifar10.graph.json").read_text()):
        name, kind, inputs = layer["name"], layer["op"], [values[i] for i in layer["inputs"]]
        own = {key.removeprefix(f"{name}."): w for key, w in state.items() if key.startswith(f"{name}.")}
        if kind == "InputLayer":
            y = (x.reshape(-1, 3, 32, 32) * model.deviation + model.mean) * 255
        elif kind == "Conv2D":
            size, step, kernel = inputs[0].shape[2], layer["strides"][0], layer["kernel_size"][0]
            total = max((-(-size // step) - 1) * step + kernel - size, 0)
            padding = (total // 2, total - total // 2)
            y = F.conv2d(F.pad(inputs[0], padding * 2), own["weight"], own["bias"], step)
        elif kind == "BatchNormalization":
            mean, variance = own["running_mean"], own["running_var"]
            y = F.batch_norm(inputs[0], mean, variance, own["weight"], own["bias"], eps=layer["epsilon"])
        elif kind == "Add":
            y = inputs[0] + inputs[1]
        elif kind == "AveragePooling2D":
            y = F.avg_pool2d(inputs[0], layer["pool_size"])
        elif kind == "Dense":
            y = F.linear(inputs[0], own["weight"], own["bias"])
        else:
            y = inputs[0].flatten(1) if kind == "Flatten" else inputs[0]
        values[name] = F.relu(y) if layer.get("activation") == "relu" else y
    torch.testing.assert_close(model(x), values["dense"])


def test_accuracy_on_a_few_images(cifar10: Dataset, pretrained_folder: Path) -> None:
    found = evaluate(pretrained_resnet8(pretrained_folder), cifar10.test_x[:500], cifar10.test_y[:500])
    assert 83 < found.accuracy < 91


@pytest.mark.slow
def test_accuracy_on_all_images(cifar10: Dataset, pretrained_folder: Path) -> None:
    found = evaluate(pretrained_resnet8(pretrained_folder), cifar10.test_x, cifar10.test_y)
    assert found.accuracy == pytest.approx(87.19)
