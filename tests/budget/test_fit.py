"""A budget in, a file within it out, for networks of several kinds."""

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import bitbook
from bitbook import Fit, FitSettings, Gaussian, compress, fit_budget
from bitbook.apply import restore
from bitbook.artifact.write import to_bytes
from bitbook.budget.candidates import MATRIX_KINDS
from bitbook.budget.sensitivity import measure, weighted
from bitbook.data import load_digits
from bitbook.errors import PlanError, WeightError
from bitbook.loop import Training, evaluate, run_epochs
from bitbook.rate.finetuning import FineTuning

QUICK = FitSettings(matrices={name: MATRIX_KINDS[name] for name in ("scalar", "uniform, 4 bits", "float")}, trust=1.0)


class Small(nn.Module):
    """Convolutions (one of them depthwise), normalisations and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x.reshape(-1, 1, 8, 8))))
        return self.fc(F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2).flatten(1))


@functools.cache
def _trained() -> nn.Module:
    torch.manual_seed(0)
    model, data = Small(), load_digits()
    run_epochs(model, data.train_x, data.train_y, Training(3, 0.1, 32, 0.9), generator=Generator().manual_seed(0))
    return model.eval()


def _digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return data.train_x, data.train_y


def test_the_file_is_within_the_budget_and_near_it(tmp_path: Path) -> None:
    model = _trained()
    before = copy.deepcopy(model.state_dict())
    artifact, report = fit_budget(model, _digits(), budget=1000, settings=QUICK)
    ledger = bitbook.save(artifact, tmp_path / "small.safetensors")
    assert 900 <= ledger.total == report.size <= 1000
    assert report.reached
    loaded = bitbook.load(tmp_path / "small.safetensors", Small()).eval()
    data = load_digits()
    lost = evaluate(model, data.test_x, data.test_y).accuracy - evaluate(loaded, data.test_x, data.test_y).accuracy
    assert lost < 5
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_every_parameter_is_told_of() -> None:
    report = fit_budget(_trained(), _digits(), budget=1200, settings=QUICK).report
    assert {choice.name for choice in report.choices} == {name for name, _ in _trained().named_parameters()}
    assert all(choice.why for choice in report.choices)
    assert sum(choice.size for choice in report.choices) < report.size
    (statistics, biases) = report.repairs
    assert statistics.name == "statistics of batch normalisation"
    assert biases.name == "biases"
    assert report.to_json()["choices"][0]["tensor"] == report.choices[0].name


def test_more_bytes_lose_less() -> None:
    fit = Fit(_trained(), _digits()[0][:300], QUICK)
    few, more = (fit.to_size(budget).report for budget in (700, 1500))
    assert more.divergence < few.divergence
    assert more.predicted < few.predicted


def test_another_budget_first_changes_nothing() -> None:
    x = _digits()[0][:200]
    alone = to_bytes(Fit(_trained(), x, QUICK).to_size(900).artifact)[0]
    fit = Fit(_trained(), x, QUICK)
    fit.to_size(1400)
    assert to_bytes(fit.to_size(900).artifact)[0] == alone


def test_a_budget_that_holds_the_model_leaves_it_as_it_is() -> None:
    model = _trained()
    artifact, report = fit_budget(model, _digits(), budget=1_000_000, settings=QUICK)
    assert report.size < 1_000_000
    for name, value in model.state_dict().items():
        assert torch.equal(artifact.decode(name), value)


def test_a_budget_that_nothing_fits_gives_the_smallest_file() -> None:
    artifact, report = fit_budget(_trained(), _digits(), budget=10, settings=QUICK)
    assert not report.reached
    assert report.size == len(to_bytes(artifact)[0]) < 700


def test_bits_are_those_of_the_whole_file() -> None:
    weights = sum(parameter.numel() for parameter in _trained().parameters())
    report = fit_budget(_trained(), _digits(), bits=4.0, settings=QUICK).report
    assert 3.5 < 8 * report.size / weights <= 4.0


def test_a_drop_is_kept_on_examples_that_were_not_calibrated_on() -> None:
    model, data = _trained(), load_digits()
    artifact, report = fit_budget(model, _digits(), max_drop=2.0, settings=QUICK)
    loaded = restore(artifact, Small()).eval()
    lost = evaluate(model, data.test_x, data.test_y).accuracy - evaluate(loaded, data.test_x, data.test_y).accuracy
    assert report.budget is None
    assert report.size < 2500
    assert lost < 5


def test_equal_bits_for_every_matrix() -> None:
    report = Fit(_trained(), _digits()[0][:200], QUICK).evenly(3.0).report
    large = [choice for choice in report.choices if choice.weights > 1000]
    assert large
    for choice in large:
        assert choice.bits == pytest.approx(3.0, abs=0.4)


def test_trust_is_chosen_by_the_divergence() -> None:
    fit = Fit(_trained(), _digits()[0][:200], FitSettings(matrices=QUICK.matrices))
    assert fit.trust is None
    fit.to_size(1000)
    assert fit.trust in (0.0, 0.5, 1.0)


def test_no_trust_is_equal_errors_everywhere() -> None:
    names = ["conv1.weight", "fc.weight", "bn1.bias"]
    found, _ = measure(_trained(), _digits()[0][:200], names)
    even = weighted(found, 0.0)
    assert even["bn1.bias"] is found["bn1.bias"]
    for name in names[:2]:
        assert even[name].rows is not None
        torch.testing.assert_close(even[name].rows, even[name].rows.mean().expand_as(even[name].rows))
    whole = sum(float(found[name].fisher.sum()) for name in names)
    assert sum(float(even[name].fisher.sum()) for name in names) == pytest.approx(whole, rel=1e-3)


def test_fine_tuning_is_kept_where_it_is_nearer_to_the_float_model() -> None:
    plain = fit_budget(_trained(), _digits(), budget=650, settings=QUICK).report
    artifact, tuned = fit_budget(
        _trained(), _digits(), budget=650, finetune=FineTuning(epochs=6, batch=32, lr=3e-3), settings=QUICK
    )
    assert len(to_bytes(artifact)[0]) == tuned.size <= 650
    repair = tuned.repairs[-1]
    assert repair.name == "fine-tuning"
    assert repair.kept
    assert tuned.divergence == repair.after < plain.divergence


def test_tied_weights_recurrent_layers_and_loaders() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.memory = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True)
            self.out = nn.Linear(8, 20, bias=False)
            self.out.weight = self.words.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.memory(self.words(tokens))[0])

    torch.manual_seed(0)
    model = Words().eval()
    loader = torch.utils.data.DataLoader(torch.randint(0, 20, (40, 6)), batch_size=8)  # type: ignore[arg-type]
    artifact = compress(model, budget=600, data=loader)
    assert len(to_bytes(artifact)[0]) <= 600
    assert artifact.aliases == {"out.weight": "words.weight"}


def test_outputs_may_be_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))
    settings = FitSettings(matrices=QUICK.matrices, outputs=Gaussian(), trust=1.0)
    report = fit_budget(model, torch.randn(100, 10), budget=220, settings=settings).report
    assert report.size <= 220
    assert report.divergence == pytest.approx(report.predicted, rel=1.0)


def test_time_that_is_over_still_gives_a_file() -> None:
    settings = FitSettings(matrices=QUICK.matrices, seconds=0.0)
    report = fit_budget(_trained(), _digits(), budget=1000, settings=settings).report
    assert report.rounds == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of budget"),
        ({"budget": 100, "bits": 2.0}, "one of budget"),
        ({"bits": 0.0}, "positive number of bits"),
        ({"budget": 0}, "number of bytes"),
    ],
)
def test_what_is_wanted_must_be_said_once(options: dict[str, float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fit_budget(_trained(), _digits(), **options)  # type: ignore[arg-type]


def test_misuse_is_refused() -> None:
    model = _trained()
    with pytest.raises(PlanError, match="pass data, or a plan"):
        compress(model, budget=100)
    with pytest.raises(PlanError, match="leave out the budget"):
        compress(model, bitbook.Plan({"fc.weight": bitbook.Uniform(4)}), budget=100)
    with pytest.raises(PlanError, match="inputs, labels"):
        fit_budget(model, _digits()[0], max_drop=1.0)
    quantized = copy.deepcopy(model)
    bitbook.quantize_(quantized, bitbook.Plan({"fc.weight": bitbook.Uniform(4)}))
    with pytest.raises(PlanError, match="quantized already"):
        fit_budget(quantized, _digits(), budget=1000)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.parameters()).view(-1)[0] = float("nan")
    with pytest.raises((WeightError, PlanError)):
        fit_budget(broken, _digits(), budget=1000)
