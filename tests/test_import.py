from __future__ import annotations

import subprocess
import sys

import pytest

LATE = ("sklearn", "matplotlib", "optuna", "numba", "PIL", "scipy")


@pytest.mark.parametrize("module", ["bitbook", "bitbook.data", "bitbook.models"])
def test_import_is_light(module: str) -> None:
    """Heavy packages are imported on use: some of them are optional, all of them are slow."""
    code = f"import sys, {module}; print(*(name for name in {LATE} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
