"""Error feedback: each column of a matrix makes up for the errors of those before it, as far as inputs go together.

With H = E[x xᵀ] of the inputs x, the outputs' mean squared error is tr(E H Eᵀ), E = ŵ - w.  Factored as H = R Rᵀ, R
upper triangular, it is a sum over the columns k,

    tr(E H Eᵀ) = Σ_k R_kk² ‖ŵ_k - t_k‖²,    t_k = w_k - Σ_{i<k} E_i R_ik / R_kk

so that columns can be chosen in turn, each to come near its target t_k (GPTQ, Frantar et al. 2023; LDLQ, Chee et al.
2023).  Where a code stands for several columns, R_kk is a triangular block, and R_kk R_kkᵀ the metric in which the
block is chosen (GPTVQ, van Baalen et al. 2024, takes a diagonal).  What is written is an ordinary `Quantized` of the
same recipe: a decoder cannot tell.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float64 as F64
from torch import Generator, Tensor

from bitbook.blocks import Shape, matrix_shape
from bitbook.errors import PlanError
from bitbook.feedback.columns import ColumnEncoder
from bitbook.quantizer import (
    FitOptions,
    Price,
    Quantized,
    Quantizer,
    encode_fitted,
    quantize,
    quantize_side,
    unbounded,
)
from bitbook.rate.encoding import quantize_priced, settled
from bitbook.rate.rates import fit_rates
from bitbook.scalar.leaves import Integer

_BATCH = 64  # columns that are corrected together for all errors before them
_COARSE, _FINE = 1.3, 1.14  # ratios of the scales that are tried
_DESCENTS = 12  # conjugate gradient steps of a fit of side tensors


@dataclass(frozen=True)
class FeedbackOptions:
    """How errors are fed back; nothing here is needed to decode."""

    damping: float = 0.01
    """Added to the diagonal, as a share of its mean; raised tenfold until the second moments can be factored."""
    order: Literal["activation", "given"] = "activation"
    """Which columns come first: those with the largest inputs, or the first ones."""
    search: bool = True
    """Whether scales are sought by the same measure: multiples of the fitted ones are compared, then side tensors are
    fitted to the codes."""
    sequential: bool = True
    """Of a model: whether a layer's inputs are those that the layers before it give when quantized."""

    def __post_init__(self) -> None:
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise PlanError(f"damping={self.damping!r}: use a share of the mean diagonal, 0 or more, such as 0.01")
        if self.order not in ("activation", "given"):
            raise PlanError(f"order={self.order!r}: use 'activation' or 'given'")


class FeedbackReport(NamedTuple):
    """What error feedback did for one tensor."""

    plain: float
    """tr(E H Eᵀ), the outputs' mean squared error on the calibration inputs, without feedback."""
    chosen: float
    """The same of what was returned; never more."""
    used: bool
    """False where the plain result was at least as good, and was returned."""
    damping: float
    """What was added to the diagonal, as a share of its mean."""
    dead: int
    """Columns whose inputs were never active; nothing is fed back from them."""

    def __str__(self) -> str:
        if not self.used:
            return f"error feedback gave nothing; output error {self.plain:.4g} as without"
        ratio = self.chosen / self.plain if self.plain else 1.0
        return f"output error {self.chosen:.4g}, {ratio:.3f} of that without feedback ({self.dead} dead inputs)"


