from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bitbook.coding import logistic
from bitbook.coding.range_coder import code_bit, code_uniform, decoder, encoder, finish, finished

Item = tuple[bool, int, int]  # whether it is a bit, the bit or symbol, the probability or alphabet
BITS = st.tuples(st.just(True), st.integers(0, 1), st.integers(1, 65535))
SYMBOLS = st.integers(1, 65536).flatmap(lambda k: st.tuples(st.just(False), st.integers(0, k - 1), st.just(k)))


def write(items: list[Item]) -> bytes:
    coder, buffer = encoder(), np.zeros(2 * len(items) + 8, np.uint8)
    for is_bit, value, of in items:
        (code_bit if is_bit else code_uniform)(coder, buffer, value, of)
    data = finish(coder, buffer)
    assert data is not None
    return data


def read(data: bytes, items: list[Item]) -> tuple[list[int], bool]:
    buffer = np.frombuffer(bytearray(data), np.uint8)
    coder = decoder(buffer)
    values = [int((code_bit if is_bit else code_uniform)(coder, buffer, 0, of)) for is_bit, _, of in items]
    return values, finished(coder, buffer)


@given(st.lists(st.one_of(BITS, SYMBOLS), max_size=80))
def test_what_is_written_is_read_at_its_ideal_length(items: list[Item]) -> None:
    data = write(items)
    assert read(data, items) == ([value for _, value, _ in items], True)
    ideal = sum(-math.log2((p if bit else 65536 - p) / 65536) if is_bit else math.log2(p) for is_bit, bit, p in items)
    assert 8 * len(data) <= ideal + 9
    assert not data.endswith(b"\0")


@given(st.lists(st.one_of(BITS, SYMBOLS), max_size=40), st.binary(max_size=30))
def test_bytes_that_are_accepted_are_the_bytes_of_their_content(items: list[Item], data: bytes) -> None:
    values, accepted = read(data, items)
    again = [(is_bit, value, of) for (is_bit, _, of), value in zip(items, values, strict=True)]
    assert accepted == (write(again) == data)


def test_rare_bits_cost_little() -> None:
    assert len(write([(True, 0, 1)] * 100_000)) == 0
    assert len(write([(True, 0, 1)] * 50_000 + [(True, 1, 1)] + [(True, 0, 1)] * 50_000)) <= 4


@given(st.integers(0, (1 << 62) - 1), st.integers(1, 1 << 50))
def test_quotients_are_rounded_down(a: int, b: int) -> None:
    b = max(b, a >> 49)
    assert logistic.quotient(a, b) == a // b
    assert logistic.quotient(a // b * b, b) == a // b


@given(st.integers(1, (1 << 53) - 1))
def test_a_logarithm_is_that_of_the_first_twelve_bits(x: int) -> None:
    shift = x.bit_length() - 12
    head = x >> shift if shift >= 0 else x << -shift
    power = math.floor(256 * math.log(1 << abs(shift)))
    assert logistic.log(x) == math.floor(256 * math.log(head)) + (power if shift >= 0 else -power)


def test_tables_are_the_functions() -> None:
    for x in range(-logistic.LIMIT, logistic.LIMIT + 1, 7):
        assert abs(logistic.squash(x) - 65536 / (1 + math.exp(-x / 256))) <= 1.01
    for x in (1, 2, 3, 100, 4095, 4096, 123_456, 1 << 30, (1 << 52) + 12345):
        assert abs(logistic.log(x) - 256 * math.log(x)) <= 2
    for p in (1, 2, 100, 32768, 65000, 65535):
        assert abs(logistic.squash(logistic.STRETCH[p]) - p) <= max(p, 65536 - p) / 200 + 1
