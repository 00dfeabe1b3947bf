"""The report of a study: one interactive HTML file that opens offline, and the folder that a study leaves.

results ──► points ──► sentences ──► summary.md
              └──────► page (data as JSON, page.html, page.css, *.js) ──► report.html
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bitbook.errors import StudyError
from bitbook.study import tables
from bitbook.study.plots import difference_plot, size_accuracy
from bitbook.study.report.page import page
from bitbook.study.report.sentences import all_savings, headlines, main_group
from bitbook.study.report.summary import summary
from bitbook.study.tables import Point, Result


def write_all(
    results: Iterable[Result], folder: str | Path, *, command: str, versions: Mapping[str, str] | None = None
) -> list[Path]:
    """Write everything a study leaves into `folder` and return the paths.

    trials.csv, points.json, report.html, summary.md, size_accuracy.svg and .png, and where fused methods meet
    their rivals at equal bytes, fused_minus_float.svg and fused_minus_scalar.svg. The pictures are of the
    `main_group`. command: what repeats the study; versions: of what it ran on, by default of this process.
    Raises StudyError if there are no results, MissingDependency without matplotlib.
    """
    results = list(results)
    points = _some_points(results)
    versions = dict(versions or installed_versions())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    savings = all_savings(points)
    sentences = headlines(results, points, savings)

    paths = [folder / name for name in ("trials.csv", "points.json", "report.html")]
    tables.write_csv(tables.trial_rows(results), paths[0])
    tables.write_json([point.to_json() for point in points], paths[1])
    paths[2].write_text(page(points, sentences, command, versions), encoding="utf-8")
    main = tables.grouped(points)[main_group(points)]
    paths += [size_accuracy(main, folder / f"size_accuracy.{ending}") for ending in ("svg", "png")]
    for name, against in (("float", None), ("scalar", "scalar")):
        try:
            paths.append(difference_plot(main, folder / f"fused_minus_{name}.svg", against=against))
        except StudyError as nothing_to_draw:
            sentences.append(f"There is no fused_minus_{name}.svg: {nothing_to_draw}.")
    pictures = [path.name for path in paths if path.suffix == ".svg"]
    document = folder / "summary.md"
    document.write_text(summary(points, sentences, savings, pictures, command, versions), encoding="utf-8")
    return [*paths, document]


def write_report(results: Iterable[Result], path: str | Path, *, command: str, versions: Mapping[str, str]) -> Path:
    """Write the interactive report: one HTML file that needs no network and no other file.

    command: what repeats the study; versions: of what it ran on. Both end up on the page, as text.
    Raises StudyError if there are no results.
    """
    results = list(results)
    points = _some_points(results)
    sentences = headlines(results, points, all_savings(points))
    Path(path).write_text(page(points, sentences, command, versions), encoding="utf-8")
    return Path(path)


def installed_versions() -> dict[str, str]:
    """The versions that results depend on, as installed here."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in ("bitbook", "torch", "numpy", "numba"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _some_points(results: Sequence[Result]) -> list[Point]:
    if not results:
        raise StudyError("there are no results to report: has any trial finished?")
    return tables.points(results)
