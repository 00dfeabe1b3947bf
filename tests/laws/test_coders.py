from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.laws.cases import CODERS

from bitbook.coding.coder import Coder
from bitbook.coding.fixed import Fixed, packed_size
from bitbook.quantizer import Stream, StreamSpec, code_dtype
from bitbook.testing import check_coder


def _most(coder: Coder):
    """The bytes that a coder promises, where it does: the size of fixed-width codes is known beforehand."""
    return (lambda stream: packed_size(stream.spec.alphabet, stream.codes.numel())) if coder == Fixed() else None


@pytest.mark.parametrize("coder", CODERS, ids=repr)
def test_laws(coder: Coder) -> None:
    check_coder(coder, most_bytes=_most(coder))


@given(st.lists(st.tuples(st.integers(1, 70_000), st.integers(0, 200), st.integers(0, 10**6)), max_size=5))
@pytest.mark.parametrize("coder", CODERS, ids=repr)
def test_any_group_of_streams_comes_back(coder: Coder, shapes: list[tuple[int, int, int]]) -> None:
    streams = []
    for alphabet, length, seed in shapes:
        codes = torch.randint(alphabet, (1, length), generator=torch.Generator().manual_seed(seed))
        spec = StreamSpec(f"s{len(streams)}", (1, length), alphabet)
        streams.append(Stream(spec, codes.to(code_dtype(alphabet))))
    decoded = coder.decode(coder.encode(streams), [s.spec for s in streams])
    assert all(torch.equal(a, b.codes) for a, b in zip(decoded, streams, strict=True))


@given(st.integers(2, 1 << 16), st.integers(1, 5000))
def test_fixed_width_is_within_a_bit_per_symbol_of_the_alphabet(alphabet: int, count: int) -> None:
    ideal = count * math.log2(alphabet) / 8
    assert ideal <= packed_size(alphabet, count) <= count * (alphabet - 1).bit_length() / 8 + 1
