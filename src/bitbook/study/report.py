"""The report of a study: one interactive HTML file that opens offline, and the folder that a study leaves.

A study's results become points; the page carries them as JSON, from which its script draws curves, table and
ledgers. The same points give the sentences and tables of summary.md.
"""

from __future__ import annotations

import html
import json
import math
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bitbook.errors import StudyError, optional_import
from bitbook.study import tables
from bitbook.study.plots import PALETTE, difference_plot, panelled, size_accuracy
from bitbook.study.stats import Difference
from bitbook.study.tables import Group, MethodSaving, Point, Result

WITHIN = 1.0
"""Percentage points of validation accuracy that the headlines let a file lose against float32."""
Savings = Mapping[Group, Sequence[MethodSaving]]
_SYMBOLS = (
    "circle", "square", "diamond", "triangle-up", "triangle-down", "x", "cross", "star", "hexagon", "bowtie",
)  # fmt: skip


def write_all(
    results: Iterable[Result], folder: str | Path, *, command: str, versions: Mapping[str, str] | None = None
) -> list[Path]:
    """Write everything a study leaves into `folder` and return the paths.

    trials.csv, points.json, report.html, summary.md, size_accuracy.svg and .png, and where fused methods meet
    their rivals at equal bytes, fused_minus_float.svg and fused_minus_scalar.svg. The pictures are of the
    `main_group`. command: what repeats the study; versions: of what it ran on, by default of this process.
    Raises StudyError if there are no results.
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
    paths[2].write_text(_page(points, sentences, command, versions), encoding="utf-8")
    main = tables.grouped(points)[main_group(points)]
    paths += [size_accuracy(main, folder / f"size_accuracy.{ending}") for ending in ("svg", "png")]
    for name, against in (("float", None), ("scalar", "scalar")):
        try:
            paths.append(difference_plot(main, folder / f"fused_minus_{name}.svg", against=against))
        except StudyError as nothing_to_draw:
            sentences.append(f"There is no fused_minus_{name}.svg: {nothing_to_draw}.")
    pictures = [path.name for path in paths if path.suffix == ".svg"]
    summary = folder / "summary.md"
    summary.write_text(_summary(points, sentences, savings, pictures, command, versions), encoding="utf-8")
    return [*paths, summary]


def write_report(results: Iterable[Result], path: str | Path, *, command: str, versions: Mapping[str, str]) -> Path:
    """Write the interactive report: one HTML file of about 5 MB that needs no network.

    command: what repeats the study; versions: of what it ran on. Both end up on the page, as text.
    Raises StudyError if there are no results, MissingDependency without plotly.
    """
    results = list(results)
    points = _some_points(results)
    sentences = headlines(results, points, all_savings(points))
    Path(path).write_text(_page(points, sentences, command, versions), encoding="utf-8")
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


# --- what the numbers say


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
        f"{_signed(difference.value, 2)} points of test accuracy [{_signed(difference.low, 2)}, "
        f"{_signed(difference.high, 2)}], {verdict} (paired bootstrap over test images and seeds, "
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


def _signed(number: float, digits: int = 1) -> str:
    return f"{number:+.{digits}f}".replace("-", "−")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _bytes(point: Point) -> str:
    return f"{point.bytes:,.0f}"


def _some_points(results: Sequence[Result]) -> list[Point]:
    if not results:
        raise StudyError("there are no results to report: has any trial finished?")
    return tables.points(results)


# --- summary.md


def _summary(
    points: Sequence[Point],
    sentences: Sequence[str],
    savings: Savings,
    pictures: Sequence[str],
    command: str,
    versions: Mapping[str, str],
) -> str:
    text = tables.markdown_text
    parts = [f"# {text(_title(points))}\n", "".join(f"- {text(sentence)}\n" for sentence in sentences)]
    parts += [f"![{text(picture)}]({picture})\n" for picture in pictures]
    for group, inside in tables.grouped(points).items():
        best = tables.front(inside)
        if best:
            parts.append(f"## Front: {text(str(group))}\n")
            parts.append("No other recipe is both smaller and better on validation data.\n")
            parts.append(_point_table(best))
    for group, rows in savings.items():
        if rows:
            parts.append(f"## Bytes saved at equal test accuracy: {text(str(group))}\n")
            parts.append(_savings_table(rows))
    source = [p for p in points if p.method == "source"]
    if source:
        parts.append("## The source material's own configurations\n")
        parts.append(_source_table(source))
    parts.append("## How\n")
    parts.append(f"```sh\n{command}\n```\n")
    parts.append(", ".join(f"{text(name)} {text(number)}" for name, number in versions.items()) + "\n")
    parts.append(
        "`trials.csv` has a row for each trial and split, `points.json` one for each recipe, `report.html` "
        "every ledger and the command that repeats a trial. Intervals of savings are bootstraps over seeds, "
        "which with few seeds are somewhat too narrow; none is corrected for the number of comparisons.\n"
    )
    return "\n".join(parts)


def _point_table(points: Sequence[Point]) -> str:
    rows = [
        {
            "recipe": p.recipe,
            "bytes": round(p.bytes),
            "bits per weight": p.bits_per_weight,
            "validation, %": "" if p.validation is None else tables.accuracy_text(p.validation),
            "test, %": tables.accuracy_text(p.test),
            "test loss": sum(p.test.loss) / len(p.test.loss),
            "seeds": len(p.seeds),
        }
        for p in points
    ]
    return tables.markdown_table(rows, list(rows[0]))


def _savings_table(savings: Sequence[MethodSaving]) -> str:
    rows = []
    for row in savings:
        found = row.saving
        interval = "" if found is None or math.isnan(found.low) else f"{found.low:+.1f} to {found.high:+.1f}"
        rows.append({
            "method": row.method,
            "against": row.against,
            "saved, %": "" if found is None else _signed(found.saving.percent),
            "95 % interval": interval.replace("-", "−"),
            "over accuracies, %": "none shared" if found is None
            else f"{found.saving.accuracy_low:.1f} to {found.saving.accuracy_high:.1f}",
            "seeds": row.seeds,
        })  # fmt: skip
    return tables.markdown_table(rows, list(rows[0]))


def _source_table(points: Sequence[Point]) -> str:
    rows = [
        {
            "configuration": p.name,
            "start": p.group.start,
            "training": p.group.training,
            "bytes": round(p.bytes),
            "test, %": tables.accuracy_text(p.test),
            "range": f"{min(p.test.accuracy):.2f} to {max(p.test.accuracy):.2f}",
            "seeds": len(p.seeds),
        }
        for p in points
    ]
    return tables.markdown_table(rows, list(rows[0]))


def _title(points: Sequence[Point]) -> str:
    return f"{' and '.join(dict.fromkeys(p.group.dataset for p in points))}: size and accuracy"


# --- the page


def _page(points: Sequence[Point], sentences: Sequence[str], command: str, versions: Mapping[str, str]) -> str:
    plotly = optional_import("plotly.offline", "study").get_plotlyjs().replace("</script", r"<\/script")
    data = json.dumps(_page_data(points), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    listed = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    numbers = ", ".join(f"{html.escape(name)} {html.escape(str(v))}" for name, v in versions.items())
    title = html.escape(_title(points))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{_CSS}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<main>
<details class="headlines" open><summary>What the data say</summary><ul>{listed}</ul></details>
{_CONTROLS}
<footer>
<h2>How</h2>
<p>This command repeats the study; that of a single trial stands with its ledger.</p>
<pre>{html.escape(command)}</pre>
<p>{numbers}</p>
</footer>
</main>
<dialog id="detail"></dialog>
<noscript><p>The curves and the table need JavaScript; the same numbers are in points.json.</p></noscript>
<script type="application/json" id="data">{_script_safe(data)}</script>
<script>{plotly}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _script_safe(text: str) -> str:
    """JSON that no browser mistakes for the end of its script element, or for a comment."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _page_data(points: Sequence[Point]) -> dict[str, Any]:
    """What the page draws. Equal ledgers are kept once, and the words in them too: there are many points."""
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
            "bits": round(point.bits_per_weight, 4),
            "test": _accuracies(point.test),
            "validation": point.validation and _accuracies(point.validation),
            "loss": round(sum(point.test.loss) / len(point.test.loss), 5),
            "seconds": round(point.seconds, 3),
            "front": point.front,
            "diverged": point.diverged,
            "ledger": ledger,
            "training": tables.training_text(cell),
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


