from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Server
from torch import Tensor
from torch.nn import functional as F

import bitbook
from bitbook import evaluate
from bitbook.data import Dataset
from bitbook.errors import DataError, PlanError
from bitbook.models import Llama, llama, pretrained_stories
from bitbook.models.pretrained import Origin, Weights, digest

SIZES = {"dim": 12, "hidden": 7, "layers": 2, "heads": 3, "kv_heads": 1, "vocabulary": 11}
KINDS = (
    "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
    "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
)  # fmt: skip


def small() -> Llama:
    torch.manual_seed(0)
    model = Llama(**SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def untied(model: Llama) -> dict[str, Tensor]:
    return {name: w for name, w in model.state_dict().items() if name != "output.weight"}


def written(tensors: Mapping[str, Tensor], sizes: Mapping[str, int], length: int) -> bytes:
    """A .bin file as llama2.c's export.py writes version 0."""
    names = [f"layers.{i}.{kind}.weight" for kind in KINDS for i in range(sizes["layers"])]
    size = sizes["dim"] // sizes["heads"]
    angles = torch.outer(torch.arange(length), 1 / 1e4 ** (torch.arange(0, size, 2).float() / size)).float()
    tables = [tensors[name] for name in ("tok_embeddings.weight", *names, "norm.weight")]
    values = b"".join(t.numpy().astype("<f4").tobytes() for t in (*tables, angles.cos(), angles.sin()))
    return np.array([*sizes.values(), length], "<i4").tobytes() + values


def slow(model: Llama, tokens: list[int]) -> Tensor:
    """Logits at every place, one place and one head at a time."""
    w = model.state_dict()
    size = SIZES["dim"] // SIZES["heads"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + 1e-5).sqrt() * w[f"{name}.weight"]

    def turned(x: Tensor, place: int) -> Tensor:
        y = x.clone()
        for i in range(0, len(x), 2):
            angle = place * 10_000 ** (-(i % size) / size)
            y[i] = x[i] * math.cos(angle) - x[i + 1] * math.sin(angle)
            y[i + 1] = x[i] * math.sin(angle) + x[i + 1] * math.cos(angle)
        return y

    xs = [w["tok_embeddings.weight"][token] for token in tokens]
    for i in range(SIZES["layers"]):
        at = f"layers.{i}"
        q, k, v = (
            [w[f"{at}.attention.w{kind}.weight"] @ norm(x, f"{at}.attention_norm") for x in xs] for kind in "qkv"
        )
        q, k = ([turned(t, place) for place, t in enumerate(each)] for each in (q, k))
        for place in range(len(xs)):
            heads = []
            for h in range(SIZES["heads"]):  # all of them share one head of keys and values
                scores = torch.stack([q[place][h * size : (h + 1) * size] @ k[j] for j in range(place + 1)])
                weights = (scores / math.sqrt(size)).softmax(0)
                heads.append(sum(weight * v[j] for j, weight in enumerate(weights)))
            xs[place] = xs[place] + w[f"{at}.attention.wo.weight"] @ torch.cat(heads)
        for place, x in enumerate(xs):
            h = norm(x, f"{at}.ffn_norm")
            gate = F.silu(w[f"{at}.feed_forward.w1.weight"] @ h) * (w[f"{at}.feed_forward.w3.weight"] @ h)
            xs[place] = x + w[f"{at}.feed_forward.w2.weight"] @ gate
    return torch.stack([w["tok_embeddings.weight"] @ norm(x, "norm") for x in xs])


@torch.no_grad()
def test_against_the_formulas() -> None:
    tokens = [1, 5, 3, 3, 10, 0]
    model = small()
    torch.testing.assert_close(model(torch.tensor([tokens, tokens[::-1]]))[0], slow(model, tokens))


def test_heads_that_are_several(generator: torch.Generator) -> None:
    """Queries share neighbouring keys: with each pair of key heads equal, so is what twice as many queries see."""
    shared, full = Llama(dim=16, heads=4, kv_heads=2).eval(), Llama(dim=16, heads=4, kv_heads=4).eval()
    state = shared.state_dict()
    for name in state:
        if name.endswith(("wk.weight", "wv.weight")):
            state[name] = state[name].reshape(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16)
    full.load_state_dict(state)
    tokens = torch.randint(512, (2, 9), generator=generator)
    torch.testing.assert_close(shared(tokens), full(tokens))


@torch.no_grad()
def test_the_future_is_not_seen(generator: torch.Generator) -> None:
    model = small()
    tokens = torch.randint(11, (2, 9), generator=generator)
    torch.testing.assert_close(model(tokens)[:, :4], model(tokens[:, :4]))


def test_the_default_size_and_a_gradient_for_every_parameter(generator: torch.Generator) -> None:
    model = Llama()
    assert sum(p.numel() for p in model.parameters()) == 260_032
    assert model.output.weight is model.tok_embeddings.weight
    tokens = torch.randint(512, (2, 9), generator=generator)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_file_holds_the_tied_tensor_once(tmp_path: Path) -> None:
    model, fresh = small(), Llama(**SIZES)
    artifact = bitbook.compress(model, bitbook.Plan({"*": bitbook.Float("float16")}))
    assert set(artifact.aliases) == {"output.weight"}
    bitbook.save(artifact, tmp_path / "small.safetensors")
    bitbook.load(tmp_path / "small.safetensors", fresh)
    tokens = torch.tensor([[1, 2, 3]])
    assert fresh.output.weight is fresh.tok_embeddings.weight
    torch.testing.assert_close(fresh(tokens), model(tokens), rtol=0, atol=0.02)


@pytest.mark.parametrize("wrong", [{"dim": 63}, {"dim": 8}, {"kv_heads": 3}, {"layers": 0}], ids=str)
def test_sizes_that_do_not_divide_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(PlanError, match="a Llama needs"):
        Llama(**wrong)


def test_an_original_is_read() -> None:
    tensors = untied(small())
    found = llama.parse_llama2c(written(tensors, SIZES, 5))
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_the_published_hash_is_of_what_the_original_holds(pretrained_folder: Path) -> None:
    """Written again, the file is the original one to the last byte."""
    sizes = {"dim": 64, "hidden": 172, "layers": 5, "heads": 8, "kv_heads": 4, "vocabulary": 512}
    data = written(load_file(pretrained_folder / "stories260K.safetensors"), sizes, 512)
    found = hashlib.sha256(data).hexdigest()
    assert found == "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696"
    assert digest(llama.parse_llama2c(data)) == llama.STORIES_260K.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:20], "ends within its header, after 20 of 28 bytes"),
        (lambda d: d[:-1], "takes .* bytes, not"),
        (lambda d: d + b"\0", "takes .* bytes, not"),
        (lambda d: d[:20] + np.int32(-11).tobytes() + d[24:], "no Llama with tied embeddings"),
        (lambda d: b"\xff\xff\xff\x7f" * 7 + d[28:], "no Llama with tied embeddings"),
        (lambda d: d[:12] + np.int32(5).tobytes() + d[16:], "no Llama with tied embeddings"),
    ],
)
def test_anything_else_is_refused(change: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        llama.parse_llama2c(change(written(untied(small()), SIZES, 5)))


def test_the_network_is_downloaded_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = Llama().eval()
    sizes = {"dim": 64, "hidden": 172, "layers": 5, "heads": 8, "kv_heads": 4, "vocabulary": 512}
    (server.folder / "it.bin").write_bytes(written(untied(model), sizes, 512))
    origin = Origin((f"{server.url}it.bin",), 2_000_000, llama.parse_llama2c)
    monkeypatch.setattr(llama, "STORIES_260K", Weights("it.safetensors", "a test", digest(untied(model)), origin))
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(pretrained_stories()(tokens), model(tokens))
    (server.folder / "it.bin").write_bytes(b"")
    assert torch.equal(pretrained_stories()(tokens), model(tokens))


def test_offline_the_error_says_what_to_do(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    (server.folder / "page").write_text("<html>")
    origin = Origin((f"{server.url}page", f"{server.url}none"), 2_000_000, llama.parse_llama2c)
    monkeypatch.setattr(llama, "STORIES_260K", Weights("it.safetensors", "a test", "0" * 64, origin))
    with pytest.raises(DataError, match=r"(?s)set BITBOOK_DATA to a folder with models/it.safetensors.*header.*404"):
        pretrained_stories()


def test_loss_on_a_few_stories(stories: Dataset, pretrained_folder: Path) -> None:
    found = evaluate(pretrained_stories(pretrained_folder), stories.test_x[:20], stories.test_y[:20])
    assert 1.4 < found.loss < 1.7 and 55 < found.accuracy < 61


@pytest.mark.slow
def test_loss_on_all_stories(stories: Dataset, pretrained_folder: Path) -> None:
    found = evaluate(pretrained_stories(pretrained_folder), stories.test_x, stories.test_y)
    assert len(found.correct) == 115_708
    assert found.loss == pytest.approx(1.5630, abs=5e-5)
