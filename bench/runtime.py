"""Running from packed codes: latency, resident memory and loading, beside dense float32 and other tools.

    python -m bench.runtime [--threads 1 2] [--seconds 1] [--cases mlp ...] [--write docs/results]

All ways of a case run in one process, one after the other in every round, and ratios are those of a round: a time over
that of dense float32; medians over the rounds are reported.  With one thread, times are of the processor, otherwise of
the clock.  "In cache" runs one layer again and again; "out of cache" goes around so many copies of each that no cache
holds them.  torchao and ONNX Runtime are put into `.bench/runtime`; what
does not install or run is a row that says why.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench.peers.environments import environment, shown
from torch import Tensor, nn

import bitbook
from bitbook import (
    ECSQ,
    NF4,
    Activation,
    Artifact,
    Codebook,
    Plan,
    Quantized,
    Quantizer,
    Residual,
    Rotated,
    Table,
    Uniform,
)
from bitbook.artifact import QuantizedInput
from bitbook.coding.coder import Coder
from bitbook.coding.fixed import Fixed
from bitbook.coding.rans import Rans
from bitbook.models import build_model
from bitbook.quantizer import FitOptions, quantize
from bitbook.runtime import books, restore_packed

PEERS = ("torchao==0.18.0", "onnxruntime==1.27.0", "onnx==1.22.0")
BATCHES = (1, 8, 64, 256)
DENSE = "dense float32"
BEYOND_CACHES = 160_000_000  # bytes of copies that no cache keeps
SMALL_FILE = 4_000  # bytes
TOO_SLOW = 30  # times dense float32: a way that is not timed
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of runtime.csv; without a time it says why there is none."""

    case: str
    way: str
    batch: int
    threads: int
    milliseconds: float | None
    ratio_to_dense: float | None
    resident_bytes: int | None
    reason: str = ""


class Way(NamedTuple):
    """A model that computes a case, or why there is none."""

    name: str
    run: Callable[[Tensor], object] | None
    bytes: int | None
    reason: str = ""


class Case(NamedTuple):
    """What is computed, by a fresh module, and the recipes that it is tried with."""

    name: str
    make: Callable[[], nn.Module]
    inputs: int
    recipes: Mapping[str, Plan]
    copied: bool
    """Out of cache: copies of each way, gone around."""


# -- cases and ways ----------------------------------------------------------------------------------------


def layer_plans() -> dict[str, Plan]:
    """Recipes of a layer; with a name, the weights' bits."""
    recipes: dict[str, Quantizer] = {
        **{f"{bits} bits": Uniform(bits, (1, -1)) for bits in (2, 3, 4, 8)},
        "4 bits, groups of 64": Uniform(4, (1, 64), scale=bitbook.Float("bfloat16")),
        "NF4, groups of 64": Table(NF4, (1, 64), scale=bitbook.Float("bfloat16")),
        "ECSQ": ECSQ(1, (1, -1)),
        "pairs, 16 codewords": Codebook(16, (1, 2)),
        "fours, 256 codewords": Codebook(256, (1, 4)),
        "rows, 25 %": Codebook(0.25, (1, -1)),
        "rotated, 4 bits": Rotated(Uniform(4, (1, -1))),
        "two stages of fours (the reference)": Residual((Codebook(256, (1, 4)), Uniform(2, (1, -1)))),
    }
    plans = {name: Plan({"weight": recipe}) for name, recipe in recipes.items()}
    for bits in (4, 8):
        plans[f"{bits} bits, int8 input"] = Plan({"weight": Uniform(bits, (1, -1))}, {"": Activation(Uniform(8))})
    return plans


def mlp_plans() -> dict[str, Plan]:
    rows = {"fc3.weight": None, "*.weight": Codebook(0.25, (1, -1))}
    inputs = {name: Activation(Uniform(8)) for name in ("fc1", "fc2", "fc3")}
    return {
        "rows, 25 %, output dense": Plan(rows),
        "rows, 25 %, in 5 bits, output dense": Plan(
            {**rows, "*.weight": Codebook(0.25, (1, -1), centroids=Uniform(5))}
        ),
        "2 bits": Plan({"*.weight": Uniform(2, (1, -1))}),
        "4 bits": Plan({"*.weight": Uniform(4, (1, -1))}),
        "8 bits, int8 input": Plan({"*.weight": Uniform(8, (1, -1))}, inputs),
    }


