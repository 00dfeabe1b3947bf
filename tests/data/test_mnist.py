"""The reader, on four small files that pass for MNIST, and on MNIST itself where it is."""

from __future__ import annotations

import gzip
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from bitbook.data import Dataset, load_mnist, mnist
from bitbook.errors import DataError


def idx(array: np.ndarray) -> bytes:
    dims = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + dims + array.tobytes()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four gzipped files, which `mnist` is told are MNIST; no other place has any."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "mirror"
    folder.mkdir()
    files = []
    for file in mnist.FILES:
        shape = (7 if file.name.startswith("train") else 3, *file.shape[1:])
        data = idx(rng.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8))
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(data))
        files.append(mnist.IdxFile(file.name, shape, hashlib.sha256(data).hexdigest()))
    monkeypatch.setattr(mnist, "FILES", tuple(files))
    monkeypatch.setattr(mnist, "MIRRORS", ())
    monkeypatch.delenv("BITBOOK_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def assert_equal(a: Dataset, b: Dataset) -> None:
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(a, name), getattr(b, name))


@given(arrays(np.uint8, array_shapes(max_dims=4, min_side=0, max_side=5)))
def test_parse_idx_round_trip(array: np.ndarray) -> None:
    read = mnist.parse_idx(bytearray(idx(array)), array.ndim, "it")
    assert read.dtype == np.uint8
    assert np.array_equal(read, array)


@given(arrays(np.uint8, array_shapes(max_dims=3, max_side=4)), st.data())
def test_parse_idx_refuses_any_other_length(array: np.ndarray, data: st.DataObject) -> None:
    whole = idx(array)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for wrong in (whole[:cut], whole + b"\0"):
        with pytest.raises(DataError, match="it: "):
            mnist.parse_idx(bytearray(wrong), array.ndim, "it")


def test_parse_idx_does_not_believe_a_header() -> None:
    lie = bytes([0, 0, 8, 3]) + b"\xff" * 12  # 2^96 values
    with pytest.raises(DataError, match="values take .* bytes, not 16"):
        mnist.parse_idx(bytearray(lie), 3, "it")
    with pytest.raises(DataError, match="starts with 00 00 0d 01, but must start with 00 00 08 01"):
        mnist.parse_idx(bytearray(b"\0\0\x0d\1\0\0\0\0"), 1, "it")


def test_pixels_are_the_bits_of_to_tensor_and_normalize() -> None:
    """Against the two formulas in numpy's float32, for all 256 values."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    one, half = np.float32(255), np.float32(0.5)
    slow = [(np.float32(v) / one - half) / half for v in range(256)]
    ours = mnist.pixels(values)
    assert ours.shape == (1, 256)
    assert ours.dtype == torch.float32
    assert ours[0].tolist() == slow
    assert ours.aminmax() == (-1, 1)


def test_gzipped_or_not(small: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in mnist.FILES:
        (plain / file.name).write_bytes(gzip.decompress((small / f"{file.name}.gz").read_bytes()))
    data = load_mnist(small)
    assert_equal(data, load_mnist(plain))
    assert data.train_x.shape == (7, 784)
    assert data.train_x.is_contiguous()
    assert data.test_y.dtype == torch.int64
    assert math.prod(data.input_shape) == 784


@pytest.mark.parametrize("below", [".", "mnist"])
def test_environment(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    small.rename(root / below) if below != "." else small.rename(root := tmp_path / "all")
    monkeypatch.setenv("BITBOOK_DATA", str(root))
    assert_equal(load_mnist(), load_mnist(root / below))


def test_environment_must_be_a_folder(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITBOOK_DATA", str(small / "nowhere"))
    with pytest.raises(DataError, match="BITBOOK_DATA is .*nowhere, which is not a folder"):
        load_mnist()


def test_an_incomplete_folder_is_not_skipped(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte of MNIST are missing"):
        load_mnist(small)
    monkeypatch.setenv("BITBOOK_DATA", str(small))
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte of MNIST are missing"):
        load_mnist()


@pytest.mark.parametrize("position", ["first", "middle", "last", "truncated", "longer", "bomb", "pixel"])
def test_a_damaged_file_is_refused(small: Path, position: str) -> None:
    path = small / "train-images-idx3-ubyte.gz"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[{"first": 0, "middle": len(good) // 2, "last": -5}.get(position, 0)] ^= 0x10
    changed = bytearray(gzip.decompress(good))
    changed[-1] ^= 1
    bad = {
        "truncated": good[:-9],
        "longer": gzip.compress(gzip.decompress(good) + b"\0"),
        "bomb": gzip.compress(bytes(10_000_000)),
        "pixel": gzip.compress(changed),
    }
    path.write_bytes(bad.get(position, flipped))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: .*; get an intact copy"):
        load_mnist(small)


def test_mirrors_fill_the_cache(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first mirror does not answer, the second has one damaged file, the third is good."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in small.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes()[: -1 if "train-images" in path.name else None])
    mirrors = [f"{folder.as_uri()}/" for folder in (tmp_path / "silent", damaged, small)]
    monkeypatch.setattr(mnist, "MIRRORS", mirrors)
    expected = load_mnist(small)
    assert_equal(load_mnist(), expected)
    cached = tmp_path / "cache" / "bitbook" / "mnist"
    assert sorted(path.name for path in cached.iterdir()) == sorted(path.name for path in small.iterdir())
    monkeypatch.setattr(mnist, "MIRRORS", ())
    assert_equal(load_mnist(), expected)


def test_without_network_the_error_says_what_to_do(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "MIRRORS", [f"{tmp_path.as_uri()}/silent/"])
    with pytest.raises(DataError, match="Set BITBOOK_DATA to a folder with train-images-idx3-ubyte.gz, .*'digits'"):
        load_mnist()
    assert not (tmp_path / "cache").exists()


def test_real_mnist(mnist: Dataset) -> None:
    assert mnist.train_x.shape == (60_000, 784)
    assert mnist.test_x.shape == (10_000, 784)
    assert mnist.train_x.aminmax() == (-1, 1)
    assert mnist.train_y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert mnist.test_y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert mnist.train_x.mean().item() == pytest.approx((0.1306604762738429 - 0.5) / 0.5, abs=1e-5)
