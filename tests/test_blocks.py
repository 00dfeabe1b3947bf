from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitbook.blocks import WHOLE, Block, Grid, check_block, matrix_shape
from bitbook.errors import PlanError

shapes = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)
sizes = st.one_of(st.just(-1), st.integers(1, 9))


def literal_blocks(matrix: np.ndarray, r: int, c: int) -> list[np.ndarray]:
    """Every block without its padding, in reading order, by slicing."""
    rows, cols = matrix.shape
    return [matrix[i : i + r, j : j + c] for i in range(0, rows, r) for j in range(0, cols, c)]


@given(shapes, sizes, sizes)
def test_split_cuts_blocks_in_reading_order_and_join_undoes_it(shape: tuple[int, ...], r: int, c: int) -> None:
    w = torch.randn(shape) + 3  # no zero but the padding
    grid = Grid.of(shape, (r, c), pad=True)
    blocks = grid.split(w)
    expected = literal_blocks(w.reshape(matrix_shape(shape)).numpy(), grid.r, grid.c)
    assert len(blocks) == len(expected) == grid.R * grid.C
    for row, block in zip(blocks.numpy(), expected, strict=True):
        tile = row.reshape(grid.r, grid.c)
        np.testing.assert_array_equal(tile[: block.shape[0], : block.shape[1]], block)
        assert np.count_nonzero(tile) == block.size
    assert torch.equal(grid.join(blocks, shape), w)
    assert grid.padded == any(block.size < grid.r * grid.c for block in expected)


@given(shapes, sizes, sizes)
def test_tiles_keep_extremes_and_means(shape: tuple[int, ...], r: int, c: int) -> None:
    w = torch.randn(shape)
    grid = Grid.of(shape, (r, c), pad=True)
    tiles = grid.tiles(w)
    blocks = literal_blocks(w.reshape(matrix_shape(shape)).numpy(), grid.r, grid.c)
    assert tiles.amax((1, 3)).flatten().tolist() == [b.max() for b in blocks]
    assert tiles.amin((1, 3)).flatten().tolist() == [b.min() for b in blocks]
    np.testing.assert_allclose(grid.mean(w).flatten(), [b.mean() for b in blocks], rtol=1e-5, atol=1e-6)
    for fill in ("edge", "zero"):
        assert torch.equal(grid.untile(grid.tiles(w, fill), shape), w)


@pytest.mark.parametrize(("shape", "matrix"), [((), (1, 1)), ((5,), (1, 5)), ((3, 4), (3, 4)), ((8, 3, 5, 5), (8, 75))])
def test_any_rank_reads_as_a_matrix(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert matrix_shape(shape) == matrix
    assert Grid.of(shape, WHOLE) == Grid(*matrix, *matrix)


def test_an_indivisible_extent_names_sizes_that_work() -> None:
    with pytest.raises(PlanError, match=r"784 columns do not divide into blocks of 48; use 28, 49 or 56, or pad=True"):
        Grid.of((128, 784), (1, 48))
    with pytest.raises(PlanError, match="7 rows do not divide into blocks of 2; use 1 or 7, or pad=True"):
        Grid.of((7, 4), (2, 1))
    for size in (28, 49, 56):
        assert not Grid.of((128, 784), (1, size)).padded


@pytest.mark.parametrize("block", [(0, 1), (1, -2), (1,), (1, 2, 3), [1, 2], (1.0, 2), (True, 2), "ab", None])
def test_a_block_is_two_sizes(block: Block) -> None:
    with pytest.raises(PlanError, match="block="):
        check_block(block)


def test_blocks_are_views_where_they_lie_in_reading_order() -> None:
    w = torch.randn(6, 8)
    for block in ((1, 4), (1, -1), (2, -1), WHOLE):
        assert Grid.of((6, 8), block).split(w).data_ptr() == w.data_ptr()
