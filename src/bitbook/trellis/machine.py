"""The machines behind trellis codes: which level may follow which.

All levels `…, -2, -1, 0, 1, 2, …` fall into four subsets, D0 … D3, by their remainder modulo 4.  A machine's state
says whether the next level is even (D0 or D2) or odd (D1 or D3); which of the two it was chooses the next state.  So
levels that are two apart are told apart, as by a quantizer of twice the step, yet sequences can use all levels.

The machines are Ungerboeck's convolutional codes of rate 1/2 for one dimension (1987, part II, table I), in systematic
feedback form: parity-check polynomials h⁰ and h¹ over two bits z⁰ (the state's lowest) and z¹ (the choice).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

_PARITY_CHECKS: Mapping[int, tuple[int, int]] = {
    4: (0o5, 0o2),
    8: (0o13, 0o4),
    16: (0o23, 0o4),
    32: (0o45, 0o10),
    64: (0o103, 0o24),
    128: (0o235, 0o126),
    256: (0o515, 0o362),
}
"""h⁰ and h¹ by number of states."""

SIZES = tuple(_PARITY_CHECKS)
"""Numbers of states that there are machines for."""


@functools.cache
def next_states(states: int) -> Int[np.ndarray, "states 2"]:
    """The state after each state and choice; the choice of a level j in state s is bit 1 of `j - (s & 1)`."""
    zero, one = _PARITY_CHECKS[states]
    found = np.zeros((states, 2), np.int64)
    for state in range(states):
        for choice in (0, 1):
            found[state, choice] = state >> 1 ^ (zero >> 1) * (state & 1) ^ (one >> 1) * choice
    found.flags.writeable = False
    return found


NO_MACHINE: Int[np.ndarray, "0 2"] = np.zeros((0, 2), np.int64)
"""For streams whose codes may follow each other in any order."""


@functools.cache
def previous(states: int) -> Int[np.ndarray, "states 2"]:
    """The two ways into each state: twice the state before, plus the choice there."""
    into: list[list[int]] = [[] for _ in range(states)]
    for (state, choice), after in np.ndenumerate(next_states(states)):
        into[after].append(2 * state + choice)
    found = np.array(into, np.int64)
    found.flags.writeable = False
    return found
