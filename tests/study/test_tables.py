"""Tables against slow, obvious computations on made-up results whose answers are known."""

import csv
import json
import math
import shlex
from itertools import pairwise
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitbook.errors import StudyError
from bitbook.study.grid import study_cells
from bitbook.study.stats import at_equal_bytes, mean_interval, paired_bootstrap
from bitbook.study.storage import cell_id
from bitbook.study.tables import (
    COLUMNS,
    best_under,
    curves,
    equal_accuracy_savings,
    equal_bytes_table,
    float_centroids,
    front,
    fused_pairs,
    grouped,
    markdown_table,
    paired_difference,
    points,
    repeat_command,
    smallest_within,
    trial_rows,
    vector_pairs,
    write_csv,
    write_json,
)

START = {"epochs": 5, "lr": 0.1, "batch": 64}
TUNE = {"epochs": 5, "lr": 0.001, "batch": 64}
IMAGES = 50  # not whole bytes of answers


def made(method, name, size, right, *, family="scalar", seed=0, validation=None, tune=TUNE, start=START, **cell):
    """A result in which `right` of IMAGES answers are right, the first ones; validation is in percent."""
    accuracy = 100 * right / IMAGES
    cell = {
        "dataset": "digits", "holdout": 100, "model": "mlp-4-3-2", "start": start, "family": family,
        "method": method, "recipe": name, "phases": [{"plan": {}, **({"tune": tune} if tune else {})}],
        "seed": seed, **cell,
    }  # fmt: skip
    rows = [{"split": "test", "accuracy": accuracy, "loss": 0.1 + seed}]
    if cell["holdout"]:
        rows.append({"split": "validation", "accuracy": accuracy if validation is None else validation, "loss": 0.2})
    parts = [
        {"tensor": "header", "part": "plan", "recipe": "", "shape": [], "bytes": 60, "weights": 0},
        {"tensor": "fc1.weight", "part": "codes", "recipe": name, "shape": [4, 25], "bytes": size - 60, "weights": 100},
    ]
    result = {
        "bytes": size,
        "rows": rows,
        "ledger": {"bytes": size, "weights": 100, "bits_per_weight": 8 * size / 100, "rows": parts},
        "seconds": {"start": 9.0, "fit": 1.0 + seed, "evaluate": 0.5},
        "images": IMAGES,
        "correct": np.packbits(np.arange(IMAGES) < right, bitorder="little").tobytes().hex(),
    }
    return {"cell_id": cell_id(cell), "cell": cell, "result": result, "started": "", "seconds": 10.5}


def made_curve(method, sizes, right, *, seeds=3, **options):
    """A method's results; seed s gets s more answers right."""
    return [
        made(method, f"{i} bits", size, number + seed, seed=seed, **options)
        for seed in range(seeds)
        for i, (size, number) in enumerate(zip(sizes, right, strict=True))
    ]


# --- rows and files


def test_rows_say_what_the_results_say():
    rows = trial_rows([made("scalar", "4 bits", 1000, 40, seed=2, validation=81.0)])
    assert [tuple(row) for row in rows] == [COLUMNS] * 2
    assert [row["split"] for row in rows] == ["test", "validation"]
    expected = {
        "dataset": "digits", "model": "mlp-4-3-2", "family": "scalar", "recipe": "scalar, 4 bits", "coder": "fixed",
        "seed": 2, "bytes": 1000, "accuracy": 80.0, "seconds": 3.5, "start": "5 epochs",
        "training": "5 epochs, lr 0.001", "loss": 2.1, "bits_per_weight": 80.0, "holdout": 100,
    }  # fmt: skip
    assert expected.items() <= rows[0].items()
    assert rows[1]["accuracy"] == 81.0


