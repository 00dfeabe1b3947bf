"""What a search has found: tables, a picture of its front over the grid's, and the interactive report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from bitbook.plan import Plan
from bitbook.study import tables
from bitbook.study.plots import PALETTE, byte_axis, error_axis, figure
from bitbook.study.report import write_report
from bitbook.study.search.search import Found, finished, hopeless
from bitbook.study.stats import SavingInterval, average_saving_interval
from bitbook.study.tables import Point, accuracy_text

MARGINS = (0.5, 1.0, 2.0, 3.0, 5.0)
"""Margins for which a search without pruning says what the rule would have done."""
COLUMNS = (
    "number", "origin", "bytes", "validation", "halfway", "front", "recipes", "others", "lr", "momentum", "schedule",
    "scales", "pruned", "cell",
)  # fmt: skip


class Findings:
    """A search in numbers."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.pruned = len(found.trials) - len(finished(found.trials))

    @cached_property
    def front(self) -> list[Point]:
        """The front's recipes over their seeds, by bytes."""
        return sorted(tables.points(self.found.results), key=lambda point: point.bytes)

    @cached_property
    def grid(self) -> list[Point]:
        """The grid's recipes that were trained as long, from the same start."""
        return tables.points(self.found.grid)

    @property
    def grid_front(self) -> list[Point]:
        """Those of them that no other beats on validation, by bytes."""
        return sorted((point for point in self.grid if point.front), key=lambda point: point.bytes)

    @cached_property
    def saving(self) -> SavingInterval | None:
        """Percent of bytes that the front saves against the grid's at equal test accuracy; None if they do not meet."""
        fronts = [self.grid_front, self.front]
        shared = set.intersection(*(set(point.seeds) for front in fronts for point in front)) if all(fronts) else set()
        if not shared:
            return None
        curves = [[[point.on_seed(seed, "test") for point in front] for seed in sorted(shared)] for front in fronts]
        return average_saving_interval(curves[0], curves[1], seed=0)  # type: ignore[arg-type]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each trial with the keys `COLUMNS`."""
        front = {record["number"] for record in self.found.front}
        return [
            {
                "number": record["number"],
                "origin": record["cell"]["origin"],
                "bytes": record["result"]["bytes"],
                "validation": "" if "pruned" in record["result"] else record["result"]["objectives"][1],
                "halfway": record["result"].get("checked", {}).get("accuracy", ""),
                "front": int(record["number"] in front),
                "recipes": recipes_text(record["cell"]),
                "others": record["cell"]["parameters"].get("others", ""),
                **{key: record["cell"]["phases"][0]["tune"][key] for key in ("lr", "momentum", "schedule")},
                "scales": record["cell"]["parameters"]["scales"],
                "pruned": record["result"].get("pruned", ""),
                "cell": record["cell_id"],
            }
            for record in self.found.trials
        ]

    def front_rows(self) -> list[dict[str, Any]]:
        """A row for each recipe of the front: bytes and accuracies over the seeds."""
        cells = {f"trial {record['number']}": record["cell"] for record in self.found.front}
        return [
            {
                "trial": point.name.removeprefix("trial "),
                "recipes": recipes_text(cells[point.name]),
                "others": cells[point.name]["parameters"].get("others", ""),
                "training": training_text(cells[point.name]),
                "bytes": round(point.bytes),
                "validation, %": accuracy_text(point.scores["validation"]),
                "test, %": accuracy_text(point.test),
            }
            for point in self.front
        ]

    def sentences(self) -> list[str]:
        """What the numbers say."""
        found, origins = self.found, Counter(record["cell"]["origin"] for record in self.found.trials)
        named = ", ".join(f"{count} from {origin}" for origin, count in origins.items())
        said = [
            f"{len(found.trials)} trials: {named}; the sampler began with {found.known} results of the grid.",
            f"Given up halfway: {self.pruned}; failed: {len(found.failures)}.",
        ]
        if self.saving is not None:
            (percent, low, high), least, most, _ = self.saving
            interval = "" if math.isnan(least) or len(self.front[0].seeds) < 2 else f" ({least:.1f} to {most:.1f} %)"
            said.append(
                f"Between {low:.1f} and {high:.1f} % of test accuracy, the search's front needs {abs(percent):.1f} %"
                f"{interval} {'fewer' if percent > 0 else 'more'} bytes than the grid's, on average."
            )
        elif self.grid:
            said.append("The fronts of search and grid share no range of test accuracies.")
        else:
            said.append("There is no grid of this start and training to compare with.")
        return said

    def rule(self) -> list[dict[str, Any]]:
        """What pruning with each margin would have done to the trials, where none were pruned; else nothing."""
        if self.found.settings.margin is not None:
            return []
        best = {record["number"] for record in self.found.front}
        rows = []
        for margin in MARGINS:
            given_up = [record["number"] for record in self.found.trials if _given_up(record, margin)]
            rows.append({"margin": margin, "given up": len(given_up), "of the front": len(best & set(given_up))})
        return rows

    def to_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        saving = self.saving
        return tables.finite({
            "trials": len(self.found.trials),
            "pruned": self.pruned,
            "failed": len(self.found.failures),
            "known": self.found.known,
            "front": [point.to_json() | {"trial": point.name.removeprefix("trial ")} for point in self.front],
            "grid_front": [point.to_json() for point in self.grid_front],
            "saving": None if saving is None else {**saving.saving._asdict(), "low": saving.low, "high": saving.high},
        })  # fmt: skip


