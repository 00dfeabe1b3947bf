"""The decoder in C reads what Python reads, to the bit, and refuses what Python refuses."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.artifact.forge import closed_one, signed, signed_one, text_of
from tests.c.contents import drawn, learning
from tests.c.decoder import SOURCE, Fed, Refused, build, compiled, compiler, read
from tests.c.fuzz import check, fuzz
from tests.golden.make import HERE
from tests.laws.cases import CODERS, QUANTIZERS, Case
from torch import Generator, Tensor

from bitbook import ECSQ, Codebook, Float, Permuted, Pruned, Residual, Table, Uniform, quantize
from bitbook.artifact import Artifact, Layout, QuantizedInput, from_bytes, save, to_bytes
from bitbook.blocks import Shape
from bitbook.coding.coder import Coder
from bitbook.coding.context import Context
from bitbook.coding.fixed import Fixed
from bitbook.coding.rans import Rans
from bitbook.errors import CorruptArtifact, PlanError
from bitbook.plan import Activation
from bitbook.quantizer import Quantized
from bitbook.transforms.permuted import rank_of

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C compiler named cc")

GOLDEN = sorted(HERE.glob("*.safetensors"))


def same(data: bytes) -> None:
    """Fail unless all names, shapes and bits are what Python reads."""
    artifact, found = from_bytes(data), read(data)
    wanted = artifact.state_dict()
    assert list(found) == list(wanted)
    names = list(found)
    for name, tensor in wanted.items():
        want = tensor.float().numpy()
        assert found[name].values.shape == want.shape
        bits = [np.where(np.isnan(v), np.float32(np.nan), v).view(np.int32) for v in (found[name].values, want)]
        np.testing.assert_array_equal(*bits, err_msg=name)
        assert names[found[name].target] == artifact.aliases.get(name, name)


def layouts(coder: Coder) -> Layout:
    """One layout for each coder, so that both are met often."""
    return "one" if coder in CODERS[::2] else "per-tensor"


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_golden_files(file: Path) -> None:
    same(file.read_bytes())


@pytest.mark.parametrize("case", QUANTIZERS, ids=str)
def test_every_recipe_by_every_coder(case: Case) -> None:
    w = torch.randn(12, 16, generator=Generator().manual_seed(0)) / 8
    w[2] = 0
    q = quantize(case.recipe, w, options=case.options, generator=Generator().manual_seed(0))
    for coder in CODERS:
        if coder != Fixed() or not any(spec.alphabet is None for spec in (s.spec for s in q.streams())):
            same(to_bytes(Artifact({"w": q}), coder, layouts(coder))[0])


def agree(artifact: Artifact, coder: Coder) -> None:
    """As `same`, where Python may also find that the content is none."""
    data = to_bytes(artifact, coder, layouts(coder))[0]
    try:
        from_bytes(data).state_dict()
    except CorruptArtifact:
        with pytest.raises(Refused, match="CORRUPT.*not finite"):
            read(data)
    else:
        same(data)


@given(
    case=st.sampled_from(QUANTIZERS),
    shape=st.sampled_from([(6, 16), (3, 8), (12, 48), (5, 7), (17,), (), (1, 1), (2, 3, 8), (0, 16), (6, 0), (36, 16)]),
    coder=st.sampled_from(CODERS),
    pad=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_any_codes(case: Case, shape: Shape, coder: Coder, pad: bool, seed: int) -> None:
    recipe = replace(case.recipe, pad=True) if pad and hasattr(case.recipe, "pad") else case.recipe
    try:
        recipe = recipe.resolve(shape)
        tensor = drawn(recipe.decoder(), shape, np.random.default_rng(seed))
        if isinstance(recipe, Float) or (coder == Fixed() and any(s.spec.alphabet is None for s in tensor.streams())):
            return
    except PlanError:  # a shape that the recipe does not fit
        return
    agree(Artifact({"w": tensor}), coder)


@pytest.mark.parametrize("coder", [Context("small"), Context("fast"), Rans(), CODERS[-1]], ids=repr)
def test_streams_that_learn_from_each_other(coder: Coder) -> None:
    same(to_bytes(learning(), coder, layouts(coder))[0])


def test_dense_types_names_ties_and_inputs() -> None:
    rng = np.random.default_rng(1)
    values = [0.0, -0.0, 1.5, math.nan, math.inf, 3e38, 1e-41, 2.0**24 + 1, -7.0]
    numbers = torch.tensor(values, dtype=torch.float64), torch.tensor([0, -1, 2**24 + 1, 12345])
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors: dict[str, Quantized | Tensor] = {
        str(dtype): given.to(dtype) for given, dtypes in zip(numbers, (floats, whole), strict=True) for dtype in dtypes
    }
    tensors["large"] = torch.tensor([2**62 + 1, -(2**63), 2**31])
    tensors |= {name: torch.ones(2) for name in ("", "ü / ☃ 🙂", 'q"\\', "\n\t\x01\x1f\x7f", "a\0b", "A", "_")}
    tensors |= {"empty": torch.zeros(3, 0, 5), "scalar": torch.tensor(2.5), "half": drawn(Float("float16"), (3,), rng)}
    w = drawn(Uniform(4, symmetric=False), (4, 4), rng)
    tensors["w"] = w
    activation = Activation(w.recipe, "running", "absmax")
    inputs = {
        "layer": QuantizedInput(activation, drawn(w.recipe, (1, 1), rng).side),
        "other": QuantizedInput(Activation(w.recipe)),
    }
    artifact = Artifact(tensors, inputs, {"tied": "w", "again": "w", "0": "scalar"})
    for coder in CODERS:
        same(to_bytes(artifact, coder, "one")[0])
        same(to_bytes(artifact, coder, "per-tensor")[0])
    found = read(to_bytes(artifact)[0])
    assert (found["w"].stored_as, found["half"].stored_as, found["A"].stored_as) == ("Uniform", "F16", "F32")


def test_long_permutations() -> None:
    """Orders as numbers of many bytes, whose lengths two formulas must agree on."""
    rng = np.random.default_rng(2)
    for n in (*range(1, 40), *rng.integers(40, 1 << 14, 20).tolist(), 1 << 14):
        q = drawn(Permuted(Uniform(2)), (1, n), rng)
        if n > 1:
            q.side["rank"].codes["codes"][:, 2:] = 0  # small numbers, which are soon taken apart
        assert read(to_bytes(Artifact({"w": q}), Fixed())[0])["w"].values.shape == (1, n)
    for n in (1, 2, 3, 20, 21, 257, 1000):
        order = rng.permutation(n).tolist()
        q = drawn(Permuted(Uniform(2)), (2, n), rng)
        if n > 1:
            size = q.side["rank"].shape[1]
            digits = torch.tensor([list(rank_of(order).to_bytes(size, "little"))], dtype=torch.uint8)
            q.side["rank"].codes["codes"].copy_(digits)
        same(to_bytes(Artifact({"w": q}), Fixed())[0])


def test_levels_are_shortest_decimals() -> None:
    """Powers of two above all, beside which the nearest decimal of some length may not be the shortest that will do."""
    rng = np.random.default_rng(5)
    levels = [2.0**k for k in range(-149, 100)] + (10 ** rng.uniform(-44, 30, 100)).tolist()
    levels += [1e30, 16777216.0, 1e16, 1e-5, 1e-4]
    tables = dict.fromkeys(Table((0.0, level)) for level in levels)
    same(to_bytes(Artifact({f"w{i}": drawn(table, (2,), rng) for i, table in enumerate(tables)}), Fixed())[0])


NUMBERS = (
    *("0.5", "5e-1", "0.50", ".5", "1", "1.0", "1e0", "1E5", "1e+16", "1e16", "1e400", "-1e400", "1e-400", "-0.0"),
    *("0.00001", "1e-05", "0.1", "0.10000000149011612", "1e30", "1e+30", "1e+31"),
    *("9" * 40, "1." + "3" * 40, "0.1e" + "9" * 30),
)


def test_numbers_in_a_plan() -> None:
    """Which of them may stand there is the JSON that Python writes, and the float that it keeps."""
    with Fed() as fed:
        said = {text: check(fed, _table("-2.0", text)) for text in NUMBERS}
    assert [text for text, status in said.items() if status == "OK"] == ["0.5", "1.0", "1e+16", "1e-05", "0.1", "1e+30"]


def _table(*levels: str) -> bytes:
    """A file of eight weights at two levels, whatever the levels' texts are."""
    plan = f'{{"recipes":[["Table",[{",".join(levels)}]]],"tensors":{{"w":[[8],0]}}}}'
    metadata = {"bitbook": "1", "crc32": "0" * 8, "plan": plan}
    entry = {"data_offsets": [0, 5], "dtype": "U8", "shape": [5]}
    return signed(text_of({"__metadata__": metadata, "w": entry}), b"\0\0\x80?\xa5")


