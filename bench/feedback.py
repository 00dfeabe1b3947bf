"""What error feedback does at equal bytes, on inputs that it was not calibrated on.

    python -m bench.feedback [mnist] [resnet]

Output error is E‖(ŵ - w)x‖² / E‖wx‖² of one layer on held-out inputs; bytes are those of the file that holds it.  The
reference is rounding to the nearest level: at each size, the step of the least held-out error, interpolated.
Data: BITBOOK_DATA names a folder with mnist/ and, for the second part, cifar10/, models/ and load.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.feedback.test_error_feedback import gptq
from torch import Generator, Tensor, nn

from bitbook import (
    ECSQ,
    Artifact,
    Codebook,
    ErrorFeedback,
    FitOptions,
    Pruned,
    Quantized,
    Training,
    Uniform,
    quantize,
    quantize_priced,
    run_epochs,
    second_moments,
)
from bitbook.artifact import to_bytes
from bitbook.data import load_dataset
from bitbook.models import build_model

Moments = Tensor
CALIBRATION = 4096
COLUMNS = ECSQ(1, (-1, 1), points=Uniform(8))  # a step for each column, by what the others cannot make up for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="mnist, resnet; default: both, where their data are")
    chosen = parser.parse_args().parts or ["mnist", "resnet"]
    torch.set_num_threads(1)
    if "mnist" in chosen:
        layer("MNIST, first layer of mlp-784-128-64-10", *mnist())
    if "resnet" in chosen:
        layer("CIFAR-10, layer2.1.conv1 of ResNet-20", *resnet())


def layer(title: str, w: Tensor, seen: Moments, held_out: Moments) -> None:
    """One table: every recipe with and without feedback."""
    energy = output_error(torch.zeros_like(w), w, held_out)

    def measure(q: Quantized) -> tuple[int, float]:
        return size(q), output_error(q.decode(), w, held_out) / energy

    rms = float(w.square().mean().sqrt())
    steps = [rms * 2 ** (k / 6) for k in range(-15, 22)]
    rounding = best_of(measure(quantize(ECSQ(), w, options=FitOptions(step=step))) for step in steps)
    print(f"\n{title}: {w.numel():,} weights")
    print("| recipe | bytes | output error | rounding at these bytes | ratio | seconds |")
    print("|---|---|---|---|---|---|")

    def row(name: str, make: Callable[[], Quantized]) -> None:
        start = time.perf_counter()
        bytes, error = measure(make())
        seconds = time.perf_counter() - start
        reference = interpolated(rounding, bytes)
        print(
            f"| {name} | {bytes:,} | {error:.3g} | {reference:.3g} | {error / reference:.3f} | {seconds:.1f} |",
            flush=True,
        )

    for k in (-4, 0, 4):
        options = FitOptions(step=rms * 2 ** (k / 4))
        for recipe in (ECSQ(), COLUMNS):
            row(f"{recipe!r}, step {options.step:.3g}, feedback", partial(encoded, recipe, w, seen, options))
    scale = output_error(torch.zeros_like(w), w, seen) / w.numel()
    for share in (0.003, 0.01, 0.03, 0.1, 0.3):
        lam = share * scale
        row(f"ECSQ(), λ {lam:.2g}, no feedback", partial(priced_alone, w, lam, seen))
        row(f"ECSQ(), λ {lam:.2g}, feedback", partial(priced, ECSQ(), w, lam, seen))
        row(f"{COLUMNS!r}, λ {lam:.2g}, feedback", partial(priced, COLUMNS, w, lam, seen))
    for bits in (2, 3, 4):
        recipe = Uniform(bits, (1, -1))
        row(f"{recipe!r}, textbook GPTQ", partial(textbook, bits, w, seen))
        row(f"{recipe!r}, feedback", partial(encoded, recipe, w, seen, FitOptions()))
    for recipe in (Uniform(4), Uniform(3), Uniform(2), Codebook(256, (1, 4)), Pruned(0.2, ECSQ())):
        row(f"{recipe!r}", partial(quantize, recipe, w, generator=Generator().manual_seed(0)))
        row(f"{recipe!r}, feedback", partial(encoded, recipe, w, seen, FitOptions()))


def encoded(recipe: Any, w: Tensor, moments: Moments, options: FitOptions) -> Quantized:
    generator = Generator().manual_seed(0)
    return quantize(recipe, w, encoder=ErrorFeedback(moments), options=options, generator=generator)


def priced(recipe: Any, w: Tensor, lam: float, moments: Moments) -> Quantized:
    return quantize_priced(recipe, w, lam, encoder=ErrorFeedback(moments))


def priced_alone(w: Tensor, lam: float, moments: Moments) -> Quantized:
    """Plain squared errors, at the mean of what a unit of them costs, and the step that is best at high rate."""
    per_error = lam / float(moments.diagonal(dim1=1, dim2=2).mean())
    return quantize_priced(ECSQ(), w, per_error, options=FitOptions(step=math.sqrt(6 * per_error / math.log(2))))


def best_of(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """By size, without those that a smaller file beats."""
    kept: list[tuple[int, float]] = []
    for bytes, error in sorted(points):
        if not kept or error < kept[-1][1]:
            kept.append((bytes, error))
    return kept


def textbook(bits: int, w: Tensor, moments: Moments) -> Quantized:
    """GPTQ as it was published, at the same scales as `Uniform(bits, (1, -1))`: the tests' reference."""
    q = quantize(Uniform(bits, (1, -1)), w)
    scale = q.side["scale"].decode()[:, 0].double()
    codes = gptq(w.reshape(len(w), -1), moments[0], scale, 2 ** (bits - 1) - 1)
    return replace(q, codes={"codes": (codes + 2 ** (bits - 1) - 1).to(torch.uint8)})


