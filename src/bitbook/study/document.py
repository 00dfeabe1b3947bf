"""The experiment's results as a document: tables, figures and the answers to the two questions.

    python -m bitbook.study.document runs/mnist docs/results

Every number and every comparison in words is computed from the study's results; nothing is written by hand.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitbook.errors import StudyError
from bitbook.models import build_model
from bitbook.plan import Plan
from bitbook.quantizer import Quantizer
from bitbook.scalar.leaves import Float
from bitbook.scalar.levels import Binary
from bitbook.scalar.uniform import Uniform
from bitbook.study.grid import GRIDS, study_cells
from bitbook.study.plots import size_accuracy
from bitbook.study.stats import pareto_front
from bitbook.study.storage import StudyStore, cell_id, open_storage
from bitbook.study.tables import (
    Group,
    MethodSaving,
    Point,
    Result,
    accuracy_text,
    equal_accuracy_savings,
    equal_bytes_table,
    float_point,
    front,
    grouped,
    markdown_table,
    points,
    smallest_within,
    training_text,
    trial_rows,
    write_csv,
)
from bitbook.vector.codebook import Codebook

README_BEGIN, README_END = "<!-- answers: begin -->", "<!-- answers: end -->"

FAMILIES = {
    "scalar": "scalar (weights only)",
    "rows": "whole rows, float32 codewords",
    "rows16": "whole rows, 16-bit codewords",
    "columns": "whole columns, float32 codewords",
    "rows-fused": "whole rows, fused (2–8-bit codewords)",
    "vectors": "vectors of 2, 4, 8, float32 codewords",
    "vectors-fused": "vectors of 2, 4, 8, fused (5-bit codewords)",
    "pruned": "pruned + uniform",
    "narrow": "narrower float16 networks",
}
"""Curves of the document: each is the best, on validation, of several methods of the grid."""

QUESTION_A = [
    ("rows", "scalar"), ("columns", "scalar"), ("columns", "rows"), ("vectors", "scalar"), ("vectors", "rows"),
]  # fmt: skip
QUESTION_B = [
    ("rows-fused", "rows"), ("rows-fused", "rows16"), ("rows-fused", "scalar"),
    ("vectors-fused", "vectors"), ("vectors-fused", "scalar"),
]  # fmt: skip
CONTROLS = [("scalar", "narrow"), ("vectors-fused", "narrow"), ("pruned", "scalar")]


def write_document(
    results: Sequence[Result],
    folder: Path,
    *,
    name: str,
    command: str,
    missing: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write `<name>.md`, `<name>.csv` and figures into `folder`; returns the document's path.

    missing: cells of the grid that have no result; the document says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(trial_rows(results), folder / f"{name}.csv")
    everything = points(results)
    groups = {g: ps for g, ps in grouped(everything).items() if any(p.method != "source" for p in ps)}
    source = [p for p in everything if p.method == "source"]
    trained = _trained(groups)
    text = [_head(results, groups, name, command)]
    text += filter(None, [_tuning(folder, name), _missing(missing), _diverged(results)])
    if trained:
        text.append(_answers(groups, trained))
        size_accuracy(groups[trained[0]], folder / f"{name}-size-accuracy.svg")
        text.append(f"![Size and accuracy]({name}-size-accuracy.svg)\n\n*{trained[0]}.*")
    if source:
        text.append(_source(source))
    for group in trained:
        text.append(_trade_off(group, groups[group]))
    for group in groups:
        text.append(_comparisons(group, groups[group]))
    for group in trained:
        text.append(_front_table(group, groups[group]))
    path = folder / f"{name}.md"
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return path


def answers(results: Sequence[Result]) -> str:
    """The answers for the network that was trained longest, then tuned under its plans: for the README."""
    groups = grouped([p for p in points(results) if p.method != "source"])
    main = _trained(groups)[0]
    return _answers({main: groups[main]}, [main]).partition("\n\n")[2]


def _trained(groups: Iterable[Group]) -> list[Group]:
    """The groups that were trained under their plans, the longest float start first."""
    return sorted((g for g in groups if g.training != "none"), key=lambda g: -int(g.start.split()[0]))


def _head(results: Sequence[Result], groups: dict[Group, list[Point]], name: str, command: str) -> str:
    trials, seeds = len(results), sorted({r["cell"]["seed"] for r in results})
    hours = sum(r["seconds"] for r in results) / 3600
    torch = ", ".join(sorted({r["result"]["versions"]["torch"] for r in results}))
    counts = "\n".join(f"- {g}: {len(ps)} recipes, {_seed_count(ps)} seeds" for g, ps in groups.items())
    return f"""# {name}: size and accuracy

