"""Entropy coding on equal terms: scalars, vectors and fused recipes, tuned and written twice, or trained with a price.

    bitbook study --dataset entropy
    python -m bitbook.study.priced.entropy runs/entropy docs/results

How much is the coder: the same codes at fixed width and entropy-coded.  How much is the price: training that pays for
every bit, of scalars and of codewords, from the same start, on the same data and inputs and for the same number of
epochs.  How much is the codebook: its own bytes in every file.  On a multilayer perceptron and a convolutional network.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from bitbook.plan import Plan
from bitbook.quantizer import Quantizer
from bitbook.scalar.ecsq import ECSQ
from bitbook.scalar.uniform import Uniform
from bitbook.study.grid import (
    MNIST,
    ROWS,
    STRONG_START,
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
from bitbook.study.stats import SavingInterval
from bitbook.study.storage import StudyStore, open_storage
from bitbook.study.tables import (
    MethodSaving,
    Point,
    Result,
    accuracy_text,
    equal_accuracy_savings,
    markdown_table,
    points,
    trial_rows,
    write_csv,
)
from bitbook.vector.codebook import Codebook

FIXED, CODED, PRICED = "fixed width", "entropy-coded", "trained with a price"
KINDS: Mapping[str, str] = {
    "scalar": "scalar",
    "scalar, learned scale": "scalar, learned scale",
    "vectors": "vectors, float32 codewords",
    "fused": "vectors, 5-bit codewords",
    "rows": "rows, 4-bit codewords",
    "pruned": "pruned + 4 bits",
}
"""Curves: each the front, on validation, of the methods that `_kind` puts into it."""

PRICE_TRAINING = {"epochs": 6, "batch": 256, "lr": 2e-3, "smooth": 0.3, "distill": 0.0}
"""From the strong start, for scalars and codewords alike."""
CODEWORD_RATE = 1e-4  # a codeword's gradient is a sum over many blocks: at 1e-3 trainings diverge

_SCALAR = f"{KINDS['scalar']}, {CODED}"
_PRICED_KINDS = ("scalar", "vectors", "fused")
PAIRS = [
    *((f"{kind}, {CODED}", f"{kind}, {FIXED}") for kind in KINDS.values()),
    *((f"{KINDS[kind]}, {PRICED}", f"{KINDS[kind]}, {CODED}") for kind in _PRICED_KINDS),
    *((f"{kind}, {CODED}", _SCALAR) for kind in KINDS.values() if kind != KINDS["scalar"]),
    (f"{KINDS['fused']}, {CODED}", f"{KINDS['vectors']}, {CODED}"),
    *((f"{KINDS['scalar']}, {PRICED}", f"{KINDS[kind]}, {PRICED}") for kind in ("vectors", "fused")),
    (f"{KINDS['fused']}, {PRICED}", f"{KINDS['vectors']}, {PRICED}"),
    (f"{KINDS['scalar']}, {PRICED}", f"{KINDS['pruned']}, {CODED}"),
]


@dataclass(frozen=True)
class Network:
    """A model, and how much of the grid it is worth."""

    model: str
    layers: Layers
    bits: Sequence[int]
    learned: Sequence[int]
    vectors: Sequence[tuple[int, Sequence[int]]]
    """Sizes of vectors, each with its numbers of codewords."""
    kept: Sequence[int]
    """Percent of the weights that pruning keeps."""
    books: Sequence[tuple[int, int]]
    """Sizes of vectors and numbers of codewords that are trained with a price."""
    rows: Sequence[int] = ()
    """Percent of the rows that remain."""
    undivided: Mapping[str, Quantizer] | None = None
    """Weights that vectors do not divide."""
    prices: Mapping[str, Sequence[float]] = field(default_factory=lambda: PRICES)


PRICES: Mapping[str, Sequence[float]] = {
    "scalar": (1e-6, 3e-6, 1e-5),
    **dict.fromkeys(("vectors", "fused"), (3e-6, 1e-5, 3e-5)),
}
"""λ of each curve, spread over the accuracies of the others."""

NETWORKS = (
    Network(
        MNIST.model, Layers(), (2, 3, 4, 5), (2, 3, 4), [(size, (16, 64, 256)) for size in (4, 8)],
        (5, 10, 20), ((4, 64),), rows=(25, 50, 75),
    ),
    Network(
        "lenet-5-8-16-64", Layers("*.weight", "*", "fc2.weight"), (3, 4), (2, 3), [(4, (16, 64))],
        (), ((4, 64),), undivided={"conv1.weight": Uniform(5)},
        prices={"scalar": (3e-6, 1e-5), "fused": (1e-5, 3e-5)},
    ),
)  # fmt: skip


def entropy_recipes(network: Network) -> Iterator[Recipe]:
    """A part of the MNIST grid, of every family."""
    layers = network.layers
    yield from scalar_recipes(layers, network.bits, (None,))
    yield from learned_recipes(layers, network.learned)
    if network.rows:
        yield from cluster_recipes(layers, ROWS, network.rows, output=False, centroids=Uniform(4))
    for size, codewords in network.vectors:
        for recipe in (
            *vector_recipes(layers, size, codewords),
            *vector_recipes(layers, size, codewords, centroids=Uniform(5)),
        ):
            weights = {**(network.undivided or {}), **recipe.plan.weights}
            yield replace(recipe, plan=replace(recipe.plan, weights=weights))
    yield from pruned_recipes(layers, network.kept, (4,))


def priced_recipes(network: Network) -> Iterator[tuple[Recipe, dict[str, Any]]]:
    """What is trained with a price, and how; biases are integers under the same price in all of them."""
    biases, first = {"*.bias": ECSQ()}, {"step": 0.1}
    for lam in network.prices["scalar"]:
        plan = Plan({network.layers.weights: ECSQ(3), **biases})
        recipe = Recipe("priced", KINDS["scalar"], f"λ = {lam:g}", plan, fit={**first, "iterations": 0})
        yield recipe, {"lam": lam, **PRICE_TRAINING}
    # The output layer has too few blocks to share the bytes of a codeword: under a price, its classes merge.
    undivided: dict[str, Quantizer] = dict.fromkeys([*(network.undivided or {}), network.layers.output], ECSQ(3))
    for size, codewords in network.books:
        stored = {"vectors": Codebook(codewords, (1, size)), "fused": Codebook(codewords, (1, size), Uniform(5))}
        for kind, codebook in stored.items():
            for lam in network.prices.get(kind, ()):
                plan = Plan({**undivided, network.layers.weights: codebook, **biases})
                name = f"{codewords} of {size}, λ = {lam:g}"
                fit = {**first, "iterations": 25}
                recipe = Recipe("priced", KINDS[kind], name, plan, fit, {"codes": "latent"})
                yield recipe, {"lam": lam, **PRICE_TRAINING, "side_lr": CODEWORD_RATE}


def entropy_cells(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Each recipe from the strong start: tuned and written with both coders, or trained with a price."""
    cells = []
    for network in NETWORKS:
        for seed in seeds:
            same = {"dataset": "mnist", "model": network.model, "start": STRONG_START, "seed": seed}
            for recipe in entropy_recipes(network):
                found = cell(recipe, tune=strong_tune(recipe), holdout=MNIST.holdout, **same)
                cells.append({**found, "coded": True})
            for recipe, price in priced_recipes(network):
                found = cell(recipe, tune=None, holdout=MNIST.holdout, **same)
                (phase,) = found["phases"]
                cells.append({**found, "phases": [{**phase, "price": price}]})
    return cells


