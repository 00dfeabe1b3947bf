"""What the networks study found, by network: files and their losses, and how they compare.

results ──► `measured` ──► a `Measured` for each network ──► document, tables, pictures
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from bitbook.study.networks.trial import ALLOCATED, EQUAL, FLOAT, NETWORKS, PROBE, Network
from bitbook.study.stats import average_saving, paired_bootstrap
from bitbook.study.tables import Result
from bitbook.study.trial import unpack_correct


@dataclass(frozen=True)
class Targets:
    """Losses that are allowed on test, and the bytes that go with them."""

    unit: str
    """Of losses: points of accuracy, or nats a token."""
    losses: Sequence[float]
    goals: Sequence[int] | None
    """Bytes of the whole file that this project set itself."""
    others: Mapping[str, Sequence[int | None]]
    """The smallest that others need, in bytes, chosen on test."""
    peer: str
    """The network's name in the table of peers."""

    def shown(self, loss: float) -> str:
        return f"{loss:.2f}" if self.unit == "points" else f"{loss:.4f}"


_POINTS = (0.3, 0.5, 1.0, 2.0)
TARGETS: Mapping[str, Targets] = {
    "resnet-20-cifar10": Targets(
        "points", _POINTS, (92_000, 80_000, 66_000, 54_000),
        {"error feedback, step grid, entropy estimated": (107_400, 92_000, 76_100, 62_300),
         "NNCodec 2.1.3, files, with statistics shifted where that helps": (146_200, 96_700, 80_400, 80_400)},
        "ResNet-20",
    ),
    "stories260k": Targets(
        "nats", (0.01, 0.02, 0.05, 0.1, 0.2), (170_000, 152_000, 135_000, 120_000, 108_000),
        {"error feedback, step grid, entropy estimated": (192_000, 173_300, 154_600, 154_600, 123_900),
         "NNCodec 2.1.3, files": (196_600, 175_200, 156_300, 136_300, 125_500)},
        "stories260K",
    ),
    "resnet-8-cifar10": Targets("points", _POINTS, None, {}, "ResNet-8"),
    "resnet-44-cifar10": Targets("points", _POINTS, None, {}, "ResNet-44"),
}  # fmt: skip


class Other(NamedTuple):
    """A file of others: its bytes, and the most that it loses on test."""

    name: str
    size: float
    loss: float


@dataclass(frozen=True)
class File:
    """One budget, or one number of bits, over its seeds."""

    method: str
    asked: float
    """Bytes, or bits per weight."""
    sizes: tuple[int, ...]
    lost: Mapping[str, tuple[float, ...]]
    """By split, for each seed: points of accuracy, or nats."""
    interval: tuple[float, float] | None
    """What the first seed loses on test, 95 % over images that might have been drawn."""
    predicted: float
    calibration: float
    """Divergence on the calibration examples."""
    held_out: float
    """Divergence on examples held out."""
    examples: tuple[Result, ...]

    @property
    def bytes(self) -> float:
        return fmean(self.sizes)

    def loss(self, split: str = "test") -> float:
        return fmean(self.lost[split])


class Measured(NamedTuple):
    """What is known of one network."""

    network: Network
    targets: Targets
    reference: Result
    files: list[File]
    records: list[Result]
    others: list[Other]

    def of(self, method: str) -> list[File]:
        return [f for f in self.files if f.method == method]

    def records_of(self, method: str) -> list[Result]:
        return [r for r in self.records if r["cell"]["method"] == method]

    @property
    def best_of_others(self) -> list[Other]:
        """Those that no other beats in both bytes and loss, by bytes."""
        best: list[Other] = []
        for other in sorted(self.others, key=lambda o: (o.size, o.loss)):
            if not best or other.loss < best[-1].loss:
                best.append(other)
        return best


def measured(
    results: Sequence[Result], peers: Sequence[Mapping[str, str]], networks: Sequence[Network] = NETWORKS
) -> list[Measured]:
    """Every network of which there is the float file and one more."""
    found = []
    for network in networks:
        records = [r for r in results if r["cell"]["model"] == network.model]
        floats = [r for r in records if r["cell"]["method"] == FLOAT]
        if not floats or len(records) == len(floats):
            continue
        targets = TARGETS.get(network.model, Targets("points", _POINTS, None, {}, network.model))
        files = _files(records, floats[0], targets)
        found.append(Measured(network, targets, floats[0], files, records, _others(targets, peers)))
    return found


