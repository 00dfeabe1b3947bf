"""The family compared at equal bytes: every quantizer on an MNIST perceptron and on a public ResNet-20.

    bitbook study --dataset family
    python -m bitbook.study.family runs/family docs/results

    start ──► weights through the plan ──► batch-norm statistics shifted ──► (trained) ──► file ──► evaluate

A cell is JSON: dataset, holdout, model, start, family, method, recipe, phases (one plan, and how it is tuned), fit and
regime where they are not the defaults, feedback (its λ, where errors are fed back), dense (a plan for what is not a
weight), repair (whether batch-norm statistics are shifted), calibration (how many training images may be looked at),
seed.  The start is trained (`trial.trained_start`) or `{"file": …}`, a public network.  Every file is written by the
smallest coder; its length is what is compared.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from bitbook.apply import compress_by_plan, freeze, quantize_, quantize_dense, restore, with_dense
from bitbook.artifact import Artifact
from bitbook.data import Split
from bitbook.errors import PlanError, WeightError
from bitbook.lattice.e8p import E8P
from bitbook.lattice.lattice import Lattice
from bitbook.loop import Training, run_epochs
from bitbook.models import PRETRAINED_MODELS, build_model, pretrained_resnet
from bitbook.plan import Plan
from bitbook.qat import Regime
from bitbook.quantizer import FitOptions, Quantizer
from bitbook.scalar.ecsq import ECSQ
from bitbook.scalar.leaves import Float, Integer
from bitbook.scalar.pruned import Pruned
from bitbook.scalar.sign_magnitude import SignMagnitude
from bitbook.scalar.table import NF4, PowersOfTwo, Table
from bitbook.scalar.uniform import Uniform
from bitbook.study.grid import MNIST, SOURCE_TUNE, STRONG_START
from bitbook.study.plots import size_accuracy
from bitbook.study.priced.entropy import sentence
from bitbook.study.storage import StudyStore, open_storage
from bitbook.study.tables import (
    EqualBytes,
    Point,
    Result,
    equal_accuracy_savings,
    equal_bytes_table,
    float_point,
    markdown_table,
    points,
    trial_rows,
    write_csv,
)
from bitbook.study.trial import diverged, load_parts, measure_file, trained_start
from bitbook.surgery.batchnorm import absorb_statistics, fixed_statistics, normalisations, shift_statistics
from bitbook.transforms.balanced import Balanced
from bitbook.transforms.rotated import Rotated
from bitbook.trellis.tcq import TCQ
from bitbook.trellis.trellis import Trellis
from bitbook.vector.codebook import Codebook
from bitbook.vector.gain_shape import GainShape
from bitbook.vector.residual import Residual

ROW = (1, -1)
BASELINE = "ECSQ, one step"
"""What every other method is compared with: the scalar quantizer to which entropy coding leaves least to gain."""

# --- the family


@dataclass(frozen=True)
class Step:
    """One point of a curve."""

    name: str
    recipe: Quantizer
    fit: Mapping[str, Any] = field(default_factory=dict)
    lam: float = 0.0
    """With error feedback, the price of a bit (`encode_calibrated_`)."""


@dataclass(frozen=True)
class Method:
    """One curve: recipes of a kind, from few bytes to many."""

    family: str
    name: str
    steps: Sequence[Step]
    tune: Mapping[str, Any] | None = None
    """How it is trained under its plan, over the network's own way; None: not at all."""
    regime: Mapping[str, Any] = field(default_factory=dict)
    unrepaired: bool = False
    """Whether a network's statistics are also left as they were, to see what shifting them does."""
    feedback: bool = False
    """Whether each step is also encoded with error feedback."""
    rounded: bool = True
    """False where only error feedback or training make sense, as a trellis without a price does not."""


_STILL = {"side": "refreshed"}  # all weights pull at one step, at the rate of the weights: it would not survive
_LATENT = {**_STILL, "codes": "latent", "reassign_every": 10}
"""Codebooks train as scalars do: the weights move and fall to other codewords, which stay."""


def uniform(name: str, block: tuple[int, int], bits: Sequence[int], **how: Any) -> Method:
    """Uniform levels in the range with the least squared error."""
    steps = [Step(f"{p} bits", Uniform(p, block), {"range": "mse"}) for p in bits]
    return Method("scalar", name, steps, **how)


