from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as stock_load
from tests.golden.make import contents, counted, golden
from torch import Tensor

from bitbook.artifact import Artifact, Layout, Ledger, QuantizedInput, from_bytes, read, read_ledger, save, to_bytes
from bitbook.artifact.ledger import HEADER
from bitbook.coding.fixed import Fixed
from bitbook.errors import ModelMismatch, PlanError
from bitbook.models import mlp
from bitbook.plan import Activation
from bitbook.quantizer import Quantized, Quantizer, quantize, stream_specs
from bitbook.scalar.leaves import Float
from bitbook.scalar.levels import Binary, Ternary
from bitbook.scalar.uniform import Uniform
from bitbook.vector.codebook import Codebook

RECIPES: Sequence[Quantizer] = (
    *(Uniform(bits) for bits in range(2, 9)),
    *(Uniform(bits, (1, -1), symmetric=False) for bits in range(1, 9)),
    Uniform(4, (1, 3), pad=True, scale=Uniform(8, (1, -1), scale=Float("bfloat16"))),
    Binary((1, -1)),
    Ternary(scale=Float("float16")),
    Codebook(7, (1, 4), pad=True),
    Codebook(3, (1, -1), centroids=Uniform(5, (1, -1))),
    Codebook(1, (-1, 1), centroids=Float("bfloat16")),
)
DENSE = (
    torch.arange(6.0, dtype=torch.float64).reshape(2, 3),
    torch.tensor([1.0, float("nan"), float("inf")]),
    torch.ones(3, dtype=torch.float16),
    torch.ones(2, 2, 2, dtype=torch.bfloat16),
    torch.tensor(-(2**60)),
    torch.arange(5, dtype=torch.int32),
    torch.arange(3, dtype=torch.int16),
    torch.tensor([-128, 127], dtype=torch.int8),
    torch.arange(7, dtype=torch.uint8),
    torch.tensor([[True, False, True]]),
    torch.zeros(0, 3),
)


def everything() -> Artifact:
    return contents()["scalar"]


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


layouts = pytest.mark.parametrize("layout", ["one", "per-tensor"])


def check(artifact: Artifact) -> Ledger:
    """What holds for every artifact: exact content, a closed ledger, and a file that others open."""
    check_layout(artifact, "per-tensor")
    return check_layout(artifact, "one")


def check_layout(artifact: Artifact, layout: Layout) -> Ledger:
    data, ledger = to_bytes(artifact, layout=layout)
    found = from_bytes(data)
    want, got = artifact.state_dict(), found.state_dict()
    assert want.keys() == got.keys()
    for name in want:
        assert equal(got[name].to(want[name].dtype), want[name]), name
    assert found.aliases == artifact.aliases
    assert {m: i.activation for m, i in found.inputs.items()} == {m: i.activation for m, i in artifact.inputs.items()}
    assert ledger.total == len(data) == sum(ledger.by_tensor().values()) == sum(ledger.by_part().values())
    assert ledger.weights == sum(tensor.numel() for name, tensor in want.items() if name not in artifact.aliases)
    assert to_bytes(found, layout=layout) == (data, ledger)
    stock = stock_load(data)
    if layout == "one":
        assert list(stock) == ["bitbook"]
        assert stock["bitbook"].dtype == torch.uint8
        return ledger
    for name, tensor in artifact.tensors.items():
        if isinstance(tensor, Tensor):
            assert equal(stock[name], tensor)
        elif isinstance(tensor.recipe, Float):
            assert equal(stock[name].float(), tensor.decode())
        else:
            assert stock[name].dtype == torch.uint8
    return ledger


@given(
    st.sampled_from(RECIPES),
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
)
def test_any_recipe_on_any_shape(recipe: Quantizer, shape: tuple[int, ...]) -> None:
    ledger = check(Artifact({"w": counted(recipe, shape)}))
    assert [row.part for row in ledger.rows if row.tensor == "w"] == [s.name for s in stream_specs(recipe, shape)]


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if not isinstance(recipe, Codebook)])
def test_fitted_tensors_come_back_bit_for_bit(recipe: Quantizer, generator: torch.Generator) -> None:
    w = torch.randn(12, 8, generator=generator)
    check(Artifact({"w": quantize(recipe, w), "b": w[0]}))


