"""Error feedback: textbook GPTQ as a slow reference, and laws over random second moments and recipes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Generator, Tensor

from bitbook import (
    ECSQ,
    Artifact,
    Binary,
    Codebook,
    ErrorFeedback,
    FeedbackOptions,
    FitOptions,
    Float,
    Pruned,
    Quantized,
    Quantizer,
    Ternary,
    Uniform,
    quantize,
    quantize_priced,
)
from bitbook.artifact import from_bytes, to_bytes
from bitbook.errors import NoFeedback, PlanError
from bitbook.feedback.columns import ColumnEncoder, Parts
from bitbook.quantizer import Price
from bitbook.rate.rates import fit_rates
from bitbook.scalar.sweep import Sweep

PLAIN = FeedbackOptions(order="given", search=False)
RECIPES = [
    Uniform(2),
    Uniform(4, (1, -1)),
    Uniform(3, (1, 8), scale=Uniform(8)),
    Uniform(3, (4, 6)),
    Uniform(3, (-1, 1)),
    Uniform(3, symmetric=False),
    Binary((1, -1)),
    Ternary((1, 8)),
    ECSQ(),
    ECSQ(3, (1, -1)),
    ECSQ(2, (-1, 1), points=Uniform(8)),
    Codebook(16, (1, 4)),
    Codebook(16, (2, 3)),
    Codebook(16, (1, 5), pad=True, centroids=Uniform(5)),
    Codebook(6, (-1, 1)),
    Pruned(0.3),
    Pruned(0.3, Uniform(4)),
    Float("bfloat16"),
]


def correlated(cols: int, seed: int = 0, groups: int | None = None, dead: int = 0) -> Tensor:
    """E[x xᵀ] of inputs that tell much of each other."""
    generator = Generator().manual_seed(seed)
    mix = torch.randn(groups or 1, cols, cols, generator=generator, dtype=torch.float64)
    mix = mix * torch.linspace(0.05, 2, cols, dtype=torch.float64)[:, None]
    x = torch.randn(groups or 1, 3 * cols, cols, generator=generator, dtype=torch.float64) @ mix
    x[:, :, :dead] = 0
    moments = x.mT @ x / (3 * cols)
    return moments if groups else moments[0]


def weights(rows: int = 12, cols: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(rows, cols, generator=Generator().manual_seed(seed)) * 0.1


def output_error(found: Tensor, w: Tensor, moments: Tensor) -> float:
    error = (found.double() - w.double()).reshape(len(w), -1)
    return float(torch.einsum("ri,ij,rj->", error, moments.double(), error))


def cost(found: Quantized, w: Tensor, moments: Tensor, lam: float) -> float:
    (spec,) = found.recipe.layout(found.shape)
    return output_error(found.decode(), w, moments) + lam * fit_rates(spec, found.codes["codes"]).bits


def gptq(w: Tensor, moments: Tensor, scale: Tensor, largest: int, damping: float = 0.01) -> Tensor:
    """Frantar et al. 2023, algorithm 1, without its blocks: one column after the other, in float64."""
    w = w.double().clone()
    moments = moments.double().clone()
    moments += damping * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    codes = torch.zeros_like(w)
    for j in range(w.shape[1]):
        codes[:, j] = (w[:, j] / scale).round().clamp(-largest, largest)
        error = (w[:, j] - codes[:, j] * scale) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:][None]
    return codes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cols", [24, 150])  # 150: more than two batches of columns
def test_the_codes_are_those_of_textbook_gptq(seed: int, cols: int) -> None:
    w, moments = weights(cols=cols, seed=seed), correlated(cols, seed, dead=2)
    q = quantize(Uniform(3, (1, -1)), w, encoder=ErrorFeedback(moments, PLAIN))
    expected = gptq(w, moments, q.side["scale"].decode().double()[:, 0], 3)
    assert torch.equal(q.codes["codes"].double() - 3, expected)


@pytest.mark.parametrize("seed", range(4))
def test_with_order_and_search_it_is_never_worse_than_textbook_gptq(seed: int) -> None:
    w, moments = weights(cols=64, seed=seed), correlated(64, seed)
    for bits in (2, 3, 4):
        recipe = Uniform(bits, (1, -1))
        scale = recipe.fit(w)["scale"]
        reference = (gptq(w, moments, scale[:, 0].double(), recipe.q_max) * scale.double()).float()
        q = quantize(recipe, w, encoder=ErrorFeedback(moments))
        assert output_error(q.decode(), w, moments) <= output_error(reference, w, moments)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("kind", ["correlated", "dead", "rank one", "zero", "identity", "tiny"])
def test_it_is_never_worse_than_plain(recipe: Quantizer, kind: str) -> None:
    w = weights()
    ones = torch.arange(1.0, 25.0)
    moments = {
        "correlated": correlated(24),
        "dead": correlated(24, dead=7),
        "rank one": torch.outer(ones, ones),
        "zero": torch.zeros(24, 24),
        "identity": torch.eye(24),
        "tiny": correlated(24) * 1e-30,
    }[kind]
    plain = quantize(recipe, w, generator=Generator().manual_seed(0))
    encoder = ErrorFeedback(moments)
    q = quantize(recipe, w, encoder=encoder, generator=Generator().manual_seed(0))
    report = encoder.report
    assert report is not None
    assert report.chosen <= report.plain
    before, after = output_error(plain.decode(), w, moments), output_error(q.decode(), w, moments)
    assert report.plain == pytest.approx(before, rel=1e-6, abs=1e-40)
    assert report.chosen == pytest.approx(after, rel=1e-6, abs=1e-40)
    if kind == "correlated":
        assert report.used and after < 0.95 * before
    if kind == "zero":
        assert not report.used and "gave nothing" in str(report)
    assert report.dead == {"dead": 7, "zero": 24}.get(kind, 0)
    again = quantize(recipe, w, encoder=ErrorFeedback(moments), generator=Generator().manual_seed(0))
    assert torch.equal(again.decode(), q.decode())


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_file_does_not_know(recipe: Quantizer) -> None:
    w = weights()
    plain = quantize(recipe, w, generator=Generator().manual_seed(0))
    q = quantize(recipe, w, encoder=ErrorFeedback(correlated(24)), generator=Generator().manual_seed(0))
    if not isinstance(recipe, Pruned):  # how many are kept depends on which are stored as zero
        assert q.recipe == plain.recipe
    stored = from_bytes(to_bytes(Artifact({"w": q}))[0])
    assert torch.equal(stored.decode("w"), q.decode())


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if r.columns((12, 24)) == 1 and not isinstance(r, Pruned)], ids=str
)
def test_dead_columns_are_encoded_plainly(recipe: Quantizer) -> None:
    w, moments = weights(), correlated(24, dead=5)
    q = quantize(recipe, w, encoder=ErrorFeedback(moments, FeedbackOptions(search=False)))
    side = {name: stored.decode() for name, stored in q.side.items()}
    for name, codes in q.recipe.encode(w, side).items():
        assert torch.equal(codes[:, :5], q.codes[name][:, :5])


@pytest.mark.parametrize("block", [(1, 4), (2, 3)])
def test_vectors_are_chosen_in_the_metric_of_their_columns(block: tuple[int, int]) -> None:
    """The first block of columns: no codeword gives less than what was chosen, all else made up for at best."""
    w, moments = weights(4, 12), correlated(12)
    encoder = ErrorFeedback(moments, PLAIN)
    recipe = Codebook(8, block)
    q = quantize(recipe, w, encoder=encoder, generator=Generator().manual_seed(0))
    width = block[1]
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(12)
    inside, across, rest = damped[:width, :width], damped[:width, width:], damped[width:, width:]
    metric = inside - across @ torch.linalg.solve(rest, across.mT)
    words = q.side["centroids"].decode().double().reshape(-1, *block)
    for i, code in enumerate(q.codes["codes"][:, 0].tolist()):
        error = words - w[i * block[0] : (i + 1) * block[0], :width].double()
        costs = torch.einsum("kri,ij,krj->k", error, metric, error)
        assert costs[code] <= costs.min() * (1 + 1e-5)


def test_groups_have_inputs_of_their_own() -> None:
    w = torch.randn(6, 2, 3, 3, generator=Generator().manual_seed(0))
    moments = correlated(18, groups=3)
    q = quantize(Uniform(3), w, encoder=ErrorFeedback(moments, PLAIN))
    scale = q.side["scale"].decode()
    for g in range(3):
        part = w[2 * g : 2 * g + 2].reshape(2, 18)
        mean = moments[g].diagonal().mean()
        expected = gptq(part, moments[g], scale.double().reshape(1), 3)
        assert torch.equal(q.codes["codes"][2 * g : 2 * g + 2].double() - 3, expected), mean


@pytest.mark.parametrize(
    "recipe", [ECSQ(), ECSQ(3, (1, -1)), ECSQ(2, (4, 6), dead_zone=0.7), Uniform(4, (1, 8)), Uniform(3)]
)
@pytest.mark.parametrize("priced", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_compiled_loop_is_the_general_one(recipe: ECSQ | Uniform, priced: bool, groups: int) -> None:
    w = weights(12, 96)
    found = quantize(recipe, w)
    side = {name: stored.decode() for name, stored in found.side.items()}
    (spec,) = recipe.layout((12, 96))
    price = Price(0.01, {"codes": fit_rates(spec, found.codes["codes"])}) if priced else None
    encoder = ErrorFeedback(correlated(96, groups=groups))
    assert Sweep.serves(w, price)
    fast = recipe.encode_fed_back(w, side, encoder, price)["codes"]
    slow = encoder.encode(w, Parts(recipe, (12, 96), side, price))["codes"]
    assert fast.dtype == slow.dtype
    assert (fast != slow).sum() <= 2  # costs in float64 here, in float32 there
    if not priced:
        assert torch.equal(fast, slow)


@pytest.mark.parametrize(
    "recipe", [ECSQ(), ECSQ(1, (-1, 1)), ECSQ(3), Uniform(4), Uniform(4, symmetric=False), Codebook(32, (1, 2))]
)
def test_a_price_and_feedback_together_are_cheaper_than_a_price_alone(recipe: Quantizer) -> None:
    w, moments = weights(24, 48), correlated(48)
    encoder = ErrorFeedback(moments)
    sizes, errors = [], []
    for lam in (0.02, 0.3):
        plain = quantize_priced(
            recipe, w, lam, importance=moments.diagonal().float().expand(24, 48), generator=Generator().manual_seed(0)
        )
        q = quantize_priced(recipe, w, lam, encoder=encoder, generator=Generator().manual_seed(0))

        assert (
            cost(q, w, moments, lam) <= cost(plain, w, moments, lam) * 1.02
        )  # the plain one is tried under the damped diagonal
        sizes.append(len(to_bytes(Artifact({"w": q}))[0]))
        errors.append(output_error(q.decode(), w, moments))
    assert sizes[1] < sizes[0] and errors[0] < errors[1]


def test_steps_of_columns_follow_what_others_cannot_make_up_for() -> None:
    w, moments = weights(64, 24), correlated(24)
    encoder = ErrorFeedback(moments, FeedbackOptions(search=False))
    q = quantize(ECSQ(1, (-1, 1), points=Float()), w, encoder=encoder, options=FitOptions(step=0.01))
    steps = q.side["points"].decode().flatten()
    remaining = encoder.remaining((1, 24)).flatten()
    torch.testing.assert_close(steps * remaining.sqrt(), torch.full((24,), 0.01))
    first = int(moments.diagonal().argmax())  # the most active: all others can make up for its errors
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(24)
    alone = 1 / torch.linalg.inv(damped)[first, first]
    last = int(moments.diagonal().argmin())
    torch.testing.assert_close(
        (remaining[first] / remaining[last]).double(), alone / damped[last, last], rtol=1e-5, atol=0
    )


class Recorder(ColumnEncoder):
    """Columns as they come, from left to right: what a trellis is told."""

    width, ordered = 2, True

    def __init__(self) -> None:
        self.seen: list[int] = []

    def choose(self, target: Tensor, start: int, metric: Tensor) -> Tensor:
        assert metric.shape == (1, target.shape[1], target.shape[1])
        self.seen.append(start)
        return (target * 4).round() / 4

    def codes(self) -> dict[str, Tensor]:
        return {"starts": torch.tensor(self.seen)}


def test_an_encoder_with_a_state_gets_its_columns_from_left_to_right() -> None:
    found = ErrorFeedback(correlated(139)).encode(weights(3, 139), Recorder())
    assert found["starts"].tolist() == list(range(0, 139, 2))


def test_mapped_moments_measure_the_same_error() -> None:
    moments, w, found = correlated(24), weights(seed=1), weights(seed=2)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=Generator().manual_seed(0)).double())[0]
    mapped = ErrorFeedback(moments).mapped(rotation)  # v = w · rotation stands for w = v · rotationᵀ
    error = (found - w).double() @ rotation
    torch.testing.assert_close(
        torch.trace(error @ mapped.moments[0] @ error.mT).item(), output_error(found, w, moments)
    )


@pytest.mark.parametrize("recipe", [Codebook(4, (1, -1)), Codebook(2, (-1, -1)), Codebook(3, (3, 24))])
def test_whole_rows_have_no_feedback(recipe: Quantizer) -> None:
    with pytest.raises(NoFeedback, match="encodes all columns together"):
        quantize(recipe, weights(), encoder=ErrorFeedback(correlated(24)))


def test_singular_moments_are_damped_until_they_factor() -> None:
    ones = torch.ones(24, 24)
    encoder = ErrorFeedback(ones, FeedbackOptions(damping=0.0))
    quantize(Uniform(3), weights(), encoder=encoder)
    assert encoder.report is not None and 0 < encoder.report.damping < 1e-3


def test_what_is_no_second_moment_is_refused() -> None:
    good = correlated(24)
    for bad, message in (
        (torch.ones(3, 4), "use \\(cols, cols\\)"),
        (torch.ones(4), "use \\(cols, cols\\)"),
        (good * float("nan"), "NaN or infinity"),
        (-good, "symmetric"),
        (torch.ones(24, 24).triu(), "symmetric"),
    ):
        with pytest.raises(PlanError, match=message):
            ErrorFeedback(bad)
    with pytest.raises(PlanError, match="1 × 24 inputs do not fit a weight of shape \\(12, 25\\)"):
        quantize(Uniform(3), weights(cols=25), encoder=ErrorFeedback(good))
    with pytest.raises(PlanError, match="2 × 24 inputs do not fit"):
        quantize(Uniform(3), weights(rows=5), encoder=ErrorFeedback(correlated(24, groups=2)))
    with pytest.raises(PlanError, match="leave importance out"):
        quantize(Uniform(3), weights(), encoder=ErrorFeedback(good), importance=weights())
    for options, message in (({"damping": -1.0}, "damping=-1.0"), ({"order": "random"}, "'activation' or 'given'")):
        with pytest.raises(PlanError, match=message):
            FeedbackOptions(**options)  # type: ignore[arg-type]


def test_shapes_of_any_rank() -> None:
    for shape in ((24,), (1, 24), (5, 2, 12), (2, 4, 3, 2)):
        w = torch.randn(shape, generator=Generator().manual_seed(0))
        cols = 24
        for recipe, order in itertools.product((Uniform(2), ECSQ(), Codebook(3, (1, 4))), ("given", "activation")):
            encoder = ErrorFeedback(correlated(cols), FeedbackOptions(order=order))
            assert quantize(recipe, w, encoder=encoder, generator=Generator().manual_seed(0)).decode().shape == shape
