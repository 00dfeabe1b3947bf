import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bitbook.cli import app
from bitbook.data import Dataset, split
from bitbook.errors import PlanError, StudyError
from bitbook.study import run, trial
from bitbook.study.grid import DIGITS, Layers, Recipe, cell, scalar_recipes, vector_recipes
from bitbook.study.run import work
from bitbook.study.search import search
from bitbook.study.search.search import Proposer, SearchSettings, hopeless, run_trial
from bitbook.study.stats import pareto_front
from bitbook.study.storage import StudyStore, open_storage

SETTINGS = SearchSettings(
    "digits", "mlp-64-32-16-10", 287, {"epochs": 8, "lr": 0.1, "batch": 32, "momentum": 0.9}, epochs=2, batch=32
)


@pytest.fixture(autouse=True)
def starts(tmp_path_factory, monkeypatch):
    """Float models are trained once for all tests."""
    monkeypatch.setenv(trial.STARTS_FOLDER, str(tmp_path_factory.getbasetemp() / "starts"))


@pytest.fixture
def store(tmp_path):
    """A search in an empty storage; called with settings and a name of its file."""
    opened = []

    def make(settings=SETTINGS, file="study.db"):
        storage = open_storage(tmp_path / file)
        opened.append(StudyStore.create(storage, settings.name, search.TRIAL, {"search": asdict(settings)}))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def made_up(cell):
    """A result without training: bytes grow with rungs, accuracy with rungs of the first layer and one good rate."""
    parameters = cell["parameters"]
    rungs = [value for name, value in parameters.items() if name.endswith(" rung")]
    size = 1000 + 100 * sum(rungs)
    accuracy = 90 + rungs[0] - abs(parameters["rate"] - 4) - 2 * (parameters["momentum"] > 0)
    if accuracy < 88:
        return {"bytes": size, "checked": {"epochs": 1, "accuracy": accuracy}, "pruned": "hopeless"}
    return {"objectives": [size, accuracy], "bytes": size, "checked": {"epochs": 1, "accuracy": accuracy}}


# --- the rule


points = st.lists(st.tuples(st.integers(1, 100), st.floats(0, 100)), max_size=5)


@given(points, st.integers(1, 100), st.floats(0, 100), st.floats(0, 10))
def test_a_trial_is_given_up_where_a_point_of_no_more_bytes_is_better_by_more_than_the_margin(front, size, acc, margin):
    check = {"after": 5, "margin": margin, "front": front}
    reason = hopeless(size, acc, check)
    assert (reason is not None) == any(b <= size and acc < a - margin for b, a in front)
    assert hopeless(size, acc, {**check, "margin": None}) is None
    if reason is not None:
        assert f"more than {margin:g} points below" in reason


# --- a trial


def cell_of(**check):
    space = search.Space.of(search.build_model(SETTINGS.model, 0), epochs=2, batch=32)
    parameters = {name: 3 for name in space.distributions if name.endswith(" rung")} | {"rate": 4, "momentum": 0.9}
    parameters |= {f"{name} kind": "vectors of 4" for name in space.ladders}
    parameters |= {"others": "8 bits", "schedule": "cosine", "scales": "refreshed"}
    start = {key: getattr(SETTINGS, key) for key in ("dataset", "model", "holdout", "seed")}
    check = {"after": 1, "margin": 3.0, "front": [], **check}
    return {**start, "start": dict(SETTINGS.start), **space.said(parameters), "check": check}


def test_looking_changes_nothing_and_a_hopeless_trial_says_why(monkeypatch):
    finished = run_trial(cell_of())
    assert finished["objectives"] == [finished["bytes"], finished["rows"][0]["accuracy"]]
    assert finished["checked"]["epochs"] == 1 and [row["split"] for row in finished["rows"]] == ["validation"]
    # Of no more bytes, and better than all; then the same beyond its bytes, and without a margin.
    given_up = run_trial(cell_of(front=[[finished["bytes"], 100.0]]))
    assert given_up.keys() == {"bytes", "checked", "pruned"} and "3 points below 100.00 %" in given_up["pruned"]
    assert given_up["checked"] == finished["checked"]
    assert run_trial(cell_of(front=[[finished["bytes"] + 1, 100.0]])) == finished
    assert run_trial(cell_of(front=[[1, 100.0]], margin=None)) == finished
    # As trained without a look in between, and without the test data.
    never = run_trial(cell_of(after=3))
    assert {**never, "checked": finished["checked"]} == finished
    dataset, data = trial.load_parts("digits", 287)
    poisoned = replace(dataset, test_x=dataset.test_x * math.nan)
    monkeypatch.setattr(trial, "load_parts", lambda name, holdout: (poisoned, data))
    assert run_trial(cell_of()) == finished


