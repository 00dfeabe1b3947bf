from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_other_major_version_of_transformers() -> None:
    """Installs it, so it needs the package registry."""
    pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    command = [sys.executable, "-m", "tests.bridges.other_version"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
