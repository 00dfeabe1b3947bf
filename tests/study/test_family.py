"""The family study: its cells, one trial of each kind on the embedded digits, and its document from made-up results."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, nn

from bitbook import Artifact, Float, Plan, Uniform, freeze, quantize_dense
from bitbook.data import Dataset, Split
from bitbook.errors import PlanError, WeightError
from bitbook.models import build_model
from bitbook.scalar.leaves import Integer
from bitbook.study.catalogue import STUDIES
from bitbook.study.family import document, methods, trial
from bitbook.study.grid import DIGITS, DIGITS_START
from bitbook.study.storage import StudyStore, cell_id, open_storage
from bitbook.study.trial import STARTS_FOLDER, load_parts

SMALL = replace(
    methods.NETWORKS[0],
    title="digits",
    dataset="digits",
    model=DIGITS.model,
    start=DIGITS_START,
    holdout=287,
    methods=(
        methods.FLOATS,
        methods.uniform("uniform, per row", methods.ROW, (2, 4), tune={}),
        methods.entropy_coded((0.3, 0.1), tune={}, feedback=True),
        methods.trellis(4, (0.2,)),
        methods.codebooks(4, (8, 16), methods.FUSED, tune={}),
    ),
    tune={"epochs": 2, "lr": 1e-2, "batch": 32},
    sizes=(1000, 1500),
)
RESNET = methods.NETWORKS[1]


def record(cell: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return {"cell_id": cell_id(cell), "cell": cell, "result": result}


def made_up(network: methods.Network, seeds: range) -> list[dict[str, Any]]:
    """Results whose bytes and accuracies follow from the cell."""
    found = []
    for cell in methods.family_cells(seeds, [network]):
        steps = [s.name for m in network.methods if m.name == cell["method"] for s in m.steps]
        size = 200_000 if cell["method"] == "float" else 60_000 * 1.3 ** steps.index(cell["recipe"])
        size *= 1.1 if cell["method"].startswith("vectors") else 1
        gain = {document.ROUNDED: 0.0, document.SHIFTED: 1.0, document.FEEDBACK: 1.2, document.TRAINED: 1.5}[
            document.variation(cell)
        ]
        accuracy = 98 - 2e5 / size + gain + 0.02 * cell["seed"]
        if cell["method"] == "float":
            accuracy = 98.3
        rows = [{"split": s, "accuracy": accuracy + up, "loss": 0.1} for s, up in (("test", 0.0), ("validation", 0.5))]
        result = {"bytes": round(size), "rows": rows, "ledger": {"bits_per_weight": 4.0, "rows": []}}
        found.append(record(cell, {**result, "seconds": {"start": 0.0, "fit": 30.0, "evaluate": 30.0}}))
    return found


def test_cells_say_everything_and_survive_json() -> None:
    cells = methods.family_cells(range(2))
    assert json.loads(json.dumps(cells)) == cells
    assert len({cell_id(cell) for cell in cells}) == len(cells)
    for cell in cells:
        (phase,) = cell["phases"]
        assert Plan.from_json(phase["plan"]).to_json() == phase["plan"]
        Plan.from_json(cell["dense"])
    assert {cell["seed"] for cell in cells if cell["model"] == "resnet-20"} == {0}
    assert {document.variation(cell) for cell in cells} == set(document.VARIATIONS)
    mnist = STUDIES["family-mnist"].cells(range(1))
    assert {cell["dataset"] for cell in mnist} == {"mnist"} and all(not cell["repair"] for cell in mnist)


@pytest.mark.parametrize("network", methods.NETWORKS, ids=lambda n: n.model)
def test_every_plan_fits_its_model(network: methods.Network) -> None:
    """All tensors are named by exactly one of the two plans, and every recipe fits their shapes."""
    model = build_model(network.model, seed=0)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for cell in methods.family_cells([0], [network]):
        plan = Plan.from_json(cell["phases"][0]["plan"])
        for name, recipe in plan.recipes(parameters).items():
            assert (recipe is not None) == (name.endswith("weight") and "bn" not in name)
            if recipe is not None:
                recipe.resolve(parameters[name]).layout(parameters[name])
        if cell["recipe"] != "float32":
            rest = [name for name in model.state_dict() if not plan.names(name)]
            assert all(recipe is not None for recipe in Plan.from_json(cell["dense"]).recipes(rest).values())


def test_trials_on_digits_and_their_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTS_FOLDER, str(tmp_path / "starts"))
    results = [record(cell, trial.run_trial(cell)) for cell in methods.family_cells(range(2), [SMALL])]
    for r in results:
        assert r["result"]["bytes"] == sum(row["bytes"] for row in r["result"]["ledger"]["rows"])
    again = trial.run_trial(results[-1]["cell"])
    assert {**again, "seconds": 0} == {**results[-1]["result"], "seconds": 0}
    by_kind = {(r["cell"]["method"], r["cell"]["recipe"], document.variation(r["cell"])): r["result"] for r in results}
    coarse, trained = (
        by_kind[methods.BASELINE, "step 0.3", how]["rows"][1] for how in (document.ROUNDED, document.TRAINED)
    )
    assert trained["accuracy"] > coarse["accuracy"]
    document.write_document(results, tmp_path, [SMALL])
    text = (tmp_path / "family.md").read_text(encoding="utf-8")
    assert "## digits" in text and "uniform, per row, trained" in text and "| ≥ 95 % |" in text
    assert f"{methods.BASELINE}, trained needs " in text or f"{methods.BASELINE}, rounded" in text
    assert (tmp_path / f"family-{DIGITS.model}.svg").exists()
    rows = (tmp_path / "family.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 2 * len(results) and rows[0].endswith("variation")


@pytest.mark.parametrize("method", ["uniform, per row", "vectors of 4, 5-bit codewords"])
def test_a_training_that_diverges_is_reported(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTS_FOLDER, str(tmp_path))
    wild = replace(SMALL, tune={"epochs": 2, "lr": 1e30, "batch": 32})
    cells = [c for c in methods.family_cells([0], [wild]) if c["method"] == method]
    rounded, trained = cells[:2]
    assert document.variation(trained) == document.TRAINED
    found = trial.run_trial(trained)
    assert found["diverged"] and found["bytes"] == trial.run_trial(rounded)["bytes"]
    assert all(row["accuracy"] < 15 for row in found["rows"])


def test_the_document_chooses_on_validation(tmp_path: Path) -> None:
    results = made_up(replace(RESNET, most_seeds=2), range(2))
    name = "uniform, per row"
    for r in results:  # the smallest file is the best on test alone
        if (r["cell"]["method"], r["cell"]["recipe"], document.variation(r["cell"])) == (
            name,
            "3 bits",
            document.SHIFTED,
        ):
            r["result"]["rows"][0]["accuracy"] = 98.2
            r["result"]["rows"][1]["accuracy"] = 50.0
    text = document.document(results)
    on_validation, on_test = text.split("The same chosen on test")
    line = next(line for line in on_validation.splitlines() if line.startswith(f"| {name}, {document.SHIFTED}"))
    assert "60,000" not in line
    line = next(line for line in on_test.splitlines() if line.startswith(f"| {name}, {document.SHIFTED}"))
    assert line.startswith(f"| {name}, {document.SHIFTED} | 60,000 (0.10)")
    assert "| others: error feedback, step grid, entropy estimated | 107,400 | 92,000 | 76,100 | 62,300 |" in text
    assert "### Who wins: statistics shifted" in text and "| 80,000 |" in text
    assert (
        f"{methods.BASELINE}, {document.FEEDBACK} needs" in text
        and f"than {methods.BASELINE}, {document.SHIFTED}" in text
    )
    assert f"{len(results)} trials, {len(results)} core-minutes" in text


def test_the_command_reads_the_study(tmp_path: Path) -> None:
    (tmp_path / "family").mkdir()
    store = StudyStore.create(open_storage(tmp_path / "family" / "study.db"), "family", methods.__name__, {})
    results = made_up(RESNET, range(1))[:12]
    store.enqueue([r["cell"] for r in results])
    by_id = {r["cell_id"]: r["result"] for r in results}
    while (claim := store.claim("me")) is not None:
        store.finish(claim, {**by_id[cell_id(claim.cell)], "objectives": [1, 1.0]})
    store.close()
    document.main([str(tmp_path / "family"), str(tmp_path / "docs")])
    assert "12 trials, 1 seed." in (tmp_path / "docs" / "family.md").read_text(encoding="utf-8")


def test_a_resnet_is_repaired_and_stored_in_less(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    """On random images and weights: the trial's way from cell to artifact, without data."""
    x, y = torch.randn(24, 3072, generator=generator), torch.arange(24) % 10
    dataset = Dataset("few", x, y, x[:8], y[:8], 10, (3, 32, 32))
    monkeypatch.setattr(trial, "load_parts", lambda *_: (dataset, Split(x[:16], y[:16], x[16:], y[16:])))
    monkeypatch.setattr(trial, "pretrained_resnet", lambda depth: build_model(f"resnet-{depth}", seed=0).eval())
    cells = methods.family_cells([0], [replace(RESNET, calibration=12, tune={"epochs": 1, "lr": 1e-4, "examples": 8})])
    wanted = {("float", "float32"): {}, ("uniform, per row", "4 bits"): {}, ("trellis, 8 states", "step 0.07"): {}}
    for cell in cells:
        if (cell["method"], cell["recipe"]) in wanted:
            found = trial.run_trial(cell)
            wanted[cell["method"], cell["recipe"]][document.variation(cell)] = found
    whole, coarse, path = wanted.values()
    assert set(whole) == {document.ROUNDED} and set(path) == {document.FEEDBACK}
    assert set(coarse) == {document.SHIFTED, document.FEEDBACK, document.TRAINED}
    assert whole[document.ROUNDED]["bytes"] > 4 * 271_098
    shares = {row["tensor"]: row["bytes"] for row in coarse[document.SHIFTED]["ledger"]["rows"]}
    assert sum(size for name, size in shares.items() if "running" in name or "tracked" in name) < 200
    assert path[document.FEEDBACK]["bytes"] < coarse[document.SHIFTED]["bytes"]
    assert all(math.isfinite(loss) for loss in coarse[document.TRAINED]["losses"])


