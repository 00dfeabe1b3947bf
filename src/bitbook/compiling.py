"""numba, asked for when a loop first runs, so that importing bitbook stays light."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def compiler() -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """What compiles a loop, without the interpreter's lock and kept beside its file; None where numba is missing.

    numpy's error model: a loop with a division that could raise is not vectorised.
    """
    try:
        from numba import njit
    except ImportError:
        return None
    return njit(nogil=True, cache=True, error_model="numpy")
