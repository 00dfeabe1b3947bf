"""Tables of a study: a row for each trial, a point for each recipe, and methods compared with each other.

    results ──► trial_rows ──► trials.csv
       └──────► points ──► curves, best_under, equal_accuracy_savings, equal_bytes_table ──► report, pictures

A result is what `StudyStore.results` gives: cell_id, cell (`grid.cell`) and result (`trial.run_trial`).
A *point* is a recipe over its training seeds; a *group* is what may be compared: points of one data set, one
held-out part, one start and one training. Accuracies are percent, sizes the bytes of the file.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bitbook.errors import StudyError
from bitbook.study.stats import (
    Difference,
    Interval,
    SavingInterval,
    at_equal_bytes,
    average_saving,
    average_saving_interval,
    mean_interval,
    paired_bootstrap,
    pareto_front,
)
from bitbook.study.storage import canonical_json
from bitbook.study.trial import unpack_correct

Array = np.ndarray
Result = Mapping[str, Any]
Pair = tuple[str, str]
"""Two methods: the one asked about, and the one it is compared with."""

CODER = "fixed"
COLUMNS = (
    "dataset", "model", "family", "recipe", "coder", "seed", "split", "bytes", "accuracy", "seconds",
    "method", "start", "training", "loss", "bits_per_weight", "holdout", "cell",
)  # fmt: skip
"""Columns of the table of trials, in this order."""
_REPEAT = "import json, sys; from bitbook.study.trial import run_trial; print(run_trial(json.loads(sys.argv[1])))"
_FORMATS = {"accuracy": ".4f", "seconds": ".3f", "loss": ".6g", "bits_per_weight": ".5f"}


class Group(NamedTuple):
    """What may be compared: the same data, start and training."""

    dataset: str
    holdout: int
    start: str
    training: str

    def __str__(self) -> str:
        trained = "not trained further" if self.training == "none" else f"then {self.training}"
        held_out = f"{self.holdout:,} held out" if self.holdout else "nothing held out"
        return f"{self.dataset}, start of {self.start}, {trained}, {held_out}"


@dataclass(frozen=True)
class Scores:
    """A point on one split: a value for each of its seeds, in their order."""

    accuracy: tuple[float, ...]
    loss: tuple[float, ...]

    @cached_property
    def interval(self) -> Interval:
        """Mean accuracy with its 95 % interval over seeds (Student's t); NaN bounds for a single seed."""
        return mean_interval(self.accuracy)

    @property
    def mean(self) -> float:
        """Mean accuracy in percent."""
        return fmean(self.accuracy)


@dataclass(frozen=True)
class Point:
    """A recipe over its seeds."""

    group: Group
    model: str
    family: str
    method: str
    """Names the curve."""
    name: str
    """Names the point on the curve."""
    seeds: tuple[int, ...]
    sizes: tuple[int, ...]
    """Bytes of each seed's file: a plan resolved by the data may differ by a few."""
    scores: Mapping[str, Scores]
    """By split; without held-out data there is no "validation"."""
    bits_per_weight: float
    """Of the whole file, mean over seeds; NaN for a model without weights."""
    seconds: float
    """Median over seeds of quantizing, training on and evaluating; not of the shared float start."""
    example: Result
    """The first seed's result."""
    cells: tuple[str, ...]
    diverged: int = 0
    """Seeds whose training ended in NaN; see `trial.run_trial` for what they count as."""
    front: bool = False
    """Whether no point of the group is smaller and better on *validation*; False where there is none."""
    coded_bytes: float | None = None
    """Bytes of the same content entropy-coded, mean over the seeds of which it is known; None where of none."""
    coded_front: bool = False
    """As `front`, by `coded_bytes`, among the points that have them."""

    @property
    def recipe(self) -> str:
        """Names the point on its own."""
        return f"{self.method}, {self.name}"

    @property
    def bytes(self) -> float:
        """Mean over seeds."""
        return fmean(self.sizes)

    @property
    def test(self) -> Scores:
        """The scores on test data."""
        return self.scores["test"]

    @property
    def validation(self) -> Scores | None:
        """The scores on held-out data, if any was."""
        return self.scores.get("validation")

    def on_seed(self, seed: int, split: str) -> tuple[int, float]:
        """Bytes and accuracy of one seed."""
        i = self.seeds.index(seed)
        return self.sizes[i], self.scores[split].accuracy[i]

    def to_json(self) -> dict[str, Any]:
        """The point as plain JSON; NaN stands for an interval that one seed does not have."""
        return {
            **self.group._asdict(),
            "model": self.model,
            "family": self.family,
            "method": self.method,
            "recipe": self.recipe,
            "seeds": list(self.seeds),
            "bytes": {"mean": self.bytes, "min": min(self.sizes), "max": max(self.sizes)},
            "bits_per_weight": self.bits_per_weight,
            **{split: _score_json(score) for split, score in self.scores.items()},
            "seconds": self.seconds,
            "diverged": self.diverged,
            "front": self.front,
            "coded_bytes": self.coded_bytes,
            "coded_front": self.coded_front,
            "cells": list(self.cells),
            "phases": self.example["cell"]["phases"],
        }


def _score_json(score: Scores) -> dict[str, float]:
    mean, low, high = score.interval
    return {
        "accuracy": mean,
        "low": low,
        "high": high,
        "min": min(score.accuracy),
        "max": max(score.accuracy),
        "loss": fmean(score.loss),
    }


# --- rows and files


def trial_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row per trial and split with the keys `COLUMNS`, in the same order for any order of `results`.

    seconds: of quantizing, training on and evaluating, without the float start that trials share.
    """
    results = list(results)
    groups = _groups_of(results)
    rows = [
        {
            "dataset": group.dataset,
            "model": cell["model"],
            "family": cell["family"],
            "recipe": f"{cell['method']}, {cell['recipe']}",
            "coder": CODER,
            "seed": cell["seed"],
            "split": scored["split"],
            "bytes": found["bytes"],
            "accuracy": scored["accuracy"],
            "seconds": _seconds(found),
            "method": cell["method"],
            "start": group.start,
            "training": training_text(cell),
            "loss": scored["loss"],
            "bits_per_weight": _number(found["ledger"]["bits_per_weight"]),
            "holdout": group.holdout,
            "cell": record["cell_id"],
        }
        for record, group in zip(results, groups, strict=True)
        for cell, found in [(record["cell"], record["result"])]
        for scored in found["rows"]
    ]
    order = ("dataset", "holdout", "start", "training", "family", "recipe", "model", "seed", "split", "cell")
    return sorted(rows, key=lambda row: [_natural(row[column]) for column in order])


def write_csv(rows: Iterable[Mapping[str, Any]], path: str | Path, columns: Sequence[str] = COLUMNS) -> None:
    """Write rows as CSV (UTF-8, one header line), by default those of `trial_rows`; equal rows give equal bytes."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([format(row[column], _FORMATS.get(column, "")) for column in columns])


def write_json(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Write rows as a JSON list, one row a line; NaN becomes null."""
    lines = ",\n".join(json.dumps(finite(row), ensure_ascii=False) for row in rows)
    Path(path).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """JSON-able data with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table of these columns: integers with thousands separators, floats with two decimals."""
    body = [[row[column] for column in columns] for row in rows]
    numbers = [all(isinstance(line[i], int | float | None) for line in body) for i in range(len(columns))]
    lines = [list(columns), ["--:" if right and body else "---" for right in numbers]]
    lines += [[markdown_text(value) for value in line] for line in body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_text(value: object) -> str:
    """A value as it stands in a Markdown table, with what Markdown would interpret escaped."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.2f}"
    text = f"{value:,}" if type(value) is int else str(value)
    return re.sub(r"([|\\<>*_`])", r"\\\1", text).replace("\n", " ")


def accuracy_text(score: Scores) -> str:
    """Mean ± half the 95 % interval, in percent: "96.12 ± 0.34"; of a single seed, the value alone."""
    mean, low, _ = score.interval
    return f"{mean:.2f}" if math.isnan(low) else f"{mean:.2f} ± {mean - low:.2f}"


def repeat_command(cell: Mapping[str, Any]) -> str:
    """A shell command that runs a cell again and prints what `run_trial` returns."""
    written = json.dumps(cell, ensure_ascii=False, separators=(",", ":"))
    return f"python -c {shlex.quote(_REPEAT)} {shlex.quote(written)}"


# --- points and curves


def points(results: Iterable[Result]) -> list[Point]:
    """One point per group, model, method and recipe, in that order; which of them are on the front is marked.

    Raises StudyError if two trials of a point have the same seed: their recipes need different names.
    """
    results = list(results)
    members: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for record, group in zip(results, _groups_of(results), strict=True):
        cell = record["cell"]
        members[group, cell["family"], cell["method"], cell["recipe"], cell["model"]].append(record)
    found = [_point(key[0], members[key]) for key in sorted(members, key=_natural)]
    best = [_best(inside, lambda p: p.bytes) for inside in grouped(found).values()]
    coded = [_best(inside, lambda p: p.coded_bytes) for inside in grouped(found).values()]
    fronts = [{id(p) for line in lines for p in line} for lines in (best, coded)]
    return [replace(p, front=id(p) in fronts[0], coded_front=id(p) in fronts[1]) for p in found]


def _best(points: Iterable[Point], size: Callable[[Point], float | None]) -> list[Point]:
    """The points that no other beats in both size and validation accuracy, of those that have both."""
    at = [(p, known, p.validation.mean) for p in points if p.validation and (known := size(p)) is not None]
    return [at[i][0] for i in pareto_front([(known, mean) for _, known, mean in at])] if at else []


def _point(group: Group, records: list[Result]) -> Point:
    records = sorted(records, key=lambda record: record["cell"]["seed"])
    cells, outcomes = [record["cell"] for record in records], [record["result"] for record in records]
    first, seeds = cells[0], tuple(cell["seed"] for cell in cells)
    splits = [{row["split"]: row for row in outcome["rows"]} for outcome in outcomes]
    name = f"{first['method']}, {first['recipe']} ({group})"
    if len(set(seeds)) < len(seeds):
        raise StudyError(
            f"{name} has several trials of one seed: {', '.join(map(str, seeds))}; "
            "give recipes that differ (in plan, fit or regime) different names"
        )
    if any(split.keys() != splits[0].keys() for split in splits):
        raise StudyError(f"the seeds of {name} were evaluated on different splits")
    return Point(
        group=group,
        model=first["model"],
        family=first["family"],
        method=first["method"],
        name=first["recipe"],
        seeds=seeds,
        sizes=tuple(outcome["bytes"] for outcome in outcomes),
        scores={
            split: Scores(
                tuple(rows[split]["accuracy"] for rows in splits),
                tuple(rows[split]["loss"] for rows in splits),
            )
            for split in splits[0]
        },
        bits_per_weight=fmean(_number(outcome["ledger"]["bits_per_weight"]) for outcome in outcomes),
        seconds=median(_seconds(outcome) for outcome in outcomes),
        example=records[0],
        cells=tuple(record["cell_id"] for record in records),
        diverged=sum(outcome.get("diverged", False) for outcome in outcomes),
        coded_bytes=fmean(coded) if (coded := [o["coded_bytes"] for o in outcomes if "coded_bytes" in o]) else None,
    )


def grouped(points: Iterable[Point]) -> dict[Group, list[Point]]:
    """The points of each group, in the order of the points."""
    found: dict[Group, list[Point]] = defaultdict(list)
    for point in points:
        found[point.group].append(point)
    return dict(found)


def curves(points: Iterable[Point]) -> dict[str, list[Point]]:
    """The points of each method by increasing bytes. Raises StudyError for points of several groups."""
    found: dict[str, list[Point]] = defaultdict(list)
    for point in _one_group(points):
        found[point.method].append(point)
    return {method: sorted(line, key=lambda point: point.bytes) for method, line in found.items()}


def front(points: Iterable[Point]) -> list[Point]:
    """The points marked as the front, by increasing bytes. Raises StudyError for points of several groups."""
    return sorted((p for p in _one_group(points) if p.front), key=lambda point: point.bytes)


def best_under(points: Iterable[Point], max_bytes: float) -> Point | None:
    """The best point on validation of which no seed's file exceeds `max_bytes`; None if there is none."""
    fitting = [p for p in points if p.validation is not None and max(p.sizes) <= max_bytes]
    return max(fitting, key=lambda p: (p.scores["validation"].mean, -p.bytes), default=None)


def smallest_within(points: Iterable[Point], accuracy: float) -> Point | None:
    """The smallest point with at least this accuracy on validation; None if there is none."""
    good = [p for p in points if p.validation is not None and p.validation.mean >= accuracy]
    return min(good, key=lambda p: (p.bytes, -p.scores["validation"].mean), default=None)


def float_point(points: Iterable[Point]) -> Point | None:
    """The reference: the network as it is, in float32."""
    return next((p for p in points if p.method == "float" and p.name == "float32"), None)


# --- methods against methods


class MethodSaving(NamedTuple):
    """How many percent of the bytes `method` saves against another at equal accuracy, on average."""

    family: str
    method: str
    against: str
    seeds: int
    saving: SavingInterval | None
    """None: the two share no range of accuracies, or no seed. The bounds are NaN for a single seed."""


class EqualBytes(NamedTuple):
    """Two methods at one size of the file; accuracies and their difference in percent."""

    method: str
    against: str
    seeds: int
    bytes: float
    accuracy: float
    accuracy_against: float
    difference: float
    low: float
    high: float
    """95 % interval of the difference, by bootstrap over seeds; NaN for a single seed."""


def float_centroids(method: str) -> str | None:
    """The method without its centroid format: "rows" for "rows, 4-bit centroids"; None for other methods."""
    head, _, tail = method.rpartition(", ")
    return head if head and tail.endswith(" centroids") else None


def vector_pairs(points: Iterable[Point]) -> list[Pair]:
    """Question (a): each method of the family "vector" against scalar quantization."""
    methods = {p.method: p.family for p in points if p.method != "source"}
    return [(m, "scalar") for m, family in methods.items() if family == "vector" and "scalar" in methods]


def fused_pairs(points: Iterable[Point]) -> list[Pair]:
    """Question (b): each fused method against its own float centroids, half-precision ones, and scalar."""
    methods = {p.method: p.family for p in points if p.method != "source"}
    pairs = []
    for method, family in methods.items():
        base = float_centroids(method)
        if family == "fused" and base is not None:
            same_base = [m for m, kind in methods.items() if kind == "vector" and float_centroids(m) == base]
            pairs += [(method, other) for other in (base, *same_base, "scalar") if other in methods]
    return pairs


def equal_accuracy_savings(
    points: Iterable[Point], pairs: Iterable[Pair], *, split: str = "test", seed: int = 0, repeats: int = 300
) -> list[MethodSaving]:
    """`stats.average_saving` of each pair of methods of one group, by bootstrap over their common seeds.

    Raises StudyError for points of several groups, and for a method that is not among them.
    """
    lines = curves(points)
    found = []
    for method, against in pairs:
        ours, theirs = _common_curves(lines, method, against, split)
        saving = None
        if len(ours) > 1:
            saving = average_saving_interval(theirs, ours, seed=seed, repeats=repeats)
        elif len(ours) == 1:
            single = average_saving(theirs[0], ours[0])
            saving = single and SavingInterval(single, math.nan, math.nan, 0.0)
        found.append(MethodSaving(lines[method][0].family, method, against, len(ours), saving))
    return found


def equal_bytes_table(
    points: Iterable[Point],
    pairs: Iterable[Pair],
    *,
    sizes: Sequence[float] | None = None,
    split: str = "test",
    seed: int = 0,
    repeats: int = 1000,
) -> list[EqualBytes]:
    """Accuracies of each pair of methods of one group at equal bytes, by `stats.at_equal_bytes`.

    sizes: bytes; by default those of the first method's points. Where a method's curve does not reach, there
    is no row. The interval resamples the common seeds, the same for both methods; resamples in which a curve
    does not reach are left out of it. Raises StudyError as `equal_accuracy_savings` does.
    """
    lines = curves(points)
    found = []
    for method, against in pairs:
        ours, theirs = _common_curves(lines, method, against, split)
        if len(ours) == 0:
            continue
        at = np.unique(ours[:, :, 0].mean(axis=0) if sizes is None else np.asarray(sizes, dtype=float))
        a, b = at_equal_bytes(ours.mean(axis=0), theirs.mean(axis=0), at)
        resampled = np.full((repeats if len(ours) > 1 else 0, len(at)), np.nan)
        drawn = np.random.default_rng(seed).integers(len(ours), size=(len(resampled), len(ours)))
        # Few seeds can be drawn in few ways (their order does not matter): each is computed once.
        ways, which = np.unique(np.sort(drawn, axis=1), axis=0, return_inverse=True)
        for i, rows in enumerate(ways):
            again_a, again_b = at_equal_bytes(ours[rows].mean(axis=0), theirs[rows].mean(axis=0), at)
            resampled[which.ravel() == i] = again_a - again_b
        for i in np.flatnonzero(np.isfinite(a) & np.isfinite(b)):
            seen = resampled[:, i][np.isfinite(resampled[:, i])]
            low, high = np.quantile(seen, (0.025, 0.975)) if len(seen) else (math.nan, math.nan)
            values = map(float, (at[i], a[i], b[i], a[i] - b[i], low, high))
            found.append(EqualBytes(method, against, len(ours), *values))
    return found


def paired_difference(results: Iterable[Result], a: Point, b: Point, *, seed: int = 0) -> Difference:
    """Test accuracy of `a` minus that of `b` in percentage points, by paired bootstrap over images and seeds.

    Only seeds that both points have count; raises StudyError if there are none, or for different data sets.
    """
    seeds = sorted(set(a.seeds) & set(b.seeds))
    if a.group.dataset != b.group.dataset or not seeds:
        raise StudyError(
            f"{a.recipe} ({a.group}, seeds {a.seeds}) and {b.recipe} ({b.group}, seeds {b.seeds}) "
            "have no trials in pairs; compare points of one data set with a common seed"
        )
    by_cell = {record["cell_id"]: record["result"] for record in results}
    chosen = [[by_cell[point.cells[point.seeds.index(s)]] for s in seeds] for point in (a, b)]
    images = chosen[0][0]["images"]
    answers_a, answers_b = (
        np.stack([unpack_correct(result["correct"], images) for result in of_point]) for of_point in chosen
    )
    value, low, high, p = paired_bootstrap(answers_a, answers_b, seed=seed)
    return Difference(100 * value, 100 * low, 100 * high, p)


def _common_curves(
    lines: Mapping[str, list[Point]], method: str, against: str, split: str
) -> tuple[Float[Array, "seeds points_a 2"], Float[Array, "seeds points_b 2"]]:
    """(bytes, accuracy) of both methods for the seeds that all their points have, which may be none.

    A point of a single seed among others of several is chance by construction, and is left out.
    """
    for name in (method, against):
        if name not in lines:
            raise StudyError(f"there is no method {name!r} in this group; there are {', '.join(lines)}")
    kept = [[p for p in lines[m] if len(p.seeds) > 1] or lines[m] for m in (method, against)]
    seeds = sorted(set.intersection(*(set(p.seeds) for line in kept for p in line)))
    ours, theirs = (
        np.array([[p.on_seed(seed, split) for p in line] for seed in seeds]).reshape(len(seeds), len(line), 2)
        for line in kept
    )
    return ours, theirs


def _one_group(points: Iterable[Point]) -> list[Point]:
    points = list(points)
    groups = grouped(points)
    if len(groups) > 1:
        raise StudyError(f"points of one group are comparable, these are of: {'; '.join(map(str, groups))}")
    return points


# --- names


def _groups_of(results: Sequence[Result]) -> list[Group]:
    """Each result's group. Starts and trainings are named as briefly as keeps the trials of one recipe apart.

    Methods may be trained at learning rates of their own: that alone does not make them another group.
    """
    cells = [record["cell"] for record in results]
    starts = _name_all(
        [(canonical_json({**cell, "start": None}), [cell["start"]]) for cell in cells],
        (_epochs, _epochs_and_rate, _everything),
    )
    trainings = _name_all(
        [(canonical_json({**cell, "phases": [p["plan"] for p in cell["phases"]]}), _tunes(cell)) for cell in cells],
        (_epochs, _epochs_and_rate, _everything),
    )
    return [
        Group(cell["dataset"], cell["holdout"], start, training)
        for cell, start, training in zip(cells, starts, trainings, strict=True)
    ]


def _tunes(cell: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [phase[how] for phase in cell["phases"] for how in ("tune", "price") if how in phase]


def training_text(cell: Mapping[str, Any]) -> str:
    """How a cell was trained under its plan: "5 epochs, lr 0.001", phase by phase; "none" where it was not."""
    return " + ".join(map(_epochs_and_rate, _tunes(cell))) or "none"


def _name_all(
    settings: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], ways: Sequence[Callable[[Mapping[str, Any]], str]]
) -> list[str]:
    """A name for each (what else is said of the trial, phases): the first way that names no two trials alike."""
    different = {(rest, canonical_json(phases)) for rest, phases in settings}
    names: list[str] = []
    for way in ways:
        names = [" + ".join(map(way, phases)) or "none" for _, phases in settings]
        if len({(rest, name) for (rest, _), name in zip(settings, names, strict=True)}) == len(different):
            break
    return names


def _epochs(training: Mapping[str, Any]) -> str:
    if "file" in training:  # a start that others trained
        return training["file"]
    return f"{training['epochs']} epoch{'s' * (training['epochs'] != 1)}"


def _epochs_and_rate(training: Mapping[str, Any]) -> str:
    if "file" in training:
        return training["file"]
    return f"{_epochs(training)}, lr {training['lr']:g}"


def _everything(training: Mapping[str, Any]) -> str:
    rest = [f"{key} {training[key]}" for key in sorted(training.keys() - {"epochs", "lr"})]
    return ", ".join([_epochs_and_rate(training), *rest])


def _natural(value: Any) -> Any:
    """A sort key in which "5 %" comes before "10 %"."""
    if isinstance(value, tuple):
        return tuple(map(_natural, value))
    parts = re.split(r"([0-9]+)", str(value))  # text and numbers in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _seconds(result: Mapping[str, Any]) -> float:
    return result["seconds"]["fit"] + result["seconds"]["evaluate"]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
