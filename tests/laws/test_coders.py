from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.laws.cases import CODERS

from bitbook.coding.coder import Coder
from bitbook.coding.context import Context
from bitbook.coding.fixed import Fixed, packed_size
from bitbook.errors import CorruptArtifact, PlanError
from bitbook.quantizer import Stream, StreamSpec, code_dtype
from bitbook.testing import check_coder
from bitbook.trellis.machine import SIZES, next_states

ALPHABETS = (1, 2, 3, 5, 15, 16, 17, 255, 256, 257, 4095, 65_535, 65_536, 1 << 32)


def _most(coder: Coder):
    """The bytes that a coder promises: never much more than fixed width, where there is one."""
    spare = {"Fixed": 0, "Rans": 1, "Context": 2, "Smallest": 1}[type(coder).__name__]
    if isinstance(coder, Context):
        return lambda stream: stream.codes.numel() * _bits(stream) / 8 + spare
    return lambda stream: (
        (packed_size(stream.spec.alphabet, stream.codes.numel()) if stream.spec.alphabet else 1e9) + spare
    )


def _bits(stream: Stream) -> float:
    return math.log2(stream.spec.alphabet) if stream.spec.alphabet else 80


@pytest.mark.parametrize("coder", CODERS, ids=repr)
def test_laws(coder: Coder) -> None:
    check_coder(coder, most_bytes=_most(coder), alphabets=ALPHABETS if coder == Fixed() else (None, *ALPHABETS))


@pytest.mark.parametrize("coder", [c for c in CODERS if c != Fixed()], ids=repr)
@given(st.lists(st.integers(-(2**31) + 1, 2**31 - 1), max_size=60), st.integers(1, 3))
def test_numbers_without_a_bound_come_back(coder: Coder, values: list[int], rows: int) -> None:
    codes = torch.tensor(values[: len(values) // rows * rows], dtype=torch.int32).reshape(rows, -1)
    one = Stream(StreamSpec("codes", (rows, codes.shape[1]), None), codes)
    (decoded,) = coder.decode(coder.encode([one]), [one.spec])
    assert torch.equal(decoded, codes) and decoded.dtype == torch.int32


@pytest.mark.parametrize("coder", [c for c in CODERS if c != Fixed()], ids=repr)
@given(st.lists(st.integers(-(2**31) + 2, 2**31 - 2), max_size=60), st.sampled_from(SIZES), st.integers(1, 3))
def test_paths_come_back(coder: Coder, values: list[int], states: int, rows: int) -> None:
    path, state = [], 0
    for value in values[: len(values) // rows * rows]:
        path.append(value if (value ^ state) & 1 == 0 else value + 1)
        state = next_states(states)[state, path[-1] - (state & 1) >> 1 & 1]
    codes = torch.tensor(path, dtype=torch.int32).reshape(rows, -1)
    one = Stream(StreamSpec("codes", (rows, codes.shape[1]), None, states=states), codes)
    (decoded,) = coder.decode(coder.encode([one]), [one.spec])
    assert torch.equal(decoded, codes)
    if path:
        codes[0, 0] ^= 1  # the first level is even
        with pytest.raises(PlanError, match=f"no path through a machine of {states} states"):
            coder.encode([one])


@pytest.mark.parametrize("coder", [c for c in CODERS if c != Fixed()], ids=repr)
@given(
    st.binary(max_size=40), st.sampled_from([None, 2, 3, 15, 256, 70_000]), st.integers(0, 40), st.sampled_from([0, 8])
)
def test_any_bytes_are_codes_or_a_named_error(
    coder: Coder, data: bytes, alphabet: int | None, cols: int, states: int
) -> None:
    states = states if alphabet is None else 0
    spec = StreamSpec("codes", (2, cols), alphabet, alphabet // 2 if alphabet in (3, 15) else 0, states)
    try:
        (codes,) = coder.decode(data, [spec])
    except CorruptArtifact:
        return
    (again,) = coder.decode(coder.encode([Stream(spec, codes)]), [spec])
    assert torch.equal(codes, again)


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
