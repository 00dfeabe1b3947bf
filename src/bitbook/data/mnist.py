"""MNIST from a folder, the cache or a public mirror: checked down to the last byte wherever it comes from."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bitbook.data.dataset import Dataset
from bitbook.download import FAILURES, cache_folder, fetch, write_whole
from bitbook.errors import DataError

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


class IdxFile(NamedTuple):
    """One of the four files: its name, the shape of its array, and the SHA-256 of its decompressed bytes."""

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def size(self) -> int:
        """Bytes of the decompressed file: magic number, dimensions, values."""
        return 4 + 4 * len(self.shape) + math.prod(self.shape)


FILES = (
    IdxFile(
        "train-images-idx3-ubyte",
        (60_000, 28, 28),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    IdxFile(
        "train-labels-idx1-ubyte",
        (60_000,),
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    IdxFile(
        "t10k-images-idx3-ubyte",
        (10_000, 28, 28),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    IdxFile(
        "t10k-labels-idx1-ubyte",
        (10_000,),
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
)


def load_mnist(folder: str | os.PathLike[str] | None = None) -> Dataset:
    """Load MNIST: 60,000 training and 10,000 test images, 784 features, 10 classes.

    The four files, gzipped or not, are taken from `folder` where it is given, and otherwise from the first of
    these that has them: `$BITBOOK_DATA/mnist`, `$BITBOOK_DATA`, the cache (`bitbook/mnist` in
    `$XDG_CACHE_HOME` or `~/.cache`), and public mirrors, which fill the cache. Pixels become
    `(x / 255 - 0.5) / 0.5`, the same bits as torchvision's `ToTensor` and `Normalize`.

    Raises `DataError` if a folder that was named has only some of the files, if a file is not MNIST's to the
    last byte, and if there is no network; the message says what to do.
    """
    found = _folder(Path(folder) if folder is not None else None)
    train_x, train_y, test_x, test_y = (_read(_path(found, file), file) for file in FILES)
    return Dataset(
        "mnist",
        pixels(train_x),
        torch.from_numpy(train_y).long(),
        pixels(test_x),
        torch.from_numpy(test_y).long(),
        classes=10,
        input_shape=(1, 28, 28),
    )


def pixels(images: UInt8[np.ndarray, "n rows cols"]) -> Float[Tensor, "n features"]:
    """Map pixels 0 … 255 to float32 in [-1, 1], one image per row: `(x / 255 - 0.5) / 0.5` in this order."""
    x = torch.from_numpy(images).flatten(1).float()
    return x.div_(255).sub_(0.5).div_(0.5)


def parse_idx(data: bytearray, dims: int, name: str) -> UInt8[np.ndarray, "..."]:
    """View the bytes of an IDX file as an array of unsigned bytes with `dims` dimensions; nothing is copied.

    Layout: `00 00 08 dims`, the dimensions as big-endian 32-bit integers, the values, the last index running
    fastest. Raises `DataError`, calling the data `name`, if `data` is anything else, be it one byte longer.
    """
    magic, header = bytes([0, 0, 8, dims]), 4 + 4 * dims
    if not data.startswith(magic):
        raise DataError(f"{name}: starts with {data[:4].hex(' ')}, but must start with {magic.hex(' ')}")
    if len(data) < header:
        raise DataError(f"{name}: ends within its header, after {len(data)} of {header} bytes")
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]
    if header + math.prod(shape) != len(data):
        raise DataError(f"{name}: {shape} values take {header + math.prod(shape)} bytes, not {len(data)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _folder(named: Path | None) -> Path:
    """Find the folder that has the four files, filling the cache from a mirror as the last resort."""
    if named is not None:
        return _complete(named)
    if root := os.environ.get("BITBOOK_DATA"):
        if not Path(root).is_dir():
            raise DataError(f"BITBOOK_DATA is {root}, which is not a folder")
        for folder in (Path(root, "mnist"), Path(root)):
            if any(_path(folder, file).exists() for file in FILES):
                return _complete(folder)
    cache = cache_folder("mnist")
    for file in FILES:
        if not _path(cache, file).exists():
            _download(file, cache)
    return cache


def _complete(folder: Path) -> Path:
    missing = [file.name for file in FILES if not _path(folder, file).exists()]
    if missing:
        raise DataError(f"{folder}: {', '.join(missing)} of MNIST are missing; each may be gzipped or not")
    return folder


def _path(folder: Path, file: IdxFile) -> Path:
    plain = folder / file.name
    return plain if plain.exists() else folder / f"{file.name}.gz"


def _read(path: Path, file: IdxFile) -> UInt8[np.ndarray, "..."]:
    with path.open("rb") as stream:
        return parse_idx(_checked(stream, file, str(path)), len(file.shape), str(path))


def _checked(stream: BinaryIO, file: IdxFile, origin: str) -> bytearray:
    """Decompress `stream` where it is gzipped, and check that it holds `file`, byte for byte.

    At most one byte more than `file` has is taken, so that neither a wrong file nor a gzip bomb fills memory.
    """
    start = stream.read(2)
    stream.seek(0)
    try:
        plain = gzip.GzipFile(fileobj=stream) if start == b"\x1f\x8b" else stream
        data = bytearray(plain.read(file.size + 1))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{origin}: damaged gzip data ({error}); get an intact copy") from error
    if len(data) != file.size:
        size = f"{len(data)} bytes" if len(data) < file.size else "more"
        raise DataError(f"{origin}: {file.name} has {file.size} bytes, this has {size}; get an intact copy")
    if (digest := hashlib.sha256(data).hexdigest()) != file.sha256:
        raise DataError(f"{origin}: SHA-256 must be {file.sha256}, but is {digest}; get an intact copy")
    return data


def _download(file: IdxFile, cache: Path) -> None:
    """Fetch one file into the cache from the first mirror that has it."""
    failures = []
    for mirror in MIRRORS:
        url = f"{mirror}{file.name}.gz"
        try:
            data = fetch(url, file.size + 1024)  # the little that gzip adds to what it cannot shrink
            _checked(io.BytesIO(data), file, file.name)
        except (*FAILURES, DataError) as error:
            failures.append(f"{url}: {error}")
            continue
        write_whole(cache / f"{file.name}.gz", data)
        return
    raise DataError(
        "MNIST is neither in BITBOOK_DATA nor in the cache, and no mirror gave it. Set BITBOOK_DATA to a "
        f"folder with {', '.join(f'{file.name}.gz' for file in FILES)}, or use the data set 'digits', which "
        "needs no download.\n" + "\n".join(failures)
    )
