"""Pictures are the same bytes for the same points, small, and show what they say they show."""

import math
import random
import re
from itertools import pairwise

import pytest
from tests.study.test_tables import made, made_curve

from bitbook.errors import StudyError
from bitbook.study.grid import Recipe, digits_recipes, mnist_recipes
from bitbook.study.plots import PANELS, difference_plot, panel, panelled, size_accuracy, style
from bitbook.study.tables import points


def of_recipes(recipes: list[Recipe], seeds=2):
    """Made-up points of real recipes, which is how many there are in a study."""
    generator = random.Random(0)
    results = []
    for recipe in recipes:
        size, right = int(3000 * 100 ** generator.random()), generator.randrange(10, 48)
        for seed in range(1 if recipe.chance else seeds):
            results.append(made(recipe.method, recipe.name, size, right + seed, family=recipe.family, seed=seed))
    return points(results)


@pytest.fixture(scope="module")
def many():
    return of_recipes(list(mnist_recipes()))


def test_every_method_has_its_panel(many):
    found = panelled([*many, *of_recipes(list(digits_recipes()))])
    assert set(found) == set(PANELS) - {"source", "search"}
    assert found["scalar"][0] == "scalar" and "vectors of 4" in found["vectors"]
    assert found["fused vectors"] == [f"vectors of {n}, 5-bit centroids" for n in (2, 4, 8)]
    assert "pruned, 4 bits" in found["controls"] and "narrower float16" in found["controls"]
    assert all("centroids" in method for method in found["fused rows and columns"])
    assert sum(map(len, found.values())) == len({p.method for p in many} | {"rows, output dense, 4-bit centroids"})
    assert panel(points([made("source", "4/4 bits", 100, 1, holdout=0)])[0]) == "source"
    assert len({style(i) for i in range(70)}) == 70


def test_a_whole_study_is_one_small_picture(many, tmp_path):
    picture = size_accuracy(many, tmp_path / "new folder" / "a.svg").read_text(encoding="utf-8")
    assert len(picture) < 300_000
    for method in {p.method for p in many}:
        assert f">{method}<" in picture, method
    for words in ("bytes of the file", "test accuracy, %", "front of all methods", "float32"):
        assert f">{words}<" in picture, words


def test_equal_points_are_the_same_picture(tmp_path):
    results = made_curve("scalar", [100, 200], [40, 45]) + made_curve("rows", [150, 250], [41, 42], family="vector")
    first = size_accuracy(points(results), tmp_path / "a.svg").read_text(encoding="utf-8")
    again = size_accuracy(points(results[::-1]), tmp_path / "b.svg").read_text(encoding="utf-8")
    assert again == first and not re.search(r"<dc:date>|\d{4}-\d\d-\d\dT", first)


@pytest.mark.parametrize("linear", [False, True])
def test_a_small_study(tmp_path, linear):
    """One seed, no error at all, chance, and no validation."""
    results = [
        made("scalar", "1 bits", 100, 0),
        made("scalar", "8 bits", 800, 50),
        made("m", "x", 90, 5, family="vector"),
    ]
    for holdout in (100, 0):
        found = points(
            [made("float", "float32", 9000, 50, family="float", holdout=holdout)] if not holdout else results
        )
        path = size_accuracy(found, tmp_path / "a.png", title="A title of my own", linear=linear)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_and_too_much_are_refused(tmp_path):
    with pytest.raises(StudyError, match="no points"):
        size_accuracy([], tmp_path / "a.svg")
    with pytest.raises(StudyError, match="one group"):
        size_accuracy(points([made("m", "a", 100, 1), made("m", "a", 100, 1, tune=None)]), tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


def test_fused_against_float_centroids_and_against_scalar(tmp_path):
    right = [20, 30, 40]
    results = (
        made_curve("rows", [1000, 2000, 4000], right, family="vector")
        + made_curve("rows, 4-bit centroids", [700, 1400, 2800], right, family="fused")
        + made_curve("scalar", [5000, 6000, 7000], right)
    )
    path = difference_plot(points(results), tmp_path / "a.svg")
    text = path.read_text(encoding="utf-8")
    assert ">rows<" in text and ">rows, 4-bit centroids<" in text and "Fused minus float centroids" in text
    assert difference_plot(points(results), tmp_path / "b.svg").read_text(encoding="utf-8") == text
    with pytest.raises(StudyError, match="no fused method meets scalar at equal bytes"):
        difference_plot(points(results), tmp_path / "c.svg", against="scalar")


def test_the_accuracy_axis_is_logarithmic_in_the_error(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    heights = []

    def look(figure, *_, **__):
        transform = figure.axes[0].yaxis.get_transform()
        heights.append([float(transform.transform([v])[0]) for v in (92.0, 96.0, 98.0, 99.0)])

    monkeypatch.setattr(Figure, "savefig", look)
    size_accuracy(points(made_curve("scalar", [100, 200], [40, 45])), tmp_path / "a.svg")
    (at,) = heights
    assert [b - a for a, b in pairwise(at)] == pytest.approx([math.log10(2)] * 3)