def entropy_coded(sizes: Sequence[float], points: int = 1, **how: Any) -> Method:
    """One step for all weights of the network; entropy coding takes care of the rest."""
    name = BASELINE if points == 1 else f"ECSQ, {points} points"
    steps = [
        Step(f"step {size:g}", ECSQ(points), {"step": size, "iterations": 10}, ECSQ.price_of_step * size**2)
        for size in sizes
    ]
    return Method("entropy-coded scalar", name, steps, regime=_STILL, **how)


def trellis(states: int, sizes: Sequence[float], **how: Any) -> Method:
    """As ECSQ: one step for all weights of the network, with bits in the metric of the path."""
    steps = [Step(f"step {size:g}", Trellis(states), {"step": size}, Trellis.price_of_step * size**2) for size in sizes]
    return Method("trellis", f"trellis, {states} states", steps, regime=_STILL, rounded=False, feedback=True, **how)


def single(family: str, name: str, recipe: Quantizer, fit: Mapping[str, Any] | None = None, **how: Any) -> Method:
    """One recipe, without and with error feedback."""
    return Method(family, name, [Step(repr(recipe), recipe, fit or {})], feedback=True, **how)


FUSED = Uniform(5)
MSE = {"range": "mse"}


def others(group: int) -> tuple[Method, ...]:
    """One of each further kind, at 2 to 4 bits a weight."""
    four, eight = (1, 4), (1, 8)
    return (
        single("scalar", "NF4 in groups", Table(NF4, (1, group), scale=Uniform(8))),
        single("scalar", "powers of two", PowersOfTwo(4, ROW), MSE),
        single(
            "vectors", "residual", Residual((Codebook(64, four, FUSED), Codebook(64, four, FUSED))), {"iterations": 25}
        ),
        # Magnitudes have no negative side: the range from least to most would clip their upper half.
        single(
            "vectors", "signs apart", SignMagnitude(Codebook(64, four, FUSED)), {"iterations": 25, "range": "absmax"}
        ),
        single("vectors", "gain and shape", GainShape(64, eight, gains=Uniform(4, symmetric=False))),
        single("lattice", "E8P", E8P(ROW), MSE),
        single("trellis", "trellis, fixed rate", TCQ(3, 8, ROW)),
        single("transform", "rotated, uniform", Rotated(Uniform(3, ROW)), MSE),
        single("transform", "balanced, uniform", Balanced(Uniform(3, ROW), cols=Uniform(8)), MSE),
    )


def codebooks(dims: int, sizes: Sequence[int], centroids: Uniform | Float = Float("bfloat16"), **how: Any) -> Method:
    """k-means codewords of some length, a codebook for each tensor."""
    name = "palettes" if dims == 1 else f"vectors of {dims}"
    family = "scalar" if dims == 1 else "vectors"
    if isinstance(centroids, Uniform):
        family, name = "fused vectors", f"{name}, {centroids.bits}-bit codewords"
    steps = [Step(f"{k} codewords", Codebook(k, (1, dims), centroids), {"iterations": 25}) for k in sizes]
    return Method(family, name, steps, regime=_LATENT, **how)


def pruned(percents: Sequence[int], bits: int, **how: Any) -> Method:
    """The largest weights kept."""
    steps = [Step(f"{p} % kept", Pruned(p / 100, Uniform(bits)), {"range": "mse"}) for p in percents]
    return Method("pruned", f"pruned, {bits} bits", steps, **how)


FLOATS = Method("float", "float", [Step(kind, Float(kind)) for kind in ("float32", "bfloat16")], unrepaired=True)
MNIST_METHODS = (
    FLOATS,
    uniform("uniform, per tensor", (-1, -1), (2, 3, 4, 5), tune={}, feedback=True),
    uniform("uniform, per row", ROW, (2, 3, 4), tune={}, feedback=True),
    uniform("uniform, groups of 16", (1, 16), (2, 3, 4), tune={}),
    entropy_coded((0.24, 0.17, 0.12, 0.085, 0.06, 0.04), tune={}, feedback=True),
    entropy_coded((0.24, 0.17, 0.12, 0.085), 3, tune={}),
    trellis(8, (0.2, 0.14, 0.1, 0.07, 0.05), tune={}),
    trellis(64, (0.14, 0.1, 0.07)),
    codebooks(1, (2, 3, 4, 8, 16), tune={}),
    codebooks(2, (8, 16, 64), tune={}),
    codebooks(4, (16, 64, 256), tune={}, feedback=True),
    codebooks(8, (16, 64, 256), tune={}),
    codebooks(2, (8, 16, 64), FUSED, tune={}),
    codebooks(4, (16, 64, 256), FUSED, tune={}, feedback=True),
    codebooks(8, (16, 64, 256), FUSED, tune={}),
    pruned((5, 10, 20, 40), 4, tune={}),
    Method(
        "lattice",
        "lattice E8",
        [Step(f"step {s:g}", Lattice("E8"), {"step": s}) for s in (0.17, 0.12, 0.085)],
        feedback=True,
    ),
    *others(16),
)
"""Plain data: a further method is a line."""

