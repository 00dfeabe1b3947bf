"""A budget in, a model out: measure, choose, encode, repair, weigh the file, choose again.

model ──► sensitivities ──► candidates at a few prices ──► knapsack ──► error feedback, layer by layer
                                   ▲                                            │
                                   └── what the file weighs more or less ◄── repairs, vectors, file
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from bitbook.apply import freeze, restore
from bitbook.artifact import Artifact, Ledger
from bitbook.artifact.write import to_bytes
from bitbook.budget.allocate import allocate
from bitbook.budget.candidates import MATRIX_KINDS, VECTOR_KINDS, Candidate, Kind, Tensors, encode
from bitbook.budget.report import Choice, Repair, Report
from bitbook.budget.sensitivity import measure, weighted
from bitbook.calibration.calls import calls, evaluating, repeatable, tensors_in
from bitbook.calibration.importance import second_moments
from bitbook.calibration.outputs import Categorical, Outputs, mean_divergence, tensor_of
from bitbook.errors import PlanError, WeightError
from bitbook.quantizer import Quantized, checked, quantize
from bitbook.scalar.leaves import Integer
from bitbook.slot import slots
from bitbook.surgery.batchnorm import absorb_statistics, normalisations, shift_statistics
from bitbook.surgery.biases import correct_biases

ROUNDS = 4
"""Files that are made to fill a budget."""
TRUSTS = (1.0, 0.5, 0.0)
_MIDDLE = 3.0  # bits per weight, at which a search for an accuracy begins
_FULL = 0.995  # of a budget: full enough
_EVEN, _EVEN_TRIES = 0.01, 8  # of bits per weight, where all matrices are to have the same
_DEAREST = 2.0**16  # times a price: nothing is worth its bits
_MORE = 6  # files beyond those, where none is within the budget yet
_WALK = 12  # prices that are tried on the way to a budget
_LADDER = (0.5, 2**-0.5, 2**0.5, 2.0)  # prices around the right one, for the knapsack to choose among
_KEPT = 1 << 28  # bytes of reference outputs that are kept rather than computed again


class Fitted(NamedTuple):
    """A compressed model, and how it came about."""

    artifact: Artifact
    report: Report


class _File(NamedTuple):
    """One file that was made on the way."""

    ledger: Ledger
    divergence: float
    artifact: Artifact
    chosen: Mapping[str, Candidate]
    repairs: Sequence[Repair]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.ledger.total


Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class FitSettings:
    """How a budget is fitted; nothing here is needed to decode."""

    outputs: Outputs = Categorical()
    """What the model's outputs mean."""
    matrices: Mapping[str, Kind] = field(default_factory=lambda: MATRIX_KINDS)
    """What tensors of two and more axes may be stored as; the first must be priced."""
    vectors: Mapping[str, Kind] = field(default_factory=lambda: VECTOR_KINDS)
    """What other parameters may be stored as."""
    trust: float | None = None
    """How far the Fisher information is trusted, from 0 (errors of all weights count alike) to 1; None: whichever of
    `TRUSTS` gives the file of least divergence at the first budget."""
    repairs: bool = True
    """Whether statistics of batch normalisations and biases are corrected where that lowers the loss."""
    seconds: float | None = None
    """Time after which no more is tried; what has begun is finished."""


