"""CIFAR-10 from a folder, the cache or its home page, checked to the last byte wherever it comes from.

Its batches are in their official binary form, or in a smaller lossless one.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int16, UInt8
from torch import Tensor

from bitbook.data.dataset import Dataset
from bitbook.download import FAILURES, cache_folder, fetch, write_whole
from bitbook.errors import DataError

SIDE = 32
PIXELS = 3 * SIDE * SIDE
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue in [0, 1]: ImageNet's, with which the public networks for CIFAR-10 were trained."""
BLACK = tuple(-mean / deviation for mean, deviation in zip(MEAN, DEVIATION, strict=True))
"""What they saw beyond the edges of images that were moved."""

_HEADER = 1024  # bytes that the header of an array may take


class Batch(NamedTuple):
    """One of the files: its name, its number of images, and the SHA-256 of its official form."""

    name: str
    images: int
    sha256: str


TRAINING = (
    Batch("data_batch_1", 10_000, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
    Batch("data_batch_2", 10_000, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
    Batch("data_batch_3", 10_000, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
    Batch("data_batch_4", 10_000, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
)
TEST = Batch("test_batch", 10_000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b")

ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
"""As its author gives it; no proof against malice, which is what the hashes of the batches are for."""
_MOST_ARCHIVE = 200_000_000  # bytes; it has 170 million
_IN_ARCHIVE = "cifar-10-batches-bin"  # the folder of the batches there


def load_cifar10(folder: str | os.PathLike[str] | None = None) -> Dataset:
    """Load CIFAR-10 (Krizhevsky 2009): training batches 1 to 4, 40,000 images, and the 10,000 test images.

    Each batch is `NAME.bin`, the official binary form, or `NAME.npz`, half its size: the arrays `residual`, what
    `undo_prediction` takes, and `label`.  They are taken from `folder` where it is given, and otherwise from the first
    of these that has any: `$BITBOOK_DATA/cifar10`, `$BITBOOK_DATA`, the cache (`bitbook/cifar10` in `$XDG_CACHE_HOME`
    or `~/.cache`), and its home page, from which 170 MB fill the cache.  Pixels become `(x / 255 - MEAN) / DEVIATION`
    by channel, channels first.

    Raises `DataError` where a folder lacks a batch, a batch is not CIFAR-10's to the last byte, or there is no network;
    the message says what to do.
    """
    found = _folder(Path(folder) if folder is not None else None)
    train = [_read(found, batch) for batch in TRAINING]
    train_x = torch.empty(sum(len(records) for records in train), PIXELS)
    at = 0
    for records in train:
        train_x[at : at + len(records)] = _pixels(records)
        at += len(records)
    train_y = torch.cat([_labels(records) for records in train])
    test = _read(found, TEST)
    return Dataset("cifar10", train_x, train_y, _pixels(test), _labels(test), classes=10, input_shape=(3, SIDE, SIDE))


def normalise(images: UInt8[np.ndarray, "n 3 rows cols"]) -> Float[Tensor, "n features"]:
    """Map pixels 0 … 255 to float32, one image per row: `(x / 255 - mean) / deviation` by channel, in this order."""
    mean, deviation = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return torch.from_numpy(images).float().div_(255).sub_(mean).div_(deviation).flatten(1)


def undo_prediction(residual: UInt8[np.ndarray, "3 n rows cols"]) -> UInt8[np.ndarray, "n 3 rows cols"]:
    """The images of which `residual` is what a predictor left, modulo 256.

    The planes are R - G, G and B - G.  Each value is predicted from its left, upper and upper left neighbours a, b, c
    as `a + b - c`, clamped to between a and b: the median edge detector of Weinberger, Seroussi & Sapiro (2000);
    along the first row and column as the one neighbour there is, at the corner as 0.
    """
    # (rows, cols, 3, n): a pixel of every image lies together, since each step reads that
    planes = np.ascontiguousarray(residual.transpose(2, 3, 0, 1), dtype=np.int16)
    for i in range(planes.shape[0]):
        for j in range(planes.shape[1]):
            planes[i, j] = _next(planes[i, j], _predicted(planes, i, j))
    red_and_blue = planes[:, :, ::2]
    red_and_blue += planes[:, :, 1:2]
    return np.ascontiguousarray(planes.transpose(3, 2, 0, 1).astype(np.uint8))


def _predicted(planes: Int16[np.ndarray, "rows cols 3 n"], i: int, j: int) -> Int16[np.ndarray, "3 n"]:
    if i and j:
        left, above, corner = planes[i, j - 1], planes[i - 1, j], planes[i - 1, j - 1]
        return np.clip(left + above - corner, np.minimum(left, above), np.maximum(left, above))
    return planes[i, j - 1] if j else planes[i - 1, j] if i else np.zeros_like(planes[0, 0])


def _next(residual: Int16[np.ndarray, "3 n"], predicted: Int16[np.ndarray, "3 n"]) -> Int16[np.ndarray, "3 n"]:
    """One pixel of every image; green first, since red and blue are bytes only together with it."""
    values = residual + predicted
    green = values[1] & 255
    values = ((values + green) & 255) - green
    values[1] = green
    return values


def _folder(named: Path | None) -> Path:
    """The folder that has the batches, filling the cache from the archive as the last resort."""
    batches = (*TRAINING, TEST)
    if named is None:
        cache = cache_folder("cifar10")
        folders = [cache]
        if root := os.environ.get("BITBOOK_DATA"):
            if not Path(root).is_dir():
                raise DataError(f"BITBOOK_DATA is {root}, which is not a folder")
            folders = [Path(root, "cifar10"), Path(root), cache]
        named = next((f for f in folders if any(_path(f, b).exists() for b in batches)), cache)
        if named == cache and not all(_path(cache, batch).exists() for batch in batches):
            _download(cache)
    missing = [batch.name for batch in batches if not _path(named, batch).exists()]
    if missing:
        raise DataError(f"{named}: {', '.join(missing)} of CIFAR-10 are missing; each may be .bin or .npz")
    return named


def _download(cache: Path) -> None:
    """Fetch the archive and write its batches to the cache, after all of them are known to be right."""
    batches = (*TRAINING, TEST)
    try:
        data = fetch(ARCHIVE, _MOST_ARCHIVE)
        found = _unpacked(data)
    except (*FAILURES, DataError) as error:
        names = ", ".join(batch.name for batch in batches)
        raise DataError(
            "CIFAR-10 is neither in BITBOOK_DATA nor in the cache, and could not be downloaded; set BITBOOK_DATA to a "
            f"folder with {names} as .bin, the official binary version of CIFAR-10, or .npz\n{ARCHIVE}: {error}"
        ) from error
    for batch in batches:
        write_whole(cache / f"{batch.name}.bin", found[batch.name])


def _unpacked(archive: bytes) -> dict[str, bytes]:
    """The batches in the archive; names in it are compared and never become paths."""
    digest = hashlib.md5(archive, usedforsecurity=False).hexdigest()
    if digest != ARCHIVE_MD5:  # before anything is decompressed
        raise DataError(f"the MD5 of the archive must be {ARCHIVE_MD5}, but is {digest}")
    wanted = {f"{_IN_ARCHIVE}/{batch.name}.bin": batch for batch in (*TRAINING, TEST)}
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as members:
            for member in members:
                batch = wanted.get(member.name)
                stream = members.extractfile(member) if batch is not None and member.isreg() else None
                if batch is not None and stream is not None:
                    data = stream.read(_size(batch) + 1)
                    _check(_records(data, batch, member.name), batch, member.name)
                    found[batch.name] = data
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise DataError(f"damaged archive ({error})") from error
    if missing := [name for name, batch in wanted.items() if batch.name not in found]:
        raise DataError(f"the archive has no {', '.join(missing)}")
    return found


def _path(folder: Path, batch: Batch) -> Path:
    official = folder / f"{batch.name}.bin"
    return official if official.exists() else folder / f"{batch.name}.npz"


def _size(batch: Batch) -> int:
    return batch.images * (1 + PIXELS)


def _read(folder: Path, batch: Batch) -> UInt8[np.ndarray, "n record"]:
    """A batch in its official form: a label, then the image, channels first, in each row."""
    path = _path(folder, batch)
    if path.suffix == ".bin":
        with path.open("rb") as stream:
            records = _records(stream.read(_size(batch) + 1), batch, str(path))
    else:
        residual, label = _arrays(path, {"residual": (3, batch.images, SIDE, SIDE), "label": (batch.images,)})
        records = np.concatenate([label[:, None], undo_prediction(residual).reshape(batch.images, -1)], 1)
    _check(records, batch, str(path))
    return records


def _records(data: bytes, batch: Batch, origin: str) -> UInt8[np.ndarray, "n record"]:
    """View the official form of a batch, of which at most one byte too many was read, as one row per image."""
    size = _size(batch)
    if len(data) != size:
        found = f"{len(data)} bytes" if len(data) < size else "more"
        raise DataError(f"{origin}: {batch.name} has {size} bytes, this has {found}; get an intact copy")
    return np.frombuffer(data, np.uint8).reshape(batch.images, 1 + PIXELS)


def _check(records: UInt8[np.ndarray, "n record"], batch: Batch, origin: str) -> None:
    digest = hashlib.sha256(records.tobytes()).hexdigest()
    if digest != batch.sha256:
        raise DataError(f"{origin}: SHA-256 of the images must be {batch.sha256}, but is {digest}; get an intact copy")


def _arrays(path: Path, shapes: dict[str, tuple[int, ...]]) -> list[UInt8[np.ndarray, "..."]]:
    """The arrays of bytes of an .npz file, of which nothing is believed and no more is taken than they have."""
    found = []
    try:
        with zipfile.ZipFile(path) as archive:
            for name, shape in shapes.items():
                with archive.open(f"{name}.npy") as member:
                    data = member.read(_HEADER + int(np.prod(shape)) + 1)
                array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
                if array.dtype != np.uint8 or array.shape != shape:
                    what = f"{array.dtype} {list(array.shape)}"
                    raise DataError(f"{path}: {name} must be uint8 {list(shape)}, but is {what}; get an intact copy")
                found.append(array)
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, OSError, NotImplementedError) as error:
        raise DataError(f"{path}: damaged .npz data ({error}); get an intact copy") from error
    return found


def _pixels(records: UInt8[np.ndarray, "n record"]) -> Float[Tensor, "n features"]:
    return normalise(np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, SIDE, SIDE))


def _labels(records: UInt8[np.ndarray, "n record"]) -> Tensor:
    return torch.from_numpy(records[:, 0].astype(np.int64))