def linear(rows: int, cols: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(cols, rows)


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("mlp", lambda: build_model("mlp-784-128-64-10", seed=0), 784, mlp_plans(), False),
        Case("2048 × 2048, in cache", lambda: linear(2048, 2048), 2048, layer_plans(), False),
        Case("4096 × 11008, out of cache", lambda: linear(4096, 11008), 11008, layer_plans(), True),
    )
}


def ways(case: Case, threads: int) -> Iterator[Way]:
    """Every way to compute a case, dense first."""
    dense = case.make().eval()
    yield Way(DENSE, dense, _bytes(dense))
    for name, plan in case.recipes.items():
        packed = restore_packed(artifact(dense, plan), copy.deepcopy(dense)).eval()
        yield Way(f"bitbook, {name}", packed, bitbook.residence(packed).bytes)
    for name, made in PEER_WAYS.items():
        try:
            yield made(name, dense, threads)
        except Exception as error:  # whatever a peer raises is its row's reason
            yield Way(name, None, None, shown(f"{type(error).__name__}: {error}"))


def artifact(dense: nn.Module, plan: Plan) -> Artifact:
    """The weights by the plan; codes and codewords of codebooks, whose fit would take long, are arbitrary."""
    tensors: dict[str, Quantized | Tensor] = dict(dense.state_dict())
    for name, recipe in plan.recipes([n for n, _ in dense.named_parameters()]).items():
        if recipe is not None:
            w = tensors[name]
            assert isinstance(w, Tensor)
            tensors[name] = (
                quantize(recipe, w) if not isinstance(recipe, Codebook | Residual) else _arbitrary(recipe, w)
            )
    names = [name for name, _ in dense.named_modules()]
    inputs = {n: QuantizedInput(a) for n, a in plan.activations(names).items() if a is not None}
    return Artifact(tensors, inputs)


def _arbitrary(recipe: Quantizer, w: Tensor) -> Quantized:
    """A tensor of w's shape and of the recipe's size, with numbers drawn at random."""
    generator = torch.Generator().manual_seed(0)
    shape = tuple(w.shape)
    recipe = recipe.resolve(shape)
    codes = {}
    for spec in recipe.layout(shape):
        assert spec.alphabet is not None
        dtype = torch.uint8 if spec.alphabet <= 256 else torch.int32
        codes[spec.name] = torch.randint(spec.alphabet, spec.grid, generator=generator).to(dtype)
    spread = float(w.std())
    side = {
        name: quantize(child.recipe, spread * torch.rand(child.shape, generator=generator))
        for name, child in recipe.children(shape).items()
    }
    return Quantized(recipe.with_children({name: q.recipe for name, q in side.items()}), shape, codes, side)


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in {*model.parameters(), *model.buffers()})


def by_torch(name: str, dense: nn.Module, threads: int) -> Way:
    """Dynamic int8: weights a scale per tensor, inputs a range per batch."""
    held = nn.Sequential(copy.deepcopy(dense))  # a bare layer has no parent to be replaced in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao
        model = torch.ao.quantization.quantize_dynamic(held, {nn.Linear}, torch.qint8)
    small = sum(w.numel() for w in dense.parameters() if w.dim() > 1)
    return Way(name, model, small + sum(w.nbytes for w in dense.parameters() if w.dim() == 1))


def by_torchao(name: str, dense: nn.Module, threads: int) -> Way:
    """Its own configurations for weights alone, and for inputs rounded to int8 as well; without torch.compile."""
    quantization = importlib.import_module("torchao.quantization")
    config = {
        "torchao, int8 weights": lambda: quantization.Int8WeightOnlyConfig(),
        "torchao, int8 weights and inputs": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
        "torchao, int4 weights": lambda: importlib.import_module(
            "torchao.prototype.quantization.int4"
        ).PrototypeInt4WeightOnlyConfig(64),
    }[name]()
    model = nn.Sequential(copy.deepcopy(dense))
    quantization.quantize_(model, config)
    size = 0
    for parameter in model.parameters():
        names = getattr(parameter, "tensor_data_names", None)
        size += sum(getattr(parameter, n).nbytes for n in names) if names else parameter.nbytes
    return Way(name, model, size)


