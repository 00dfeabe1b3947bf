from __future__ import annotations

import os
import subprocess
import sys

import pytest

LATE = ("sklearn", "matplotlib", "optuna", "numba", "PIL", "scipy", "transformers", "onnx", "onnxruntime", "torchao")


@pytest.mark.parametrize("module", ["bitbook", "bitbook.data", "bitbook.models"])
def test_import_is_light(module: str) -> None:
    """Heavy packages are imported on use: some of them are optional, all of them are slow."""
    code = f"import sys, {module}; print(*(name for name in {LATE} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


MEASURE = """
import time
start = time.process_time()
import torch
middle = time.process_time()
import bitbook
print(middle - start, time.process_time() - middle)
"""


def test_import_takes_little_more_than_torch() -> None:
    """At most 0.15 s where torch takes one, of the processor: each pair in one process, so that load matters little."""
    # As installed, where bytecode is kept: the first run compiles what was edited.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    shares = []
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True)
        torch, ours = map(float, done.stdout.split())
        shares.append(ours / torch)
        if shares[-1] <= 0.15:
            return
    raise AssertionError(f"importing bitbook takes {shares} times what torch takes")
