"""Quantization-aware training: the same recursion as the file, differentiable.

    latent w ──► FakeQuantize ──► ŵ ──► layer          latent: the float weight lives on
    codes    ──► FakeQuantize ──► ŵ ──► layer          frozen codes: only the side tensors learn
    latent w ──► FakeQuantize ──► mean of codewords    soft codes: nearest ones outside training
                   │ freeze
                   ▼
                Quantized ──► file                     bit for bit what training saw

A `FakeQuantize` mirrors a recipe: one for the weight, one below it for each side tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, ItemsView, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Generator, Tensor, nn

from bitbook.errors import PlanError
from bitbook.quantizer import FitOptions, Price, Quantized, Quantizer, StraightThrough, checked
from bitbook.scalar.leaves import Float, Integer

_COLDEST = 1e-5  # of a code's mean squared length: colder than that, soft codes are decided by rounding


@dataclass(frozen=True)
class Regime:
    """What moves during training; None takes each quantizer's own habit."""

    codes: Literal["latent", "frozen", "soft"] | None = None
    """"latent": the float weight trains and is quantized in each forward; "frozen": codes stay as fitted; "soft": the
    float weight trains, and a training forward gives a mean of codewords, the nearest weighing most (DKM, Cho et al.
    2022), while evaluation and `freeze` take the nearest."""
    side: Literal["refreshed", "learned"] | None = None
    """"refreshed": side tensors follow the latent weight in closed form; "learned": they are parameters."""
    reassign_every: int = 1
    """With latent codes: encode anew every so many training forwards, and reuse the codes in between."""
    temperature: float = 0.2
    """Of soft codes: the squared distance at which a codeword's weight falls by e, in multiples of the mean squared
    error of the nearest ones at the fit.  It stays: if it followed the error, weights that drift from their codewords
    would see ever softer ones."""

    def __post_init__(self) -> None:
        if self.codes == "frozen" and self.side == "refreshed":
            raise PlanError("frozen codes leave only the side tensors to train; use side='learned'")
        if self.reassign_every < 1:
            raise PlanError(f"{self.reassign_every=}: use 1 or more")
        if self.codes == "soft" and self.reassign_every > 1:
            raise PlanError("soft codes are a mean in every forward; leave reassign_every at 1")
        if not 0 < self.temperature < math.inf:
            raise PlanError(f"{self.temperature=}: use a positive multiple of the mean squared error")


