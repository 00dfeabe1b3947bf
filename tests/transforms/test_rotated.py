from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitbook import E8P, ECSQ, Codebook, FakeQuantize, FitOptions, Regime, Rotated, Uniform, quantize
from bitbook.errors import PlanError
from bitbook.quantizer import Price, Quantizer
from bitbook.transforms.rotated import random_signs, rotate, rotate_back


def splitmix(seed: int, count: int) -> list[int]:
    """SplitMix64 one number at a time (Steele, Lea & Flood 2014, figure 17)."""
    out, state, mask = [], seed, (1 << 64) - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        out.append(z ^ (z >> 31))
    return out


def test_signs_are_the_bits_of_the_generator() -> None:
    assert splitmix(0, 1) == [0xE220A8397B1DCDAF]  # the published first number
    for seed in (0, 1, 2**32 - 1):
        bits = [number >> i & 1 for number in splitmix(seed, 3) for i in range(64)]
        assert random_signs(150, seed).tolist() == [1.0 - 2 * bit for bit in bits[:150]]


def test_the_vectors_of_the_format() -> None:
    assert [int(s) for s in random_signs(8, 0)] == [-1, -1, -1, -1, 1, -1, 1, -1]
    one = torch.tensor([[1.0, 2, 3, 4]])
    h = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert rotate(one, 0).tolist() == [(np.array([-1.0, -2, -3, -4]) @ h).tolist()]


def dense(n: int, seed: int) -> np.ndarray:
    """The rotation as a matrix, pass by pass."""
    p = 1 << n.bit_length() - 1
    starts = [0] if n == p else [0, n - p, 0]
    signs = random_signs(n * len(starts), seed).reshape(-1, n)
    matrix = np.eye(n)
    for sign, start in zip(signs, starts, strict=True):
        mix = np.eye(n)
        for i in range(p):
            for j in range(p):
                mix[start + i, start + j] = (-1) ** bin(i & j).count("1") / p**0.5
        matrix = matrix @ np.diag(sign) @ mix
    return matrix


@given(st.integers(1, 40), st.integers(0, 100))
def test_it_is_the_orthogonal_matrix_that_the_format_says(n: int, seed: int) -> None:
    matrix = dense(n, seed)
    assert np.allclose(matrix @ matrix.T, np.eye(n))
    w = torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert np.allclose(rotate(w, seed).numpy(), w.numpy() @ matrix)
    assert torch.allclose(rotate_back(rotate(w, seed), seed), w)


@pytest.mark.parametrize("n", [64, 144, 127])
def test_an_outlier_is_spread(n: int) -> None:
    for at in (0, n // 2, n - 1):
        w = torch.zeros(1, n)
        w[0, at] = 1
        assert rotate(w, 5).abs().max() < 0.36  # at worst, what p columns share meets n - p in one


@pytest.mark.parametrize("recipe", [Uniform(4, (1, -1)), E8P((1, -1), pad=True), ECSQ(), Codebook(64)])
def test_outlier_columns_cost_less(recipe: Quantizer) -> None:
    w = torch.randn(32, 144, generator=torch.Generator().manual_seed(0))
    w[:, 7] *= 30
    plain, rotated = (
        (quantize(r, w, generator=torch.Generator().manual_seed(0)).decode() - w).square().mean()
        for r in (Uniform(4, (1, -1)), Rotated(Uniform(4, (1, -1))))
    )
    assert rotated < plain / 2
    q = quantize(Rotated(recipe), w.reshape(32, 16, 3, 3), generator=torch.Generator().manual_seed(0))
    assert (q.decode().reshape(32, 144) - w).square().mean() < 0.4 * w.square().mean()


def test_gradients_pass_through() -> None:
    options = FitOptions(range="absmax")  # nothing is clipped
    source = FakeQuantize(Rotated(Uniform(8)), nn.Parameter(torch.randn(4, 12)), options=options)
    direction = torch.randn(4, 12)
    (source() * direction).sum().backward()
    grad = dict(source.named_parameters())["latent"].grad
    assert grad is not None and torch.allclose(grad, direction, atol=1e-5)


def test_learned_scales_have_the_inner_gradient() -> None:
    source = FakeQuantize(Rotated(Uniform(3)), nn.Parameter(torch.randn(4, 16)), regime=Regime(side="learned"))
    x = rotate(dict(source.named_parameters())["latent"].detach(), 0)
    inner = FakeQuantize(Uniform(3), nn.Parameter(x), regime=Regime(side="learned"))
    direction = torch.randn(4, 16)
    (source() * direction).sum().backward()
    (inner() * rotate(direction, 0)).sum().backward()
    grads = [dict(s.named_parameters())["side.scale.latent"].grad for s in (source, inner)]
    assert torch.allclose(*grads, atol=1e-5)  # type: ignore[arg-type]


def test_importance_keeps_its_row_means() -> None:
    w, importance = torch.randn(8, 16), torch.rand(8, 16)
    recipe = Rotated(Codebook(4))
    mean = importance.mean(1, keepdim=True).expand(8, 16)
    a, b = (
        quantize(r, x, importance=m, options=FitOptions(iterations=5), generator=torch.Generator().manual_seed(0))
        for r, x, m in ((recipe, w, importance), (Codebook(4), rotate(w, 0), mean))
    )
    assert torch.equal(a.codes["codes"], b.codes["codes"])


def test_refusals() -> None:
    for seed in (-1, 1 << 32, 0.5):
        with pytest.raises(PlanError, match="seed"):
            Rotated(Uniform(4), seed)  # type: ignore[arg-type]
    w = torch.randn(4, 8)
    q = quantize(Rotated(E8P()), w)
    side = {name: stored.decode() for name, stored in q.side.items()}
    with pytest.raises(PlanError, match="no codes to choose among"):
        q.recipe.encode_priced(w, side, Price(0.1, {}))