def _methods(points: Sequence[Point]) -> list[dict[str, str]]:
    """Every method with its panel, colour and marker, the same in all groups."""
    numbered = [(name, method) for name, methods in panelled(points).items() for method in methods]
    return [
        {
            "name": method,
            "panel": name,
            "color": PALETTE[i % len(PALETTE)],
            "symbol": _SYMBOLS[i % len(_SYMBOLS)],
        }
        for i, (name, method) in enumerate(numbered)
    ]


def _accuracies(score: tables.Scores) -> list[float]:
    """Mean, interval and range; NaN where there is no interval."""
    return [round(v, 4) for v in (*score.interval, min(score.accuracy), max(score.accuracy))]


_CONTROLS = """<section id="plot">
<form id="controls">
<label>Start and training <select id="group"></select></label>
<label><input type="checkbox" id="front" checked> Pareto front</label>
<label><input type="checkbox" id="only"> only its points</label>
<label><input type="checkbox" id="stretch" checked> stretch high accuracies</label>
<fieldset id="panels"><legend>Show</legend></fieldset>
</form>
<div id="curves" role="img" aria-label="Test accuracy over bytes; the table below has the same numbers"></div>
<p class="note">Error bars: 95 % interval over training seeds. Front: chosen on validation data. Click a point
for its ledger, a name in the legend to hide its curve (twice: all others).</p>
</section>
<section id="points">
<h2>All points</h2>
<form id="filter"><label>Filter <input type="search" id="text" placeholder="rows 4-bit"></label>
<label><input type="checkbox" id="here"> of the picture</label> <output id="count"></output></form>
<div class="wide"><table id="table"><thead></thead><tbody></tbody></table></div>
</section>"""