def by_onnx(name: str, dense: nn.Module, threads: int) -> Way:
    """ONNX Runtime; int4 are blocks of 32 by MatMulNBits, computed with inputs in float32 or rounded to int8."""
    onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    layers = [m for m in dense.modules() if isinstance(m, nn.Linear)]
    nodes, initializers, tensor = [], [], "x"
    for i, layer in enumerate(layers):
        w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        rows, cols = w.shape
        initializers.append(numpy_helper.from_array(b, f"b{i}"))
        if "int4" in name:
            blocks = -(-cols // 32)
            padded = np.zeros((rows, blocks * 32), np.float32)
            padded[:, :cols] = w
            grouped = padded.reshape(rows, blocks, 32)
            scale = np.maximum(np.abs(grouped).max(2) / 7, 1e-8).astype(np.float32)
            codes = np.clip(np.rint(grouped / scale[:, :, None]) + 8, 0, 15).astype(np.uint8)
            initializers.append(numpy_helper.from_array(codes[:, :, ::2] | codes[:, :, 1::2] << 4, f"w{i}"))
            initializers.append(numpy_helper.from_array(scale.reshape(-1), f"s{i}"))
            level = 4 if "int8" in name else 1
            nodes.append(
                helper.make_node("MatMulNBits", [tensor, f"w{i}", f"s{i}"], [f"m{i}"], domain="com.microsoft", K=cols,
                                 N=rows, bits=4, block_size=32, accuracy_level=level)
            )  # fmt: skip
        else:
            initializers.append(numpy_helper.from_array(np.ascontiguousarray(w.T), f"w{i}"))
            nodes.append(helper.make_node("MatMul", [tensor, f"w{i}"], [f"m{i}"]))
        last = i + 1 == len(layers)
        nodes.append(helper.make_node("Add", [f"m{i}", f"b{i}"], ["y" if last else f"a{i}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"a{i}"], [f"r{i}"]))
        tensor = f"r{i}"
    floats = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "model", [helper.make_tensor_value_info("x", floats, ["n", layers[0].in_features])],
        [helper.make_tensor_value_info("y", floats, ["n", layers[-1].out_features])], initializers,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    data = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # beside torch's own threads
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return Way(name, lambda x: session.run(None, {"x": x.numpy()}), sum(len(t.raw_data) for t in initializers))


PEER_WAYS: Mapping[str, Callable[[str, nn.Module, int], Way]] = {
    "torch, dynamic int8": by_torch,
    "torchao, int8 weights": by_torchao,
    "torchao, int8 weights and inputs": by_torchao,
    "torchao, int4 weights": by_torchao,
    "ONNX Runtime, float32": by_onnx,
    "ONNX Runtime, int4": by_onnx,
    "ONNX Runtime, int4, int8 input": by_onnx,
}


# -- latency -----------------------------------------------------------------------------------------------


def latencies(case: Case, threads: int, seconds: float, batches: Sequence[int]) -> Iterator[Row]:
    """All ways at all batches; `seconds` is what a way and batch may take."""
    torch.set_num_threads(threads)
    found = list(ways(case, threads))
    around = {}
    for way in found:
        count = -(-BEYOND_CACHES // (way.bytes or BEYOND_CACHES)) if case.copied else 1
        around[way.name] = [way.run, *(_copied(way.run) for _ in range(count - 1))]
    for batch in batches:
        x = torch.randn(batch, case.inputs, generator=torch.Generator().manual_seed(0))
        running = {way.name: Round(around[way.name], x) for way in found if way.run is not None}
        once: dict[str, float] = {}
        for way in list(running):
            try:
                running[way]()
                start = clock()()
                running[way]()
                once[way] = clock()() - start
                slow = once[way] > TOO_SLOW * once[DENSE]
                reason = f"more than {TOO_SLOW} times as slow as dense" if slow else ""
            except Exception as error:  # a peer that does not run is a row, too
                reason = shown(f"{type(error).__name__}: {error}")
            if reason:
                yield Row(case.name, way, batch, threads, None, None, None, reason)
                del running[way]
        times = interleaved(running, seconds)
        sizes = {way.name: way.bytes for way in found}
        for way, own in times.items():
            ratio = statistics.median(a / b for a, b in zip(own, times[DENSE], strict=True))
            yield Row(case.name, way, batch, threads, 1e3 * statistics.median(own), ratio, sizes[way])
        for way in found:
            if way.run is None:
                yield Row(case.name, way.name, batch, threads, None, None, None, way.reason)


def _copied(run: Any) -> Any:
    """Another instance with memory of its own, where that is possible: sessions of ONNX Runtime share theirs."""
    return copy.deepcopy(run) if isinstance(run, nn.Module) else run


class Round:
    """Calls a model, or the next of its copies, on the same input."""

    def __init__(self, models: Sequence[Any], x: Tensor) -> None:
        self.models, self.x, self.at = models, x, 0

    def __call__(self) -> None:
        self.models[self.at](self.x)
        self.at = (self.at + 1) % len(self.models)


def clock() -> Callable[[], float]:
    """What tells the time: of one thread, other processes do not count."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def interleaved(calls: Mapping[str, Call], seconds: float) -> dict[str, list[float]]:
    """Seconds of a call of each, in rounds in which each runs for some milliseconds, in another order every time."""
    now, repetitions = clock(), {}
    for name, call in calls.items():
        call()
        start = now()
        call()
        repetitions[name] = max(1, min(500, int(0.004 / max(now() - start, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, end = list(calls), now() + seconds * len(calls)
    while len(times[names[0]]) < 5 or now() < end:
        for name in names:
            call, count = calls[name], repetitions[name]
            call()  # brings its own weights back into the cache
            start = now()
            for _ in range(count):
                call()
            times[name].append((now() - start) / count)
        names = names[1:] + names[:1]
    return times


def crossover(threads: int, seconds: float) -> Iterator[Row]:
    """Vectors by tables and by decoding, forced, at the batches around where one passes the other."""
    torch.set_num_threads(threads)
    dense = linear(2048, 2048)
    layer = restore_packed(artifact(dense, Plan({"weight": Codebook(256, (1, 4))})), copy.deepcopy(dense))

    def forced(most: int, x: Tensor) -> Call:
        def call() -> None:
            before, books.MOST_LOOKED_UP = books.MOST_LOOKED_UP, most
            layer(x)
            books.MOST_LOOKED_UP = before

        return call

    for batch in (1, 2, 4, 6, 8, 12):
        x = torch.randn(batch, 2048)
        calls = {DENSE: lambda x=x: dense(x), "looked up": forced(batch, x), "decoded": forced(0, x)}
        times = interleaved(calls, seconds)
        for way in ("looked up", "decoded"):
            ratio = statistics.median(a / b for a, b in zip(times[way], times[DENSE], strict=True))
            name = "2048 × 2048, fours of 256 codewords"
            yield Row(name, way, batch, threads, 1e3 * statistics.median(times[way]), ratio, None)


# -- loading -----------------------------------------------------------------------------------------------


def loading(threads: int, repetitions: int = 5) -> Iterator[Row]:
    """A layer of 10,000 × 10,000 at 3 bits from its file to its first product, the checksum included."""
    torch.set_num_threads(threads)
    now = clock()
    side = 10_000
    case = f"load {side:,} × {side:,}"
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(side, side, generator=generator).mul_(1.2).round_()
    files: list[tuple[str, Quantizer, Coder]] = [
        ("3 bits, fixed width", Uniform(3, (1, -1), symmetric=False), Fixed()),
        ("7 levels, fixed width", Uniform(3, (1, -1)), Fixed()),
        ("7 levels, rANS", Uniform(3, (1, -1)), Rans()),
    ]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, recipe, coder in files:
            path = Path(folder, "layer.safetensors")
            assert isinstance(recipe, Uniform)
            centre = recipe.q_max if recipe.symmetric else 4
            codes = (normal + centre).clamp_(0, recipe.alphabet - 1).to(torch.uint8)
            children = recipe.children((side, side)).items()
            held = {n: quantize(child.recipe, torch.full(child.shape, 1.0)) for n, child in children}
            bitbook.save(Artifact({"weight": Quantized(recipe, (side, side), {"codes": codes}, held)}), path, coder)
            x = torch.randn(1, side)
            times: dict[str, list[float]] = {"packed": [], "dense": []}
            size = 0
            for i in range(repetitions + 1):
                for resident in ("packed", "dense"):
                    layer = nn.Linear(side, side, bias=False, device="meta").to_empty(device="cpu")
                    start = now()
                    bitbook.load(path, layer, resident=resident)(x)  # type: ignore[arg-type]
                    if i:  # the first compiles, or reads what was compiled
                        times[resident].append(now() - start)
                    if resident == "packed":
                        size = bitbook.residence(layer).bytes
            ratios = [a / b for a, b in zip(times["packed"], times["dense"], strict=True)]
            for resident, bytes in (("packed", size), ("dense", 4 * side * side)):
                ratio = statistics.median(ratios) if resident == "packed" else 1.0
                spent = 1e3 * statistics.median(times[resident])
                yield Row(case, f"{name}, {resident}", 1, threads, spent, ratio, bytes)


_FRESH = """
import sys, time
import torch, bitbook
from bitbook.models import build_model
model = build_model("mlp-784-128-64-10", seed=0)
start = time.perf_counter()
bitbook.load(sys.argv[1], model, resident="packed")
model(torch.zeros(1, 784))
print(time.perf_counter() - start)
"""


def small_file(repetitions: int = 21) -> Iterator[Row]:
    """An entropy-coded MLP of about four kilobytes: loaded again and again, in a new process, and first of all."""
    torch.set_num_threads(1)
    case = "load an entropy-coded MLP"
    model = build_model("mlp-784-128-64-10", seed=0)
    generator = torch.Generator().manual_seed(0)
    step = 0.05
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "small.safetensors")
        keep = 0.06
        while True:  # sparse weights, most of them in the middle of the images, as training under a price leaves them
            tensors: dict[str, Quantized | Tensor] = {}
            for name, w in model.state_dict().items():
                share = torch.full_like(w, keep)
                if w.shape == (128, 784):
                    at = torch.arange(28.0) - 13.5
                    middle = torch.exp(-(at[:, None] ** 2 + at**2) / 49).reshape(1, 784)
                    share = 2 * keep * middle.expand(128, 784)
                kept = torch.rand(w.shape, generator=generator) < share
                size = (1 - torch.rand(w.shape, generator=generator)).log2().neg().ceil().clamp_min(1)
                sign = torch.randint(2, w.shape, generator=generator) * 2 - 1
                tensors[name] = quantize(ECSQ(), step * kept * size * sign, options=FitOptions(step=step))
            total = bitbook.save(Artifact(tensors), path).total
            if total <= SMALL_FILE:
                break
            keep *= 0.95 * SMALL_FILE / total
        for resident in ("dense", "packed"):
            times = []
            for _ in range(repetitions):
                fresh = build_model("mlp-784-128-64-10", seed=0)
                start = time.process_time()
                bitbook.load(path, fresh, resident=resident)  # type: ignore[arg-type]
                times.append(time.process_time() - start)
            spent = 1e3 * statistics.median(times[1:])
            yield Row(case, f"{total:,} bytes, {resident}, again", 1, 1, spent, None, None)
        compiled = {**os.environ, "NUMBA_CACHE_DIR": f"{folder}/numba", "XDG_CACHE_HOME": f"{folder}/cache"}
        times = []
        for _ in range(4):  # the first compiles loops of numba and of native.c, and keeps them for the others
            fresh = [sys.executable, "-c", _FRESH, str(path)]
            output = subprocess.run(fresh, env=compiled, capture_output=True, text=True, check=True)
            times.append(1e3 * float(output.stdout))
        spent = statistics.median(times[1:])
        yield Row(case, f"{total:,} bytes, packed, first in a process", 1, 1, spent, None, None)
        yield Row(case, f"{total:,} bytes, packed, first of all, compiling", 1, 1, times[0], None, None)


# -- documents ---------------------------------------------------------------------------------------------


class Aim(NamedTuple):
    """A claim about rows, and whether it holds."""

    text: str
    found: str
    reached: bool | None


def aims(rows: Sequence[Row]) -> list[Aim]:
    """What the runtime set out for, at the most threads that were measured."""
    most = max((row.threads for row in rows), default=1)
    table = {(r.case, r.way, r.batch): r for r in rows if r.threads == most or r.case.startswith("load an")}
    layer, small, mlp = "4096 × 11008, out of cache", "2048 × 2048, in cache", "mlp"

    def ratio(case: str, way: str, batch: int) -> float | None:
        row = table.get((case, way, batch))
        return None if row is None else row.ratio_to_dense

    def faster(text: str, found: float | None, least: float) -> Aim:
        shown = "not measured" if found is None else f"{1 / found:.2f} times as fast"
        return Aim(text, shown, None if found is None else 1 / found >= least)

    rows_way = "bitbook, rows, 25 %, output dense"
    done = [
        faster(f"MLP by rows, batch {batch}: {least} times as fast as dense", ratio(mlp, rows_way, batch), least)
        for batch, least in ((1, 1.3), (256, 2.5))
    ]
    done.append(faster("4096 × 11008, 2 bits, batch 1: 3 times as fast", ratio(layer, "bitbook, 2 bits", 1), 3.0))
    two, dense = table.get((layer, "bitbook, 2 bits", 1)), table.get((layer, DENSE, 1))
    if two is not None and dense is not None and two.resident_bytes and dense.resident_bytes:
        share = dense.resident_bytes / two.resident_bytes
        done.append(Aim("… in 1/13 of the memory", f"1/{share:.1f}", share >= 13))
    few_bits = [table.get((small, f"bitbook, {bits} bits", 1)) for bits in (2, 3, 4)]
    timed = [row for row in few_bits if row is not None and row.ratio_to_dense is not None]
    best = min(timed, key=lambda row: row.ratio_to_dense or 0, default=None)
    if best is not None and best.ratio_to_dense is not None:
        text = "2048 × 2048 in cache, batch 1: the best of 2 to 4 bits in at most 1.3 times the time of dense"
        done.append(Aim(text, f"{best.ratio_to_dense:.2f} ({best.way})", best.ratio_to_dense <= 1.3))
    for case in (small, layer, mlp):
        for batch in BATCHES:
            ours, theirs = (table.get((case, w, batch)) for w in ("bitbook, 8 bits, int8 input", "torch, dynamic int8"))
            if ours is not None and theirs is not None and ours.ratio_to_dense and theirs.ratio_to_dense:
                speed = theirs.ratio_to_dense / ours.ratio_to_dense
                text = f"int8, {case}, batch {batch}: 0.9 times as fast as torch's dynamic int8"
                done.append(Aim(text, f"{speed:.2f} times", speed >= 0.9))
    for way, least in (("3 bits, fixed width", 150), ("7 levels, fixed width", 150), ("7 levels, rANS", 60)):
        row = next((r for r in rows if r.threads == most and r.way == f"{way}, packed"), None)
        if row is not None and row.milliseconds:
            speed = 1e8 / (1e3 * row.milliseconds)
            done.append(Aim(f"load 10⁸ weights, {way}: {least} M a second", f"{speed:.0f} M", speed >= least))
    parts = (("packed, again", 10), ("dense, again", 10), ("first in a process", 1500), ("compiling", 6500))
    for part, most_ms in parts:
        row = next((r for r in rows if r.way.endswith(part)), None)
        if row is not None and row.milliseconds:
            found = f"{row.milliseconds:.1f} ms ({row.way})"
            done.append(Aim(f"an entropy-coded file of 4 kB, {part}: {most_ms} ms", found, row.milliseconds <= most_ms))
    return done


def document(rows: Sequence[Row], command: str) -> str:
    lines = [
        "# Running from packed codes",
        "",
        f"Made by `{command}`, torch {torch.__version__}; every number is",
        "a row of [runtime.csv](runtime.csv). Medians of rounds in which all ways of a case take turns; with one",
        "thread, of processor time. *Ratio*: time over that of dense float32 in the same round, so below 1 is faster.",
        "Bytes are those of all weights as they lie in memory.",
        f"Peers: {', '.join(PEERS)}; dynamic int8 is torch's own. Sessions of ONNX Runtime are",
        "not copied, so that its weights may stay in a cache where others cannot.",
        "",
        "## Aims",
        "",
    ]
    for aim in aims(rows):
        verdict = "not measured" if aim.reached is None else "reached" if aim.reached else "**missed**"
        lines.append(f"- {aim.text}: {aim.found}, {verdict}.")
    for case, threads in dict.fromkeys((row.case, row.threads) for row in rows):
        own = [row for row in rows if (row.case, row.threads) == (case, threads)]
        batches = list(dict.fromkeys(row.batch for row in own))
        lines += ["", f"## {case}, {threads} thread{'s' if threads > 1 else ''}", ""]
        lines.append("| way | bytes | " + " | ".join(f"batch {b}: ms | ratio" for b in batches) + " |")
        lines.append("| --- | --: |" + " --: | --: |" * len(batches))
        reasons = []
        for way in dict.fromkeys(row.way for row in own):
            cells = {row.batch: row for row in own if row.way == way}
            size = next((f"{row.resident_bytes:,}" for row in cells.values() if row.resident_bytes), "")
            parts = []
            for batch in batches:
                row = cells.get(batch)
                timed = row is not None and row.milliseconds is not None
                parts += [f"{row.milliseconds:.3g}", f"{row.ratio_to_dense or 0:.2f}"] if row and timed else ["–", "–"]
            lines.append(f"| {way} | {size} | " + " | ".join(parts) + " |")
            reasons += [f"- {way}: {row.reason}" for row in list(cells.values())[:1] if row.reason]
        lines += ["", *reasons] if reasons else []
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Row], folder: Path, command: str) -> None:
    with (folder / "runtime.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        for row in rows:
            spent = None if row.milliseconds is None else f"{row.milliseconds:.5g}"
            ratio = None if row.ratio_to_dense is None else f"{row.ratio_to_dense:.4f}"
            writer.writerow([row.case, row.way, row.batch, row.threads, spent, ratio, row.resident_bytes, row.reason])
    (folder / "runtime.md").write_text(document(rows, command))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, min(2, os.cpu_count() or 1)])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each way, batch and number of threads")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--cases", nargs="+", choices=["small", *CASES, "crossover", "loading"], help="default: all")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="runtime.csv and runtime.md")
    options = parser.parse_args()
    home = environment("runtime", PEERS)
    if isinstance(home, Path):  # behind our own packages, which stay what they are
        sys.path.extend(str(path) for path in home.parents[1].glob("lib/python*/site-packages"))
    else:
        print(home)
    chosen = options.cases or ["small", *CASES, "crossover", "loading"]
    rows: list[Row] = []

    def take(some: Iterator[Row]) -> None:
        for row in some:
            rows.append(row)
            timed = row.milliseconds is not None
            said = f"{row.milliseconds:10.4f} ms  {row.ratio_to_dense or 0:6.3f}" if timed else row.reason
            print(f"{row.case:<34}{row.way:<48}{row.batch:>4}{row.threads:>3} {said}", flush=True)
        if options.write:  # after each case, so that an interrupted run leaves what it has
            given = " ".join(f"'{word}'" if " " in word else word for word in sys.argv[1:])
            write(rows, options.write, f"python -m bench.runtime {given}".strip())

    with torch.inference_mode():
        if "small" in chosen:  # before others, after which memory is in pieces and a load takes half as long again
            take(small_file())
        for threads in dict.fromkeys(options.threads):
            for name, case in CASES.items():
                if name in chosen:
                    take(latencies(case, threads, options.seconds, options.batches))
            if "crossover" in chosen:
                take(crossover(threads, options.seconds))
        most = max(options.threads)
        if "loading" in chosen:
            take(loading(most))
    for aim in aims(rows):
        print(f"{'met' if aim.reached else 'MISSED' if aim.reached is False else '?':<7}{aim.text}: {aim.found}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
