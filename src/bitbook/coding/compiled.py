"""Compiling loops with numba, or leaving them to plain Python where numba is missing: the same numbers, slower.

Loops under `compiled` use 64-bit signed integers, and float64 only where what follows is exact, so that both give the
same bytes on every platform.  `inlined` is for what innermost loops call: numba counts references to the arrays that
go into a call by atomic operations.

numba keeps compiled loops beside their source and compiles anew when *that* file changes; tables and loops that a file
imports are baked in.  Whoever edits one of these files runs `make clean` afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

index = np.uint64
"""Of a number that is never negative: compiled loops then need not ask whether it counts from an array's end."""


def _identity(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


try:
    from numba import njit
except ImportError:
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = _identity
    inlined: Callable[[Callable[..., Any]], Callable[..., Any]] = _identity
else:
    compiled = njit(nogil=True, cache=True)
    inlined = njit(nogil=True, cache=True, inline="always")
