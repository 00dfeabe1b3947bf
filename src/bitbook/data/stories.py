"""TinyStories as tokens, for language models of 512 tokens: from a folder, checked to the last byte."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from bitbook.data.dataset import Dataset
from bitbook.errors import DataError
from bitbook.loop import IGNORED

FILE = "tinystories_tokens.npz"
SIZE = 447_972
SHA256 = "e63fd06d3fa9e42508a5c60fe6b99cb00fdc5c80c59f5612c6e39e7eaf559374"
VOCABULARY = 512
LENGTH = 511
"""Tokens of a story that are predicted, at most: the public networks see 512 places."""
TRAINING_STORIES = 1500
"""The first so many; the rest are the test set."""


def load_stories(folder: str | os.PathLike[str] | None = None) -> Dataset:
    """Load 1,800 stories of TinyStories (Eldan & Li 2023): 1,500 for training, 300 for testing, as 512 tokens' numbers.

    One example is one story, from its first token on.  `x` has the tokens that a model sees and `y` the one after each
    of them, both (stories, 511); where a story is over, `y` is `IGNORED`, and `x` goes on with the next story of the
    same part, as in the text that such models are trained on, so that what looks at all inputs sees nothing but text.

    The file `tinystories_tokens.npz` is taken from `folder`, or from `$BITBOOK_DATA/text`.  The public networks may
    have seen the stories, which are from the public training file.  Raises `DataError` where the file is missing or
    another one; the message says what to do.
    """
    if folder is None:
        root = os.environ.get("BITBOOK_DATA")
        if not root:
            raise DataError(f"stories are not downloaded by themselves; set BITBOOK_DATA to a folder with text/{FILE}")
        folder = Path(root, "text")
    path = Path(folder, FILE)
    if not path.is_file():
        raise DataError(f"{path} is missing: stories of TinyStories as tokens; name the folder that has it")
    with path.open("rb") as stream:
        data = stream.read(SIZE + 1)
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise DataError(f"{path}: SHA-256 must be {SHA256}, but is {digest}; get an intact copy")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        tokens, starts = torch.from_numpy(arrays["ids"].astype(np.int64)), torch.from_numpy(arrays["offset"])
    train_x, train_y = examples(tokens, starts[: TRAINING_STORIES + 1])
    test_x, test_y = examples(tokens, starts[TRAINING_STORIES:])
    return Dataset("stories", train_x, train_y, test_x, test_y, classes=VOCABULARY, input_shape=(LENGTH,))


def examples(
    tokens: Int[Tensor, " tokens"], bounds: Int[Tensor, " bounds"], length: int = LENGTH
) -> tuple[Int[Tensor, "stories length"], Int[Tensor, "stories length"]]:
    """Inputs and targets of the stories between neighbouring `bounds`, positions in `tokens`.

    Behind the last story comes the first again.
    """
    starts, ends = bounds[:-1, None], bounds[1:, None]
    first, count = bounds[0], bounds[-1] - bounds[0]
    places = starts + torch.arange(length)
    x = tokens[first + (places - first) % count]
    y = tokens[first + (places + 1 - first) % count]
    return x, y.masked_fill(places + 1 >= ends, IGNORED)
