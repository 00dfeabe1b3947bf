"""The reader, on small batches that pass for CIFAR-10's, and on CIFAR-10 itself where it is."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bitbook.data import Dataset, cifar, load_cifar10, load_dataset
from bitbook.errors import DataError


def predict_pixel_by_pixel(images: np.ndarray) -> np.ndarray:
    """The obvious encoder: residuals (3, n, rows, cols) of images (n, 3, rows, cols)."""
    n, _, rows, cols = images.shape
    r, g, b = images.astype(int).transpose(1, 0, 2, 3)
    planes = np.stack([r - g, g, b - g])
    found = np.zeros((3, n, rows, cols), np.uint8)
    for plane, image, i, j in np.ndindex(3, n, rows, cols):
        p = planes[plane, image]
        if i and j:
            left, above = int(p[i, j - 1]), int(p[i - 1, j])
            guess = min(max(left + above - int(p[i - 1, j - 1]), min(left, above)), max(left, above))
        else:
            guess = int(p[i, j - 1]) if j else int(p[i - 1, j]) if i else 0
        found[plane, image, i, j] = (int(p[i, j]) - guess) % 256
    return found


@given(arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(3), st.integers(1, 5), st.integers(1, 5))))
def test_prediction_is_undone_exactly(images: np.ndarray) -> None:
    assert np.array_equal(cifar.undo_prediction(predict_pixel_by_pixel(images)), images)


def official(images: np.ndarray, labels: np.ndarray) -> bytes:
    return b"".join(bytes([y]) + image.tobytes() for image, y in zip(images, labels, strict=True))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with batches of two images, which `cifar` is told are CIFAR-10's; every other one is official."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar10"
    folder.mkdir()
    batches = []
    for i, batch in enumerate((*cifar.TRAINING, cifar.TEST)):
        images, labels = rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, 2, dtype=np.uint8)
        data = official(images, labels)
        if i % 2:
            (folder / f"{batch.name}.bin").write_bytes(data)
        else:
            np.savez_compressed(folder / f"{batch.name}.npz", residual=predict_pixel_by_pixel(images), label=labels)
        batches.append(cifar.Batch(batch.name, 2, hashlib.sha256(data).hexdigest()))
    monkeypatch.setattr(cifar, "TRAINING", tuple(batches[:4]))
    monkeypatch.setattr(cifar, "TEST", batches[4])
    monkeypatch.delenv("BITBOOK_DATA", raising=False)
    return folder


def test_both_forms_are_read(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_cifar10(small)
    assert data.train_x.shape == (8, 3072) and data.test_x.shape == (2, 3072) and data.train_y.dtype == torch.int64
    records = np.frombuffer((small / "data_batch_2.bin").read_bytes(), np.uint8).reshape(2, 3073)
    assert data.train_y[2:4].tolist() == records[:, 0].tolist()
    slow = (records[:, 1:].reshape(2, 3, 1024) / 255 - np.array(cifar.MEAN)[:, None]) / np.array(cifar.DEVIATION)[
        :, None
    ]
    np.testing.assert_allclose(data.train_x[2:4].numpy(), slow.reshape(2, -1), rtol=1e-5, atol=1e-6)
    for root in (small, small.parent):
        monkeypatch.setenv("BITBOOK_DATA", str(root))
        assert torch.equal(load_dataset("cifar10").test_x, data.test_x)


def test_without_a_folder_the_error_says_what_to_do(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="set BITBOOK_DATA to a folder with data_batch_1, .*official binary"):
        load_cifar10()
    monkeypatch.setenv("BITBOOK_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere, which is not a folder"):
        load_cifar10()
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("BITBOOK_DATA", str(tmp_path / "empty"))
    with pytest.raises(DataError, match="empty has no batch of CIFAR-10; set"):
        load_cifar10()
    (small / "data_batch_3.npz").unlink()
    with pytest.raises(DataError, match="data_batch_3 of CIFAR-10 are missing"):
        load_cifar10(small)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _longer(path: Path) -> None:
    np.savez_compressed(path, residual=np.zeros((3, 3, 32, 32), np.uint8), label=np.zeros(3, np.uint8))


def _other_type(path: Path) -> None:
    np.savez_compressed(path, residual=np.zeros((3, 2, 32, 32), np.int16), label=np.zeros(2, np.uint8))


def _bomb(path: Path) -> None:
    np.savez_compressed(path, residual=np.zeros(50_000_000, np.uint8), label=np.zeros(2, np.uint8))


def _pickled(path: Path) -> None:
    np.savez_compressed(path, residual=np.array([object], object), label=np.zeros(2, np.uint8))


def _nameless(path: Path) -> None:
    np.savez_compressed(path, images=np.zeros(2, np.uint8))


def _not_an_array(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("residual.npy", b"\x93NUMPY\x01\x00\xff\xff{")
        archive.writestr("label.npy", b"")


def _one_pixel(path: Path) -> None:
    with np.load(path) as stored:
        residual, label = stored["residual"].copy(), stored["label"]
    residual[0, 1, 31, 31] ^= 1
    np.savez_compressed(path, residual=residual, label=label)


@pytest.mark.parametrize(
    "damage",
    [_flip, _cut, _empty, _longer, _other_type, _bomb, _pickled, _nameless, _not_an_array, _one_pixel],
)
def test_a_damaged_file_is_refused(small: Path, damage: Callable[[Path], None]) -> None:
    damage(small / "data_batch_1.npz")
    with pytest.raises(DataError, match="data_batch_1.npz: .*; get an intact copy"):
        load_cifar10(small)


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: d[:-1] + bytes([d[-1] ^ 1])])
def test_a_damaged_official_file_is_refused(small: Path, change: Callable[[bytes], bytes]) -> None:
    path = small / "data_batch_2.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match="data_batch_2.bin: .*; get an intact copy"):
        load_cifar10(small)


def test_real_cifar10(cifar10: Dataset) -> None:
    assert cifar10.train_x.shape == (40_000, 3072) and cifar10.test_x.shape == (10_000, 3072)
    assert cifar10.test_y[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert cifar10.test_y.bincount().tolist() == [1000] * 10
