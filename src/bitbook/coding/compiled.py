"""Compiling loops with numba, or leaving them to plain Python where numba is missing: the same numbers, slower.

Loops under `compiled` use 64-bit signed integers only, so that both give the same bytes on every platform.

numba keeps compiled loops beside their source and compiles anew when *that* file changes; tables and loops that a file
imports are baked in.  Whoever edits one of these files runs `make clean` afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _identity(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


try:
    from numba import njit
except ImportError:
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = _identity
else:
    compiled = njit(nogil=True, cache=True)
