import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitbook.errors import MissingDependency, PlanError
from bitbook.study.stats import (
    at_equal_bytes,
    average_saving,
    average_saving_interval,
    mean_interval,
    paired_bootstrap,
    pareto_front,
)

# Few distinct values, so that ties are common.
curves = st.lists(st.tuples(st.integers(1, 12).map(float), st.integers(0, 8).map(float)), min_size=1, max_size=12).map(
    np.array
)


def curve(sizes, accuracies):
    return np.stack([np.asarray(sizes, float), np.asarray(accuracies, float)], axis=1)


# --- mean_interval


def test_mean_interval_against_a_table():
    # t(0.975, 4) = 2.7764 and t(0.95, 9) = 1.8331, from any printed table
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and high - mean == pytest.approx(mean - low)
    assert high - mean == pytest.approx(2.7764 * np.sqrt(2.5 / 5), rel=1e-4)
    ten = np.arange(10.0)
    _, low, high = mean_interval(ten, level=0.9)
    assert (high - low) / 2 == pytest.approx(1.8331 * ten.std(ddof=1) / np.sqrt(10), rel=1e-4)


def test_mean_interval_covers_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(7.0, 2.0, (2000, 4))
    covered = [low <= 7 <= high for _, low, high in map(mean_interval, samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_mean_interval_of_one_or_equal_values():
    mean, low, high = mean_interval([3.5])
    assert mean == 3.5 and np.isnan(low) and np.isnan(high)
    assert mean_interval([2, 2, 2]) == (2, 2, 2)


@pytest.mark.parametrize(("values", "level"), [([], 0.95), ([[1.0]], 0.95), ([1.0, 2.0], 0), ([1.0, 2.0], 95)])
def test_mean_interval_refuses(values, level):
    with pytest.raises(PlanError):
        mean_interval(values, level)


def test_missing_scipy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(MissingDependency, match=r"pip install 'bitbook\[study\]'"):
        mean_interval([1.0, 2.0])


# --- paired_bootstrap


def slow_bootstrap(a, b, repeats, generator):
    """Draw seeds and images one by one."""
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    seeds, images = a.shape
    found = []
    for _ in range(repeats):
        rows, columns = generator.integers(seeds, size=seeds), generator.integers(images, size=images)
        found.append(a[rows][:, columns].mean() - b[rows][:, columns].mean())
    return np.array(found)


@pytest.mark.parametrize("shape", [(300,), (5, 300)])
def test_paired_bootstrap_is_a_bootstrap_over_images_and_seeds(shape):
    generator = np.random.default_rng(1)
    easy = generator.random(shape[-1:])  # images differ, so that pairing matters
    a, b = easy + 0.3 * generator.random(shape) > 0.2, easy + 0.3 * generator.random(shape) > 0.25
    got = paired_bootstrap(a, b, seed=0)
    reference = slow_bootstrap(a, b, 4000, generator)
    assert got.value == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    spread = reference.std()
    assert got.low == pytest.approx(np.quantile(reference, 0.025), abs=0.2 * spread)
    assert got.high == pytest.approx(np.quantile(reference, 0.975), abs=0.2 * spread)
    p = 2 * min((reference <= 0).mean(), (reference >= 0).mean())
    assert got.p == pytest.approx(min(1, p), abs=0.03)


def test_paired_bootstrap_laws():
    generator = np.random.default_rng(0)
    a, b = generator.random((3, 500)) < 0.9, generator.random((3, 500)) < 0.8
    there, back = paired_bootstrap(a, b, seed=3), paired_bootstrap(b, a, seed=4)
    assert there == paired_bootstrap(a, b, seed=3)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low), abs=0.004)
    assert there.low < there.value < there.high and there.p < 0.01
    assert paired_bootstrap(a, a, seed=0) == (0, 0, 0, 1)
    one = paired_bootstrap(a[0], b[0], seed=0)
    assert one == paired_bootstrap(a[:1], b[:1], seed=0)
    wide = paired_bootstrap(a, b, seed=0, level=0.99)
    assert wide.low < there.low and wide.high > there.high


