"""summary.md: the sentences, the fronts and the savings of a study as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bitbook.study import tables
from bitbook.study.report.sentences import Savings, signed, title
from bitbook.study.tables import MethodSaving, Point


def summary(
    points: Sequence[Point],
    sentences: Sequence[str],
    savings: Savings,
    pictures: Sequence[str],
    command: str,
    versions: Mapping[str, str],
) -> str:
    """The document's text; `pictures` are names of files beside it."""
    text = tables.markdown_text
    parts = [f"# {text(title(points))}\n", "".join(f"- {text(sentence)}\n" for sentence in sentences)]
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
            "saved, %": "" if found is None else signed(found.saving.percent),
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
