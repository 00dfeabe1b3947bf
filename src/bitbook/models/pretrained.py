"""Weights that others trained and published: from a folder, the cache or their public origin, checked to the last bit.

The same weights come in several containers (a pickle, a list of floats, safetensors), so what is checked is not a file
but the tensors in it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from bitbook.download import FAILURES, cache_folder, fetch, write_whole
from bitbook.errors import DataError


@dataclass(frozen=True)
class Origin:
    """Where a public file is, and how its bytes become tensors."""

    urls: tuple[str, ...]
    """Of the same file; the first that answers with the right one is taken."""
    most: int
    """Bytes that are read at most."""
    convert: Callable[[bytes], Mapping[str, Tensor]]
    """Raises `DataError` for bytes that are not such a file."""


@dataclass(frozen=True)
class Weights:
    """Published weights of one network."""

    file: str
    """Their name as safetensors, in a folder or in the cache."""
    source: str
    """Who published them, and under which licence."""
    sha256: str
    """As `digest` gives it."""
    origin: Origin | None = None
    """None where they cannot be had in a form that is read here."""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the tensors in the order of their names.

    Of each, it sees the line `name shape`, such as `linear.bias 10` or `linear.weight 10 64`, and then the values as
    little-endian float32.
    """
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(" ".join([name, *map(str, tensor.shape)]).encode() + b"\n")
        state.update(tensor.detach().float().contiguous().numpy().astype("<f4").tobytes())
    return state.hexdigest()


def load_weights(weights: Weights, folder: str | os.PathLike[str] | None = None) -> dict[str, Tensor]:
    """The tensors of `weights` by name, float32.

    They are taken from `folder` where it is given, and otherwise from the first of these that has them:
    `$BITBOOK_DATA/models`, the cache (`bitbook/models` in `$XDG_CACHE_HOME` or `~/.cache`), and their origin, which
    fills the cache.

    Raises `DataError` where none has them, or they are not the published ones to the last bit; the message says what
    to do.
    """
    if folder is not None:
        return _read(Path(folder, weights.file), weights)
    if root := os.environ.get("BITBOOK_DATA"):
        if not Path(root).is_dir():
            raise DataError(f"BITBOOK_DATA is {root}, which is not a folder")
        path = Path(root, "models", weights.file)
        if path.is_file():
            return _read(path, weights)
    path = cache_folder("models") / weights.file
    return _read(path, weights) if path.is_file() else _download(weights, path)


def _read(path: Path, weights: Weights) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"{path} is missing: {weights.source} as safetensors")
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise DataError(f"{path}: damaged safetensors data ({error}); get an intact copy") from error
    return _checked(tensors, weights, str(path))


def _checked(tensors: Mapping[str, Tensor], weights: Weights, where: str) -> dict[str, Tensor]:
    found = digest(tensors)
    if found != weights.sha256:
        raise DataError(f"{where}: SHA-256 of the tensors must be {weights.sha256}, but is {found}; get an intact copy")
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def _download(weights: Weights, path: Path) -> dict[str, Tensor]:
    advice = f"set BITBOOK_DATA to a folder with models/{weights.file}: {weights.source} as safetensors"
    if weights.origin is None:
        raise DataError(f"{weights.file} is not downloaded by itself, as its original is a file of Keras; {advice}")
    failures = []
    for url in weights.origin.urls:
        try:
            data = fetch(url, weights.origin.most)
            tensors = _checked(weights.origin.convert(data), weights, "what came")
        except (*FAILURES, DataError) as error:
            failures.append(f"{url}: {error}")
            continue
        write_whole(path, save(tensors))
        return tensors
    raise DataError(
        f"{weights.file} is neither in BITBOOK_DATA nor in the cache, and could not be downloaded; {advice}\n"
        + "\n".join(failures)
    )
