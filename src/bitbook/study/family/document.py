"""The document of the family study: bytes for each accuracy, and who wins at equal bytes.

python -m bitbook.study.family.document runs/family docs/results
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitbook.study.family.methods import BASELINE, NETWORKS, Network
from bitbook.study.plots import size_accuracy
from bitbook.study.priced.entropy import sentence
from bitbook.study.storage import StudyStore, open_storage
from bitbook.study.tables import (
    EqualBytes,
    Point,
    Result,
    equal_accuracy_savings,
    equal_bytes_table,
    float_point,
    markdown_table,
    points,
    trial_rows,
    write_csv,
)

ROUNDED, SHIFTED, FEEDBACK, TRAINED = "rounded", "statistics shifted", "error feedback", "trained"
VARIATIONS = (ROUNDED, SHIFTED, FEEDBACK, TRAINED)


def variation(cell: Mapping[str, Any]) -> str:
    """What was done beyond rounding; the last word counts, and what is trained has its statistics shifted too."""
    if "tune" in cell["phases"][-1]:
        return TRAINED
    return FEEDBACK if "feedback" in cell else SHIFTED if cell["repair"] else ROUNDED


def network_of(results: Sequence[Result], networks: Sequence[Network] = NETWORKS) -> dict[str, list[Result]]:
    """The results of each network that has any, by its title."""
    found = {n.title: [r for r in results if r["cell"]["model"] == n.model] for n in networks}
    return {title: records for title, records in found.items() if records}


def curves(results: Sequence[Result]) -> dict[str, list[Point]]:
    """The points of one network by variation, all of one group: that trainings differ is what is asked about."""
    found: dict[str, list[Point]] = {}
    for name in VARIATIONS:
        records = [r for r in results if variation(r["cell"]) == name]
        if records:
            found[name] = points(records)
    group = next(iter(found.values()))[0].group
    return {name: [replace(p, group=group) for p in line] for name, line in found.items()}


def document(results: Sequence[Result], networks: Sequence[Network] = NETWORKS) -> str:
    """What each method needs for each accuracy, and who wins at equal bytes, for each network."""
    by_title = network_of(results, networks)
    sections = "\n".join(_section(n, by_title[n.title]) for n in networks if n.title in by_title)
    seeds = len({r["cell"]["seed"] for r in results})
    minutes = sum(r["result"]["seconds"]["fit"] + r["result"]["seconds"]["evaluate"] for r in results) / 60
    return f"""# The family at equal bytes

Made by `bitbook study --dataset family --seeds {seeds}` and
`python -m bitbook.study.family.document runs/family docs/results` (`make family`):
{len(results)} trials, {minutes:.0f} core-minutes; a row per trial and split in [family.csv](family.csv). Bytes are the
length of the file on disk, each stream in the smallest of all coders, biases, normalisations, codebooks and the plan
included; accuracies are those of the file, read back into a fresh model.

Rows are methods; "{ROUNDED}": weights as the fit leaves them; "{SHIFTED}": with what the weights changed in the
batch-norm statistics of a few training images added to the stored ones; "{FEEDBACK}": each column encoded to make up
for the errors of those before it on such images, ECSQ and trellises under a price of bits, then shifted;
"{TRAINED}": tuned under the plan for a short time, from shifted statistics.
What is no weight is stored alike for all methods: biases and normalisations in
bfloat16, two vectors for each normalisation.
{sections}"""


def _section(network: Network, results: Sequence[Result]) -> str:
    lines = curves(results)
    reference = float_point(lines.get(ROUNDED, []))
    if reference is None:
        return f"\n## {network.title}\n\nWithout the float network there is nothing to compare with.\n"
    seeds = sorted({r["cell"]["seed"] for r in results})
    kept = {
        split: [_level(network, reference, level, split) for level in network.levels]
        for split in ("validation", "test")
    }
    said = [f"≤ {level:g} points" if network.relative else f"≥ {level:g} %" for level in network.levels]
    beside = "lost, in points" if network.relative else "of that choice, in percent"
    of_float = f"{reference.test.mean:.2f} % on test, {_validation(reference):.2f} % on validation"
    parts = [
        f"""