def test_dense_tensors_are_native_entries() -> None:
    artifact = Artifact({f"{i}.{t.dtype}": t for i, t in enumerate(DENSE)})
    check(artifact)
    parts = {row.part for row in to_bytes(artifact)[1].rows if row.tensor != HEADER}
    assert parts == {"values"}


def test_views_and_parameters_are_stored_by_value() -> None:
    w = torch.arange(12.0).reshape(3, 4)
    found = from_bytes(to_bytes(Artifact({"t": w.T, "p": torch.nn.Parameter(w[:, 1])}))[0])
    assert equal(found.decode("t"), w.T)
    assert equal(found.decode("p"), w[:, 1])


@layouts
def test_inputs_and_aliases(layout: Layout) -> None:
    check(everything())
    found = from_bytes(to_bytes(everything(), Fixed(), layout)[0])
    assert found.inputs["fc1"].activation == Activation(Uniform(8))
    assert found.inputs["fc1"].side == {}
    assert found.inputs["fc2"].side["scale"].decode().item() == 1 / 8
    state = found.state_dict()
    assert state["decoder.weight"] is state["fc1.weight"]
    rows = [row for row in to_bytes(everything(), Fixed(), layout)[1].rows if row.tensor == "fc2"]
    assert [(row.part, row.bytes, row.weights) for row in rows] == [
        ("input.scale.bits", 4, 0),
        ("input.zero_point.codes", 1, 0),
    ]


def test_the_empty_model() -> None:
    assert check(Artifact({})).bits_per_weight != check(Artifact({})).bits_per_weight  # not a number
    assert to_bytes(Artifact({}))[1].to_json()["bits_per_weight"] is None


def test_four_bits_cost_what_they_should() -> None:
    model = mlp((784, 128, 64, 10))
    tensors: dict[str, Quantized | Tensor] = {
        name: quantize(Uniform(4), p) if p.ndim == 2 else p for name, p in model.named_parameters()
    }
    data, ledger = to_bytes(Artifact(tensors), Fixed(), "per-tensor")
    assert len(data) == 54_780
    assert ledger.by_tensor()[HEADER] <= 700
    assert to_bytes(Artifact(tensors), Fixed(), "one")[1].by_tensor()[HEADER] <= 120
    assert ledger.weights == 109_386
    assert ledger.bits_per_weight == pytest.approx(8 * len(data) / 109_386)
    by_part = ledger.by_part()
    assert by_part["codes"] == 49_036 + 4_003 + 313  # 3.91 bits for 15 levels
    assert by_part["values"] == 4 * (128 + 64 + 10)


def test_ledger_as_json() -> None:
    value = to_bytes(everything())[1].to_json()
    assert value["bytes"] == sum(row["bytes"] for row in value["rows"])
    assert value["rows"][0] == {
        "tensor": "header",
        "part": "length",
        "recipe": "",
        "shape": [],
        "bytes": 8,
        "weights": 0,
    }


# -- the same content, the same bytes ----------------------------------------------------------


@layouts
def test_order_does_not_matter(layout: Layout) -> None:
    one = everything()
    other = Artifact(
        dict(reversed(one.tensors.items())),
        dict(reversed(one.inputs.items())),
        dict(reversed(one.aliases.items())),
    )
    assert to_bytes(one, layout=layout) == to_bytes(other, layout=layout)


def test_another_process_writes_the_same() -> None:
    code = (
        "import sys\n"
        "from tests.golden.make import golden\n"
        "for file in golden().values(): sys.stdout.buffer.write(file.to_bytes())\n"
    )
    expected = b"".join(file.to_bytes() for file in golden().values())
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert result.stdout == expected


# -- on disk -----------------------------------------------------------------------------------


