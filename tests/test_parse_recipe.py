from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitbook.errors import PlanError
from bitbook.plan import parse_recipe
from bitbook.quantizer import Quantizer
from bitbook.scalar.leaves import Float, Integer
from bitbook.scalar.levels import Binary, Ternary
from bitbook.scalar.pruned import Pruned
from bitbook.scalar.uniform import Uniform
from bitbook.vector.codebook import Codebook

BLOCKS = st.tuples(*[st.integers(1, 64) | st.just(-1)] * 2)
LEAVES = st.sampled_from(["float32", "bfloat16", "float16"]).map(Float) | st.integers(1, 1 << 16).map(Integer)


def nested(inner: st.SearchStrategy[Quantizer]) -> st.SearchStrategy[Quantizer]:
    return st.one_of(
        st.builds(Uniform, st.integers(2, 8), BLOCKS, st.booleans(), inner, st.booleans()),
        st.builds(Binary, BLOCKS, inner, st.booleans()),
        st.builds(Ternary, block=BLOCKS, scale=inner),
        st.builds(Codebook, st.integers(1, 4096) | st.sampled_from([0.1, 0.9, 1.0, 1e-3]), BLOCKS, inner),
        st.builds(Pruned, st.sampled_from([0.05, 0.5, 17]), inner),
    )


@given(st.recursive(LEAVES, nested, max_leaves=3))
def test_reads_what_repr_writes(recipe: Quantizer) -> None:
    assert parse_recipe(repr(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("  Uniform( bits = 4 ) ", Uniform(4)),
        ("Codebook(256, (1, 4), Uniform(5))", Codebook(256, (1, 4), Uniform(5))),
        ("Codebook(.10, block=(1, -1))", Codebook(0.1, (1, -1))),
        ("Uniform(4, block=[1, 32])", Uniform(4, (1, 32))),
        ("Binary()", Binary()),
        ("Float('float16')", Float("float16")),
    ],
)
def test_reads_other_ways_to_write_it(text: str, recipe: Quantizer) -> None:
    assert parse_recipe(text) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a recipe such as Uniform"),
        ("Uniform(4", "was never closed"),
        ("\0", "is not a recipe such as"),
        ("Uniform", "write a call such as"),
        ("4", "write a call such as"),
        ("Unifrom(4)", "no quantizer Unifrom; there are Float, "),
        ("__import__('os').system('true')", "no quantizer __import__"),
        ("Uniform(print(4))", "no quantizer print"),
        ("Uniform(bits)", "bits in a recipe is neither a literal nor a recipe"),
        ("Uniform(2 ** 2)", "neither a literal"),
        ("Uniform(*[4])", "neither a literal"),
        ("Uniform(**{'bits': 4})", "must be given once"),
        ("Uniform(4, bits=4)", "bits must be given once"),
        ("Uniform(bit=4)", "has no field 'bit'; it has bits, block"),
        ("Uniform(4, (1, 2), True, Float(), False, 6)", "takes at most 5 arguments: bits, block"),
        ("Uniform()", "not a complete Uniform"),
        ("Uniform('4')", "Uniform.bits is '4'; use int"),
        ("Uniform(9)", "from 1 to 8"),
        ("Uniform(4, Uniform(4))", "block"),
        ("Codebook(16, (1, 4), centroids=5)", "5 is not a recipe"),
        ("Uniform(4, scale=" * 9 + "Float()" + ")" * 9, "more than 8 deep"),
        ("(" * 1000 + ")" * 1000, "is not a recipe such as"),
        *[("Uniform(" + "-" * depth + "4)", "recipe") for depth in (300, 1_000, 3_000, 100_000)],
    ],
)
def test_refuses_everything_else(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message.replace("(", r"\(").replace("*", r"\*")):
        parse_recipe(text)


@given(st.text(max_size=30))
def test_any_text_is_a_recipe_or_a_plan_error(text: str) -> None:
    with contextlib.suppress(PlanError):
        assert isinstance(parse_recipe(text), Quantizer)
