"""The headline: how few bytes keep an accuracy.  Whole files on disk, one recipe per row, fixed on validation.

bitbook study --dataset headline-tuning                         a ladder of prices, other seeds
python -m bitbook.study.priced.headline choose runs/headline-tuning    → the price of each row, `PRICES`
bitbook study --dataset headline                                five seeds of each row
python -m bitbook.study.priced.headline write runs/headline docs/results
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from bitbook.plan import Plan
from bitbook.scalar.ecsq import ECSQ
from bitbook.study.stats import mean_interval
from bitbook.study.storage import StudyStore, open_storage
from bitbook.study.tables import markdown_table, write_csv

TEACHER: Mapping[str, Any] = {"model": "convnet", "epochs": 12, "batch": 128, "lr": 4e-3, "seed": 0, "copies": 12}
TAUGHT = {"epochs": 5, "batch": 512, "lr": 1.1e-2, "distill": 0.9}
TAUGHT_LENET_5 = {"epochs": 4, "batch": 512, "lr": 8e-3, "distill": 0.9}
ALONE = {"epochs": 30, "batch": 256, "lr": 8e-3, "distill": 0.0}
"""Passes over the images of a pupil, whose images are copies, and without a teacher."""
UNIT_INPUTS, OWN_INPUTS = (0.5, 0.5), (1.0, 0.0)
"""Scale and shift of the inputs in training: with background 0, or as the data are."""

MLP, LENET_300_100, LENET_5 = "mlp-784-128-64-10", "lenet-300-100", "lenet-5"
NARROW = "lenet-5-8-16-48"
"""What is trained in place of LeNet-5, and then widened: of its channels and units hardly more would survive."""
HOLDOUT = 5000
TUNING_SEEDS = (1000, 1001)
LADDERS: Mapping[tuple[str, bool], Sequence[float]] = {
    (MLP, False): (1.5e-6, 2.5e-6, 4e-6, 6e-6, 9e-6, 1.3e-5, 1.8e-5),
    (MLP, True): (8e-6, 1.3e-5, 2.2e-5),
    (LENET_5, True): (2.5e-6, 4e-6, 8e-6, 1.2e-5),
    (LENET_300_100, True): (6e-6, 8e-6, 1.1e-5),
}
"""The prices λ that are tried for each model, with and without a teacher."""


def margin(target: float) -> float:
    """Percentage points by which validation accuracy may miss a target on test, where it is below zero.

    The held-out images are harder than the test images, the more so the lower the accuracy: a straight line through the
    1,004 trials of `mnist.csv` that hold images out and reach 96.5 to 98.3 % on test.
    """
    return -0.27 + 0.15 * (target - 97.5)


@dataclass(frozen=True)
class Row:
    """One line of the table: what accuracy of which model is to be kept, and how it is trained."""

    model: str
    target: float
    """Percent on test."""
    taught: bool
    """With a teacher and inputs from 0 to 1, or with the source material's data and inputs alone."""
    best_other: str
    aim: int
    """Bytes."""

    @property
    def key(self) -> str:
        """Names the row."""
        return f"{self.model} {self.target:g} {'taught' if self.taught else 'alone'}"


COMPOSITE = "L1-trained + NNCodec"
ROWS = (
    Row(MLP, 98.0, True, f"10,700 ({COMPOSITE})", 2_300),
    Row(MLP, 97.5, True, f"5,400 ({COMPOSITE})", 1_700),
    Row(MLP, 97.0, True, f"3,700 ({COMPOSITE})", 1_300),
    Row(LENET_300_100, 98.1, True, "8,560 (Oktay et al. 2020)", 2_800),
    Row(LENET_5, 99.17, True, "1,694 (MIRACLE, a public re-implementation, one run)", 1_694),
    Row(LENET_5, 99.02, True, "1,140 (MIRACLE, a public re-implementation, one run)", 1_140),
    Row(MLP, 98.0, False, f"10,700 ({COMPOSITE})", 2_300),
    Row(MLP, 97.5, False, f"5,400 ({COMPOSITE})", 1_700),
    Row(MLP, 97.0, False, f"3,700 ({COMPOSITE})", 1_300),
)

PRICES: Mapping[str, float] = {
    "mlp-784-128-64-10 98 taught": 1e-05,
    "mlp-784-128-64-10 97.5 taught": 1.6e-05,
    "mlp-784-128-64-10 97 taught": 2.2e-05,
    "lenet-300-100 98.1 taught": 7.8e-06,
    "lenet-5 99.17 taught": 3.2e-06,
    "lenet-5 99.02 taught": 6e-06,
    "mlp-784-128-64-10 97.5 alone": 5.4e-06,
    "mlp-784-128-64-10 97 alone": 1.5e-05,
}
"""λ of each row, by its key: the highest that is expected to keep the target on validation, `choose`."""


