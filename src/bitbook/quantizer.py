"""The recursion: what a quantizer is, and how any of them turns a tensor into codes and back.

        fit            encode                                     decode
    w ───────► side ───────────► codes                codes, side ───────► ŵ
                 ▲
                 └ each side tensor is stored through its own quantizer, down to a float type

A `Quantizer` is a recipe: a frozen dataclass that owns no tensors and holds only what the decoder needs.
`Quantized` is one tensor in compressed form.  `quantize` joins the two, once for every method.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float64 as F64
from jaxtyping import Int
from torch import Generator, Tensor

from bitbook.blocks import Grid, Shape
from bitbook.errors import NoFeedback, PlanError, WeightError
from bitbook.feedback.columns import Feedback, Parts

Range = Literal["minmax", "absmax", "mse", "mean", "lsq"]
LARGEST_CODE = 2**31 - 1


@dataclass(frozen=True)
class FitOptions:
    """How side tensors are found.  Nothing here is needed to decode, so nothing here is in the file."""

    range: Range | None = None
    """How a scale follows from the weights; None takes the quantizer's own default."""
    restarts: int = 1
    """Independent k-means runs, of which the best is kept."""
    iterations: int = 100
    """Most Lloyd iterations per run."""
    step: float | None = None
    """Distance of the levels of a quantizer without a bound; None takes its own default."""


class Child(NamedTuple):
    """A side tensor as the recursion sees it: how it is stored, and its shape."""

    recipe: Quantizer
    shape: Shape


class StreamSpec(NamedTuple):
    """One stream of codes: integers in `[0, alphabet)`, laid out on a 2-d grid (the coder's context).

    Without an alphabet, None, codes are signed integers of at most `LARGEST_CODE` in size.
    """

    name: str
    grid: tuple[int, int]
    alphabet: int | None
    centre: int = 0
    """The code that stands for zero, where codes are ordered around it."""
    states: int = 0
    """Of the machine (`trellis/machine.py`) that says which codes are even and which are odd; 0 without one."""


class Stream(NamedTuple):
    """Codes together with what a coder must know about them."""

    spec: StreamSpec
    codes: Tensor


class CodeBits(Protocol):
    """What the codes of one stream cost."""

    @property
    def symbols(self) -> Tensor | None:
        """Bits of each symbol, `(alphabet,)`, of codes without an order; they cost the same in every place."""
        ...

    def __call__(self, codes: Tensor) -> Tensor:
        """Bits of each of `codes`, on the stream's grid, up to a number that is the same for all codes in a place."""
        ...

    def columns(self, start: int, stop: int) -> CodeBits:
        """The same for a part of the grid: its columns from `start` to `stop`."""
        ...


@dataclass(frozen=True, eq=False)
class Price:
    """What codes cost an encoder, frozen for one pass: λ in squared error per bit, and the bits of each stream."""

    lam: float
    bits: Mapping[str, CodeBits]