@layouts
def test_save_read_and_ledger(tmp_path: Path, layout: Layout) -> None:
    path = tmp_path / "model.safetensors"
    ledger = save(everything(), path, layout=layout)
    assert ledger.total == path.stat().st_size
    assert read_ledger(path) == ledger
    assert to_bytes(read(path), layout=layout)[0] == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    with safetensors.safe_open(path, "pt") as stock:
        metadata = stock.metadata()
        names = set(stock.keys())
    if layout == "one":
        assert (names, metadata) == ({"bitbook"}, None)
    else:
        assert names == everything().tensors.keys() | {"__inputs__"}
        assert metadata is not None
        assert metadata["bitbook"] == "1"


def test_small_models_are_one_entry_and_large_ones_many(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (Artifact({"w": counted(Codebook(1, (-1, 1)), (2, n))}) for n in (5, 6))
    monkeypatch.setattr("bitbook.artifact.write.LARGE", 12)
    assert to_bytes(small) == to_bytes(small, layout="one")
    assert to_bytes(large) == to_bytes(large, layout="per-tensor") != to_bytes(large, layout="one")


def test_names_too_long_for_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact({f"{i:06d}": torch.zeros(0) for i in range(60_000)})
    with pytest.raises(PlanError, match="cannot be coded"):
        to_bytes(artifact, layout="one")
    assert len(stock_load(to_bytes(artifact)[0])) == 60_000


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save(Artifact({}), path)
    old = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save(everything(), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_missing_file_is_just_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError):
        save(everything(), tmp_path / "nowhere" / "model.safetensors")


# -- what a caller can do wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "w: torch.complex64.*use strided float64, float32"),
        ({"w": torch.zeros(2).to_sparse()}, "torch.sparse_coo cannot be stored"),
        ({"w": Quantized(Codebook(0.5, (1, 1)), (1, 2), {"codes": torch.zeros(1, 2)})}, "resolve"),
        ({"\ud800": torch.zeros(1)}, "not valid Unicode"),
    ],
)
def test_what_the_format_does_not_have(tensors: dict[str, Tensor | Quantized], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        to_bytes(Artifact(tensors))


def test_side_tensors_stored_otherwise_than_the_recipe_says() -> None:
    good = counted(Uniform(4), (2, 2))
    bad = Quantized(good.recipe, good.shape, good.codes, {"scale": counted(Float("float16"), (1, 1))})
    with pytest.raises(PlanError, match=r"w: Uniform\(4\) does not describe its side tensors"):
        to_bytes(Artifact({"w": bad}))
    with pytest.raises(PlanError, match="needs the side tensors"):
        QuantizedInput(Activation(Uniform(4), "running"), {})
    with pytest.raises(PlanError, match="needs the side tensors"):
        QuantizedInput(Activation(Uniform(4)), {"scale": counted(Float(), (1, 1))})


@pytest.mark.parametrize(
    ("names", "aliases", "reason"),
    [
        (["__metadata__"], {}, "reserved"),
        (["__inputs__"], {}, "reserved"),
        (["a", "b"], {"a": "b"}, "the alias 'a' of 'b'"),
        (["a"], {"b": "c"}, "the alias 'b' of 'c'"),
    ],
)
def test_names_that_cannot_be(names: list[str], aliases: dict[str, str], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        Artifact(dict.fromkeys(names, torch.zeros(1)), aliases=aliases)


@layouts
def test_a_coder_that_a_file_cannot_name(layout: Layout) -> None:
    with pytest.raises(PlanError, match="cannot name the coder"):
        to_bytes(Artifact({}), object(), layout)  # pyright: ignore[reportArgumentType]


def test_a_layout_that_does_not_exist() -> None:
    with pytest.raises(PlanError, match=r"layout='two': use one of one, per-tensor"):
        to_bytes(Artifact({}), layout="two")  # pyright: ignore[reportArgumentType]


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(ModelMismatch, match=r"no tensor 'fc9.weight'; there are fc1\.weight"):
        everything().decode("fc9.weight")
