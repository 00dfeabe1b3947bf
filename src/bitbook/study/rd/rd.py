"""Rate and distortion of every method on the same sources, by bytes really written.

    source ─► tensor ─► method at a target rate ─► Quantized ─► to_bytes ─► bits, mse, beside Shannon's bound

`METHODS` says what is compared; a method more is a line more.  A rate is that of the whole file: codes, codewords,
tables and header.  Methods with a parameter are brought to a target from below; methods of fixed rate have the rates
that they have.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Generator, Tensor

from bitbook.artifact import Artifact, to_bytes
from bitbook.coding.choose import Smallest
from bitbook.coding.coder import Coder
from bitbook.coding.fixed import Fixed
from bitbook.coding.rans import Rans
from bitbook.errors import BudgetError, PlanError
from bitbook.lattice.e8p import E8P
from bitbook.lattice.lattice import Lattice
from bitbook.quantizer import FitOptions, Quantized, Quantizer, quantize
from bitbook.rate.encoding import quantize_priced
from bitbook.rate.memoryless import quantize_memoryless
from bitbook.scalar.ecsq import ECSQ
from bitbook.scalar.leaves import Float
from bitbook.study.tables import markdown_table
from bitbook.theory.highrate import decibels
from bitbook.theory.shannon import DistortionRate, distortion_rate
from bitbook.theory.sources import Gauss, Laplace, Measured, Source, StudentT
from bitbook.trellis.tcq import TCQ
from bitbook.trellis.trellis import Trellis
from bitbook.vector.codebook import Codebook

TARGETS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
"""Bits per sample."""

COLUMNS = ("source", "method", "bits", "mse", "bytes", "samples", "seconds", "target", "seed", "code_bytes", "variance")
_COLUMNS_OF_SAMPLES = 1000  # a draw is a matrix of rows of this length
_NEAR = 0.02  # of the target: codebooks that lose codewords fall in jumps
_PROBED = 1 << 17  # samples of the first part of a search
_MOST_CODEWORDS = 1 << 10  # under a price, where every round compares every vector with all of them
_FLOATS = Float("bfloat16")


# -- methods -----------------------------------------------------------------------------------
class Method(Protocol):
    """Something that turns a tensor into codes at about some rate."""

    @property
    def name(self) -> str: ...

    @property
    def fixed(self) -> bool:
        """Whether its codes are packed at fixed width."""
        ...

    def rates(self, count: int, targets: Sequence[float]) -> Sequence[float]:
        """The targets that make sense for `count` samples; a method of fixed rate has its own."""
        ...


@dataclass(frozen=True)
class FixedRate:
    """Recipes by their bits per sample."""

    name: str
    recipes: Mapping[float, Quantizer]
    fixed = True

    def rates(self, count: int, targets: Sequence[float]) -> Sequence[float]:
        within = [rate for rate in self.recipes if min(targets) <= rate <= max(targets)]
        return [rate for rate in within if _affordable(self.recipes[rate], rate, count)]


@dataclass(frozen=True)
class Searched:
    """A family with one parameter, over which the rate falls."""

    name: str
    quantize: Callable[[Tensor, float, float, Generator], Quantized]
    """From a tensor, the parameter, the target that is searched, and what k-means draws from."""
    start: float
    """The parameter near one bit a sample, for unit variance."""
    fall: float
    """Bits by which the rate falls when the parameter doubles, about."""
    most: Callable[[int], float] = lambda count: math.inf
    """The greatest target for so many samples."""
    tolerance: float = 0.0003
    """By this share a rate may be below its target, where it moves smoothly."""
    coder: Coder | None = None
    """For codes that are sorted for a coder that learns; None: the source's own."""
    fixed = False

    def rates(self, count: int, targets: Sequence[float]) -> Sequence[float]:
        return [target for target in targets if target <= self.most(count)]


