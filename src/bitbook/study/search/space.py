"""What a search may choose: how each tensor is stored, what becomes of the others, and how the model is trained.

    parameters {"fc1.weight kind": "vectors of 4", "fc1.weight rung": 3, …} ◄──► a phase of a cell

A tensor has a kind and a rung. All kinds have as many rungs, from few bytes to many, so that a rung says about the same
whatever the kind, and a sampler that changes the kind keeps the size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from torch import Generator, Tensor, nn

from bitbook.budget.allocate import Option, allocate
from bitbook.budget.candidates import Kind, encode
from bitbook.budget.sensitivity import measure
from bitbook.coding.fixed import Fixed
from bitbook.errors import PlanError
from bitbook.plan import Plan
from bitbook.quantizer import FitOptions, Quantizer
from bitbook.scalar.leaves import Float
from bitbook.scalar.pruned import Pruned
from bitbook.scalar.uniform import Uniform
from bitbook.vector.codebook import Codebook

_ROW, _HALF = (1, -1), Float("bfloat16")
_BITS = (2, 3, 4, 5, 6, 7, 8)
_CODEWORDS = (8, 16, 32, 64, 128, 256, 512)
LADDERS: Mapping[str, Sequence[Quantizer]] = {
    "uniform": [Uniform(b) for b in _BITS],
    "uniform, a scale per row": [Uniform(b, _ROW, scale=_HALF) for b in _BITS],
    **{f"vectors of {d}": [Codebook(k, (1, d), Uniform(5)) for k in _CODEWORDS] for d in (2, 4, 8)},
    "pruned": [Pruned(keep, Uniform(4)) for keep in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)],
}
"""Kinds of recipes, each from few bytes to many; all of them have a fixed width."""
RUNGS = len(_CODEWORDS)
OTHERS: Mapping[str, Quantizer | None] = {
    "float32": None,
    "float16": Float("float16"),
    "8 bits": Uniform(8),
}
"""What becomes of biases and whatever else is no matrix."""
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MOMENTA = (0.0, 0.9)
SCHEDULES = ("constant", "cosine")
SCALES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "refreshed": ({}, {}),
    "learned": ({"range": "lsq"}, {"side": "learned"}),
}
"""Whether scales follow the weights or are parameters (Esser et al. 2020): fit options and regime."""
FIT: Mapping[str, Any] = {"restarts": 1, "iterations": 25}

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Space:
    """The choices that a model leaves, trained for `epochs` in batches of `batch`."""

    ladders: Mapping[str, Mapping[str, Sequence[Quantizer]]]
    """Of each matrix by its name, the kinds whose blocks fit its shape, resolved for it."""
    others: Sequence[str]
    """Names of the other parameters."""
    epochs: int
    batch: int

    @classmethod
    def of(cls, model: nn.Module, *, epochs: int, batch: int) -> Space:
        """The space of a model; raises `PlanError` where it has no matrix."""
        floats = {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.numel()}
        ladders = {name: _fitting(tuple(p.shape)) for name, p in floats.items() if p.dim() >= 2}
        if not ladders:
            raise PlanError("the model has no parameter of two or more axes, so there is nothing to search for")
        return cls(ladders, [name for name in floats if name not in ladders], epochs, batch)

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter and what it may be, as Optuna says it."""
        found: dict[str, BaseDistribution] = {}
        for name, kinds in self.ladders.items():
            found[f"{name} kind"] = CategoricalDistribution(tuple(kinds))
            found[f"{name} rung"] = IntDistribution(0, RUNGS - 1)
        if self.others:
            found["others"] = CategoricalDistribution(tuple(OTHERS))
        return found | {
            "rate": IntDistribution(0, len(RATES) - 1),
            "momentum": CategoricalDistribution(MOMENTA),
            "schedule": CategoricalDistribution(SCHEDULES),
            "scales": CategoricalDistribution(tuple(SCALES)),
        }

    def said(self, parameters: Parameters) -> dict[str, Any]:
        """The keys of a cell that parameters decide: phases, fit and regime."""
        weights = {
            escape(name): kinds[parameters[f"{name} kind"]][parameters[f"{name} rung"]]
            for name, kinds in self.ladders.items()
        }
        other = OTHERS[parameters["others"]] if self.others else None
        if other is not None:
            weights |= {escape(name): other for name in self.others}
        tune = {
            "epochs": self.epochs,
            "lr": RATES[parameters["rate"]],
            "batch": self.batch,
            "momentum": parameters["momentum"],
            "schedule": parameters["schedule"],
        }
        fit, regime = SCALES[parameters["scales"]]
        said = {"phases": [{"plan": Plan(weights).to_json(), "tune": tune}], "fit": {**FIT, **fit}}
        return {**said, "regime": dict(regime)} if regime else said

    def parameters(self, cell: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a cell of a grid is in this space; None where it is none of its choices.

        How long it was trained is not asked: it is something to begin with, whatever it took.
        """
        *before, phase = cell["phases"]
        tune, fit = phase.get("tune"), cell.get("fit", {}).keys() - FIT.keys()
        plan = Plan.from_json(phase["plan"])
        if before or tune is None or plan.inputs or tune["lr"] not in RATES:
            return None
        scaled = ({key: cell["fit"][key] for key in fit}, cell.get("regime", {}))
        scales = next((name for name, options in SCALES.items() if options == scaled), None)
        try:
            recipes = plan.recipes([*self.ladders, *self.others])
        except PlanError:  # a pattern that names nothing here
            return None
        found: dict[str, Any] = {}
        for name in self.ladders:
            place = self._places[name].get(recipes[name])
            if place is None:
                return None
            found[f"{name} kind"], found[f"{name} rung"] = place
        if self.others:
            others = {recipes[name] for name in self.others}
            found["others"] = next((name for name, recipe in OTHERS.items() if others == {recipe}), None)
        found |= {
            "rate": RATES.index(tune["lr"]),
            "momentum": tune.get("momentum", 0.0),
            "schedule": tune.get("schedule", "constant"),
            "scales": scales,
        }
        well_formed = found["momentum"] in MOMENTA and found["schedule"] in SCHEDULES
        return found if well_formed and None not in found.values() else None

    @cached_property
    def _places(self) -> dict[str, dict[Quantizer | None, tuple[str, int]]]:
        """Of each matrix, where a recipe stands; one that stands in several rungs, in the first."""
        return {
            name: {
                stated: (kind, rung)
                for kind, rungs in kinds.items()
                for rung in reversed(range(RUNGS))
                for stated in (LADDERS[kind][rung], rungs[rung])
            }
            for name, kinds in self.ladders.items()
        }

    def allocated(
        self, model: nn.Module, inputs: Tensor, bits: Sequence[float], *, rate: float, seed: int
    ) -> list[dict[str, Any]]:
        """What the allocator chooses from this space at each number of bits per weight.

        Every rung of every matrix is really quantized, what its errors do to the predictions is measured on `inputs`,
        and a knapsack fills the bytes; see `bitbook.budget`. Where not even the lowest rungs fit, there is no choice.
        """
        generator = Generator().manual_seed(seed)
        found, _ = measure(model, inputs, self.ladders, generator=generator)
        weights = dict(model.named_parameters())
        places, options = [], []
        for name, kinds in self.ladders.items():
            places.append([(kind, rung) for kind in kinds for rung in range(RUNGS)])
            options.append([])
            for kind, rung in places[-1]:
                stored = encode(
                    Kind(kinds[kind][rung], options=FitOptions(**FIT)),
                    weights[name], found[name], None, 0.0, generator,
                )  # fmt: skip
                size = len(Fixed().encode(list(stored.streams())))
                options[-1].append(Option(size, found[name].loss(weights[name], stored)))
        count = sum(weights[name].numel() for name in self.ladders)
        chosen = []
        for target in bits:
            picks = allocate(options, int(target * count / 8))
            if picks is None:
                continue
            parameters: dict[str, Any] = {}
            for name, place, pick in zip(self.ladders, places, picks, strict=True):
                parameters[f"{name} kind"], parameters[f"{name} rung"] = place[pick]
            parameters |= {"others": "float16"} if self.others else {}
            parameters |= {"rate": RATES.index(rate), "momentum": 0.0, "schedule": "constant", "scales": "refreshed"}
            chosen.append(parameters)
        return chosen


def _fitting(shape: tuple[int, ...]) -> dict[str, list[Quantizer]]:
    """The kinds whose blocks divide the shape, each rung resolved for it."""
    found = {}
    for kind, rungs in LADDERS.items():
        try:
            found[kind] = [recipe.resolve(shape) for recipe in rungs]
        except PlanError:
            continue
    return found
