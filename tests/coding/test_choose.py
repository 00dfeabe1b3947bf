from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbook.coding.choose import Smallest
from bitbook.coding.coder import Coder
from bitbook.coding.context import Context
from bitbook.coding.fixed import Fixed
from bitbook.coding.rans import Rans
from bitbook.errors import CorruptArtifact
from bitbook.quantizer import Stream, StreamSpec, code_dtype

MIXED = 129
KINDS = ("sparse", "few of many", "uniform", "constant", "nothing")


def stream(kind: str, seed: int, rows: int = 20, cols: int = 30) -> Stream:
    """One of the kinds of streams of which each has another best coder."""
    rng = np.random.default_rng(seed)
    grid, alphabet = (rows, cols), 40_000
    if kind == "sparse":
        alphabet = None
        codes = (rng.random(grid) < 0.2 * rng.random((rows, 1)) ** 2) * rng.choice([-2, -1, 1, 2], grid)
    elif kind == "few of many":
        codes = rng.integers(0, alphabet, 12)[np.minimum(rng.geometric(0.5, grid) - 1, 11)]
    elif kind == "uniform":
        codes = rng.integers(0, alphabet, grid)
    elif kind == "constant":
        codes = np.full(grid, 7)
    else:
        alphabet, codes = 1, np.zeros(grid, np.int64)
    return Stream(StreamSpec(kind, grid, alphabet), torch.from_numpy(codes).to(code_dtype(alphabet)))


def singles(streams: list[Stream]) -> list[bytes]:
    """The group as each single coder writes it, with the byte that says which."""
    static = [b"\x80" + Rans().encode(streams)]
    if all(s.spec.alphabet is not None for s in streams):
        static.append(b"\xc0" + Fixed().encode(streams))
    return [*static, Context("fast").encode(streams), Context("small").encode(streams)]


def exhaustive(streams: list[Stream]) -> int:
    """The bytes of the best of all assignments of coders to streams, as FORMAT.md lays them out."""
    listed = [s for s in streams if s.spec.alphabet != 1]
    best = min(map(len, singles(streams)))
    for names in itertools.product("FRC", repeat=len(listed)):
        if len(set(names)) < 2 or any(n == "F" and s.spec.alphabet is None for n, s in zip(names, listed, strict=True)):
            continue
        static = sum(
            len((Fixed() if n == "F" else Rans()).encode([s])) for n, s in zip(names, listed, strict=True) if n != "C"
        )
        rest = [s for n, s in zip(names, listed, strict=True) if n == "C"]
        adaptive = min(len(Context(profile).encode(rest)) for profile in ("small", "fast"))
        best = min(best, 1 + -(-(3 ** len(names) - 1).bit_length() // 8) + static + adaptive)
    return best


def round_trip(streams: list[Stream]) -> bytes:
    data, specs = Smallest().encode(streams), [s.spec for s in streams]
    decoded = Smallest().decode(data, specs)
    assert all(torch.equal(a, b.codes) and a.dtype == b.codes.dtype for a, b in zip(decoded, streams, strict=True))
    assert sum(Smallest().sizes(data, specs)) == len(data)
    return data


groups = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 99), st.integers(1, 20), st.integers(0, 40)),
    min_size=1,
    max_size=4,
)


@given(groups)
@settings(max_examples=15)
def test_never_more_than_any_single_coder(shapes: list[tuple[str, int, int, int]]) -> None:
    streams = [stream(*shape) for shape in shapes]
    assert len(round_trip(streams)) <= min(map(len, singles(streams)))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_choices_are_near_the_best_of_all(seed: int) -> None:
    kinds = np.random.default_rng(seed).choice(KINDS, 4)
    streams = [stream(str(kind), seed + i) for i, kind in enumerate(kinds)]
    best = exhaustive(streams)
    assert best <= len(round_trip(streams)) <= best * 1.002 + 2


def test_a_mixed_group_is_smaller_where_streams_differ() -> None:
    streams = [stream("sparse", 0, 60, 100), stream("few of many", 1), stream("nothing", 0)]
    data = round_trip(streams)
    assert data[0] == MIXED and data[1] == 2 | 1 << 2  # Context, Rans, and no word about the last
    assert len(data) < 0.95 * min(map(len, singles(streams)))
    sparse, few = (len(c.encode([s])) for c, s in zip((Context(), Rans()), streams, strict=False))
    assert len(data) == 2 + sparse + few


@pytest.mark.parametrize("kind", ["sparse", "few of many", "uniform", "nothing"])
def test_one_coder_for_all_is_written_as_before(kind: str) -> None:
    streams = [stream(kind, seed) for seed in range(2)]
    data, written = round_trip(streams), singles(streams)
    assert data in written and len(data) == min(map(len, written))


