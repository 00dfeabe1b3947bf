"""Tuning a network to a few bytes as a study: its cells, and one trial on random images."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Generator

from bitbook import FineTuning, Plan
from bitbook.data import Dataset, Split
from bitbook.models import build_model
from bitbook.study import tuned
from bitbook.study.catalogue import STUDIES
from bitbook.study.storage import cell_id


def test_cells_say_everything_and_survive_json() -> None:
    cells = STUDIES["tuned"].cells(range(2))
    assert json.loads(json.dumps(cells)) == cells
    assert len({cell_id(cell) for cell in cells}) == len(cells) == 2 * len(tuned.STEPS)
    names = build_model("resnet-20", seed=0).state_dict()
    for cell in cells:
        FineTuning(**cell["training"])
        plans = [Plan.from_json(cell[key]) for key in ("weights", "ends", "dense")]
        assert all(sum(plan.names(name) for plan in plans) == 1 for name in names)


def test_a_trial_ends_within_its_budget(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    x, y = torch.randn(40, 3072, generator=generator), torch.arange(40) % 10
    dataset = Dataset("few", x, y, x[:8], y[:8], 10, (3, 32, 32))
    monkeypatch.setattr(tuned, "load_parts", lambda *_: (dataset, Split(x[:24], y[:24], x[24:], y[24:])))
    monkeypatch.setattr(tuned, "float_start", lambda *_: (build_model("resnet-8", seed=0), []))
    cell = tuned.tuned_cell(24_000, 0.05, 0, epochs=2, batch=8, precision="float32", refit=1)
    cell = {**cell, "model": "resnet-8", "calibration": 8, "examples": 16}
    found = tuned.run_trial(cell)
    assert 0.8 * cell["budget"] < found["bytes"] <= cell["budget"]
    assert found["bytes"] == sum(row["bytes"] for row in found["ledger"]["rows"])
    assert len(found["losses"]) == 2 and math.isfinite(found["divergence"]) and found["divergence"] > 0
