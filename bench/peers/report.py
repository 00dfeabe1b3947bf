"""What was measured as a table, a CSV file and pictures."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench.peers.networks import NETWORKS, Network

from bitbook.study import plots
from bitbook.study.stats import pareto_front

if TYPE_CHECKING:
    from bench.peers.__main__ import Row

COLUMNS = ("network", "tool", "version", "setting", "bytes", "share quantized", "figure", "unit", "loss", "reason")

INTRODUCTION = """
# Peers side by side

Made by `python -m bench.peers --write docs/results`, torch {torch}, one thread; every point is a row of
[peers.csv](peers.csv). The same public weights, no training. Bytes are those of the files that a tool itself saves, all
of them; what it does not quantize is in there as float. The figure in parentheses is that of the weights read back, by
bitbook's own evaluation on the whole test set.

Each cell is the smallest file of a small grid of settings **chosen on test**, for all tools alike, which flatters each.
Share: of all numbers, those that the tool gave fewer bits; a range where settings differ.

Tools: {tools}.

- bitbook is `ECSQ` at one step for all weights, entropy-coded, without data like all others; calibrated, it has
  some training examples: `Trellis(8)` with error feedback under a price of bits, and shifted statistics of batch
  normalisation. No peer is given data.
- torchao, hqq and bitsandbytes serve linear layers: of a ResNet only the last one. The embedding, which is the output
  layer too, is given to them as a linear layer. torchao saves a byte for each weight but for int4, whose form for CPUs
  takes rows by the sixteen; the rest is int8 there.
- coremltools and coreai-opt save an .mlpackage and an .aimodel that hold each weight in an operation of its own, and
  no graph of the network. What is not quantized is float16. `dim 2`: tables of pairs; `table 8`: entries of int8.
  coreai-opt's weights are those of its PyTorch model, not read from the .aimodel.
- k-means + zstd and rounding + zstd are baselines of a few lines, not tools: a palette for each tensor, or a scale for
  each output channel, what is left in float16, and zstd 22 over all of it.
- NNCodec codes all tensors, with dependent quantization, vectors at its fine default. Its training is not used.
- `ends 8`: the first and the last layer at 8 bits.
"""


def setting_text(setting: Mapping[str, Any]) -> str:
    """`bits 4, ends 8`."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def tools(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each tool, the float network left out."""
    found: dict[str, list[Row]] = {}
    for row in rows[1:]:
        found.setdefault(row.tool, []).append(row)
    return found


def smallest(network: Network, rows: Sequence[Row], before: float, allowed: float) -> Row | None:
    """The smallest file whose loss on test is at most `allowed`."""
    kept = [r for r in rows if r.figure is not None and network.loss(before, r.figure) <= allowed + 1e-9]
    return min(kept, key=lambda row: row.bytes or 0, default=None)


def figure_text(network: Network, figure: float) -> str:
    return f"{figure:.2f}" if network.unit == "%" else f"{figure:.4f}"


def table(network: Network, rows: Sequence[Row]) -> list[str]:
    """Markdown: for each tool and allowed loss the bytes of the smallest file, and its figure."""
    allowed = [f"≤ {loss:g}" for loss in network.allowed]
    lines = [
        f"| tool | share | {' | '.join(allowed)} |",
        "| --- | --: |" + " --: |" * len(allowed),
    ]
    before = rows[0].figure
    for tool, own in tools(rows).items():
        done = [row for row in own if row.figure is not None]
        if not done or before is None:
            lines.append(f"| {tool} | – | not run: {own[0].reason} |" + " |" * (len(allowed) - 1))
            continue
        cells = []
        for loss in network.allowed:
            best = smallest(network, done, before, loss)
            cells.append(f"{best.bytes:,} ({figure_text(network, best.figure or 0)})" if best else "–")
        shares = sorted({f"{100 * (row.share or 0):.1f}" for row in done}, key=float)
        share = f"{shares[0]} %" if len(shares) == 1 else f"{shares[0]}–{shares[-1]} %"
        lines.append(f"| {tool} | {share} | {' | '.join(cells)} |")
    return lines