def test_fields_that_only_encoders_need() -> None:
    rng = np.random.default_rng(6)
    stages = (Codebook(4), Uniform(2))
    tensors = {"a": drawn(ECSQ(dead_zone=0.625), (4, 8), rng), "b": drawn(Residual(stages, beam=3), (4, 8), rng)}
    same(to_bytes(Artifact(tensors))[0])


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (["Balanced", ["RowScaled", ["Uniform", 2]]], "two side tensors have the name rows"),
        (["SignMagnitude", ["Rotated", ["SignMagnitude", ["Uniform", 2]]]], "signs have signs"),
        (["ECSQ", {"dead_zone": 0.5}], "dead_zone is not"),
        (["ECSQ", {"dead_zone": 1.0}], "dead_zone is not"),
        (["Codebook", 0.5], "size is not"),
        (["Uniform", 1], "one bit has no level but zero"),
        (["TCQ", 2, {"states": 12}], "no machine of 12 states"),
        (["Lattice", "E8"], "kind is the default"),
        (["Uniform", 4, {"scale": "Float"}], "scale is the default"),
        (["Uniform", 4, {"size": 3}], "no such field"),
        (["Codebook", 3, {"block": [3, 3]}], "w: 4 rows do not divide into blocks of 3"),
        ("Codebook", "size is missing"),
        ("Nonsense", "does not know"),
    ],
    ids=str,
)
def test_recipes_that_are_none(recipe: object, reason: str) -> None:
    data = closed_one(text_of({"recipes": [recipe], "tensors": {"w": [[4, 8], 0]}}), bytes(99))
    with pytest.raises(CorruptArtifact):
        from_bytes(data)
    with pytest.raises(Refused, match=f"CORRUPT.*{reason}"):
        read(data)


