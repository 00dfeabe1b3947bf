"""Grids: the recipes of a study, written out as cells.

A *recipe* here is a plan with a name: `method` names its curve, `recipe` its point on the curve.  A cell is a
recipe × start × tuning × seed on a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitbook.errors import PlanError
from bitbook.plan import Activation, Plan
from bitbook.quantizer import Quantizer
from bitbook.scalar.leaves import Float, FloatType
from bitbook.scalar.levels import Binary
from bitbook.scalar.pruned import Pruned
from bitbook.scalar.uniform import Uniform
from bitbook.vector.codebook import Codebook

SOURCE_START = {"epochs": 5, "lr": 0.1, "batch": 64}
STRONG_START = {"epochs": 30, "lr": 0.05, "batch": 128, "momentum": 0.9, "schedule": "cosine"}
SOURCE_TUNE = {"epochs": 5, "lr": 1e-3, "batch": 64}
REVISION_TUNE = {"epochs": 10, "lr": 1e-2, "batch": 64}

STRONG_RATES = {"columns": 1e-4, "vectors": 1e-3}
"""Learning rates of methods, by their first word, where 0.01 is too high; chosen on validation, `mnist-tuning`.

The gradient of a codeword is the sum over all blocks that share it: the more share it, the lower the rate.
"""

BITS = (1, 2, 3, 4, 5, 6, 8)
ACTIVATION_BITS = (None, 8, 4)
PERCENTS = (5, 10, 25, 50, 75, 90)
CENTROID_BITS = (2, 3, 4, 5, 6, 8)
ROWS, COLUMNS = (1, -1), (-1, 1)
VECTORS = (2, 4, 8)
CODEWORDS = (16, 64, 256)


@dataclass(frozen=True)
class Recipe:
    """A named plan, with how it is fitted and trained where that differs from the defaults."""

    family: str
    method: str
    name: str
    plan: Plan
    fit: Mapping[str, Any] = field(default_factory=dict)
    regime: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    """A model of its own (narrower, say); None: the study's."""
    before: Plan | None = None
    """A plan under which a first phase of the same length is trained."""
    chance: bool = False
    """Whether accuracy is chance by construction, so that one seed says all."""


def scalar(bits: int) -> Quantizer:
    """The source material's scalar quantizer at `bits` bits: signs at one bit, uniform above."""
    return Binary() if bits == 1 else Uniform(bits)


@dataclass(frozen=True)
class Layers:
    """The tensor and module names that the grid's plans need."""

    weights: str = "fc*.weight"
    modules: str = "fc*"
    output: str = "fc3.weight"
    classes: int = 10

    def plan(self, recipe: Quantizer, *, output: bool = True, inputs: Quantizer | None = None) -> Plan:
        """All weights through `recipe`, with or without the output layer's."""
        weights = {self.weights: recipe} if output else {self.output: None, self.weights: recipe}
        return Plan(weights, {} if inputs is None else {self.modules: Activation(inputs)})


def scalar_recipes(
    layers: Layers, bits: Sequence[int] = BITS, activations: Sequence[int | None] = ACTIVATION_BITS
) -> Iterator[Recipe]:
    """Uniform weights at each width, with inputs at each width; both rules at one bit."""
    for act in activations:
        method = "scalar" if act is None else f"scalar, {act}-bit inputs"
        inputs = None if act is None else scalar(act)
        for p in bits:
            yield Recipe("scalar", method, f"{p} bits", layers.plan(scalar(p), inputs=inputs))
        if 1 in bits:
            plan = layers.plan(Binary(), inputs=inputs)
            yield Recipe("scalar", method, "1 bit, min–max rule", plan, fit={"range": "minmax"})


def learned_recipes(layers: Layers, bits: Sequence[int]) -> Iterator[Recipe]:
    """Uniform weights whose scale is a parameter (Esser et al. 2020)."""
    for p in bits:
        fit, regime = {"range": "lsq"}, {"side": "learned"}
        yield Recipe("scalar", "scalar, learned scale", f"{p} bits", layers.plan(Uniform(p)), fit, regime)


