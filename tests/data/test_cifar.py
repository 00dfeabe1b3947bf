"""The reader, on small batches that pass for CIFAR-10's, and on CIFAR-10 itself where it is."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.conftest import Server

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
    monkeypatch.setattr(cifar, "ARCHIVE", (tmp_path / "nowhere.tar.gz").as_uri())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
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
    with pytest.raises(
        DataError, match="(?s)set BITBOOK_DATA to a folder with data_batch_1, .*official binary.*nowhere"
    ):
        load_cifar10()
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("BITBOOK_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere, which is not a folder"):
        load_cifar10()
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("BITBOOK_DATA", str(tmp_path / "empty"))
    with pytest.raises(DataError, match="could not be downloaded; set"):
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


def archive(members: Mapping[str, bytes], link: str | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            if name == link:
                info.type, info.size, info.linkname = tarfile.SYMTYPE, 0, "/etc/hostname"
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def batches_of(small: Path) -> dict[str, bytes]:
    """All of them in their official form."""
    found = {}
    for batch in (*cifar.TRAINING, cifar.TEST):
        records = cifar._read(small, batch)
        found[f"{batch.name}.bin"] = records.tobytes()
    return found


def serve(server: Server, data: bytes, monkeypatch: pytest.MonkeyPatch, md5: str | None = None) -> None:
    (server.folder / "it.tar.gz").write_bytes(data)
    monkeypatch.setattr(cifar, "ARCHIVE", f"{server.url}it.tar.gz")
    monkeypatch.setattr(cifar, "ARCHIVE_MD5", md5 or hashlib.md5(data).hexdigest())


def test_the_archive_fills_the_cache(
    small: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else is in it, whatever its name, is not unpacked."""
    more = {"readme.html": b"text", "../../outside": b"no", "data_batch_5.bin": b"not needed"}
    serve(server, archive({**more, **batches_of(small)}), monkeypatch)
    expected, found = load_cifar10(small), load_cifar10()
    (server.folder / "it.tar.gz").unlink()
    again = load_cifar10()
    for data in (found, again):
        assert torch.equal(data.train_x, expected.train_x) and torch.equal(data.test_y, expected.test_y)
    cached = tmp_path / "cache" / "bitbook" / "cifar10"
    assert sorted(path.name for path in cached.iterdir()) == sorted(batches_of(small))
    assert not list(tmp_path.rglob("outside"))
    (cached / "test_batch.bin").unlink()  # half a cache is filled again
    with pytest.raises(DataError, match="404"):
        load_cifar10()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_batch_3.bin": None}, "the archive has no cifar-10-batches-bin/data_batch_3.bin"),
        ({"data_batch_3.bin": b"short"}, "data_batch_3 has 6146 bytes, this has 5 bytes"),
        ({"data_batch_3.bin": bytes(50_000)}, "data_batch_3 has 6146 bytes, this has more"),
        ({"data_batch_3.bin": bytes(6146)}, "SHA-256 of the images must be"),
        ({"link": "data_batch_3.bin"}, "the archive has no cifar-10-batches-bin/data_batch_3.bin"),
        ({"md5": "0" * 32}, "the MD5 of the archive must be 0000"),
        ({"cut": 40}, "damaged archive"),
        ({"cut": 0}, "damaged archive"),
    ],
)
def test_a_wrong_archive_is_refused(
    small: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    link, md5, cut = change.pop("link", None), change.pop("md5", None), change.pop("cut", None)
    members = {name: data for name, data in {**batches_of(small), **change}.items() if data is not None}
    serve(server, archive(members, link)[:cut], monkeypatch, md5)
    with pytest.raises(DataError, match=f"(?s)could not be downloaded; set BITBOOK_DATA.*{message}"):
        load_cifar10()
    assert not (tmp_path / "cache").exists()


def test_real_cifar10(cifar10: Dataset) -> None:
    assert cifar10.train_x.shape == (40_000, 3072) and cifar10.test_x.shape == (10_000, 3072)
    assert cifar10.test_y[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert cifar10.test_y.bincount().tolist() == [1000] * 10
