"""What the family study compares: methods, each a curve from few bytes to many, and networks.

A cell is JSON: dataset, holdout, model, start, family, method, recipe, phases (one plan, and how it is tuned), fit and
regime where they are not the defaults, feedback (its λ, where errors are fed back), dense (a plan for what is not a
weight), repair (whether batch-norm statistics are shifted), calibration (how many training images may be looked at),
seed.  The start is trained (`trial.trained_start`) or `{"file": …}`, a public network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitbook.lattice.e8p import E8P
from bitbook.lattice.lattice import Lattice
from bitbook.plan import Plan
from bitbook.quantizer import Quantizer
from bitbook.scalar.ecsq import ECSQ
from bitbook.scalar.leaves import Float, Integer
from bitbook.scalar.pruned import Pruned
from bitbook.scalar.sign_magnitude import SignMagnitude
from bitbook.scalar.table import NF4, PowersOfTwo, Table
from bitbook.scalar.uniform import Uniform
from bitbook.study.grid import MNIST, SOURCE_TUNE, STRONG_START
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
