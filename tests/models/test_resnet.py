from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Server
from torch import Tensor, nn
from torch.nn import functional as F

from bitbook import evaluate
from bitbook.data import Dataset
from bitbook.errors import DataError, PlanError
from bitbook.models import build_model, pretrained_resnet, resnet
from bitbook.models.pretrained import Origin, Weights, digest
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


def test_pretrained_accuracy_on_a_few_images(cifar10: Dataset, pretrained_folder: Path) -> None:
    found = evaluate(pretrained_resnet(20, pretrained_folder), cifar10.test_x[:300], cifar10.test_y[:300])
    assert 89 < found.accuracy < 94


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "accuracy"), [(20, 91.73), (44, 93.10)])
def test_pretrained_accuracy_is_the_published_one(
    depth: int, accuracy: float, cifar10: Dataset, pretrained_folder: Path
) -> None:
    found = evaluate(pretrained_resnet(depth, pretrained_folder), cifar10.test_x, cifar10.test_y)
    assert found.accuracy == pytest.approx(accuracy)


def checkpoint(tensors: Mapping[str, Tensor], legacy: bool) -> bytes:
    """As the author's training script writes it."""
    stored = {f"module.{name}": tensor for name, tensor in tensors.items()}
    stored["module.bn1.num_batches_tracked"] = torch.tensor(3)
    stream = io.BytesIO()
    torch.save({"state_dict": stored, "best_prec1": 91.7}, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


@pytest.mark.parametrize("legacy", [True, False])
def test_an_original_is_read(legacy: bool) -> None:
    state = {n: t for n, t in build_model("resnet-8", 0).state_dict().items() if "num_batches" not in n}
    found = resnet.read_original(checkpoint(state, legacy))
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def pickled(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


class Arbitrary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", checkpoint({}, False)[:-30], pickled({"state": {}}), pickled({"state_dict": Arbitrary()}),
     pickled({"state_dict": {"module.a": "text"}})],
    ids=["empty", "page", "cut", "other", "code", "text"],
)  # fmt: skip
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="no checkpoint of a ResNet"):
        resnet.read_original(data)


def test_a_network_is_downloaded_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first place does not have it, the second has another one."""
    model = build_model("resnet-8", seed=3).eval()
    state = {n: t for n, t in model.state_dict().items() if "num_batches" not in n}
    wrong = {**state, "conv1.weight": -state["conv1.weight"]}
    (server.folder / "net.th").write_bytes(checkpoint(state, True))
    (server.folder / "wrong.th").write_bytes(checkpoint(wrong, True))
    urls = tuple(server.url + name for name in ("none.th", "wrong.th", "net.th"))
    weights = Weights("resnet8.safetensors", "test", digest(state), Origin(urls, 10**7, resnet.read_original))
    monkeypatch.setitem(resnet.PRETRAINED, 8, weights)
    found = pretrained_resnet(8)
    (server.folder / "net.th").unlink()
    again = pretrained_resnet(8)
    x = torch.randn(2, 3072)
    assert torch.equal(found(x), model(x)) and torch.equal(again(x), model(x))
    cached = Path(os.environ["XDG_CACHE_HOME"], "bitbook", "models")
    assert [path.name for path in cached.iterdir()] == ["resnet8.safetensors"]
    (cached / "resnet8.safetensors").unlink()
    with pytest.raises(DataError, match=r"(?s)could not be downloaded; set BITBOOK_DATA.*404.*SHA-256 of the tensors"):
        pretrained_resnet(8)
    assert not list(cached.iterdir())


@pytest.mark.parametrize("depth", [20, 44])
def test_the_published_hash_is_of_what_an_original_holds(depth: int, pretrained_folder: Path) -> None:
    weights = resnet.PRETRAINED[depth]
    tensors = load_file(pretrained_folder / weights.file)
    assert digest(resnet.read_original(checkpoint(tensors, True))) == weights.sha256


def test_other_pretrained_depths_are_refused() -> None:
    with pytest.raises(DataError, match="no pretrained ResNet of 32 layers; there are 20, 44"):
        pretrained_resnet(32)