def priced_cell(model: str, lam: float, seed: int, *, taught: bool, target: float | None = None) -> dict[str, Any]:
    """One trial of `priced.run_trial`, written out completely."""
    weights = Plan({"*.weight": ECSQ(3)}).to_json()["weights"]
    biases = Plan({"*.bias": ECSQ()}).to_json()["weights"]
    convolutional = model == LENET_5
    cell = {
        "dataset": "mnist",
        "holdout": HOLDOUT,
        "model": model,
        "family": "scalar",
        "method": "priced ECSQ" if taught else "priced ECSQ, no teacher",
        "recipe": f"λ = {lam:g}",
        "plan": {"weights": weights, "biases": biases},
        # Inputs of twice the range, and those of convolutions, take smaller weights.
        "step": 0.4 if taught and not convolutional else 0.2,
        "bias_step": 0.1,
        "training": (TAUGHT_LENET_5 if convolutional else TAUGHT) if taught else ALONE,
        "lam": lam,
        "inputs": list(UNIT_INPUTS if taught else OWN_INPUTS),
        "teacher": dict(TEACHER) if taught else None,
        "seed": seed,
    }
    if convolutional:
        cell["narrow"] = NARROW
    return cell if target is None else {**cell, "target": target}


def tuning_cells(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every price of the ladders, for seeds that the headline does not use."""
    return [
        priced_cell(model, lam, TUNING_SEEDS[0] + seed, taught=taught)
        for (model, taught), ladder in LADDERS.items()
        for seed in seeds
        for lam in ladder
    ]


def headline_cells(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The chosen recipe of each row."""
    return [
        priced_cell(row.model, PRICES[row.key], seed, taught=row.taught, target=row.target)
        for seed in seeds
        for row in ROWS
        if row.key in PRICES
    ]


def choose(results: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """For each row the highest price whose validation accuracy is expected to reach target plus `margin`.

    What is expected is a parabola through the accuracies of the ladder over the logarithm of its prices: it knows more
    of each price than the few trials there.  Prices are rounded down to two digits and stay within the ladder.
    """
    found: dict[tuple[str, bool], list[tuple[float, float]]] = defaultdict(list)
    for record in results:
        cell = record["cell"]
        point = math.log(cell["lam"]), _accuracy(record, "validation")
        found[cell["model"], cell["teacher"] is not None].append(point)
    chosen = {}
    for row in ROWS:
        points = np.array(found.get((row.model, row.taught), ()))
        if not len(points):
            continue
        steps = np.linspace(points[:, 0].min(), points[:, 0].max(), 1001)
        degree = min(2, len(np.unique(points[:, 0])) - 1)
        expected = np.polyval(np.polyfit(points[:, 0], points[:, 1], degree), steps)
        kept = steps[expected >= row.target + margin(row.target)]
        if len(kept):
            chosen[row.key] = max(_rounded_down(math.exp(kept.max())), float(f"{math.exp(steps[0]):.2g}"))
    return chosen


def _rounded_down(lam: float) -> float:
    digit = 10.0 ** (math.floor(math.log10(lam)) - 1)
    return float(f"{math.floor(lam / digit + 1e-9) * digit:.2g}")


def csv_rows(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per trial and split: the columns of every study, and `target`."""
    return [
        {
            "dataset": cell["dataset"],
            "model": cell["model"],
            "family": cell["family"],
            "recipe": f"{cell['method']}, {cell['recipe']}",
            "coder": "smallest",
            "seed": cell["seed"],
            "split": scored["split"],
            "bytes": found["bytes"],
            "accuracy": round(scored["accuracy"], 4),
            "seconds": round(found["seconds"]["fit"] + found["seconds"]["evaluate"], 3),
            "target": cell.get("target", ""),
            "loss": round(scored["loss"], 6),
            "cell": record["cell_id"],
        }
        for record in results
        for cell, found in [(record["cell"], record["result"])]
        for scored in found["rows"]
    ]


def document(results: Sequence[Mapping[str, Any]]) -> str:
    """The table in words: bytes and accuracies of each row, whether its target was kept, and where the bytes are."""
    lines = []
    for row in ROWS:
        mine = [r for r in results if _belongs(r["cell"], row)]
        if not mine:
            continue
        test = [_accuracy(r, "test") for r in mine]
        mean, low, high = mean_interval(test)
        sizes = [r["result"]["bytes"] for r in mine]
        lines.append({
            "model": row.model,
            "accuracy to keep": f"{row.target:g} %",
            "trained": "with a teacher, inputs 0…1" if row.taught else "alone, inputs −1…1",
            "seeds": len(mine),
            "bytes, mean": round(fmean(sizes)),
            "range": f"{min(sizes):,}–{max(sizes):,}",
            "test accuracy": f"{mean:.2f} ± {(high - low) / 2:.2f}",
            "kept": "yes" if mean >= row.target else "missed",
            "best other": row.best_other,
            "aim": row.aim,
            "λ": f"{mine[0]['cell']['lam']:g}",
        })  # fmt: skip
    left_out_text = _left_out([row for row in ROWS if not any(_belongs(r["cell"], row) for r in results)])
    parts: dict[str, list[float]] = defaultdict(list)
    for record in results:
        if record["cell"]["model"] == MLP:
            for name, size in _shares(record["result"]["ledger"]).items():
                parts[name].append(size)
    where = [{"part": name, "bytes, mean": round(fmean(sizes), 1)} for name, sizes in parts.items()]
    return f"""# The headline: how few bytes keep an accuracy

Made by `bitbook study --dataset headline` and
`python -m bitbook.study.priced.headline write runs/headline docs/results`; every trial is a row per split in
[headline.csv](headline.csv). Bytes are the length of the file on disk, everything included; accuracies are those of the
file, read back into a fresh model; mean ± 95 % over training seeds.

One recipe per row: integer weights with three reconstruction points a layer, a price λ on every bit in training, the
context-mixing coder. Only λ differs. It is the highest that is expected to reach the target plus a margin on
validation, by a parabola through the accuracies of a ladder of prices with other seeds
(`bitbook study --dataset headline-tuning`). The margin is {margin(97.5):.2f} points at 97.5 %, and 0.15 points more for
each point of the target: the held-out images are harder than the test images, by as much over the 1,004 trials of
[mnist.csv](mnist.csv) from 96.5 to 98.3 %. A miss is a miss.

{markdown_table(lines, list(lines[0]))}
{left_out_text}

The teacher is a convolutional network of 258,000 weights trained on the same 55,000 images, moved by up to two pixels.
Its pupils see {TEACHER["copies"]} copies of each image, moved a little by affine maps, with the teacher's answers to
each (0.9, and 0.1 for the label), in {TAUGHT["epochs"]} passes; inputs from 0 to 1 are folded into the first layer
afterwards, so that the file is an ordinary network for inputs from −1 to 1. "Alone" has neither. LeNet-5 is trained
as {NARROW}, in {TAUGHT_LENET_5["epochs"]} passes and from smaller steps, and widened: its file holds all 431,080
weights.

Where the bytes of the MLP's files are, mean over all of its rows:

{markdown_table(where, list(where[0])) if where else ""}"""


def _left_out(rows: Sequence[Row]) -> str:
    """Why rows have no trials."""
    reasons = []
    for row in rows:
        tried = (row.model, row.taught) in LADDERS and row.key not in PRICES
        why = "no price of its ladder keeps it on validation" if tried else "not run"
        reasons.append(f"{row.model} at {row.target:g} %, {'with a teacher' if row.taught else 'alone'}: {why}")
    return f"Without trials: {'; '.join(reasons)}." if reasons else ""


def _belongs(cell: Mapping[str, Any], row: Row) -> bool:
    return (cell["model"], cell.get("target"), cell["teacher"] is not None) == (row.model, row.target, row.taught)


def _accuracy(record: Mapping[str, Any], split: str) -> float:
    return next(row["accuracy"] for row in record["result"]["rows"] if row["split"] == split)


def _shares(ledger: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of weight codes, bias codes, reconstruction points, and everything else."""
    shares = {"codes of weights": 0, "codes of biases": 0, "reconstruction points": 0, "header, plan, checksum": 0}
    for row in ledger["rows"]:
        if row["tensor"] == "header":
            shares["header, plan, checksum"] += row["bytes"]
        elif row["part"] != "codes":
            shares["reconstruction points"] += row["bytes"]
        else:
            shares[f"codes of {'biases' if row['tensor'].endswith('bias') else 'weights'}"] += row["bytes"]
    return shares


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose prices from a tuning study, or write the document of the headline."""
    parser = argparse.ArgumentParser(description="Choose prices on validation, or write the headline's document.")
    parser.add_argument("action", choices=["choose", "write"])
    parser.add_argument("run", type=Path, help="the study's folder, which holds study.db")
    parser.add_argument("folder", type=Path, nargs="?", help="where the document goes")
    given = parser.parse_args(arguments)
    store = StudyStore(open_storage(given.run / "study.db"), given.run.name)
    results = sorted(store.results(), key=lambda record: record["cell_id"])
    store.close()
    if given.action == "choose":
        for key, lam in choose(results).items():
            print(f"    {key!r}: {lam:g},")
        return
    if given.folder is None:
        parser.error("write needs a folder")
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(csv_rows(results), key=lambda r: (r["model"], r["recipe"], str(r["target"]), r["seed"], r["split"]))
    write_csv(rows, given.folder / "headline.csv", columns=list(rows[0]))
    (given.folder / "headline.md").write_text(document(results), encoding="utf-8")


if __name__ == "__main__":
    main()