def test_a_public_start_is_one_that_is_there() -> None:
    _, data = load_parts("digits", 287)
    with pytest.raises(PlanError, match="use resnet20_cifar10.safetensors of resnet-20"):
        trial.float_start({"start": {"file": "vgg"}, "model": "resnet-20"}, data)


def test_dense_tensors_are_quantized_afterwards() -> None:
    layer = nn.BatchNorm1d(4)
    artifact = freeze(layer)
    stored = quantize_dense(artifact, Plan({"running_*": Integer(2), "weight": Float("bfloat16"), "bias": None}))
    assert isinstance(stored, Artifact) and stored.tensors.keys() == artifact.tensors.keys()
    assert torch.equal(stored.decode("running_var"), torch.ones(4)) and torch.equal(stored.decode("bias"), layer.bias)
    with pytest.raises(PlanError, match="'running_var' names no tensor"):
        quantize_dense(stored, Plan({"running_var": Float()}))
    with pytest.raises(PlanError, match="weight: 4 columns do not divide"):
        quantize_dense(artifact, Plan({"weight": Uniform(4, (1, 3))}))
    with pytest.raises(WeightError, match="bias: the value"):
        quantize_dense(Artifact({"bias": torch.tensor([math.nan])}), Plan({"bias": Float()}))
