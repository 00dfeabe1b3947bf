"""Stories as sequences of tokens, on a small file that passes for TinyStories, and on TinyStories where it is."""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitbook.data import IGNORED, Dataset, load_dataset, load_stories, split, stories
from bitbook.data.stories import examples
from bitbook.errors import DataError


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=5), st.integers(1, 9))
def test_examples_are_stories_and_what_follows(lists: list[list[int]], length: int) -> None:
    """Behind tokens of another part, which must not appear."""
    offset = np.cumsum([3, *map(len, lists)])
    tokens = torch.tensor([99] * 3 + [*chain(*lists)] + [99] * 3)
    x, y = examples(tokens, torch.from_numpy(offset), length)
    assert x.shape == y.shape == (len(lists), length)
    for i, story in enumerate(lists):
        around = [*chain(*lists[i:], *lists[:i])] * (length + 1)
        assert x[i].tolist() == around[:length]
        assert y[i].tolist() == (story[1:] + [IGNORED] * length)[:length]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of five stories, three of them for training, which `stories` is told is TinyStories."""
    path = tmp_path / "text" / stories.FILE
    path.parent.mkdir()
    sizes = [4, 2, 7, 3, 5]
    ids = np.random.default_rng(0).integers(2, 512, sum(sizes)).astype(np.uint16)
    np.savez_compressed(path, ids=ids, offset=np.cumsum([0, *sizes]))
    monkeypatch.setattr(stories, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(stories, "TRAINING_STORIES", 3)
    monkeypatch.delenv("BITBOOK_DATA", raising=False)
    return path.parent


def test_a_folder_and_the_environment(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_stories(small)
    assert data.train_x.shape == data.train_y.shape == (3, 511) and data.test_x.dtype == torch.int64
    assert (data.train_y != IGNORED).sum(1).tolist() == [3, 1, 6]
    assert (data.test_y != IGNORED).sum(1).tolist() == [2, 4]
    assert torch.equal(data.train_x[:, 1:][data.train_y[:, :-1] != IGNORED], data.train_y[data.train_y != IGNORED])
    monkeypatch.setenv("BITBOOK_DATA", str(small.parent))
    assert torch.equal(load_dataset("stories").test_x, data.test_x)
    parts = split(data, 1)
    assert parts.train_y.shape == (2, 511) and parts.val_x.shape == (1, 511)


def test_the_error_says_what_to_do(small: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="set BITBOOK_DATA to a folder with text/tinystories_tokens.npz"):
        load_stories()
    with pytest.raises(DataError, match="tinystories_tokens.npz is missing"):
        load_stories(tmp_path)
    path = small / stories.FILE
    good = path.read_bytes()
    for bad in (good[:-1], good + b"\0", b"", good[:-1] + bytes([good[-1] ^ 1])):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="tinystories_tokens.npz: SHA-256 must be .*; get an intact copy"):
            load_stories(small)


def test_real_stories(stories: Dataset) -> None:
    assert stories.train_x.shape == (1500, 511) and stories.test_x.shape == (300, 511)
    assert int((stories.test_y != IGNORED).sum()) == 115_708
    assert stories.train_x[:, 0].eq(1).all() and stories.test_x[:, 0].eq(1).all()  # each begins with the first token
    assert stories.train_x.max() < stories.classes
