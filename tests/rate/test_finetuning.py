"""Short training of a trained network to a few bytes, on the embedded digits."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from bitbook import ECSQ, FineTuning, FitOptions, Float, Plan, Trained, Uniform, compress, finetune, load, save
from bitbook.apply import restore
from bitbook.data import load_dataset
from bitbook.data.moves import crop_images
from bitbook.errors import BudgetError, PlanError
from bitbook.loop import Training, evaluate, run_epochs
from bitbook.qat import FakeQuantize
from bitbook.rate.finetuning import divergence, started
from bitbook.scalar.leaves import Integer
from bitbook.slot import slots

PLAN = Plan({"0.weight": ECSQ(), "3.weight": ECSQ(), "8.weight": ECSQ()})
DENSE = Plan(
    {
        "[14].weight": Float("bfloat16"), "*.bias": Uniform(6, symmetric=False), "*.running_mean": Integer(1),
        "*.running_var": Integer(2), "*.num_batches_tracked": Integer(1),
    }
)  # fmt: skip
SHORT = FineTuning(epochs=4, batch=32, refit=10)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, bias=False),
        nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_dataset("digits")
    return data.train_x.view(-1, 1, 8, 8), data.train_y, data.test_x.view(-1, 1, 8, 8), data.test_y


@pytest.fixture(scope="module")
def pretrained(images: tuple[Tensor, ...]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network()
    run_epochs(model, *images[:2], Training(6, 0.05, 32, 0.9, "cosine"), generator=Generator().manual_seed(0))
    return model.eval()


def tuned(model: nn.Module, images: tuple[Tensor, ...], **given: object) -> Trained:
    whole = {"start": PLAN, "training": SHORT, "dense": DENSE, "options": FitOptions(step=0.1), **given}
    return finetune(model, images[:2], **whole)  # type: ignore[arg-type]


def test_a_budget_is_kept_in_one_training(pretrained: nn.Module, images: tuple[Tensor, ...], tmp_path: Path) -> None:
    before = copy.deepcopy(pretrained.state_dict())
    seen = []
    result = tuned(pretrained, images, budget=900, after_epoch=seen.append)
    assert len(seen) == SHORT.epochs and tuple(seen) == result.epochs
    assert 800 <= result.bytes <= 900
    assert save(result.artifact, tmp_path / "net.safetensors").total == result.bytes
    fresh = load(tmp_path / "net.safetensors", network())
    assert evaluate(fresh, *images[2:]).accuracy > evaluate(pretrained, *images[2:]).accuracy - 5
    assert all(torch.equal(value, before[name]) for name, value in pretrained.state_dict().items())


def test_the_file_is_what_was_trained(pretrained: nn.Module, images: tuple[Tensor, ...], tmp_path: Path) -> None:
    result = tuned(pretrained, images, lam=1e-5, dense=None)
    save(result.artifact, tmp_path / "net.safetensors")
    assert torch.equal(load(tmp_path / "net.safetensors", network()).eval()(images[2]), result.model(images[2]))
    again = tuned(pretrained, images, lam=1e-5, dense=None)
    assert all(map(torch.equal, result.artifact.state_dict().values(), again.artifact.state_dict().values()))


def test_training_goes_on_from_an_artifact(pretrained: nn.Module, images: tuple[Tensor, ...]) -> None:
    start = compress(pretrained, PLAN, options=FitOptions(step=0.3), calibration=images[0][:200], lam=0.01)
    quantized = started(pretrained, start, FitOptions(), Generator())
    for name in ("0", "3", "8"):
        module, w = quantized.get_submodule(name), pretrained.get_submodule(name).weight
        source, level = slots(module)["weight"], start.decode(f"{name}.weight")
        assert isinstance(source, FakeQuantize) and source.latent is not None
        assert torch.equal(source.freeze().decode(), level)
        assert (source.latent - w).abs().mean() < 0.5 * (level - w).abs().mean()  # not all on their levels
    held = FineTuning(epochs=1, batch=2000, lr=1e-12, side_lr=1e-12, statistics="stored")
    still = finetune(pretrained, images[:2], start, lam=0.0, training=held).artifact
    for name in ("0.weight", "3.weight", "8.weight"):
        assert torch.allclose(still.decode(name), start.decode(name))
    moved = finetune(pretrained, images[:2], start, lam=0.0, training=SHORT)
    whole = tuned(pretrained, images, start=start, lam=0.0)
    further = tuned(pretrained, images, start=whole.artifact, lam=0.0)  # with its dense tensors quantized, too
    assert further.artifact.tensors.keys() == whole.artifact.tensors.keys()
    assert evaluate(restore(further.artifact, network()), *images[2:]).accuracy > 90
    reached = [evaluate(restore(artifact, network()), *images[:2]).loss for artifact in (still, moved.artifact)]
    assert reached[1] < reached[0]


@pytest.mark.parametrize(
    "training",
    [replace(SHORT, statistics="stored"), replace(SHORT, precision="bfloat16"), replace(SHORT, distill=0.5)],
    ids=["stored statistics", "bfloat16", "labels"],
)
def test_ways_of_training(pretrained: nn.Module, images: tuple[Tensor, ...], training: FineTuning) -> None:
    result = tuned(pretrained, images, lam=1e-5, training=training)
    assert evaluate(result.model, *images[2:]).accuracy > 90
    if training.statistics == "stored":
        assert result.epochs[-1].loss < result.epochs[0].loss


def test_augmented_inputs_reach_teacher_and_pupil(pretrained: nn.Module, images: tuple[Tensor, ...]) -> None:
    calls = []

    def augment(x: Tensor, generator: Generator) -> Tensor:
        calls.append(len(x))
        return crop_images(x, (1, 8, 8), 1, generator=generator)

    training = replace(SHORT, epochs=1, batch=500)
    tuned(pretrained, images, lam=1e-5, augment=augment, training=training)
    assert calls[1:] == [len(part) for part in images[0].split(500)]


def test_a_language_model_learns_where_targets_are(generator: Generator) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
    tokens = torch.randint(16, (64, 9), generator=generator)
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    y[:, 4:] = -100
    training = FineTuning(epochs=2, batch=16, distill=0.5)
    result = finetune(model, (x, y), Plan({"*.weight": ECSQ()}), lam=1e-5, training=training)
    assert all(torch.isfinite(torch.tensor(epoch.loss)) for epoch in result.epochs)
    logits, answers = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    targets = torch.tensor([[1, -100, 2], [-100, -100, 0]])
    kept = targets != -100
    expected = nn.functional.kl_div(
        (logits[kept] / 2).log_softmax(-1), (answers[kept] / 2).softmax(-1), reduction="batchmean"
    )
    assert torch.allclose(divergence(logits, answers, targets, 2.0), 4 * expected)


def test_what_is_refused(pretrained: nn.Module, images: tuple[Tensor, ...]) -> None:
    for given in ({}, {"lam": 1.0, "budget": 10}, {"lam": -1.0}):
        with pytest.raises(PlanError, match="lam"):
            tuned(pretrained, images, **given)
    with pytest.raises(PlanError, match="no example"):
        tuned(pretrained, tuple(part[:0] for part in images), lam=1.0)
    with pytest.raises(PlanError, match="shares from 0 to 1"):
        FineTuning(distill=1.5)
    with pytest.raises(PlanError, match="'batch' or 'stored'"):
        FineTuning(statistics="none")  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match=r"no file of 100 bytes after 1 epochs; it has \d+"):
        tuned(pretrained, images, budget=100, training=replace(SHORT, epochs=1))