def _files(records: Sequence[Result], reference: Result, targets: Targets) -> list[File]:
    groups: dict[tuple[str, float], list[Result]] = {}
    for record in records:
        cell = record["cell"]
        if cell["method"] in (ALLOCATED, EQUAL):
            key = (cell["method"], cell["budget"] if cell["method"] == ALLOCATED else cell["bits"])
            groups.setdefault(key, []).append(record)
    found = []
    for (method, asked), group in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1])):
        group = sorted(group, key=lambda r: r["cell"]["seed"])
        found.append(
            File(
                method,
                asked,
                tuple(r["result"]["bytes"] for r in group),
                {
                    split: tuple(loss_of(r, reference, targets, split) for r in group)
                    for split in ("test", "validation")
                },
                _interval(group[0], reference),
                fmean(r["result"]["report"]["predicted"] for r in group),
                fmean(r["result"]["report"]["divergence"] for r in group),
                fmean(r["result"]["divergence"] for r in group),
                tuple(group),
            )
        )
    return found


def score(record: Result, split: str, what: str) -> float:
    """Accuracy or loss of a record on a split."""
    return next(row[what] for row in record["result"]["rows"] if row["split"] == split)


def loss_of(record: Result, reference: Result, targets: Targets, split: str) -> float:
    """Points of accuracy, or nats, lost against the float network."""
    if targets.unit == "points":
        return score(reference, split, "accuracy") - score(record, split, "accuracy")
    return score(record, split, "loss") - score(reference, split, "loss")


def _interval(record: Result, reference: Result) -> tuple[float, float] | None:
    """Of the points lost on test, where answers were kept."""
    before, after = reference["result"].get("correct"), record["result"].get("correct")
    if not before or not after:
        return None
    count = record["result"]["images"]
    answers = (unpack_correct(text, count) for text in (before, after))
    found = paired_bootstrap(*answers, seed=0, repeats=2000)
    return 100 * found.low, 100 * found.high


def _others(targets: Targets, peers: Sequence[Mapping[str, str]]) -> list[Other]:
    """Files of others; ours in their table is left out."""
    found = [
        Other(name, float(size), loss)
        for name, sizes in targets.others.items()
        for size, loss in zip(sizes, targets.losses, strict=True)
        if size
    ]
    for row in peers:
        own = row["tool"].startswith("bitbook") or row["tool"] == "float32"
        if row["network"] == targets.peer and row["bytes"] and row["loss"] and not own:
            found.append(
                Other(f"{row['tool']} {row['version']}, {row['setting']}", float(row["bytes"]), float(row["loss"]))
            )
    return found


# --- comparing


def goal_met(m: Measured, loss: float, goal: int) -> bool | None:
    """Whether a file of at most so many bytes loses at most so much on test; None where that budget was not tried."""
    if any(f.bytes <= goal and f.loss() <= loss for f in m.of(ALLOCATED)):
        return True
    return False if any(f.asked == goal for f in m.of(ALLOCATED)) else None


def versus_others(m: Measured) -> list[dict[str, Any]]:
    """For each budget, the best of others in as many bytes."""
    rows = []
    for f in m.of(ALLOCATED):
        best = min((o for o in m.others if o.size <= f.asked), key=lambda o: (o.loss, o.size), default=None)
        row = {"budget": int(f.asked), "bytes": round(f.bytes), "lost": m.targets.shown(f.loss())}
        if best is None:
            rows.append({**row, **_NOBODY, "result": "win: no file of others is as small"})
        else:
            rows.append({**row, **_described(best, m.targets), "result": _verdict(f, best, m.targets)})
    return rows


def others_versus(m: Measured) -> list[dict[str, Any]]:
    """For each useful file that is best among others, ours of least loss in as many bytes.

    Useful: it loses no more than the largest loss that is allowed.
    """
    largest = max((f.bytes for f in m.of(ALLOCATED)), default=0)
    rows = []
    for other in m.best_of_others:
        if other.loss > max(m.targets.losses):
            continue
        ours = min((f for f in m.of(ALLOCATED) if f.bytes <= other.size), key=File.loss, default=None)
        if ours is None:
            result, bytes_, lost = "loss: none of our files is as small", "", ""
        else:
            result, bytes_, lost = _verdict(ours, other, m.targets), f"{ours.bytes:,.0f}", m.targets.shown(ours.loss())
            if result.startswith("loss"):
                result = _between(m, other, largest) or result
        rows.append({**_described(other, m.targets), "ours, bytes": bytes_, "lost": lost, "result": result})
    return rows


