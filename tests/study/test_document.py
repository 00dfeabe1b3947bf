"""The document says what the results say."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bitbook.errors import StudyError
from bitbook.plan import Plan
from bitbook.scalar.uniform import Uniform
from bitbook.study import grid
from bitbook.study.document import answers, payload_bytes, sentence, write_between, write_document
from bitbook.study.stats import Saving, SavingInterval
from bitbook.study.storage import cell_id
from bitbook.study.tables import MethodSaving, Point
from bitbook.study.trial import run_trial
from bitbook.vector.codebook import Codebook

START = {"epochs": 6, "lr": 0.1, "batch": 32, "momentum": 0.9}
TUNE = {"epochs": 1, "lr": 1e-2, "batch": 32}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    layers = grid.Layers()
    recipes = [
        *grid.float_recipes(("float32",)),
        *grid.scalar_recipes(layers, (2, 3, 5), (None,)),
        *grid.cluster_recipes(layers, grid.ROWS, (40, 60, 90), output=False),
        *grid.cluster_recipes(layers, grid.ROWS, (40, 60, 90), output=False, centroids=Uniform(4)),
        *grid.vector_recipes(layers, 4, (16, 64)),
        *grid.vector_recipes(layers, 4, (16, 64), centroids=Uniform(5)),
    ]
    setting = grid.Setting("digits", "mlp-64-32-16-10", ((START, lambda recipe: TUNE),), 287)
    cells = grid.grid(setting, recipes, range(2))
    source = [
        grid.cell(recipe, dataset="digits", model=setting.model, start=START, tune=tune and TUNE, seed=0, holdout=0)
        for recipe, tune in grid.source_recipes(layers)
    ]
    return [
        {"cell": cell, "cell_id": cell_id(cell), "result": run_trial(cell), "started": "", "seconds": 0.1}
        for cell in [*cells, *source]
    ]


def test_it_is_written_whole(results: list[dict[str, Any]], tmp_path: Path) -> None:
    path = write_document(results, tmp_path, name="trial", command="make this")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# trial") and "`make this`" in text
    for part in ("(a) What", "(b) Does", "own configurations", "Method against method", "front of all recipes"):
        assert part in text
    assert "nan" not in text.lower()
    with open(tmp_path / "trial.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    splits = sum(len(record["result"]["rows"]) for record in results)
    assert len(rows) == splits and {row["split"] for row in rows} == {"test", "validation"}
    assert (tmp_path / "trial-size-accuracy.svg").stat().st_size > 1000
    assert answers(results).startswith("**(a)")


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Uniform(4), 55_400),  # 109,184 weights of 4 bits and 202 biases of 32
        (Codebook(0.25, (1, -1)), (32 * 784 + 16 * 128 + 2 * 64 + 202) * 4),
        (Codebook(0.5, (1, -1), Uniform(3)), math.ceil((64 * 784 + 32 * 128 + 5 * 64) * 3 / 8) + 202 * 4),
        (None, 437_544),
    ],
)
def test_the_source_count(recipe: Any, expected: int) -> None:
    plan = Plan({"fc*.weight": recipe}) if recipe else Plan()
    cell = {"model": "mlp-784-128-64-10", "phases": [{"plan": plan.to_json()}]}
    assert payload_bytes(cast(Point, SimpleNamespace(example={"cell": cell}))) == expected


@pytest.mark.parametrize(
    ("percent", "low", "high", "said"),
    [
        (20.0, 10.0, 30.0, "need 20 % (10 to 30 %) fewer bytes than"),
        (-50.0, -80.0, -20.0, "need 1.50 (1.20 to 1.80) times the bytes of"),
        (5.0, -3.0, 12.0, "cannot be told apart"),
        (20.0, math.nan, math.nan, "need 20 % (one seed) fewer bytes than"),
    ],
)
def test_words_follow_the_interval(percent: float, low: float, high: float, said: str) -> None:
    saving = SavingInterval(Saving(percent, 90.0, 97.0), low, high, 0.0)
    assert said in sentence(MethodSaving("vector", "rows", "scalar", 5, saving))


def test_text_between_markers(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("a\n<x>\nold\n</x>\nb\n", encoding="utf-8")
    write_between(path, "<x>", "</x>", "new")
    assert path.read_text(encoding="utf-8") == "a\n<x>\nnew\n</x>\nb\n"
    with pytest.raises(StudyError, match="lacks the lines"):
        write_between(path, "<y>", "</y>", "new")
