"""Statistics of a study: intervals over seeds and images, fronts, comparisons at equal bytes or accuracy.

A *curve* is an array (points, 2) of (bytes, accuracy); accuracies may be fractions or percent, as long as
both curves agree. Only its Pareto front counts. Wrong shapes and values raise PlanError.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from bitbook.errors import PlanError, optional_import

Array = np.ndarray


class Interval(NamedTuple):
    """A mean and its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Accuracy of a minus that of b (fractions), its confidence interval, the two-sided p-value of zero."""

    value: float
    low: float
    high: float
    p: float


class Saving(NamedTuple):
    """Average percent of bytes saved, and the range of accuracies over which it is the average."""

    percent: float
    accuracy_low: float
    accuracy_high: float


class SavingInterval(NamedTuple):
    """A saving with its interval in percent.

    `undefined` is the fraction of resamples in which the curves did not overlap. Those are left out of the
    interval: where there are many of them, it says little.
    """

    saving: Saving
    low: float
    high: float
    undefined: float


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of independent values (seeds) with Student's interval: mean ± t₍(1+level)/2, n−1₎ · s / √n.

    s² has the divisor n − 1. One value has no interval: low and high are NaN then.
    """
    _check_level(level)
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or x.size == 0:
        raise PlanError(f"an interval needs a list of at least one value, not an array of shape {x.shape}")
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, float("nan"), float("nan"))
    special = optional_import("scipy.special", "study")
    half = float(special.stdtrit(x.size - 1, (1 + level) / 2)) * float(x.std(ddof=1)) / float(np.sqrt(x.size))
    return Interval(mean, mean - half, mean + half)


def paired_bootstrap(
    correct_a: Bool[Array, "*seeds images"],
    correct_b: Bool[Array, "*seeds images"],
    *,
    seed: int,
    repeats: int = 10_000,
    level: float = 0.95,
) -> Difference:
    """Compare two methods by which test images they got right: (images,) or (seeds, images).

    Each resample draws images with replacement, the same for both methods, and seeds too where there is that
    axis (rows and columns independently: the pigeonhole bootstrap of Owen 2007), so that the interval speaks
    about new images and new trainings. Percentile interval (Efron & Tibshirani 1993, ch. 13); p = 2 ·
    min(#{d* ≤ 0} + 1, #{d* ≥ 0} + 1) / (repeats + 1), at most 1 (Davison & Hinkley 1997, ch. 4).
    """
    _check_level(level)
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.shape != b.shape or a.ndim not in (1, 2) or a.size == 0 or a.dtype != bool or b.dtype != bool:
        raise PlanError(
            "a paired comparison needs two bool arrays of equal shape, (images,) or (seeds, images), "
            f"not {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
    difference = np.atleast_2d(a.astype(np.int8) - b.astype(np.int8))  # (seeds, images)
    seeds, images = difference.shape
    # Images with equal columns are interchangeable: drawing how often each *pattern* occurs is the same
    # experiment as drawing images, and there are few patterns.
    patterns, count = np.unique(difference, axis=1, return_counts=True)
    generator = np.random.default_rng(seed)
    drawn_images = generator.multinomial(images, count / images, size=repeats)  # (repeats, patterns)
    drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=repeats)  # (repeats, seeds)
    resampled = ((drawn_images @ patterns.T) * drawn_seeds).sum(axis=1) / (seeds * images)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    tail = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    return Difference(float(difference.mean()), float(low), float(high), min(1.0, 2 * (tail + 1) / (repeats + 1)))


def pareto_front(points: Float[Array, "points 2"] | Sequence[Sequence[float]]) -> Int[Array, " front"]:
    """Indices of the points that no other beats in both (fewer bytes, higher accuracy), by increasing bytes.

    A point is beaten by one that is at least as good in both and better in one; of equal points the first
    stays. Along the front both bytes and accuracy therefore increase strictly.
    """
    curve = _curve(points)
    order = np.lexsort((-curve[:, 1], curve[:, 0]))  # stable: the first of equal points stays first
    accuracy = curve[order, 1]
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(accuracy)[:-1]])
    return order[accuracy > best_before]


