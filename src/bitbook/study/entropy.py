"""Entropy coding on equal terms: scalar, vector and fused recipes, each file written twice, and training with a price.

    bitbook study --dataset entropy
    python -m bitbook.study.entropy runs/entropy docs/results

How much is the coder: the same codes at fixed width and entropy-coded.  How much is the price: `headline.csv`, whose
rows without a teacher had the same data and inputs.  How much is the codebook: its own bytes in every file.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitbook.scalar.uniform import Uniform
from bitbook.study.grid import (
    MNIST,
    ROWS,
    STRONG_START,
    VECTORS,
    Layers,
    Recipe,
    cell,
    cluster_recipes,
    learned_recipes,
    pruned_recipes,
    scalar_recipes,
    strong_tune,
    vector_recipes,
)
from bitbook.study.storage import StudyStore, open_storage
from bitbook.study.tables import (
    MethodSaving,
    Point,
    Result,
    Scores,
    accuracy_text,
    equal_accuracy_savings,
    markdown_table,
    points,
    trial_rows,
    write_csv,
)

FIXED, CODED = "fixed width", "entropy-coded"
PRICED = "scalar, trained with a price, entropy-coded"
KINDS: Mapping[str, str] = {
    "scalar": "scalar",
    "scalar, learned scale": "scalar, learned scale",
    "vectors": "vectors, float32 codewords",
    "fused": "vectors, 5-bit codewords",
    "rows": "rows, 4-bit codewords",
    "pruned": "pruned + 4 bits",
}
"""Curves: each the front, on validation, of the methods that `_kind` puts into it."""

_SCALAR = f"{KINDS['scalar']}, {CODED}"
PAIRS = [
    *((f"{kind}, {CODED}", f"{kind}, {FIXED}") for kind in KINDS.values()),
    *((f"{kind}, {CODED}", _SCALAR) for kind in KINDS.values() if kind != KINDS["scalar"]),
    (f"{KINDS['fused']}, {CODED}", f"{KINDS['vectors']}, {CODED}"),
    *((PRICED, f"{KINDS[kind]}, {CODED}") for kind in ("scalar", "fused", "pruned")),
]


def entropy_recipes() -> Iterator[Recipe]:
    """A part of the MNIST grid, of every family."""
    layers = Layers()
    yield from scalar_recipes(layers, (2, 3, 4, 5, 6), (None,))
    yield from learned_recipes(layers, (2, 3, 4))
    yield from cluster_recipes(layers, ROWS, (25, 50, 75), output=False, centroids=Uniform(4))
    for size in VECTORS:
        yield from vector_recipes(layers, size)
        yield from vector_recipes(layers, size, centroids=Uniform(5))
    yield from pruned_recipes(layers, (5, 10, 20, 40), (4,))


def entropy_cells(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Each recipe from the strong start, tuned, its file written with both coders."""
    return [
        cell(
            recipe,
            dataset="mnist",
            model=MNIST.model,
            start=STRONG_START,
            tune=strong_tune(recipe),
            seed=seed,
            holdout=MNIST.holdout,
        )
        | {"coded": True}
        for seed in seeds
        for recipe in entropy_recipes()
    ]


def both_files(results: Iterable[Result]) -> dict[str, list[dict[str, Any]]]:
    """The results as if each file were a trial of its own, by coder."""
    results = list(results)
    coded = [{**r, "result": {**r["result"], "bytes": r["result"]["coded_bytes"]}} for r in results]
    return {FIXED: [dict(r) for r in results], CODED: coded}


def _kind(p: Point) -> str:
    if p.family in ("fused", "vector"):
        return "rows" if p.method.startswith("rows") else "fused" if p.family == "fused" else "vectors"
    return "pruned" if p.family == "pruned" else p.method


def _curves(results: Sequence[Result], priced: Sequence[Mapping[str, str]]) -> list[Point]:
    """The points of every curve, `method` naming it."""
    found = [
        replace(p, method=f"{KINDS[_kind(p)]}, {coder}", name=p.recipe)
        for coder, records in both_files(results).items()
        for p in points(records)
    ]
    by_recipe: dict[str, dict[int, dict[str, Mapping[str, str]]]] = defaultdict(lambda: defaultdict(dict))
    for row in priced:
        by_recipe[row["recipe"]][int(row["seed"])][row["split"]] = row
    for name, seeds in by_recipe.items():
        rows = [seeds[seed] for seed in sorted(seeds)]
        scores = {
            split: Scores(
                tuple(float(r[split]["accuracy"]) for r in rows), tuple(float(r[split]["loss"]) for r in rows)
            )
            for split in ("test", "validation")
        }
        sizes = tuple(int(r["test"]["bytes"]) for r in rows)
        same = {"method": PRICED, "name": name, "family": "scalar", "seeds": tuple(sorted(seeds)), "sizes": sizes}
        found.append(replace(found[0], scores=scores, cells=tuple(r["test"]["cell"] for r in rows), **same))
    return [
        p for method in dict.fromkeys(p.method for p in found) for p in _front([q for q in found if q.method == method])
    ]


