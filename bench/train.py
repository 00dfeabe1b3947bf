"""Training times: a whole trial against the literal pipeline, a quantization-aware step against a float step.

Everything runs in one process. What is compared runs alternately, a ratio is taken between neighbours in time, and
the median over the repetitions is reported with their minimum and maximum. One thread is timed by what the processor
spends on it, so that other programs on a shared machine count little; several, by the clock. Without BITBOOK_DATA,
random images of MNIST's shape stand in for it: no time depends on the pixels.

    python -m bench.train [--json PATH] [--quick] [--threads 1] [--epochs 1]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Generator, Tensor, nn

import literal
from bitbook import (
    ECSQ,
    Activation,
    Binary,
    Codebook,
    FitOptions,
    Plan,
    Pricing,
    Ternary,
    Training,
    Uniform,
    quantize_,
)
from bitbook.data import load_mnist
from bitbook.data.mnist import pixels
from bitbook.loop import evaluate, run_epochs
from bitbook.models import build_model

Now = Callable[[], float]
"""Seconds since any fixed moment."""

MODEL = "mlp-784-128-64-10"
FLOAT_LR, TUNE_LR, EPOCHS = 0.1, 1e-3, 5  # the source material's
ROWS = (1, -1)
FOUR_BITS = Plan({"*.weight": Uniform(4)}, {"fc*": Activation(Uniform(4))})

STEPS: tuple[tuple[str, Plan, float | None], ...] = (  # name, plan, goal
    ("Uniform(4)", Plan({"*.weight": Uniform(4)}), 1.5),
    ("Uniform(4), inputs Uniform(4)", FOUR_BITS, None),
    ("Uniform(4) per row", Plan({"*.weight": Uniform(4, block=ROWS)}), None),
    ("Binary()", Plan({"*.weight": Binary()}), None),
    ("Ternary()", Plan({"*.weight": Ternary()}), None),
    ("rows 25 %", Plan({"*.weight": Codebook(0.25, ROWS)}), None),
    ("rows 25 %, fused 4 bits", Plan({"*.weight": Codebook(0.25, ROWS, Uniform(4))}), 2.0),
    ("vectors of 4, 64 codewords", Plan({"fc[12].weight": Codebook(64, (1, 4))}), None),
    ("vectors of 4, 64 codewords, fused 5 bits", Plan({"fc[12].weight": Codebook(64, (1, 4), Uniform(5))}), None),
)


@dataclass(frozen=True)
class Row:
    """One ratio: of times, over several repetitions."""

    what: str
    median: float
    least: float
    most: float
    goal: str
    met: bool | None
    seconds: tuple[float, float]
    """Medians of the two times."""

    @classmethod
    def of(
        cls, what: str, tops: Sequence[float], bottoms: Sequence[float], *, at_most: float | None = None,
        at_least: float | None = None,
    ) -> Row:  # fmt: skip
        ratios = [top / bottom for top, bottom in zip(tops, bottoms, strict=True)]
        median = statistics.median(ratios)
        goal, met = "", None
        if at_most is not None:
            goal, met = f"≤ {at_most:g}", median <= at_most
        elif at_least is not None:
            goal, met = f"≥ {at_least:g}", median >= at_least
        times = statistics.median(tops), statistics.median(bottoms)
        return cls(what, median, min(ratios), max(ratios), goal, met, times)

    def __str__(self) -> str:
        verdict = "" if self.met is None else "met" if self.met else "MISSED"
        return f"{self.what:<45}{self.median:7.2f}  {self.least:6.2f} – {self.most:6.2f}  {self.goal:>6} {verdict}"


@dataclass(frozen=True)
class Raw:
    """MNIST before any transform."""

    train: UInt8[np.ndarray, "train rows cols"]
    train_y: Int[Tensor, " train"]
    test: UInt8[np.ndarray, "test rows cols"]
    test_y: Int[Tensor, " test"]
    origin: str


def raw_images(train_size: int, test_size: int) -> Raw:
    if "BITBOOK_DATA" in os.environ:
        data = load_mnist()

        def undo(x: Tensor) -> UInt8[np.ndarray, "n rows cols"]:
            return (x + 1).mul(127.5).round().to(torch.uint8).view(-1, 28, 28).numpy()

        return Raw(
            undo(data.train_x[:train_size]), data.train_y[:train_size],
            undo(data.test_x[:test_size]), data.test_y[:test_size], "MNIST",
        )  # fmt: skip
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (train_size + test_size, 28, 28), np.uint8)
    labels = torch.from_numpy(random.integers(0, 10, len(images)))
    return Raw(
        images[:train_size], labels[:train_size], images[train_size:], labels[train_size:],
        "random images (BITBOOK_DATA is unset)",
    )  # fmt: skip


# -- a whole trial -----------------------------------------------------------------------------------------
@dataclass
class Parts:
    """Seconds of a trial's parts; float and quantization-aware training are `epochs` epochs each."""

    prepare: float = 0.0
    float_training: float = 0.0
    tuning: float = 0.0
    evaluation: float = 0.0

    def trial(self, epochs: int) -> float:
        """Seconds of a trial with the source's epochs, of which `epochs` were timed."""
        return self.prepare + self.evaluation + EPOCHS / epochs * (self.float_training + self.tuning)