def _between(m: Measured, other: Other, largest: float) -> str | None:
    """What can be said of a size at which we have no file; None where a file of ours is as large."""
    if other.size > 1.05 * largest:
        return f"not compared: our largest file has {largest:,.0f} bytes"
    below = max((f for f in m.of(ALLOCATED) if f.bytes <= other.size), key=lambda f: f.bytes)
    above = min((f for f in m.of(ALLOCATED) if f.bytes > other.size), key=lambda f: f.bytes, default=None)
    if above is None or below.bytes > 0.98 * other.size:
        return None
    share = math.log(other.size / below.bytes) / math.log(above.bytes / below.bytes)
    loss = below.loss() + share * (above.loss() - below.loss())
    where = (
        f"between our files of {below.bytes:,.0f} and {above.bytes:,.0f} bytes, {m.targets.shown(loss)} interpolated"
    )
    return f"win {where}" if loss < other.loss else f"loss {where}"


def _described(other: Other, targets: Targets) -> dict[str, str]:
    return {"best other": other.name, "its bytes": f"{other.size:,.0f}", "it loses": targets.shown(other.loss)}


_NOBODY = {"best other": "", "its bytes": "", "it loses": ""}


def _verdict(f: File, best: Other, targets: Targets) -> str:
    if f.loss() < best.loss:
        return "win"
    if f.loss() == best.loss:
        return "tie"
    behind = f"loss by {targets.shown(f.loss() - best.loss)} {targets.unit}"
    if f.interval is not None and f.interval[0] <= best.loss:
        return f"{behind}, which is within what other test images would change"
    return f"{behind}: the other file was chosen on test, ours on {f.calibration:.4f} nats of divergence in calibration"


def equal_bytes_needed(m: Measured, f: File, what: str) -> float | None:
    """Bytes that equal bits need for the file's divergence, between neighbours on its curve; None outside."""
    line = sorted((getattr(e, what), e.bytes) for e in m.of(EQUAL))
    value = getattr(f, what)
    if len(line) < 2 or min(d for d, _ in line) <= 0 or value <= 0 or not line[0][0] <= value <= line[-1][0]:
        return None
    losses, sizes = np.log(np.array(line)).T
    return float(np.exp(np.interp(math.log(value), losses, sizes)))


def comparable(m: Measured) -> bool:
    """Whether there are two files of each kind at least."""
    return min(len(m.of(ALLOCATED)), len(m.of(EQUAL))) >= 2


def allocation_saving(m: Measured) -> float | None:
    """Percent of bytes that allocation saves at equal divergence on held-out examples, a mean over the common range."""
    curves = [
        [(f.bytes, -math.log(f.held_out)) for f in m.of(method) if f.held_out > 0] for method in (EQUAL, ALLOCATED)
    ]
    if min(map(len, curves)) < 2:
        return None
    saving = average_saving(np.array(curves[0]), np.array(curves[1]))
    return None if saving is None else saving.percent


def correlations(pairs: Iterable[tuple[float, float]]) -> tuple[float, float, int]:
    """Pearson's of the logarithms, Spearman's, and the number of pairs; only pairs of positive numbers count."""
    kept = np.array([(p, d) for p, d in pairs if p > 0 and d > 0])
    if len(kept) < 3:
        return math.nan, math.nan, len(kept)
    ranks = kept.argsort(0).argsort(0).astype(float)
    return (
        float(np.corrcoef(np.log(kept).T)[0, 1]),
        float(np.corrcoef(ranks.T)[0, 1]),
        len(kept),
    )


def probe_pairs(m: Measured, trust: str) -> list[tuple[float, float]]:
    """Predicted loss under a trust, and measured divergence, of each tensor alone."""
    return [
        (row["predicted"][trust], row["divergence"])
        for record in m.records_of(PROBE)
        for row in record["result"]["probes"]
    ]
