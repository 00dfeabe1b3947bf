"""The sums of the profile *small*, kept up to date symbol by symbol, beside the sums that they are."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bitbook.coding import small

STRIDES = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 12])
ROWS = st.lists(st.tuples(st.booleans(), st.integers(0, 4095)), min_size=1, max_size=60)


@given(ROWS, STRIDES)
def test_surroundings_are_sums_over_what_is_before(row: list[tuple[bool, int]], stride: int) -> None:
    cols, room = len(row), 3 * stride + 4
    near, wide = np.zeros((2, cols + room), np.int64)
    sums, ramps = np.full((2, room + cols + room), 1 << 40, np.int64)  # of the row before
    sums[: room + 1] = ramps[: room + 1] = 0
    for j, (nonzero, expected) in enumerate(row):
        found = [0, 0, 0, 0]
        for y in range(4 if stride > 1 else 1):
            for x in range(-3, 4 if y else 0):
                q = j - y * stride + x
                if 0 <= q < j:
                    weight = max((5 if y else 4) - y - abs(x), 0)
                    found = [n + k * m for n, k, m in zip(found, row[q] * 2, (weight, weight, 1, 1), strict=True)]
        at = j + room
        assert [near[j], wide[j]] == found[::2]
        assert list(small._expect(sums, ramps, at, stride)) == found[1::2]
        sums[at + 1] = sums[at] + expected
        ramps[at + 1] = ramps[at] + sums[at + 1]
        if nonzero:
            small._surround(near, wide, j, stride)
    assert near.max() <= small._NEAREST and wide.max() <= small._WIDEST


@given(st.lists(st.integers(0, 9), min_size=3, max_size=60), st.sampled_from([1, 2, 3, 4, 7, 12]))
def test_blurs_are_sums_over_columns_and_rows(found: list[int], stride: int) -> None:
    cols, room = len(found), 3 * stride + 4
    blurred = np.zeros((3, room + cols + room), np.int64)
    for j, count in enumerate(found):
        small._blur(blurred, cols, j, count, stride)
    weights = np.zeros((4, cols), np.int64)
    small._blur_weights(stride, weights)
    for n, kernel in enumerate(((1, 4, 6, 4, 1), (1, 2, 1))):
        half = len(kernel) // 2
        line = np.convolve(found, kernel)[half : half + cols]
        rows = kernel if stride > 1 else (1,)
        steps = [(k, (y - len(rows) // 2) * stride) for y, k in enumerate(rows)]
        for j in range(cols):
            inside = [(k, j + step) for k, step in steps if 0 <= j + step < cols]
            assert blurred[n, room + j] == sum(k * line[q] for k, q in inside)
            assert weights[1 + n, j] == sum(kernel) * sum(k for k, _ in inside)
    assert not blurred[:, :room].any() and not blurred[:, room + cols :].any()