def row_scale_recipes(layers: Layers, bits: Sequence[int]) -> Iterator[Recipe]:
    """Uniform weights with a scale per row."""
    for p in bits:
        yield Recipe("scalar", "scalar, scale per row", f"{p} bits", layers.plan(Uniform(p, ROWS)))


def cluster_recipes(
    layers: Layers,
    block: tuple[int, int],
    percents: Sequence[int] = PERCENTS,
    *,
    output: bool,
    centroids: Uniform | Float = Float(),
) -> Iterator[Recipe]:
    """Whole rows or columns clustered to a percentage of their number."""
    what = "rows" if block == ROWS else "columns"
    family = "fused" if isinstance(centroids, Uniform) else "vector"
    method = what + ("" if output else ", output dense")
    if centroids != Float():
        stored = f"{centroids.bits}-bit" if isinstance(centroids, Uniform) else centroids.dtype
        method += f", {stored} centroids"
    for percent in percents:
        plan = layers.plan(Codebook(percent / 100, block, centroids), output=output)
        chance = output and block == ROWS and layers.classes * percent // 100 <= 1
        yield Recipe(family, method, f"{percent} %", plan, fit={"restarts": 10}, chance=chance)


def vector_recipes(
    layers: Layers, size: int, codewords: Sequence[int] = CODEWORDS, centroids: Uniform | Float = Float()
) -> Iterator[Recipe]:
    """Vectors of `size` inputs at each number of codewords."""
    method = f"vectors of {size}"
    if isinstance(centroids, Uniform):
        method += f", {centroids.bits}-bit centroids"
    family = "fused" if isinstance(centroids, Uniform) else "vector"
    for k in codewords:
        plan = layers.plan(Codebook(k, (1, size), centroids))
        yield Recipe(family, method, f"{k} codewords", plan, fit={"restarts": 1, "iterations": 25})


def float_recipes(types: Sequence[FloatType] = ("float32", "bfloat16", "float16")) -> Iterator[Recipe]:
    """The network as it is, in each float type."""
    for kind in types:
        yield Recipe("float", "float", kind, Plan({"*": Float(kind)}))


def narrow_recipes(models: Sequence[str]) -> Iterator[Recipe]:
    """Control: a smaller network in float16, trained as long."""
    for model in models:
        yield Recipe("float", "narrower float16", model, Plan({"*": Float("float16")}), model=model)


def pruned_recipes(layers: Layers, percents: Sequence[int], bits: Sequence[int]) -> Iterator[Recipe]:
    """Control: the largest weights kept, at each width."""
    for p in bits:
        for percent in percents:
            plan = layers.plan(Pruned(percent / 100, Uniform(p)))
            yield Recipe("pruned", f"pruned, {p} bits", f"{percent} % kept", plan)


def source_recipes(layers: Layers) -> Iterator[tuple[Recipe, Mapping[str, Any] | None]]:
    """The source material's own configurations, and its later revision's, each with how it is tuned."""
    rows, fused = Codebook(0.9, ROWS), Codebook(0.9, ROWS, Uniform(4))
    ten = {"restarts": 10}
    yield Recipe("float", "source", "float", Plan()), None
    yield Recipe("float", "source", "float, trained on", Plan()), SOURCE_TUNE
    yield Recipe("scalar", "source", "4/4 bits", layers.plan(Uniform(4), inputs=Uniform(4))), SOURCE_TUNE
    yield Recipe("scalar", "source", "4 bits (revision)", layers.plan(Uniform(4))), REVISION_TUNE
    for output in (True, False):
        said = "" if output else ", output dense"
        plan = layers.plan(Codebook(0.1, ROWS), output=output)
        yield Recipe("vector", "source", f"rows 10 %{said}", plan, fit=ten), SOURCE_TUNE
        plan = layers.plan(rows, output=output)
        yield Recipe("vector", "source", f"rows 90 % (revision){said}", plan, fit=ten), SOURCE_TUNE
        plan = layers.plan(fused, output=output)
        yield Recipe("fused", "source", f"rows 90 %, 4-bit centroids (revision){said}", plan, fit=ten), SOURCE_TUNE
        before = layers.plan(rows, output=output)
        name = f"rows 90 %, float then 4-bit centroids (revision){said}"
        yield Recipe("fused", "source", name, plan, fit=ten, before=before), SOURCE_TUNE