class FakeQuantize(nn.Module):
    """A tensor that is quantized in every forward; the source that a weight slot reads from.

    Args:
        recipe: how the tensor is stored.
        weight: the float tensor; a `Parameter` is kept as it is and trains on (under `latent`).
        importance: weights of squared errors, w's shape.
    """

    latent: Tensor | None
    rounding: bool = True
    """False lets the latent weight through as it is, for the smooth beginning of a training."""

    def __init__(
        self,
        recipe: Quantizer,
        weight: Tensor,
        *,
        regime: Regime = Regime(),
        options: FitOptions = FitOptions(),
        importance: Tensor | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        w = checked(weight)
        self.shape, self.dtype, self.options = tuple(w.shape), weight.dtype, options
        recipe = recipe.resolve(self.shape)
        fitted = _fitted(recipe, w, importance, options, generator)
        self.recipe = recipe.resolve(self.shape, fitted)
        frozen = regime.codes == "frozen" or (regime.codes is None and not recipe.trains_codes)
        habit = recipe.learns_side or not recipe.trains_codes
        learned = frozen or regime.side == "learned" or (regime.side is None and habit)
        self._reassign_every, self._forwards = regime.reassign_every, 0
        self._temperature: float | None = None
        self.side = nn.Module()  # a ModuleDict would refuse names such as "values"
        for name, child in self.recipe.children(self.shape).items():
            trains = learned and not isinstance(child.recipe, Integer)
            value = nn.Parameter(fitted[name]) if trains else fitted[name]
            follows = Regime() if learned else Regime("latent", "refreshed")
            fixed = Generator().manual_seed(0)  # as quantize_side: a function of the value alone
            below = self.recipe.side_options(name, options)
            source = FakeQuantize(child.recipe, value, regime=follows, options=below, generator=fixed)
            self.side.add_module(name, source)
        self.refreshes = not learned and bool(self.side._modules)
        self.recipe = self.recipe.with_children({name: source.recipe for name, source in self._sources()})
        self._exact = self.recipe == Float() and not frozen and regime.reassign_every == 1
        self._code_names: tuple[str, ...] = ()
        if frozen:
            self.latent = None
        elif isinstance(weight, nn.Parameter):
            self.latent = weight
        else:
            self.register_buffer("latent", weight.detach())
        if frozen or self._reassign_every > 1:
            with torch.no_grad():
                self._keep(self._encoded(w, self._side_values(), importance))
        if regime.codes == "soft":
            with torch.no_grad():
                self._temperature = self._warmth(w, regime.temperature)
                self.recipe.soft(w, self._side_values(), self._temperature)  # refuses here rather than in training

    @property
    def codes(self) -> dict[str, Tensor]:
        """The kept codes, by stream name; empty where every forward encodes anew."""
        return {name: getattr(self, f"codes_{name}") for name in self._code_names}

    def forward(self) -> Tensor:
        """The tensor as the file would give it back, in the weight's own dtype."""
        latent = self.latent
        if self._exact and latent is not None and latent.dtype == torch.float32 == self.dtype:
            return latent  # a scale as most are stored: asked for in every step
        if latent is None:
            value = self.recipe.decode(self.codes, self._side_values(), self.shape)
        else:
            if not self.rounding:
                return latent
            w = latent.float()
            side = self._refreshed(w) if self.refreshes else self._side_values()
            if self._temperature is not None and self.training:
                value = self.recipe.soft(w, side, self._temperature)
            elif self._code_names:
                value = self._between_assignments(w, side)
            else:
                value = self.recipe.surrogate(w, side, self.options)
        return value if value.dtype == self.dtype else value.to(self.dtype)

    @torch.no_grad()
    def refit_(self, options: FitOptions) -> None:
        """Fit the side tensors to the latent weight as it is now; raises `PlanError` under frozen codes."""
        if self.latent is None:
            raise PlanError(f"{self.recipe!r}: frozen codes have no latent weight to fit side tensors to")
        fitted = _fitted(self.recipe, checked(self.latent), None, options, None)
        for name, source in self._sources():
            if source.latent is None or source.latent.shape != fitted[name].shape:
                raise PlanError(f"{self.recipe!r}: the fit of {name} no longer has the shape that is stored")
            source.latent.copy_(fitted[name])

    @torch.no_grad()
    def side_values(self) -> dict[str, Tensor]:
        """The side tensors as the file would give them back."""
        return self._side_values()

    @property
    def shares_side_tensors(self) -> bool:
        """Whether all weights share all side tensors, so that their order does not matter."""
        return all(source.shape[0] == 1 for _, source in self._sources())

    def ladder(self) -> Tensor | None:
        """The values of the magnitudes 1, 2, …, see `Quantizer.ladder`."""
        return self.recipe.ladder(self.side_values())

    def ladder_parameter(self) -> nn.Parameter | None:
        """The parameter that is the ladder, where it learns and is stored as a float."""
        source = dict(self._sources()).get("points")
        learns = source is not None and isinstance(source.recipe, Float) and isinstance(source.latent, nn.Parameter)
        return cast(nn.Parameter, source.latent) if source is not None and learns else None

    @torch.no_grad()
    def freeze_codes(self) -> Tensor:
        """The codes of the last forward, of a recipe with one stream, on their grid."""
        (codes,) = self.freeze().codes.values()
        return codes

    @torch.no_grad()
    def assign_(self, codes: Mapping[str, Tensor]) -> None:
        """Use these codes, by stream name, until the next call; forwards do not encode any more."""
        self._reassign_every = 0
        self._keep(codes)

    @torch.no_grad()
    def freeze(self, price: Price | None = None) -> Quantized:
        """What the last forward stood for, in compressed form; with a price, codes that are worth their bits."""
        w = None if self.latent is None else checked(self.latent)
        if w is not None and self.refreshes:
            self._refreshed(w)
        side = {name: source.freeze() for name, source in self._sources()}
        codes: Mapping[str, Tensor] = self.codes
        if not codes:
            assert w is not None
            values = {name: q.decode() for name, q in side.items()}
            codes = self._encoded(w, values) if price is None else self.recipe.encode_priced(w, values, price)
        return self.recipe.without_unused(Quantized(self.recipe.decoder(), self.shape, codes, side))

    def extra_repr(self) -> str:
        return f"{self.recipe!r}, shape={self.shape}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # .half() gives half weights,
        for _, source in self._sources():
            source.dtype = torch.float32  # but decoding stays what it is in the file
        return self

    def _sources(self) -> ItemsView[str, FakeQuantize]:
        return cast(ItemsView[str, FakeQuantize], self.side._modules.items())

    def _side_values(self) -> dict[str, Tensor]:
        return {name: source.forward() for name, source in self._sources()}

    def _refreshed(self, w: Tensor) -> dict[str, Tensor]:
        """Let the side tensors follow `w`, and give them as the file would."""
        sources = self._sources()
        old = {name: cast(Tensor, source._buffers["latent"]) for name, source in sources}
        new = self.recipe.refresh(w.detach(), old, self.options)
        for name, source in sources:
            source._buffers["latent"] = new[name]
        return {name: source.forward() for name, source in sources}

    def _encoded(self, w: Tensor, side: Mapping[str, Tensor], importance: Tensor | None = None) -> Mapping[str, Tensor]:
        """Codes on the device of `w`, found on the CPU, whose loops encoders are written for."""
        own = None if importance is None else importance.cpu()
        codes = self.recipe.encode(w.cpu(), {name: value.cpu() for name, value in side.items()}, importance=own)
        return {name: stream.to(w.device) for name, stream in codes.items()}

    def _warmth(self, w: Tensor, multiple: float) -> float:
        """The squared distance that is `multiple` times the mean squared error of a code."""
        side = self._side_values()
        gap = w - self.recipe.decode(self._encoded(w, side), side, self.shape)
        codes = math.prod(self.recipe.layout(self.shape)[0].grid)
        coldest = _COLDEST * float(w.square().sum()) / codes
        return multiple * float(gap.square().sum()) / codes + coldest + torch.finfo(torch.float32).tiny

    def _between_assignments(self, w: Tensor, side: dict[str, Tensor]) -> Tensor:
        if self._reassign_every and self.training and torch.is_grad_enabled():
            if self._forwards % self._reassign_every == 0:
                with torch.no_grad():
                    self._keep(self._encoded(w, side))
            self._forwards += 1
        return StraightThrough.apply(w, self.recipe.decode(self.codes, side, self.shape))

    def _keep(self, codes: Mapping[str, Tensor]) -> None:
        self._code_names = tuple(codes)
        for name, stream in codes.items():
            self.register_buffer(f"codes_{name}", stream)


def _fitted(
    recipe: Quantizer, w: Tensor, importance: Tensor | None, options: FitOptions, generator: Generator | None
) -> dict[str, Tensor]:
    """Side tensors on the device of `w`, fitted on the CPU."""
    own = None if importance is None else importance.cpu()
    fitted = recipe.fit(w.cpu(), importance=own, options=options, generator=generator)
    return {name: value.to(w.device) for name, value in fitted.items()}
