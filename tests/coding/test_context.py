from __future__ import annotations

import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

from bitbook.coding.choose import Smallest
from bitbook.coding.context import Context
from bitbook.coding.rans import Rans
from bitbook.errors import CorruptArtifact, PlanError
from bitbook.quantizer import Stream, StreamSpec, code_dtype


def image_layer(rows: int = 32, side: int = 14, seed: int = 0) -> Stream:
    """Non-zeros at the centre of the image, in patches."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    density = 0.3 * np.exp(-(x**2 + y**2) / (side / 4) ** 2).reshape(-1) * rng.gamma(0.5, 2, (rows, 1))
    codes = (rng.random((rows, side * side)) < density) * rng.geometric(0.6, (rows, side * side))
    codes *= rng.choice([-1, 1], codes.shape)
    return Stream(StreamSpec("codes", codes.shape, None), torch.from_numpy(codes.astype(np.int32)))


def entropy(codes: torch.Tensor) -> float:
    counts = codes.unique(return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum()) / 8


SCRIPT = """
import sys, zlib
sys.modules["numba"] = None
from tests.coding.test_context import image_layer
from bitbook.coding.context import Context
from bitbook.coding.rans import Rans
streams = [image_layer(6, 7)]
for coder in (Context("small"), Context("fast"), Rans()):
    data = coder.encode(streams)
    assert coder.decode(data, [s.spec for s in streams])[0].equal(streams[0].codes)
    print(zlib.crc32(data))
"""


def test_plain_python_gives_the_same_bytes() -> None:
    result = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    streams = [image_layer(6, 7)]
    expected = [zlib.crc32(coder.encode(streams)) for coder in (Context("small"), Context("fast"), Rans())]
    assert [int(line) for line in result.stdout.split()] == expected


def test_the_grid_pays() -> None:
    layer = image_layer()
    small, fast = len(Context("small").encode([layer])), len(Context("fast").encode([layer]))
    assert small < fast < entropy(layer.codes)


def test_a_unit_that_died_is_known_in_the_next_layer() -> None:
    rng = np.random.default_rng(1)
    alive = rng.random(64) < 0.4
    first = (rng.random((64, 40)) < 0.5) & alive[:, None]
    second = (rng.random((30, 64)) < 0.5) & alive
    streams = [
        Stream(StreamSpec(name, codes.shape, None), torch.from_numpy(codes.astype(np.int32)))
        for name, codes in (("first", first), ("second", second))
    ]
    alone = [len(Context().encode([stream])) for stream in streams]
    assert len(Context().encode(streams)) < sum(alone) - 4


@pytest.mark.parametrize("profile", ["small", "fast"])
def test_an_empty_grid_costs_next_to_nothing(profile: str) -> None:
    zero = Stream(StreamSpec("codes", (300, 784), None), torch.zeros(300, 784, dtype=torch.int32))
    assert len(Context(profile).encode([zero])) <= (8 if profile == "small" else 24)  # type: ignore[arg-type]


@pytest.mark.parametrize("coder", [Context(), Smallest()], ids=repr)
def test_a_small_side_tensor_costs_its_bits(coder: Context | Smallest) -> None:
    layer = image_layer()
    scale = Stream(StreamSpec("scale.bits", (1, 1), 1 << 16), torch.tensor([[16256]], dtype=torch.int32))
    both, alone = coder.encode([scale, layer]), coder.encode([layer])
    assert len(both) <= len(alone) + 3
    assert sum(coder.sizes(both, [scale.spec, layer.spec])) == len(both)


def test_a_number_that_is_too_long_is_the_limit_or_refused() -> None:
    spec = StreamSpec("codes", (1, 1), None)
    for data in (b"\xff" * 20, b"\x7f" + b"\xff" * 20, b"\x3f" + b"\xff" * 20):
        with pytest.raises(CorruptArtifact):
            Context().decode(data, [spec])


def test_choices_of_other_coders_are_named() -> None:
    with pytest.raises(CorruptArtifact, match="Rans"):
        Context().decode(b"\x80", [StreamSpec("codes", (1, 4), 4)])
    with pytest.raises(CorruptArtifact, match="names no coder"):
        Smallest().decode(b"\x82", [StreamSpec("codes", (1, 4), 4)])
    with pytest.raises(PlanError, match="'small' or 'fast'"):
        Context("large")  # type: ignore[arg-type]


def test_smallest_is_smallest() -> None:
    rng = np.random.default_rng(2)
    for alphabet, skew in ((16, 1), (16, 4), (256, 1), (65536, 1)):
        codes = torch.from_numpy((rng.random((20, 50)) ** skew * alphabet).astype(np.int64)).to(code_dtype(alphabet))
        stream = Stream(StreamSpec("codes", (20, 50), alphabet), codes)
        sizes = [len(c.encode([stream])) for c in (Context(), Context("fast"), Rans())]
        assert len(Smallest().encode([stream])) <= min(sizes) + 1