def mnist_recipes() -> Iterator[Recipe]:
    """The whole experiment."""
    layers = Layers()
    yield from float_recipes()
    yield from scalar_recipes(layers)
    yield from learned_recipes(layers, (2, 3, 4))
    yield from row_scale_recipes(layers, (2, 3, 4))
    for block in (ROWS, COLUMNS):
        for output in (True, False):
            yield from cluster_recipes(layers, block, output=output)
    for p in CENTROID_BITS:
        yield from cluster_recipes(layers, ROWS, output=False, centroids=Uniform(p))
    yield from cluster_recipes(layers, ROWS, (50, 75, 90), output=True, centroids=Uniform(4))
    yield from cluster_recipes(layers, ROWS, output=False, centroids=Float("bfloat16"))
    yield from cluster_recipes(layers, ROWS, output=False, centroids=Float("float16"))
    for size in VECTORS:
        yield from vector_recipes(layers, size)
        yield from vector_recipes(layers, size, centroids=Uniform(5))
    yield from narrow_recipes([f"mlp-784-{n}-{n // 2}-10" for n in (8, 16, 24, 32, 48, 64)])
    yield from pruned_recipes(layers, (5, 10, 20, 40), (4, 6))


def digits_recipes() -> Iterator[Recipe]:
    """A small grid of every family that runs in a minute."""
    layers = Layers()
    yield from float_recipes(("float32", "float16"))
    yield from scalar_recipes(layers, (1, 2, 3, 4, 6), (None, 8))
    yield from learned_recipes(layers, (2, 3))
    yield from cluster_recipes(layers, ROWS, (25, 50, 75), output=False)
    yield from cluster_recipes(layers, ROWS, (10,), output=True)
    yield from cluster_recipes(layers, COLUMNS, (25, 50, 75), output=False)
    yield from cluster_recipes(layers, ROWS, (25, 50, 75), output=False, centroids=Uniform(4))
    yield from vector_recipes(layers, 4, (16, 32, 64))
    yield from vector_recipes(layers, 4, (16, 32, 64), centroids=Uniform(5))
    yield from narrow_recipes(["mlp-64-8-8-10", "mlp-64-16-8-10"])
    yield from pruned_recipes(layers, (20, 50), (4,))


def cell(
    recipe: Recipe,
    *,
    dataset: str,
    model: str,
    start: Mapping[str, Any],
    tune: Mapping[str, Any] | None,
    seed: int,
    holdout: int,
) -> dict[str, Any]:
    """One trial, written out completely."""
    plans = [plan for plan in (recipe.before, recipe.plan) if plan is not None]
    step = {} if tune is None else {"tune": dict(tune)}
    found = {
        "dataset": dataset,
        "holdout": holdout,
        "model": recipe.model or model,
        "start": dict(start),
        "family": recipe.family,
        "method": recipe.method,
        "recipe": recipe.name,
        "phases": [{"plan": plan.to_json(), **step} for plan in plans],
        "seed": seed,
    }
    if recipe.fit:
        found["fit"] = dict(recipe.fit)
    if recipe.regime:
        found["regime"] = dict(recipe.regime)
    return found


Tune = Callable[[Recipe], Mapping[str, Any]]


def source_tune(recipe: Recipe) -> Mapping[str, Any]:
    """The source material's: one learning rate for everything."""
    return SOURCE_TUNE


def strong_tune(recipe: Recipe) -> Mapping[str, Any]:
    """As long, at the best of three learning rates for each kind of method."""
    kind = recipe.method.split(",")[0].split()[0]
    return {**SOURCE_TUNE, "lr": STRONG_RATES.get(kind, 1e-2)}