class ErrorFeedback:
    """An encoder for `quantize` and `quantize_priced` that lowers the error of a layer's outputs.

    Args:
        moments: H = E[x xᵀ] of the inputs, `(cols, cols)`, cols being all axes of the weight but the first; or
            `(groups, cols, cols)` for grouped convolutions, whose rows fall into equal shares with inputs of their own.
            `bitbook.second_moments` measures them.
        options: damping, order, search.
        rows: what the squared errors of each row's output weigh, ≥ 0; all one by default.  They count in every error
            that is compared and in what is fitted, and a price is set against their mean; that rows of little weight
            get fewer bits is what `RowScaled` is for.

    After each call, `report` says what came of it; a plain result that is at least as good is returned instead.
    Raises `PlanError` where moments are not symmetric, positive and finite, or do not fit the weight.
    """

    report: FeedbackReport | None = None

    def __init__(
        self, moments: Tensor, options: FeedbackOptions = FeedbackOptions(), *, rows: Tensor | None = None
    ) -> None:
        moments = moments.detach().double()
        if moments.dim() == 2:
            moments = moments[None]
        if moments.dim() != 3 or moments.shape[1] != moments.shape[2] or not moments.numel():
            raise PlanError(f"second moments of shape {tuple(moments.shape)}: use (cols, cols) or (groups, cols, cols)")
        if not moments.isfinite().all():
            raise PlanError("the second moments hold NaN or infinity; look for such inputs")
        diagonal = moments.diagonal(dim1=1, dim2=2)
        if bool((diagonal < 0).any()) or not torch.allclose(
            moments, moments.mT, rtol=1e-3, atol=float(diagonal.max()) * 1e-4
        ):
            raise PlanError("second moments must be symmetric with a diagonal of squares; pass E[x xᵀ]")
        self.moments: F64[Tensor, "groups cols cols"] = (moments + moments.mT) / 2
        self.options = options
        self.rows: F64[Tensor, "groups rows 1"] | None = None
        if rows is not None:
            self._weigh(rows.detach().double())
        self._last: tuple[Tensor, Tensor] | None = None  # an order of columns, and R

    # -- what recipes see (columns.Feedback) ---------------------------------------------------
    @torch.no_grad()
    def encode(self, w: Tensor, encoder: ColumnEncoder) -> dict[str, Tensor]:
        """The codes of `w`, part by part: a left-looking block substitution in float64."""
        w, width = self._matrix(w), encoder.width
        parts = self._parts(width, encoder.ordered)
        order = torch.cat([torch.arange(*part) for part in parts])
        root, w = self._root(order), w[:, :, order]
        errors, at = torch.zeros_like(w), 0
        count = max(_BATCH // width, 1)
        for batch in (parts[i : i + count] for i in range(0, len(parts), count)):
            to = at + sum(stop - start for start, stop in batch)
            carried = errors[:, :, :at] @ root[:, :at, at:to]
            values = encoder.choose_batch(w[:, :, at:to], carried, root[:, at:to, at:to], batch)
            errors[:, :, at:to] = values - w[:, :, at:to]
            at = to
        return encoder.codes()

    def importance(self, shape: Shape) -> Tensor:
        """H's diagonal, damped, in the shape of a weight, with a mean of one."""
        return self._spread(self._damped(self.damping).diagonal(dim1=1, dim2=2), shape)

    def remaining(self, shape: Shape) -> Tensor:
        """R_kk² in the order in which single columns are taken, in the shape of a weight, with a mean of one."""
        return self._spread(self._remaining(), shape)

    @functools.cached_property
    def average(self) -> float:
        """What a weight's squared error adds to that of the outputs on average, the mean of R_kk²."""
        return float(self._remaining().mean())

    def mapped(self, inputs: F64[Tensor, "cols new"], rows: F64[Tensor, " rows"] | None = None) -> ErrorFeedback:
        """H of the inputs `inputsᵀ · x`, which `v` sees where `w = rows · v · inputsᵀ`."""
        weights = None if self.rows is None else self.rows.flatten()
        if rows is not None:
            weights = rows.double().square() * (1.0 if weights is None else weights)
        return ErrorFeedback(inputs.double().mT @ self.moments @ inputs.double(), self.options, rows=weights)

    # -- what `quantize` calls -----------------------------------------------------------------
    def quantize(
        self,
        recipe: Quantizer,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> Quantized:
        """Encode with feedback; scales by the same measure, the plain result where that is no worse."""
        self._refuse(importance)
        self._extent(tuple(w.shape))
        recipe = recipe.resolve(tuple(w.shape))
        again = _repeated(generator)
        plain = quantize(recipe, w, options=options, generator=generator)

        def attempt(multiple: float) -> Quantized:
            fitted = recipe.fit_fed_back(w * multiple, self, options, again())
            return encode_fitted(recipe, w, fitted, options, lambda r, side: r.encode_fed_back(w, side, self))

        def cost(found: Quantized) -> float:
            return self.error(w, found)

        bounded = not unbounded(plain.recipe, plain.shape)
        scaled = bool(plain.side) and recipe.trains_codes and bounded  # finer steps without a bound are more bytes
        best = sought(attempt, cost) if self.options.search and scaled else attempt(1.0)
        if self.options.search and plain.side:
            best = self._refitted(w, best, options, again=bounded)
        return self._reported(plain, best if cost(best) < cost(plain) else plain, w)

    def quantize_priced(
        self,
        recipe: Quantizer,
        w: Tensor,
        lam: float,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
        rounds: int = 6,
    ) -> Quantized:
        """As `quantize`, for output error plus `lam` · bits: each column weighs R_kk² e² against its bits."""
        self._refuse(importance)
        shape = tuple(w.shape)
        self._extent(shape)
        recipe = recipe.resolve(shape)
        again = _repeated(generator)
        weights = self.importance(shape)
        scale = float(self._damped(self.damping).diagonal(dim1=1, dim2=2).mean())
        plain = quantize_priced(
            recipe, w, lam, importance=weights * scale, options=options, generator=generator, rounds=rounds
        )
        endless, step = unbounded(plain.recipe, plain.shape), options.step
        if endless and step is None and lam > 0:
            step = recipe.step_for(lam / self.average)

        def cost(found: Quantized) -> float:
            return self.error(w, found) + lam * sum(
                fit_rates(spec, found.codes[spec.name]).bits for spec in found.recipe.layout(shape)
            )

        def settle(found: Quantized, passes: int) -> Quantized:
            def encode(recipe: Quantizer, side: Mapping[str, Tensor], price: Price) -> dict[str, Tensor]:
                return recipe.encode_fed_back(w, side, self, price)

            return settled(found, lam, passes, lambda q: self.error(w, q), encode)

        def attempt(multiple: float) -> Quantized:
            sized = replace(options, step=step * multiple) if endless and step is not None else options
            fitted = recipe.fit_fed_back(w if endless else w * multiple, self, sized, again())
            first = encode_fitted(recipe, w, fitted, options, lambda r, side: r.encode_fed_back(w, side, self))
            return settle(first, 2)

        scaled = bool(plain.side) and recipe.trains_codes and not (endless and options.step is not None)
        best = sought(attempt, cost) if self.options.search and scaled else attempt(1.0)
        if self.options.search and plain.side:
            best = self._refitted(w, best, options, again=False)
        best = min((best, settle(best, rounds)), key=cost)
        if not cost(best) < cost(plain):
            best = plain
        return self._reported(plain, best, w)

    @torch.no_grad()
    def error(self, w: Tensor, found: Quantized) -> float:
        """tr(E H Eᵀ): the squared error of all outputs, rows weighed, a mean over the calibration inputs."""
        error = self._matrix(found.decode().double() - w.double())
        return float(((self._weighed(error) @ self.moments) * error).sum().clamp_min(0))

    # -- within --------------------------------------------------------------------------------
    def _weigh(self, rows: F64[Tensor, " rows"]) -> None:
        """Take the mean weight of each group's rows into H, and keep how they differ from it."""
        if rows.dim() != 1 or not len(rows) or len(rows) % len(self.moments):
            raise PlanError(
                f"weights of rows of shape {tuple(rows.shape)}: use one for each row of {len(self.moments)} groups"
            )
        if not rows.isfinite().all() or bool((rows < 0).any()):
            raise PlanError("weights of rows must be finite and not negative")
        grouped = rows.reshape(len(self.moments), -1, 1)
        mean = grouped.mean(1, keepdim=True)
        self.moments = self.moments * mean
        self.rows = torch.where(mean > 0, grouped / torch.where(mean > 0, mean, 1.0), 1.0)

    def _weighed(self, matrix: F64[Tensor, "groups rows cols"]) -> F64[Tensor, "groups rows cols"]:
        return matrix if self.rows is None else self.rows * matrix

    def _refuse(self, importance: Tensor | None) -> None:
        if importance is not None:
            raise PlanError("ErrorFeedback weighs errors by its second moments; leave importance out")

    def _extent(self, shape: Shape) -> tuple[int, int]:
        """Rows of a group, and columns; raises `PlanError` where the moments are another weight's."""
        rows, cols = matrix_shape(shape)
        groups = len(self.moments)
        if self.rows is not None and self.rows.shape[0] * self.rows.shape[1] != rows:
            raise PlanError(
                f"{self.rows.shape[0] * self.rows.shape[1]} weights of rows do not fit a weight of {rows} rows"
            )
        if self.moments.shape[1] != cols or rows % groups:
            raise PlanError(
                f"second moments of {groups} × {self.moments.shape[1]} inputs do not fit a weight of shape {shape}, "
                f"{rows} rows of {cols} columns; measure them on the layer that holds it"
            )
        return rows // groups, cols

    def _parts(self, width: int, ordered: bool = False) -> list[tuple[int, int]]:
        """First column and the one after the last of every part, in the order in which they are chosen."""
        cols = self.moments.shape[1]
        parts = [(start, min(start + width, cols)) for start in range(0, cols, width)]
        if self.options.order == "activation" and not ordered:
            activity = self.moments.diagonal(dim1=1, dim2=2).sum(0)
            parts.sort(key=lambda part: -float(activity[part[0] : part[1]].sum()))
        return parts

    def _remaining(self) -> F64[Tensor, "groups cols"]:
        order = torch.tensor([start for start, _ in self._parts(1)])
        squares = torch.empty(self.moments.shape[:2], dtype=torch.float64)
        squares[:, order] = self._root(order).diagonal(dim1=1, dim2=2).square()
        return squares

    def _spread(self, weights: F64[Tensor, "groups cols"], shape: Shape) -> Tensor:
        rows, cols = self._extent(shape)
        weights = (weights / weights.mean())[:, None].expand(len(weights), rows, cols)
        return self._weighed(weights).float().reshape(shape)

    def _matrix(self, w: Tensor) -> F64[Tensor, "groups rows cols"]:
        return w.double().reshape(len(self.moments), *self._extent(tuple(w.shape)))

    def _damped(self, share: float) -> F64[Tensor, "groups cols cols"]:
        """H with a share of its mean diagonal added; where no input was ever active, the identity."""
        mean = self.moments.diagonal(dim1=1, dim2=2).mean(1)
        mean = torch.where(mean > 0, mean, mean.max() if mean.max() > 0 else 1.0)
        eye = torch.eye(self.moments.shape[1], dtype=torch.float64, device=self.moments.device)
        return self.moments + share * mean[:, None, None] * eye

    @functools.cached_property
    def damping(self) -> float:
        """The least of the asked share, ten times it, … with which H can be factored."""
        share = max(self.options.damping, 1e-12)
        while bool(torch.linalg.cholesky_ex(self._damped(share)).info.any()):
            share *= 10
        return share

    def _root(self, order: Tensor) -> F64[Tensor, "groups cols cols"]:
        """Upper triangular R with R Rᵀ = H in this order of columns: Cholesky from the last column on."""
        if self._last is None or not torch.equal(self._last[0], order):
            damped = self._damped(self.damping)[:, order][:, :, order]
            self._last = order, torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2)
        return self._last[1]

    def _reported(self, plain: Quantized, best: Quantized, w: Tensor) -> Quantized:
        dead = int((self.moments.diagonal(dim1=1, dim2=2) == 0).all(0).sum())
        before, after = self.error(w, plain), self.error(w, best)
        self.report = FeedbackReport(before, after, best is not plain, self.damping, dead)
        return best

    def _refitted(self, w: Tensor, best: Quantized, options: FitOptions, *, again: bool) -> Quantized:
        """Side tensors fitted to the codes, and codes to these, as long as the error falls."""
        least = self.error(w, best)
        for _ in range(3):
            side = self._least_squares(w, best)
            stored = {
                name: quantize_side(child.recipe, side[name], best.recipe.side_options(name, options))
                if name in side
                else best.side[name]
                for name, child in best.recipe.children(best.shape).items()
            }
            recipe = best.recipe.with_children({name: q.recipe for name, q in stored.items()})
            candidates = [replace(best, recipe=recipe, side=stored)]
            if again:
                codes = recipe.encode_fed_back(w, {name: q.decode() for name, q in stored.items()}, self)
                candidates.append(replace(candidates[0], codes=codes))
            error, found = min(((self.error(w, q), i) for i, q in enumerate(candidates)))
            if error >= least:
                break
            best, progress, least = candidates[found], error / least, error
            if progress > 0.98:
                break
        return best

    def _least_squares(self, w: Tensor, found: Quantized) -> dict[str, Tensor]:
        """Side tensors of least error for these codes, by conjugate gradients: decoding is nearly linear in them."""
        side = {name: q.decode() for name, q in found.side.items()}
        moved = {
            name: side[name]
            for name, child in found.recipe.children(found.shape).items()
            if not isinstance(child.recipe, Integer)
        }
        target, direction, norm = w.double(), {}, 0.0

        def decode(values: Mapping[str, Tensor]) -> Tensor:
            return found.recipe.decode(found.codes, {**side, **values}, found.shape)

        for _ in range(_DESCENTS):
            leaves = {name: value.detach().requires_grad_() for name, value in moved.items()}
            with torch.enable_grad():
                decoded = decode(leaves)
            pull = (self._weighed(self._matrix(target - decoded.detach())) @ self.moments).reshape(target.shape)
            if not decoded.requires_grad:
                break
            gradients = torch.autograd.grad(decoded, list(leaves.values()), pull.float(), allow_unused=True)
            gradient = {
                n: torch.zeros_like(moved[n]) if g is None else g for n, g in zip(leaves, gradients, strict=True)
            }
            before, norm = norm, sum(float(g.double().square().sum()) for g in gradient.values())
            if not norm > 0 or not math.isfinite(norm):
                break
            keep = norm / before if before else 0.0
            direction = {n: g + keep * direction[n] if direction else g for n, g in gradient.items()}
            with torch.no_grad():
                change = decode({n: moved[n] + direction[n] for n in moved}) - decoded
                across = float((pull * change).sum())
                change = self._matrix(change)
                curve = float(((self._weighed(change) @ self.moments) * change).sum())
                if not across > 0 or not curve > 0:
                    break
                moved = {n: moved[n] + across / curve * direction[n] for n in moved}
        return {name: value for name, value in moved.items() if bool(value.isfinite().all())}


def _repeated(generator: Generator | None) -> Callable[[], Generator | None]:
    """Generators that all draw what this one would draw next."""
    if generator is None:
        return lambda: None
    state, device = generator.get_state(), generator.device
    return lambda: Generator(device).set_state(state)


def sought(attempt: Callable[[float], Quantized], cost: Callable[[Quantized], float]) -> Quantized:
    """The attempt of least cost over a multiple: downhill from 1 in coarse, then in fine steps."""
    found = attempt(1.0)
    best, least, at = found, cost(found), 1.0
    for ratio in (_COARSE, _FINE):
        for step in (1 / ratio, ratio):
            moved, multiple = False, at
            for _ in range(12):
                multiple *= step
                found = attempt(multiple)
                value = cost(found)
                if not value < least:
                    break
                best, least, at, moved = found, value, multiple, True
            if moved:
                break
    return best
