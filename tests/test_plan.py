from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitbook import Activation, Binary, Codebook, Float, Integer, Plan, Pruned, Quantizer, Ternary, Uniform
from bitbook.errors import PlanError
from bitbook.plan import recipe_from_json, recipe_to_json

sizes = st.one_of(st.integers(1, 300), st.floats(0.001, 1.0))
blocks = st.tuples(st.one_of(st.just(-1), st.integers(1, 64)), st.one_of(st.just(-1), st.integers(1, 64)))
leaves: st.SearchStrategy[Quantizer] = st.one_of(
    st.sampled_from(["float32", "bfloat16", "float16"]).map(Float), st.integers(1, 1 << 16).map(Integer)
)
recipes = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(Uniform, st.integers(2, 8), blocks, st.booleans(), inner, st.booleans()),
        st.builds(Binary, blocks, inner, st.booleans()),
        st.builds(Ternary, blocks, inner, st.booleans()),
        st.builds(Codebook, sizes, blocks, inner, st.booleans()),
        st.builds(Pruned, sizes, inner),
    ),
    max_leaves=4,
)


@given(recipes)
def test_recipes_survive_json(recipe: Quantizer) -> None:
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe)))) == recipe


@given(recipes)
def test_reading_a_recipe_leaves_its_json_alone(recipe: Quantizer) -> None:
    value = recipe_to_json(recipe)
    assert recipe_from_json(value) == recipe_from_json(value) == recipe
    assert value == recipe_to_json(recipe)


@pytest.mark.parametrize(
    ("recipe", "value"),
    [
        (Binary(), "Binary"),
        (Uniform(4), ["Uniform", 4]),
        (Uniform(4, (1, 32)), ["Uniform", 4, {"block": [1, 32]}]),
        (Binary((1, -1)), ["Binary", [1, -1]]),
        (Codebook(256, (1, 4), centroids=Uniform(5)), ["Codebook", 256, {"centroids": ["Uniform", 5]}]),
        (Codebook(0.1, (1, -1)), ["Codebook", 0.1, {"block": [1, -1]}]),
    ],
    ids=repr,
)
def test_json_is_as_short_as_it_can_be(recipe: Quantizer, value: Any) -> None:
    assert recipe_to_json(recipe) == value
    assert recipe_from_json(value) == recipe


def _nested(depth: int) -> Any:
    return ["Uniform", 4, {"scale": _nested(depth - 1)}] if depth else ["Uniform", 4]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "not a recipe"),
        ([], "not a recipe"),
        (["Uniform", 4, {}, 1], "not a recipe"),
        (4, "not a recipe"),
        ([["Uniform"], 4], "not a recipe"),
        ("Nonsense", "not a recipe.*Uniform"),
        ("Uniform", "not a complete Uniform"),
        (["Uniform", "4"], "Uniform.bits is '4'; use int"),
        (["Uniform", True], "use int"),
        (["Uniform", 4.0], "use int"),
        (["Uniform", 99], "1 to 8"),
        (["Uniform", 4, {"colour": 1}], "no field 'colour'; it has bits, block"),
        (["Uniform", 4, {"block": [1]}], "block="),
        (["Uniform", 4, {"block": "all"}], "use tuple"),
        (["Uniform", 4, {"block": [1, [2]]}], "block="),
        (["Uniform", 4, {"pad": 1}], "use bool"),
        (["Uniform", 4, {"scale": "Nothing"}], "not a recipe"),
        (["Float", "float8"], "float32, bfloat16"),
        (["Codebook", None], "use int or float"),
        (_nested(50), "nested more than 8 deep"),
    ],
    ids=str,
)
def test_what_is_no_recipe_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        recipe_from_json(value)


def test_recipes_outside_the_list_cannot_be_written() -> None:
    class Own(Uniform):
        pass

    with pytest.raises(PlanError, match="not in plan.KINDS"):
        recipe_to_json(Own(4))


PLAN = Plan(
    {"fc1.*": Uniform(4, (1, -1)), "fc3.weight": None, "*.weight": Codebook(16, (1, 4), centroids=Uniform(5))},
    {"fc1": Activation(Uniform(8), "calibrated"), "fc2": Activation(Binary(), rule="minmax"), "fc3": None},
)


def test_plans_survive_json() -> None:
    assert Plan.from_json(json.loads(json.dumps(PLAN.to_json()))) == PLAN
    assert Plan.from_json({}) == Plan() and Plan().to_json() == {}


def test_the_first_pattern_that_matches_decides() -> None:
    names = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc3.weight"]
    first, second = Uniform(4, (1, -1)), Codebook(16, (1, 4), centroids=Uniform(5))
    expected = {"fc1.weight": first, "fc1.bias": first, "fc2.weight": second, "fc2.bias": None, "fc3.weight": None}
    assert PLAN.recipes(names) == expected
    assert [PLAN.names(name) for name in names] == [True, True, True, False, True]


def test_patterns_are_case_sensitive_and_whole() -> None:
    plan = Plan({"FC1.weight": Uniform(4)})
    with pytest.raises(PlanError, match="'FC1.weight' names no tensor; there are fc1.weight"):
        plan.recipes(["fc1.weight"])
    assert Plan({"fc1": None}).names("fc1.weight") is False


def test_a_pattern_that_names_nothing_is_a_mistake() -> None:
    with pytest.raises(PlanError, match=r"'fc9.\*' names no tensor; there are a0, a1, a2, a3, a4, a5, a6, a7, …"):
        Plan({"fc9.*": Uniform(4)}).recipes([f"a{i}" for i in range(20)])
    with pytest.raises(PlanError, match="'conv' names no module; there are none"):
        Plan(inputs={"conv": Uniform(8)}).activations([])
    assert Plan({"*": Uniform(4), "a": None}).recipes(["a"]) == {"a": Uniform(4)}  # covered, but names something


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan({"a": 4}), r"weights\['a'\] is 4; use a Quantizer or None"),
        (lambda: Plan({1: Uniform(4)}), "use a Quantizer"),
        (lambda: Plan(inputs={"a": "x"}), "use a Activation or None"),
        (lambda: Activation(Uniform(8, (1, -1))), "one scale"),
        (lambda: Activation(Codebook(4)), "cannot quantize activations"),
        (lambda: Activation(Uniform(8), "sometimes"), "batch, running, calibrated"),
        (lambda: Activation(Uniform(8), rule="mse"), "minmax, absmax"),
        (lambda: Plan.from_json([]), "a plan is an object"),
        (lambda: Plan.from_json({"weight": {}}), "a plan is an object"),
        (lambda: Plan.from_json({"weights": []}), "must be objects"),
        (lambda: Activation.from_json({"range": "batch"}), "not an activation"),
        (lambda: Activation.from_json({"recipe": ["Uniform", 8], "extra": 1}), "not an activation"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


@given(
    st.builds(
        Activation,
        st.sampled_from([Uniform(8), Uniform(4, symmetric=False), Binary()]),
        st.sampled_from(["batch", "running", "calibrated"]),
        st.sampled_from([None, "minmax", "absmax"]),
    )
)
def test_activations_survive_json(activation: Activation) -> None:
    assert Activation.from_json(json.loads(json.dumps(activation.to_json()))) == activation