def at_equal_bytes(
    curve_a: Float[Array, "points_a 2"], curve_b: Float[Array, "points_b 2"], sizes: Float[Array, " sizes"]
) -> tuple[Float[Array, " sizes"], Float[Array, " sizes"]]:
    """Accuracies of both methods at the given file sizes in bytes.

    Linear in log bytes between neighbours on each method's front; NaN where a size lies outside it.
    """
    wanted = np.asarray(sizes, dtype=float)
    if wanted.ndim != 1 or not (wanted > 0).all():
        raise PlanError("sizes must be a list of positive numbers of bytes")
    fronts = [curve[pareto_front(curve)] for curve in (_curve(curve_a), _curve(curve_b))]
    on_a, on_b = (
        np.interp(np.log(wanted), np.log(front[:, 0]), front[:, 1], left=np.nan, right=np.nan) for front in fronts
    )
    return on_a, on_b


def average_saving(curve_a: Float[Array, "points_a 2"], curve_b: Float[Array, "points_b 2"]) -> Saving | None:
    """Average percent of bytes that b saves against a at equal accuracy; negative if it needs more.

    Over the accuracies [lo, hi] that both fronts reach, with r(y) the log of the bytes needed for accuracy y:
    saving = 100 · (1 − exp(1 / (hi − lo) · ∫ (r_b(y) − r_a(y)) dy)), the mean of Bjøntegaard (2001, VCEG-M33)
    with the opposite sign. His cubic polynomial oscillates, so r is the monotone piecewise cubic of Fritsch &
    Butland (1984; PCHIP), integrated exactly. Nothing is extrapolated: None if the fronts share no range of
    accuracies.
    """
    fronts = [curve[pareto_front(curve)] for curve in (_curve(curve_a), _curve(curve_b))]
    low = max(float(front[0, 1]) for front in fronts)
    high = min(float(front[-1, 1]) for front in fronts)
    if low >= high:
        return None
    interpolate = optional_import("scipy.interpolate", "study")
    log_a, log_b = (
        float(interpolate.PchipInterpolator(front[:, 1], np.log(front[:, 0])).integrate(low, high)) / (high - low)
        for front in fronts
    )
    return Saving(-100 * float(np.expm1(log_b - log_a)), low, high)


def average_saving_interval(
    curves_a: Float[Array, "seeds_a points_a 2"],
    curves_b: Float[Array, "seeds_b points_b 2"],
    *,
    seed: int,
    repeats: int = 2_000,
    level: float = 0.95,
    paired: bool = True,
) -> SavingInterval | None:
    """`average_saving` of the curves averaged over seeds, with a percentile bootstrap interval over them.

    `paired` draws the same seeds for both methods: right when equal seeds mean a common start, and then both
    need the same seeds in the same order. With few seeds percentile intervals are somewhat too narrow (by
    about √((n − 1) / n)). None if the averaged curves share no range of accuracies.
    """
    _check_level(level)
    a, b = np.asarray(curves_a, dtype=float), np.asarray(curves_b, dtype=float)
    if a.ndim != 3 or b.ndim != 3 or (paired and len(a) != len(b)):
        raise PlanError(
            "curves must be (seeds, points, 2), with equal numbers of seeds where they are paired, "
            f"not {a.shape} and {b.shape}"
        )
    saving = average_saving(a.mean(axis=0), b.mean(axis=0))
    if saving is None:
        return None
    generator = np.random.default_rng(seed)

    @functools.cache  # few seeds can be drawn in few ways, since their order does not matter
    def resample(rows_a: tuple[int, ...], rows_b: tuple[int, ...]) -> Saving | None:
        return average_saving(a[list(rows_a)].mean(axis=0), b[list(rows_b)].mean(axis=0))

    resampled: list[float] = []
    for _ in range(repeats):
        rows_a = tuple(sorted(generator.integers(len(a), size=len(a)).tolist()))
        rows_b = rows_a if paired else tuple(sorted(generator.integers(len(b), size=len(b)).tolist()))
        again = resample(rows_a, rows_b)
        if again is not None:
            resampled.append(again.percent)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2]) if resampled else (np.nan, np.nan)
    return SavingInterval(saving, float(low), float(high), 1 - len(resampled) / repeats)


def _curve(points: ArrayLike) -> Float[Array, "points 2"]:
    curve = np.asarray(points, dtype=float)
    if curve.ndim != 2 or curve.shape[1] != 2 or len(curve) == 0:
        raise PlanError(f"a curve is an array (points, 2) of (bytes, accuracy), not of shape {curve.shape}")
    if not np.isfinite(curve).all() or not (curve[:, 0] > 0).all():
        raise PlanError("a curve's bytes must be positive and its accuracies finite")
    return curve


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise PlanError(f"a confidence level lies between 0 and 1, such as 0.95; got {level}")
