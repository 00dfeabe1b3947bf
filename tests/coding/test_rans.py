from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitbook.coding.rans import Rans, _quantized
from bitbook.errors import CorruptArtifact
from bitbook.quantizer import Stream, StreamSpec, code_dtype


def stream(codes: np.ndarray, alphabet: int | None) -> Stream:
    tensor = torch.from_numpy(codes.astype(np.int64)).to(code_dtype(alphabet))
    return Stream(StreamSpec("codes", (1, codes.size), alphabet), tensor[None])


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=300), st.sampled_from([12, 16]))
def test_frequencies_fill_the_range(counts: list[int], precision: int) -> None:
    frequencies = _quantized(np.array(counts), precision)
    assert frequencies.sum() == 1 << precision and frequencies.min() >= 1


@pytest.mark.parametrize("alphabet", [3, 256, 4096, None])
def test_size_is_the_entropy_and_a_table(alphabet: int | None) -> None:
    rng = np.random.default_rng(0)
    codes = np.minimum(rng.geometric(0.2, 50_001) - 1, (alphabet or 100) - 1)
    one = stream(codes - 5 if alphabet is None else codes, alphabet)
    counts = np.unique(codes, return_counts=True)[1]
    entropy = -(counts * np.log2(counts / counts.sum())).sum() / 8
    data = Rans().encode([one])
    assert len(data) <= 1.003 * entropy + 3 * len(counts) + 30
    assert torch.equal(Rans().decode(data, [one.spec])[0], one.codes)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut off"),
        (b"\x80\x00", "too long"),
        (b"\x05\x0c", "does not fit"),
        (b"\x01\x0c\x00", "cut off"),
        (b"\x02\x0d\x01\x00", "13 bits"),
        (b"\x04\x0c\x01\x00\x01\x00", "0 words"),
        (b"\x00" + b"\x00" * 300, "left behind"),
    ],
)
def test_other_bytes_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptArtifact, match=reason):
        Rans().decode(data, [StreamSpec("codes", (1, 100), 16)])