RESNET_METHODS = (
    FLOATS,
    uniform("uniform, per tensor", (-1, -1), (4, 5), unrepaired=True, feedback=True),
    uniform("uniform, per row", ROW, (3, 4), tune={}, feedback=True),
    uniform("uniform, groups of 36", (1, 36), (3, 4)),
    entropy_coded((0.22, 0.16, 0.12, 0.09, 0.07, 0.05), feedback=True),
    trellis(8, (0.12, 0.1, 0.085, 0.07, 0.055, 0.04)),
    trellis(64, (0.1, 0.07)),
    codebooks(1, (8, 16), feedback=True),
    codebooks(2, (64, 128), feedback=True),
    codebooks(4, (256,), feedback=True),
    codebooks(2, (64, 128), FUSED),
    codebooks(4, (256,), FUSED, feedback=True),
    pruned((25, 50), 4),
    Method(
        "lattice", "lattice E8", [Step(f"step {s:g}", Lattice("E8"), {"step": s}) for s in (0.12, 0.09)], feedback=True
    ),
    *others(36),
)


@dataclass(frozen=True)
class Network:
    """A model with its data, and what of it is the same for every method."""

    title: str
    dataset: str
    model: str
    start: Mapping[str, Any]
    holdout: int
    methods: Sequence[Method]
    weights: str
    """The pattern of the tensors that the methods are about."""
    fixed: Mapping[str, Quantizer]
    """Other weights, stored alike by every method."""
    dense: Plan
    """How what is no weight is stored."""
    tune: Mapping[str, Any]
    levels: Sequence[float]
    """Test accuracies to keep, in percent; where `relative`, percentage points that may be lost."""
    relative: bool
    references: Mapping[str, Sequence[int | None]]
    """Whole files of others at these levels, in bytes, chosen on test accuracy."""
    sizes: Sequence[int]
    """Bytes at which methods are compared."""
    repairs: bool
    """Whether there are batch-norm statistics to shift."""
    calibration: int = 500
    most_seeds: int = 1_000_000


_HALF = Float("bfloat16")
NETWORKS = (
    Network(
        "MNIST, a perceptron", "mnist", MNIST.model, STRONG_START, MNIST.holdout, MNIST_METHODS, "fc*.weight", {},
        Plan({"*.bias": _HALF}), {**SOURCE_TUNE, "lr": 1e-2, "epochs": 3}, (95, 96, 97, 97.5, 98), False,
        {"k-means palettes, trained, entropy estimated": (7600, 21_400, 21_400, 32_000, 41_200),
         "NNCodec, not trained": (13_300, 13_300, 17_300, 17_300, 24_400),
         "pruned, trained, k-means, entropy estimated": (4600, 5100, 7100, 11_400, None)},
        (5_000, 10_000, 20_000, 40_000), False, 2000,
    ),
    Network(
        "CIFAR-10, ResNet-20", "cifar10", "resnet-20", {"file": "resnet20_cifar10.safetensors"}, 2000, RESNET_METHODS,
        "layer*.conv?.weight", {"conv1.weight": Uniform(6, ROW), "linear.weight": Uniform(6, ROW)},
        Plan({"*bn?.weight": _HALF, "*bn?.bias": _HALF, "linear.bias": _HALF, "*.running_mean": Integer(1),
              "*.running_var": Integer(2), "*.num_batches_tracked": Integer(1)}),
        {"epochs": 1, "examples": 3000, "batch": 50, "lr": 2e-3, "momentum": 0.9, "schedule": "cosine"},
        (0.3, 0.5, 1, 2), True,
        {"uniform, entropy estimated, statistics shifted from 1 point on": (None, None, 100_500, 91_500),
         "NNCodec with dependent quantization": (146_200, 125_500, 125_500, 96_700),
         "the same, statistics shifted": (None, 96_700, 80_400, 80_400),
         "error feedback, step grid, entropy estimated": (107_400, 92_000, 76_100, 62_300)},
        (40_000, 60_000, 80_000, 100_000), True, most_seeds=1,
    ),
)  # fmt: skip