Made by `{command}`: {trials:,} trials, seeds {seeds[0]}–{seeds[-1]}, {hours:.1f} hours of one core, torch {torch}.
Every trial is a row per split in [{name}.csv]({name}.csv).

Sizes are lengths of files on disk, header included. Accuracies are those of the file, read back into a fresh model,
in percent, mean ± 95 % interval over training seeds (Student's t). Recipes and fronts are chosen on the held-out
validation part of the training data; the test set is read once per trial. Comparisons between methods take, of each
method, the points on its validation front; their intervals resample seeds (bootstrap).

{counts}"""


def _tuning(folder: Path, name: str) -> str:
    """Where the learning rates come from, if that study's table stands beside the document."""
    table = f"{name}-tuning.csv"
    if not (folder / table).exists():
        return ""
    return (
        "Learning rates of the longer start's tuning, by kind of method, are those with the best validation accuracy "
        f"of a seed that is not used here: [{table}]({table}), made by `bitbook study --dataset {name}-tuning`."
    )


def _missing(cells: Sequence[Mapping[str, Any]]) -> str:
    """Which cells of the grid have not been run, by start."""
    lines = []
    for epochs in sorted({cell["start"]["epochs"] for cell in cells}):
        there = [cell for cell in cells if cell["start"]["epochs"] == epochs]
        methods = ", ".join(sorted({cell["method"] for cell in there}))
        lines.append(f"- start of {epochs} epochs, {len(there):,} trials: {methods}")
    return "\n".join(["Cells of the grid that **have not been run**:", "", *lines]) if lines else ""


def _diverged(results: Sequence[Result]) -> str:
    """Trainings that ended in NaN: how many of each recipe."""
    counts = Counter(
        f"{r['cell']['method']}, {r['cell']['recipe']} (start of {r['cell']['start']['epochs']} epochs)"
        for r in results
        if r["result"].get("diverged")
    )
    said = "; ".join(f"{recipe}: {count}" for recipe, count in sorted(counts.items()))
    return f"Trainings that diverged, counted as one answer for every image: {said}." if said else ""


def _seed_count(ps: Iterable[Point]) -> str:
    counts = {len(p.seeds) for p in ps if len(p.seeds) > 1} or {1}
    return f"{min(counts)}–{max(counts)}" if len(counts) > 1 else str(counts.pop())


# --- the answers


def _answers(groups: dict[Group, list[Point]], trained: Sequence[Group]) -> str:
    questions = (
        ("What is the trade-off between size and accuracy of scalar and of vector quantization?", QUESTION_A),
        ("Does scalar-quantizing the centroids compress further?", QUESTION_B),
    )
    lines = ["## The two questions", ""]
    for letter, (question, pairs) in zip("ab", questions, strict=True):
        lines += [f"**({letter}) {question}**", ""]
        for group in sorted(groups, key=lambda g: (g.start, g.training != "none")):
            said = [sentence(saving) for saving in _savings(groups[group], pairs)]
            if letter == "a" and group in trained:
                said += _smallest_sentences(groups[group])
            if said:
                lines += [f"- *{group}*", *(f"  - {sentence}" for sentence in said)]
        lines.append("")
    return "\n".join(lines).rstrip()


def sentence(found: MethodSaving) -> str:
    """What an interval supports, in words: fewer bytes, more bytes, or no difference."""
    ours, theirs = FAMILIES[found.method], FAMILIES[found.against]
    if found.saving is None:
        return f"{ours} and {theirs} share no range of accuracies"
    (percent, low_accuracy, high_accuracy), low, high, _ = found.saving
    reach = f"between {low_accuracy:.1f} and {high_accuracy:.1f} %"
    if low <= 0 <= high:
        return f"{ours} and {theirs} cannot be told apart {reach}: {percent:+.0f} % bytes ({low:.0f} to {high:.0f} %)"
    if percent > 0:
        bounds = "one seed" if math.isnan(low) else f"{low:.0f} to {high:.0f} %"
        return f"{ours} need {percent:.0f} % ({bounds}) fewer bytes than {theirs} {reach}"
    times, least, most = (1 - value / 100 for value in (percent, high, low))
    bounds = "one seed" if math.isnan(low) else f"{least:.2f} to {most:.2f}"
    return f"{ours} need {times:.2f} ({bounds}) times the bytes of {theirs} {reach}"


def _smallest_sentences(ps: Sequence[Point]) -> list[str]:
    said = []
    for target in (95.0, 97.0, 97.5):
        best = smallest_within(ps, target)
        if best is not None:
            size, test = f"{best.bytes:,.0f} B", accuracy_text(best.test)
            said.append(f"{target:g} % on validation is kept in {size} by {best.recipe} ({test} on test)")
    reference = float_point(ps)
    if reference is not None:
        said.append(f"float32 has {accuracy_text(reference.test)} on test in {reference.bytes:,.0f} B")
    return said


# --- the source material's own configurations


def _source(ps: Sequence[Point]) -> str:
    rows = []
    for p in sorted(ps, key=lambda p: (p.name, p.group.start)):
        rows.append({
            "configuration": p.name,
            "float start": p.group.start,
            "training": training_text(p.example["cell"]),
            "seeds": len(p.seeds),
            "test accuracy": accuracy_text(p.test),
            "range": f"{min(p.test.accuracy):.2f} – {max(p.test.accuracy):.2f}",
            "file, bytes": round(p.bytes),
            "source's count": payload_bytes(p),
        })  # fmt: skip
    baselines = []
    for start in sorted({p.group.start for p in ps}):
        losses = [r["result"]["start_losses"] for p in ps if p.group.start == start for r in [p.example]]
        if losses and losses[0]:
            baselines.append(f"from {losses[0][0]:.3f} to {losses[0][-1]:.3f} over {start}")
    return f"""## The source material's own configurations

All 60,000 training images, nothing held out, so no validation accuracy. `source's count` is the size as the source
material counts it: bits of the codes, or of the codewords, and 32 bits for everything else that is trained; no
indices, scales or header.

{markdown_table(rows, list(rows[0]))}
Loss of the float start (mean of batch means, one seed): {"; ".join(baselines)}.

The source material prints 97.77 % for 4/4 bits and 98.21 % for rows at 10 %. Neither is a clean run: the losses
printed for their warm-ups begin at 0.074 and 0.009, those of a network that was trained before, where a fresh one
begins near 0.46. And 98.21 % cannot come from the printed code: at 10 % the output layer's ten rows become
max(int(10 · 10 / 100), 1) = 1 cluster, all classes share one row of weights, and the prediction does not depend on
the image (`tests/study/test_source_experiment.py` shows it). The rows with the output layer dense say what the method
can do."""


def payload_bytes(point: Point) -> int:
    """The size as the source material counts it: codes or codewords at their width, 32 bits for the rest."""
    cell = point.example["cell"]
    shapes = {n: tuple(p.shape) for n, p in build_model(cell["model"], seed=0).named_parameters()}
    recipes = Plan.from_json(cell["phases"][-1]["plan"]).recipes(shapes)
    bits = sum(_payload_bits(recipes[name], shape) for name, shape in shapes.items())
    return math.ceil(bits / 8)


def _payload_bits(recipe: Quantizer | None, shape: tuple[int, ...]) -> int:
    size = math.prod(shape)
    if isinstance(recipe, Uniform):
        return recipe.bits * size
    if isinstance(recipe, Binary):
        return size
    if isinstance(recipe, Codebook):
        child = recipe.resolve(shape).children(shape)["centroids"]
        return _payload_bits(child.recipe, child.shape)
    if isinstance(recipe, Float):
        return 8 * recipe.torch_dtype.itemsize * size
    assert recipe is None, recipe
    return 32 * size


# --- tables


def _families(ps: Iterable[Point]) -> list[Point]:
    """The points of each document curve that lie on its validation front, with `method` naming the curve."""
    merged: dict[str, list[Point]] = {}
    for p in ps:
        key = _family(p)
        if key is not None and p.validation is not None:
            merged.setdefault(key, []).append(replace(p, method=key, name=p.recipe))
    kept = []
    for line in merged.values():
        at = [(p.bytes, p.validation.mean) for p in line if p.validation is not None]
        kept += [line[i] for i in pareto_front(np.array(at))]
    return kept


def _family(p: Point) -> str | None:
    if p.family == "pruned":
        return "pruned"
    if p.method == "narrower float16":
        return "narrow"
    if p.family == "scalar":
        return None if "inputs" in p.method else "scalar"
    if p.method.startswith("vectors of"):
        return "vectors-fused" if p.family == "fused" else "vectors"
    if p.method.startswith("columns"):
        return "columns"
    if p.method.startswith("rows"):
        if p.family == "fused":
            return "rows-fused"
        return "rows16" if "float16" in p.method else "rows"  # bfloat16 has it in its name, too
    return None


def _savings(ps: Sequence[Point], pairs: Sequence[tuple[str, str]]) -> list[MethodSaving]:
    merged = _families(ps)
    there = {p.method for p in merged}
    return equal_accuracy_savings(merged, [pair for pair in pairs if set(pair) <= there])


def _comparisons(group: Group, ps: Sequence[Point]) -> str:
    pairs = [*QUESTION_A, *QUESTION_B, *CONTROLS]
    rows = []
    for s in _savings(ps, pairs):
        row: dict[str, Any] = {"method": FAMILIES[s.method], "against": FAMILIES[s.against], "seeds": s.seeds}
        if s.saving is None:
            row |= {"bytes saved, %": None, "95 % interval": "", "accuracies": "no common range"}
        else:
            low, high = s.saving.saving.accuracy_low, s.saving.saving.accuracy_high
            row |= {
                "bytes saved, %": s.saving.saving.percent,
                "95 % interval": "" if math.isnan(s.saving.low) else f"{s.saving.low:.1f} to {s.saving.high:.1f}",
                "accuracies": f"{low:.1f} – {high:.1f}",
            }
        rows.append(row)
    merged = _families(ps)
    there = {p.method for p in merged}
    sizes = [12_000, 16_000, 24_000, 32_000, 48_000, 64_000, 96_000, 128_000]
    table = equal_bytes_table(merged, [pair for pair in pairs if set(pair) <= there], sizes=sizes)
    equal = [
        {
            "bytes": round(e.bytes),
            "method": FAMILIES[e.method],
            "accuracy": e.accuracy,
            "against": FAMILIES[e.against],
            "its accuracy": e.accuracy_against,
            "difference": f"{e.difference:+.2f}{_bounds(e.low, e.high)}",
        }
        for e in table
    ]
    parts = [f"## Method against method: {group}"]
    if rows:
        said = "Bytes saved at equal test accuracy, mean over the accuracies that both reach (Bjøntegaard 2001):"
        parts += [said, markdown_table(rows, list(rows[0]))]
    if equal:
        said = "Test accuracy at equal bytes, interpolated along each front; differences with 95 % intervals:"
        parts += [said, markdown_table(equal, list(equal[0]))]
    return "\n\n".join(parts)


def _bounds(low: float, high: float) -> str:
    return "" if math.isnan(low) else f" ({low:+.2f} to {high:+.2f})"


def _trade_off(group: Group, ps: Sequence[Point]) -> str:
    rows = []
    merged = _families(ps)
    for target in (90.0, 95.0, 96.0, 97.0, 97.5, 98.0):
        for key, title in FAMILIES.items():
            best = smallest_within([p for p in merged if p.method == key], target)
            if best is not None:
                rows.append({
                    "validation ≥, %": f"{target:g}",
                    "method": title,
                    "smallest file, bytes": round(best.bytes),
                    "test accuracy": accuracy_text(best.test),
                    "recipe": best.name,
                })  # fmt: skip
    title = f"## The smallest file that keeps an accuracy: {group}"
    return f"{title}\n\n{markdown_table(rows, list(rows[0])) if rows else 'No recipe reaches 90 % on validation.'}"


def _front_table(group: Group, ps: Sequence[Point]) -> str:
    rows = [
        {
            "bytes": round(p.bytes),
            "bits per weight": p.bits_per_weight,
            "validation": accuracy_text(p.scores["validation"]),
            "test": accuracy_text(p.test),
            "recipe": p.recipe,
        }
        for p in front(ps)
    ]
    return f"## The front of all recipes: {group}\n\n{markdown_table(rows, list(rows[0]))}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the document of a finished study."""
    parser = argparse.ArgumentParser(description="Write the document of a finished study.")
    parser.add_argument("run", type=Path, help="the study's folder, which holds study.db")
    parser.add_argument("folder", type=Path, help="where the document goes")
    parser.add_argument("--grid", choices=list(GRIDS), default="mnist")
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--readme", type=Path, default=None, help="a file whose answers are replaced, too")
    parser.add_argument("--study", default=None, help="the study's name in its storage, if not the grid's")
    given = parser.parse_args(arguments)
    store = StudyStore(open_storage(given.run / "study.db"), given.study or given.grid)
    wanted = {cell_id(cell): cell for cell in study_cells(given.grid, given.seeds)}
    results = [record for record in store.results() if record["cell_id"] in wanted]
    store.close()
    done = {record["cell_id"] for record in results}
    missing = [cell for identity, cell in wanted.items() if identity not in done]
    if missing:
        print(f"{len(missing)} of {len(wanted)} cells have no result; the document says which")
    command = "make results" if given.grid == "mnist" else f"bitbook study --dataset {given.grid}"
    print(write_document(results, given.folder, name=given.grid, command=command, missing=missing))
    if given.readme is not None:
        write_between(given.readme, README_BEGIN, README_END, answers(results))


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marker lines of a file; raises `StudyError` where they are missing."""
    whole = path.read_text(encoding="utf-8")
    before, found_begin, rest = whole.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise StudyError(f"{path} lacks the lines {begin!r} and {end!r} between which the answers go")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