def test_the_order_of_results_changes_nothing(tmp_path):
    results = [r for name in ("5 %", "10 %", "100 %") for s in (0, 1) for r in [made("rows", name, 500, 30, seed=s)]]
    write_csv(trial_rows(results), tmp_path / "a.csv")
    write_csv(trial_rows(results[::-1]), tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert points(results) == points(results[::-1])
    assert [p.name for p in points(results)] == ["5 %", "10 %", "100 %"]  # not "10", "100", "5"


def test_csv(tmp_path):
    path = tmp_path / "trials.csv"
    write_csv(trial_rows([made('odd, "quoted"', "Ω", 1234, 49)]), path)
    assert path.read_text(encoding="utf-8").startswith(
        "dataset,model,family,recipe,coder,seed,split,bytes,accuracy,seconds,"
        "method,start,training,loss,bits_per_weight,holdout,cell\n"
        'digits,mlp-4-3-2,scalar,"odd, ""quoted"", Ω",fixed,0,test,1234,98.0000,1.500,'
    )
    with path.open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_json_is_json(tmp_path):
    path = tmp_path / "points.json"
    write_json([p.to_json() for p in points([made("scalar", "4 bits", 1000, 40)])], path)

    def refuse(constant):
        raise AssertionError(constant)

    (point,) = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert point["recipe"] == "scalar, 4 bits" and point["test"]["accuracy"] == 80 and point["test"]["low"] is None


def test_markdown():
    rows = [{"recipe": "a|b *c*", "bytes": 12345, "x": 1.2345}, {"recipe": "<d>", "bytes": 6, "x": None}]
    assert markdown_table(rows, ["recipe", "bytes", "x"]) == (
        "| recipe | bytes | x |\n| --- | --: | --: |\n| a\\|b \\*c\\* | 12,345 | 1.23 |\n| \\<d\\> | 6 |  |\n"
    )


def test_the_command_repeats_the_trial(monkeypatch, capsys):
    recipe = next(c for c in study_cells("digits", 1) if c["recipe"] == "4 bits" and "tune" not in c["phases"][0])
    cell = {**recipe, "start": {"epochs": 0, "lr": 0.1}, "recipe": "it's $HOME"}
    python, option, code, argument = shlex.split(repeat_command(cell))
    assert (python, option) == ("python", "-c") and json.loads(argument) == cell
    monkeypatch.setattr("sys.argv", ["-c", argument])
    exec(code, {})
    assert "'bytes': 2" in capsys.readouterr().out


# --- points


def test_a_point_is_its_seeds():
    results = [
        made("scalar", "4 bits", size, n, seed=s) for s, (size, n) in enumerate([(900, 40), (910, 44), (905, 48)])
    ]
    (point,) = points(results[::-1])
    assert point.seeds == (0, 1, 2) and point.sizes == (900, 910, 905) and point.bytes == 905
    assert point.test.interval == mean_interval([80.0, 88.0, 96.0])
    assert point.seconds == 2.5 and point.bits_per_weight == pytest.approx(72.4)
    assert point.to_json()["bytes"] == {"mean": 905, "min": 900, "max": 910}
    assert point.to_json()["test"]["min"] == 80 and point.to_json()["test"]["max"] == 96
    assert point.example == results[0] and point.cells == tuple(r["cell_id"] for r in results)
    (single,) = points(results[:1])
    assert single.test.mean == 80 and math.isnan(single.test.interval.low)


def test_two_trials_of_one_seed_are_refused():
    with pytest.raises(StudyError, match=r"scalar, 4 bits .* several trials of one seed: 0, 0"):
        points([made("scalar", "4 bits", 900, 40), made("scalar", "4 bits", 900, 40, fit={"range": "absmax"})])


def test_names_of_starts_and_trainings_are_as_short_as_they_can_be():
    def names(**changes):
        other = {**START, **changes}
        return sorted(p.group.start for p in points([made("m", "a", 100, 1), made("m", "a", 100, 1, start=other)]))

    assert names(epochs=1) == ["1 epoch", "5 epochs"]
    assert names(lr=0.2) == ["5 epochs, lr 0.1", "5 epochs, lr 0.2"]
    assert names(momentum=0.9) == ["5 epochs, lr 0.1, batch 64", "5 epochs, lr 0.1, batch 64, momentum 0.9"]


def names_of_trainings(*trainings):
    phases = [[{"plan": {}, **({} if tune is None else {"tune": tune})} for tune in tunes] for tunes in trainings]
    return [p.group.training for p in points([made("m", str(i), 100, 1, phases=p) for i, p in enumerate(phases)])]


def test_names_of_phases():
    assert set(names_of_trainings([None], [TUNE], [TUNE, TUNE])) == {
        "none", "5 epochs", "5 epochs + 5 epochs",
    }  # fmt: skip


def test_a_rate_of_its_own_is_no_group_of_its_own_but_two_rates_of_one_recipe_are():
    fast = {**TUNE, "lr": 0.1}
    a, b = made("a", "x", 100, 40), made("b", "x", 200, 50, tune=fast)
    assert {p.group.training for p in points([a, b])} == {"5 epochs"}
    assert [row["training"] for row in trial_rows([a, b])[::2]] == ["5 epochs, lr 0.001", "5 epochs, lr 0.1"]
    both = points([a, b, made("a", "x", 100, 45, tune=fast)])
    assert sorted(p.group.training for p in both) == ["5 epochs, lr 0.001", "5 epochs, lr 0.1", "5 epochs, lr 0.1"]


@given(st.lists(st.tuples(st.integers(100, 110), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8))
def test_the_front_is_what_nothing_beats_on_validation(drawn):
    results = [made("m", str(i), size, test, validation=val) for i, (size, test, val) in enumerate(drawn)]
    found = points(results)

    def beats(p, q):
        (a, x), (b, y) = ((z.bytes, z.validation.mean) for z in (p, q))
        return a <= b and x >= y and (a, x) != (b, y)

    best = {(p.bytes, p.validation.mean) for p in found if not any(beats(q, p) for q in found)}
    assert {(p.bytes, p.validation.mean) for p in front(found)} == best
    assert all(p.bytes < q.bytes for p, q in pairwise(front(found)))


def test_fronts_are_of_groups_and_need_validation():
    better = made("m", "a", 100, 40)
    results = [better, made("m", "a", 200, 30, tune=None), made("m", "a", 100, 50, holdout=0)]
    flags = {(p.group.training, p.group.holdout): p.front for p in points(results)}
    assert flags == {("5 epochs", 100): True, ("none", 100): True, ("5 epochs", 0): False}
    with pytest.raises(StudyError, match="these are of: "):
        curves(points(results))


def test_choices_are_made_on_validation():
    results = [
        made("m", "small", 100, 20, validation=60), made("m", "good", 200, 25, validation=80),
        made("m", "lucky", 200, 50, validation=70), made("m", "large", 300, 30, validation=90),
    ]  # fmt: skip
    found = points(results)
    assert [best_under(found, size) and best_under(found, size).name for size in (99, 100, 299, 300)] == [
        None, "small", "good", "large",
    ]  # fmt: skip
    assert smallest_within(found, 65).name == "good" and smallest_within(found, 91) is None
    uneven = points([made("m", "a", 100, 20), made("m", "a", 102, 20, seed=1)])
    assert best_under(uneven, 101) is None  # every seed's file must fit


# --- methods against methods


def test_savings_of_a_constant_factor():
    sizes, right = np.array([1000, 2000, 4000, 8000]), [20, 30, 40, 44]
    results = made_curve("scalar", sizes, right) + made_curve("rows", sizes * 6 // 10, right, family="vector")
    found = points(results)
    (row, back) = equal_accuracy_savings(found, [("rows", "scalar"), ("scalar", "rows")], repeats=20)
    assert row.saving.saving.percent == pytest.approx(40) and row.seeds == 3 and row.family == "vector"
    assert (row.saving.low, row.saving.high) == pytest.approx((40, 40))  # paired: seeds change both alike
    assert row.saving.saving.accuracy_low == pytest.approx(42) and back.saving.saving.percent == pytest.approx(-200 / 3)


def test_savings_with_one_seed_with_none_in_common_and_with_chance():
    right = [20, 30, 40]
    scalar = made_curve("scalar", [1000, 2000, 4000], right)
    single = made_curve("single", [500, 1000, 2000], right, seeds=1)
    other = [made("other", f"{i}", 900, i, seed=s) for s in (7, 8) for i in right]
    chance = [*made_curve("rows", [500, 1000, 2000], right), made("rows", "chance", 100, 5)]
    found = points([*scalar, *single, *other, *chance])
    pairs = [(method, "scalar") for method in ("single", "other", "rows")]
    one, none, rows = equal_accuracy_savings(found, pairs, repeats=20)
    assert one.seeds == 1 and one.saving.saving.percent == pytest.approx(50) and math.isnan(one.saving.low)
    assert none.seeds == 0 and none.saving is None
    assert rows.seeds == 3 and rows.saving.saving.percent == pytest.approx(50)
    assert {row.method for row in equal_bytes_table(found, pairs, repeats=20)} == {"single", "rows"}
    with pytest.raises(StudyError, match="no method 'lattice' in this group; there are"):
        equal_accuracy_savings(found, [("lattice", "scalar")])


def test_equal_bytes_against_a_slow_bootstrap():
    generator = np.random.default_rng(0)
    sizes = [1000, 2000, 4000]
    results = [
        made(method, f"{i}", size * factor // 10, int(generator.integers(10 * i, 10 * i + 15)), seed=seed)
        for method, factor in (("a", 8), ("b", 10))
        for i, size in enumerate(sizes, 1)
        for seed in range(4)
    ]
    found = points(results)
    rows = equal_bytes_table(found, [("a", "b")], sizes=[1500, 100, 3000], seed=5, repeats=400)
    assert [row.bytes for row in rows] == [1500, 3000]  # at 100 there is nothing

    lines = curves(found)
    seeds = {m: [[p.on_seed(s, "test") for p in lines[m]] for s in range(4)] for m in "ab"}
    drawn = np.random.default_rng(5).integers(4, size=(400, 4))
    for row in rows:
        differences = []
        for which in drawn:
            a, b = at_equal_bytes(*(np.mean([seeds[m][s] for s in which], axis=0) for m in "ab"), [row.bytes])
            differences.append(a[0] - b[0])
        assert (row.low, row.high) == pytest.approx(np.nanquantile(differences, (0.025, 0.975)))
        assert row.difference == pytest.approx(row.accuracy - row.accuracy_against)
        a, b = at_equal_bytes(*(np.mean(seeds[m], axis=0) for m in "ab"), [row.bytes])
        assert (row.accuracy, row.accuracy_against) == pytest.approx((a[0], b[0]))


def test_equal_bytes_by_default_at_the_first_method_s_sizes():
    results = made_curve("a", [1000, 2000], [20, 40]) + made_curve("b", [500, 1500], [10, 30])
    (row,) = equal_bytes_table(points(results), [("a", "b")], repeats=10)
    on_b = 20 + 40 * math.log(1000 / 500) / math.log(1500 / 500) + fmean((0, 2, 4))
    assert row.bytes == 1000 and row.difference == pytest.approx(40 + 2 - on_b)


def test_paired_difference_is_the_bootstrap_in_points():
    a = [made("a", "x", 100, n, seed=s) for s, n in enumerate((30, 35, 40))]
    b = [made("b", "x", 100, n, seed=s) for s, n in enumerate((33, 31))]
    results = [*b, *a]
    point_b, point_a = sorted(points(results), key=lambda p: p.method, reverse=True)
    answers = [np.stack([np.arange(IMAGES) < n for n in right]) for right in ((30, 35), (33, 31))]
    expected = paired_bootstrap(*answers, seed=4)
    got = paired_difference(results, point_a, point_b, seed=4)
    assert got == pytest.approx((100 * expected.value, 100 * expected.low, 100 * expected.high, expected.p))
    assert got.value == pytest.approx(1.0)
    wrong = points([made("c", "x", 100, 0, seed=9), made("d", "x", 100, 0, seed=9)])
    nothing = [made("c", "x", 100, 0, seed=9), made("d", "x", 100, 0, seed=9)]
    assert paired_difference(nothing, *wrong).value == 0
    with pytest.raises(StudyError, match="common seed"):
        paired_difference([*results, *nothing], point_a, wrong[0])


def results_of(cells):
    """Made-up results for real cells: larger plans are better."""
    results = []
    for cell in cells:
        size = 1000 + sum(map(ord, cell["recipe"] + cell["method"]))
        rest = {key: value for key, value in cell.items() if key not in ("method", "recipe", "seed", "start")}
        tune = cell["phases"][0].get("tune")
        right = 20 + size % 29 + cell["seed"] % 2
        arguments = {**rest, "start": cell["start"], "seed": cell["seed"], "tune": tune}
        results.append(made(cell["method"], cell["recipe"], size, right, **arguments))
    return results


@pytest.mark.parametrize("dataset", ["digits", "mnist"])
def test_the_standard_studies_are_understood(dataset):
    """Points and pairs rely on the names that grid.py gives."""
    results = results_of(study_cells(dataset, 1))
    found = points(results)
    assert len(found) == len(results)
    validated = {group: inside for group, inside in grouped(found).items() if group.holdout}
    assert len(validated) == (2 if dataset == "digits" else 4)
    for inside in validated.values():
        pairs = fused_pairs(inside)
        fused = {p.method for p in inside if p.family == "fused"}
        assert {m for m, against in pairs if against == "scalar"} == fused
        assert {m for m, against in pairs if against == float_centroids(m)} == fused
        assert {m for m, _ in vector_pairs(inside)} == {p.method for p in inside if p.family == "vector"}
