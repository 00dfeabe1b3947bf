"""The loops that products may be computed by, one at a time."""

from __future__ import annotations

import pytest

from bitbook.runtime import levels, native, packing

ENGINES = ["native", "numba", "torch"]


def only(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing but `engine` compute, or skip where it is missing."""
    if engine == "native":
        if native.compiled() is None:
            pytest.skip("there is no C compiler")
        return
    monkeypatch.setattr(native, "compiled", lambda: None)
    if engine == "torch":
        for module in (levels, packing):
            monkeypatch.setattr(module, "loops", lambda: None)
