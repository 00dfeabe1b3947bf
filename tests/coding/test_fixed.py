from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitbook.coding import fixed
from bitbook.coding.fixed import _CHUNK, Fixed, grouping, packed_size
from bitbook.errors import CorruptArtifact, PlanError
from bitbook.quantizer import Stream, StreamSpec, code_dtype

ALPHABETS = [1, 2, 3, 4, 5, 6, 7, 15, 16, 31, 100, 127, 128, 255, 256, 257, 300, 511, 512, 3**6, 4095, 65535]
ALPHABETS += [65536, 65537, 10**6, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, 3 * 10**9, 1 << 32]


@pytest.fixture(autouse=True, scope="module", params=["numpy", "compiled"])
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test by numpy, and by the loops that long streams are unpacked with."""
    many, fixed._MANY = fixed._MANY, 1 << 62 if request.param == "numpy" else 1
    yield
    fixed._MANY = many


def stream(alphabet: int, codes: list[int] | np.ndarray, name: str = "codes") -> Stream:
    tensor = torch.as_tensor(np.asarray(codes, np.int64)).to(code_dtype(alphabet))
    return Stream(StreamSpec(name, (1, len(codes)), alphabet), tensor[None])


def random_codes(alphabet: int, count: int) -> np.ndarray:
    return np.random.default_rng(alphabet + count).integers(0, alphabet, count)


def slow(alphabet: int, codes: list[int]) -> bytes:
    """FORMAT.md, word for word: one integer, bits added above bits."""
    plain_width = (alphabet - 1).bit_length()
    plain = sum(code << plain_width * i for i, code in enumerate(codes))
    plain_size = math.ceil(plain_width * len(codes) / 8)
    g, w = min(
        ((g, (alphabet**g - 1).bit_length()) for g in range(1, 65) if alphabet**g <= 1 << 64),
        key=lambda pair: (Fraction(pair[1], pair[0]), pair[0]),
    )
    grouped, bits = 0, 0
    for start in range(0, len(codes), g):
        group = codes[start : start + g]
        grouped |= sum(code * alphabet**i for i, code in enumerate(group)) << bits
        bits += w if len(group) == g else (alphabet ** len(group) - 1).bit_length()
    if math.ceil(bits / 8) < plain_size:
        return grouped.to_bytes(math.ceil(bits / 8), "little")
    return plain.to_bytes(plain_size, "little")


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 63, 64, 65, 200])
def test_the_bytes_are_those_of_the_definition(alphabet: int, count: int) -> None:
    codes = random_codes(alphabet, count)
    one = stream(alphabet, codes)
    data = Fixed().encode([one])
    assert data == slow(alphabet, codes.tolist())
    assert packed_size(alphabet, count) == len(data)
    (decoded,) = Fixed().decode(data, [one.spec])
    assert torch.equal(decoded, one.codes)
    assert decoded.dtype == code_dtype(alphabet)


@given(st.lists(st.tuples(st.integers(1, 1 << 32), st.integers(0, 150)), max_size=4))
def test_several_streams_come_back(claims: list[tuple[int, int]]) -> None:
    streams = [stream(alphabet, random_codes(alphabet, count)) for alphabet, count in claims]
    specs = [s.spec for s in streams]
    data = Fixed().encode(streams)
    decoded = Fixed().decode(memoryview(data), specs)
    assert all(torch.equal(d, s.codes) for d, s in zip(decoded, streams, strict=True))
    assert Fixed().sizes(data, specs) == [packed_size(*claim) for claim in claims]


@pytest.mark.parametrize("alphabet", [2, 3, 15, 64, 511, 70000])
def test_work_in_chunks_leaves_no_seam(alphabet: int) -> None:
    count = grouping(alphabet)[0] * _CHUNK + 77
    one = stream(alphabet, random_codes(alphabet, count))
    data = Fixed().encode([one])
    (decoded,) = Fixed().decode(data, [one.spec])
    assert torch.equal(decoded, one.codes)
    head = Fixed().encode([stream(alphabet, one.codes[0, : count - 77].numpy())])
    assert data[: len(head)] == head


@pytest.mark.parametrize("bits", range(1, 17))
def test_powers_of_two_are_packbits(bits: int) -> None:
    codes = random_codes(1 << bits, 99)
    single = np.unpackbits(codes.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")[:, :bits]
    assert Fixed().encode([stream(1 << bits, codes)]) == np.packbits(single, bitorder="little").tobytes()


@given(st.integers(2, 1 << 32))
def test_grouping_wastes_least(alphabet: int) -> None:
    g, w = grouping(alphabet)
    assert alphabet**g <= 1 << w <= 1 << 64
    for other in range(1, int(64 / math.log2(alphabet)) + 1):
        cost = Fraction((alphabet**other - 1).bit_length(), other)
        assert (Fraction(w, g), g) <= (cost, other)


@given(st.integers(1, 1 << 32), st.integers(0, 10**6))
def test_size_is_between_entropy_and_plain_bits(alphabet: int, count: int) -> None:
    size = packed_size(alphabet, count)
    assert math.log2(alphabet) * count / 8 <= size + 1e-6 * count
    assert size <= math.ceil(count * (alphabet - 1).bit_length() / 8)


def test_bytes_are_frozen() -> None:
    """A change of these is a change of the format."""
    assert Fixed().encode([stream(1, [0] * 9)]) == b""
    assert Fixed().encode([stream(2, [1, 0, 1, 1, 0, 0, 0, 0, 1])]) == b"\x0d\x01"
    assert Fixed().encode([stream(3, [2, 1, 0, 2, 2])]) == bytes([2 + 1 * 3 + 2 * 27 + 2 * 81])
    assert Fixed().encode([stream(8, [1, 2, 3])]) == b"\xd1\x00"
    assert Fixed().encode([stream(256, [255]), stream(65536, [0x1234])]) == b"\xff\x34\x12"
    assert Fixed().encode([stream(1 << 32, [0x3F800000])]) == b"\x00\x00\x80\x3f"
    assert grouping(3) == (29, 46)
    assert grouping(15) == (11, 43)
    assert packed_size(15, 100352) == 49036


@pytest.mark.parametrize("alphabet", [2, 3, 5, 15, 16, 31, 100, 300])
@pytest.mark.parametrize("count", [1, 7, 12, 30])
def test_exactly_one_text_per_content(alphabet: int, count: int) -> None:
    one = stream(alphabet, random_codes(alphabet, count))
    data = Fixed().encode([one])
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            (decoded,) = Fixed().decode(bytes(flipped), [one.spec])
        except CorruptArtifact:
            continue
        assert Fixed().encode([Stream(one.spec, decoded)]) == flipped


@pytest.mark.parametrize(
    ("alphabet", "count", "data", "reason"),
    [
        (4, 4, b"", "take 1 bytes, but there are 0"),
        (4, 4, b"\0\0", "take 1 bytes, but there are 2"),
        (4, 0, b"\0", "take 0 bytes"),
        (4, 3, b"\x40", "unused bits"),
        (5, 1, b"\x07", r"code 7 is not in \[0, 5\)"),
        (200, 1, b"\xff", "code 255"),
        (3, 5, b"\xf3", "not of 3 symbols"),
        (3, 29, b"\xff" * 5 + b"\x3f", "not of 3 symbols"),
        (3 * 10**9, 1, b"\xff" * 4, "code 4294967295"),
    ],
)
def test_other_bytes_are_refused(alphabet: int, count: int, data: bytes, reason: str) -> None:
    with pytest.raises(CorruptArtifact, match=reason):
        Fixed().decode(data, [StreamSpec("codes", (1, count), alphabet)])


def test_codes_outside_their_spec_are_refused() -> None:
    with pytest.raises(PlanError, match=r"scale\.bits: codes from 0 to 4 are not all in \[0, 4\)"):
        Fixed().encode([stream(4, [0, 4], "scale.bits")])
    with pytest.raises(PlanError, match="-1"):
        Fixed().encode([Stream(StreamSpec("codes", (1, 1), 300), torch.tensor([[-1]]))])
    with pytest.raises(PlanError, match=r"2 codes do not fill the grid \(1, 3\)"):
        Fixed().encode([Stream(StreamSpec("codes", (1, 3), 4), torch.zeros(1, 2))])
    with pytest.raises(PlanError, match=r"from 1 to 2\^32"):
        packed_size((1 << 32) + 1, 1)