def stepped(name: str, recipe: Quantizer, price: float = 0.0, coder: Coder | None = None) -> Searched:
    """Over the step; a bit is priced at `price · step²`.  At high rate, D = step² / 12 asks for ln 2 / 6 = 0.116."""

    def run(w: Tensor, step: float, target: float, generator: Generator) -> Quantized:
        options = FitOptions(step=step, iterations=0)
        if not price:
            return quantize(recipe, w, options=options, generator=generator)
        return quantize_memoryless(recipe, w, price * step**2, options=options, generator=generator)

    return Searched(name, run, start=1.8, fall=1.0, coder=coder)


def path(name: str, states: int) -> Searched:
    """An entropy-coded trellis over the step, with bits in its metric."""
    recipe = Trellis(states, 8)

    def run(w: Tensor, step: float, target: float, generator: Generator) -> Quantized:
        options = FitOptions(step=step, iterations=0)
        return quantize_priced(recipe, w, recipe.price_of_step * step**2, options=options, rounds=10)

    return Searched(name, run, start=1.05, fall=1.0, tolerance=0.001)


def priced_codebook(name: str, d: int) -> Searched:
    """Entropy-constrained vectors of `d` samples (Chou, Lookabaugh & Gray 1989), over the price of a bit."""

    def size(count: int, target: float) -> int:
        # Some three times as many as the rate could tell apart: the price empties what is too much.
        wanted = 2 ** math.ceil(d * target + 1.5)
        return int(min(wanted, _MOST_CODEWORDS, _codewords_for(count, d, target)))

    def run(w: Tensor, lam: float, target: float, generator: Generator) -> Quantized:
        options = FitOptions(iterations=20)
        recipe = Codebook(size(w.numel(), target), (1, d), _FLOATS, pad=True)
        return quantize_memoryless(recipe, w, lam, options=options, generator=generator)

    def most(count: int) -> float:
        # Where k-means alone would hardly be above the target, there is nothing for a price to take.
        return max((t / 8 for t in range(1, 41) if math.log2(size(count, t / 8)) / d >= t / 8 + 0.5 / d), default=0.0)

    return Searched(name, run, start=0.3, fall=0.5, most=most, tolerance=0.002)


def _codewords_for(count: int, d: int, rate: float) -> int:
    """As many as take an eighth of the bytes at this rate."""
    return max(int(count * rate / 8 / (16 * d)), 2)


def _affordable(recipe: Quantizer, rate: float, count: int) -> bool:
    if not isinstance(recipe, Codebook) or not isinstance(recipe.size, int):
        return True
    return recipe.size <= max(16, _codewords_for(count, recipe.block[1], rate) * 2)


def _books(d: int, sizes: Iterable[int]) -> dict[float, Quantizer]:
    return {math.log2(size) / d: Codebook(size, (1, d), _FLOATS, pad=True) for size in sizes}


METHODS: tuple[Method, ...] = (
    FixedRate("Lloyd–Max", _books(1, (2, 3, 4, 6, 8, 12, 16))),
    FixedRate("k-means, d=2", _books(2, (2, 4, 8, 16, 32, 64, 128, 256))),
    FixedRate("k-means, d=4", _books(4, (4, 16, 64, 256, 1024, 4096))),
    FixedRate("k-means, d=8", _books(8, (4, 16, 64, 256, 1024, 4096))),
    FixedRate("E8P", {2.0: E8P()}),
    FixedRate("TCQ, 8 states", {float(bits): TCQ(bits, 8) for bits in (1, 2, 3, 4)}),
    FixedRate("TCQ, 256 states", {float(bits): TCQ(bits, 256) for bits in (1, 2, 3, 4)}),
    stepped("ECSQ", ECSQ(3, points=Float()), price=0.116),
    stepped("lattice E8, coded", Lattice("E8"), coder=Smallest()),
    path("trellis, coded, 8 states", 8),
    path("trellis, coded, 256 states", 256),
    priced_codebook("k-means, coded, d=2", 2),
    priced_codebook("k-means, coded, d=4", 4),
    priced_codebook("k-means, coded, d=8", 8),
)
"""What is compared, in the order of tables and legends."""


