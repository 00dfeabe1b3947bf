"""The document of the networks study: what a byte budget costs, against goals, equal bits and the tools of others.

    python -m bitbook.study.networks.document runs/networks docs/results

    results of `networks` ─┐
    runs/tuned, if there   ├─► networks.md, networks.csv, networks-tensors.csv, networks*.svg
    peers.csv, if there   ─┘

Every sentence that says how something compares is made from the results.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bitbook.study.document import write_between
from bitbook.study.networks.comparison import (
    Measured,
    Targets,
    allocation_saving,
    comparable,
    correlations,
    equal_bytes_needed,
    goal_met,
    loss_of,
    measured,
    others_versus,
    probe_pairs,
    score,
    versus_others,
)
from bitbook.study.networks.plots import Curve, predicted_plot, size_loss_plot
from bitbook.study.networks.trial import ALLOCATED, EQUAL, NETWORKS, PROBE, TRUST, Network
from bitbook.study.stats import mean_interval
from bitbook.study.storage import StudyStore, open_storage
from bitbook.study.tables import Result, markdown_table, write_csv

README_BEGIN, README_END = "<!-- networks: begin -->", "<!-- networks: end -->"
PEERS_FILE = "peers.csv"


# --- the document


def document(
    results: Sequence[Result],
    peers: Sequence[Mapping[str, str]] = (),
    tuned: Sequence[Result] = (),
    networks: Sequence[Network] = NETWORKS,
) -> str:
    """Everything that is known, of the networks that were measured."""
    found = measured(results, peers, networks)
    missing = [n.title for n in networks if n.model not in {m.network.model for m in found}]
    seeds = len({r["cell"]["seed"] for r in results})
    minutes = sum(sum(r["result"]["seconds"].values()) for r in results) / 60
    parts = [
        f"""# What a byte budget costs

Made by `bitbook study --dataset networks` and
`python -m bitbook.study.networks.document runs/networks docs/results` (`make networks`):
{len(results)} trials, {seeds} seed{"s" * (seeds != 1)}, {minutes:.0f} minutes of one process. A row per file and split
in [networks.csv](networks.csv), one per tensor in [networks-tensors.csv](networks-tensors.csv).

Public networks as their authors trained them, **nothing is trained**. "{ALLOCATED}": `Fit.to_size` gets a budget of
bytes and chooses for each tensor how it is stored. "{EQUAL}": the same codes, feedback and repairs, but every matrix at
the same bits per weight. Bytes are those of the whole file. Losses are those of the file, read back into a fresh
network: points of accuracy for images, nats a token for stories. All choices are made on the divergence from
the float network on a few hundred training examples, never on accuracy, and never on test data.
"""
    ]
    if missing:
        parts.append(f"Not measured here: {', '.join(missing)}.\n")
    if found:
        parts += [_summary(found), "![Size and loss](networks.svg)\n"]
    parts += [_section(m, tuned) for m in found]
    probed = [m for m in found if m.records_of(PROBE)]
    if probed:
        parts.append(_probes(probed))
    if found:
        parts.append(_bias(found))
    return "\n".join(parts)


def readme_table(results: Sequence[Result], networks: Sequence[Network] = NETWORKS) -> str:
    """A line for each file of an allocated budget, for the README."""
    rows = [
        {"network": m.network.title, "bytes": round(f.bytes), "share of float32": f"{100 * f.bytes / _bytes(m):.1f} %",
         "lost on test": f"{m.targets.shown(f.loss())} {m.targets.unit}"}
        for m in measured(results, (), networks)
        for f in m.of(ALLOCATED)
    ]  # fmt: skip
    return markdown_table(rows, ["network", "bytes", "share of float32", "lost on test"])


def _bytes(m: Measured) -> int:
    return m.reference["result"]["bytes"]


def _summary(found: Sequence[Measured]) -> str:
    """Goals and comparisons, counted."""
    lines = []
    for m in found:
        if m.targets.goals:
            known: dict[bool | None, list[str]] = {True: [], False: [], None: []}
            for loss, goal in zip(m.targets.losses, m.targets.goals, strict=True):
                known[goal_met(m, loss, goal)].append(f"{loss:g}")
            text = f"goals met: {', '.join(known[True]) or 'none'}; missed: {', '.join(known[False]) or 'none'}"
            if known[None]:
                text += f"; not measured: {', '.join(known[None])}"
            lines.append(f"{m.network.title}: {text} ({m.targets.unit} lost)")
        for rows, at in ((versus_others(m), "our budgets"), (others_versus(m), "the sizes of others' best files")):
            words = ("win", "tie", "loss")
            count = [sum(row["result"].startswith(word) for row in rows) for word in words]
            if m.others and sum(count):
                said = ", ".join(f"{n} {word}" for n, word in zip(count, ("won", "tied", "lost"), strict=True))
                lines.append(f"{m.network.title}, at {at}: {said} against the best file of any other tool")
        saving = allocation_saving(m)
        if saving is not None:
            more = "fewer" if saving >= 0 else "more"
            lines.append(
                f"{m.network.title}: allocation needs {abs(saving):.1f} % {more} bytes than equal bits at the same "
                "divergence on examples held out"
            )
    return "\n".join(f"- {line}." for line in lines) + "\n"


def _section(m: Measured, tuned: Sequence[Result]) -> str:
    reference = f"{_bytes(m):,} bytes, {_figure(m, 'test')} on test, {_figure(m, 'validation')} on examples held out"
    calibration = m.network.calibration
    what = (
        f"the first {calibration['length']} tokens of {calibration['examples']} training stories"
        if "length" in calibration
        else f"{calibration['examples']} training images"
        + ", cropped and mirrored as in training" * ("crop" in calibration)
    )
    parts = [
        f"""## {m.network.title}