def changed() -> Iterator[bytes]:
    """Golden files cut off in some places, or with some bits turned."""
    rng = np.random.default_rng(0)
    for file in GOLDEN:
        data = file.read_bytes()
        ends = {0, 1, 7, 8, 9, len(data) - 1, *rng.integers(0, len(data), 8).tolist()}
        yield from (data[:end] for end in sorted(ends))
        yield data + b"\0"
        for bit in rng.integers(0, 8 * len(data), 16).tolist():
            turned = bytearray(data)
            turned[bit // 8] ^= 1 << bit % 8
            yield bytes(turned)


def test_damaged_files_are_refused() -> None:
    with Fed() as fed:
        for data in changed():
            assert fed.read(data)[0] in ("CORRUPT", "NEWER")


def test_changed_files_are_what_python_says() -> None:
    report = fuzz(seed=0, files=80)
    assert report.read > 3
    assert report.refused["CORRUPT"] > 25


def test_errors_say_what_and_where() -> None:
    rng = np.random.default_rng(3)
    data = to_bytes(Artifact({"fc1.weight": drawn(Codebook(1, (1, 4)), (64, 64), rng)}), Fixed(), "per-tensor")[0]
    with pytest.raises(Refused, match="TOO_MANY.*fc1.weight: the file claims more than 4000 elements"):
        read(data, max_elements=4000)
    mask = drawn(Pruned(3), (2, 4), rng)
    mask.codes["mask"].zero_()
    data = to_bytes(Artifact({"fc2.weight": mask}), Fixed())[0]
    with pytest.raises(Refused, match="CORRUPT.*fc2.weight: a mask of 0 weights stands beside 3 values"):
        read(data)
    with pytest.raises(Refused, match="NEWER.*format 3; this one reads up to 2"):
        read(signed_one(b"", 3))
    with pytest.raises(Refused, match="NEWER.*format 3"):
        read(signed(b'{"__metadata__":{"bitbook":"3"}}', b""))
    with pytest.raises(Refused, match="CORRUPT.*this is no bitbook file"):
        read(signed(b'{"w":{"data_offsets":[0,0],"dtype":"F32","shape":[0]}}', b""))


def test_the_command(tmp_path: Path) -> None:
    program = build("unbitbook", (SOURCE / "unbitbook.c", compiled()))
    w = drawn(Uniform(4), (3, 5), np.random.default_rng(4))
    tensors = {"fc.weight": w, "../é": torch.arange(3.0), "scalar": torch.tensor(2.0), "n": torch.zeros(2, 0, 3)}
    file, folder = tmp_path / "small.safetensors", tmp_path / "out"
    save(Artifact(tensors, aliases={"tied": "fc.weight"}), file)
    folder.mkdir()

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)

    listed = run(file)
    assert listed.returncode == 0
    assert listed.stdout.splitlines() == [
        "(3,)  F32  ../é",
        "(3, 5)  Uniform  fc.weight",
        "(2, 0, 3)  F32  n",
        "()  F32  scalar",
        "(3, 5)  Uniform  tied  = fc.weight",
    ]
    assert run(file, folder).returncode == 0
    wanted = {
        "%2E.%2F%C3%A9": tensors["../é"],
        "fc.weight": w.decode(),
        "tied": w.decode(),
        "scalar": 2.0,
        "n": tensors["n"],
    }
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.npy" for name in wanted)
    for name, values in wanted.items():
        loaded = np.load(folder / f"{name}.npy")
        assert loaded.dtype == "<f4"
        np.testing.assert_array_equal(loaded, np.asarray(values, np.float32))
    assert run("--raw", file, folder).returncode == 0
    assert (folder / "fc.weight.f32").read_bytes() == w.decode().numpy().tobytes()
    file.write_bytes(file.read_bytes()[:-1])
    assert run(file).returncode == 1
    assert "one entry" in run(file).stderr
    assert "cannot be read" in run(tmp_path / "missing").stderr
    assert run().returncode == 2