def both_files(results: Iterable[Result]) -> dict[str, list[dict[str, Any]]]:
    """The results as if each file were a trial of its own, by coder; priced trainings have no file of fixed width."""
    results = list(results)
    tuned = [r for r in results if not _priced(r)]
    coded = [{**r, "result": {**r["result"], "bytes": r["result"]["coded_bytes"]}} for r in tuned]
    return {FIXED: [dict(r) for r in tuned], CODED: coded, PRICED: [dict(r) for r in results if _priced(r)]}


def _priced(record: Result) -> bool:
    return "price" in record["cell"]["phases"][-1]


def _kind(p: Point) -> str:
    if p.family == "priced":
        return p.method
    if p.family in ("fused", "vector"):
        return KINDS["rows" if p.method.startswith("rows") else "fused" if p.family == "fused" else "vectors"]
    return KINDS["pruned" if p.family == "pruned" else p.method]


def curves(results: Sequence[Result]) -> list[Point]:
    """The points of every curve of one network, `method` naming it: of each method the front on validation."""
    found = [
        replace(p, method=f"{_kind(p)}, {written}", name=p.recipe)
        for written, records in both_files(results).items()
        for p in points(records)
    ]
    found = [replace(p, group=found[0].group) for p in found]  # that trainings differ is what is asked about
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