def failures(rows: Sequence[Row]) -> list[str]:
    """A line for each setting that gave nothing."""
    return [f"- {r.tool}, {setting_text(r.setting)}: not run: {r.reason}" for r in rows if r.reason]


def write(rows: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """`peers.md`, `peers.csv` and a picture for each network that was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "peers.csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        for name, own in rows.items():
            out.writerows(_record(NETWORKS[name], row, own[0].figure) for row in own)
    (folder / "peers.md").write_text("\n".join(_document(rows, folder)) + "\n")


def _record(network: Network, row: Row, before: float | None) -> list[Any]:
    share = "" if row.share is None else f"{row.share:.4f}"
    figure = "" if row.figure is None else f"{row.figure:.4f}"
    loss = "" if row.figure is None or before is None else f"{network.loss(before, row.figure):.4f}"
    setting = setting_text(row.setting)
    return [row.network, row.tool, row.version, setting, row.bytes, share, figure, network.unit, loss, row.reason]


def _document(rows: Mapping[str, Sequence[Row]], folder: Path) -> list[str]:
    versions: dict[str, dict[str, None]] = {}
    for row in (row for own in rows.values() for row in own[1:]):
        versions.setdefault(row.tool, {})[row.version] = None
    tools_used = ", ".join(f"{tool} {' and '.join(found)}" for tool, found in versions.items())
    text = [INTRODUCTION.format(torch=torch.__version__, tools=tools_used).strip()]
    if absent := [name for name in NETWORKS if name not in rows]:
        text += ["", f"Not measured here: {', '.join(absent)}."]
    for name, own in rows.items():
        network = NETWORKS[name]
        text += ["", f"## {name}", ""]
        if own[0].figure is None:
            text.append(f"Not run: {own[0].reason}")
            continue
        losses = "points of test accuracy" if network.unit == "%" else "nats a token on the test stories"
        figure = figure_text(network, own[0].figure)
        text += [
            f"In float32 {own[0].bytes:,} bytes of numbers, {figure} {network.unit}. Allowed losses in {losses}.",
            "",
            *table(network, own),
        ]
        if lines := failures(own):
            text += ["", *lines]
        picture = f"peers-{name.lower()}.svg"
        draw(network, own, folder / picture)
        text += ["", f"![Size and loss on {name}]({picture})"]
    return text


def draw(network: Network, rows: Sequence[Row], path: Path) -> None:
    """Loss over bytes, a curve for each tool; losses below a third of the first allowed one are drawn there."""
    before = rows[0].figure
    assert before is not None
    least, most = network.allowed[0] / 3, 25 * network.allowed[-1]
    with plots.figure(path, {network.name: []}, f"{network.name}: what compression costs") as axes:
        (ax,) = axes.values()
        for i, (tool, own) in enumerate(tools(rows).items()):
            points = [(r.bytes or 0, -network.loss(before, r.figure)) for r in own if r.figure is not None]
            if not points:
                continue
            front = [points[k] for k in pareto_front(points)]
            color, marker = plots.style(i)
            sizes = [size for size, _ in front]
            losses = [min(max(-negative, least), most) for _, negative in front]
            ax.plot(sizes, losses, color=color, marker=marker, label=tool, markeredgecolor="white", markeredgewidth=0.5)
        for loss in network.allowed:
            ax.axhline(loss, color="#c4c4c4", lw=0.7, ls=":", zorder=0)
        plots.byte_axis(ax, [row.bytes for row in rows[1:] if row.bytes] or [rows[0].bytes or 1])
        ax.set_yscale("log")
        unit = "points of accuracy" if network.unit == "%" else "nats a token"
        ax.set_ylabel(f"loss on test, {unit}")
        ax.legend(loc="best", fontsize=6.5, handlelength=1.6)
