from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bitbook import evaluate
from bitbook.data import Dataset
from bitbook.errors import DataError, PlanError
from bitbook.models import build_model, pretrained_resnet
from bitbook.models.resnet import ResidualBlock


@pytest.mark.parametrize(("name", "parameters"), [("resnet-20", 269_722), ("resnet-44", 658_586)])
def test_published_sizes_and_shapes(name: str, parameters: int) -> None:
    model = build_model(name, seed=0)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == int(name.split("-")[1])


def test_images_may_be_flattened_and_every_parameter_gets_a_gradient(generator: torch.Generator) -> None:
    model = build_model("resnet-8", seed=0).eval()
    x = torch.randn(5, 3072, generator=generator)
    assert torch.equal(model(x), model(x.reshape(5, 3, 32, 32)))
    logits = model.train()(x)
    assert logits.shape == (5, 10)
    F.cross_entropy(logits, torch.arange(5)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_shortcut_drops_pixels_and_pads_channels(generator: torch.Generator) -> None:
    block = ResidualBlock(16, 32, 2).eval()
    nn.init.zeros_(block.conv2.weight)  # only the shortcut is left
    x = torch.rand(2, 16, 6, 6, generator=generator)
    y = block(x)
    assert y.shape == (2, 32, 3, 3)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and not y[:, :8].any() and not y[:, 24:].any()


@pytest.mark.parametrize("depth", [2, 7, 21])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(PlanError, match=f"6n [+] 2 layers: .*; not {depth}"):
        build_model(f"resnet-{depth}", seed=0)


def test_pretrained_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITBOOK_DATA", raising=False)
    with pytest.raises(DataError, match="set BITBOOK_DATA to a folder with models/resnet20_cifar10.safetensors"):
        pretrained_resnet(20)
    with pytest.raises(DataError, match="there are 20, 44"):
        pretrained_resnet(32)
    with pytest.raises(DataError, match="is missing: the weights of akamaster"):
        pretrained_resnet(20, tmp_path)
    (tmp_path / "resnet20_cifar10.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(DataError, match="SHA-256 must be 02926273.*; get an intact copy"):
        pretrained_resnet(20, tmp_path)


def test_pretrained_accuracy_on_a_few_images(cifar10: Dataset) -> None:
    if not Path(os.environ["BITBOOK_DATA"], "models", "resnet20_cifar10.safetensors").exists():
        pytest.skip("BITBOOK_DATA has no models/resnet20_cifar10.safetensors")
    found = evaluate(pretrained_resnet(20), cifar10.test_x[:300], cifar10.test_y[:300])
    assert 89 < found.accuracy < 94


@pytest.mark.slow
def test_pretrained_accuracy_is_the_published_one(cifar10: Dataset) -> None:
    assert evaluate(pretrained_resnet(20), cifar10.test_x, cifar10.test_y).accuracy == pytest.approx(91.73)
