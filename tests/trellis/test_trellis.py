from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from bitbook import ECSQ, TCQ, ErrorFeedback, FitOptions, Quantizer, Trellis, quantize, quantize_priced
from bitbook.artifact import Artifact, from_bytes, to_bytes
from bitbook.coding.choose import Smallest
from bitbook.errors import PlanError
from bitbook.rate.rates import fit_rates
from bitbook.scalar.leaves import Float


def samples(rows: int = 200, cols: int = 300, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=Generator().manual_seed(seed))


def distance(recipe: Quantizer, w: Tensor, lam: float, step: float) -> float:
    """Squared error over Shannon's bound at the bits of the whole file."""
    q = quantize_priced(recipe, w, lam, options=FitOptions(step=step))
    data, _ = to_bytes(Artifact({"w": q}))
    stored = from_bytes(data).decode("w").float()
    assert torch.equal(stored, q.decode())
    return (stored - w).square().mean().item() * 4 ** (8 * len(data) / w.numel())


def test_eight_states_come_within_half_a_decibel_of_the_bound_and_more_states_nearer() -> None:
    w = samples()
    scalar = distance(ECSQ(3), w, 0.1, 0.75)
    few, many = (distance(Trellis(states, 3), w, 0.1, 0.53) for states in (8, 64))
    assert scalar > 1.3 and few < 1.15 and many < few - 0.02


def test_levels_follow_the_columns() -> None:
    w = samples(40, 7)
    q = quantize(Trellis(8), w)
    assert q.codes["codes"].shape == (7, 40)
    first = quantize(Trellis(8), w[:, :3], options=FitOptions(step=q.side["step"].decode().item()))
    assert torch.equal(first.codes["codes"][:2], q.codes["codes"][:2])  # the third may still prepare for the fourth


def test_importance_moves_the_error() -> None:
    w, importance = samples(), torch.ones(200, 300)
    importance[:, ::2] = 50.0
    plain, weighed = quantize(Trellis(), w), quantize(Trellis(), w, importance=importance)

    def error(decoded: Tensor) -> float:
        return (decoded - w)[:, ::2].square().mean().item()

    assert error(weighed.decode()) < error(plain.decode())


def test_points_move_to_the_means_between_two_passes() -> None:
    w = samples()
    options = FitOptions(step=1.0)
    fixed = quantize(Trellis(8, 3, points=Float()), w, options=FitOptions(step=1.0, iterations=0))
    fitted = quantize(Trellis(8, 3, points=Float()), w, options=options)
    errors = [(q.decode() - w).square().mean().item() for q in (fixed, fitted)]
    assert errors[1] < errors[0]
    priced = quantize_priced(Trellis(8, 3, points=Float()), w, 0.3, options=options)
    ones = priced.codes["codes"].T == 1
    points = priced.side["points"].decode()[0]
    assert torch.isclose(w[ones].mean(), points[4], rtol=0.01)


def test_a_second_zero_wins_at_low_rates_on_peaked_weights() -> None:
    uniform = torch.rand(300, 400, generator=Generator().manual_seed(1)) - 0.5
    w = -uniform.sign() * (1 - 2 * uniform.abs()).clamp_min(1e-6).log() / 2**0.5  # Laplacian
    bound = 0.9  # of D · 4^R; Shannon's at half a bit is 0.86
    scalar, path = distance(ECSQ(3), w, 0.65, 1.4), distance(Trellis(8, 3), w, 0.65, 0.95)
    assert bound < path < 0.96 < scalar
    points = quantize_priced(Trellis(8, 3), w, 0.65, options=FitOptions(step=0.95)).side["points"].decode()[0]
    assert points[4] < 0.4 and points[2] < -1.4  # levels 1 and -1


def correlated(cols: int = 48) -> tuple[Tensor, Tensor]:
    """Weights, and second moments of inputs that depend on each other."""
    x = samples(400, cols, seed=1) @ samples(cols, cols, seed=2)
    return samples(32, cols, seed=3), (x.T @ x / len(x)).double()


@pytest.mark.parametrize("recipe", [Trellis(8), Trellis(8, 2, (1, -1)), TCQ(3), TCQ(2, 16, (1, -1))], ids=repr)
def test_error_feedback_lowers_the_error_of_outputs(recipe: Quantizer) -> None:
    w, moments = correlated()
    encoder = ErrorFeedback(moments)
    fed = quantize(recipe, w, encoder=encoder)
    assert encoder.report is not None and encoder.report.used
    assert encoder.error(w, fed) < 0.7 * encoder.error(w, quantize(recipe, w))
    stored = from_bytes(to_bytes(Artifact({"w": fed}), Smallest())[0])  # its codes are a path
    assert torch.equal(stored.decode("w").float(), fed.decode())


def test_error_feedback_and_a_price_beat_scalars_under_both() -> None:
    w, moments = correlated()
    encoder = ErrorFeedback(moments)

    def cost(recipe: Quantizer, lam: float) -> float:
        q = quantize_priced(recipe, w, lam, encoder=encoder)
        bits = sum(fit_rates(spec, q.codes[spec.name]).bits for spec in q.recipe.layout(q.shape))
        return encoder.error(w, q) + lam * bits

    assert all(cost(Trellis(8), lam) < 0.99 * cost(ECSQ(), lam) for lam in (0.3, 3.0))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"states": 9}, "4, 8, 16, 32, 64, 128, 256"),
    ({"size": -1}, "0 to 127"),
    ({"block": (0, 1)}, "block"),
])  # fmt: skip
def test_refusals(arguments: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(PlanError, match=message):
        Trellis(**arguments)
