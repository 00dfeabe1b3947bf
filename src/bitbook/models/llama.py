"""Llama, the language model of Touvron et al. (2023), at the size of llama2.c's smallest, and that one's weights."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bitbook.errors import DataError, PlanError
from bitbook.models.pretrained import Origin, Weights, load_weights

EPS = 1e-5  # of every normalisation
_HEADER = 28  # bytes: seven integers
_MOST_INTEGER = 1 << 20  # in a header; more is no small network


class Attention(nn.Module):
    """Causal attention, each head of keys and values serving `heads / kv_heads` heads of queries."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size, self.shared = dim // heads, heads // kv_heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.size, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.size, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Float[Tensor, "batch length dim"], angles: Float[Tensor, "length half"]
    ) -> Float[Tensor, "batch length dim"]:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.size)).transpose(1, 2)  # (batch, heads, length, size)
            for project in (self.wq, self.wk, self.wv)
        )
        q, k = rotate(q, angles), rotate(k, angles)
        k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(seen.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): `w2(silu(w1 x) · w3 x)`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """Attention and a feed-forward network, each on normalised inputs and added to them."""

    def __init__(self, dim: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, kv_heads)
        self.feed_forward = FeedForward(dim, hidden)
        self.attention_norm = nn.RMSNorm(dim, EPS)
        self.ffn_norm = nn.RMSNorm(dim, EPS)

    def forward(
        self, x: Float[Tensor, "batch length dim"], angles: Float[Tensor, "length half"]
    ) -> Float[Tensor, "batch length dim"]:
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """Takes tokens and gives at each place the logits of the next one; by default stories260K, 260,032 parameters.

    The output layer is the embedding once more: one parameter of two names, which a file holds once.

    Args:
        dim: width of the residual stream.
        hidden: width of the feed-forward networks.
        layers: how many.
        heads: of queries; they divide `dim` into an even number of columns.
        kv_heads: of keys and values; they divide `heads`.
        vocabulary: number of tokens.

    Raises `PlanError` for sizes that do not divide.
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        hidden: int = 172,
        layers: int = 5,
        heads: int = 8,
        kv_heads: int = 4,
        vocabulary: int = 512,
    ) -> None:
        super().__init__()
        if min(dim, hidden, layers, heads, kv_heads, vocabulary) < 1 or dim % (2 * heads) or heads % kv_heads:
            raise PlanError(
                "a Llama needs sizes of at least 1, heads that divide dim into an even number of columns, and kv_heads "
                f"that divide heads, but got {dim=}, {hidden=}, {layers=}, {heads=}, {kv_heads=}, {vocabulary=}"
            )
        self.size = dim // heads
        self.tok_embeddings = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(Layer(dim, hidden, heads, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, EPS)
        self.output = nn.Linear(dim, vocabulary, bias=False)
        self.output.weight = self.tok_embeddings.weight
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # as llama2.c begins: smaller where a layer adds to the stream
                added = name.endswith(("w3.weight", "wo.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if added else 0.02)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocabulary"]:
        angles = rotations(tokens.shape[1], self.size, tokens.device)
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, angles)
        return self.output(self.norm(x))


def rotations(length: int, size: int, device: torch.device | None = None) -> Float[Tensor, "length half"]:
    """Angles by place and pair of columns: `place · 10000^(-2 pair / size)`, eq. (15) of Su et al. (2021)."""
    pairs = torch.arange(0, size, 2, device=device).float()
    return torch.outer(torch.arange(length, device=device).float(), 1e4 ** (-pairs / size))


def rotate(
    x: Float[Tensor, "batch heads length size"], angles: Float[Tensor, "length half"]
) -> Float[Tensor, "batch heads length size"]:
    """Turn each pair of neighbouring columns by its angle: neighbours, as in llama2.c, where others pair halves."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def parse_llama2c(data: bytes) -> dict[str, Tensor]:
    """The tensors of a `.bin` file of llama2.c, version 0, by the names that `Llama` has for them.

    Layout, all little-endian: int32 dim, hidden, layers, heads, kv_heads, vocabulary, length; then float32 arrays, each
    kind of weight for all layers after each other, the last norm, and cosines and sines of `length` places, which are
    not read.  A vocabulary below zero says that an output layer of its own follows; such a file is refused.

    Raises `DataError` for anything else, be it one byte longer.
    """
    if len(data) < _HEADER:
        raise DataError(f"ends within its header, after {len(data)} of {_HEADER} bytes")
    header = [int(v) for v in np.frombuffer(data, "<i4", 7)]
    dim, hidden, layers, heads, kv_heads, vocabulary, length = header
    if min(header) < 1 or max(header) > _MOST_INTEGER or dim % (2 * heads) or heads % kv_heads:
        raise DataError(f"the header {header} is of no Llama with tied embeddings")
    narrow = kv_heads * (dim // heads)
    each = {
        "attention_norm": (dim,),
        "attention.wq": (dim, dim),
        "attention.wk": (narrow, dim),
        "attention.wv": (narrow, dim),
        "attention.wo": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }
    weights = vocabulary * dim + layers * sum(map(math.prod, each.values())) + dim
    size = _HEADER + 4 * (weights + length * (dim // heads))
    if len(data) != size:
        raise DataError(f"the header {header} takes {size} bytes, not {len(data)}")
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (vocabulary, dim)}
    shapes |= {f"layers.{i}.{kind}": shape for kind, shape in each.items() for i in range(layers)}
    shapes["norm"] = (dim,)
    values = torch.from_numpy(np.frombuffer(data, "<f4", weights, _HEADER).astype(np.float32))
    parts = values.split([math.prod(shape) for shape in shapes.values()])
    return {f"{name}.weight": part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


STORIES_260K = Weights(
    "stories260K.safetensors",
    "the weights of karpathy/llama2.c's stories260K (MIT)",
    "e2e4948bf36b1778ee1d69d73a2210cdc49896be510c7128e07395c3c9d3a161",
    Origin(
        tuple(
            f"https://huggingface.co/karpathy/tinyllamas/resolve/{revision}/stories260K/stories260K.bin"
            for revision in ("0bd21da7698eaf29a0d7de3992de8a46ef624add", "main")
        ),
        2_000_000,
        parse_llama2c,
    ),
)
"""Trained on TinyStories.

The original file has 1,056,540 bytes and SHA-256 b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696.
"""


def pretrained_stories(folder: str | os.PathLike[str] | None = None) -> Llama:
    """Load stories260K, ready to evaluate: 1.5630 nats a token on the test stories of `load_stories`.

    Taken and checked as `pretrained.load_weights` says, its origin being the file of llama2.c; raises `DataError` as
    that does.
    """
    model = Llama()
    tensors = load_weights(STORIES_260K, folder)
    model.load_state_dict({**tensors, "output.weight": tensors["tok_embeddings.weight"]})
    return model.eval()