{m.network.model}; in float32 {reference}. Calibrated on
{what}. {_trust(m)}
"""
    ]
    if m.of(ALLOCATED):
        parts += ["### Budgets\n", _budget_table(m)]
        if m.targets.goals:
            parts.append(_goal_table(m))
        parts += ["### Wins and losses\n", _versus_text(m)]
    if m.of(ALLOCATED) and m.of(EQUAL):
        parts += ["### Allocation against equal bits\n", _equal_text(m)]
    if m.of(ALLOCATED):
        parts += ["### What was chosen\n", _choices_text(m)]
    own = [r for r in tuned if r["cell"]["model"] in (m.network.model, m.network.model.removesuffix("-cifar10"))]
    if own:
        parts += ["### Fine-tuned\n", _tuned_text(m, own)]
    return "\n".join(parts)


def _figure(m: Measured, split: str) -> str:
    if m.targets.unit == "points":
        return f"{score(m.reference, split, 'accuracy'):.2f} %"
    return f"{score(m.reference, split, 'loss'):.4f} nats"


def _trust(m: Measured) -> str:
    """How far the Fisher information is trusted, and why."""
    text = f"Trust in the Fisher information: {m.network.trust:g}"
    for record in m.records_of(TRUST):
        result = record["result"]
        agrees = (
            "as chosen here" if result["trust"] == m.network.trust else f"other than the {m.network.trust:g} used here"
        )
        text += (
            f". At {record['cell']['budget']:,} bytes, on calibration examples alone: {'; '.join(result['said'])}. The "
            f"best at equal bytes is {result['trust']:g}, {agrees}"
        )
    return text + "."


def _spread(values: Sequence[float], targets: Targets) -> str:
    interval = mean_interval(values)
    text = targets.shown(interval.mean)
    return text if math.isnan(interval.low) else f"{text} ± {targets.shown(interval.mean - interval.low)}"


def _budget_table(m: Measured) -> str:
    rows = []
    for f in m.of(ALLOCATED):
        between = "" if f.interval is None else f"{f.interval[0]:.2f} to {f.interval[1]:.2f}"
        rows.append({
            "budget": int(f.asked), "bytes": round(f.bytes),
            f"{m.targets.unit} lost, test": _spread(f.lost["test"], m.targets),
            "95 %, images": between, "lost, held out": _spread(f.lost["validation"], m.targets),
            "divergence, calibration": f"{f.calibration:.4f}", "held out": f"{f.held_out:.4f}",
            "predicted": f"{f.predicted:.4f}",
        })  # fmt: skip
    columns = [name for name in rows[0] if any(row[name] != "" for row in rows)]
    above = [f"{int(f.asked):,} by {max(f.sizes) - f.asked:,.0f}" for f in m.of(ALLOCATED) if max(f.sizes) > f.asked]
    missed = f"\nFiles larger than their budget, in bytes: {'; '.join(above)}.\n" if above else ""
    return markdown_table(rows, columns) + missed


def _goal_table(m: Measured) -> str:
    """The loss that is allowed, its bytes, and what became of it."""
    assert m.targets.goals is not None
    rows = []
    for i, (loss, goal) in enumerate(zip(m.targets.losses, m.targets.goals, strict=True)):
        at = max((f for f in m.of(ALLOCATED) if f.asked == goal), key=lambda f: f.bytes, default=None)
        kept = {
            split: min((f.bytes for f in m.of(ALLOCATED) if f.loss(split) <= loss), default=None)
            for split in ("validation", "test")
        }
        met = {True: "met", False: "missed", None: "not measured"}[goal_met(m, loss, goal)]
        if met == "missed" and at is not None:
            met = f"missed by {m.targets.shown(at.loss() - loss)} {m.targets.unit}"
            if at.bytes > goal:
                met = f"missed by {at.bytes - goal:,.0f} bytes"
        rows.append({
            "allowed": f"≤ {loss:g}", "goal, bytes": goal,
            "lost in that many": m.targets.shown(at.loss()) if at else "–", "result": met,
            "smallest file, chosen on held out": _bytes_text(kept["validation"]),
            "chosen on test": _bytes_text(kept["test"]),
            **{name: _bytes_text(sizes[i]) for name, sizes in m.targets.others.items()},
        })  # fmt: skip
    return f"""The goals, and what others need, measured beforehand on the same network and test data, chosen on test:

{markdown_table(rows, list(rows[0]))}"""


def _bytes_text(size: float | None) -> str:
    return "–" if size is None else f"{size:,.0f}"


# --- against others


def _versus_text(m: Measured) -> str:
    if not m.others:
        return "There is no file of another tool to compare with.\n"
    tools = sorted({o.name.split(",")[0] for o in m.others})
    rows, back = versus_others(m), others_versus(m)
    return f"""At each budget, our file against that of others which loses least in as many bytes. Theirs are chosen on
test, which favours them; where only a bound on their loss is known, the bound stands here. Others:
{", ".join(tools)}.

{markdown_table(rows, list(rows[0]))}
The other way round, each file that is best among others and loses at most {max(m.targets.losses):g} {m.targets.unit},
and ours of least loss in as many bytes:

{markdown_table(back, list(back[0]))}"""


# --- against equal bits


def _equal_text(m: Measured) -> str:
    rows = []
    for f in m.of(ALLOCATED):
        row: dict[str, Any] = {"bytes": round(f.bytes)}
        for what, said in (("held_out", "held out"), ("calibration", "calibration")):
            needed = equal_bytes_needed(m, f, what)
            row[f"equal bits need, {said}"] = _bytes_text(needed)
            row[f"saved, {said}"] = "–" if needed is None else f"{100 * (1 - f.bytes / needed):.1f} %"
        rows.append(row)
    equal = [
        {"bits per weight of each matrix": f"{f.asked:g}", "bytes": round(f.bytes),
         f"{m.targets.unit} lost, test": _spread(f.lost["test"], m.targets),
         "divergence, calibration": f"{f.calibration:.4f}", "held out": f"{f.held_out:.4f}"}
        for f in m.of(EQUAL)
    ]  # fmt: skip
    saving = allocation_saving(m)
    said = (
        "The two curves share no range of divergences."
        if saving is None and comparable(m)
        else "There are too few files for a mean."
        if saving is None
        else f"Over the divergences that both reach, allocation saves {saving:.1f} % of the bytes (held out)."
    )
    return f"""Bytes at the same divergence from the float network, interpolated between the files with equal bits; "–":
outside their range. {said}

{markdown_table(rows, list(rows[0]))}
{markdown_table(equal, list(equal[0]))}"""


# --- what was chosen


def _choices_text(m: Measured) -> str:
    rows, notes = [], []
    for f in m.of(ALLOCATED):
        report = f.examples[0]["result"]["report"]
        kinds: dict[str, list[Mapping[str, Any]]] = {}
        for choice in report["choices"]:
            kinds.setdefault(choice["kind"], []).append(choice)
        said = [f"{kind}: {len(own)} ({sum(c['bytes'] for c in own):,} B)" for kind, own in sorted(kinds.items())]
        large = sorted((c for c in report["choices"] if c["weights"] >= 256), key=lambda c: c["bits"])
        span = (
            f"{large[0]['bits']:.2f} ({large[0]['tensor']}) to {large[-1]['bits']:.2f} ({large[-1]['tensor']})"
            if large
            else ""
        )
        repairs = ", ".join(r["name"] for r in report["repairs"] if r["kept"]) or "none"
        rows.append(
            {
                "budget": int(f.asked),
                "tensors by kind": "; ".join(said),
                "bits per weight": span,
                "repairs kept": repairs,
            }
        )
        notes += [f"{name} ({why})" for name, why in report["dense"].items()]
    counted = {sum(1 for _ in f.examples[0]["result"]["report"]["choices"]) for f in m.of(ALLOCATED)}
    left = ", ".join(sorted(set(notes)))
    skipped = (
        f"Stored as they are: {left}."
        if left
        else "No tensor was left out: each was chosen a way, and none is stored as it came."
    )
    return f"""{"/".join(map(str, sorted(counted)))} tensors; bits are those of tensors of 256 weights and more.
{skipped}

