"""Second moments of what weights are multiplied with: H = E[x xᵀ], measured on calibration inputs.

x are the inputs as the weight's matrix `(rows, cols)` sees them: for convolutions the patches under the kernel, for
groups each group's, for attention what each projection sees, for recurrent layers inputs and hidden states.  Which
calls of torch's functions are seen, `uses.py` says.  Where inputs lie along the weight's *first* axis (embeddings,
transposed convolutions), errors of its rows do not mix as those of columns do; there, `row_energies` says how much
each row matters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float as F32
from jaxtyping import Float64 as F64
from torch import Tensor, nn

from bitbook.blocks import Shape, matrix_shape
from bitbook.calibration.calls import calls, evaluating
from bitbook.calibration.uses import Columns, Rows, Use, Uses, Visit
from bitbook.errors import PlanError

_LEAST_ROW = 1e-4  # of the mean: what a row weighs at least, however little calibration inputs used it


def second_moments(
    model: nn.Module,
    batches: Tensor | Iterable[Any],
    names: Collection[str] | None = None,
    *,
    first_use: bool = False,
) -> dict[str, F64[Tensor, "groups cols cols"]]:
    """Run `batches` of inputs through `model` in evaluation mode, and measure H of each weight.

    A mean over all examples (and places, of a convolution or a sequence); a weight used or tied several times counts
    every use.  By default every weight that is reached, under the first of its names, in the order of their use; with
    `names`, those.  With `first_use`, each forward ends where the first of them was used.

    Args:
        model: any module; it stays as it is.
        batches: inputs of the model, see `calls`: tensors, `(x, y)`, dicts, or a data loader of such.
        names: of parameters.
        first_use: for a single weight that is used once.

    Raises `PlanError` where there are no inputs, a name is no parameter, or no input reaches it.
    """
    sums: dict[str, _Sums] = {}

    def add(name: str, use: Use) -> None:
        if isinstance(use, Columns):
            for x in use.parts:
                sums.setdefault(name, _Sums()).add(name, x, use)
            if first_use:
                raise Enough

    seen = run(model, batches, parameters_by_name(model, names), add)
    for name in names or ():
        if name not in sums:
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            shape = tuple(model.get_parameter(name).shape)
            why = seen.others.get(name, "no calibration input reaches it")
            raise PlanError(f"{name}: {why} (a tensor of {shape} in {kind}); encode it without feedback")
    found = {name: measured.mean() for name, measured in sums.items()}
    for name, moments in found.items():
        if not moments.isfinite().all():
            raise PlanError(f"{name}: its inputs hold NaN or infinity on the calibration inputs")
    return found


@dataclass
class _Sums:
    """Σ x xᵀ of one weight, and over how many places."""

    sums: F64[Tensor, "groups cols cols"] | None = None
    counts: F64[Tensor, " groups"] | None = None

    def add(self, name: str, x: F32[Tensor, "groups places cols"], use: Columns) -> None:
        groups = len(x) * use.shares
        if self.sums is None or self.counts is None:
            self.sums = torch.zeros(groups, x.shape[2], x.shape[2], dtype=torch.float64, device=x.device)
            self.counts = torch.zeros(groups, dtype=torch.float64)
        if max(groups, len(self.sums)) % min(groups, len(self.sums)):
            raise PlanError(f"{name}: used with {len(self.sums)} and with {groups} groups of rows; encode it plainly")
        if groups > len(self.sums):  # used as a whole before, and now in shares
            self.counts = self.counts.repeat_interleave(groups // len(self.sums))
            self.sums = self.sums.repeat_interleave(groups // len(self.sums), 0)
        own = (x.mT @ x).double().repeat_interleave(len(self.sums) // groups, 0)
        at = slice(use.share * len(own), (use.share + 1) * len(own))
        self.sums[at] += own
        self.counts[at] += x.shape[1]

    def mean(self) -> F64[Tensor, "groups cols cols"]:
        assert self.sums is not None
        assert self.counts is not None
        return self.sums / self.counts.clamp_min(1)[:, None, None].to(self.sums.device)


def row_energies(
    model: nn.Module, batches: Tensor | Iterable[Any], names: Collection[str] | None = None
) -> dict[str, F64[Tensor, " rows"]]:
    """How much each row of a weight matters whose inputs lie along its first axis: the mean of its squared input.

    Of an embedding, that is how often each row is chosen, where every row counts as chosen once more than it was
    (Laplace's rule): inputs that were not looked at will choose others.  `importance_of_rows` makes weights of errors
    of it.  Names and errors as in `second_moments`, but for names without such a use, which are left out.
    """
    return survey(model, batches, names).rows


def importance_of_rows(energies: F64[Tensor, " rows"], shape: Shape) -> Tensor:
    """Weights of squared errors, of a weight's shape and with a mean of about one; no row weighs nothing."""
    if energies.shape != shape[:1]:
        raise PlanError(f"energies of {tuple(energies.shape)} rows do not fit a weight of shape {shape}")
    mean = energies.mean()
    weights = (energies / mean).clamp_min(_LEAST_ROW) if mean > 0 else torch.ones_like(energies)
    return weights.float().reshape(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()


def diagonal(moments: Tensor, shape: Shape) -> Tensor:
    """H's diagonal as weights of squared errors, of a weight's shape and with a mean of one: an `importance`."""
    weights = moments.double().reshape(-1, *moments.shape[-2:]).diagonal(dim1=1, dim2=2)
    rows, cols = matrix_shape(shape)
    if weights.shape[1] != cols or rows % len(weights):
        raise PlanError(f"second moments of {tuple(moments.shape)} do not fit a weight of shape {shape}")
    mean = weights.mean()
    weights = (weights / mean if mean > 0 else torch.ones_like(weights)).float()
    return weights[:, None].expand(-1, rows // len(weights), -1).reshape(shape)


def parameters_by_name(model: nn.Module, names: Collection[str] | None) -> dict[int, str]:
    """`id` of each wanted parameter → the name it goes by."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for name in names or ():
        if name not in own:
            raise PlanError(f"the model has no parameter {name!r} of its own; it has {', '.join(list(own)[:8])}, …")
    found: dict[int, str] = {}
    for name in own if names is None else names:
        found.setdefault(id(own[name]), name)
    return found


class Enough(Exception):
    """Raised by a visitor that needs no more of this forward."""


@dataclass
class Survey:
    """How a model uses parameters."""

    forwards: int = 0
    columns: dict[str, int] = field(default_factory=dict)
    """How often each parameter's columns were multiplied with inputs, in the order of first use."""
    rows: dict[str, F64[Tensor, " rows"]] = field(default_factory=dict)
    """Mean squared input of each row, where inputs lie along the first axis, in that order, too."""
    choices: dict[str, F64[Tensor, " rows"]] = field(default_factory=dict)
    """How often each row was chosen, where inputs choose rows: of embeddings."""
    others: dict[str, str] = field(default_factory=dict)
    """Why a parameter has no second moments, in words; without an entry, no input reached it."""


def survey(model: nn.Module, batches: Tensor | Iterable[Any], names: Collection[str] | None = None) -> Survey:
    """How the parameters (by default all) are used, on all batches; raises `PlanError` as `second_moments`."""
    counts: dict[str, int] = {}
    sums: dict[str, F64[Tensor, " rows"]] = {}
    places: dict[str, int] = {}
    choices: dict[str, F64[Tensor, " rows"]] = {}

    def look(name: str, use: Use) -> None:
        if isinstance(use, Columns):
            counts[name] = counts.get(name, 0) + 1
            return
        for energy, count in use.parts:
            if name not in sums:
                sums[name], places[name] = torch.full_like(energy, use.prior), 0
            sums[name] += energy
            places[name] += count
            if use.prior:
                choices[name] = choices.get(name, 0) + energy

    seen = run(model, batches, parameters_by_name(model, names), look)
    rows = {name: energy / max(places[name], 1) for name, energy in sums.items()}
    for name, energy in rows.items():
        if not energy.isfinite().all():
            raise PlanError(f"{name}: its inputs hold NaN or infinity on the calibration inputs")
    return Survey(seen.forwards, counts, rows, choices, seen.others)


@torch.no_grad()
def run(model: nn.Module, batches: Tensor | Iterable[Any], wanted: Mapping[int, str], visit: Visit) -> Survey:
    """Call `visit` with each use of each wanted weight; raises `PlanError` where there are no inputs.

    Of the survey, `forwards` and `others` are filled.
    """
    found = Survey()

    def visited(name: str, use: Use) -> None:
        if isinstance(use, Rows):
            found.others.setdefault(name, f"{use.function} has its inputs along the first axis")
        visit(name, use)

    with evaluating(model):
        for args, kwargs in calls(batches):
            found.forwards += 1
            with Uses(wanted, visited) as uses, contextlib.suppress(Enough):
                model(*args, **kwargs)
            for name, function in uses.others.items():
                found.others.setdefault(name, _reason(name, model.get_parameter(name), function))
    if not found.forwards:
        raise PlanError("there are no calibration inputs; pass at least one batch of the model's inputs")
    return found


def _reason(name: str, parameter: Tensor, function: str) -> str:
    if "parametrizations" in name.split("."):
        return (
            "a parametrization computes the weight from it, so that its errors are not the weight's; "
            "torch.nn.utils.parametrize.remove_parametrizations makes the weight a plain one"
        )
    if parameter.dim() < 2:
        return "a vector, not multiplied with inputs as a matrix is"
    return f"used by {function}, where what it is multiplied with is not measured"