# -- measuring ---------------------------------------------------------------------------------
class Written(NamedTuple):
    """What a file of one tensor came to."""

    bits: float
    """Of the whole file, per sample."""
    mse: float
    """Per sample, in squared units of the tensor."""
    bytes: int
    code_bytes: int
    """Of the tensor's own codes; all others are codewords, tables beside them, and the header."""


def written(quantized: Quantized, w: Tensor, coder: Coder) -> Written:
    """Write a file of one tensor, and compare what it stands for with `w`."""
    data, ledger = to_bytes(Artifact({"w": quantized}), coder)
    own = {spec.name for spec in quantized.recipe.layout(quantized.shape)}
    codes = sum(row.bytes for row in ledger.rows if row.tensor == "w" and row.part in own)
    mse = float((quantized.decode() - w).double().square().mean())
    return Written(8 * len(data) / w.numel(), mse, len(data), codes)


def measure(method: Method, w: Tensor, target: float, coder: Coder, generator: Generator) -> Written:
    """Bring a method to a target rate, and write it; raises `BudgetError` where it does not come near."""
    if isinstance(method, FixedRate):
        return written(quantize(method.recipes[target], w, options=_FIXED_FIT, generator=generator), w, Fixed())
    assert isinstance(method, Searched)
    state = generator.get_state()

    def run(part: Tensor, parameter: float, coder: Coder) -> Written:
        generator.set_state(state)  # one fit for all parameters, so that the rate is smooth in them
        return written(method.quantize(part, parameter, target, generator), part, method.coder or coder)

    return search(run, method, w, target, coder)


_FIXED_FIT = FitOptions(iterations=30)