def _front(line: Sequence[Point]) -> list[Point]:
    """The points that no other of the line beats in bytes and validation accuracy."""

    def accuracy(p: Point) -> float:
        return p.scores["validation"].mean

    return [p for p in line if not any(q.bytes <= p.bytes and accuracy(q) > accuracy(p) for q in line)]


def sentence(found: MethodSaving) -> str:
    """What the interval supports, in words."""
    if found.saving is None:
        return f"{found.method} and {found.against} share no range of accuracies"
    (percent, least, most), low, high, _ = found.saving
    reach = f"between {least:.1f} and {most:.1f} %"
    bounds = "one seed" if math.isnan(low) else f"{low:.0f} to {high:.0f} %"
    if low <= 0 <= high:
        return f"{found.method} and {found.against} cannot be told apart {reach}: {percent:+.0f} % ({bounds})"
    word = "fewer" if percent > 0 else "more"
    bounds = bounds if percent > 0 or math.isnan(low) else f"{-high:.0f} to {-low:.0f} %"
    return f"{found.method} needs {abs(percent):.0f} % ({bounds}) {word} bytes than {found.against} {reach}"


def document(results: Sequence[Result], priced: Sequence[Mapping[str, str]]) -> str:
    """Tables, and what the intervals support."""
    files = {coder: {(p.recipe): p for p in points(records)} for coder, records in both_files(results).items()}
    rows = []
    for name, p in sorted(files[FIXED].items(), key=lambda item: item[1].bytes):
        coded = files[CODED][name]
        rows.append({
            "recipe": name,
            "fixed width, bytes": round(p.bytes),
            "entropy-coded, bytes": round(coded.bytes),
            "saved, %": 100 * (1 - coded.bytes / p.bytes),
            "codebook, bytes": _codebook(p) or None,
            "test accuracy": accuracy_text(p.test),
        })  # fmt: skip
    curves = _curves(results, priced)
    there = {p.method for p in curves}
    savings = equal_accuracy_savings(curves, [pair for pair in PAIRS if set(pair) <= there])
    said = "\n".join(f"- {sentence(found)}" for found in savings)
    seeds = len({r["cell"]["seed"] for r in results})
    return f"""# Entropy coding: who wins on equal terms

Made by `bitbook study --dataset entropy --seeds {seeds}` and
`python -m bitbook.study.entropy runs/entropy docs/results`:
{len(results)} trials, {seeds} seeds, MNIST, mlp-784-128-64-10, the strong start, then 5 epochs under the plan.
Every file is a row per split in [entropy.csv](entropy.csv). Each trained network is written twice: at fixed width,
an entry per tensor (format 1), and entropy-coded, one entry (format 2). Their difference is the coder and the header.
"{PRICED}" are the rows of [headline.csv](headline.csv) without a teacher: the same data and inputs, trained from
scratch for 30 epochs with a price on every bit, so that what they save is price and training together.

## What the intervals support

Bytes at equal test accuracy, mean over the accuracies that both reach (Bjøntegaard 2001), 95 % intervals over seeds:

{said}

## Every recipe

{markdown_table(rows, list(rows[0]))}
"""


def _codebook(p: Point) -> int:
    """Bytes of codewords in the first seed's file of fixed width."""
    return sum(row["bytes"] for row in p.example["result"]["ledger"]["rows"] if row["part"].startswith("centroids"))


def csv_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row per file and split."""
    return [
        {**row, "coder": "fixed" if coder == FIXED else "smallest"}
        for coder, records in both_files(results).items()
        for row in trial_rows(records)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the document of a finished study."""
    parser = argparse.ArgumentParser(description="Write the document of the entropy study.")
    parser.add_argument("run", type=Path, help="the study's folder, which holds study.db")
    parser.add_argument("folder", type=Path, help="where the document goes, beside headline.csv")
    given = parser.parse_args(arguments)
    store = StudyStore(open_storage(given.run / "study.db"), "entropy")
    results = sorted(store.results(), key=lambda record: record["cell_id"])
    store.close()
    priced = []
    if (given.folder / "headline.csv").exists():
        with open(given.folder / "headline.csv", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["model"] == MNIST.model]
        priced = [row for row in rows if "no teacher" in row["recipe"]]
    write_csv(csv_rows(results), given.folder / "entropy.csv")
    (given.folder / "entropy.md").write_text(document(results, priced), encoding="utf-8")


if __name__ == "__main__":
    main()
