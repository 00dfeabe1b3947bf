from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from bitbook import ECSQ, FitOptions, Quantizer, Trellis, quantize, quantize_priced
from bitbook.artifact import Artifact, from_bytes, to_bytes
from bitbook.errors import PlanError
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


@pytest.mark.parametrize(("arguments", "message"), [
    ({"states": 9}, "4, 8, 16, 32, 64, 128, 256"),
    ({"size": -1}, "0 to 127"),
    ({"block": (0, 1)}, "block"),
])  # fmt: skip
def test_refusals(arguments: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(PlanError, match=message):
        Trellis(**arguments)
