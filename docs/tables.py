"""Tables of the documentation, computed from docs/results/*.csv and written into the pages, so that none can drift.

    python docs/tables.py            write every table again
    python docs/tables.py --check    name the pages whose tables are out of date, and fail if there are any

A page asks for a table in a comment and holds it up to the next one:

    <!-- table: family "uniform, per tensor" "uniform, per row" -->
    …
    <!-- end -->

The word is a function of `TABLES`, what follows are its arguments.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from bitbook.study.stats import mean_interval
from bitbook.study.tables import markdown_table

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MARKED = re.compile(r"(<!-- table: ([a-z-]+)([^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = Mapping[str, str]

MNIST, RESNET = "mlp-784-128-64-10", "resnet-20"
TITLES = {MNIST: "MNIST, perceptron of 784-128-64-10", RESNET: "CIFAR-10, public ResNet-20"}
VARIATIONS = ("rounded", "statistics shifted", "error feedback", "trained")
STRONG = "30 epochs"
"""The float start that the tables of mnist.csv are about."""


@functools.cache
def rows(name: str) -> tuple[Row, ...]:
    """The rows of docs/results/<name>.csv."""
    with open(DOCS / "results" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def test_rows(name: str, **columns: str) -> list[Row]:
    """Those on test data with these values; raises `ValueError` where there is none."""
    found = [row for row in rows(name) if row.get("split", "test") == "test"]
    for column, value in columns.items():
        found = [row for row in found if row[column] == value]
    if not found:
        raise ValueError(f"{name}.csv has no row on test data with {columns}")
    return found


def by(found: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by the values of some columns, in the order of their first appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def size(found: Sequence[Row]) -> float:
    """Mean bytes."""
    return fmean(float(row["bytes"]) for row in found)


def accuracy(found: Sequence[Row]) -> str:
    """Mean accuracy in percent, ± half its 95 % interval over seeds."""
    mean, low, _ = mean_interval([float(row["accuracy"]) for row in found])
    return f"{mean:.2f}" if math.isnan(low) else f"{mean:.2f} ± {mean - low:.2f}"


def made(command: str, name: str) -> str:
    """Where a table comes from."""
    where = f"every trial is a row of [{name}.csv](RESULTS/{name}.csv), all of it in [{name}.md](RESULTS/{name}.md)"
    return f"\nMade by `{command}`; {where}.\n"


# --- tables


def family(*methods: str) -> str:
    """Bytes and test accuracy of each recipe, by what was done beside rounding; a table for each network."""
    text = ""
    for model, title in TITLES.items():
        of_model = [row for row in test_rows("family", model=model) if row["method"] in methods]
        if not of_model:
            continue
        used = [v for v in VARIATIONS if any(row["variation"] == v for row in of_model)]
        lines = []
        for (recipe,), found in by(of_model, "recipe").items():
            line = {"recipe": recipe}
            for variation in used:
                own = [row for row in found if row["variation"] == variation]
                score = fmean(float(row["accuracy"]) for row in own) if own else 0
                line[variation] = f"{size(own):,.0f} B, {score:.2f} %" if own else "–"
            lines.append(line)
        reference = test_rows("family", model=model, recipe="float, float32")
        seeds = len({row["seed"] for row in of_model})
        means = f"means over {seeds} seeds" if seeds > 1 else "one seed"
        mean = fmean(float(row["accuracy"]) for row in reference)
        text += f"**{title}**, bytes and test accuracy, {means}; float32: {size(reference):,.0f} B, {mean:.2f} %\n\n"
        text += markdown_table(lines, ["recipe", *used]) + "\n"
    if not text:
        raise ValueError(f"family.csv has none of the methods {', '.join(methods)}")
    return text.rstrip("\n") + "\n" + made("make family", "family")


def mnist(*methods: str) -> str:
    """Fixed-width files of the MNIST experiment: bytes, and test accuracy without and with training under the plan."""
    lines = []
    for method in methods:
        found = test_rows("mnist", method=method, start=STRONG)
        for (recipe,), own in by(found, "recipe").items():
            still = [row for row in own if row["training"] == "none"]
            trained = [row for row in own if row["training"] != "none"]
            lines.append({
                "recipe": recipe,
                "bytes": round(size(trained)),
                "rounded, test %": accuracy(still) if still else "–",
                "trained, test %": accuracy(trained),
            })  # fmt: skip
    reference = test_rows("mnist", method="float", recipe="float, float32", start=STRONG, training="none")
    head = f"{TITLES[MNIST]}; float32: {size(reference):,.0f} B, {accuracy(reference)} %; fixed width, five seeds\n\n"
    return head + markdown_table(lines, list(lines[0])) + made("make results", "mnist")


def rd(*methods: str) -> str:
    """Squared error on a million unit Gaussians by bits of the whole file, and the distance to Shannon's 4^-bits."""
    lines = []
    for method in methods:
        for row in test_rows("rd", source="Gauss", method=method):
            if float(row["target"]) not in (0.5, 1, 2, 3, 4):
                continue
            bits, error = float(row["bits"]), float(row["mse"])
            lines.append({
                "method": method,
                "bits per weight": f"{bits:.3f}",
                "squared error": f"{error:.5f}",
                "above Shannon's bound": f"{10 * math.log10(error * 4**bits):.2f} dB",
            })  # fmt: skip
    command = "bitbook rd --source Gauss --samples 1000000"
    return markdown_table(lines, list(lines[0])) + made(command, "rd")