{markdown_table(rows, list(rows[0]))}"""


def _tuned_text(m: Measured, records: Sequence[Result]) -> str:
    rows = [
        {"budget": r["cell"].get("budget"), "seed": r["cell"]["seed"], "bytes": r["result"]["bytes"],
         f"{m.targets.unit} lost, test": m.targets.shown(loss_of(r, m.reference, m.targets, "test")),
         "divergence, held out": f"{r['result'].get('divergence', math.nan):.4f}"}
        for r in sorted(records, key=lambda r: (-r["result"]["bytes"], r["cell"]["seed"]))
    ]  # fmt: skip
    return f"""With a short training under a price of bits, taught by the float network's answers on training
{"stories" if m.targets.unit == "nats" else "images"} that are not held out (`bitbook study --dataset tuned`):

{markdown_table(rows, list(rows[0]))}"""


# --- predictions


def _probes(found: Sequence[Measured]) -> str:
    rows = []
    for m in found:
        trusts = sorted(
            {trust for r in m.records_of(PROBE) for row in r["result"]["probes"] for trust in row["predicted"]}
        )
        for trust in reversed(trusts):
            pairs = probe_pairs(m, trust)
            rows.append(_correlated(m, f"one tensor at a time, trust {float(trust):g}", pairs))
        whole = [(f.predicted, f.calibration) for f in m.files]
        if len(whole) >= 3:
            rows.append(_correlated(m, f"whole files, trust {m.network.trust:g}", whole))
    return f"""## Predicted and measured

One matrix at a time is quantized, all else stays; prices are such that about
{", ".join(f"{b:g}" for b in _probed_bits(found))} bits per weight would be spent were bits worth 6 dB each. What
`Sensitivity.loss` predicts is set beside the divergence on the calibration examples. Trust 1 is the Fisher information;
trust 0 says that equal errors of all weights cost the same. For whole files, the prediction is the sum over the tensors
when they were chosen, before feedback between layers and repairs.

![Predicted and measured](networks-predicted.svg)

{markdown_table(rows, list(rows[0]))}"""


def _probed_bits(found: Sequence[Measured]) -> list[float]:
    return sorted({bits for m in found for r in m.records_of(PROBE) for bits in r["cell"]["bits"]})


def _correlated(m: Measured, what: str, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    pearson, spearman, count = correlations(pairs)
    ratio = math.exp(fmean(math.log(d / p) for p, d in pairs if p > 0 and d > 0)) if count else math.nan
    return {
        "network": m.network.title, "what": what, "pairs": count, "Pearson, logarithms": f"{pearson:.3f}",
        "Spearman": f"{spearman:.3f}", "measured / predicted, geometric mean": f"{ratio:.2f}",
    }  # fmt: skip


def _bias(found: Sequence[Measured]) -> str:
    lines = []
    for m in found:
        ratios = [f.held_out / f.calibration for f in m.of(ALLOCATED) if f.calibration > 0]
        between = (
            f"; divergence held out is {min(ratios):.2f} to {max(ratios):.2f} times that in calibration"
            if ratios
            else ""
        )
        lines.append(
            f"- {m.network.title}: {_figure(m, 'validation')} on training examples held out from calibration, "
            f"{_figure(m, 'test')} on test{between}."
        )
    return f"""## A bias that calibration has

The networks were trained on the examples that calibrate them, and on those that are held out here: nothing else is
public. Where the float network knows them by heart, its gradients there are small, and so is the Fisher information.
Images are cropped and mirrored at random, which it has not seen pixel by pixel. Divergence, not accuracy, is what is
minimised: it needs no labels, and does not vanish where all answers are right.

{chr(10).join(lines)}
"""


# --- files


COLUMNS = (
    "model", "method", "budget", "bits", "trust", "seed", "split", "bytes", "accuracy", "loss", "lost", "unit",
    "predicted", "calibration divergence", "held-out divergence", "seconds", "cell",
)  # fmt: skip
TENSOR_COLUMNS = (
    "model",
    "method",
    "budget",
    "bits",
    "seed",
    "tensor",
    "kind",
    "bits per weight",
    "predicted",
    "divergence",
)


def file_rows(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row for each file and split."""
    rows = []
    for m in found:
        for r in [r for r in m.records if "rows" in r["result"]]:
            cell, result, report = r["cell"], r["result"], r["result"]["report"]
            rows += [
                {
                    **{key: cell.get(key, "") for key in ("model", "method", "budget", "bits", "seed")},
                    "trust": report.get("trust", ""), "split": row["split"], "bytes": result["bytes"],
                    "accuracy": row["accuracy"], "loss": row["loss"],
                    "lost": f"{loss_of(r, m.reference, m.targets, row['split']):.6g}", "unit": m.targets.unit,
                    "predicted": report.get("predicted", ""), "calibration divergence": report.get("divergence", ""),
                    "held-out divergence": result["divergence"], "seconds": sum(result["seconds"].values()),
                    "cell": r["cell_id"],
                }
                for row in result["rows"]
            ]  # fmt: skip
    return rows