@dataclass(frozen=True, repr=False)
class Quantizer(ABC):
    """A recipe, `ŵ = decode(encode(w, side), side)`.  Equal recipes are equal objects."""

    independent_blocks = True
    """Whether each block's codes follow from that block alone, given the side tensors."""
    trains_codes = True
    """False where codes are fixed during training and the side tensors learn, as in a codebook."""
    price_of_step = math.log(2) / 6
    """λ that suits a step of one at high rate, where codes have no bound (Gish & Pierce 1968)."""
    learns_side = False
    """Whether side tensors learn beside latent weights, where the regime does not say."""
    codes_by_row = True
    """False where a row of codes is not the codes of a row, although a stream has as many rows as the tensor."""
    idempotent = True
    """Whether quantizing a result gives it again; not where codes are searched for and the search may miss it."""

    # -- what the decoder needs ----------------------------------------------------------------
    @abstractmethod
    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        """The code streams of a tensor of `shape`, in file order; raises `PlanError` where it does not fit."""

    @abstractmethod
    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """The float32 tensor that the codes stand for; differentiable in `side`."""

    def children(self, shape: Shape) -> Mapping[str, Child]:
        """How each side tensor of a tensor of `shape` is itself stored, in file order."""
        return {}

    def child_options(self, options: FitOptions) -> FitOptions:
        """How side tensors are fitted.  Scales are positive, where only the absmax range makes sense."""
        return FitOptions(range="absmax")

    def side_options(self, name: str, options: FitOptions) -> FitOptions:
        """How the side tensor `name` is fitted; default: as all are."""
        return self.child_options(options)

    def with_children(self, children: Mapping[str, Quantizer]) -> Quantizer:
        """The recipe with its side tensors' recipes as these were resolved; a side tensor's field has its name."""
        own = {f.name for f in fields(self)} & children.keys()
        return replace(self, **{name: children[name] for name in own})

    def grids(self, shape: Shape) -> Iterator[Grid]:
        """The grids that decoding lays a tensor of `shape` out on, which take memory where they are padded."""
        block = getattr(self, "block", None)
        if block is not None:
            yield Grid.of(shape, block, pad=getattr(self, "pad", False))

    def resolve(self, shape: Shape, side: Mapping[str, Tensor] | None = None) -> Quantizer:
        """The recipe with everything relative made absolute, first by the shape, then by the fit."""
        return self

    def decoder(self) -> Quantizer:
        """The recipe as a file states it, without what only an encoder needs."""
        return self

    # -- what the encoder does -----------------------------------------------------------------
    def fit(
        self,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        """Find the side tensors for `w`, at any cost; `importance` (w's shape) weighs squared errors."""
        return {}

    def refresh(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Mapping[str, Tensor]:
        """The side tensors after a change of `w`: closed form, O(n), no gradient.  Default: unchanged."""
        return side

    @abstractmethod
    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        """The codes for `w` given the side tensors exactly as the file gives them back."""

    def encode_priced(
        self, w: Tensor, side: Mapping[str, Tensor], price: Price, *, importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The codes with the least squared error (weighed by `importance`) plus λ · bits.

        Raises `PlanError` where codes leave no such choice.
        """
        raise PlanError(f"{self!r} has no codes to choose among for their bits; use ECSQ, Uniform or Codebook")

    def step_for(self, lam: float) -> float:
        """The step that suits λ at high rate, where codes have no bound."""
        return math.sqrt(lam / self.price_of_step)

    def recentre(
        self, w: Tensor, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], *, importance: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """The side tensors that suit these codes best, in squared error weighed by `importance`; default: unchanged."""
        return side

    # -- what an encoder does that goes from column to column (feedback/columns.py) ---------------------
    def columns(self, shape: Shape) -> int:
        """How many adjacent columns a code stands for: columns that are encoded together.  Default: one."""
        return 1

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        """The columns from `start` to `stop` as a tensor of their own: a recipe and side tensors that encode it alike.

        Raises `NoFeedback` where columns are not encoded apart, which is the default.
        """
        raise NoFeedback(
            f"{self!r} encodes all columns together, so that no error can be fed back; encode it plainly, or use "
            f"blocks of fewer columns"
        )

    def encode_part(
        self, w: Tensor, side: Mapping[str, Tensor], metric: F64[Tensor, "groups c c"], price: Price | None = None
    ) -> dict[str, Tensor]:
        """The codes of a part with the least `e M eᵀ` of each row's error (plus λ · bits); M is its group's metric.

        The default weighs squared errors by the metric's diagonal, which is all where a code is one column.
        """
        if price is None and metric.numel() == 1:
            return self.encode(w, side)
        weights = metric.diagonal(dim1=1, dim2=2)
        if price is None:  # only ratios matter; so equal weights are exactly one
            weights = weights / weights.mean()
        importance = weights.float().repeat_interleave(len(w) // len(metric), 0)
        if price is None:
            return self.encode(w, side, importance=importance)
        return self.encode_priced(w, side, price, importance=importance)

    def fit_fed_back(
        self, w: Tensor, feedback: Feedback, options: FitOptions, generator: Generator | None
    ) -> dict[str, Tensor]:
        """Find the side tensors for an encoder that feeds errors back; a wrapper calls this on what it wraps."""
        return self.fit(w, importance=feedback.importance(tuple(w.shape)), options=options, generator=generator)

    def encode_fed_back(
        self, w: Tensor, side: Mapping[str, Tensor], feedback: Feedback, price: Price | None = None
    ) -> dict[str, Tensor]:
        """The codes for `w`, each column's error fed back into columns that follow (plus λ · bits).

        A wrapper calls this on what it wraps, with the tensor that this encodes and `feedback.mapped`.
        Raises `NoFeedback` where all columns are encoded together.
        """
        return feedback.encode(w, Parts(self, tuple(w.shape), side, price))

    def without_unused(self, quantized: Quantized) -> Quantized:
        """The same tensor, bit for bit, without side values that no code stands for; default: unchanged."""
        return quantized

    def ladder(self, side: Mapping[str, Tensor]) -> Tensor | None:
        """Ascending positive values of the magnitudes 1, 2, … of each block, `(blocks, magnitudes)`.

        What a price on bits pushes weights down along; None where codes have no magnitude.
        """
        return None

    # -- what training sees --------------------------------------------------------------------
    def surrogate(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Tensor:
        """`decode(encode(w, side), side)`, bit for bit, with a gradient to `w` and to `side`.

        The default passes the gradient straight through to `w` (Bengio et al. 2013) and
        differentiates the decoder in the side tensors.
        """
        with torch.no_grad():
            codes = self.encode(w, side)
        return StraightThrough.apply(w, self.decode(codes, side, tuple(w.shape)))

    def soft(self, w: Tensor, side: Mapping[str, Tensor], temperature: float) -> Tensor:
        """A mean over codes, the nearest weighing most, differentiable in `w` and `side`: `Regime(codes="soft")`.

        `temperature` is a squared distance between codewords.  Raises `PlanError` where codes
        are no choice among codewords.
        """
        raise PlanError(f"{self!r} has no soft codes; use a Codebook, or Regime(codes='latent')")

    def __repr__(self) -> str:
        """The shortest call that makes an equal recipe: `Uniform(4, block=(1, 32))`."""
        shown = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        words = [
            repr(value) if i == 0 and default is MISSING else f"{name}={value!r}"
            for i, (name, value, default) in enumerate(shown)
            if default is MISSING or value != default
        ]
        return f"{type(self).__name__}({', '.join(words)})"


class StraightThrough(torch.autograd.Function):
    """Forward `q`, backward the same gradient to `w` and to `q`."""

    @staticmethod
    def forward(ctx: object, w: Tensor, q: Tensor) -> Tensor:
        return q.view_as(q)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad


@dataclass(frozen=True, eq=False)
class Quantized:
    """One tensor in compressed form: code streams, and side tensors that are `Quantized` themselves."""

    recipe: Quantizer
    shape: Shape
    codes: Mapping[str, Tensor]
    side: Mapping[str, Quantized] = field(default_factory=dict)

    def decode(self) -> Tensor:
        """The float32 tensor this stands for."""
        return self.recipe.decode(self.codes, {n: q.decode() for n, q in self.side.items()}, self.shape)

    def streams(self, prefix: str = "") -> Iterator[Stream]:
        """All code streams, depth first: side tensors before the codes that need them."""
        for name, quantized in self.side.items():
            yield from quantized.streams(f"{prefix}{name}.")
        for spec in self.recipe.layout(self.shape):
            yield Stream(spec._replace(name=prefix + spec.name), self.codes[spec.name])


def stream_specs(recipe: Quantizer, shape: Shape, prefix: str = "") -> Iterator[StreamSpec]:
    """The specs of `Quantized.streams` without the codes: what a reader derives from recipe and shape."""
    for name, child in recipe.children(shape).items():
        yield from stream_specs(child.recipe, child.shape, f"{prefix}{name}.")
    for spec in recipe.layout(shape):
        yield spec._replace(name=prefix + spec.name)


def assemble(recipe: Quantizer, shape: Shape, codes: Iterator[Tensor]) -> Quantized:
    """Build a `Quantized` from code tensors in the order of `stream_specs`."""
    side = {n: assemble(child.recipe, child.shape, codes) for n, child in recipe.children(shape).items()}
    return Quantized(recipe, shape, {spec.name: next(codes) for spec in recipe.layout(shape)}, side)


def unbounded(recipe: Quantizer, shape: Shape) -> bool:
    """Whether any codes of a tensor of `shape` have no bound, so that a finer step means more bytes."""
    return any(spec.alphabet is None for spec in recipe.layout(shape))


class Encoder(Protocol):
    """A strategy by which side tensors and codes are chosen; the file does not say which it was."""

    def quantize(
        self,
        recipe: Quantizer,
        w: Tensor,
        *,
        importance: Tensor | None,
        options: FitOptions,
        generator: Generator | None,
    ) -> Quantized:
        """What `quantize` returns, for a tensor that was checked."""
        ...


def quantize(
    recipe: Quantizer,
    w: Tensor,
    *,
    encoder: Encoder | None = None,
    importance: Tensor | None = None,
    options: FitOptions = FitOptions(),
    generator: Generator | None = None,
) -> Quantized:
    """Fit and encode one tensor: written once for every method.

    `encode` sees the side tensors exactly as the file will give them back.  An `encoder`, such as `ErrorFeedback`,
    chooses side tensors and codes by another measure than each weight's own error.

    Raises:
        PlanError: the recipe does not fit the shape, or not the encoder.
        WeightError: `w` (or a side tensor fitted to it) holds NaN or infinity.
    """
    w = checked(w)
    if not w.is_cpu:  # fits are loops over little data, written for processors
        own = None if importance is None else importance.cpu()
        made = quantize(recipe, w.cpu(), encoder=encoder, importance=own, options=options, generator=generator)
        return moved(made, w.device)
    if encoder is not None:
        return encoder.quantize(recipe, w, importance=importance, options=options, generator=generator)
    recipe = recipe.resolve(tuple(w.shape))
    fitted = recipe.fit(w, importance=importance, options=options, generator=generator)
    return encode_fitted(recipe, w, fitted, options, lambda r, side: r.encode(w, side, importance=importance))


def moved(quantized: Quantized, device: torch.device) -> Quantized:
    """The same tensor with codes and side tensors on a device."""
    codes = {name: stream.to(device) for name, stream in quantized.codes.items()}
    side = {name: moved(child, device) for name, child in quantized.side.items()}
    return Quantized(quantized.recipe, quantized.shape, codes, side)


def encode_fitted(
    recipe: Quantizer,
    w: Tensor,
    fitted: Mapping[str, Tensor],
    options: FitOptions,
    encode: Callable[[Quantizer, Mapping[str, Tensor]], dict[str, Tensor]],
) -> Quantized:
    """Store side tensors as they were fitted, and encode `w` beside what comes back of them."""
    shape = tuple(w.shape)
    recipe = recipe.resolve(shape, fitted)
    side = {
        name: quantize_side(child.recipe, fitted[name], recipe.side_options(name, options))
        for name, child in recipe.children(shape).items()
    }
    codes = encode(recipe, {name: q.decode() for name, q in side.items()})
    return Quantized(recipe.decoder().with_children({n: q.recipe for n, q in side.items()}), shape, codes, side)


def quantize_side(recipe: Quantizer, value: Tensor, options: FitOptions) -> Quantized:
    """Quantize a side tensor: a function of its value alone.

    So a fit that rounds side tensors while it searches sees them as they will be stored in the end.
    """
    return quantize(recipe, value, options=options, generator=Generator().manual_seed(0))


def select_rows(quantized: Quantized, rows: Int[Tensor, " kept"]) -> Quantized | None:
    """Some rows of a matrix, bit for bit and without encoding anew; None where its rows are not stored apart.

    Codes and side tensors of a row each, such as a scale per row, are selected alike; shared ones stay.
    """
    if not quantized.recipe.codes_by_row:
        return None
    count = quantized.shape[0]
    shape = (len(rows), *quantized.shape[1:])
    side = {}
    for name, child in quantized.side.items():
        kept = select_rows(child, rows) if child.shape[0] == count else child
        if kept is None:
            return None
        side[name] = kept
    codes = {name: stream[rows] if len(stream) == count else stream for name, stream in quantized.codes.items()}
    recipe = quantized.recipe.with_children({name: kept.recipe for name, kept in side.items()})
    try:
        grids = {spec.name: spec.grid for spec in recipe.layout(shape)}
        shapes = {name: child.shape for name, child in recipe.children(shape).items()}
    except PlanError:  # so few rows do not divide into its blocks
        return None
    apart = all(len(child) == 2 for child in shapes.values())  # other side tensors belong to elements, as Pruned's do
    fits = grids == {n: tuple(c.shape) for n, c in codes.items()} and shapes == {n: q.shape for n, q in side.items()}
    return Quantized(recipe, shape, codes, side) if apart and fits else None


def checked(w: Tensor) -> Tensor:
    """`w` as a detached float32 tensor; raises `WeightError` where it is empty, not finite or not floating."""
    if not w.is_floating_point():
        raise WeightError(f"expected floating-point weights, got {w.dtype}")
    if w.numel() == 0:
        raise WeightError(f"a tensor of shape {tuple(w.shape)} has no elements to quantize; leave it dense")
    w = w.detach().float()
    if not w.isfinite().all():
        bad = (~w.isfinite()).nonzero()[0].tolist()
        raise WeightError(f"the value at {tuple(bad)} is {w[tuple(bad)].item()}; only finite weights can be quantized")
    return w


def code_dtype(alphabet: int | None) -> torch.dtype:
    """The smallest dtype for codes of this alphabet that indexing and arithmetic support well."""
    if alphabet is not None and alphabet <= 1 << 8:
        return torch.uint8
    return torch.int32 if alphabet is None or alphabet <= 1 << 31 else torch.int64