def our_trial(raw: Raw, epochs: int, now: Now) -> Parts:
    parts, clock = Parts(), Stopwatch(now)
    train_x, test_x = pixels(raw.train), pixels(raw.test)
    model, generator = build_model(MODEL, seed=0), Generator().manual_seed(0)
    parts.prepare = clock()
    run_epochs(model, train_x, raw.train_y, Training(epochs, FLOAT_LR), generator=generator)
    parts.float_training = clock()
    evaluate(model, test_x, raw.test_y)
    parts.evaluation = clock()
    quantize_(model, FOUR_BITS)
    parts.prepare += clock()
    run_epochs(model, train_x, raw.train_y, Training(epochs, TUNE_LR), generator=generator)
    parts.tuning = clock()
    evaluate(model, test_x, raw.test_y)
    parts.evaluation += clock()
    return parts


def literal_trial(raw: Raw, epochs: int, now: Now) -> Parts:
    parts, clock = Parts(), Stopwatch(now)
    batches = literal.loader(raw.train, raw.train_y, shuffle=True)
    tests = literal.loader(raw.test, raw.test_y, shuffle=False)
    model = literal.Network()
    parts.prepare = clock()
    literal.train(model, batches, FLOAT_LR, epochs)
    parts.float_training = clock()
    literal.accuracy(model, tests)
    parts.evaluation = clock()
    literal.replace_layers(model, partial(literal.QuantizedLinear, bits=4, act_bits=4))
    parts.prepare += clock()
    literal.train(model, batches, TUNE_LR, epochs)
    parts.tuning = clock()
    literal.accuracy(model, tests)
    parts.evaluation += clock()
    return parts


class Stopwatch:
    """Seconds since the last call."""

    def __init__(self, now: Now) -> None:
        self.now, self.last = now, now()

    def __call__(self) -> float:
        before, self.last = self.last, self.now()
        return self.last - before


def time_trials(raw: Raw, epochs: int, repetitions: int, now: Now) -> list[Row]:
    few = Raw(raw.train[:640], raw.train_y[:640], raw.test[:64], raw.test_y[:64], raw.origin)
    literal_trial(few, 1, now)  # warm up
    our_trial(few, 1, now)
    literals, ours = [], []
    for _ in range(repetitions):
        literals.append(literal_trial(raw, epochs, now))
        ours.append(our_trial(raw, epochs, now))

    def row(what: str, seconds: Callable[[Parts], float], goal: float | None = None) -> Row:
        return Row.of(what, [seconds(p) for p in literals], [seconds(p) for p in ours], at_least=goal)

    return [
        row(f"trial, {EPOCHS} + {EPOCHS} epochs, 4/4 bits", lambda p: p.trial(epochs), 8.0),
        row("  float training", lambda p: p.float_training),
        row("  quantization-aware training", lambda p: p.tuning),
        row("  evaluation", lambda p: p.evaluation),
    ]


