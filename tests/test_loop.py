"""Training against the plain loop with `torch.optim.SGD`: the same numbers to the bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bitbook import Training, evaluate, loop, run_epochs
from bitbook.errors import PlanError
from bitbook.loop import IGNORED


def data(n: int = 50) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(0)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def plain(net: nn.Module, x: Tensor, y: Tensor, training: Training, generator: Generator) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=training.lr, momentum=training.momentum)
    steps = training.epochs * math.ceil(len(x) / training.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (1 + math.cos(math.pi * t / steps)) / 2 if training.schedule == "cosine" else 1.0
    )
    losses = []
    for _ in range(training.epochs):
        total, count = torch.zeros(()), 0
        for batch in torch.randperm(len(x), generator=generator).split(training.batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
            count += 1
        losses.append(total.item() / count)
    return losses


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_plain_loop(momentum: float, schedule: str) -> None:
    x, y = data()
    training = Training(3, 0.125, 16, momentum, schedule)  # type: ignore[arg-type]
    ours = model()
    ours[0].weight.grad = torch.ones(5, 6)  # left over from elsewhere
    theirs = model()
    seen = []
    losses = run_epochs(
        ours, x, y, training, generator=Generator().manual_seed(1), after_epoch=lambda *pair: seen.append(pair)
    )
    assert losses == plain(theirs, x, y, training, Generator().manual_seed(1))
    assert seen == list(enumerate(losses))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_what_has_no_gradient_stays() -> None:
    x, y = data()
    net = model()
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    net[0].bias.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    run_epochs(net, x, y, Training(2, 0.1, 16, 0.9), generator=Generator().manual_seed(1))
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"0.weight", "2.weight", "2.bias"}


def test_evaluation_is_the_mean_of_batch_means() -> None:
    x, y = data()
    net = model()
    with torch.no_grad():
        logits = net(x)
    result = evaluate(net, x, y, batch=16)
    means = [F.cross_entropy(a, b).item() for a, b in zip(logits.split(16), y.split(16), strict=True)]
    assert result.loss == pytest.approx(sum(means) / len(means), rel=1e-6)
    assert result.accuracy == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())


class Counting(nn.Module):
    """Tells what comes next from how often each token came so far: causal, for any length."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 5)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen.append(tuple(tokens.shape))
        return self.out(F.one_hot(tokens, 5).float().cumsum(1))


def sequences(n: int = 20) -> tuple[Tensor, Tensor]:
    """Sequences of up to 9 tokens, one of them without a label, one with a gap."""
    generator = Generator().manual_seed(0)
    tokens = torch.randint(5, (n, 10), generator=generator)
    y = tokens[:, 1:].clone()
    for i in range(n):
        y[i, i % 10 :] = IGNORED
    y[7, 3] = IGNORED
    return tokens[:, :-1], y


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_sequences_are_evaluated_label_by_label(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_MOST_PLACES", 40)
    x, y = sequences()
    torch.manual_seed(0)
    net = Counting()
    result = evaluate(net, x, y, batch=batch)
    assert all(rows * length <= 40 and rows <= batch for rows, length in net.seen)
    losses, correct = [], []
    with torch.no_grad():
        for tokens, labels in zip(x, y, strict=True):
            logits = net(tokens[None])[0]
            for place in (labels != IGNORED).nonzero()[:, 0].tolist():
                losses.append(F.cross_entropy(logits[place], labels[place]).item())
                correct.append(bool(logits[place].argmax() == labels[place]))
    assert result.correct.tolist() == correct
    assert result.accuracy == pytest.approx(100 * sum(correct) / len(correct))
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_sequences_are_trained_on() -> None:
    x, y = sequences()
    torch.manual_seed(0)
    net = Counting()
    before = evaluate(net, x, y).loss
    labelled = (y != IGNORED).any(1)
    run_epochs(net, x[labelled], y[labelled], Training(20, 0.05, 8, 0.9), generator=Generator().manual_seed(1))
    assert evaluate(net, x, y).loss < before - 0.1


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": -1}, {"lr": 0.0}, {"lr": math.inf}, {"batch": 0}, {"momentum": -0.1}, {"schedule": "linear"}],
    ids=str,
)
def test_refusals(wrong: dict[str, object]) -> None:
    with pytest.raises(PlanError):
        Training(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [(50,), (50, 4)], ids=["images", "sequences"])
def test_evaluation_says_how_far_it_is(labels: tuple[int, ...]) -> None:
    x, y = data()
    if len(labels) > 1:
        x, y = x[:, None].expand(-1, 4, -1), y[:, None].expand(-1, 4)
    done: list[int] = []
    found = evaluate(model(), x, y, batch=16, after_batch=done.append)
    assert sum(done) == len(x) and len(done) > 1 and found[:2] == evaluate(model(), x, y, batch=16)[:2]