def document(results: Sequence[Result]) -> str:
    """Tables, and what the intervals support, for each network."""
    seeds = {
        model: len({r["cell"]["seed"] for r in results if r["cell"]["model"] == model})
        for model in dict.fromkeys(r["cell"]["model"] for r in results)
    }
    who = ", ".join(f"{model} ({count} seed{'s' * (count != 1)})" for model, count in seeds.items())
    sections = "\n".join(_section(model, [r for r in results if r["cell"]["model"] == model]) for model in seeds)
    training = PRICE_TRAINING
    return f"""# Entropy coding: who wins on equal terms

Made by `bitbook study --dataset entropy --seeds {max(seeds.values())}` and
`python -m bitbook.study.priced.entropy runs/entropy docs/results`:
{len(results)} trials, {who}, all from the strong start.
Every file is a row per split in [entropy.csv](entropy.csv).

"{FIXED.capitalize()}" and "{CODED}" are the same network, tuned for 5 epochs under the plan and written twice: an entry
per tensor (format 1), and one entry (format 2). Their difference is the coder and the header.
"{PRICED.capitalize()}" is entropy-coded too: {training["epochs"]} epochs with a price on every bit, of scalars and of
codewords, the same data and inputs, no teacher, biases as integers under the same price. Its difference from
"{CODED}" is therefore the price, those biases (float32 elsewhere), and {training["epochs"] - 5} epoch more, with Adam.
Under a price, output layers are scalars in all of them: their few blocks cannot share the bytes of a codeword.
A codebook's share is its bytes in the file.
{sections}"""


def _section(model: str, results: Sequence[Result]) -> str:
    line = curves(results)
    there = {p.method for p in line}
    savings = equal_accuracy_savings(line, [pair for pair in PAIRS if set(pair) <= there])
    by_pair = {(found.method, found.against): found for found in savings}
    parts = [
        {
            "kind": kind,
            "the coder saves": _percent(by_pair.get((f"{kind}, {CODED}", f"{kind}, {FIXED}"))),
            "the price saves more": _percent(by_pair.get((f"{kind}, {PRICED}", f"{kind}, {CODED}"))),
            **{f"codebook, % of {written}": _share([p for p in line if p.method == f"{kind}, {written}"])
               for written in (FIXED, PRICED)},
        }
        for kind in KINDS.values() if f"{kind}, {CODED}" in there
    ]  # fmt: skip
    files = {written: {p.recipe: p for p in points(records)} for written, records in both_files(results).items()}
    rows = [
        {
            "recipe": name,
            "fixed width, bytes": round(p.bytes),
            "entropy-coded, bytes": round(coded.bytes),
            "saved, %": 100 * (1 - coded.bytes / p.bytes),
            "codebook, bytes": _codebook(p) or None,
            "test accuracy": accuracy_text(p.test),
        }
        for name, p in sorted(files[FIXED].items(), key=lambda item: item[1].bytes)
        for coded in [files[CODED][name]]
    ]
    priced = [
        {
            "recipe": name,
            "bytes": round(p.bytes),
            "codebook, bytes": _codebook(p) or None,
            "test accuracy": accuracy_text(p.test),
        }
        for name, p in sorted(files[PRICED].items(), key=lambda item: item[1].bytes)
    ]
    said = "\n".join(f"- {sentence(found)}" for found in savings)
    return f"""
## {model}

Bytes at equal test accuracy, mean over the accuracies that both reach (Bjøntegaard 2001), 95 % intervals over seeds:

{said}

Where the savings come from, in percent of the bytes before:

{markdown_table(parts, list(parts[0])) if parts else ""}
Every recipe, tuned:

{markdown_table(rows, list(rows[0])) if rows else ""}
Trained with a price:

{markdown_table(priced, list(priced[0])) if priced else ""}"""


def _percent(found: MethodSaving | None) -> str:
    """A saving with its interval, where the two share a range of accuracies."""
    saving: SavingInterval | None = found.saving if found is not None else None
    if saving is None:
        return ""
    percent, low, high = saving.saving.percent, saving.low, saving.high
    return f"{percent:.0f}" if math.isnan(low) else f"{percent:.0f} ({low:.0f} to {high:.0f})"


def _share(line: Sequence[Point]) -> float | None:
    """Percent of their files that codewords take, mean over points; None where there are none."""
    shares = [100 * _codebook(p) / p.sizes[0] for p in line]
    return fmean(shares) if any(shares) else None


def _codebook(p: Point) -> int:
    """Bytes of codewords in the first seed's file."""
    return sum(row["bytes"] for row in p.example["result"]["ledger"]["rows"] if row["part"].startswith("centroids"))


def csv_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row per file and split."""
    return [
        {**row, "coder": "fixed" if written == FIXED else "smallest"}
        for written, records in both_files(results).items()
        for row in trial_rows(records)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the document of a finished study."""
    parser = argparse.ArgumentParser(description="Write the document of the entropy study.")
    parser.add_argument("run", type=Path, help="the study's folder, which holds study.db")
    parser.add_argument("folder", type=Path, help="where the document goes")
    given = parser.parse_args(arguments)
    store = StudyStore(open_storage(given.run / "study.db"), "entropy")
    results = sorted(store.results(), key=lambda record: record["cell_id"])
    store.close()
    write_csv(csv_rows(results), given.folder / "entropy.csv")
    (given.folder / "entropy.md").write_text(document(results), encoding="utf-8")


if __name__ == "__main__":
    main()