@pytest.mark.parametrize(("model", "shape"), [("lenet-5-2-4-8", (1, 28, 28)), ("resnet-8", (3, 32, 32))])
def test_models_of_other_kinds(model, shape, monkeypatch):
    x = torch.randn(48, math.prod(shape), generator=torch.Generator().manual_seed(0))
    y = torch.arange(48) % 10
    made = Dataset("made up", x[:32], y[:32], x[32:], y[32:], 10, shape)
    monkeypatch.setattr(trial, "load_parts", lambda name, holdout: (made, split(made, holdout)))
    space = search.Space.of(search.build_model(model, 0), epochs=2, batch=8)
    parameters = {f"{name} kind": list(kinds)[-2] for name, kinds in space.ladders.items()}
    parameters |= {f"{name} rung": 2 for name in space.ladders}
    parameters |= {"others": "8 bits", "rate": 2, "momentum": 0.9, "schedule": "cosine", "scales": "learned"}
    check = {"after": 1, "margin": 3.0, "front": []}
    start = {"epochs": 1, "lr": 1e-2, "batch": 8}
    said = {"dataset": "made up", "model": model, "holdout": 8, "start": start, "seed": 0, "check": check}
    result = run_trial({**said, **space.said(parameters)})
    assert result["bytes"] == result["objectives"][0] and 0 <= result["objectives"][1] <= 100


def test_a_training_that_diverges_is_pruned():
    diverging = cell_of()
    diverging["phases"][0]["tune"] = {"epochs": 2, "lr": 1e6, "batch": 32}
    result = run_trial(diverging)
    assert "diverged" in result["pruned"] and "objectives" not in result


# --- the sampler


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_a_search_ends_the_same_whether_it_was_interrupted_or_not(store, sampler):
    settings = replace(SETTINGS, sampler=sampler)
    whole = store(settings)
    work(whole, made_up, "me", propose=Proposer(whole, 16))
    parts = store(settings, "parts.db")
    for limit in (5, 6, 16):
        stops = iter([True] * 5 + [False])
        work(parts, made_up, "me", propose=Proposer(parts, limit), alive=lambda stops=stops: next(stops))
    work(parts, made_up, "me", propose=Proposer(parts, 16))
    assert [r["cell"] for r in parts.results()] == [r["cell"] for r in whole.results()]
    cells = [record["cell"] for record in whole.results()]
    assert len(cells) == 16 and len({json.dumps(cell["phases"] + [cell.get("regime")]) for cell in cells}) == 16
    assert Proposer(whole, 16)() == 0
    # Each was pruned against the front of those before it.
    for i, record in enumerate(whole.results()):
        before = [r["result"]["objectives"] for r in whole.results()[:i] if "objectives" in r["result"]]
        assert record["cell"]["check"]["front"] == [before[j] for j in (pareto_front(before) if before else [])]


@pytest.mark.slow
def test_the_usual_sampler_learns(store):
    def best(sampler):
        held = store(replace(SETTINGS, sampler=sampler), f"{sampler}.db")
        work(held, made_up, "me", propose=Proposer(held, 50))
        return sum(record["result"].get("objectives", [0, 0])[1] >= 92 for record in held.results())

    assert best("tpe") > 1.3 * best("random")


def test_cells_that_wait_are_not_proposed_again(store):
    held = store()
    proposer = Proposer(held, 6)
    assert [proposer() for _ in range(8)] == [1] * 6 + [0] * 2
    assert len(held.unfinished()) == 6
    with pytest.raises(StudyError, match="settings"):
        store(replace(SETTINGS, epochs=3))


