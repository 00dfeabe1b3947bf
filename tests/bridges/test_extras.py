from __future__ import annotations

import importlib
import sys

import pytest

from bitbook.errors import MissingDependency

PARTS = {
    "huggingface": ("transformers", "transformers.quantizers.auto"),
    "onnx": ("onnx", "onnx_ir"),
    "torchao": ("torchao", "torchao.core.config"),
}


@pytest.mark.parametrize("bridge", PARTS)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    bridge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, part = PARTS[bridge]
    monkeypatch.delitem(sys.modules, f"bitbook.bridges.{bridge}", raising=False)
    monkeypatch.setitem(sys.modules, part, None)  # as Python marks what cannot be imported
    with pytest.raises(MissingDependency, match=rf"is not installed; run: pip install 'bitbook\[{extra}\]'"):
        importlib.import_module(f"bitbook.bridges.{bridge}")