_CSS = """
:root { color-scheme: light; --line: #d8dce2; --soft: #f4f6f8; --ink: #1c2430; --blue: #0072b2 }
* { box-sizing: border-box }
body { margin: 0; color: var(--ink); background: #fff; font: 15px/1.45 system-ui, sans-serif }
header, main { max-width: 1440px; margin: auto; padding: 0 16px }
h1 { font-size: 1.5rem; margin: 18px 0 8px } h2 { font-size: 1.15rem; margin: 26px 0 8px }
summary { cursor: pointer; font-weight: 600 } .headlines { background: var(--soft); padding: 8px 14px }
.headlines ul { margin: 6px 0; padding-left: 18px; max-height: 22em; overflow: auto } li { margin: 3px 0 }
label { max-width: 100% }
form { display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: center; margin: 14px 0 4px }
select, input[type=search] { font: inherit; padding: 4px 6px; max-width: 100%; border: 1px solid #9aa3ad }
fieldset { border: 0; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: 4px 14px }
legend { float: left; padding: 0 10px 0 0 }
.note, output { color: #566; font-size: .9em } #curves { width: 100%; height: 560px }
.wide { overflow: auto; max-height: 75vh; border: 1px solid var(--line) }
table { border-collapse: collapse; width: 100%; font-size: 13.5px }
th, td { padding: 4px 8px; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap }
th { position: sticky; top: 0; background: var(--soft) } td.n, th.n { text-align: right }
td.n { font-variant-numeric: tabular-nums } th button { all: unset; cursor: pointer; font-weight: 600 }
th button:focus-visible, tbody tr:focus-visible { outline: 2px solid var(--blue); outline-offset: -2px }
#table tbody tr { cursor: pointer } #table tbody tr:hover { background: #eaf3fa } tr.best { font-weight: 600 }
.dot { display: inline-block; width: .7em; height: .7em; margin-right: 6px }
pre { background: var(--soft); padding: 8px 10px; white-space: pre-wrap; overflow-wrap: anywhere;
 user-select: all; font-size: 12.5px }
dialog { width: min(860px, 96vw); max-height: 90vh; border: 1px solid #9aa3ad; padding: 14px 18px }
dialog::backdrop { background: rgb(20 30 40 / .35) } dialog h2 { margin-top: 0; padding-right: 90px }
dialog .close { position: absolute; right: 16px; top: 14px; font: inherit; padding: 3px 12px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0 0 12px } dd { margin: 0 }
.bar { display: block; height: 9px; background: var(--blue); min-width: 1px } tr.sum td { font-weight: 600 }
@media (max-width: 700px) { body { font-size: 14px } header, main { padding: 0 10px }
 #curves { height: 760px }
 td:first-child { white-space: normal; min-width: 10em } dl { grid-template-columns: 1fr } dt { font-weight: 600 } }
@media print { form, .note, dialog, .modebar { display: none !important }
 .wide, .headlines ul { max-height: none; overflow: visible } table { font-size: 8px } th { position: static }
 td, th { padding: 1px 3px; white-space: normal } tr { break-inside: avoid }
 thead { display: table-header-group } }
"""

_SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = id => document.getElementById(id);
const whole = number => Math.round(number).toLocaleString("en");
const same = (a, b) => whole(a) === whole(b) ? whole(a) : whole(a) + "–" + whole(b);

function element(tag, content, attributes = {}) {     // text only ever becomes text, never markup
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...[content].flat().map(part => part instanceof Node ? part : String(part)));
  return node;
}

function escaped(text) {                               // for plotly, which reads some HTML in its texts
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function accuracy(score) {
  if (!score) return "";
  const [mean, low] = score;
  return mean.toFixed(2) + (low === null ? "" : " ± " + (mean - low).toFixed(2));
}

const points = data.points.map((point, index) => {
  const method = data.methods[point.method], group = data.groups[point.group];
  const recipe = method.name + ", " + point.name;
  const words = [recipe, point.family, point.model, group.dataset, group.start, point.training].join(" ");
  return {...point, index, method, group, groupIndex: point.group, methodIndex: point.method, recipe,
          words: words.toLowerCase()};
});

// --- the picture

const LEAST = 0.05;                                    // percent of error that stands for none
const TICKS = [0, 50, 70, 80, 90, 92, 95, 96, 97, 98, 99, 99.5, 99.8];
const stretched = value => -Math.log10(Math.max(100 - value, LEAST));

const range = score => "range " + score[3].toFixed(2) + "–" + score[4].toFixed(2);

function hover(point) {
  const lines = ["<b>" + escaped(point.recipe) + "</b>",
    same(point.bytes[0], point.bytes[2]) + " bytes, " + point.bits.toFixed(2) + " bits per weight",
    "test " + accuracy(point.test) + " %, " + range(point.test)];
  if (point.validation) lines.push("validation " + accuracy(point.validation) + " %");
  lines.push(point.seeds.length + (point.seeds.length > 1 ? " seeds" : " seed") + ", " + escaped(point.model),
             "<i>click: ledger, and the command that repeats it</i>");
  return lines.join("<br>");
}

function draw() {
  const chosen = Number(find("group").value), scale = find("stretch").checked ? stretched : value => value;
  const panels = new Set([...document.querySelectorAll("#panels input:checked")].map(box => box.value));
  const here = points.filter(point => point.groupIndex === chosen);
  const shown = here.filter(p => panels.has(p.method.panel) && (p.front || !find("only").checked));
  const narrow = window.innerWidth < 700;
  const trace = (members, rest) => ({
    type: "scatter", x: members.map(p => p.bytes[1]), y: members.map(p => scale(p.test[0])),
    customdata: members.map(p => p.index), text: members.map(hover), hoverinfo: "text", ...rest});
  const traces = [];
  if (find("front").checked) {
    const best = here.filter(point => point.front).sort((a, b) => a.bytes[1] - b.bytes[1]);
    const rest = {name: "Pareto front", uid: "front", mode: "lines", line: {color: "#c4c4c4", width: 7}};
    if (best.length) traces.push(trace(best, {...rest, hoverinfo: "skip"}));
  }
  data.methods.forEach((method, index) => {
    const members = shown.filter(p => p.methodIndex === index).sort((a, b) => a.bytes[1] - b.bytes[1]);
    if (!members.length) return;
    const reach = (p, bound) =>
      p.test[bound] === null ? 0 : Math.abs(scale(p.test[bound]) - scale(p.test[0]));
    traces.push(trace(members, {
      name: escaped(method.name), uid: "method" + index, legendgroup: method.panel,
      legendgrouptitle: {text: escaped(method.panel)},
      mode: method.panel === "source" ? "markers" : "lines+markers",
      line: {color: method.color, width: 1.6},
      marker: {color: method.color, symbol: method.symbol, size: 9, line: {color: "#fff", width: 1}},
      error_y: {type: "data", symmetric: false, array: members.map(p => reach(p, 2)),
                arrayminus: members.map(p => reach(p, 1)), thickness: 1, width: 2}}));
  });
  const means = here.map(point => point.test[0]);
  const low = Math.max(0, 100 - 1.3 * Math.max(2 * LEAST, 100 - Math.min(...means)));
  const high = 100 - Math.max(LEAST, 0.7 * (100 - Math.max(...means)));
  const yaxis = {title: {text: "test accuracy, %"}, range: [scale(low), scale(high)], gridcolor: "#e6e6e6",
                 zeroline: false};
  if (find("stretch").checked) {
    yaxis.tickvals = TICKS.map(stretched);
    yaxis.ticktext = TICKS.map(String);
  }
  const reference = here.find(p => p.method.name === "float" && p.name === "float32");
  const level = reference && scale(reference.test[0]);
  const layout = {
    margin: {l: 56, r: 10, t: 32, b: 50}, hovermode: "closest", yaxis, uirevision: "kept",
    hoverlabel: {bgcolor: "#fff", bordercolor: "#9aa3ad", font: {color: "#1c2430", size: 12}, align: "left"},
    xaxis: {type: "log", title: {text: "bytes of the file"}, gridcolor: "#e6e6e6", dtick: "D2",
            tickformat: ",d"},
    legend: {groupclick: "toggleitem", tracegroupgap: 4, font: {size: 11},
             ...(narrow ? {orientation: "h", y: -0.2} : {})},
    shapes: reference ? [{type: "line", xref: "paper", x0: 0, x1: 1, y0: level, y1: level,
                          line: {color: "#8a8a8a", width: 1, dash: "dash"}}] : [],
    annotations: reference ? [{xref: "paper", x: 0, xanchor: "left", y: level, yanchor: "bottom",
                               text: "float32", showarrow: false, font: {size: 11, color: "#666"}}] : []};
  Plotly.react(find("curves"), traces, layout, {responsive: true, displaylogo: false,
    toImageButtonOptions: {format: "svg", filename: "size_accuracy"}});
  if (find("here").checked) list();
}

// --- the table

const dot = p => element("span", "", {class: "dot", style: "background:" + p.method.color});
const COLUMNS = [                                      // name, what is sorted, what is shown if not the same
  ["recipe", p => p.recipe, p => [dot(p), p.recipe]],
  ["bytes", p => p.bytes[1], p => same(p.bytes[0], p.bytes[2])],
  ["bits per weight", p => p.bits, p => p.bits === null ? "" : p.bits.toFixed(2)],
  ["test, %", p => p.test[0], p => accuracy(p.test)],
  ["validation, %", p => p.validation ? p.validation[0] : -1, p => accuracy(p.validation)],
  ["test loss", p => p.loss, p => p.loss === null ? "" : p.loss.toFixed(4)],
  ["seeds", p => p.seeds.length, p => p.seeds.length],
  ["front", p => p.front ? 1 : 0, p => p.front ? "yes" : ""],
  ["start", p => p.group.start],
  ["training", p => p.training],
  ["held out", p => p.group.holdout],
  ["model", p => p.model],
  ["data", p => p.group.dataset],
  ["seconds", p => p.seconds, p => p.seconds.toFixed(2)],
];
const numeric = COLUMNS.map(([, key]) => points.every(p => key(p) === null || typeof key(p) === "number"));
const collator = new Intl.Collator("en", {numeric: true});
let sorted = {column: 1, down: false};

function list() {
  const wanted = find("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = Number(find("group").value), key = COLUMNS[sorted.column][1];
  const kept = points.filter(p => wanted.every(word => p.words.includes(word))
                               && (!find("here").checked || p.groupIndex === chosen));
  kept.sort((a, b) => (numeric[sorted.column] ? key(a) - key(b) : collator.compare(key(a), key(b)))
                      * (sorted.down ? -1 : 1) || a.index - b.index);
  find("count").textContent = whole(kept.length) + " of " + whole(points.length) + " points";
  find("table").tHead.replaceChildren(element("tr", COLUMNS.map(([name], i) => {
    const arrow = i === sorted.column ? (sorted.down ? " ▼" : " ▲") : "";
    const button = element("button", name + arrow, {type: "button"});
    button.onclick = () => { sorted = {column: i, down: i === sorted.column && !sorted.down}; list(); };
    const order = i === sorted.column ? {"aria-sort": sorted.down ? "descending" : "ascending"} : {};
    return element("th", button, {scope: "col", class: numeric[i] ? "n" : "", ...order});
  })));
  find("table").tBodies[0].replaceChildren(...kept.map(point => {
    const cells = COLUMNS.map(([, key, show = key], i) =>
      element("td", show(point), {class: numeric[i] ? "n" : ""}));
    const row = element("tr", cells, {tabindex: 0, class: point.front ? "best" : ""});
    row.onclick = () => visit(point);
    row.onkeydown = event => { if (event.key === "Enter") row.onclick(); };
    return row;
  }));
}

// --- a point's ledger

function ledger(point) {
  const {words} = data;
  const rows = data.ledgers[point.ledger].map(([tensor, part, recipe, shape, bytes, weights]) =>
    ({tensor: words[tensor], part: words[part], recipe: words[recipe], shape, bytes, weights}));
  const sum = (members, key) => members.reduce((total, row) => total + row[key], 0);
  const total = sum(rows, "bytes"), largest = Math.max(...rows.map(row => row.bytes), 1);
  const bar = part => element("span", "", {class: "bar", style: "width:" + 90 * part + "px"});
  const line = (names, bytes, weights, kind) => element("tr", [
    ...names.map(name => element("td", name)),
    element("td", whole(bytes), {class: "n"}),
    element("td", weights ? (8 * bytes / weights).toFixed(3) : "", {class: "n"}),
    element("td", (100 * bytes / total).toFixed(1) + " %", {class: "n"}),
    element("td", kind ? "" : bar(bytes / largest))], {class: kind});
  const body = [];
  for (const tensor of new Set(rows.map(row => row.tensor))) {
    const parts = rows.filter(row => row.tensor === tensor), weights = sum(parts, "weights");
    parts.forEach((row, i) => body.push(line([i ? "" : tensor, row.part, row.recipe, row.shape.join(" × ")],
                                             row.bytes, weights, "")));
    if (parts.length > 1) body.push(line(["", "all of it", "", ""], sum(parts, "bytes"), weights, "sum"));
  }
  body.push(line(["whole file", "", "", ""], total, sum(rows, "weights"), "sum"));
  const head = ["tensor", "part", "stored as", "shape", "bytes", "bits per weight", "share", ""];
  return element("div", element("table", [
    element("thead", element("tr", head.map((name, i) => element("th", name, {class: i > 3 ? "n" : ""})))),
    element("tbody", body)]), {class: "wide"});
}

function open(point) {
  const close = element("button", "Close", {class: "close", autofocus: ""});
  close.onclick = () => find("detail").close();
  const facts = [
    ["bytes", same(point.bytes[0], point.bytes[2])],
    ["bits per weight", point.bits === null ? "" : point.bits.toFixed(3)],
    ["test accuracy", accuracy(point.test) + " %, " + range(point.test)],
    ["validation", point.validation ? accuracy(point.validation) + " %" : "nothing held out"],
    ["seeds", point.seeds.join(", ") + (point.diverged ? "; " + point.diverged + " diverged" : "")],
    ["model", point.model], ["start", point.group.start],
    ["training", point.training], ["median seconds", point.seconds.toFixed(2)]];
  find("detail").replaceChildren(
    close, element("h2", point.recipe),
    element("dl", facts.flatMap(([name, value]) => [element("dt", name), element("dd", value)])),
    element("h3", "Where the bytes are (seed " + point.seeds[0] + ")"), ledger(point),
    element("h3", "Repeat this trial"), element("pre", data.command + point.cell));
  if (!find("detail").open) find("detail").showModal();
}

function visit(point) {
  history.replaceState(null, "", "#point-" + point.index);   // so that the address can be passed on
  open(point);
}

function follow() {
  const [, index] = location.hash.match(/^#point-(\d+)$/) || [];
  if (points[index]) open(points[index]);
}

data.groups.forEach((group, i) => find("group").append(element("option", group.title, {value: i})));
find("group").value = data.main;
for (const panel of new Set(data.methods.map(method => method.panel))) {
  find("panels").append(element("label", [element("input", "", {type: "checkbox", value: panel, checked: ""}),
                                          " " + panel]));
}
for (const id of ["controls", "filter"]) find(id).onsubmit = event => event.preventDefault();
find("controls").onchange = draw;
find("filter").oninput = list;
find("detail").onclose = () => history.replaceState(null, "", location.pathname + location.search);
draw();
list();
find("curves").on("plotly_click", event => {
  const index = event.points[0].customdata;
  if (index !== undefined) visit(points[index]);
});
window.addEventListener("hashchange", follow);
follow();
"""