def coded(*recipes: str) -> str:
    """The same trained network at fixed width and entropy-coded."""
    lines = []
    for recipe in recipes:
        pair = by(test_rows("entropy", model=MNIST, recipe=recipe), "coder")
        kinds = {coder: own for (coder,), own in pair.items()}
        fixed, small = kinds["fixed"], next(own for coder, own in kinds.items() if coder != "fixed")
        lines.append({
            "recipe": recipe,
            "fixed width, bytes": round(size(fixed)),
            "entropy-coded, bytes": round(size(small)),
            "saved, %": f"{100 - 100 * size(small) / size(fixed):.0f}",
            "test %": accuracy(small),
        })  # fmt: skip
    return markdown_table(lines, list(lines[0])) + made("make entropy", "entropy")


def priced() -> str:
    """Files trained with a price on every bit."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows("entropy")):
        found = [row for row in test_rows("entropy", model=model) if "λ" in row["recipe"]]
        for (recipe,), own in sorted(by(found, "recipe").items(), key=lambda item: size(item[1])):
            lines.append({"model": model, "recipe": recipe, "bytes": round(size(own)), "test %": accuracy(own)})
    return markdown_table(lines, list(lines[0])) + made("make entropy", "entropy")


def headline() -> str:
    """How few bytes keep an accuracy."""
    lines = [
        {
            "model": model,
            "recipe": recipe,
            "to keep, %": f"{float(target):g}",
            "bytes": round(size(own)),
            "test %": accuracy(own),
        }
        for (model, recipe, target), own in by(test_rows("headline"), "model", "recipe", "target").items()
    ]
    lines.sort(key=lambda line: (line["model"], line["bytes"]))
    return markdown_table(lines, list(lines[0])) + made("make headline", "headline")


def coders() -> str:
    """Bytes of the same codes by each coder, and how fast the slowest group decodes."""
    lines = []
    for (coder,), own in by(rows("coding"), "coder").items():
        speeds = [float(row["decode_symbols_per_second"]) for row in own if row["decode_symbols_per_second"]]
        total = sum(float(row["bytes"]) for row in own)
        lines.append({
            "coder": coder,
            "bytes of all groups": round(total),
            "decoding, M symbols/s": f"{min(speeds) / 1e6:.1f}" if speeds else "",
        })  # fmt: skip
    lines.sort(key=lambda line: line["bytes of all groups"])
    return markdown_table(lines, list(lines[0])) + made("python -m bench.coding --write docs/results", "coding")


def budgets() -> str:
    """What a budget of bytes costs on public networks, without training."""
    lines = []
    for row in test_rows("networks", method="allocated"):
        lost = f"{float(row['lost']):.2f} points" if row["unit"] == "points" else f"{float(row['lost']):.4f} nats"
        lines.append({
            "network": row["model"],
            "budget, bytes": round(float(row["budget"])),
            "file, bytes": int(row["bytes"]),
            "lost on test": lost,
        })  # fmt: skip
    lines.sort(key=lambda line: (line["network"], -line["file, bytes"]))
    return markdown_table(lines, list(lines[0])) + made("make networks", "networks")


def peers(network: str, most: str) -> str:
    """The smallest file of each tool that loses at most so much, chosen on test."""
    lines = []
    for (tool,), own in by((r for r in rows("peers") if r["network"] == network), "tool").items():
        good = [row for row in own if row["bytes"] and row["loss"] and float(row["loss"]) <= float(most)]
        best = min(good, key=lambda row: int(row["bytes"]), default=None)
        if best is not None and tool != "float32":
            lost = f"{float(best['loss']):.2f}" if best["unit"] == "%" else f"{float(best['loss']):.4f}"
            lines.append({"tool": tool, "setting": best["setting"], "bytes": int(best["bytes"]), "lost": lost})
    lines.sort(key=lambda line: line["bytes"])
    return markdown_table(lines, list(lines[0])) + made("make peers", "peers")


def at_accuracy(target: str) -> str:
    """MNIST: the smallest file on validation that keeps an accuracy, of every way there is; their test accuracy."""
    least = float(target)
    found: list[tuple[str, str, list[Row], str]] = []

    def best(name: str, source: str, candidates: Iterable[Row], key: Sequence[str]) -> None:
        kept = list(candidates)
        groups = by((row for row in kept if row["split"] == "validation"), *key)
        good = [k for k, own in groups.items() if fmean(float(r["accuracy"]) for r in own) >= least]
        tests = by((row for row in kept if row["split"] == "test"), *key)
        if good:
            chosen = min(good, key=lambda k: size(tests[k]))
            found.append((name, chosen[-1], tests[chosen], source))

    trained = [r for r in rows("mnist") if r["start"] == STRONG and r["training"] != "none" and r["method"] != "source"]
    best("fixed width, trained, best of 140 recipes", "mnist", trained, ["training", "method", "recipe"])
    scalars = [r for r in trained if r["family"] == "scalar"]
    best("fixed width, trained, scalar", "mnist", scalars, ["training", "method", "recipe"])
    of_mlp = [row for row in rows("family") if row["model"] == MNIST]
    for variation, name in (("rounded", "without data"), ("error feedback", "a few hundred inputs, no training")):
        done = [row for row in of_mlp if row["variation"] == variation]
        best(f"entropy-coded, {name}", "family", done, ["method", "recipe"])
    entropy = [row for row in rows("entropy") if row["model"] == MNIST]
    priced_ones = [row for row in entropy if "λ" in row["recipe"]]
    best("entropy-coded, trained with a price", "entropy", priced_ones, ["method", "recipe"])
    taught = [row for row in rows("headline") if row["model"] == MNIST and float(row["target"]) >= least]
    best("trained with a price and a teacher", "headline", taught, ["target", "recipe"])
    lines = [
        {"what is done": name, "recipe": recipe, "bytes": round(size(own)), "test %": accuracy(own), "from": source}
        for name, recipe, own, source in found
    ]
    lines.sort(key=lambda line: -line["bytes"])
    table = markdown_table(lines, list(lines[0]))
    return re.sub(r"\| (\w+) \|$", r"| [\1](RESULTS/\1.md) |", table, flags=re.MULTILINE).replace(
        "[from](RESULTS/from.md)", "from"
    )


def times() -> str:
    """What the studies take, by their own clocks."""
    lines = []
    for name, command in {
        "mnist": "make results", "headline": "make headline", "entropy": "make entropy", "family": "make family",
        "networks": "make networks", "rd": "bitbook rd",
    }.items():  # fmt: skip
        found = test_rows(name)
        minutes = sum(float(row["seconds"]) for row in found) / 60
        lines.append({"command": command, "writes": name, "results": len(found), "minutes of one core": round(minutes)})
    table = markdown_table(lines, list(lines[0]))
    return re.sub(r"\| (make \w+|bitbook rd) \| (\w+) \|", r"| `\1` | [\2](RESULTS/\2.md) |", table)


def section(name: str) -> str:
    """What stands in README.md between the comments "<name>: begin" and "<name>: end"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", text, re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no section {name!r}")
    return found[1]


