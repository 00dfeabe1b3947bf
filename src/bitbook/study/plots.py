"""Pictures of a study for documents: SVG or PNG, by the ending of the path.

Every picture is small multiples that share their axes, so that twenty methods stay readable, and is the same
file for the same points.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitbook.errors import StudyError, optional_import
from bitbook.study.tables import (
    EqualBytes,
    Point,
    curves,
    equal_bytes_table,
    float_centroids,
    float_point,
    front,
)

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito (2008), "Color Universal Design", without yellow, which white paper swallows."""
MARKERS = "osD^vPX<>*"
_GREY = "#8a8a8a"
_STYLE = {
    "svg.hashsalt": "bitbook",  # element names, random otherwise
    "svg.fonttype": "none",  # text stays text: half the size, and it can be searched
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.facecolor": "white",
    "legend.edgecolor": "white",
    "legend.framealpha": 0.85,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
}
_TICKS = (99.8, 99.5, 99, 98, 97, 96, 95, 92, 90, 80, 70, 50, 0)
_LEAST_ERROR = 0.05  # percent; stands for no error at all on an axis that has no zero


def panel(point: Point) -> str:
    """The part of a picture that a point's method belongs to."""
    if point.method in ("source", "search"):
        return point.method
    if point.family == "scalar":
        return "scalar"
    if point.family not in ("vector", "fused"):
        return "controls"
    clustered = point.method.startswith(("rows", "columns"))
    if point.family == "vector":
        return "rows and columns" if clustered else "vectors"
    return "fused rows and columns" if clustered else "fused vectors"


PANELS = (
    "scalar",
    "rows and columns",
    "vectors",
    "fused rows and columns",
    "fused vectors",
    "controls",
    "source",
    "search",
)


def panelled(points: Iterable[Point]) -> dict[str, list[str]]:
    """The methods in each panel that has any, both in the order in which they are drawn."""
    found: dict[str, list[str]] = {name: [] for name in PANELS}
    for point in points:
        methods = found[panel(point)]
        if point.method not in methods:
            methods.append(point.method)
    return {name: methods for name, methods in found.items() if methods}


def style(index: int) -> tuple[str, str]:
    """Colour and marker of a panel's curve number `index`; 70 curves differ."""
    return PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]


def size_accuracy(
    points: Iterable[Point],
    path: str | Path,
    *,
    title: str = "",
    linear: bool = False,
    panels: Mapping[str, list[str]] | None = None,
) -> Path:
    """Draw the test accuracy of each point of one group over the bytes of its file, a panel for each kind.

    panels: the methods in each; by default `panelled`'s.

    Mean and 95 % interval over seeds. Grey, the same in every panel: the front chosen on validation; dashed:
    the network in float32. Unless `linear`, the accuracy axis is logarithmic in the error: 98 and 99 % lie as
    far apart as 96 and 98 %. Raises StudyError for no points, or points of several groups.
    """
    points = list(points)
    if not points:
        raise StudyError("there is nothing to draw: no points")
    lines, reference, best = curves(points), float_point(points), front(points)
    with figure(path, panels or panelled(points), title or str(points[0].group)) as axes:
        first = next(iter(axes.values()))
        for methods, ax in axes.items():
            once = "" if ax is first else "_"  # matplotlib leaves names with an underscore out of the legend
            if best:
                sizes, accuracies = [p.bytes for p in best], [p.test.mean for p in best]
                name = f"{once}front of all methods"
                ax.plot(sizes, accuracies, ".-", color="#c4c4c4", lw=3, ms=5, zorder=1, label=name)
            if reference is not None:
                ax.axhline(reference.test.mean, color=_GREY, ls="--", lw=0.9, zorder=1, label=f"{once}float32")
            for i, method in enumerate(methods):
                _curve(ax, lines[method], i, connected=method != "source")
        byte_axis(first, [size for p in points for size in p.sizes])
        if not linear:
            error_axis(first, [p.test.mean for p in points])
        for ax in axes.values():
            _legend(ax)
            if ax.get_subplotspec().is_first_col():
                ax.set_ylabel("test accuracy, %")
    return Path(path)


def difference_plot(points: Iterable[Point], path: str | Path, *, against: str | None = None, title: str = "") -> Path:
    """Draw what quantizing the centroids changes at equal bytes: fused accuracy minus another method's.

    against: a method such as "scalar"; by default each fused method's own float centroids. Positive is better
    than that. Intervals: bootstrap over seeds. Sizes at which one of the two has no file are not drawn.
    Raises StudyError if there is no size that both reach.
    """
    points = list(points)
    fused = {p.method: float_centroids(p.method) for p in points if panel(p).startswith("fused")}
    wanted = [(method, against or base) for method, base in fused.items() if base is not None]
    known = {p.method for p in points}
    rows = equal_bytes_table(points, [pair for pair in wanted if pair[1] in known])
    if not rows:
        raise StudyError(f"no fused method meets {against or 'its float centroids'} at equal bytes")
    panels: dict[str, list[str]] = {}
    for row in rows:
        methods = panels.setdefault(str(fused[row.method]), [])
        if row.method not in methods:
            methods.append(row.method)
    heading = title or f"Fused minus {against or 'float centroids'} at equal bytes: {points[0].group}"
    with figure(path, panels, heading) as axes:
        for methods, ax in axes.items():
            ax.axhline(0, color=_GREY, lw=0.9, zorder=1)
            for i, method in enumerate(methods):
                _differences(ax, [row for row in rows if row.method == method], i)
            ax.legend(loc="best", fontsize=6.5, handlelength=1.6)
        first = next(iter(axes.values()))
        byte_axis(first, [row.bytes for row in rows])
        bounds = [bound for row in rows for bound in (row.difference, row.low, row.high) if math.isfinite(bound)]
        if max(map(abs, bounds)) > 10:  # losses of half the accuracy must not hide differences of half a point
            first.set_yscale("symlog", linthresh=1, linscale=1)
            first.yaxis.set_major_formatter("{x:g}")
        for ax in axes.values():
            if ax.get_subplotspec().is_first_col():
                ax.set_ylabel("difference in test accuracy, points")
    return Path(path)


