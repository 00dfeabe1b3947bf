"""Pictures of the networks study: loss over bytes, and predicted against measured loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bitbook.errors import StudyError, optional_import
from bitbook.study.plots import _STYLE, style
from bitbook.study.rd.plots import _save

_LEAST = {"points": 0.05, "nats": 0.002}
"""Losses below this, or gains, stand here on an axis that has no zero."""


class Curve(NamedTuple):
    """Files of one kind: bytes and loss on test."""

    name: str
    points: Sequence[tuple[float, float]]
    unit: str
    connected: bool = True


def size_loss_plot(panels: Mapping[str, Sequence[Curve]], path: str | Path) -> Path:
    """Draw loss on test over the bytes of the file, both logarithmic, a panel for each network.

    Raises StudyError where there are none.
    """
    if not panels:
        raise StudyError("there is nothing to draw: no networks")
    names = list(dict.fromkeys(curve.name for curves in panels.values() for curve in curves))
    with _axes(list(panels), (4.2, 3.1), path) as axes:
        for title, curves in panels.items():
            ax = axes[title]
            unit = curves[0].unit if curves else "points"
            for curve in curves:
                color, marker = style(names.index(curve.name))
                line = sorted(curve.points)
                ax.plot(
                    [size / 1000 for size, _ in line], [max(loss, _LEAST[unit]) for _, loss in line], color=color,
                    marker=marker, ls="-" if curve.connected else "none", markeredgecolor="white", markeredgewidth=0.5,
                    label=curve.name,
                )  # fmt: skip
            ax.set_yscale("log")
            ax.set_xscale("log")
            _plain_ticks(ax, [size / 1000 for curve in curves for size, _ in curve.points])
            ax.set_xlabel("file, kB")
            ax.set_ylabel("points lost on test" if unit == "points" else "nats lost on test")
            ax.legend(loc="best", fontsize=6.5)
    return Path(path)


def predicted_plot(panels: Mapping[str, Sequence[tuple[float, float]]], path: str | Path) -> Path:
    """Draw measured divergence over predicted loss, both logarithmic, a panel for each network.

    Raises StudyError where there are none.
    """
    if not panels:
        raise StudyError("there is nothing to draw: no probes")
    with _axes(list(panels), (3.6, 3.2), path) as axes:
        for title, pairs in panels.items():
            ax, kept = axes[title], [(p, d) for p, d in pairs if p > 0 and d > 0]
            ax.plot([p for p, _ in kept], [d for _, d in kept], "o", color=style(0)[0], ms=3.5, mew=0)
            if kept:
                ends = [min(min(pair) for pair in kept), max(max(pair) for pair in kept)]
                ax.plot(ends, ends, color="#8a8a8a", lw=0.9, ls="--", zorder=1)
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xlabel("predicted, nats")
            ax.set_ylabel("measured, nats")
    return Path(path)


@contextmanager
def _axes(titles: Sequence[str], size: tuple[float, float], path: str | Path) -> Iterator[dict[str, Any]]:
    """An axes for each title, two in a row, each of `size` inches, and a saved file at the end."""
    matplotlib = optional_import("matplotlib", "study")
    figure_module = optional_import("matplotlib.figure", "study")
    columns = min(2, len(titles))
    rows = -(-len(titles) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = figure_module.Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for title, ax in zip(titles, grid, strict=False):
            ax.set_title(title, fontsize=8.5, fontweight="bold", loc="left")
        for ax in grid[len(titles) :]:
            ax.set_axis_off()
        yield dict(zip(titles, grid, strict=False))
        _save(figure, path)


def _plain_ticks(ax: Any, sizes: Sequence[float]) -> None:
    """Kilobytes as plain numbers, few enough to be read."""
    low, high = min(sizes) / 1.1, max(sizes) * 1.1
    ticks = [t for t in (10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 500, 1000, 2000) if low <= t <= high]
    ax.set_xlim(low, high)
    ax.set_xticks(ticks, labels=[f"{t:g}" for t in ticks])
    ax.set_xticks([], minor=True)
