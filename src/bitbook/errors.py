"""The exceptions of bitbook: one meaning each, all below `BitbookError`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class BitbookError(Exception):
    """Base of everything that bitbook raises on purpose."""


class PlanError(BitbookError, ValueError):
    """A recipe, a plan or an option does not fit what it is applied to."""


class NoFeedback(PlanError):
    """A recipe encodes all columns of its tensor together, so that no error can be fed back from one to another."""


class WeightError(BitbookError, ValueError):
    """A tensor holds values that cannot be quantized, such as NaN or infinity."""


class CorruptArtifact(BitbookError, ValueError):
    """A file is not what it claims to be: truncated, altered, or with a header that lies."""


class AlreadyCompressed(CorruptArtifact):
    """A file of bitbook's own was given where plain weights are wanted; `decompress` makes them of it."""


class ModelMismatch(BitbookError, ValueError):
    """A file and a model do not belong together: names or shapes differ."""


class BudgetError(BitbookError, ValueError):
    """No file within the budget of bytes could be made; the message says the smallest that was, and why."""


class DataError(BitbookError, ValueError):
    """A data set is missing, incomplete, or fails its checksum."""


class StudyError(BitbookError, RuntimeError):
    """A study cannot go on: another study's storage, a refused late result, failed trials."""


class CheckpointError(BitbookError, RuntimeError):
    """A checkpoint cannot be finished here: other work in the way, a worker that died, a source that changed."""


class MissingDependency(BitbookError, ImportError):
    """An optional package is needed; the message names the line that installs it."""


def optional_import(name: str, extra: str) -> ModuleType:
    """Import `name` on use, or raise `MissingDependency` naming the extra that brings it."""
    with needs(name, extra):
        return importlib.import_module(name)


@contextmanager
def needs(name: str, extra: str) -> Iterator[None]:
    """Imports within the block need `name`: raises `MissingDependency`, naming the extra, where one of them fails."""
    try:
        yield
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingDependency(f"{package} is not installed; run: pip install 'bitbook[{extra}]'") from error
