"""Calibration inputs in every form, one batch in memory at a time."""

from __future__ import annotations

import weakref
from collections import UserDict
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from bitbook import ECSQ, Plan, compress, second_moments
from bitbook.calibration.calls import Call, calls, repeatable
from bitbook.errors import PlanError

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(x * scale)


@given(cuts=st.lists(st.integers(0, 6), max_size=4), size=st.integers(1, 8))
def test_tensors_are_regrouped(cuts: list[int], size: int) -> None:
    found = [call.args[0] for call in calls(X.tensor_split(sorted(cuts)), size)]
    assert torch.equal(torch.cat(found), X)
    assert [len(x) for x in found] == [len(x) for x in X.split(size)]


def test_every_form_gives_the_same_moments() -> None:
    model = Named()
    expected = second_moments(model, [X])["layer.weight"]
    forms = [
        X,
        X.split(4),
        iter(X.split(1)),
        [(X[:2], Y[:2]), [X[2:], Y[2:]]],
        [{"x": X, "labels": Y}],
        [UserDict(x=X / 2, scale=2)],
        [({"x": X}, Y)],
        DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
        DataLoader(TensorDataset(X), batch_size=3),
    ]
    for form in forms:
        torch.testing.assert_close(second_moments(model, form)["layer.weight"], expected)


def test_order_is_kept_where_kinds_are_mixed() -> None:
    packed = pack_sequence([X, X[:3]])
    found = list(calls([X[:2], X[2:4], X[:1, :1], (X, Y), packed, X.long()], 3))
    shapes = [(3, 2), (1, 2), (1, 1), (6, 2), None, (3, 2), (3, 2)]
    assert [tuple(c.args[0].shape) if isinstance(c.args[0], Tensor) else None for c in found] == shapes
    assert found[4] == Call((packed,), {})
    assert list(calls([X[:0]])) == []


def test_what_cannot_be_called_says_so() -> None:
    with pytest.raises(PlanError, match="a batch is int; use a tensor"):
        list(calls([3]))
    with pytest.raises(PlanError, match="without axes"):
        list(calls([torch.tensor(1.0)]))
    with pytest.raises(PlanError, match="are a dict; pass a list of batches"):
        list(calls({"x": X}))
    with pytest.raises(PlanError, match="are a int"):
        list(calls(3))  # type: ignore[arg-type]


def test_an_iterator_is_kept_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert repeatable(loader := DataLoader(TensorDataset(X))) is loader
    kept = repeatable({"x": x} for x in X.split(2))
    assert [len(batch["x"]) for batch in kept] == [2, 2, 2] == [len(batch["x"]) for batch in kept]
    monkeypatch.setattr("bitbook.calibration.calls.KEPT", 30)
    with pytest.raises(PlanError, match="a generator can be gone through once.*Pass a DataLoader, a list"):
        repeatable((x, 0) for x in X.split(2))
    with pytest.raises(PlanError, match="can be gone through once"):
        compress(Named(), Plan({"*.weight": ECSQ()}), calibration=iter(X.split(2)))


def test_only_one_batch_is_in_memory() -> None:
    class Fresh:
        """Batches that exist only while they are used, and can be gone through again."""

        alive = most = passes = 0

        def __iter__(self) -> Iterator[tuple[Tensor, int]]:
            self.passes += 1
            for i in range(10):
                batch = torch.randn(8, 2, generator=torch.Generator().manual_seed(i))
                self.alive += 1
                self.most = max(self.most, self.alive)
                weakref.finalize(batch, self.gone)
                yield batch, 0
                del batch

        def gone(self) -> None:
            self.alive -= 1

    batches = Fresh()
    compress(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3)), Plan({"*": ECSQ()}), calibration=batches)
    assert batches.passes == 3 and batches.most <= 2
