from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from bitbook.data import DATASETS, Dataset, load_dataset, load_digits, split
from bitbook.errors import DataError, MissingDependency, PlanError


def test_shapes_types_and_range(digits: Dataset) -> None:
    assert digits.train_x.shape == (1437, 64)
    assert digits.test_x.shape == (360, 64)
    assert digits.train_x.dtype == torch.float32
    assert digits.train_y.dtype == torch.int64
    assert digits.input_shape == (1, 8, 8)
    both = torch.cat([digits.train_x, digits.test_x])
    assert both.aminmax() == (-1, 1)
    assert set(torch.cat([digits.train_y, digits.test_y]).tolist()) == set(range(digits.classes))


def test_train_and_test_are_the_source_exactly_once(digits: Dataset) -> None:
    from sklearn.datasets import load_digits as source

    bunch = source()
    ours = torch.cat([digits.train_x, digits.test_x]) * 8 + 8
    labels = torch.cat([digits.train_y, digits.test_y])
    rows = torch.cat([ours, labels[:, None]], 1).int().tolist()
    assert sorted(rows) == sorted([*x, y] for x, y in zip(bunch.data.astype(int).tolist(), bunch.target, strict=True))


def test_the_test_set_never_changes(digits: Dataset) -> None:
    """Frozen: another permutation would make every number that was ever reported incomparable."""
    assert digits.test_y.bincount().tolist() == [38, 31, 51, 31, 34, 39, 33, 33, 40, 30]
    assert torch.equal(load_digits().test_x, digits.test_x)


@pytest.mark.parametrize("holdout", [0, 1, 237, 1436])
def test_split_parts_make_the_whole(digits: Dataset, holdout: int) -> None:
    parts = split(digits, holdout)
    assert len(parts.val_x) == len(parts.val_y) == holdout
    whole = torch.cat([torch.cat([parts.train_x, parts.val_x]), torch.cat([parts.train_y, parts.val_y])[:, None]], 1)
    before = torch.cat([digits.train_x, digits.train_y[:, None]], 1)
    assert sorted(whole.tolist()) == sorted(before.tolist())


def test_split_depends_on_its_seed_alone(digits: Dataset) -> None:
    first = split(digits, 100)
    torch.rand(1)
    assert all(torch.equal(a, b) for a, b in zip(first, split(digits, 100, seed=0), strict=True))
    assert not torch.equal(first.val_x, split(digits, 100, seed=1).val_x)


def test_split_without_holdout_copies_nothing(digits: Dataset) -> None:
    assert split(digits, 0).train_x is digits.train_x


@pytest.mark.parametrize("holdout", [-1, 1437])
def test_split_refuses_to_leave_nothing(digits: Dataset, holdout: int) -> None:
    with pytest.raises(PlanError, match=f"{holdout} of 1437 training examples cannot be held out, 0 to 1436 can"):
        split(digits, holdout)


def test_load_dataset_by_name_and_by_function(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(load_dataset("digits").train_x, digits.train_x)
    own = SimpleNamespace(load=lambda: digits, wrong=lambda: 3)
    monkeypatch.setitem(sys.modules, "own", own)
    assert load_dataset("own:load") is digits
    with pytest.raises(DataError, match="own:wrong returned int"):
        load_dataset("own:wrong")


@pytest.mark.parametrize("name", ["no_such_module:load", "bitbook.data:no_such_function", ":", "bitbook.data:"])
def test_load_dataset_says_what_cannot_be_imported(name: str) -> None:
    with pytest.raises(DataError, match=f"{name!r} cannot be imported"):
        load_dataset(name)


def test_load_dataset_names_the_choices() -> None:
    with pytest.raises(DataError, match=f"no data set 'mnits'; use {', '.join(DATASETS)} or"):
        load_dataset("mnits")


def test_without_scikit_learn_the_error_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependency, match=r"pip install 'bitbook\[study\]'"):
        load_digits()
