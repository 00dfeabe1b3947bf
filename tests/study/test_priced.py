"""Trials with a price, the studies made of them, and their documents, on the embedded digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitbook import ECSQ, Plan
from bitbook.data import Dataset
from bitbook.errors import PlanError
from bitbook.models import build_model
from bitbook.study import entropy, headline, priced
from bitbook.study.catalogue import STUDIES, find_study
from bitbook.study.grid import DIGITS, digits_recipes, grid
from bitbook.study.storage import cell_id
from bitbook.study.teacher import teacher_answers
from bitbook.study.trial import STARTS_FOLDER, load_parts, run_trial

SMALL = {"epochs": 8, "batch": 32, "lr": 8e-3}


def digits_cell(lam: float, seed: int = 0, **other: object) -> dict[str, Any]:
    cell = headline.priced_cell(headline.MLP, lam, seed, taught=False, target=90.0)
    return {**cell, "dataset": "digits", "holdout": 287, "model": DIGITS.model, "training": SMALL, **other}


def record(cell: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return {"cell_id": cell_id(cell), "cell": cell, "result": result}


def test_a_trial_reports_its_own_file() -> None:
    cell = digits_cell(1e-4, inputs=[0.5, 0.5], step=0.4)
    result = priced.run_trial(cell)
    assert result["bytes"] == sum(row["bytes"] for row in result["ledger"]["rows"]) < 900
    accuracy = {row["split"]: row["accuracy"] for row in result["rows"]}
    assert accuracy.keys() == {"test", "validation"} and min(accuracy.values()) > 85
    assert result == {**priced.run_trial(cell), "seconds": result["seconds"]}


def test_a_narrow_network_is_trained_and_the_whole_one_written() -> None:
    result = priced.run_trial(digits_cell(1e-4, narrow="mlp-64-24-12-10"))
    assert result["quantized_weights"] == sum(p.numel() for p in build_model(DIGITS.model, seed=0).parameters())
    assert next(row["accuracy"] for row in result["rows"] if row["split"] == "validation") > 85


def test_prices_are_chosen_on_validation_alone() -> None:
    def found(lam: float, validation: float, test: float) -> dict[str, Any]:
        cell = headline.priced_cell(headline.MLP, lam, 1000, taught=True)
        rows = [{"split": "test", "accuracy": test}, {"split": "validation", "accuracy": validation}]
        return record(cell, {"rows": rows})

    results = [found(1e-6, 98.2, 90.0), found(2e-6, 97.8, 90.0), found(4e-6, 97.3, 99.0), found(8e-6, 96.0, 99.0)]
    chosen = headline.choose(results)
    assert chosen == {
        f"{headline.MLP} 98 taught": 2e-6, f"{headline.MLP} 97.5 taught": 4e-6, f"{headline.MLP} 97 taught": 4e-6
    }  # fmt: skip


def test_the_headline_says_what_was_kept_and_what_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = headline.Row(DIGITS.model, 90.0, False, "nobody", 500)
    monkeypatch.setattr(headline, "ROWS", (row, headline.Row("lenet-5", 99.0, True, "somebody", 1)))
    monkeypatch.setattr(headline, "MLP", DIGITS.model)
    cells = [digits_cell(1e-4, seed) for seed in (0, 1)]
    results = [record(cell, priced.run_trial(cell)) for cell in cells]
    text = headline.document(results)
    sizes = [r["result"]["bytes"] for r in results]
    assert (
        f"{min(sizes):,}–{max(sizes):,}" in text
        and "| yes |" in text
        and "lenet-5 at 99 %, with a teacher: not run" in text
    )
    for r in results:
        for scored in r["result"]["rows"]:
            scored["accuracy"] = 50.0
    assert "missed" in headline.document(results)
    rows = headline.csv_rows(results)
    assert len(rows) == 4 and {r["target"] for r in rows} == {90.0} and {r["bytes"] for r in rows} == set(sizes)


def test_each_trained_network_is_written_with_both_coders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTS_FOLDER, str(tmp_path))
    recipes = [
        r
        for r in digits_recipes()
        if r.method in ("scalar", "scalar, learned scale") and r.name != "1 bit, min–max rule"
    ]
    cells = [{**cell, "coded": True} for cell in grid(DIGITS, recipes, range(2)) if "tune" in cell["phases"][0]]
    results = [record(cell, run_trial(cell)) for cell in cells]
    text = entropy.document(results, [])
    assert "scalar, entropy-coded needs " in text and "fewer bytes than scalar, fixed width" in text
    rows = entropy.csv_rows(results)
    assert {row["coder"] for row in rows} == {"fixed", "smallest"} and len(rows) == 4 * len(cells)


def test_a_teacher_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTS_FOLDER, str(tmp_path))
    _, data = load_parts("digits", 287)
    few = data._replace(train_x=data.train_x[:96], train_y=data.train_y[:96])
    spec = {"model": DIGITS.model, "epochs": 2, "batch": 32, "lr": 1e-2, "seed": 0}
    first = teacher_answers(spec, "digits", 287, few)
    assert first.shape == (96, 10) and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("bitbook.study.teacher._train", lambda *_: pytest.fail("trained again"))
    assert torch.equal(teacher_answers(spec, "digits", 287, few), first)


def test_every_study_has_cells_of_its_own() -> None:
    for name, study in STUDIES.items():
        cells = study.cells(range(1))
        assert len({cell_id(cell) for cell in cells}) == len(cells), name
    assert {tuple(cell["plan"]) for cell in find_study("headline-tuning").cells(range(1))} == {("weights", "biases")}
    with pytest.raises(PlanError, match="headline"):
        find_study("headlines")


def test_the_plan_prices_everything(digits: Dataset) -> None:
    assert digits.classes == 10
    cell = digits_cell(1e-5)
    for names in cell["plan"].values():
        assert all(isinstance(recipe, ECSQ) for recipe in Plan.from_json({"weights": names}).weights.values())