## {network.title}

{network.model}, {len(results)} trials, {len(seeds)} seed{"s" * (len(seeds) != 1)}. The float network in float32:
{reference.bytes:,.0f} bytes, {of_float}. {_about(network)}

![Size and accuracy](family-{network.model}.svg)

### The smallest file that keeps an accuracy

Chosen on validation; beside the bytes the test accuracy {beside}.
"""
    ]
    chosen: Callable[[Point, int], bool] = lambda p, i: _validation(p) >= kept["validation"][i]  # noqa: E731
    parts.append(_smallest_table(network, lines, said, chosen, reference))
    parts.append("\nThe same chosen on test, the way the numbers of others were chosen, and those numbers:\n")
    on_test: Callable[[Point, int], bool] = lambda p, i: p.test.mean >= kept["test"][i]  # noqa: E731
    parts.append(_smallest_table(network, lines, said, on_test, reference, network.references))
    for name, line in lines.items():
        wins, sentences = _winners(line, network.sizes), _compared(line)
        if wins or sentences:
            text = "\n".join(f"- {one}" for one in sentences)
            parts.append(f"""
### Who wins: {name}

{markdown_table(wins, list(wins[0])) if wins else "No two methods meet at the sizes of this table."}
Bytes at equal test accuracy, 95 % intervals over seeds:

{text}""")
    steps = _steps(lines)
    if steps:
        text = "\n".join(f"- {one}" for one in steps)
        parts.append(f"\n### What each step beyond rounding saves\n\n{text}\n")
    return "\n".join(parts)


def _about(network: Network) -> str:
    if not network.relative:
        return f"Validation: {network.holdout:,} training images that nothing else saw."
    return (
        f"Validation: {network.holdout:,} training images that are not calibrated or tuned on; the public network was "
        "trained on them, which is why its accuracy is higher there, and there is no other data."
    )


def _level(network: Network, reference: Point, level: float, split: str) -> float:
    return reference.scores[split].mean - level if network.relative else level


def _validation(p: Point) -> float:
    return p.scores["validation"].mean


def _smallest_table(
    network: Network,
    lines: Mapping[str, Sequence[Point]],
    said: Sequence[str],
    good: Callable[[Point, int], bool],
    reference: Point,
    references: Mapping[str, Sequence[int | None]] | None = None,
) -> str:
    rows = []
    for name, line in lines.items():
        for method in dict.fromkeys(p.method for p in line):
            found = [
                min((p for p in line if p.method == method and good(p, i)), key=lambda p: p.bytes, default=None)
                for i in range(len(said))
            ]
            if any(found) and method != "float":
                cells = [_cell_text(p, network, reference) for p in found]
                rows.append({"method": f"{method}, {name}", **dict(zip(said, cells, strict=True))})
    for name, sizes in (references or {}).items():
        cells = [f"{size:,}" if size else "–" for size in sizes]
        rows.append({"method": f"others: {name}", **dict(zip(said, cells, strict=True))})
    return markdown_table(rows, ["method", *said])


def _cell_text(p: Point | None, network: Network, reference: Point) -> str:
    if p is None:
        return "–"
    shown = reference.test.mean - p.test.mean if network.relative else p.test.mean
    return f"{p.bytes:,.0f} ({shown:.2f})"


def _winners(line: Sequence[Point], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """At each size the method that interpolates to the best validation accuracy, and its lead over the baseline."""
    methods = [m for m in dict.fromkeys(p.method for p in line) if m not in ("float", BASELINE)]
    if BASELINE not in {p.method for p in line}:
        return []
    pairs = [(m, BASELINE) for m in methods]
    on = {split: equal_bytes_table(line, pairs, sizes=sizes, split=split) for split in ("validation", "test")}
    rows = []
    for size in sizes:
        rivals = [row for row in on["validation"] if row.bytes == size]
        if not rivals:
            continue
        best = max(rivals, key=lambda row: row.accuracy)
        beaten = best.accuracy > best.accuracy_against
        test = next(r for r in on["test"] if r.bytes == size and r.method == best.method)
        rows.append({
            "bytes": size,
            "best on validation": best.method if beaten else BASELINE,
            "its test accuracy": test.accuracy if beaten else test.accuracy_against,
            "best other": BASELINE if beaten else best.method,
            "difference on test, points": _difference(test, 1 if beaten else -1),
        })  # fmt: skip
    return rows


def _difference(row: EqualBytes, sign: int) -> str:
    bounds = sorted((sign * row.low, sign * row.high))
    said = "one seed" if math.isnan(row.low) else f"{bounds[0]:+.2f} to {bounds[1]:+.2f}"
    return f"{sign * row.difference:+.2f} ({said})"


def _compared(line: Sequence[Point]) -> list[str]:
    methods = [m for m in dict.fromkeys(p.method for p in line) if m not in ("float", BASELINE)]
    if BASELINE not in {p.method for p in line}:
        return []
    return [sentence(found) for found in equal_accuracy_savings(line, [(m, BASELINE) for m in methods])]


def _steps(lines: Mapping[str, Sequence[Point]]) -> list[str]:
    """Each method against itself with less done to it."""
    names = list(lines)
    found = []
    for before, after in ((a, b) for i, b in enumerate(names) for a in names[:i]):
        methods = {p.method for p in lines[before]} & {p.method for p in lines[after]} - {"float"}
        for method in sorted(methods):
            both = [
                replace(p, method=f"{method}, {name}")
                for name in (before, after)
                for p in lines[name]
                if p.method == method
            ]
            found += equal_accuracy_savings(both, [(f"{method}, {after}", f"{method}, {before}")])
    return [sentence(one) for one in found if one.saving is not None]


def draw(network: Network, results: Sequence[Result], path: Path) -> Path:
    """The most that was done to every method without training, a panel for each family."""
    lines = curves(results)
    name = next(n for n in (FEEDBACK, SHIFTED, ROUNDED) if n in lines)
    shown = list(lines[name])
    if name != ROUNDED:
        shown += [p for p in lines.get(ROUNDED, []) if p.method == "float"]
    panels: dict[str, list[str]] = {}
    for p in shown:
        methods = panels.setdefault(p.family, [])
        if p.method not in methods:
            methods.append(p.method)
    return size_accuracy(shown, path, title=f"{network.title}: not trained, {name}", panels=panels)


def write_document(results: Sequence[Result], folder: Path, networks: Sequence[Network] = NETWORKS) -> None:
    """Write `family.md`, `family.csv` and a figure for each network."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {**row, "variation": name, "coder": "smallest"}
        for name in VARIATIONS
        for row in trial_rows([r for r in results if variation(r["cell"]) == name])
    ]
    if rows:
        write_csv(rows, folder / "family.csv", columns=list(rows[0]))
    by_title = network_of(results, networks)
    for network in networks:
        if network.title in by_title:
            draw(network, by_title[network.title], folder / f"family-{network.model}.svg")
    (folder / "family.md").write_text(document(results, networks), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the document of a finished study."""
    parser = argparse.ArgumentParser(description="Write the document of the family study.")
    parser.add_argument("run", type=Path, help="the study's folder, which holds study.db")
    parser.add_argument("folder", type=Path, help="where the document goes")
    given = parser.parse_args(arguments)
    store = StudyStore(open_storage(given.run / "study.db"), given.run.name)
    results = sorted(store.results(), key=lambda record: record["cell_id"])
    store.close()
    write_document(results, given.folder)


if __name__ == "__main__":
    main()