JAPANESE = {
    "whole rows": "行全体",
    "whole columns": "列全体",
    "vectors of 2, 4, 8": "長さ 2・4・8 のベクトル",
    "float32 codewords": "符号語は float32",
    "16-bit codewords": "符号語は 16 ビット",
    "fused (2–8-bit codewords)": "融合（符号語は 2〜8 ビット）",
    "fused (5-bit codewords)": "融合（符号語は 5 ビット）",
    "scalar (weights only)": "スカラー量子化（重みのみ）",
    "mnist, start of 30 epochs, then 5 epochs, 5,000 held out": (
        "MNIST、30 エポック学習した後に量子化して 5 エポック、検証用に 5,000 枚"
    ),
}
SENTENCES = {
    r"(.+) need (.+) \((.+) to (.+)\) times the bytes of (.+) between (.+) and (.+) %": "「{0}」に必要なバイト数は「{4}」の {1} 倍（{2}〜{3}）（正解率 {5}〜{6} % で比較）",  # noqa: E501
    r"(.+) need (.+) % \((.+) to (.+) %\) fewer bytes than (.+) between (.+) and (.+) %": "「{0}」は「{4}」より {1} %（{2}〜{3} %）少ないバイト数で済む（正解率 {5}〜{6} % で比較）",  # noqa: E501
    r"(.+) need (.+) % \((.+) to (.+) %\) more bytes than (.+) between (.+) and (.+) %": "「{0}」は「{4}」より {1} %（{2}〜{3} %）多くのバイトが必要（正解率 {5}〜{6} % で比較）",  # noqa: E501
    r"(.+) and (.+) cannot be told apart between (.+) and (.+) %: (.+) % bytes \((.+) to (.+) %\)": "「{0}」と「{1}」の差は区別できない（{4} %、区間 {5}〜{6} %、正解率 {2}〜{3} % で比較）",  # noqa: E501
    r"(.+) % on validation is kept in (.+) B by (.+) \((.+) on test\)": "検証データで {0} % を保つ最小のファイルは {1} B：`{2}`（テストデータで {3} %）",  # noqa: E501
    r"float32 has (.+) on test in (.+) B": "float32 のままなら {1} B、テストデータで {0} %",
}


