"""What a data set is here: four tensors that fit in memory, and how validation data is split off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitbook.errors import PlanError

Examples = Float[Tensor, "n features"] | Int[Tensor, "n length"]
Labels = Int[Tensor, " n"] | Int[Tensor, "n length"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set, ready to train on; in one of sequences, every place of an example is classified.

    Attributes:
        name: how studies and reports call it.
        train_x, test_x: (examples, features) float32; an image is one row, normalised as its loader says.  Of
            sequences, (examples, length) int64.
        train_y, test_y: (examples,) int64, in 0 … classes - 1.  Of sequences, (examples, length), with `IGNORED` where
            there is nothing to predict.
        classes: number of classes; of sequences, of tokens.
        input_shape: one example before it was flattened, channels first; its product is `features`.
    """

    name: str
    train_x: Examples
    train_y: Labels
    test_x: Examples
    test_y: Labels
    classes: int
    input_shape: tuple[int, ...]


class Split(NamedTuple):
    """Training data, and the part of it that is held out for validation."""

    train_x: Examples
    train_y: Labels
    val_x: Examples
    val_y: Labels


def split(dataset: Dataset, holdout: int, seed: int = 0) -> Split:
    """Hold `holdout` training examples out for validation; the test examples are not touched.

    Which examples is decided by `seed` alone, never by a training seed, so that all trials of a study
    validate on the same ones. They are drawn without stratification; both parts keep the order of the data
    set, and `holdout=0` gives the training data itself with an empty validation part. Raises `PlanError`
    unless 0 <= holdout < number of training examples.
    """
    n = len(dataset.train_x)
    if not 0 <= holdout < n:
        raise PlanError(f"{dataset.name}: {holdout} of {n} training examples cannot be held out, 0 to {n - 1} can")
    x, y = dataset.train_x, dataset.train_y
    if holdout == 0:
        return Split(x, y, x[:0], y[:0])  # without a copy
    held_out = torch.zeros(n, dtype=torch.bool)
    held_out[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:holdout]] = True
    return Split(x[~held_out], y[~held_out], x[held_out], y[held_out])
