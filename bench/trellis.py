"""Speeds of trellis-coded quantization, one thread: `python -m bench.trellis [--json PATH] [--samples 1000000]`.

Encoding is one search for the best path with bits in its metric, as `Trellis.encode_priced` runs it; decoding is from
bytes to weights: rANS beside the machine, then the levels' values.  Times are what the processor spends, the best of
three; beside each, the same of `ECSQ` in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator

from bitbook import ECSQ, FitOptions, Quantized, Quantizer, Trellis, quantize_priced
from bitbook.coding.rans import Rans
from bitbook.quantizer import Price, StreamSpec
from bitbook.rate.rates import fit_rates

LAM, STEP = 0.1, 0.53  # about two bits a weight of unit Gauss
GOALS = {("encode", 8): 5.0, ("encode", 256): 0.3, ("decode", 8): 50.0, ("decode", 256): 50.0}
"""Million weights a second."""


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds, the best of three after one that compiles."""
    work()
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def speeds(recipe: Quantizer, w: torch.Tensor) -> dict[str, float]:
    """Million weights a second, encoding and decoding."""
    q: Quantized = quantize_priced(recipe, w, LAM, options=FitOptions(step=STEP), rounds=3)
    side = {name: stored.decode() for name, stored in q.side.items()}
    (spec,) = q.recipe.layout(q.shape)
    price = Price(LAM, {spec.name: fit_rates(spec, q.codes["codes"])})
    data = Rans().encode(list(q.streams())[-1:])

    def decode(spec: StreamSpec = spec) -> torch.Tensor:
        (codes,) = Rans().decode(data, [spec])
        return q.recipe.decode({"codes": codes}, side, q.shape)

    assert torch.equal(decode(), q.decode())
    encoding = seconds(lambda: q.recipe.encode_priced(w, side, price))
    return {"encode": w.numel() / encoding / 1e6, "decode": w.numel() / seconds(decode) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the speeds to this file")
    parser.add_argument("--samples", type=int, default=1_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    w = torch.randn(arguments.samples // 1000, 1000, generator=Generator().manual_seed(0))
    found = []
    for recipe, states in ((ECSQ(4), 1), (Trellis(8, 4), 8), (Trellis(256, 4), 256)):
        for what, speed in speeds(recipe, w).items():
            goal = GOALS.get((what, states))
            verdict = "" if goal is None else f"≥ {goal:g} {'met' if speed >= goal else 'MISSED'}"
            print(f"{what} {recipe!r:<32}{speed:8.2f} M weights/s  {verdict}")
            found.append({"what": what, "recipe": repr(recipe), "million_per_second": speed, "goal": goal})
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