# -- a step ------------------------------------------------------------------------------------------------
def time_steps(repetitions: int, steps: int, now: Now) -> list[Row]:
    """Quantization-aware against float steps, in short blocks that alternate."""
    generator = Generator().manual_seed(0)
    x = torch.rand(64 * steps, 784, generator=generator) * 2 - 1
    y = torch.randint(10, (64 * steps,), generator=generator)
    model = build_model(MODEL, seed=0)

    def block(model: nn.Module) -> float:
        clock = Stopwatch(now)
        run_epochs(model, x, y, Training(1, TUNE_LR), generator=generator)
        return clock() / steps

    rows = []
    for name, plan, goal in STEPS:
        quantized = copy.deepcopy(model)
        quantize_(quantized, plan, options=FitOptions(iterations=25), generator=generator)
        block(model)  # warm up
        block(quantized)
        ours, floats = [], []
        for _ in range(repetitions):
            floats.append(block(model))
            ours.append(block(quantized))
        rows.append(Row.of(name, ours, floats, at_most=goal))
    return rows


def time_priced_steps(repetitions: int, steps: int, now: Now) -> list[Row]:
    """Steps with a price on bits against float steps, both with Adam at batch 256, in blocks that alternate."""
    generator = Generator().manual_seed(0)
    x = torch.rand(256, 784, generator=generator)
    y = torch.randint(10, (256,), generator=generator)

    def block(model: nn.Module, optimizer: torch.optim.Optimizer, pricing: Pricing | None) -> float:
        clock = Stopwatch(now)
        for _ in range(steps):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            if pricing is not None:
                pricing.add()
            optimizer.step()
            if pricing is not None:
                pricing.step()
        return clock() / steps

    rows = []
    weights = {"*.weight": ECSQ(3)}
    for name, plan in (("ECSQ(3)", weights), ("ECSQ(3), biases too", {**weights, "*.bias": ECSQ()})):
        model, priced = build_model(MODEL, seed=0), build_model(MODEL, seed=0)
        quantize_(priced, Plan(plan), options=FitOptions(step=0.1, iterations=0))
        every = 1 << 30
        both = [
            (net, torch.optim.Adam(net.parameters(), lr=1e-3, fused=True), pricing)
            for net, pricing in ((model, None), (priced, Pricing(priced, 1e-6, steps=every, smooth=0.0, ramp=0.0)))
        ]
        for each in both:
            block(*each)  # warm up
        times = [[block(*each) for each in both] for _ in range(repetitions)]
        rows.append(Row.of(name, [t[1] for t in times], [t[0] for t in times], at_most=2.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the ratios to this file")
    parser.add_argument("--quick", action="store_true", help="a tenth of the images, fewer repetitions")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument(
        "--epochs", type=int, default=1, choices=range(1, EPOCHS + 1),
        help=f"epochs to time of a trial's {EPOCHS} + {EPOCHS}; the others count as these (default: 1)",
    )  # fmt: skip
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    now = time.process_time if arguments.threads == 1 else time.perf_counter
    torch.manual_seed(0)  # the literal pipeline draws from the global generator
    share = 10 if arguments.quick else 1
    raw = raw_images(60_000 // share, 10_000 // share)

    print(f"{raw.origin}, torch {torch.__version__}, {arguments.threads} thread(s)")
    print(f"\nTime of the literal pipeline / ours; {arguments.epochs} of {EPOCHS} + {EPOCHS} epochs timed")
    trials = time_trials(raw, arguments.epochs, 2 if arguments.quick else 3, now)
    print(*trials, sep="\n")
    print("\nTime of a quantization-aware step / a float step, batch 64, 784-128-64-10")
    steps = time_steps(11 if arguments.quick else 61, steps=25, now=now)
    print(*steps, sep="\n")
    print("\nTime of a step with a price on bits / a float step, Adam, batch 256, rates counted every 60 steps")
    priced = time_priced_steps(5 if arguments.quick else 21, steps=60, now=now)
    print(*priced, sep="\n")

    if arguments.json is not None:
        result: dict[str, Any] = {
            "data": raw.origin,
            "images": len(raw.train),
            "epochs_timed": arguments.epochs,
            "threads": arguments.threads,
            "clock": now.__name__,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "literal_over_ours": [asdict(row) for row in trials],
            "quantized_over_float_step": [asdict(row) for row in steps],
            "priced_over_float_step": [asdict(row) for row in priced],
        }
        arguments.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
