"""Trials with a price, the studies made of them, and their documents, on the embedded digits."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitbook import ECSQ, Plan
from bitbook.data import Dataset
from bitbook.errors import PlanError
from bitbook.models import build_model
from bitbook.study.catalogue import STUDIES, find_study
from bitbook.study.grid import DIGITS, DIGITS_START, digits_recipes, grid
from bitbook.study.priced import entropy, headline, trial
from bitbook.study.priced.teacher import lessons
from bitbook.study.storage import cell_id
from bitbook.study.trial import STARTS_FOLDER, load_parts, run_trial

SMALL = {"epochs": 8, "batch": 32, "lr": 8e-3}


def digits_cell(lam: float, seed: int = 0, **other: object) -> dict[str, Any]:
    cell = headline.priced_cell(headline.MLP, lam, seed, taught=False, target=90.0)
    return {**cell, "dataset": "digits", "holdout": 287, "model": DIGITS.model, "training": SMALL, **other}


def record(cell: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return {"cell_id": cell_id(cell), "cell": cell, "result": result}


def test_a_trial_reports_its_own_file() -> None:
    cell = digits_cell(1e-4, inputs=[0.5, 0.5], step=0.4)
    result = trial.run_trial(cell)
    assert result["bytes"] == sum(row["bytes"] for row in result["ledger"]["rows"]) < 900
    accuracy = {row["split"]: row["accuracy"] for row in result["rows"]}
    assert accuracy.keys() == {"test", "validation"} and min(accuracy.values()) > 85
    assert result == {**trial.run_trial(cell), "seconds": result["seconds"]}


def test_a_narrow_network_is_trained_and_the_whole_one_written() -> None:
    result = trial.run_trial(digits_cell(1e-4, narrow="mlp-64-24-12-10"))
    assert result["quantized_weights"] == sum(p.numel() for p in build_model(DIGITS.model, seed=0).parameters())
    assert next(row["accuracy"] for row in result["rows"] if row["split"] == "validation") > 85


def test_prices_are_chosen_on_validation_alone() -> None:
    def found(lam: float, validation: float, test: float) -> dict[str, Any]:
        cell = headline.priced_cell(headline.MLP, lam, 1000, taught=True)
        rows = [{"split": "test", "accuracy": test}, {"split": "validation", "accuracy": validation}]
        return record(cell, {"rows": rows})

    # a parabola: 98.4 at 1e-6, less 0.3 for each doubling
    results = [found(1e-6 * 2**k, 98.4 - 0.3 * k, test) for k, test in enumerate((90.0, 99.0, 0.0, 99.0))]
    chosen = headline.choose(results)
    for target, key in ((98.0, "98"), (97.5, "97.5"), (97.0, "97")):
        most = 1e-6 * 2 ** ((98.4 - target - headline.margin(target)) / 0.3)
        lam = chosen[f"{headline.MLP} {key} taught"]
        assert 0.9 * min(most, 8e-6) < lam <= min(most, 8e-6)
    assert len(chosen) == 3


def test_the_margin_is_the_line_through_the_published_trials() -> None:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    with open(Path(__file__).parents[2] / "docs/results/mnist.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["holdout"] == str(headline.HOLDOUT):
                found[row["cell"]][row["split"]] = float(row["accuracy"])
    pairs = [(f["test"], f["validation"] - f["test"]) for f in found.values() if 96.5 <= f["test"] <= 98.3]
    slope, height = np.polyfit([test - 97.5 for test, _ in pairs], [harder for _, harder in pairs], 1)
    assert len(pairs) == 1004
    assert (height, slope) == pytest.approx(
        (headline.margin(97.5), headline.margin(98.5) - headline.margin(97.5)), abs=0.005
    )


def test_the_headline_says_what_was_kept_and_what_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = headline.Row(DIGITS.model, 90.0, False, "nobody", 500)
    monkeypatch.setattr(headline, "ROWS", (row, headline.Row("mlp-9-2", 99.0, True, "somebody", 1)))
    monkeypatch.setattr(headline, "MLP", DIGITS.model)
    cells = [digits_cell(1e-4, seed) for seed in (0, 1)]
    results = [record(cell, trial.run_trial(cell)) for cell in cells]
    text = headline.document(results)
    sizes = [r["result"]["bytes"] for r in results]
    assert (
        f"{min(sizes):,}–{max(sizes):,}" in text
        and "| yes |" in text
        and "mlp-9-2 at 99 %, with a teacher: not run" in text
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
    text = entropy.document(results)
    assert "scalar, entropy-coded needs " in text and "fewer bytes than scalar, fixed width" in text
    rows = entropy.csv_rows(results)
    assert {row["coder"] for row in rows} == {"fixed", "smallest"} and len(rows) == 4 * len(cells)


def test_scalars_and_codewords_are_trained_with_a_price_from_one_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STARTS_FOLDER, str(tmp_path))
    monkeypatch.setattr(entropy, "NETWORKS", [replace(entropy.NETWORKS[0], model=DIGITS.model, books=((4, 16),))])
    cells = [
        {**cell, "dataset": "digits", "holdout": 287, "start": DIGITS_START}
        for cell in entropy.entropy_cells(range(1))
        if cell["family"] == "priced" or cell["method"] in ("scalar", "vectors of 4")
    ]
    for cell in cells:
        if "price" in cell["phases"][0]:
            cell["phases"][0]["price"] |= {"epochs": 4, "batch": 64}
        else:
            cell["phases"][0]["tune"] |= {"epochs": 1}
    results = [record(cell, run_trial(cell)) for cell in cells]
    files = entropy.both_files(results)
    assert len(files[entropy.PRICED]) == 9 and len(files[entropy.FIXED]) == len(files[entropy.CODED]) == 7
    assert len(list(tmp_path.iterdir())) == 1  # the start that all share
    assert len(entropy.csv_rows(results)) == 2 * (9 + 2 * 7)
    text = entropy.document(results)
    assert f"## {DIGITS.model}" in text and "| the price saves more |" in text
    assert "vectors, 5-bit codewords, 16 of 4, λ = 1e-05" in text


@pytest.mark.parametrize("copies", [0, 3])
def test_a_teacher_is_trained_once(copies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTS_FOLDER, str(tmp_path))
    _, data = load_parts("digits", 287)
    few = data._replace(train_x=data.train_x[:96], train_y=data.train_y[:96])
    spec = {"model": DIGITS.model, "epochs": 2, "batch": 32, "lr": 1e-2, "seed": 0, "copies": copies}
    first = lessons(spec, "digits", 287, few)
    examples = 96 * max(copies, 1)
    assert first.logits is not None and first.logits.shape == (examples, 10) and first.x.shape == (examples, 64)
    assert torch.equal(first.y, few.train_y.repeat(max(copies, 1))) and len(list(tmp_path.iterdir())) == 1
    assert torch.equal(first.x, few.train_x) if not copies else not torch.equal(first.x[:96], first.x[96:192])
    assert first.x.min() >= few.train_x.min() and first.x.max() <= few.train_x.max()
    monkeypatch.setattr("bitbook.study.priced.teacher._train", lambda *_: pytest.fail("trained again"))
    again = lessons(spec, "digits", 287, few)
    assert again.logits is not None and torch.equal(again.logits, first.logits) and torch.equal(again.x, first.x)


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
