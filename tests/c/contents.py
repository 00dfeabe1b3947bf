"""Content that no encoder would choose, so that a decoder meets all that there may be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from tests.golden.make import path
from tests.laws.cases import QUANTIZERS
from torch import Tensor

from bitbook import ECSQ, Codebook, Float, Integer, Pruned, Trellis, Uniform
from bitbook.artifact import Artifact
from bitbook.blocks import Shape
from bitbook.quantizer import Quantized, Quantizer, code_dtype


def drawn(recipe: Quantizer, shape: Shape, rng: np.random.Generator, name: str = "") -> Quantized:
    """A tensor of any codes that there may be."""
    side = {n: drawn(child.recipe, child.shape, rng, n) for n, child in recipe.children(shape).items()}
    codes: dict[str, Tensor] = {}
    for spec in recipe.layout(shape):
        count = math.prod(spec.grid)
        numbers = rng.standard_cauchy(count) * 10 ** rng.uniform(-1, rng.choice([1, 9])) * (rng.random(count) < 0.7)
        if isinstance(recipe, Float):
            codes |= recipe.encode(torch.from_numpy(rng.normal(size=shape).astype(np.float32)), {})
            continue
        if isinstance(recipe, Pruned):
            numbers = rng.permutation(np.arange(count) < recipe.keep).astype(np.int64)
        elif spec.alphabet is None:
            numbers = numbers.clip(-(2**31) + 2, 2**31 - 2).astype(np.int64)
        else:
            numbers = (spec.centre + numbers).astype(np.int64) % spec.alphabet
        if spec.states:
            numbers = path(numbers.tolist(), spec.states).long().numpy()
        if name.startswith("rank"):
            numbers[-1:] = 0  # then it is below n!
        codes[spec.name] = torch.from_numpy(numbers).to(code_dtype(spec.alphabet)).reshape(spec.grid)
    return Quantized(recipe, shape, codes, side)


def blobs(rows: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Images of a few non-zeros near each other, one in each row: what strides are for."""
    y, x = np.mgrid[:size, :size]
    centre = rng.integers(0, size, (2, rows, 1, 1))
    near = (abs(y - centre[0]) + abs(x - centre[1]) < 3) & (rng.random((rows, size, size)) < 0.9)
    return (near * rng.choice([-2, -1, 1, 3, 40], (rows, size, size))).reshape(rows, -1)


def every_recipe(rng: np.random.Generator) -> Iterator[Quantized]:
    """One of each law case."""
    for case in QUANTIZERS:
        recipe = case.recipe.resolve((12, 16)).decoder()
        if not isinstance(recipe, Float):
            yield drawn(recipe, (12, 16), rng)


def learning(share: float = 1) -> Artifact:
    """Strides, links between axes of one length, trees of labels, escapes, machines; `share` of all rows."""
    rng = np.random.default_rng(0)
    whole, machine = ECSQ(2), Trellis(8, 1)
    tensors = {}
    for name, recipe, codes in (
        ("a", whole, blobs(70, 9, rng)),
        ("b", whole, (rng.standard_cauchy((40, 70)) * 3).clip(-1e9, 1e9)),
        ("c", machine, blobs(50, 7, rng)),
        ("d", Uniform(8), rng.normal(127, 9, (50, 40)).clip(0, 254)),
        ("e", Integer(300), np.repeat(rng.integers(0, 300, (40, 5)), 8, 1)),
        ("f", Integer(65536), rng.integers(0, 65536, (20, 20))),
        ("g", Integer(2), rng.random((40, 40)) < 0.1),
        ("h", machine, rng.standard_cauchy((30, 33)).clip(-(10**6), 10**6)),
        ("i", Codebook(5000, (1, 1)), rng.integers(0, 5000, (80, 80))),
        ("j", whole, rng.normal(0, 9, (160, 120)).round()),
    ):
        codes = codes[: math.ceil(share * len(codes))].astype(np.int64)
        shape = codes.shape[::-1] if recipe == machine else codes.shape
        q = drawn(recipe, shape, rng)
        ((stream, _),) = q.codes.items()
        if recipe == machine:
            codes = path(codes.reshape(-1).tolist(), 8).numpy().reshape(codes.shape)
        dtype = q.codes[stream].dtype
        tensors[name] = replace(q, codes={stream: torch.from_numpy(codes).to(dtype)})
    return Artifact(tensors)