def test_the_grid_is_what_a_search_begins_with(store, tmp_path):
    settings = replace(SETTINGS, grid="digits")
    held = store(settings)
    grid = StudyStore.create(held.storage, "digits", "a:b")
    recipes = [*scalar_recipes(Layers(), (2, 3, 4), (None, 8)), Recipe("float", "float", "float32", search.Plan())]
    tune = {"epochs": 2, "lr": 1e-2, "batch": 32}
    said = {"dataset": "digits", "model": settings.model, "start": settings.start, "holdout": 287}
    grid.enqueue(cell(recipe, tune=tune, seed=seed, **said) for recipe in recipes for seed in (0, 1))
    sizes = iter(range(100, 10_000, 100))
    while (claim := grid.claim()) is not None:
        grid.finish(claim, {"objectives": [next(sizes), 90.0]})
    proposer = Proposer(held, 6)
    assert len(proposer.grid) == 7  # of seed 0
    assert len(proposer.known) == 3  # and without inputs quantized, or everything left as it is
    assert proposer() == 1
    assert held.unfinished()[0]["check"]["front"] == [[100, 90.0]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"sampler": "grid"}, "tpe"), ({"margin": -1.0}, "zero or more"), ({"holdout": 0}, "held-out")],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(PlanError, match=message):
        replace(SETTINGS, **wrong)


def test_usual_settings():
    usual = SearchSettings.usual("digits", epochs=None, seed=3)
    assert (usual.model, usual.start, usual.holdout) == (DIGITS.model, DIGITS.starts[0][0], DIGITS.holdout)
    assert (usual.epochs, usual.batch, usual.seed) == (10, 32, 3)
    assert SearchSettings.usual("mnist").epochs == 5
    other = SearchSettings.usual("digits", "mlp-64-8-10", holdout=100)
    assert (other.model, other.holdout) == ("mlp-64-8-10", 100)
    with pytest.raises(PlanError, match="name one"):
        SearchSettings.usual("cifar10")


# --- all of it


@pytest.fixture
def inline(monkeypatch):
    """Studies are run by this process, which saves the start of workers."""

    def run_study(cells, trial, storage, *, name, settings, propose=None, limit=None, **_):
        store = StudyStore.create(open_storage(storage), name, trial, settings)
        store.enqueue(cells)
        work(store, run.load_trial(trial), "me", propose=run.load_propose(propose, store, limit))
        results = {json.dumps(record["cell"], sort_keys=True): record for record in store.results()}
        store.close()
        return [results[json.dumps(cell, sort_keys=True)] for cell in cells]

    monkeypatch.setattr(search, "run_study", run_study)


def call(*arguments):
    result = CliRunner().invoke(app, ["search", "--dataset", "digits", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, in which there is a small grid."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "ALLOCATED_BITS", (2.0, 4.0))
    start, tune = DIGITS.starts[0][0], {"epochs": 2, "lr": 1e-2, "batch": 32}
    grid = StudyStore.create(open_storage("study.db"), "digits", "bitbook.study.trial:run_trial")
    recipes = [*scalar_recipes(Layers(), (2, 4), (None,)), *vector_recipes(Layers(), 4, (16,))]
    said = {"dataset": "digits", "model": DIGITS.model, "start": start, "holdout": DIGITS.holdout}
    grid.enqueue(cell(recipe, tune=tune, seed=seed, **said) for recipe in recipes for seed in (0, 1))
    work(grid, trial.run_trial, "me")
    grid.close()
    return tmp_path


def test_search_from_the_command_line(folder, inline):
    options = ["--epochs", "2", "--out", ".", "--seeds", "2"]
    said = call(*options, "--trials", "5")
    assert "5 trials: 2 from allocator, 3 from tpe; the sampler began with 2 results of the grid" in said
    for name in ("csv", "md", "svg", "html"):
        assert (folder / f"search.{name}").stat().st_size > 500
    table = (folder / "search.csv").read_text().splitlines()
    assert len(table) == 6 and table[0].startswith("number,origin,bytes,validation")
    assert "--trials 5" in (folder / "search.md").read_text()
    found = json.loads(call(*options, "--trials", "5", "--json"))
    assert (found["trials"], found["failed"], found["known"]) == (5, 0, 2)
    assert [point["seeds"] for point in found["front"]] == [[0, 1]] * len(found["front"])
    sizes = [point["bytes"]["mean"] for point in found["front"]]
    assert sizes == sorted(sizes)
    assert found["saving"] is None or found["saving"].keys() >= {"percent", "low", "high"}


@pytest.mark.slow
def test_workers_search_together_and_go_on(folder):
    options = ["--epochs", "2", "--out", ".", "--seeds", "2", "--workers", "2"]
    assert "8 trials: 2 from allocator, 6 from tpe" in call(*options, "--trials", "8")
    found = json.loads(call(*options, "--trials", "10", "--json"))
    assert (found["trials"], found["failed"]) == (10, 0)
    result = CliRunner().invoke(app, ["search", "--dataset", "digits", *options, "--trials", "10", "--join"])
    assert result.exit_code == 0 and result.stdout == ""