class Fit:
    """A model that is measured once, and can then be fitted to any budget.

    Args:
        model: any trained module; it stays as it is.
        batches: calibration inputs, see `bitbook.calibration.calls`; a few hundred examples.
        settings: what may be chosen.
        seed: of k-means, and of labels drawn for the Fisher information.
        progress: called now and then.

    Raises `PlanError` where the model is quantized already or there are no inputs, and `WeightError` for weights that
    are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Tensor | Iterable[Any],
        settings: FitSettings = FitSettings(),
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        if any(slots(module) for module in model.modules()):
            raise PlanError("the model is quantized already; fit the float model, or dequantize_ it first")
        self.began = time.monotonic()
        self.settings, self.progress = settings, progress or (lambda what, done, total: None)
        self.generator = Generator().manual_seed(seed)
        self.batches = repeatable(batches)
        self.original = model
        try:
            self.reference = copy.deepcopy(model).eval()
        except (RuntimeError, ValueError) as error:
            raise PlanError(f"the model cannot be copied: {error}; remove weight_norm, run lazy layers once") from error
        absorbed = copy.deepcopy(self.reference)
        _absorb(absorbed)
        self.absorbed = absorbed
        self._answers: list[tuple[Any, Tensor]] | None = None
        self.progress("measuring sensitivities", 0, 1)
        parameters = dict(absorbed.named_parameters())
        names = [name for name, parameter in parameters.items() if _quantizable(parameter)]
        self.dense = {name: "not floating-point, or without elements" for name in parameters if name not in names}
        self._weights: dict[str, Tensor] = {}
        for name in names:
            try:
                self._weights[name] = checked(parameters[name])
            except WeightError as error:
                raise WeightError(f"{name}: {error}") from error
        self._found, self.seen = measure(
            absorbed, self.batches, names, outputs=settings.outputs, generator=self.generator
        )
        self._count = sum(weight.numel() for weight in self._weights.values())
        self.trust = settings.trust
        self.tensors = self._tensors(1.0 if settings.trust is None else settings.trust)

    # -- what is asked for ---------------------------------------------------------------------
    def to_size(self, budget: int, rounds: int = ROUNDS) -> Fitted:
        """The file of `budget` bytes at most with the least expected loss.

        Where there is none, the smallest that could be made; the report says so.
        """
        whole = freeze(self.original)
        unchanged = len(to_bytes(whole)[0])
        if unchanged <= budget:
            return self._as_it_is(whole, unchanged, budget)
        lam, extra = self._trusted(budget)
        self._widen(lam)
        made: list[_File] = []
        while True:
            chosen = self._allocated(lam, budget - extra)
            made.append(file := self._file(chosen))
            fitting = [one for one in made if one.size <= budget]
            least = {name: min(c.option.size for c in self._near(of, lam)) for name, of in self.tensors.items()}
            exhausted = file.size > budget and all(c.option.size == least[name] for name, c in chosen.items())
            full = _FULL * budget <= file.size <= budget
            enough = len(made) >= rounds or self._late()
            if full or exhausted or (enough and fitting) or len(made) == rounds + _MORE:
                break
            self.progress(f"file of {file.size} bytes, divergence {file.divergence:.5g}", len(made), rounds)
            # What the file has beyond its tensors by themselves, and a margin where it has missed often enough.
            extra = file.size - sum(candidate.option.size for candidate in chosen.values())
            extra += budget // 400 if enough else 0
        if fitting:
            return self._fitted(budget, lam, min(fitting, key=lambda one: one.divergence), len(made))
        made.append(self._file(self._smallest(lam)))
        smallest = min(made, key=lambda one: one.size)
        if unchanged <= smallest.size:
            return self._as_it_is(whole, unchanged, budget)
        return self._fitted(budget, lam, smallest, len(made))

    def at_price(self, lam: float) -> Fitted:
        """The first kind of each tensor, its codes chosen for the least loss plus `lam` · bits."""
        return self._fitted(None, lam, self._file(self._cheapest(lam)), 1)

    def evenly(self, bits: float) -> Fitted:
        """Every matrix at about the same bits per weight, the rest at the price that this has on average.

        What allocation is compared with: the same kinds, the same feedback and repairs, but no choice between tensors.
        """
        lam = self._first_price(bits)
        chosen: dict[str, Candidate] = {}
        for done, (name, tensors) in enumerate(self.tensors.items()):
            self.progress("equal bits", done, len(self.tensors))
            if tensors.weight.dim() < 2:
                continue
            kind, count, own = next(iter(tensors.kinds)), tensors.weight.numel(), lam
            for _ in range(_EVEN_TRIES):
                candidate = tensors.find(kind, own, self.generator)
                if candidate is None:
                    raise PlanError(f"{name}: {tensors.refused[kind]}")
                found = 8 * candidate.option.size / count
                if name not in chosen or abs(found - bits) < abs(8 * chosen[name].option.size / count - bits):
                    chosen[name] = candidate
                if abs(found - bits) < _EVEN * bits:
                    break
                own *= 4.0 ** min(max(found - bits, -3), 3)
        middle = math.exp(sum(math.log(candidate.lam) for candidate in chosen.values()) / max(len(chosen), 1))
        for name, tensors in self.tensors.items():
            if name not in chosen:
                kinds = [tensors.find(kind, middle, self.generator) for kind in tensors.kinds]
                chosen[name] = min((c for c in kinds if c is not None), key=lambda c: c.cost(middle))
        return self._fitted(None, middle, self._file(chosen), 1)

    def within(self, acceptable: Callable[[nn.Module], bool], steps: int = 8) -> Fitted:
        """The smallest file found whose model is acceptable: prices are raised while it is, then halved in between.

        Raises `PlanError` where not even a price of almost nothing gives an acceptable model.
        """

        def tried(octaves: float) -> Fitted | None:
            fitted = self.at_price(start * 2**octaves)
            return fitted if acceptable(self.restored(fitted.artifact)) else None

        start, _ = self._trusted(int(_MIDDLE * self._count / 8))
        found, low, high, step = tried(0.0), 0.0, math.inf, 2.0
        if found is None:
            low, high = -math.inf, 0.0
        for _ in range(steps):
            if self._late():
                break
            at = (low + high) / 2 if math.isfinite(low + high) else (low + step if found else high - step)
            if math.isfinite(low + high) and high - low < 0.2:
                break
            fitted = tried(at)
            if fitted is None:
                high = at
            else:
                low, found = at, fitted
        if found is None:
            raise PlanError("no file that keeps what was asked for was found; allow a larger loss, or more time")
        return found

    def restored(self, artifact: Artifact) -> nn.Module:
        """A model with what the file holds, evaluating."""
        return restore(artifact, copy.deepcopy(self.original)).eval()

    def divergence(self, model: nn.Module) -> float:
        """How far predictions are from the float model's, a mean over those on the calibration inputs."""
        with evaluating(model):
            return mean_divergence(
                self.settings.outputs,
                ((tensor_of(model(*call.args, **call.kwargs)), known) for call, known in self._references()),
            )

    # -- choosing ------------------------------------------------------------------------------
    def _tensors(self, trust: float) -> dict[str, Tensors]:
        """The parameters, without candidates yet."""
        found = weighted(self._found, trust)
        return {
            name: Tensors(weight, found[name], self.settings.matrices if weight.dim() >= 2 else self.settings.vectors)
            for name, weight in self._weights.items()
        }

    def _trusted(self, budget: int) -> tuple[float, int]:
        """A price for the budget; the first time, under each trust that may be chosen, of which the best stays."""
        if self.trust is not None:
            return self._price_for(budget)
        tried = []
        for trust in TRUSTS:
            if tried and self._late(0.3):
                break
            self.tensors = self._tensors(trust)
            lam, extra = self._price_for(budget)
            file = self._file(self._cheapest(lam))
            # Sizes differ a little; at equal bytes, a bit per weight is a factor of four.
            bits = 8 * (file.size - budget) / self._count
            self.progress(f"trust {trust}: divergence {file.divergence:.5g}", len(tried), len(TRUSTS))
            tried.append((file.divergence * 4.0**bits, trust, lam, extra, self.tensors))
        _, self.trust, lam, extra, self.tensors = min(tried, key=lambda one: one[0])
        return lam, extra

    def _first_price(self, bits: float) -> float:
        """The slope of loss against bits if a bit less were a factor of four in squared error, from no bits on."""
        whole = sum(tensors.sensitivity.left_out(tensors.weight) for tensors in self.tensors.values())
        return max(2 * math.log(2) * whole * 4.0**-bits / self._count, 1e-30)  # also of weights that are all zero

    def _candidates(self, lam: float, what: str) -> dict[str, Candidate]:
        """The first kind that fits each tensor, at a price."""
        found = {}
        for done, (name, tensors) in enumerate(self.tensors.items()):
            self.progress(what, done, len(self.tensors))
            for kind in tensors.kinds:
                candidate = tensors.find(kind, lam, self.generator)
                if candidate is not None:
                    found[name] = candidate
                    break
            else:
                raise PlanError(f"{name}: no kind fits it: {tensors.refused}")
        return found

    def _price_for(self, budget: int) -> tuple[float, int]:
        """A price near the budget, and what a file of such codes weighs beyond the sum of its tensors."""
        count, lam = self._count, self._first_price(8 * budget / self._count)
        tried: dict[float, int] = {}
        extra = 0
        for step_number in range(1, _WALK + 1):
            chosen = self._candidates(lam, f"candidates at price {step_number}")
            size = len(to_bytes(self._artifact({n: c.stored for n, c in chosen.items()}, self.absorbed))[0])
            extra = size - sum(candidate.option.size for candidate in chosen.values())
            tried[lam] = size
            above = [price for price, bytes_ in tried.items() if bytes_ > budget]
            below = [price for price, bytes_ in tried.items() if bytes_ <= budget]
            if abs(size - budget) < 0.04 * budget or (below and self._late(0.6)):
                return lam, extra
            if below and above and min(below) / max(above) < 2:
                return lam, extra
            if not below and len(tried) > 3 and size > 0.98 * sorted(tried.values())[1]:  # a higher price gains nothing
                return lam, extra
            if step_number == _WALK:
                break
            missing = 8 * (size - budget) / count  # bits per weight; each is a factor of four in price
            step = min(max(4.0 ** (missing if missing < 0 or below else 1.3 * missing), 1 / 64), 64.0)
            step = min(step, 1 / 1.2) if step < 1 else max(step, 1.2)
            lam *= step
            if above and below and not max(above) < lam < min(below):
                lam = math.sqrt(max(above) * min(below))
        return lam, extra

    def _widen(self, lam: float) -> None:
        """More candidates at and around a price: other kinds, and those prices for what is best at it."""
        for done, tensors in enumerate(self.tensors.values()):
            self.progress("other candidates", done, len(self.tensors))
            if self._late(0.7) and tensors.candidates:
                continue
            for kind in tensors.kinds:
                tensors.find(kind, lam, self.generator)
            near = [c for c in tensors.candidates if c.lam in (lam, 0.0)]
            best = min(near, key=lambda candidate: candidate.cost(lam))
            if tensors.kinds[best.kind].priced and not self._late(0.8):
                for ratio in _LADDER:
                    tensors.find(best.kind, lam * ratio, self.generator)

    def _allocated(self, lam: float, room: int) -> dict[str, Candidate]:
        """The knapsack's choice, or the smallest of everything where nothing fits."""
        near = [self._near(tensors, lam) for tensors in self.tensors.values()]
        options = [[candidate.option for candidate in candidates] for candidates in near]
        picks = allocate(options, room)
        if picks is None:
            picks = [min(range(len(of)), key=lambda i, of=of: of[i].size) for of in options]
        return {name: of[pick] for name, of, pick in zip(self.tensors, near, picks, strict=True)}

    def _smallest(self, lam: float) -> dict[str, Candidate]:
        """Of each tensor the smallest candidate there is, also at a price at which nothing is worth its bits."""
        self._candidates(lam * _DEAREST, "the smallest")
        return {name: min(of.candidates, key=lambda c: c.option.size) for name, of in self.tensors.items()}

    @staticmethod
    def _near(tensors: Tensors, lam: float) -> list[Candidate]:
        """Candidates around a price; those made on the way to it, or for another budget, have no say."""
        prices = {0.0, lam, *(lam * ratio for ratio in _LADDER)}
        return [candidate for candidate in tensors.candidates if candidate.lam in prices]

    def _cheapest(self, lam: float) -> dict[str, Candidate]:
        self._candidates(lam, f"candidates at {lam:.2g}")
        return {
            name: min((c for c in tensors.candidates if c.lam in (lam, 0.0)), key=lambda c: c.cost(lam))
            for name, tensors in self.tensors.items()
        }

    # -- encoding ------------------------------------------------------------------------------
    def _file(self, chosen: Mapping[str, Candidate]) -> _File:
        artifact, repairs, divergence = self.encoded(chosen)
        return _File(to_bytes(artifact)[1], divergence, artifact, chosen, repairs)

    @torch.no_grad()
    def encoded(self, chosen: Mapping[str, Candidate]) -> tuple[Artifact, list[Repair], float]:
        """The chosen candidates, encoded for the inputs that the encoded layers before them give, and repaired.

        Returns what is written, the repairs that were tried, and the divergence of what the file gives back.
        """
        model = copy.deepcopy(self.reference)
        parameters = dict(model.named_parameters())
        stored: dict[str, Quantized] = {}

        def store(name: str, quantized: Quantized) -> None:
            stored[name] = quantized
            parameters[name].copy_(quantized.decode())

        matrices = [name for name, tensors in self.tensors.items() if tensors.weight.dim() >= 2]
        for name in matrices:
            if name not in self.seen.columns:
                store(name, chosen[name].stored)
        for done, (name, uses) in enumerate(self.seen.columns.items()):
            if name not in matrices:
                continue
            self.progress("encoding", done, len(self.seen.columns))
            moments = second_moments(model, self.batches, [name], first_use=uses == self.seen.forwards)[name]
            store(name, self._encode(name, chosen[name], parameters[name], moments))
        repairs = self._repair(model) if self.settings.repairs else []
        _absorb(model)
        for name in self.tensors.keys() - set(matrices):
            store(name, self._encode(name, chosen[name], parameters[name], None))
        artifact = self._artifact(stored, model)
        return artifact, repairs, self.divergence(self.restored(artifact))

    def _encode(self, name: str, candidate: Candidate, weight: Tensor, moments: Tensor | None) -> Quantized:
        tensors = self.tensors[name]
        kind, sensitivity = tensors.kinds[candidate.kind], tensors.sensitivity
        encoder = None if moments is None else sensitivity.encoder(moments)
        return encode(kind, weight, sensitivity, encoder, candidate.lam, self.generator)

    def _repair(self, model: nn.Module) -> list[Repair]:
        """Try each repair in place, and take it back where the divergence does not fall."""
        done = []
        before = self.divergence(model)
        for name, applies, repair in (
            ("statistics of batch normalisation", bool(normalisations(model)), shift_statistics),
            ("biases", True, correct_biases),
        ):
            if not applies:
                continue
            saved = copy.deepcopy(model.state_dict())
            if repair(model, self.reference, self.batches) == []:
                continue
            after = self.divergence(model)
            done.append(Repair(name, before, after))
            if done[-1].kept:
                before = after
            else:
                model.load_state_dict(saved)
        return done

    def _artifact(self, stored: Mapping[str, Quantized], model: nn.Module) -> Artifact:
        """Everything that the file holds; buffers of whole numbers as such."""
        frozen = freeze(model)
        tensors = {
            name: stored.get(name, tensor if isinstance(tensor, Quantized) else _lossless(tensor))
            for name, tensor in frozen.tensors.items()
        }
        return Artifact(tensors, frozen.inputs, frozen.aliases)

    # -- measuring and telling -----------------------------------------------------------------
    def _references(self) -> Iterable[tuple[Any, Tensor]]:
        """Calls, and what the float model answers; kept while they are small."""
        if self._answers is not None:
            yield from self._answers
            return
        kept: list[tuple[Any, Tensor]] | None = []  # with the calls: a loader may shuffle
        size = 0
        with evaluating(self.reference):
            for call in calls(self.batches):
                found = tensor_of(self.reference(*call.args, **call.kwargs))
                if kept is not None:
                    kept.append((call, found))
                    size += sum(tensor.numel() * tensor.element_size() for tensor in tensors_in([call, found]))
                    if size > _KEPT:
                        kept = None
                yield call, found
        self._answers = kept

    def _late(self, share: float = 1.0) -> bool:
        """Whether this share of the time is over."""
        limit = self.settings.seconds
        return limit is not None and time.monotonic() - self.began > share * limit

    def _as_it_is(self, whole: Artifact, size: int, budget: int) -> Fitted:
        reason = "the budget holds the model as it is" if size <= budget else "nothing smaller than the model was found"
        reasons = dict.fromkeys(whole.tensors, reason)
        seconds = time.monotonic() - self.began
        return Fitted(whole, Report(budget, size, size <= budget, 0.0, 0.0, 0.0, (), reasons, (), 0, seconds))

    def _fitted(self, budget: int | None, lam: float, file: _File, rounds: int) -> Fitted:
        """The file, with the reasons for what is in it."""
        ledger, divergence, artifact, chosen, repairs = file
        size, sizes = ledger.total, ledger.by_tensor()
        choices = []
        for name, candidate in chosen.items():
            tensors = self.tensors[name]
            own = candidate.cost(lam)
            others: dict[str, float] = {}
            for other in tensors.candidates:
                if other.kind != candidate.kind and own > 0:
                    others[other.kind] = min(other.cost(lam) / own, others.get(other.kind, math.inf))
            recipe = artifact.tensors[name]
            assert isinstance(recipe, Quantized)
            choices.append(
                Choice(
                    name, candidate.kind, recipe.recipe, tensors.weight.numel(), sizes.get(name, 0),
                    candidate.option.loss, others, dict(tensors.refused), tensors.sensitivity.silent,
                )
            )  # fmt: skip
        dense = {
            name: self.dense.get(name, "a buffer that holds no whole numbers")
            for name, tensor in artifact.tensors.items()
            if isinstance(tensor, Tensor)
        }
        predicted = sum(candidate.option.loss for candidate in chosen.values())
        seconds = time.monotonic() - self.began
        reached = budget is None or size <= budget
        report = Report(
            budget, size, reached, predicted, divergence, lam, tuple(choices), dense, tuple(repairs), rounds, seconds
        )
        return Fitted(artifact, report)


def _quantizable(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.numel() > 0


def _absorb(model: nn.Module) -> None:
    """Let normalisations take their statistics into weight and bias, if all of them have both for themselves."""
    layers = normalisations(model).values()
    owners = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
    shared = {
        id(p) for layer in layers for p in layer._parameters.values() if p is not None and owners.count(id(p)) > 1
    }
    if not shared and all(layer._parameters.get(name) is not None for layer in layers for name in ("weight", "bias")):
        absorb_statistics(model)


def _lossless(buffer: Tensor) -> Tensor | Quantized:
    """Whole numbers from 0 on as codes, which cost nothing where they are all alike; anything else as it is."""
    values = buffer.detach().float()
    if not buffer.numel() or not bool(values.isfinite().all()):
        return buffer
    whole = bool((values == values.round()).all()) and 0 <= float(values.min()) <= float(values.max()) < 1 << 16
    return quantize(Integer(int(values.max()) + 1), values) if whole else buffer
