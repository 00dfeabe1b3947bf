"""Data sets as plain functions that return a `Dataset`: a new one is a function and a line in `DATASETS`."""

from __future__ import annotations

from collections.abc import Callable

from bitbook.data.cifar import load_cifar10 as load_cifar10
from bitbook.data.dataset import Dataset as Dataset
from bitbook.data.dataset import Split as Split
from bitbook.data.dataset import split as split
from bitbook.data.digits import load_digits as load_digits
from bitbook.data.mnist import load_mnist as load_mnist
from bitbook.data.moves import Moves as Moves
from bitbook.data.moves import crop_images as crop_images
from bitbook.data.moves import move_images as move_images
from bitbook.data.stories import load_stories as load_stories
from bitbook.errors import DataError
from bitbook.importing import import_callable
from bitbook.loop import IGNORED as IGNORED

DATASETS: dict[str, Callable[[], Dataset]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "cifar10": load_cifar10,
    "stories": load_stories,
}


def load_dataset(name: str) -> Dataset:
    """Load a data set by its name in `DATASETS`, or from any function of yours named as `module:callable`.

    The function is called without arguments. Raises `DataError` for an unknown name, and for a function that
    cannot be imported or returns something other than a `Dataset`.
    """
    if ":" not in name:
        if name not in DATASETS:
            raise DataError(f"no data set {name!r}; use {', '.join(DATASETS)} or a module:callable of yours")
        return DATASETS[name]()
    dataset = import_callable(name, DataError)()
    if not isinstance(dataset, Dataset):
        raise DataError(f"{name} returned {type(dataset).__name__}; it must return a bitbook.data.Dataset")
    return dataset