def _curve(ax: Any, line: Sequence[Point], index: int, *, connected: bool) -> None:
    color, marker = style(index)
    intervals = [p.test.interval for p in line]
    half = [0.0 if math.isnan(i.low) else i.mean - i.low for i in intervals]
    # An interval may leave 0…100 %; the axis of errors cannot.
    down = [min(h, i.mean) for h, i in zip(half, intervals, strict=True)]
    up = [min(h, max(0.0, 100 - _LEAST_ERROR - i.mean)) for h, i in zip(half, intervals, strict=True)]
    ax.errorbar(
        [p.bytes for p in line], [i.mean for i in intervals], yerr=[down, up], color=color, marker=marker,
        ls="-" if connected else "none", elinewidth=0.8, capsize=1.5, zorder=2 + index,
        markeredgecolor="white", markeredgewidth=0.5, label=line[0].method,
    )  # fmt: skip


def _differences(ax: Any, rows: Sequence[EqualBytes], index: int) -> None:
    color, marker = style(index)
    # A percentile interval need not contain the value itself; NaN, of a single seed, draws nothing.
    down = [max(0.0, r.difference - r.low) for r in rows]
    up = [max(0.0, r.high - r.difference) for r in rows]
    ax.errorbar(
        [r.bytes for r in rows], [r.difference for r in rows], yerr=[down, up], color=color, marker=marker,
        elinewidth=0.8, capsize=1.5, zorder=2 + index, markeredgecolor="white", markeredgewidth=0.5,
        label=rows[0].method,
    )  # fmt: skip


@contextmanager
def figure(path: str | Path, panels: Mapping[str, list[str]], title: str) -> Iterator[dict[Any, Any]]:
    """One axes for each panel, keyed by its methods, and a saved file at the end."""
    matplotlib = optional_import("matplotlib", "study")
    figure_module = optional_import("matplotlib.figure", "study")
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_STYLE):
        width, height = (5.6, 3.8) if len(panels) == 1 else (3.2 * columns, 2.7 * rows)
        figure = figure_module.Figure(figsize=(width, height + 0.3), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        used = dict(zip(map(tuple, panels.values()), grid.flat, strict=False))
        for name, ax in zip(panels, grid.flat, strict=False):
            ax.set_title(name, fontsize=8.5, fontweight="bold", loc="left")
        for position, ax in enumerate(grid.flat):
            if position >= len(panels):
                ax.set_axis_off()
            elif position + columns >= len(panels):
                ax.set_xlabel("bytes of the file")
                ax.tick_params(labelbottom=True)
        figure.suptitle("\n".join(textwrap.wrap(title, int(15 * width))), fontsize=9)
        yield used
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if Path(path).suffix == ".svg" else {"Software": None}
        figure.savefig(path, metadata=metadata, dpi=160)


def _legend(ax: Any) -> None:
    ax.legend(loc="best", fontsize=6.5, handlelength=1.6, borderaxespad=0.2, labelspacing=0.3)


def byte_axis(ax: Any, sizes: Sequence[float]) -> None:
    """A logarithmic axis around these sizes, with ticks in bytes."""
    low, high = min(sizes) / 1.15, max(sizes) * 1.15
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        ticks = [step * 10**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    ax.set_xticks(ticks, labels=[f"{tick:,.0f}" for tick in ticks])
    ax.set_xticks([], minor=True)


def error_axis(ax: Any, accuracies: Sequence[float]) -> None:
    """An accuracy axis that is logarithmic in 100 % − accuracy, with ticks in accuracies."""
    np = optional_import("numpy", "study")
    ax.set_yscale(
        "function",
        functions=(
            lambda accuracy: -np.log10(np.maximum(100 - np.asarray(accuracy, float), _LEAST_ERROR)),
            lambda position: 100 - 10.0 ** -np.asarray(position, float),
        ),
    )
    high = 100 - max(_LEAST_ERROR, 0.7 * (100 - max(accuracies)))
    low = max(0.0, 100 - 1.3 * max(2 * _LEAST_ERROR, 100 - min(accuracies)))
    least = math.log10((100 - low) / (100 - high)) / 16  # distance of two labels
    ticks: list[float] = []
    for tick in _TICKS:
        if low <= tick <= high and (not ticks or math.log10((100 - tick) / (100 - ticks[-1])) > least):
            ticks.append(tick)
    ax.set_ylim(low, high)
    ax.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
