from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.engines import ENGINES, only

from bitbook.quantizer import StreamSpec
from bitbook.runtime.loops import LANES
from bitbook.runtime.packing import PackedCodes, pack, unpack


def reference(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bit by bit: code k of a row takes bits k · bits … of lane `row mod 16` of its block."""
    rows, cols = codes.shape
    unit = next(n for n in range(1, 33) if n * bits % 32 == 0)
    length = -(-cols // unit) * unit * bits // 32
    words = np.zeros((-(-rows // LANES), length, LANES), np.uint32)
    for r in range(rows):
        for k in range(cols):
            for b in range(bits):
                if int(codes[r, k]) >> b & 1:
                    place = k * bits + b
                    words[r // LANES, place // 32, r % LANES] |= np.uint32(1 << place % 32)
    return words


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 24, 32])
def test_layout(bits: int, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(engine, monkeypatch)
    codes = np.random.default_rng(bits).integers(-(1 << bits - 1), 1 << bits - 1, (21, 37)).astype(np.int32)
    low = -(1 << bits - 1)
    words = pack(torch.from_numpy(codes), low, bits)
    assert np.array_equal(words.numpy().view(np.uint32), reference(codes.astype(np.int64) - low, bits))
    assert torch.equal(unpack(words, 0, 21, 37, bits, low, torch.int32), torch.from_numpy(codes))
    assert torch.equal(unpack(words, 5, 19, 37, bits, low, torch.int32), torch.from_numpy(codes[5:19]))


@settings(max_examples=40)
@given(rows=st.integers(1, 40), cols=st.integers(1, 70), alphabet=st.integers(2, 1 << 12), seed=st.integers(0, 99))
def test_codes_come_back(rows: int, cols: int, alphabet: int, seed: int) -> None:
    dtype = torch.uint8 if alphabet <= 256 else torch.int32
    codes = torch.randint(alphabet, (rows, cols), generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = PackedCodes(codes, StreamSpec("codes", (rows, cols), alphabet))
    assert torch.equal(packed.unpack(), codes)
    assert torch.equal(packed.unpack(rows // 3, rows), codes[rows // 3 :])
    index = torch.arange(rows).flip(0)
    assert torch.equal(packed.select(index), codes.flip(0))
    lanes = LANES * -(-packed.rows // LANES)
    assert packed.words.nbytes <= lanes * (packed.cols * packed.bits / 8 + 4 * packed.bits)  # a unit may be padding


def test_codes_without_a_bound_take_the_width_of_their_range() -> None:
    codes = torch.tensor([[-3, 2, 0, 4]] * 20, dtype=torch.int32)
    packed = PackedCodes(codes, StreamSpec("codes", (20, 4), None))
    assert (packed.bits, packed.low) == (3, -3)
    assert torch.equal(packed.unpack(), codes)
