"""The adapter in Dask's local mode: the same bytes as this process writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitbook.checkpoints import compress_checkpoint, decompress_checkpoint
from bitbook.checkpoints.dask import Dask
from bitbook.errors import CheckpointError, MissingDependency, WeightError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    save_file({f"w{i}": torch.randn(40, 50, generator=g) for i in range(4)}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.mark.filterwarnings("default")  # those of other packages
def test_the_same_bytes(source: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="distributed is not installed: pip install 'bitbook[dask]'")
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    compress_checkpoint(source, one, bits=3)
    with distributed.Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        engine = Dask(client.scheduler.address)
        compress_checkpoint(source, other, bits=3, engine=engine)
        assert one.read_bytes() == other.read_bytes()
        decompress_checkpoint(other, tmp_path / "p.safetensors", engine=Dask(client))
        decompress_checkpoint(other, tmp_path / "q.safetensors")
        assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()
        save_file({"w": torch.full((4, 4), float("nan"))}, source)
        with pytest.raises(WeightError, match="w: element 0 is nan"):
            compress_checkpoint(source, other, bits=3, engine=engine)
        engine.client.close()


def test_no_scheduler_is_said() -> None:
    pytest.importorskip("distributed", reason="distributed is not installed: pip install 'bitbook[dask]'")
    with pytest.raises(CheckpointError, match="no Dask scheduler answers at 'nonsense://'"):
        Dask("nonsense://")


def test_missing_package_names_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(MissingDependency, match="pip install 'bitbook\\[dask\\]'"):
        Dask("tcp://127.0.0.1:1")
