"""Tuning a network to a few bytes as a study: its cells, and one trial on random images."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Generator

from bitbook import ECSQ, FineTuning, Plan
from bitbook.data import IGNORED, Dataset, Split
from bitbook.models import Llama, build_model
from bitbook.study import trial
from bitbook.study.catalogue import STUDIES
from bitbook.study.networks import tuned
from bitbook.study.storage import cell_id


def test_cells_say_everything_and_survive_json() -> None:
    cells = STUDIES["tuned"].cells(range(2))
    assert json.loads(json.dumps(cells)) == cells
    assert len({cell_id(cell) for cell in cells}) == len(cells) == 2 * sum(len(t.budgets) for t in tuned.TUNINGS)
    tensors = {
        "resnet-20": build_model("resnet-20", seed=0).state_dict(),
        "stories260k": dict(Llama().named_parameters()),
    }
    for cell in cells:
        FineTuning(**cell["training"])
        plans = [Plan.from_json(cell[key]) for key in ("weights", "ends", "dense") if key in cell]
        for name, tensor in tensors[cell["model"]].items():
            codes = "trust" in cell and tensor.dim() > 1
            assert sum(plan.names(name) for plan in plans) + codes == 1


def test_finished_cells_of_the_resnet_stay_finished() -> None:
    """Their results are in storage by these names, after hours of training."""
    found = [cell_id(tuned.tuned_cell(tuned.RESNET, budget, 0)) for budget in tuned.RESNET.budgets]
    assert found == ["7c039350ce37fc9f", "0caed537944f8390", "e65d4ddcaf853da5", "fafe7390535c89f2"]


def test_a_trial_ends_within_its_budget(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    x, y = torch.randn(40, 3072, generator=generator), torch.arange(40) % 10
    dataset = Dataset("few", x, y, x[:8], y[:8], 10, (3, 32, 32))
    monkeypatch.setattr(tuned, "load_parts", lambda *_: (dataset, Split(x[:24], y[:24], x[24:], y[24:])))
    monkeypatch.setattr(tuned, "float_start", lambda *_: (build_model("resnet-8", seed=0), []))
    cell = tuned.tuned_cell(tuned.RESNET, 34_000, 0, epochs=2, batch=8, precision="float32", refit=1)
    begins = {"step": 0.05, "lam": ECSQ.price_of_step * 0.05**2}
    check_trial({**cell, **begins, "budget": 24_000, "model": "resnet-8", "calibration": 8, "examples": 16})


def test_a_trial_of_a_language_model(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    def small(*_: Any, **__: Any) -> Llama:
        return Llama(dim=16, hidden=24, layers=1, heads=2, kv_heads=1, vocabulary=64)

    x = torch.randint(64, (40, 12), generator=generator)
    y = x.roll(-1, 1)
    y[::2, 9:] = IGNORED
    dataset = Dataset("few", x, y, x[:8], y[:8], 64, (12,))
    monkeypatch.setattr(tuned, "load_parts", lambda *_: (dataset, Split(x[:24], y[:24], x[24:], y[24:])))
    model = small()
    monkeypatch.setattr(tuned, "float_start", lambda *_: (model, []))
    for module in (tuned, trial):
        monkeypatch.setattr(module, "build_model", small)
    cell = tuned.tuned_cell(tuned.STORIES, 90_000, 0, epochs=2, batch=8, refit=1)
    check_trial({**cell, "budget": 1500, "calibration": 8, "length": 8, "examples": 16})


def check_trial(cell: dict[str, Any]) -> None:
    found = tuned.run_trial(cell)
    assert 0.8 * cell["budget"] < found["bytes"] <= cell["budget"]
    assert found["bytes"] == sum(row["bytes"] for row in found["ledger"]["rows"])
    assert len(found["losses"]) == 2 and math.isfinite(found["divergence"]) and found["divergence"] > 0
