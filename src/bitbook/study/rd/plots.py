"""Pictures of rate and distortion: distance to the bound over bits, and where a tensor's gains lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitbook.errors import StudyError, optional_import
from bitbook.study.plots import _STYLE, style
from bitbook.study.rd.rd import Point

_GREY = "#8a8a8a"


def distance_plot(points: Sequence[Point], fixed: Mapping[str, bool], path: str | Path) -> Path:
    """Draw dB above Shannon's bound over bits, a panel for each source; methods of fixed rate are dashed.

    The axis is logarithmic, so that tenths of a dB near the bound can be told apart.  Points at or below the bound, as
    tensors with dependent weights may have, stand at its lower end.  Raises StudyError where there are no points.
    """
    if not points:
        raise StudyError("there is nothing to draw: no points")
    matplotlib = optional_import("matplotlib", "study")
    figure_module = optional_import("matplotlib.figure", "study")
    sources = list(dict.fromkeys(p.source for p in points))
    methods = list(dict.fromkeys(p.method for p in points))
    least = 0.02
    with matplotlib.rc_context(_STYLE):
        columns = min(3, len(sources))
        rows = -(-len(sources) // columns)
        figure = figure_module.Figure(figsize=(3.4 * columns + 1.9, 3.1 * rows + 0.3), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for name, ax in zip(sources, grid.flat, strict=False):
            ax.set_title(name, fontsize=8.5, fontweight="bold", loc="left")
            ax.axhline(1.533, color=_GREY, lw=0.9, ls=":", zorder=1)
            for i, method in enumerate(methods):
                line = sorted((p for p in points if p.source == name and p.method == method), key=lambda p: p.bits)
                color, marker = style(i)
                ax.plot(
                    [p.bits for p in line], [max(p.above, least) for p in line], color=color, marker=marker,
                    ls="--" if fixed.get(method) else "-", markeredgecolor="white", markeredgewidth=0.4, label=method,
                    zorder=2 + i,
                )  # fmt: skip
            ax.set_yscale("log")
            ax.set_xlabel("bits per sample, whole file")
            ax.tick_params(labelbottom=True)
        for ax in grid.flat[len(sources) :]:
            ax.set_axis_off()
        _decibel_axis(grid[0, 0], [max(p.above, least) for p in points])
        for row in grid:
            row[0].set_ylabel("dB above Shannon's bound")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=7, handlelength=2.4)
        figure.suptitle("Dashed: fixed rate; solid: entropy-coded; dotted: a scalar's limit at high rate", fontsize=8)
        _save(figure, path)
    return Path(path)


def gains_plot(bars: Mapping[str, Mapping[str, float]], path: str | Path, *, title: str) -> Path:
    """Draw stacked bars in dB: what each way of coding gains over fixed-rate scalars, split into its sources.

    bars: a bar's name → part → dB; parts that are negative are drawn as nothing.
    """
    matplotlib = optional_import("matplotlib", "study")
    figure_module = optional_import("matplotlib.figure", "study")
    with matplotlib.rc_context(_STYLE):
        figure = figure_module.Figure(figsize=(7.2, 0.55 * len(bars) + 1.5), layout="constrained")
        ax = figure.subplots()
        parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
        names = list(bars)
        left = [0.0] * len(names)
        for i, part in enumerate(parts):
            widths = [max(bars[name].get(part, 0.0), 0.0) for name in names]
            ax.barh(names, widths, left=left, color=style(i)[0], label=part, height=0.62)
            for y, (start, width) in enumerate(zip(left, widths, strict=True)):
                if width > 0.25:
                    ax.text(start + width / 2, y, f"{width:.2f}", ha="center", va="center", color="white", fontsize=7)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        ax.invert_yaxis()
        ax.grid(False)
        ax.set_xlabel("dB of squared error gained over fixed-rate scalars at the same bits (6.02 dB are one bit)")
        ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=min(len(parts), 4), fontsize=7)
        figure.suptitle(title, fontsize=9)
        _save(figure, path)
    return Path(path)


def _decibel_axis(ax: Any, values: Sequence[float]) -> None:
    ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20) if tick >= min(values) / 1.5]
    ticks = [tick for tick in ticks if tick <= max(values) * 1.5]
    ax.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    ax.set_yticks([], minor=True)


def _save(figure: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if Path(path).suffix == ".svg" else {"Software": None}
    figure.savefig(path, metadata=metadata, dpi=160)
