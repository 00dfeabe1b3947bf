"""Codes without an order, such as indices into a codebook: the bits of each from the top, as paths in a binary tree.

Three trees are mixed: one for all symbols, one for each symbol to the left and one for each above.  Of long codes,
such as bit patterns of floats, the first 12 bits are modelled and the rest are written as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bitbook.coding.compiled import compiled
from bitbook.coding.mixing import Counters, code_mixed
from bitbook.coding.range_coder import DECODING, code_bit, code_uniform

_TREE = 12  # modelled bits
_CONTEXT = 16  # bits of a context and of the path together
_RATE, _LIMIT = 2, 255
_WEIGHTS = (180, 50, 50)


class Learnt(NamedTuple):
    """Trees and mixing weights of one grid."""

    counters: Counters
    weights: np.ndarray

    @classmethod
    def fresh(cls, width: int) -> Learnt:
        tree = min(width, _TREE)
        contexts = (1 << tree) + 2 * (1 << min(width + tree, _CONTEXT))
        return cls(Counters.fresh(contexts), np.array(_WEIGHTS, np.int64) << 8)


@compiled
def code_grid(coder, buffer, codes, width, contexts, learnt):
    """Code or fill `codes`, (rows, cols) int64 of `width` bits; `contexts` 0 leaves only the tree for all symbols."""
    counters, weights = learnt
    rows, cols = codes.shape
    tree = min(width, _TREE)
    plain = width - tree
    at = np.zeros(3 if contexts else 1, np.int64)
    inputs = np.zeros(3, np.int64)
    shift = max(width + tree - _CONTEXT, 0)
    if not contexts:
        weights = np.full(1, 1 << 16, np.int64)
    for i in range(rows):
        for j in range(cols):
            value = codes[i, j]
            left = codes[i, j - 1] >> shift if j > 0 else np.int64(0)
            above = codes[i - 1, j] >> shift if i > 0 else np.int64(0)
            node = np.int64(1)
            for k in range(tree):
                at[0] = node
                if contexts:
                    at[1] = (1 << tree) + (left << tree) + node
                    at[2] = (1 << tree) + (1 << min(width + tree, _CONTEXT)) + (above << tree) + node
                bit = code_mixed(
                    coder, buffer, value >> (width - 1 - k) & 1, counters, at, weights, inputs, _RATE, _LIMIT
                )
                node = node << 1 | bit
            for k in range(plain - 1, -1, -1):
                node = node << 1 | code_bit(coder, buffer, value >> k & 1, 32768)
            if coder[DECODING]:
                codes[i, j] = node - (1 << width)


@compiled
def code_plain(coder, buffer, codes, alphabet):
    """Code or fill `codes`, (count,) int64 below `alphabet` <= 2^32, all of the same cost."""
    parts = (alphabet + 65535) >> 16
    for i in range(len(codes)):
        high = np.int64(0)
        if parts > 1:
            high = code_uniform(coder, buffer, codes[i] >> 16, parts)
        low = code_uniform(coder, buffer, codes[i] & 65535, min(alphabet, 65536))
        if coder[DECODING]:
            codes[i] = high << 16 | low
