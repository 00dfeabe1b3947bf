"""Trained weights from a file: safetensors, or what `torch.save(model.state_dict(), …)` writes.

Nothing in a file is executed: a .pt file may hold tensors only.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bitbook.errors import AlreadyCompressed, CorruptArtifact, ModelMismatch

TORCH_SUFFIXES = (".pt", ".pth", ".bin")


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, `.pt`, `.pth` or `.bin` file, by name, in memory of the CPU.

    Raises:
        CorruptArtifact: the file is damaged, of another kind, or holds anything but named tensors; `AlreadyCompressed`
            where bitbook wrote it.
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    raise CorruptArtifact(f"{path}: weights come from .safetensors, {', '.join(TORCH_SUFFIXES)}, not {path.suffix!r}")


@torch.no_grad()
def load_weights(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Copy the weights of a file into `model`, by name, and return it; of tied weights one name is enough.

    Raises `CorruptArtifact` as `read_weights` does, and `ModelMismatch` where names, shapes or kinds of
    numbers differ; the model is then untouched.
    """
    stored = read_weights(path)
    places: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    given = {id(places[name]) for name in stored.keys() & places.keys()}
    missing = [name for name, tensor in places.items() if name not in stored and id(tensor) not in given]
    extra = [name for name in stored if name not in places]
    if missing or extra:
        differences = [f"lacks {_listed(missing)} of the model"] if missing else []
        differences += [f"has {_listed(extra)} beside it"] if extra else []
        raise ModelMismatch(f"{path}: the file {' and '.join(differences)}")
    for name, tensor in stored.items():
        if tensor.shape != places[name].shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(places[name].shape)} in the model"
            raise ModelMismatch(f"{path}: {name} is {shapes}")
        if tensor.is_floating_point() != places[name].is_floating_point():
            raise ModelMismatch(f"{path}: {name} is {tensor.dtype} in the file, {places[name].dtype} in the model")
    for name, tensor in stored.items():
        places[name].copy_(tensor)
    return model


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            if "bitbook" in (file.metadata() or file.keys()):
                raise AlreadyCompressed(f"{path} is compressed already; first run 'bitbook decompress'")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise CorruptArtifact(f"{path}: {error}") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise CorruptArtifact(
            f"{path}: damaged, or holds more than tensors, which is not loaded as it could run anything; "
            "write it with torch.save(model.state_dict(), …)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:  # what torch makes of a damaged archive
        raise CorruptArtifact(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise CorruptArtifact(f"{path}: holds a {type(found).__name__}, not a dict of tensors by name")
    if wrong := [str(name) for name, value in found.items() if not isinstance(value, Tensor)]:
        raise CorruptArtifact(
            f"{path}: {_listed(wrong)}: not a tensor; write it with torch.save(model.state_dict(), …)"
        )
    return {name: tensor.detach() for name, tensor in found.items()}


def _listed(names: list[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
