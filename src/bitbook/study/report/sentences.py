"""What the numbers of a study say, in sentences; every number and every verdict in them is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bitbook.study import tables
from bitbook.study.stats import Difference
from bitbook.study.tables import Group, MethodSaving, Point, Result

WITHIN = 1.0
"""Percentage points of validation accuracy that the headlines let a file lose against float32."""
Savings = Mapping[Group, Sequence[MethodSaving]]


def main_group(points: Sequence[Point]) -> Group:
    """The group that pictures and headlines are about: validated, of the longest start and training."""

    def length(group: Group) -> tuple[bool, int, int]:
        cell = next(p for p in points if p.group == group).example["cell"]
        tuned = sum(phase.get("tune", {}).get("epochs", 0) for phase in cell["phases"])
        return group.holdout > 0, cell["start"]["epochs"], tuned

    return max(tables.grouped(points), key=length)


def all_savings(points: Sequence[Point], *, repeats: int = 300) -> dict[Group, list[MethodSaving]]:
    """The savings at equal accuracy that both questions ask for, of each group with validation data."""
    found = {}
    for group, inside in tables.grouped(points).items():
        if group.holdout:
            pairs = [*tables.vector_pairs(inside), *tables.fused_pairs(inside)]
            found[group] = tables.equal_accuracy_savings(inside, pairs, repeats=repeats)
    return found


def headlines(results: Sequence[Result], points: Sequence[Point], savings: Savings) -> list[str]:
    """What the data say, in sentences; every number and every verdict is computed."""
    several = max(len(p.seeds) for p in points)
    sentences = [
        f"{len(results):,} trials: {len({(p.method, p.name, p.model) for p in points})} recipes, up to "
        f"{several} training seed{'s' * (several > 1)} each. ± is a 95 % interval over seeds (Student's t); "
        "recipes are chosen on validation data and reported on test data."
    ]
    main = main_group(points)
    inside = tables.grouped(points)[main]
    reference = tables.float_point(inside)
    if reference is not None and reference.validation is not None:
        sentences.append(
            f"{main}: the float32 file has {_bytes(reference)} bytes and "
            f"{tables.accuracy_text(reference.test)} % test accuracy."
        )
        sentences += _smallest(results, inside, reference.validation.mean - WITHIN)
    for group in savings:
        if group.start == main.start:  # summary.md has tables of the others
            sentences += _savings_in_words(group, savings[group])
    diverged = [p for p in points if p.diverged]
    if diverged:
        named = "; ".join(f"{p.recipe} ({p.group}): {p.diverged} of {len(p.seeds)}" for p in diverged)
        sentences.append(f"Trainings that diverged count as one answer for every input: {named}.")
    return sentences


def _smallest(results: Sequence[Result], points: Sequence[Point], accuracy: float) -> list[str]:
    """The smallest good enough file of each family, and families compared at the size of the scalar one."""
    families = list(dict.fromkeys(p.family for p in points))
    by_family = {family: [p for p in points if p.family == family] for family in families}
    smallest = {family: tables.smallest_within(by_family[family], accuracy) for family in families}
    found = sorted((p for p in smallest.values() if p is not None), key=lambda p: p.bytes)
    listed = "; ".join(f"{p.recipe}: {_bytes(p)} bytes, {tables.accuracy_text(p.test)} %" for p in found)
    missing = [family for family in families if smallest[family] is None]
    sentences = [
        f"Smallest file of each family within {WITHIN:g} point of float32 on validation: {listed or 'none'}."
        + (f" No {' and no '.join(missing)} recipe is within it." if missing else "")
    ]
    scalar = smallest.get("scalar")
    if scalar is None:
        return sentences
    for family in ("vector", "fused", "pruned"):
        rival = tables.best_under(by_family.get(family, []), scalar.bytes)
        if rival is not None and set(rival.seeds) & set(scalar.seeds):
            difference = tables.paired_difference(results, rival, scalar)
            sentences.append(
                f"In no more bytes than {scalar.recipe} ({_bytes(scalar)}), the best {family} recipe is "
                f"{rival.recipe} ({_bytes(rival)} bytes): {_difference(difference)}."
            )
    return sentences


def _difference(difference: Difference) -> str:
    verdict = "better" if difference.low > 0 else "worse" if difference.high < 0 else "not told apart"
    return (
        f"{signed(difference.value, 2)} points of test accuracy [{signed(difference.low, 2)}, "
        f"{signed(difference.high, 2)}], {verdict} (paired bootstrap over test images and seeds, "
        f"p = {difference.p:.2g})"
    )


def _savings_in_words(group: Group, savings: Sequence[MethodSaving]) -> list[str]:
    """Questions (a) and (b) at equal accuracy, a sentence for each kind of rival."""
    kinds: dict[str, list[MethodSaving]] = {}
    for row in savings:
        base = tables.float_centroids(row.method)
        family = "Vector" if row.family == "vector" else "Fused"
        rival = "float32 centroids" if row.against == base else row.against.rpartition(", ")[2]
        kinds.setdefault(f"{family} against {rival}", []).append(row)
    return [f"{kind} at equal test accuracy ({group}): {_verdicts(rows)}." for kind, rows in kinds.items()]


def _verdicts(rows: Sequence[MethodSaving]) -> str:
    met = [(row, row.saving) for row in rows if row.saving is not None]
    if not met:
        return f"none of {_count(len(rows), 'method')} shares a range of accuracies with its rival"
    smaller = sum(saving.low > 0 for _, saving in met)  # NaN, of a single seed, decides nothing
    larger = sum(saving.high < 0 for _, saving in met)
    counted = [(smaller, "smaller"), (larger, "larger"), (len(met) - smaller - larger, "not told apart")]
    said = ", ".join(f"{number} {word}" for number, word in counted if number)
    best, saving = max(met, key=lambda item: item[1].saving.percent)
    percent, low, high = saving.saving
    bounds = sorted((saving.low, saving.high)) if percent > 0 else sorted((-saving.high, -saving.low))
    interval = "" if math.isnan(saving.low) else f" [{_plain(bounds[0])}, {_plain(bounds[1])}]"
    return (
        f"of {_count(len(met), 'method')} with accuracies in common with the rival, {said}; the best, "
        f"{best.method}, needs {_plain(abs(percent))} %{interval} {'fewer' if percent > 0 else 'more'} bytes "
        f"than {best.against}, averaged over accuracies of {low:.1f} to {high:.1f} %"
    )


def _plain(number: float) -> str:
    return f"{number:.1f}".replace("-", "−")


def signed(number: float, digits: int = 1) -> str:
    """A number with its sign, a minus being one."""
    return f"{number:+.{digits}f}".replace("-", "−")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _bytes(point: Point) -> str:
    return f"{point.bytes:,.0f}"


def title(points: Sequence[Point]) -> str:
    """What a report of these points is called."""
    return f"{' and '.join(dict.fromkeys(p.group.dataset for p in points))}: size and accuracy"
