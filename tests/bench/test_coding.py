from __future__ import annotations

import numpy as np
import torch
from bench.coding import conditional_entropy, made_up

from bitbook.coding.context import Context
from bitbook.quantizer import Stream, StreamSpec


def test_the_fast_profile_comes_near_the_entropy_in_its_contexts() -> None:
    (matrix,) = made_up(rows=64)
    stream = Stream(StreamSpec("codes", (64, 784), None), torch.from_numpy(matrix))
    ideal, coded = conditional_entropy(matrix), len(Context("fast").encode([stream]))
    assert ideal < coded < 1.1 * ideal


def test_entropy_in_contexts_by_hand() -> None:
    assert conditional_entropy(np.zeros((3, 4), np.int32)) == 0
    # Neighbours say nothing about the first symbol's sign, and 14 costs one bit of Exp-Golomb.
    assert conditional_entropy(np.array([[14]])) == 1 / 8