def test_paired_bootstrap_p_is_uniform_without_a_difference():
    generator = np.random.default_rng(0)
    p = [paired_bootstrap(*(generator.random((2, 400)) < 0.8), seed=i, repeats=500).p for i in range(400)]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p) <= level) == pytest.approx(level, abs=3 * np.sqrt(level * (1 - level) / 400) + 0.02)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones(3, bool), np.ones(4, bool)),
        (np.ones(3), np.ones(3)),
        (np.ones((2, 2, 2), bool), np.ones((2, 2, 2), bool)),
        (np.ones(0, bool), np.ones(0, bool)),
    ],
)
def test_paired_bootstrap_refuses(a, b):
    with pytest.raises(PlanError, match="two bool arrays of equal shape"):
        paired_bootstrap(a, b, seed=0)


# --- fronts


def beaten(p, q):
    return q[0] <= p[0] and q[1] >= p[1] and (q[0] < p[0] or q[1] > p[1])


@given(curves)
def test_pareto_front_is_what_nothing_beats(points):
    front = pareto_front(points)
    slow = [
        i
        for i, p in enumerate(points)
        if not any(beaten(p, q) for q in points) and not any((p == q).all() for q in points[:i])
    ]
    assert sorted(front) == slow
    assert (np.diff(points[front], axis=0) > 0).all()


@given(curves)
def test_the_front_of_a_front_is_itself(points):
    front = points[pareto_front(points)]
    assert list(pareto_front(front)) == list(range(len(front)))


def test_pareto_front_of_lists():
    assert list(pareto_front([[2, 5], [1, 5], [3, 6], [1, 5], [3, 4]])) == [1, 2]


@pytest.mark.parametrize("points", [[], [1, 2], [[1, 2, 3]], [[0, 1]], [[-1, 1]], [[1, np.nan]], [[np.inf, 1]]])
def test_a_curve_is_checked(points):
    for use in (pareto_front, lambda points: average_saving(points, points)):
        with pytest.raises(PlanError, match="curve"):
            use(points)


# --- at_equal_bytes


def test_at_equal_bytes_interpolates_in_log_bytes_and_nowhere_else():
    a = curve([100, 10, 1000, 500], [80, 70, 90, 60])  # 500 B is beaten
    b = curve([100], [50])
    sizes = np.array([5, 10, np.sqrt(1000), 100, np.sqrt(100 * 1000), 1000, 1001])
    on_a, on_b = at_equal_bytes(a, b, sizes)
    np.testing.assert_allclose(on_a, [np.nan, 70, 75, 80, 85, 90, np.nan])
    np.testing.assert_allclose(on_b, [np.nan, np.nan, np.nan, 50, np.nan, np.nan, np.nan])


@given(curves, curves)
def test_at_equal_bytes_stays_between_the_neighbours(a, b):
    sizes = np.arange(1.0, 14.0)
    for points, found in zip((a, b), at_equal_bytes(a, b, sizes), strict=True):
        front = points[pareto_front(points)]
        for size, accuracy in zip(sizes, found, strict=True):
            if not front[0, 0] <= size <= front[-1, 0]:
                assert np.isnan(accuracy)
            else:
                below, above = front[front[:, 0] <= size][-1, 1], front[front[:, 0] >= size][0, 1]
                assert below - 1e-9 <= accuracy <= above + 1e-9


def test_at_equal_bytes_refuses_sizes():
    for sizes in ([0.0], [[1.0]], [-1.0]):
        with pytest.raises(PlanError, match="positive numbers of bytes"):
            at_equal_bytes([[1, 1]], [[1, 1]], sizes)


# --- average_saving


