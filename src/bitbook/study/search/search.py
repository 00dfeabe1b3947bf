"""Search: recipes for each tensor and how they are trained, for few bytes and much accuracy at once.

    grid's results ─┐                        ┌─► claim ─► train half ─► hopeless? ─► train on ─► bytes, accuracy
    allocator ──────┴─► sampler ─► a cell ───┘                             └─► pruned, with its reason
                          ▲                                                                       │
                          └───────────────────────── storage ◄────────────────────────────────────┘
    front on validation ─► the same recipes as cells of a grid, several seeds ─► test

A trial is a cell like those of a grid, in a study of its own, so that workers, resumption and refused late results are
those of `run.py`. Whoever finds the queue empty proposes the next cell (`Proposer`), from what the storage holds; so
any number of machines search together, and none of them leads. A cell says everything, the front that it is pruned
against included: it can be repeated by itself.

Trials see training and validation data. Of the front that is found, each recipe is trained again with every seed, as a
cell of a grid is, and only these read the test data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import optuna
import torch
from optuna.trial import TrialState, create_trial
from torch import Generator, nn

from bitbook.apply import freeze, quantize_
from bitbook.artifact import to_bytes
from bitbook.coding.fixed import Fixed
from bitbook.errors import PlanError, StudyError
from bitbook.loop import Training, evaluate, run_epochs
from bitbook.models import PRETRAINED_MODELS, build_model
from bitbook.plan import Plan
from bitbook.qat import Regime
from bitbook.quantizer import FitOptions
from bitbook.study import trial
from bitbook.study.grid import DIGITS, MNIST, SOURCE_TUNE, STRONG_START, Recipe, cell
from bitbook.study.run import run_study
from bitbook.study.search.space import Space
from bitbook.study.stats import pareto_front
from bitbook.study.storage import StudyStore, canonical_json, open_storage

Cell = Mapping[str, Any]
Sampler = Literal["tpe", "nsga2", "random"]
TRIAL, PROPOSER = "bitbook.study.search.search:run_trial", "bitbook.study.search.search:Proposer"
SETTINGS = {"digits": DIGITS, "mnist": MNIST}
"""Grids whose model, start and training a search of the same data set takes over."""
ALLOCATED_BITS = (1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
"""Bits per weight at which the allocator says what to begin with."""
_RATE = 1e-2  # at which that is trained
_POPULATION = 10  # of NSGA-II, a generation; with 20, it learns little in a hundred trials
_CALIBRATION, _SEQUENCES = 512, 64  # examples on which sensitivities are measured
_LEAST_ERROR = 0.05  # percent; stands for no error at all where a logarithm is taken
_ASKED = 50  # proposals that were made before, until another sampler is asked


@dataclass(frozen=True)
class SearchSettings:
    """What a search is; it goes on only under the same."""

    dataset: str
    model: str
    holdout: int
    start: Mapping[str, Any]
    """How the float model is trained; see `Training`."""
    epochs: int
    batch: int
    seed: int = 0
    """Of starts, of training and of the sampler."""
    sampler: Sampler = "tpe"
    margin: float | None = 3.0
    """Percentage points below the front at which a trial is given up halfway; None: none is."""
    grid: str | None = None
    """The study in the same storage whose results it begins with."""

    def __post_init__(self) -> None:
        if self.sampler not in get_args(Sampler):
            raise PlanError(f"sampler={self.sampler!r}: use one of {', '.join(get_args(Sampler))}")
        if self.margin is not None and not self.margin >= 0:
            raise PlanError(f"margin={self.margin!r}: use percentage points of accuracy, zero or more, or None")
        if self.holdout < 1:
            raise PlanError(f"holdout={self.holdout}: a search chooses on held-out examples; hold out at least one")

    @property
    def name(self) -> str:
        """Of the study."""
        return f"search, {self.dataset}, {self.model}"

    @classmethod
    def usual(cls, dataset: str, model: str | None = None, **given: Any) -> SearchSettings:
        """The settings of the grid on this data set, or the usual ones for a model; `given` ones that are None too.

        A public trained network is its own start.
        """
        known = SETTINGS.get(dataset)
        if known is None and model is None:
            raise PlanError(f"there is no usual model for {dataset!r}: name one")
        usual: dict[str, Any] = {"model": model, "start": STRONG_START, "epochs": SOURCE_TUNE["epochs"], "batch": 64}
        if known is not None:
            start, tune = known.starts[0]
            epochs, batch = (tune(Recipe("search", "search", "", Plan()))[key] for key in ("epochs", "batch"))
            usual |= {"model": model or known.model, "start": start, "epochs": epochs, "batch": batch}
        if usual["model"] in PRETRAINED_MODELS:
            usual["start"] = {"epochs": 0}
        if given.get("holdout") is None:
            held = known.holdout if known is not None else len(trial.load_parts(dataset, 0)[0].train_x) // 10
            usual["holdout"] = held
        return cls(dataset, **usual | {key: value for key, value in given.items() if value is not None})


# --- a trial


class _Hopeless(Exception):
    """Halfway through its training, a trial is too far below the front."""


def run_trial(cell: Cell) -> dict[str, Any]:
    """Run one cell of a search: train under its plan, write the file, and measure it on validation data.

    Its bytes are known before training, since its recipes have a fixed width; codebooks in which codewords fall
    together may end smaller. After `check["after"]` epochs the validation accuracy is taken down, and a trial ends
    there if it is more than `check["margin"]` points below one of `check["front"]` that has no more bytes. Such a
    trial's result is `pruned`, the reason, and it has no `objectives`.
    """
    dataset, data = trial.load_parts(cell["dataset"], cell["holdout"])
    model, _ = trial.trained_start(cell, data)
    (phase,), check = cell["phases"], cell["check"]
    generator = Generator().manual_seed(cell["seed"])
    fit, regime = FitOptions(**cell.get("fit", {})), Regime(**cell.get("regime", {}))
    quantize_(model, Plan.from_json(phase["plan"]), options=fit, regime=regime, generator=generator)
    size = file_size(model)
    found: dict[str, Any] = {"bytes": size}

    def look(epoch: int, loss: float) -> None:
        if epoch + 1 != check["after"]:
            return
        accuracy = evaluate(model, data.val_x, data.val_y).accuracy
        model.train()
        found["checked"] = {"epochs": epoch + 1, "accuracy": accuracy}
        reason = hopeless(size, accuracy, check)
        if reason is not None:
            raise _Hopeless(reason)

    try:
        losses = run_epochs(
            model, data.train_x, data.train_y, Training(**phase["tune"]), generator=generator, after_epoch=look
        )
    except _Hopeless as reason:
        return {**found, "pruned": str(reason)}
    if losses and not math.isfinite(losses[-1]):
        return {**found, "pruned": f"training diverged: loss {losses[-1]} after {len(losses)} epochs"}
    untested = replace(dataset, test_x=dataset.test_x[:0], test_y=dataset.test_y[:0])
    measured = trial.measure_file(freeze(model), cell["model"], untested, data, Fixed(), "per-tensor")
    return {**found, **{key: measured[key] for key in ("objectives", "bytes", "rows", "ledger")}}


def file_size(model: nn.Module) -> int:
    """Bytes of the file that a quantized model would be written to now, at fixed width."""
    return len(to_bytes(freeze(model), Fixed(), "per-tensor")[0])


def hopeless(size: int, accuracy: float, check: Mapping[str, Any]) -> str | None:
    """Why a trial of this size and accuracy, halfway, is given up; None if it is not.

    check: `after`, `margin` and the `front`, pairs of bytes and accuracy; with None as a margin, there is no rule.
    """
    margin = check["margin"]
    rivals = [point for point in check["front"] if point[0] <= size]
    if margin is None or not rivals:
        return None
    best = max(rivals, key=lambda point: point[1])
    if accuracy >= best[1] - margin:
        return None
    return (
        f"{accuracy:.2f} % after {check['after']} epochs in {size:,} bytes: more than {margin:g} points below "
        f"{best[1]:.2f} % in {best[0]:,.0f} bytes"
    )


# --- what is tried next


class Proposer:
    """Puts a search's next cell into its queue: what a sampler makes of all results so far.

    Called by whoever finds the queue empty. The sampler is made anew for each cell, with a seed that follows from the
    number of cells there are: a search that one worker runs ends the same whether it was interrupted or not.
    """

    def __init__(self, store: StudyStore, limit: int) -> None:
        """`limit` cells are proposed in all, those before included."""
        self.store, self.limit = store, limit
        self.settings = SearchSettings(**store.settings["search"])

    def __call__(self) -> int:
        """Propose a cell; returns how many are new, none if there are enough, or if all there are were tried."""
        done, open_ = self.store.results(), self.store.unfinished()
        failed = [failure["cell"] for failure in self.store.failures()]
        tried = [*(record["cell"] for record in done), *open_, *failed]
        if len(tried) >= self.limit:
            return 0
        parameters = self._ask(done, open_, tried)
        if parameters is None:
            return 0
        proposed = self.cell(parameters, self.settings.sampler, done)
        return self.store.enqueue([proposed], limit=self.limit)

    def begin(self) -> int:
        """Put what the allocator would choose into the queue; returns how many cells that are."""
        settings = self.settings
        _, data = trial.load_parts(settings.dataset, settings.holdout)
        start = {key: getattr(settings, key) for key in ("dataset", "holdout", "model", "start", "seed")}
        model, _ = trial.trained_start(start, data)
        examples = _CALIBRATION if data.train_x.is_floating_point() else _SEQUENCES
        drawn = torch.randperm(len(data.train_x), generator=Generator().manual_seed(settings.seed))[:examples]
        chosen = self.space.allocated(model.eval(), data.train_x[drawn], ALLOCATED_BITS, rate=_RATE, seed=settings.seed)
        return self.store.enqueue([self.cell(p, "allocator", ()) for p in chosen], limit=self.limit)

    @cached_property
    def space(self) -> Space:
        settings = self.settings
        return Space.of(build_model(settings.model, settings.seed), epochs=settings.epochs, batch=settings.batch)

    @cached_property
    def grid(self) -> list[dict[str, Any]]:
        """The grid's results that a trial of this search can be compared with: the same start, the same seed."""
        return [record for record in grid_results(self.store, self.settings) if self._comparable(record["cell"])]

    @cached_property
    def known(self) -> list[tuple[dict[str, Any], float, float]]:
        """What the sampler begins with: the parameters of those that have any, their bytes and accuracy."""
        found = [(self.space.parameters(record["cell"]), *record["result"]["objectives"]) for record in self.grid]
        return [(parameters, size, accuracy) for parameters, size, accuracy in found if parameters is not None]

    def _comparable(self, cell: Cell) -> bool:
        return all(cell.get(key) == getattr(self.settings, key) for key in ("model", "holdout", "start", "seed"))

    def cell(self, parameters: Mapping[str, Any], origin: str, done: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The cell that stands for these parameters, pruned against the front of the grid and of what is done."""
        settings = self.settings
        points = [record["result"]["objectives"] for record in (*self.grid, *finished(done))]
        front = [points[i] for i in pareto_front(points)] if points else []
        check = {"after": (settings.epochs + 1) // 2, "margin": settings.margin, "front": front}
        return {
            "dataset": settings.dataset,
            "holdout": settings.holdout,
            "model": settings.model,
            "start": dict(settings.start),
            **self.space.said(parameters),
            "seed": settings.seed,
            "parameters": dict(parameters),
            "origin": origin,
            "check": check,
        }

    def _ask(
        self, done: Sequence[Mapping[str, Any]], open_: Sequence[Cell], tried: Sequence[Cell]
    ) -> dict[str, Any] | None:
        """Parameters that say something new; None if neither the sampler nor chance finds any."""
        seen = {canonical_json(self.space.said(cell["parameters"])) for cell in tried}
        seed = 1000 * self.settings.seed + len(tried)
        for sampler in (self.settings.sampler, "random"):
            study = self._history(sampler, seed, done, open_)
            for _ in range(_ASKED):
                asked = study.ask(self.space.distributions)
                if canonical_json(self.space.said(asked.params)) not in seen:
                    return asked.params
                study.tell(asked, state=TrialState.FAIL)
        return None

    def _history(
        self, sampler: str, seed: int, done: Sequence[Mapping[str, Any]], open_: Sequence[Cell]
    ) -> optuna.Study:
        """An Optuna study in memory that holds what is known.

        Bytes and errors as logarithms, so that half the bytes and half the errors count alike wherever. A pruned trial
        has the accuracy that it was pruned for.
        """
        study = _quiet_study(_sampler(sampler, seed))
        space = self.space.distributions
        outcomes = [(record["cell"]["parameters"], *_outcome(record["result"])) for record in done]
        for i, (parameters, size, accuracy) in enumerate([*self.known, *outcomes]):
            generation = 0 if i < len(self.known) else 1 + (i - len(self.known)) // _POPULATION
            values = [math.log(size), math.log(max(100 - accuracy, _LEAST_ERROR))]
            kept = create_trial(
                params=parameters, distributions=space, values=values,
                system_attrs={"NSGAIISampler:generation": generation},
            )  # fmt: skip
            study.add_trial(kept)
        for waiting in open_:
            study.add_trial(create_trial(state=TrialState.RUNNING, params=waiting["parameters"], distributions=space))
        return study


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=_POPULATION)
    return optuna.samplers.RandomSampler(seed=seed)


def _quiet_study(sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    """A study in memory; Optuna would announce each on stderr."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    finally:
        optuna.logging.set_verbosity(before)


def _outcome(result: Mapping[str, Any]) -> tuple[float, float]:
    if "pruned" not in result:
        return result["objectives"][0], result["objectives"][1]
    return result["bytes"], result.get("checked", {"accuracy": 0.0})["accuracy"]


def finished(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results that were not pruned."""
    return [record for record in results if "pruned" not in record["result"]]


def grid_results(store: StudyStore, settings: SearchSettings) -> list[dict[str, Any]]:
    """The results in the same storage of the grid that a search begins with."""
    if settings.grid is None:
        return []
    found = StudyStore(store.storage, settings.grid).results()
    return [record for record in found if record["cell"].get("dataset") == settings.dataset]


# --- the search


@dataclass(frozen=True)
class Found:
    """What a search has found."""

    settings: SearchSettings
    trials: list[dict[str, Any]]
    """Every trial with a result, in the order of proposal."""
    failures: list[dict[str, Any]]
    front: list[dict[str, Any]]
    """The trials that no other beats in both bytes and validation accuracy, by bytes."""
    results: list[dict[str, Any]]
    """The front's recipes as cells of a grid, with every seed."""
    grid: list[dict[str, Any]]
    """The grid's results of the same model, start, held-out part and length of training, with every seed."""
    known: int
    """How many of them the sampler began with."""


def search(
    settings: SearchSettings,
    storage: str | Path,
    *,
    trials: int,
    seeds: int = 3,
    versions: Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Found:
    """Search until there are `trials` trials, then measure the front with every seed, on test data too.

    storage, workers, progress: as for `run_study`; versions: what results depend on besides. The same call goes on
    where it was, with a larger number of trials too. Trials that raise are recorded, and count.
    Raises StudyError if the storage holds a search of the same data set and model under other settings, or if no trial
    was finished.
    """
    fixed = {**(versions or {}), "search": asdict(settings)}
    store = StudyStore.create(open_storage(storage), settings.name, TRIAL, fixed)
    try:
        proposer = Proposer(store, trials)
        if not store.results() and not store.unfinished():
            proposer.begin()
        run_study(
            [], TRIAL, storage, name=settings.name, settings=fixed, workers=workers, keep_going=True,
            progress=progress, propose=PROPOSER, limit=trials,
        )  # fmt: skip
        done, failures = store.results(), store.failures()
        numbered = [{**record, "number": i} for i, record in enumerate(done, 1)]
        front = front_of(numbered)
        if not front:
            reason = failures[0]["error"] if failures else "all were pruned"
            raise StudyError(f"none of {len(done) + len(failures)} trials was finished: {reason}")
        cells = [again(record, seed) for seed in range(seeds) for record in front]
        results = run_study(
            cells, "bitbook.study.trial:run_trial", storage, name=f"{settings.name}, front",
            settings=dict(versions or {}), workers=workers, progress=progress,
        )  # fmt: skip
        grid = [record for record in grid_results(store, settings) if _trained_alike(record["cell"], settings)]
        return Found(settings, numbered, failures, front, results, grid, len(proposer.known))
    finally:
        store.close()


def _trained_alike(cell: Cell, settings: SearchSettings) -> bool:
    """Whether a cell of a grid has the search's start, and was trained as long under its plan."""
    same = all(cell.get(key) == getattr(settings, key) for key in ("model", "holdout", "start"))
    return same and [phase.get("tune", {}).get("epochs") for phase in cell["phases"]] == [settings.epochs]


def front_of(results: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The finished trials that no other beats in both bytes and validation accuracy, by bytes."""
    left = finished(results)
    points = [record["result"]["objectives"] for record in left]
    return [left[i] for i in pareto_front(points)] if points else []


def again(record: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A trial of a search as a cell of a grid, which measures test data too."""
    found = record["cell"]
    (phase,) = found["phases"]
    recipe = Recipe(
        "search", "search", f"trial {record['number']}", Plan.from_json(phase["plan"]),
        found.get("fit", {}), found.get("regime", {}),
    )  # fmt: skip
    said = {key: found[key] for key in ("dataset", "model", "start", "holdout")}
    return cell(recipe, tune=phase["tune"], seed=seed, **said)