def family_cells(seeds: Sequence[int], networks: Sequence[Network] = NETWORKS) -> list[dict[str, Any]]:
    """Each step of each method: rounded, with statistics shifted where there are any, and trained.

    Seed by seed, so that an interrupted study is a study of fewer seeds.  Where the start is one public network, seeds
    decide calibration images, k-means and the order of training images; `most_seeds` are enough for those.
    """
    return [
        cell
        for i, seed in enumerate(seeds)
        for network in networks
        if i < network.most_seeds
        for method in network.methods
        for step in method.steps
        for cell in _cells_of(network, method, step, seed)
    ]


def mnist_family_cells(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The part that needs no CIFAR-10."""
    return family_cells(seeds, NETWORKS[:1])


def _cells_of(network: Network, method: Method, step: Step, seed: int) -> Iterator[dict[str, Any]]:
    fixed, dense = network.fixed, network.dense
    if method.family == "float":
        fixed = dict.fromkeys(fixed, step.recipe)
    if step.recipe == Float():  # the network as it is
        dense = Plan()
    plan = Plan({**fixed, network.weights: step.recipe})
    cell = {
        "dataset": network.dataset,
        "holdout": network.holdout,
        "model": network.model,
        "start": dict(network.start),
        "family": method.family,
        "method": method.name,
        "recipe": step.name,
        "phases": [{"plan": plan.to_json()}],
        "dense": dense.to_json(),
        "repair": False,
        "calibration": network.calibration,
        "seed": seed,
    }
    if step.fit:
        cell["fit"] = dict(step.fit)
    if method.rounded and (method.unrepaired or not network.repairs):
        yield cell
    if method.rounded and network.repairs and method.family != "float":
        yield {**cell, "repair": True}
    if method.feedback:
        yield {**cell, "repair": network.repairs, "feedback": {"lam": step.lam}}
    if method.tune is not None:
        tune = {**network.tune, **method.tune}
        trained = {**cell, "repair": network.repairs, "phases": [{**cell["phases"][0], "tune": tune}]}
        yield {**trained, "regime": dict(method.regime)} if method.regime else trained


# --- one trial


def run_trial(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Run one cell; the result is that of `trial.run_trial`."""
    clock = time.perf_counter
    began = clock()
    dataset, data = load_parts(cell["dataset"], cell["holdout"])
    model, start_losses = float_start(cell, data)
    started = clock()
    generator = Generator().manual_seed(cell["seed"])
    chosen = torch.randperm(len(data.train_x), generator=generator)[: cell["calibration"]]
    calibration = data.train_x[chosen]
    artifact, losses = compressed(cell, model, data, calibration, generator)
    if artifact is None:
        untrained = run_trial({**cell, "phases": [{"plan": phase["plan"]} for phase in cell["phases"]]})
        return diverged(untrained, data, dataset, losses)
    artifact = finished(cell, artifact, model, calibration)
    fitted = clock()
    return {
        **measure_file(artifact, cell["model"], dataset, data),
        "start_losses": start_losses,
        "losses": losses,
        "seconds": {"start": started - began, "fit": fitted - started, "evaluate": clock() - fitted},
    }


def float_start(cell: Mapping[str, Any], data: Split) -> tuple[nn.Module, list[float]]:
    """The float network that a cell starts from: a public one, by its name or a file, or one trained once and kept."""
    if cell["model"] in PRETRAINED_MODELS:
        return build_model(cell["model"], seed=0), []
    if "file" not in cell["start"]:
        return trained_start(cell, data)
    if cell["start"]["file"] != "resnet20_cifar10.safetensors" or cell["model"] != "resnet-20":
        raise PlanError(f"start={cell['start']!r} of {cell['model']}: use resnet20_cifar10.safetensors of resnet-20")
    return pretrained_resnet(20), []


def compressed(
    cell: Mapping[str, Any], model: nn.Module, data: Split, calibration: Tensor, generator: Generator
) -> tuple[Artifact | None, list[float]]:
    """The weights through the plan, and the loss of each epoch that they were trained; `model` stays as it is.

    Statistics are shifted before a training, which then keeps them.  No artifact: the training diverged.
    """
    (phase,) = cell["phases"]
    options, regime = FitOptions(**cell.get("fit", {})), Regime(**cell.get("regime", {}))
    if "feedback" in cell:
        lam = cell["feedback"]["lam"]
        plan, seed = Plan.from_json(phase["plan"]), cell["seed"]
        return compress_by_plan(model, plan, options=options, calibration=calibration, lam=lam, seed=seed), []
    trained = copy.deepcopy(model)
    quantize_(trained, Plan.from_json(phase["plan"]), options=options, regime=regime, generator=generator)
    if "tune" not in phase:
        return freeze(trained), []
    if cell["repair"]:
        shift_statistics(trained, model, calibration)
    how = dict(phase["tune"])
    order = torch.randperm(len(data.train_x), generator=generator)[: how.pop("examples", None)]
    x, y = data.train_x[order], data.train_y[order]
    losses = [math.nan]
    try:
        with fixed_statistics(trained):
            losses = run_epochs(trained, x, y, Training(**how), generator=generator)
        artifact = freeze(trained)
    except WeightError:  # weights that are not finite have no codes
        return None, losses
    return (artifact if all(map(math.isfinite, losses)) else None), losses


def finished(cell: Mapping[str, Any], artifact: Artifact, model: nn.Module, calibration: Tensor) -> Artifact:
    """The artifact as it is written: statistics shifted where that was not done before a training, absorbed into
    weight and bias where the cell has a plan for what is no weight, and that stored by this plan.
    """
    plain = restore(artifact, build_model(cell["model"], seed=0)).eval()
    if cell["repair"] and "tune" not in cell["phases"][-1]:
        shift_statistics(plain, model, calibration)
    if cell["dense"] and normalisations(plain):
        absorb_statistics(plain)
    return quantize_dense(with_dense(artifact, plain), Plan.from_json(cell["dense"]))


# --- the document


ROUNDED, SHIFTED, FEEDBACK, TRAINED = "rounded", "statistics shifted", "error feedback", "trained"
VARIATIONS = (ROUNDED, SHIFTED, FEEDBACK, TRAINED)


def variation(cell: Mapping[str, Any]) -> str:
    """What was done beyond rounding; the last word counts, and what is trained has its statistics shifted too."""
    if "tune" in cell["phases"][-1]:
        return TRAINED
    return FEEDBACK if "feedback" in cell else SHIFTED if cell["repair"] else ROUNDED


def network_of(results: Sequence[Result], networks: Sequence[Network] = NETWORKS) -> dict[str, list[Result]]:
    """The results of each network that has any, by its title."""
    found = {n.title: [r for r in results if r["cell"]["model"] == n.model] for n in networks}
    return {title: records for title, records in found.items() if records}


def curves(results: Sequence[Result]) -> dict[str, list[Point]]:
    """The points of one network by variation, all of one group: that trainings differ is what is asked about."""
    found: dict[str, list[Point]] = {}
    for name in VARIATIONS:
        records = [r for r in results if variation(r["cell"]) == name]
        if records:
            found[name] = points(records)
    group = next(iter(found.values()))[0].group
    return {name: [replace(p, group=group) for p in line] for name, line in found.items()}


def document(results: Sequence[Result], networks: Sequence[Network] = NETWORKS) -> str:
    """What each method needs for each accuracy, and who wins at equal bytes, for each network."""
    by_title = network_of(results, networks)
    sections = "\n".join(_section(n, by_title[n.title]) for n in networks if n.title in by_title)
    seeds = len({r["cell"]["seed"] for r in results})
    minutes = sum(r["result"]["seconds"]["fit"] + r["result"]["seconds"]["evaluate"] for r in results) / 60
    return f"""# The family at equal bytes

Made by `bitbook study --dataset family --seeds {seeds}` and
`python -m bitbook.study.family runs/family docs/results` (`make family`):
{len(results)} trials, {minutes:.0f} core-minutes; a row per trial and split in [family.csv](family.csv). Bytes are the
length of the file on disk, each stream in the smallest of all coders, biases, normalisations, codebooks and the plan
included; accuracies are those of the file, read back into a fresh model.

Rows are methods; "{ROUNDED}": weights as the fit leaves them; "{SHIFTED}": with what the weights changed in the
batch-norm statistics of a few training images added to the stored ones; "{FEEDBACK}": each column encoded to make up
for the errors of those before it on such images, ECSQ and trellises under a price of bits, then shifted;
"{TRAINED}": tuned under the plan for a short time, from shifted statistics.
What is no weight is stored alike for all methods: biases and normalisations in
bfloat16, two vectors for each normalisation.
{sections}"""


def _section(network: Network, results: Sequence[Result]) -> str:
    lines = curves(results)
    reference = float_point(lines.get(ROUNDED, []))
    if reference is None:
        return f"\n## {network.title}\n\nWithout the float network there is nothing to compare with.\n"
    seeds = sorted({r["cell"]["seed"] for r in results})
    kept = {
        split: [_level(network, reference, level, split) for level in network.levels]
        for split in ("validation", "test")
    }
    said = [f"≤ {level:g} points" if network.relative else f"≥ {level:g} %" for level in network.levels]
    beside = "lost, in points" if network.relative else "of that choice, in percent"
    of_float = f"{reference.test.mean:.2f} % on test, {_validation(reference):.2f} % on validation"
    parts = [
        f"""
## {network.title}

{network.model}, {len(results)} trials, {len(seeds)} seed{"s" * (len(seeds) != 1)}. The float network in float32:
{reference.bytes:,.0f} bytes, {of_float}. {_about(network)}

![Size and accuracy](family-{network.model}.svg)

### The smallest file that keeps an accuracy

Chosen on validation; beside the bytes the test accuracy {beside}.
"""
    ]
    chosen: Callable[[Point, int], bool] = lambda p, i: _validation(p) >= kept["validation"][i]  # noqa: E731
    parts.append(_smallest_table(network, lines, said, chosen, reference))
    parts.append("\nThe same chosen on test, the way the numbers of others were chosen, and those numbers:\n")
    on_test: Callable[[Point, int], bool] = lambda p, i: p.test.mean >= kept["test"][i]  # noqa: E731
    parts.append(_smallest_table(network, lines, said, on_test, reference, network.references))
    for name, line in lines.items():
        wins, sentences = _winners(line, network.sizes), _compared(line)
        if wins or sentences:
            text = "\n".join(f"- {one}" for one in sentences)
            parts.append(f"""
### Who wins: {name}

{markdown_table(wins, list(wins[0])) if wins else "No two methods meet at the sizes of this table."}
Bytes at equal test accuracy, 95 % intervals over seeds:

{text}""")
    steps = _steps(lines)
    if steps:
        text = "\n".join(f"- {one}" for one in steps)
        parts.append(f"\n### What each step beyond rounding saves\n\n{text}\n")
    return "\n".join(parts)


def _about(network: Network) -> str:
    if not network.relative:
        return f"Validation: {network.holdout:,} training images that nothing else saw."
    return (
        f"Validation: {network.holdout:,} training images that are not calibrated or tuned on; the public network was "
        "trained on them, which is why its accuracy is higher there, and there is no other data."
    )


def _level(network: Network, reference: Point, level: float, split: str) -> float:
    return reference.scores[split].mean - level if network.relative else level


def _validation(p: Point) -> float:
    return p.scores["validation"].mean


def _smallest_table(
    network: Network,
    lines: Mapping[str, Sequence[Point]],
    said: Sequence[str],
    good: Callable[[Point, int], bool],
    reference: Point,
    references: Mapping[str, Sequence[int | None]] | None = None,
) -> str:
    rows = []
    for name, line in lines.items():
        for method in dict.fromkeys(p.method for p in line):
            found = [
                min((p for p in line if p.method == method and good(p, i)), key=lambda p: p.bytes, default=None)
                for i in range(len(said))
            ]
            if any(found) and method != "float":
                cells = [_cell_text(p, network, reference) for p in found]
                rows.append({"method": f"{method}, {name}", **dict(zip(said, cells, strict=True))})
    for name, sizes in (references or {}).items():
        cells = [f"{size:,}" if size else "–" for size in sizes]
        rows.append({"method": f"others: {name}", **dict(zip(said, cells, strict=True))})
    return markdown_table(rows, ["method", *said])


def _cell_text(p: Point | None, network: Network, reference: Point) -> str:
    if p is None:
        return "–"
    shown = reference.test.mean - p.test.mean if network.relative else p.test.mean
    return f"{p.bytes:,.0f} ({shown:.2f})"


def _winners(line: Sequence[Point], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """At each size the method that interpolates to the best validation accuracy, and its lead over the baseline."""
    methods = [m for m in dict.fromkeys(p.method for p in line) if m not in ("float", BASELINE)]
    if BASELINE not in {p.method for p in line}:
        return []
    pairs = [(m, BASELINE) for m in methods]
    on = {split: equal_bytes_table(line, pairs, sizes=sizes, split=split) for split in ("validation", "test")}
    rows = []
    for size in sizes:
        rivals = [row for row in on["validation"] if row.bytes == size]
        if not rivals:
            continue
        best = max(rivals, key=lambda row: row.accuracy)
        beaten = best.accuracy > best.accuracy_against
        test = next(r for r in on["test"] if r.bytes == size and r.method == best.method)
        rows.append({
            "bytes": size,
            "best on validation": best.method if beaten else BASELINE,
            "its test accuracy": test.accuracy if beaten else test.accuracy_against,
            "best other": BASELINE if beaten else best.method,
            "difference on test, points": _difference(test, 1 if beaten else -1),
        })  # fmt: skip
    return rows


def _difference(row: EqualBytes, sign: int) -> str:
    bounds = sorted((sign * row.low, sign * row.high))
    said = "one seed" if math.isnan(row.low) else f"{bounds[0]:+.2f} to {bounds[1]:+.2f}"
    return f"{sign * row.difference:+.2f} ({said})"


def _compared(line: Sequence[Point]) -> list[str]:
    methods = [m for m in dict.fromkeys(p.method for p in line) if m not in ("float", BASELINE)]
    if BASELINE not in {p.method for p in line}:
        return []
    return [sentence(found) for found in equal_accuracy_savings(line, [(m, BASELINE) for m in methods])]


def _steps(lines: Mapping[str, Sequence[Point]]) -> list[str]:
    """Each method against itself with less done to it."""
    names = list(lines)
    found = []
    for before, after in ((a, b) for i, b in enumerate(names) for a in names[:i]):
        methods = {p.method for p in lines[before]} & {p.method for p in lines[after]} - {"float"}
        for method in sorted(methods):
            both = [
                replace(p, method=f"{method}, {name}")
                for name in (before, after)
                for p in lines[name]
                if p.method == method
            ]
            found += equal_accuracy_savings(both, [(f"{method}, {after}", f"{method}, {before}")])
    return [sentence(one) for one in found if one.saving is not None]


def draw(network: Network, results: Sequence[Result], path: Path) -> Path:
    """The most that was done to every method without training, a panel for each family."""
    lines = curves(results)
    name = next(n for n in (FEEDBACK, SHIFTED, ROUNDED) if n in lines)
    shown = list(lines[name])
    if name != ROUNDED:
        shown += [p for p in lines.get(ROUNDED, []) if p.method == "float"]
    panels: dict[str, list[str]] = {}
    for p in shown:
        methods = panels.setdefault(p.family, [])
        if p.method not in methods:
            methods.append(p.method)
    return size_accuracy(shown, path, title=f"{network.title}: not trained, {name}", panels=panels)


def write_document(results: Sequence[Result], folder: Path, networks: Sequence[Network] = NETWORKS) -> None:
    """Write `family.md`, `family.csv` and a figure for each network."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {**row, "variation": name, "coder": "smallest"}
        for name in VARIATIONS
        for row in trial_rows([r for r in results if variation(r["cell"]) == name])
    ]
    if rows:
        write_csv(rows, folder / "family.csv", columns=list(rows[0]))
    by_title = network_of(results, networks)
    for network in networks:
        if network.title in by_title:
            draw(network, by_title[network.title], folder / f"family-{network.model}.svg")
    (folder / "family.md").write_text(document(results, networks), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the document of a finished study."""
    parser = argparse.ArgumentParser(description="Write the document of the family study.")
    parser.add_argument("run", type=Path, help="the study's folder, which holds study.db")
    parser.add_argument("folder", type=Path, help="where the document goes")
    given = parser.parse_args(arguments)
    store = StudyStore(open_storage(given.run / "study.db"), given.run.name)
    results = sorted(store.results(), key=lambda record: record["cell_id"])
    store.close()
    write_document(results, given.folder)


if __name__ == "__main__":
    main()