def pchip(x, y, at):
    """Fritsch & Butland's monotone cubic for increasing data, one point at a time."""
    h, slope = np.diff(x), np.diff(y) / np.diff(x)

    def end(h0, h1, s0, s1):
        d = ((2 * h0 + h1) * s0 - h0 * s1) / (h0 + h1)
        return 0.0 if d * s0 <= 0 else min(d, 3 * s0)

    if len(x) == 2:
        d = [slope[0], slope[0]]
    else:
        inner = []
        for k in range(1, len(x) - 1):
            w1, w2 = 2 * h[k] + h[k - 1], h[k] + 2 * h[k - 1]
            inner.append((w1 + w2) / (w1 / slope[k - 1] + w2 / slope[k]))
        d = [end(h[0], h[1], slope[0], slope[1]), *inner, end(h[-1], h[-2], slope[-1], slope[-2])]
    k = min(np.searchsorted(x, at, side="right"), len(x) - 1) - 1
    t = (at - x[k]) / h[k]
    return (
        y[k] * (1 + 2 * t) * (1 - t) ** 2
        + h[k] * d[k] * t * (1 - t) ** 2
        + y[k + 1] * t**2 * (3 - 2 * t)
        + h[k] * d[k + 1] * t**2 * (t - 1)
    )


@given(curves, curves)
def test_average_saving_against_numeric_integration(a, b):
    saving = average_saving(a, b)
    fronts = [points[pareto_front(points)] for points in (a, b)]
    low, high = max(front[0, 1] for front in fronts), min(front[-1, 1] for front in fronts)
    if low >= high:
        assert saving is None
        return
    middles = low + (high - low) * (np.arange(400) + 0.5) / 400
    log_a, log_b = (np.mean([pchip(front[:, 1], np.log(front[:, 0]), y) for y in middles]) for front in fronts)
    assert saving.percent == pytest.approx(100 * (1 - np.exp(log_b - log_a)), abs=0.02)
    assert (saving.accuracy_low, saving.accuracy_high) == (low, high)


def test_average_saving_of_a_constant_factor_is_that_factor():
    a = curve([100, 200, 350, 900], [80, 90, 93, 95])
    b = a * [0.6, 1]
    assert average_saving(a, b).percent == pytest.approx(40)
    assert average_saving(b, a).percent == pytest.approx(100 * (1 - 1 / 0.6))
    assert average_saving(a, a).percent == pytest.approx(0, abs=1e-12)
    # Points that others beat, their order, and the units of both axes do not matter.
    worse = np.concatenate([b[::-1], [[1000, 94]]])
    assert average_saving(a, worse).percent == pytest.approx(40)
    assert average_saving(a * [8, 0.01], b * [8, 0.01]).percent == pytest.approx(40)


def test_average_saving_does_not_extrapolate():
    a = curve([100, 200], [80, 85])
    assert average_saving(a, curve([100, 200], [85, 90])) is None  # they touch
    assert average_saving(a, curve([100, 200], [86, 90])) is None
    assert average_saving(a, curve([150], [82])) is None
    part = average_saving(a, curve([50, 60, 70], [70, 84, 95]))
    assert (part.accuracy_low, part.accuracy_high) == (80, 85)


def test_average_saving_interval():
    generator = np.random.default_rng(0)
    base = curve([100, 200, 400, 800], [80, 90, 94, 96])
    noise = generator.normal(0, 0.3, (5, 4))  # common to both methods: the seed's own luck
    a, b = np.stack([base] * 5), np.stack([base * [0.7, 1]] * 5)
    a[:, :, 1] += noise
    b[:, :, 1] += noise
    result = average_saving_interval(a, b, seed=0, repeats=300)
    assert result.saving == average_saving(a.mean(axis=0), b.mean(axis=0))
    assert result.saving.percent == pytest.approx(30) and result.undefined == 0
    assert result.low == pytest.approx(30) and result.high == pytest.approx(30)  # pairing removes it all
    assert result == average_saving_interval(a, b, seed=0, repeats=300)
    loose = average_saving_interval(a, b[:4], seed=0, repeats=300, paired=False)
    assert loose.low < 29 and loose.high > 31
    with pytest.raises(PlanError, match="equal numbers of seeds"):
        average_saving_interval(a, b[:4], seed=0)


def test_average_saving_interval_tells_of_resamples_without_overlap():
    a = np.array([[[100, 80], [200, 85]], [[100, 70], [200, 75]]], float)
    b = np.array([[[100, 79], [200, 84]], [[100, 60], [200, 62]]], float)
    assert average_saving_interval(a, b - [0, 20], seed=0) is None
    result = average_saving_interval(a, b - [0, -4], seed=0, repeats=200)
    assert 0 < result.undefined < 1 and np.isfinite([result.low, result.high]).all()