def tensor_rows(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row for each tensor of each file, and for each probe."""
    rows = []
    for m in found:
        for r in m.records:
            cell, result = r["cell"], r["result"]
            own = {
                "model": cell["model"],
                "method": cell["method"],
                "budget": cell.get("budget", ""),
                "seed": cell["seed"],
            }
            for c in result.get("report", {}).get("choices", ()):
                rows.append({**own, "bits": cell.get("bits", ""), "tensor": c["tensor"], "kind": c["kind"],
                             "bits per weight": c["bits"], "predicted": c["loss"], "divergence": ""})  # fmt: skip
            for p in result.get("probes", ()):
                predicted = p["predicted"][str(float(m.network.trust))]
                rows.append({**own, "bits": "", "tensor": p["tensor"], "kind": p["kind"], "bits per weight": p["bits"],
                             "predicted": predicted, "divergence": p["divergence"]})  # fmt: skip
    return rows


def write_document(
    results: Sequence[Result],
    folder: Path,
    tuned: Sequence[Result] = (),
    networks: Sequence[Network] = NETWORKS,
    table: Path | None = None,
) -> None:
    """Write `networks.md`, its tables and its figures; peers come from `table`, or `peers.csv` in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    table = table or folder / PEERS_FILE
    peers: list[dict[str, str]] = []
    if table.exists():
        with open(table, encoding="utf-8", newline="") as file:
            peers = list(csv.DictReader(file))
    found = measured(results, peers, networks)
    write_csv(file_rows(found), folder / "networks.csv", COLUMNS)
    write_csv(tensor_rows(found), folder / "networks-tensors.csv", TENSOR_COLUMNS)
    if found:
        size_loss_plot({m.network.title: _curves(m) for m in found}, folder / "networks.svg")
    probed = {f"{m.network.title}, trust {m.network.trust:g}": probe_pairs(m, str(float(m.network.trust)))
              for m in found if m.records_of(PROBE)}  # fmt: skip
    if probed:
        predicted_plot(probed, folder / "networks-predicted.svg")
    (folder / "networks.md").write_text(document(results, peers, tuned, networks), encoding="utf-8")


def _curves(m: Measured) -> list[Curve]:
    lines = [
        Curve(method, [(f.bytes, f.loss()) for f in m.of(method)], m.targets.unit) for method in (ALLOCATED, EQUAL)
    ]
    lines.append(Curve("best of others", [(o.size, o.loss) for o in m.best_of_others], m.targets.unit))
    if m.targets.goals:
        lines.append(Curve("goals", list(zip(m.targets.goals, m.targets.losses, strict=True)), m.targets.unit, False))
    return [line for line in lines if line.points]


def read_results(folder: Path, name: str) -> list[dict[str, Any]]:
    """The finished trials of the study of this name in a folder; none where there is no study."""
    if not (folder / "study.db").exists():
        return []
    store = StudyStore(open_storage(folder / "study.db"), name)
    results = sorted(store.results(), key=lambda record: record["cell_id"])
    store.close()
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the document of a study, finished or not."""
    parser = argparse.ArgumentParser(description="Write the document of the networks study.")
    parser.add_argument("run", type=Path, help="the study's folder, which holds study.db")
    parser.add_argument("folder", type=Path, help="where the document goes")
    parser.add_argument(
        "--tuned", type=Path, help="the folder of the study `tuned` (default: tuned, beside the study's)"
    )
    parser.add_argument("--peers", type=Path, help="the table of peers (default: peers.csv in FOLDER)")
    parser.add_argument("--readme", type=Path, help="a file whose table of networks is replaced, too")
    given = parser.parse_args(arguments)
    results = read_results(given.run, "networks")
    tuned = read_results(given.tuned or given.run.parent / "tuned", "tuned")
    write_document(results, given.folder, tuned, table=given.peers)
    if given.readme is not None:
        write_between(given.readme, README_BEGIN, README_END, readme_table(results))


if __name__ == "__main__":
    main()
