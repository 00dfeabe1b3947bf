"""The page: a study's points as JSON, and the template, style and scripts that draw them.

The scripts are files of this folder, joined in the order of `SCRIPTS` into one: each uses only what stands before.
"""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from bitbook.study import tables
from bitbook.study.plots import PALETTE, panelled
from bitbook.study.report.sentences import main_group, title
from bitbook.study.tables import Point

SCRIPTS = ("data.js", "chart.js", "table.js", "point.js", "page.js")
SHAPES = 10
"""Markers that chart.js knows."""


def page(points: Sequence[Point], sentences: Sequence[str], command: str, versions: Mapping[str, str]) -> str:
    """The whole HTML file; what the arguments say ends up in it as text, never as markup."""
    return Template(read("page.html")).substitute(
        title=html.escape(title(points)),
        style=read("page.css"),
        sentences="".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences),
        command=html.escape(command),
        versions=", ".join(f"{html.escape(name)} {html.escape(str(number))}" for name, number in versions.items()),
        data=_json(page_data(points)),
        sketches=_json(sketches(points)),
        script="".join(map(read, SCRIPTS)),
    )


def read(name: str) -> str:
    """A file of this folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that no browser mistakes for the end of its script element, or for a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(points: Sequence[Point]) -> dict[str, Any]:
    """What the page shows at once. Equal ledgers are kept once, and the words in them too: there are many points."""
    groups = list(tables.grouped(points))
    methods = _methods(points)
    numbers = {method["name"]: i for i, method in enumerate(methods)}
    words: dict[str, int] = {}
    ledgers: dict[str, int] = {}
    shown = []
    for point in points:
        rows = [
            [
                *(words.setdefault(row[key], len(words)) for key in ("tensor", "part", "recipe")),
                row["shape"],
                row["bytes"],
                row["weights"],
            ]
            for row in point.example["result"]["ledger"]["rows"]
        ]
        ledger = ledgers.setdefault(json.dumps(rows), len(ledgers))
        cell = point.example["cell"]
        shown.append({
            "group": groups.index(point.group),
            "method": numbers[point.method],
            "name": point.name,
            "family": point.family,
            "model": point.model,
            "seeds": list(point.seeds),
            "bytes": [min(point.sizes), round(point.bytes, 1), max(point.sizes)],
            "coded": point.coded_bytes,
            "bits": round(point.bits_per_weight, 4),
            "test": _accuracies(point.test),
            "validation": point.validation and _accuracies(point.validation),
            "loss": round(sum(point.test.loss) / len(point.test.loss), 5),
            "seconds": round(point.seconds, 3),
            "front": [point.front, point.coded_front],
            "diverged": point.diverged,
            "ledger": ledger,
            "training": tables.training_text(cell),
            "id": point.cells[0],
            "cell": shlex.quote(json.dumps(cell, ensure_ascii=False, separators=(",", ":"))),
        })  # fmt: skip
    return tables.finite({
        "groups": [{**group._asdict(), "title": str(group)} for group in groups],
        "main": groups.index(main_group(points)),
        "methods": methods,
        "points": shown,
        "words": list(words),
        "ledgers": [json.loads(ledger) for ledger in ledgers],
        "command": tables.repeat_command({}).removesuffix(shlex.quote("{}")),
    })  # fmt: skip


def sketches(points: Sequence[Point]) -> dict[str, Any]:
    """What the page shows of a point's weights once it is opened (see `study.sketch`), equal pictures kept once."""
    pictures: dict[str, int] = {}

    def number(picture: str) -> int:
        return pictures.setdefault(picture, len(pictures))

    found = []
    for point in points:
        matrices = []
        for drawn in point.example["result"].get("sketch", ()):
            kept = dict(drawn)
            if "rows" in kept:
                kept["rows"] = {when: number(picture) for when, picture in kept["rows"].items()}
            if "codewords" in kept:
                kept["codewords"] = {**kept["codewords"], "picture": number(kept["codewords"]["picture"])}
            matrices.append(kept)
        found.append(matrices)
    return {"points": found, "pictures": list(pictures)}


def _methods(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Every method with its panel, colour and marker, the same in all groups."""
    numbered = [(name, i, method) for name, methods in panelled(points).items() for i, method in enumerate(methods)]
    return [
        {"name": method, "panel": name, "color": PALETTE[i % len(PALETTE)], "shape": i % SHAPES}
        for name, i, method in numbered
    ]


def _accuracies(score: tables.Scores) -> list[float]:
    """Mean, interval and range; NaN where there is no interval."""
    return [round(v, 4) for v in (*score.interval, min(score.accuracy), max(score.accuracy))]