def _given_up(record: Mapping[str, Any], margin: float) -> bool:
    result = record["result"]
    check = {**record["cell"]["check"], "margin": margin}
    return "checked" in result and hopeless(result["bytes"], result["checked"]["accuracy"], check) is not None


def recipes_text(cell: Mapping[str, Any]) -> str:
    """Each matrix with its recipe, "fc1.weight Uniform(4); …"."""
    named = {parameter.removesuffix(" kind") for parameter in cell["parameters"] if parameter.endswith(" kind")}
    weights = Plan.from_json(cell["phases"][0]["plan"]).weights
    return "; ".join(
        f"{name} {recipe!r}" for pattern, recipe in weights.items() for name in named if fnmatchcase(name, pattern)
    )


def training_text(cell: Mapping[str, Any]) -> str:
    """How it was trained under its plan, "lr 0.01, momentum 0.9, cosine, learned scales"."""
    tune = cell["phases"][0]["tune"]
    scales = cell["parameters"]["scales"]
    return f"lr {tune['lr']:g}, momentum {tune['momentum']:g}, {tune['schedule']}, {scales} scales"


def write_search(found: Found, folder: Path, *, command: str, versions: Mapping[str, str]) -> list[Path]:
    """Write search.csv, search.md, search.svg and search.html into `folder`, and return the paths."""
    findings = Findings(found)
    folder.mkdir(parents=True, exist_ok=True)
    table, text, picture, page = (folder / f"search.{ending}" for ending in ("csv", "md", "svg", "html"))
    tables.write_csv(findings.rows(), table, COLUMNS)
    front_plot(findings, picture)
    text.write_text(_document(findings, picture.name, command, versions), encoding="utf-8")
    write_report([*found.grid, *found.results], page, command=command, versions=versions)
    return [table, text, picture, page]


def _document(findings: Findings, picture: str, command: str, versions: Mapping[str, str]) -> str:
    settings, rows = findings.found.settings, findings.front_rows()
    parts = [f"# Search: {settings.dataset}, {settings.model}\n"]
    parts.append("".join(f"- {tables.markdown_text(sentence)}\n" for sentence in findings.sentences()))
    parts.append(f"![Fronts of search and grid]({picture})\n")
    seeds = ", ".join(map(str, findings.front[0].seeds))
    parts.append(f"## Front\n\nChosen on validation data with seed {settings.seed}; trained with seeds {seeds}.\n")
    parts.append(tables.markdown_table(rows, list(rows[0])))
    if rule := findings.rule():
        parts.append("## What pruning would have given up\n")
        parts.append(tables.markdown_table(rule, list(rule[0])))
    parts.append(f"## How\n\n```sh\n{command}\n```\n")
    parts.append(", ".join(f"{name} {number}" for name, number in versions.items()) + "\n")
    return "\n".join(parts)


def front_plot(findings: Findings, path: Path) -> Path:
    """Draw every trial on validation data, and the fronts of search and grid on test data."""
    every, fronts = "validation: every trial", "test: fronts, 95 % intervals"
    settings = findings.found.settings
    title = f"Search, {settings.dataset}, {settings.model}"
    with figure(path, {every: ["validation"], fronts: ["test"]}, title) as axes:
        left, right = axes.values()
        results = [record["result"] for record in findings.found.trials]
        done = [result["objectives"] for result in results if "pruned" not in result]
        pruned = [
            (result["bytes"], result["checked"]["accuracy"])
            for result in results
            if "pruned" in result and "checked" in result
        ]
        known = [(point.bytes, point.scores["validation"].mean) for point in findings.grid]
        _dots(left, known, ".", "#b0b0b0", "grid")
        _dots(left, done, "o", PALETTE[0], "search")
        _dots(left, pruned, "x", PALETTE[1], "search, given up halfway")
        _front(right, findings.grid_front, "#8a8a8a", "s", "front of the grid")
        _front(right, findings.front, PALETTE[0], "o", "front of the search")
        tests = [point.test.mean for point in (*findings.grid_front, *findings.front)]
        byte_axis(left, [size for size, _ in (*done, *pruned)] + [point.bytes for point in findings.grid_front])
        error_axis(left, [*tests, *(accuracy for _, accuracy in done)])
        left.set_ylabel("accuracy, %")
        for ax in (left, right):
            ax.legend(loc="lower right", fontsize=6.5)
    return path


def _dots(ax: Any, points: Sequence[Sequence[float]], marker: str, color: str, label: str) -> None:
    if points:
        sizes, accuracies = zip(*points, strict=True)
        ax.plot(sizes, accuracies, marker, color=color, ms=3.5, alpha=0.8, label=label)


def _front(ax: Any, points: Sequence[Point], color: str, marker: str, label: str) -> None:
    if points:
        intervals = [point.test.interval for point in points]
        half = [0.0 if math.isnan(i.low) else i.mean - i.low for i in intervals]
        up = [min(h, max(0.0, 99.9 - i.mean)) for h, i in zip(half, intervals, strict=True)]  # the axis ends at 100 %
        ax.errorbar(
            [point.bytes for point in points], [i.mean for i in intervals], yerr=[half, up], color=color,
            marker=marker, elinewidth=0.8, capsize=1.5, ms=4, label=label,
        )  # fmt: skip
