"""Content to bytes: the same content gives the same bytes, in any order and any process.

The rules and their reasons are in FORMAT.md, beside this file.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from bitbook.artifact import one, per_tensor
from bitbook.artifact.artifact import Artifact
from bitbook.artifact.ledger import Ledger
from bitbook.artifact.read import ledger_from_bytes
from bitbook.coding.choose import Smallest
from bitbook.coding.coder import Coder
from bitbook.errors import PlanError

Layout = Literal["one", "per-tensor"]
"""One entry for the whole model, or one for each tensor."""

LARGE = 10_000_000
"""Elements from which on a model has an entry for each tensor, unless the caller decides."""


def save(
    artifact: Artifact,
    path: str | os.PathLike[str],
    coder: Coder = Smallest(),
    layout: Layout | None = None,
) -> Ledger:
    """Write a file, whole or not at all, and return its ledger; arguments and errors as for `to_bytes`."""
    data, ledger = to_bytes(artifact, coder, layout)
    with whole(path) as file:
        file.write(data)
    return ledger


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file to write into, which takes its name, if need be from another, when the block ends without error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # renaming works within one folder only
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_bytes(artifact: Artifact, coder: Coder = Smallest(), layout: Layout | None = None) -> tuple[bytes, Ledger]:
    """The file's bytes, and what each of them is for.

    Args:
        artifact: the content.
        coder: one that a file can name, see `contents.CODERS`.
        layout: "one" (format 2) is smaller, "per-tensor" (format 1) lets readers pick single tensors; None:
            "one" for a model of fewer than 10^7 elements, unless its names are too many.

    Raises `PlanError` for a type, a name or a coder that the format does not have, and for a recipe that is
    still relative to a shape.
    """
    if layout is not None and layout not in get_args(Layout):
        raise PlanError(f"layout={layout!r}: use one of {', '.join(get_args(Layout))}")
    try:
        if layout is None:
            layout = "one" if _elements(artifact) < LARGE and one.fits(artifact, coder) else "per-tensor"
        data = one.build(artifact, coder) if layout == "one" else per_tensor.build(artifact, coder)
    except UnicodeEncodeError as error:
        around = error.object[max(error.start - 20, 0) : error.end + 20]
        raise PlanError(f"a name is not valid Unicode, at {around!r}; rename it") from None
    # Read back from the bytes themselves, which checks them and refuses what a reader would refuse.
    return data, ledger_from_bytes(data, max_elements=1 << 62)


def _elements(artifact: Artifact) -> int:
    return sum(math.prod(tensor.shape) for tensor in artifact.tensors.values())