def interpolated(points: list[tuple[int, float]], bytes: int) -> float:
    """The error at a size between two measured ones, on a logarithmic axis; the nearest beyond both ends."""
    lower = max((p for p in points if p[0] <= bytes), default=points[0])
    upper = min((p for p in points if p[0] >= bytes), default=points[-1])
    if lower[0] == upper[0]:
        return lower[1]
    share = (bytes - lower[0]) / (upper[0] - lower[0])
    return math.exp((1 - share) * math.log(lower[1]) + share * math.log(upper[1]))


def output_error(decoded: Tensor, w: Tensor, moments: Moments) -> float:
    error = (decoded - w).double().reshape(len(moments), -1, moments.shape[-1])
    return float(((error @ moments) * error).sum())


def size(q: Quantized) -> int:
    return len(to_bytes(Artifact({"w": q}))[0])


def mnist() -> tuple[Tensor, Moments, Moments]:
    data = load_dataset("mnist")
    model = build_model("mlp-784-128-64-10", seed=0)
    training = Training(4, 0.05, 128, 0.9, "cosine")
    run_epochs(model, data.train_x, data.train_y, training, generator=Generator().manual_seed(0))
    return both(model, next(n for n, p in model.named_parameters() if p.dim() == 2), data.train_x, data.test_x)


def resnet() -> tuple[Tensor, Moments, Moments]:
    folder = Path(os.environ["BITBOOK_DATA"])
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    model = load.resnet(str(folder / "models" / "resnet20_cifar10.safetensors"))
    seen, held_out = (
        load.resnet_input(load.images(str(folder / "cifar10" / f"{n}.npz"))[0][:512])
        for n in ("data_batch_1", "test_batch")
    )
    return both(model, "layer2.1.conv1.weight", seen, held_out)


def both(model: nn.Module, name: str, seen: Tensor, held_out: Tensor) -> tuple[Tensor, Moments, Moments]:
    w = model.get_parameter(name).detach()
    first, second = (second_moments(model, [x[:CALIBRATION]], [name])[name] for x in (seen, held_out))
    return w, first, second


if __name__ == "__main__":
    sys.exit(main())