def answers_ja() -> str:
    """The answers of README.md in Japanese; raises `ValueError` for a sentence of a new kind."""
    text = ""
    for line in section("answers").splitlines():
        indent, _, said = line.partition("- ")
        if said.startswith("*"):
            text += f"- *{JAPANESE.get(said.strip('*'), said.strip('*'))}*\n"
        elif said and not line.startswith("**"):
            text += f"{indent}- {_japanese(said)}\n"
        elif line.startswith("**(a)"):
            text += "\n**(a) スカラー量子化とベクトル量子化それぞれの、サイズと正解率のトレードオフは？**\n\n"
        elif line.startswith("**(b)"):
            text += "\n**(b) セントロイドをスカラー量子化すると、さらに圧縮できるか？**\n\n"
    return text.lstrip("\n")


def _japanese(said: str) -> str:
    for pattern, sentence in SENTENCES.items():
        if found := re.fullmatch(pattern, said):
            return sentence.format(*(_name(group) for group in found.groups()))
    raise ValueError(f"answers_ja knows no sentence like {said!r}; add a pattern to SENTENCES")


def _name(text: str) -> str:
    return "、".join(JAPANESE.get(part, part) for part in re.split(r", (?=float32|16-bit|fused)", text))


TABLES: Mapping[str, Callable[..., str]] = {
    "family": family,
    "mnist": mnist,
    "rd": rd,
    "coded": coded,
    "priced": priced,
    "headline": headline,
    "coders": coders,
    "budgets": budgets,
    "peers": peers,
    "at-accuracy": at_accuracy,
    "times": times,
    "readme": section,
    "answers-ja": answers_ja,
}


def written(page: Path) -> str:
    """The page's text with every table computed anew."""
    results = os.path.relpath(DOCS / "results", page.parent)

    def table(found: re.Match[str]) -> str:
        text = TABLES[found[2]](*shlex.split(found[3]))
        return f"{found[1]}\n{text.strip().replace('RESULTS/', results + '/')}\n\n{found[4]}"

    return MARKED.sub(table, page.read_text(encoding="utf-8"))


def pages() -> list[Path]:
    """Every page that may hold a table."""
    return [ROOT / "README.ja.md", *sorted(DOCS.rglob("*.md"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables, or check them; returns an exit code."""
    parser = argparse.ArgumentParser(description="Write the tables of the documentation from docs/results/*.csv.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table is out of date")
    check = parser.parse_args(arguments).check
    stale = {page: text for page in pages() if (text := written(page)) != page.read_text(encoding="utf-8")}
    for page, text in stale.items():
        print(f"{page.relative_to(ROOT)}: {'out of date, run python docs/tables.py' if check else 'written'}")
        if not check:
            page.write_text(text, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