def search(
    run: Callable[[Tensor, float, Coder], Written], method: Searched, w: Tensor, target: float, coder: Coder
) -> Written:
    """The highest rate found below the target: on a part of the tensor first, then on all of it."""
    deviation = float(w.double().square().mean().sqrt())
    # A step has the unit of the weights, a price of a bit its square.
    unit = deviation if method.fall == 1.0 else deviation**2
    log_parameter = math.log2(method.start * unit) + (1 - target) / method.fall
    rows = max(_PROBED // w[0].numel(), 1)
    slope = -method.fall
    if len(w) >= 2 * rows:
        log_parameter, slope = _walk(lambda x: run(w[:rows], 2**x, Rans()), log_parameter, slope, target, 0.01)[1:]
    found = _walk(lambda x: run(w, 2**x, coder), log_parameter, slope, target, method.tolerance)[0]
    if found is None:
        raise BudgetError(f"{method.name} does not come within {_NEAR:.0%} below {target} bits per sample")
    return found


def _walk(
    run: Callable[[float], Written], x: float, slope: float, target: float, tolerance: float, steps: int = 12
) -> tuple[Written | None, float, float]:
    """Regula falsi for the rate over the logarithm of the parameter; the best below, where it was, and the slope."""
    aim = target * (1 - tolerance / 2)
    best: Written | None = None
    below: tuple[float, float] | None = None
    above: tuple[float, float] | None = None
    for _ in range(steps):
        found = run(x)
        if found.bits <= target and (best is None or found.bits > best.bits):
            best = found
        if target * (1 - tolerance) <= found.bits <= target:
            return best, x, slope
        if found.bits > target:
            above = (x, found.bits)
        else:
            below = (x, found.bits)
        if above is not None and below is not None:
            if abs(above[0] - below[0]) < 1e-7:
                break
            slope = (above[1] - below[1]) / (above[0] - below[0])
            share = (above[1] - aim) / (above[1] - below[1])
            x = above[0] + min(max(share, 0.02), 0.98) * (below[0] - above[0])
        else:
            x += max(min((aim - found.bits) / slope, 3.0), -3.0)
    close = best is not None and best.bits >= target * (1 - _NEAR)
    return (best if close else None), x, slope


@dataclass(frozen=True, eq=False)
class Subject:
    """A source, what was drawn from it for each seed, and the coder that its codes deserve."""

    source: Source
    draw: Callable[[int], Tensor]
    coder: Coder
    repeats: bool
    """Whether another seed gives other samples."""


def drawn(source: Gauss | Laplace | StudentT, samples: int) -> Subject:
    """Independent samples, a matrix of rows of 1,000; contexts could not help, so `Rans` writes them.

    Samples of Gauss and Laplace are scaled to a mean square of exactly one, so that errors scatter as methods do and
    not as variances; of Student-t a single sample may move that, and the others should not pay for it.
    """
    if samples < 1000 or samples % _COLUMNS_OF_SAMPLES:
        raise PlanError(f"samples={samples}: use a multiple of {_COLUMNS_OF_SAMPLES:,}")

    def draw(seed: int) -> Tensor:
        generator = Generator().manual_seed(1000 + seed)
        w = source.sample(samples, generator).reshape(-1, _COLUMNS_OF_SAMPLES)
        return w if isinstance(source, StudentT) else w / w.double().square().mean().sqrt().float()

    return Subject(source, draw, Rans(), repeats=True)


def tensor(name: str, w: Tensor, samples: int) -> Subject:
    """A tensor's first rows, up to so many weights; the bound is that of its histogram, of coders without contexts."""
    matrix = w.detach().float().reshape(len(w), -1)
    matrix = matrix[: max(samples // matrix.shape[1], 1)]
    return Subject(Measured(name, matrix), lambda seed: matrix, Smallest(), repeats=False)


SOURCES = (Gauss(), Laplace(), StudentT(5))


def rows(
    subject: Subject,
    targets: Sequence[float],
    seeds: int,
    methods: Sequence[Method],
    done: Callable[[Mapping[str, Any]], bool],
) -> Iterator[dict[str, Any]]:
    """One row for each method, target and seed that is not `done`."""
    for seed in range(seeds):
        w = subject.draw(seed)
        variance = 1.0 if not isinstance(subject.source, Measured) else subject.source.variance
        for method in methods:
            for target in method.rates(w.numel(), targets):
                key = {"source": subject.source.name, "method": method.name, "target": target, "seed": seed}
                if done({**key, "samples": w.numel()}):
                    continue
                started = time.perf_counter()
                try:
                    found = measure(method, w, target, subject.coder, Generator().manual_seed(seed))
                except BudgetError:
                    continue
                yield {
                    **key, "bits": found.bits, "mse": found.mse / variance, "bytes": found.bytes,
                    "samples": w.numel(), "seconds": time.perf_counter() - started, "code_bytes": found.code_bytes,
                    "variance": variance,
                }  # fmt: skip


# -- a table of rows ---------------------------------------------------------------------------
class Rows:
    """A CSV file that grows by a row at a time; what it holds is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            with open(path, encoding="utf-8", newline="") as file:
                self.rows = [_typed(row) for row in csv.DictReader(file)]
        else:
            with open(path, "w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(COLUMNS)
        self._known = {_key(row) for row in self.rows}

    def __contains__(self, row: Mapping[str, Any]) -> bool:
        return _key(row) in self._known

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row to the file; what is kept is what the file says."""
        texts = {column: _text(row[column]) for column in COLUMNS}
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(texts.values())
        self.rows.append(_typed(texts))
        self._known.add(_key(row))


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["source"], row["method"], round(float(row["target"]), 4), int(row["seed"]), int(row["samples"]))


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _typed(row: Mapping[str, str]) -> dict[str, Any]:
    if set(row) != set(COLUMNS):
        raise PlanError(f"the table has the columns {', '.join(map(str, row))}; rename it, or write to another folder")
    whole = ("bytes", "samples", "seed", "code_bytes")
    return {
        name: value if name in ("source", "method") else int(value) if name in whole else float(value)
        for name, value in row.items()
    }


class Point(NamedTuple):
    """A method at a rate on a source, mean over seeds."""

    source: str
    method: str
    target: float
    bits: float
    mse: float
    spread: float
    """Half the range of the mean squared errors, in parts of their mean."""
    above: float
    """dB above the bound at these bits."""
    bytes: int
    side_share: float
    """Share of the bytes that are no codes."""
    seconds: float


def summarised(found: Sequence[Mapping[str, Any]], bounds: Mapping[str, DistortionRate]) -> list[Point]:
    """Rows of several seeds as one point each."""
    groups: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["source"], row["method"], round(row["target"], 4)), []).append(row)
    result = []
    for (source, method, target), group in groups.items():
        mean = {name: sum(row[name] for row in group) / len(group) for name in ("bits", "mse", "bytes", "seconds")}
        errors = [row["mse"] for row in group]
        bound = bounds[source](mean["bits"]) / bounds[source](0.0)
        side = 1 - sum(row["code_bytes"] for row in group) / sum(row["bytes"] for row in group)
        spread = (max(errors) - min(errors)) / 2 / mean["mse"] if mean["mse"] else 0.0
        result.append(
            Point(
                source, method, target, mean["bits"], mean["mse"], spread, decibels(mean["mse"] / bound),
                round(mean["bytes"]), side, mean["seconds"],
            )
        )  # fmt: skip
    return result


