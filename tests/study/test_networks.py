"""The networks study: its cells, one trial of each kind on the embedded digits, its document from made-up results."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator

from bitbook.data import IGNORED, Split
from bitbook.errors import PlanError
from bitbook.study.catalogue import STUDIES
from bitbook.study.networks import comparison, document, trial
from bitbook.study.networks.trial import ALLOCATED, EQUAL, FLOAT, PROBE, TRUST
from bitbook.study.storage import StudyStore, cell_id, open_storage

DIGITS = replace(
    trial.NETWORKS[0],
    title="digits",
    model="mlp-64-32-16-10",
    dataset="digits",
    holdout=287,
    calibration={"examples": 40},
    budgets=(3000, 1500),
    bits=(3.0,),
    middle=1500,
)
RESNET, STORIES = trial.NETWORKS[:2]


def record(cell: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return {"cell_id": cell_id(cell), "cell": cell, "result": result}


def made_up(seeds: range, some: tuple[trial.Network, ...] = (RESNET, STORIES)) -> list[dict[str, Any]]:
    """Results that follow from the cells: allocation needs 10 % fewer bytes, and predicts half the loss."""
    found = []
    for cell in trial.networks_cells(seeds, some):
        seconds = {"start": 1.0, "fit": 30.0, "evaluate": 29.0}
        method = cell["method"]
        if method == PROBE:
            probes = [
                {"tensor": f"layer{i}", "kind": "trellis", "bits": 4.0 - i, "divergence": 0.01 * 4**i,
                 "predicted": {"1.0": 0.005 * 4**i, "0.0": 0.005 * 4**i}}
                for i in range(4)
            ]  # fmt: skip
            found.append(record(cell, {"probes": probes, "seconds": seconds}))
            continue
        if method == TRUST:
            said = ["trust 1.0: divergence 0.2", "trust 0.0: divergence 0.1"]
            found.append(record(cell, {"trust": 0.0, "said": said, "seconds": seconds}))
            continue
        size = {FLOAT: 1_000_000, EQUAL: round(cell.get("bits", 0) * 36_000), ALLOCATED: cell.get("budget", 0) - 10}[
            method
        ]
        divergence = 0.0 if method == FLOAT else 0.05 * (50_000 / size) ** 3 * (1.1**-3 if method == ALLOCATED else 1)
        lost = 20 * divergence + 0.01 * cell["seed"]
        rows = [
            {"split": split, "accuracy": high - lost, "loss": 0.3 + divergence}
            for split, high in (("test", 91.73), ("validation", 99.5))
        ]
        report = {} if method == FLOAT else {
            "trust": cell["trust"], "predicted": divergence / 2, "divergence": divergence, "dense": {},
            "repairs": [{"name": "biases", "before": 2.0, "after": 1.0, "kept": True}],
            "choices": [
                {"tensor": "conv1.weight", "kind": "trellis", "bytes": 400, "weights": 432, "bits": 7.4, "loss": 0.1},
                {"tensor": "fc.weight", "kind": "scalar", "bytes": 200, "weights": 640, "bits": 2.5, "loss": 0.1},
            ],
        }  # fmt: skip
        result = {"bytes": size, "rows": rows, "report": report, "divergence": 1.5 * divergence, "seconds": seconds}
        found.append(record(cell, result))
    return found


def test_cells_say_everything_and_survive_json() -> None:
    cells = STUDIES["networks"].cells(range(2))
    assert json.loads(json.dumps(cells)) == cells
    assert len({cell_id(cell) for cell in cells}) == len(cells)
    assert {cell["model"] for cell in cells} == {n.model for n in trial.NETWORKS}
    first = [cell for cell in cells if cell["method"] == ALLOCATED][:11]
    assert {cell["model"] for cell in first} == {RESNET.model, STORIES.model}
    assert all(cell["seed"] == 0 for cell in cells if cell["method"] in (FLOAT, PROBE, TRUST))
    for network in trial.NETWORKS:
        goals = comparison.TARGETS[network.model].goals or ()
        assert set(goals) <= set(network.budgets) and network.middle in network.budgets


def test_trials_on_digits_and_their_document(tmp_path: Path) -> None:
    results = [record(cell, trial.run_trial(cell)) for cell in trial.networks_cells(range(1), [DIGITS])]
    by_method = {r["cell"]["method"]: r["result"] for r in results}
    allocated = [r["result"] for r in results if r["cell"]["method"] == ALLOCATED]
    assert [found["bytes"] <= budget for found, budget in zip(allocated, DIGITS.budgets, strict=True)] == [True, True]
    assert allocated[0]["divergence"] < allocated[1]["divergence"]
    for found in (*allocated, by_method[EQUAL]):
        assert found["bytes"] == sum(row["bytes"] for row in found["ledger"]["rows"])
        assert {c["tensor"] for c in found["report"]["choices"]} == {
            f"fc{i}.{w}" for i in (1, 2, 3) for w in ("weight", "bias")
        }
    assert by_method[FLOAT]["bytes"] > 4 * 2_762 and by_method[FLOAT]["divergence"] == 0
    assert len(by_method[PROBE]["probes"]) == 3 * len(trial.PROBED_BITS)
    assert by_method[TRUST]["trust"] in (0.0, 0.5, 1.0) and len(by_method[TRUST]["said"]) == 3
    # In another order, by a fit that has seen nothing else: the same file.
    trial._measured.cache_clear()
    last = next(r for r in reversed(results) if r["cell"]["method"] == ALLOCATED)
    assert {**trial.run_trial(last["cell"]), "seconds": 0} == {**last["result"], "seconds": 0}
    document.write_document(results, tmp_path, networks=[DIGITS])
    text = (tmp_path / "networks.md").read_text(encoding="utf-8")
    assert "## digits" in text and "No tensor was left out" in text and "There is no file of another tool" in text
    assert (tmp_path / "networks.svg").exists() and (tmp_path / "networks-predicted.svg").exists()


def test_the_document_of_made_up_results(tmp_path: Path) -> None:
    (tmp_path / "peers.csv").write_text(
        "network,tool,version,setting,bytes,share quantized,figure,unit,loss,reason\n"
        "ResNet-20,float32,,,1084392,0,91.73,%,0,\n"
        "ResNet-20,rounder,1.0,bits 3,53000,1,91.7,%,0.03,\n"
        'ResNet-20,"bitbook, calibrated",0.1.0,,1000,1,91.73,%,0,\n'
        "ResNet-20,broken,2.0,,,,,%,,out of memory\n",
        encoding="utf-8",
    )
    results = made_up(range(2))
    tuned = record(
        {"model": "resnet-20", "budget": 34_000, "seed": 0},
        {"bytes": 33_990, "rows": [{"split": "test", "accuracy": 91.0, "loss": 0.3}], "divergence": 0.02},
    )
    told = record(
        {"model": "stories260k", "budget": 90_000, "seed": 0},
        {"bytes": 89_900, "rows": [{"split": "test", "accuracy": 50.0, "loss": 0.5}], "divergence": 0.05},
    )
    document.write_document(results, tmp_path, [tuned, told])
    text = (tmp_path / "networks.md").read_text(encoding="utf-8")
    assert "Not measured here: CIFAR-10, ResNet-8, CIFAR-10, ResNet-44." in text
    resnet, stories = text.split("## TinyStories")[0], text.split("## TinyStories")[1]
    assert "goals met: 0.3, 0.5, 1, 2; missed: none (points lost)" in resnet
    wins = resnet.split("### Wins and losses")[1].splitlines()
    line = next(line for line in wins if line.startswith("| 54,000 | 53,990"))
    assert "rounder 1.0, bits 3 | 53,000 | 0.03 | loss by" in line
    assert (
        "| rounder 1.0, bits 3 | 53,000 | 0.03 | 39,990 |" in resnet
        and "at our budgets: 1 won, 0 tied, 4 lost" in resnet
    )
    assert (
        "win: no file of others is as small" in resnet
        and "calibrated" not in resnet.split("Others:")[1].splitlines()[0]
    )
    assert "allocation needs 9.1 % fewer bytes than equal bits" in text
    assert "| 34,000 | 0 | 33,990 | 0.73 | 0.0200 |" in resnet and "answers on training\nimages" in resnet
    assert "| 90,000 | 0 | 89,900 | 0.2000 | 0.0500 |" in stories and "answers on training\nstories" in stories
    assert "best at equal bytes is 0, as chosen here" in resnet and "0, other than the 1 used here" in stories
    assert (
        "| 4 | 1.000 | 1.000 | 2.00 |" in text and "91.73 % on test; divergence held out is 1.50 to 1.50 times" in text
    )
    rows = (tmp_path / "networks.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 2 * sum("rows" in r["result"] for r in results)
    assert "budget" in (tmp_path / "networks-tensors.csv").read_text(encoding="utf-8").splitlines()[0]
    table = document.readme_table(results)
    assert "| CIFAR-10, ResNet-20 | 91,990 | 9.2 % |" in table


def test_an_unfinished_study_has_a_document(tmp_path: Path) -> None:
    results = made_up(range(1))
    for count in (0, 2, 3, 5):
        document.write_document(results[:count], tmp_path)
        text = (tmp_path / "networks.md").read_text(encoding="utf-8")
        assert ("## CIFAR-10, ResNet-20" in text) == (count > 2) and "Not measured here" in text


def test_the_command_reads_the_study(tmp_path: Path) -> None:
    (tmp_path / "networks").mkdir()
    (tmp_path / "README.md").write_text(
        f"a\n{document.README_BEGIN}\nold\n{document.README_END}\nb\n", encoding="utf-8"
    )
    store = StudyStore.create(open_storage(tmp_path / "networks" / "study.db"), "networks", trial.__name__, {})
    results = made_up(range(1))[:6]
    store.enqueue([r["cell"] for r in results])
    by_id = {r["cell_id"]: r["result"] for r in results}
    while (claim := store.claim("me")) is not None:
        store.finish(claim, by_id[cell_id(claim.cell)])
    store.close()
    docs = tmp_path / "docs"
    document.main([str(tmp_path / "networks"), str(docs), "--readme", str(tmp_path / "README.md")])
    assert "6 trials, 1 seed," in (docs / "networks.md").read_text(encoding="utf-8")
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("a\n") and readme.endswith("b\n") and "91,990" in readme and "old" not in readme


def test_calibration_examples_are_long_enough_and_moved(generator: Generator) -> None:
    x = torch.arange(6 * 8).reshape(6, 8)
    y = x.clone()
    y[::2, 3:] = IGNORED
    data = Split(x, y, x[:0], y[:0])
    found = trial.calibration_inputs({"examples": 3, "length": 4}, data, (8,), 0)
    assert found.shape == (3, 4) and set((found[:, 0] // 8).tolist()) == {1, 3, 5}
    with pytest.raises(PlanError, match="4 calibration examples were asked for, but only 3 are there"):
        trial.calibration_inputs({"examples": 4, "length": 4}, data, (8,), 0)
    images = torch.rand(5, 3 * 6 * 6, generator=generator)
    crop = {"margin": 1, "mirror": True, "background": [0.0, 0.0, 0.0]}
    how = {"examples": 5, "crop": crop}
    moved, again = (trial.calibration_inputs(how, Split(images, y, x, y), (3, 6, 6), 1) for _ in range(2))
    assert moved.shape == images.shape and torch.equal(moved, again)
    assert not math.isclose(float(moved.sum()), float(images.sum()))


def test_losses_of_files_that_are_behind_are_explained() -> None:
    targets = comparison.TARGETS[RESNET.model]
    ours = comparison.File(ALLOCATED, 1, (100,), {"test": (1.0,)}, (0.5, 1.5), 0.1, 0.2, 0.3, ())
    said = [comparison._verdict(ours, comparison.Other("a", 90, loss), targets) for loss in (2.0, 1.0, 0.6, 0.1)]
    assert said[:2] == ["win", "tie"]
    assert said[2] == "loss by 0.40 points, which is within what other test images would change"
    assert said[3].startswith("loss by 0.90 points: the other file was chosen on test, ours on 0.2000 nats")


def test_correlations_are_those_of_logarithms() -> None:
    pearson, spearman, count = comparison.correlations([(1, 2), (10, 20), (100, 200), (0, 1)])
    assert (round(pearson, 6), round(spearman, 6), count) == (1, 1, 3)
    assert math.isnan(comparison.correlations([(1, 2)])[0])