def digits_tune(recipe: Recipe) -> Mapping[str, Any]:
    """Ten short epochs."""
    return {"epochs": 10, "lr": 1e-2, "batch": 32}


@dataclass(frozen=True)
class Setting:
    """What a grid is run on: data, model, starts each with how recipes are tuned, and how much is held out."""

    dataset: str
    model: str
    starts: Sequence[tuple[Mapping[str, Any], Tune]]
    holdout: int


def grid(setting: Setting, recipes: Sequence[Recipe], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """All cells, seed by seed within a start, so that an interrupted study is a study of fewer seeds.

    Every recipe is run without training and tuned, from every start.
    """
    cells = []
    for start, tune in setting.starts:
        for i, seed in enumerate(seeds):
            for recipe in recipes:
                if recipe.chance and i > 0:
                    continue
                for how in (None, tune(recipe)):
                    cells.append(
                        cell(recipe, dataset=setting.dataset, model=setting.model, start=start, tune=how,
                             seed=seed, holdout=setting.holdout)
                    )  # fmt: skip
    return cells


def source_grid(setting: Setting, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The source material's configurations on all of its training data, from its start and from a long one."""
    return [
        cell(recipe, dataset=setting.dataset, model=setting.model, start=start, tune=tune, seed=seed, holdout=0)
        for seed in seeds
        for start in (SOURCE_START, STRONG_START)
        for recipe, tune in source_recipes(Layers())
    ]


MNIST = Setting("mnist", "mlp-784-128-64-10", ((STRONG_START, strong_tune), (SOURCE_START, source_tune)), 5000)
DIGITS_START = {"epochs": 40, "lr": 0.1, "batch": 32, "momentum": 0.9}
DIGITS = Setting("digits", "mlp-64-32-16-10", ((DIGITS_START, digits_tune),), 287)


def tuning_recipes() -> Iterator[Recipe]:
    """A few recipes of every kind, on which its learning rate is chosen."""
    layers = Layers()
    yield from scalar_recipes(layers, (2, 4), (None,))
    yield from cluster_recipes(layers, ROWS, (10, 50), output=False)
    yield from cluster_recipes(layers, ROWS, (10, 50), output=False, centroids=Uniform(4))
    yield from cluster_recipes(layers, COLUMNS, (10, 50), output=False)
    for size in (2, 8):
        yield from vector_recipes(layers, size, (16, 256))
    yield from vector_recipes(layers, 4, (16, 256), centroids=Uniform(5))
    yield from pruned_recipes(layers, (10,), (4,))


def mnist_cells(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The whole experiment: the source material's own configurations, then the grid."""
    return [*source_grid(MNIST, seeds), *grid(MNIST, list(mnist_recipes()), seeds)]


def digits_cells(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A minute's worth of every family on the embedded digits."""
    return grid(DIGITS, list(digits_recipes()), seeds)


def mnist_tuning_cells(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Learning rates for the strong start; validation accuracies of seeds that the experiment does not use."""
    return [
        cell(
            recipe,
            dataset="mnist",
            model=MNIST.model,
            start=STRONG_START,
            tune={**SOURCE_TUNE, "lr": lr},
            seed=1000 + seed,
            holdout=MNIST.holdout,
        )
        for seed in seeds
        for lr in (1e-2, 1e-3, 1e-4)
        for recipe in tuning_recipes()
    ]


GRIDS: Mapping[str, tuple[Callable[[Sequence[int]], list[dict[str, Any]]], int]] = {
    "digits": (digits_cells, 3),
    "mnist": (mnist_cells, 5),
    "mnist-tuning": (mnist_tuning_cells, 1),
}
"""Every grid by name, with the number of seeds it is run with where none is given."""


def study_cells(name: str, seeds: int | None = None) -> list[dict[str, Any]]:
    """The cells of a grid in `GRIDS`; raises `PlanError` for another name."""
    if name not in GRIDS:
        raise PlanError(f"there is no grid {name!r}; use one of {', '.join(GRIDS)}")
    cells, usual = GRIDS[name]
    return cells(range(usual if seeds is None else seeds))