def bound_of(subject: Subject, targets: Sequence[float]) -> DistortionRate:
    """Shannon's bound for all rates that come up."""
    return distortion_rate(subject.source, max(targets) + 0.25)


def document(points: Sequence[Point], bounds: Mapping[str, DistortionRate], *, command: str, picture: str) -> str:
    """The measurements in words and tables."""
    sections = "\n".join(_section(name, [p for p in points if p.source == name], bounds[name]) for name in bounds)
    return f"""# Rate and distortion, by bytes written

Made by `{command}`; every row is in [rd.csv](rd.csv).

Bits are those of the whole file per sample, with codewords, tables and header; the mean squared error is in units of
the source's variance. "Above" is the distance to Shannon's bound D(R) at exactly these bits; 6.02 dB are one bit.
For a tensor the bound is that of independent draws from its histogram. Coders that see neighbours may go below it.
"Side" is the share of the file that is no code. Entropy-coded methods were brought to some hundredths of a percent
below each rate, or {_NEAR:.0%} where codebooks lose codewords in jumps; methods of fixed rate have the rates they have.

![Distance to the bound]({picture})
{sections}"""


def _section(name: str, points: Sequence[Point], bound: DistortionRate) -> str:
    table = [
        {
            "method": p.method,
            "bits": f"{p.bits:.3f}",
            "mse": f"{p.mse:.5f}" + (f" ± {100 * p.spread:.1f} %" if p.spread else ""),
            "bound": f"{bound(p.bits) / bound(0.0):.5f}",
            "above, dB": p.above,
            "bytes": p.bytes,
            "side, %": 100 * p.side_share,
        }
        for p in points
    ]
    best = "\n".join(
        _best(points, target) for target in (1.0, 2.0, 3.0, 4.0) if any(p.target == target for p in points)
    )
    return f"\n## {name}\n\n{best}\n\n{markdown_table(table, list(table[0])) if table else 'Nothing was measured.'}"


def _best(points: Sequence[Point], target: float) -> str:
    """The method nearest to the bound at a rate."""
    near = [p for p in points if abs(p.bits - target) < 0.1]
    if not near:
        return ""
    p = min(near, key=lambda p: p.above)
    return f"- At {target:g} bit{'s' * (target != 1)}, {p.method} is nearest to the bound: {p.above:.2f} dB above it."
