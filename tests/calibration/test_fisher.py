"""The Fisher information's diagonal against the exact one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn

from bitbook.calibration.fisher import fisher_diagonal
from bitbook.calibration.outputs import Categorical, Gaussian, tensor_of
from bitbook.errors import PlanError


def _exact(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Σ over classes of their chance times the squared gradient of their log, a mean over examples."""
    found = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for example in x:
        chances = model(example[None]).softmax(1)[0]
        for label, chance in enumerate(chances.detach()):
            loss = F.cross_entropy(model(example[None]), torch.tensor([label]))
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for name, gradient in zip(found, gradients, strict=True):
                found[name] += chance * gradient.square() / len(x)
    return found


def test_draws_come_near_the_exact_information() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(16, 5)
    exact = _exact(model, x)
    drawn = fisher_diagonal(model, x.repeat(200, 1), generator=Generator().manual_seed(1))
    for name, expected in exact.items():
        torch.testing.assert_close(drawn[name], expected, rtol=0.35, atol=float(expected.mean()) * 0.2)


def test_half_of_it_times_a_small_squared_error_is_the_divergence() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3))
    x = torch.randn(64, 5)
    information = fisher_diagonal(model, x.repeat(100, 1), generator=Generator().manual_seed(1))
    reference = model(x).detach()
    weight = model[2].bias
    with torch.no_grad():
        weight[0] += 0.05
        total, count = Categorical().divergence(model(x), reference)
    assert float(total) / count == pytest.approx(0.5 * float(information["2.bias"][0]) * 0.05**2, rel=0.1)


def test_numbers_with_errors_of_variance_one() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    x = torch.randn(400, 4)
    information = fisher_diagonal(model, x.repeat(20, 1), outputs=Gaussian(), generator=Generator().manual_seed(1))
    torch.testing.assert_close(information["weight"], x.square().mean(0).expand(2, 4), rtol=0.2, atol=0.0)


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fisher_diagonal(model, torch.randn(20, 4))
    assert model.training
    assert not model[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_is_no_prediction_is_refused() -> None:
    with pytest.raises(PlanError, match="no calibration inputs"):
        fisher_diagonal(nn.Linear(2, 2), [])
    with pytest.raises(PlanError, match="first axis"):
        tensor_of(torch.zeros(3))
    with pytest.raises(PlanError, match="first axis"):
        tensor_of("text")