def test_choosing_takes_about_as_long_as_each_coder_once() -> None:
    streams = [stream("sparse", 0, 60, 100), stream("few of many", 1)]
    coders: list[Coder] = [Rans(), Context("fast"), Context("small")]

    def seconds(*coders: Coder) -> float:
        start = time.process_time()
        for coder in coders:
            coder.encode(streams)
        return time.process_time() - start

    assert Smallest().encode(streams)[0] == MIXED  # the dear case, of two passes
    seconds(*coders)  # compiles
    assert min(seconds(Smallest()) for _ in range(2)) < 3 * min(seconds(*coders) for _ in range(2))


# -- bytes that lie ----------------------------------------------------------------------------

SPECS = [
    StreamSpec("numbers", (3, 4), None),
    StreamSpec("labels", (2, 8), 16),
    StreamSpec("nothing", (4, 4), 1),
    StreamSpec("levels", (1, 8), 16),
]
FIXED, RANS, CONTEXT = range(3)
PLAIN = b"\x00" + bytes(range(8))  # labels by Rans without a table
LEVELS = bytes(range(4))


def forged(numbers: int, labels: int, levels: int, rest: bytes) -> bytes:
    return bytes([MIXED, numbers | labels << 2 | levels << 4]) + rest


def test_a_mixed_group_by_hand() -> None:
    (numbers, labels, nothing, levels) = Smallest().decode(forged(CONTEXT, RANS, FIXED, LEVELS + PLAIN), SPECS)
    assert not numbers.any() and not nothing.any()
    assert labels.reshape(-1).tolist() == [n for i in range(8) for n in (i, 0)]
    assert levels.reshape(-1).tolist() == [n for i in range(4) for n in (i, 0)]
    assert Smallest().sizes(forged(CONTEXT, RANS, FIXED, LEVELS + PLAIN), SPECS) == [2, 9, 0, 4]  # with the choices


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bytes([MIXED]), "3 choices of coders do not fit into 0 bytes"),
        (bytes([MIXED, 3]), r"code 3 is not in \[0, 3\)"),
        (bytes([MIXED, 0x7F]), "unused bits"),
        (forged(RANS, RANS, RANS, b"\0" * 48 + PLAIN + b"\0" + LEVELS), "has only one"),
        (forged(CONTEXT, CONTEXT, CONTEXT, b""), "has only one"),
        (forged(FIXED, FIXED, CONTEXT, b"\0" * 100), "without a bound"),
        (forged(CONTEXT, RANS, FIXED, LEVELS[:3]), "cut off"),
        (forged(CONTEXT, RANS, FIXED, LEVELS), "cut off"),
        (forged(CONTEXT, RANS, FIXED, LEVELS + PLAIN[:-1]), "8 bytes do not fit into 7"),
        (forged(CONTEXT, RANS, FIXED, LEVELS + PLAIN + b"\0"), "do not end"),
        (forged(CONTEXT, RANS, FIXED, LEVELS + PLAIN + b"\x80"), "Rans, which is another coder"),
        (forged(CONTEXT, RANS, FIXED, LEVELS + PLAIN + bytes([MIXED, 5])), "Rans, which is another coder"),
        (forged(CONTEXT, RANS, FIXED, LEVELS + b"\xff\xff\xff\xff\x7f"), "does not fit into 0"),
        (forged(RANS, RANS, FIXED, LEVELS + b"\0" * 49 + PLAIN + b"\0"), "no streams, but 1 bytes"),
        (b"\xc0" + LEVELS * 4, "without a bound"),
    ],
)
def test_other_bytes_are_refused(data: bytes, reason: str) -> None:
    for read in (Smallest().decode, Smallest().sizes):
        with pytest.raises(CorruptArtifact, match=reason):
            read(data, SPECS)


def test_a_mixed_group_of_one_stream_or_none_is_refused() -> None:
    for specs in ([SPECS[1]], [SPECS[2]]):
        for rest in (b"", b"\0", b"\1", b"\2", b"\1" + PLAIN, b"\2\0"):
            with pytest.raises(CorruptArtifact):
                Smallest().decode(bytes([MIXED]) + rest, specs)


@given(st.integers(0, 255), st.binary(max_size=60))
def test_any_mixed_bytes_are_codes_or_a_named_error(choices: int, rest: bytes) -> None:
    data = bytes([MIXED, choices]) + rest
    try:
        codes = Smallest().decode(data, SPECS)
    except CorruptArtifact:
        return
    streams = [Stream(*pair) for pair in zip(SPECS, codes, strict=True)]
    assert all(map(torch.equal, Smallest().decode(Smallest().encode(streams), SPECS), codes))
    assert sum(Smallest().sizes(data, SPECS)) == len(data)


def test_damage_to_a_mixed_group_is_seen_or_gives_other_codes() -> None:
    streams = [stream("sparse", 0, 60, 100), stream("few of many", 1), stream("uniform", 2, 3, 5)]
    data, specs = Smallest().encode(streams), [s.spec for s in streams]
    assert data[0] == MIXED
    for broken in (data + b"\0", data[:-1], *(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(40))):
        try:
            codes = Smallest().decode(broken, specs)
        except CorruptArtifact:
            continue
        assert not all(torch.equal(a, b.codes) for a, b in zip(codes, streams, strict=True))
