"""Attacks on files of format 1.  The checksum finds accidents; an attacker signs, and so do the attacks here."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as stock_save
from tests.artifact.forge import Json, closed, opened, signed, text_of
from tests.golden.make import contents, counted

from bitbook.artifact import Artifact, from_bytes, read, read_ledger, to_bytes
from bitbook.artifact.read import ledger_from_bytes
from bitbook.coding.fixed import Fixed
from bitbook.errors import CorruptArtifact
from bitbook.scalar.uniform import Uniform
from bitbook.vector.codebook import Codebook


def small() -> bytes:
    """fc: 2 × 3 weights of 15 levels; rows: 3 rows, one of 2; bias: 2 floats; mask: 2 booleans."""
    tensors = {
        "fc": counted(Uniform(4), (2, 3)),
        "rows": counted(Codebook(2, (1, -1)), (3, 2)),
        "bias": torch.ones(2),
        "mask": torch.tensor([True, False]),
    }
    return per_tensor(Artifact(tensors, aliases={"tied": "fc"}))


def per_tensor(artifact: Artifact) -> bytes:
    """A file of format 1, which the attacks of this module are on."""
    return to_bytes(artifact, Fixed(), "per-tensor")[0]


SMALL = small()


def altered(change: Callable[[Json, Json], None], payload: bytes | None = None, data: bytes = SMALL) -> bytes:
    header, plan, old = opened(data)
    change(header, plan)
    return closed(header, plan, old if payload is None else payload)


def refuse(data: bytes, reason: str | None = None) -> None:
    for reader in (from_bytes, ledger_from_bytes):
        with pytest.raises(CorruptArtifact, match=reason):
            reader(data)


def place(name: str, data: bytes = SMALL) -> tuple[int, int]:
    return tuple(opened(data)[0][name]["data_offsets"])


def test_signing_is_the_formats() -> None:
    assert altered(lambda header, plan: None) == SMALL
    assert signed(text_of(opened(SMALL)[0]), opened(SMALL)[2]) == SMALL


# -- accidents ---------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [SMALL, per_tensor(contents()["scalar"])])
def test_every_flipped_bit_is_found(data: bytes) -> None:
    flipped = bytearray(data)
    for position in range(len(data)):
        for mask in (*(1 << bit for bit in range(8)), 0xFF):
            flipped[position] ^= mask
            with pytest.raises(CorruptArtifact):
                from_bytes(memoryview(flipped))
            flipped[position] ^= mask


def test_every_truncation_and_extension_is_found() -> None:
    for length in range(len(SMALL)):
        refuse(SMALL[:length])
    refuse(SMALL + b"\0", "checksum")
    refuse(b"", "too short")


def test_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(SMALL[:-1])
    for reader in (read, read_ledger):
        with pytest.raises(CorruptArtifact, match=r"broken\.safetensors: the checksum does not match"):
            reader(path)


# -- the header --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [len(SMALL) - 7, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_header_beyond_the_file(size: int) -> None:
    refuse(size.to_bytes(8, "little") + SMALL[8:], "the header claims")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON in UTF-8"),
        (b'{"a":NaN}', "no bitbook file"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{}", "no bitbook file"),
        (b'{"__metadata__":[]}', "not a JSON object"),
        (b'{"__metadata__":{"format":"pt"}}', "no bitbook file"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a":1,"a":1}', "key twice"),
        (b'{"a":' + b"9" * 5000 + b"}", "5000 digits"),
    ],
)
def test_header_that_is_none(text: bytes, reason: str) -> None:
    refuse(signed(text, b""), reason)


def test_a_plain_safetensors_file_is_told_apart() -> None:
    refuse(stock_save({"w": torch.zeros(2)}), "this is no bitbook file")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3", "newer bitbook, in format 3"),
        ("2", "unknown format version '2'"),
        ("999", "newer"),
        ("0", "unknown"),
        ("01", "unknown"),
        (1, "unknown"),
    ],
)
def test_versions(version: Json, reason: str) -> None:
    refuse(altered(lambda header, plan: header["__metadata__"].update(bitbook=version)), reason)


def test_metadata_is_exact() -> None:
    refuse(altered(lambda header, plan: header["__metadata__"].update(author="me")), "and no others")
    header, plan, payload = opened(SMALL)
    header["__metadata__"]["plan"] = plan
    refuse(signed(text_of(header), payload), "texts")
    del header["__metadata__"]["plan"]
    refuse(signed(text_of(header), payload), "texts")


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: text.replace(b'"dtype":"F32"', b'"dtype": "F32"'),
        lambda text: text.replace(b'"bias"', b'"\\u0062ias"'),
        lambda text: text.replace(b'"shape":[2]', b'"shape":[2.0]', 1).replace(b"[2.0]", b"[2e0]"),
        lambda text: text.replace(b'"bias"', b'"\\ud800"'),
        lambda text: json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":")).encode(),
        lambda text: b" " + text,
    ],
)
def test_header_has_one_form(rewrite: Callable[[bytes], bytes]) -> None:
    header, _, payload = opened(SMALL)
    refuse(signed(rewrite(text_of(header)), payload), "not canonical JSON")


def test_padding_is_exact() -> None:
    header, _, payload = opened(SMALL)
    text = text_of(header)
    refuse(signed(text.ljust(-(-len(text) // 8) * 8 + 8), payload), "padded")
    refuse(signed(text + b"\n", payload), "canonical|JSON")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "plan: it is not JSON"),
        ("[]", "plan: it is not a JSON object"),
        ('{"recipes": []}', "canonical"),
        ('{"x":1,"x":1}', "twice"),
        ("[" * 50_000, "nested too deeply"),
        ('{"aliases":{"x":"\\ud800"}}', "canonical"),
    ],
)
def test_plan_that_is_none(text: str, reason: str) -> None:
    header, _, payload = opened(SMALL)
    header["__metadata__"]["plan"] = text
    refuse(signed(text_of(header), payload), reason)


# -- the plan ----------------------------------------------------------------------------------


def nested(depth: int) -> Json:
    recipe: Json = "Float"
    for _ in range(depth):
        recipe = ["Uniform", 4, {"scale": recipe}]
    return recipe


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: p.update(extra=1), "unknown or empty keys"),
        (lambda p: p.update(inputs={}), "unknown or empty keys"),
        (lambda p: p.update(coder="Fixed"), "never named"),
        (lambda p: p.update(coder="Huffman"), "the coder 'Huffman' is unknown"),
        (lambda p: p.update(coder=["Fixed"]), "coder"),
        (lambda p: p.update(tensors=[1]), "tensors is not a JSON object"),
        (lambda p: p["tensors"].update(fc=[[2, 3]]), r"not \[shape, recipe number\]"),
        (lambda p: p["tensors"].update(fc=[[2, 3], 2]), "order of first use"),
        (lambda p: p["tensors"].update(fc=[[2, 3], -1]), "order of first use"),
        (lambda p: p["tensors"].update(fc=[[2, 3], False]), "by number"),
        (lambda p: p["tensors"].update(fc=[[2, 3], "0"]), "by number"),
        (lambda p: p["recipes"].append("Binary"), "order of first use"),
        (lambda p: p["recipes"].reverse(), "fc: |rows: "),
        (lambda p: p.update(recipes={}), "empty keys"),
        (lambda p: p.update(recipes={"0": "Binary"}), "not lists"),
        (lambda p: p["recipes"].__setitem__(0, ["Uniform", 4, {"pad": False}]), "shortest form"),
        (lambda p: p["recipes"].__setitem__(0, ["Uniform", {"bits": 4}]), "shortest form"),
        (lambda p: p["recipes"].__setitem__(0, ["Magic", 4]), "is not a recipe"),
        (lambda p: p["recipes"].__setitem__(0, ["Uniform", "4"]), "Uniform"),
        (lambda p: p["recipes"].__setitem__(0, ["Uniform", True]), "Uniform"),
        (lambda p: p["recipes"].__setitem__(0, ["Uniform", 99]), "Uniform"),
        (
            lambda p: p["recipes"].__setitem__(0, ["Uniform", 4, {"block": [1, 2]}]),
            "fc: 3 columns do not divide",
        ),
        (lambda p: p["recipes"].__setitem__(0, ["Uniform", 4, {"block": [1, 0]}]), "block"),
        (lambda p: p["recipes"].__setitem__(0, ["Uniform", 4, {"block": [1, 10**17]}]), "divide"),
        (lambda p: p["recipes"].__setitem__(0, nested(9)), "nested more than 8 deep"),
        (lambda p: p["recipes"].__setitem__(0, "Float"), "never as codes"),
        (
            lambda p: p["recipes"].__setitem__(0, ["Uniform", 8]),
            "fc: the codes take 10 bytes, but there are 7",
        ),
        (lambda p: p["recipes"].__setitem__(1, ["Codebook", 0.5, {"block": [1, -1]}]), "rows: .*resolve"),
        (lambda p: p["recipes"].__setitem__(1, ["Codebook", 3, {"block": [1, -1]}]), "rows: the codes take"),
        (lambda p: p["tensors"].update(fc=[[3, 3], 0]), "fc: the codes take"),
        (lambda p: p["tensors"].update(fc=[[2, True], 0]), "is not a shape"),
        (lambda p: p["tensors"].update(fc=[[2, -3], 0]), "is not a shape"),
        (lambda p: p["tensors"].update(fc=[[2, 3.0], 0]), "is not a shape"),
        (lambda p: p["tensors"].update(fc=["23", 0]), "is not a shape"),
        (lambda p: p["tensors"].update(fc=[[1] * 65, 0]), "at most 64"),
        (lambda p: p["tensors"].update(fc=[[10**18 - 1] * 64, 0]), "max_elements"),
        (lambda p: p["tensors"].update(fc=[[10**18 - 1, 0], 0]), "max_elements"),
        (lambda p: p["tensors"].update(nothing=[[2, 3], 0]), "nothing is in the plan, but not in the index"),
        (
            lambda p: p["tensors"].update(bias=[[2, 1], 0]),
            "bias: its codes are not one row of type U8|without holes",
        ),
        (lambda p: p["tensors"].update(__inputs__=[[2, 3], 0]), "__inputs__ can only hold"),
        (lambda p: p.update(aliases={"tied": "nothing"}), "alias"),
        (lambda p: p.update(aliases={"tied": 3}), "alias"),
        (lambda p: p.update(aliases={"fc": "rows"}), "alias"),
        (lambda p: p.update(aliases={"a": "tied", "tied": "fc"}), "alias"),
        (lambda p: p.update(inputs={"fc": 0}), "order of first use"),
        (lambda p: p.update(activations=[["Codebook", 2]], inputs={"fc": 0}), "cannot quantize activations"),
        (
            lambda p: p.update(activations=[{"range": "calibrated", "recipe": ["Uniform", 4]}], inputs={"fc": 0}),
            "__inputs__ is in the plan, but not in the index",
        ),
    ],
)
def test_plans_that_lie(change: Callable[[Json], None], reason: str) -> None:
    refuse(altered(lambda header, plan: change(plan)), reason)


# -- the index ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h["bias"].update(data_offsets=[0, 4]), "bias: its data is said to be"),
        (lambda h: h["bias"].update(data_offsets=[-8, 0]), "bias"),
        (lambda h: h["bias"].update(data_offsets=[1, 9]), "bias"),
        (lambda h: h["bias"].update(data_offsets=[0, 8, 8]), "bias"),
        (lambda h: h["bias"].update(data_offsets=[False, 8]), "bias"),
        (lambda h: h["bias"].update(data_offsets="08"), "bias"),
        (lambda h: h["bias"].update(data_offsets=h["fc"]["data_offsets"]), "bias"),
        (lambda h: h["fc"].update(data_offsets=h["rows"]["data_offsets"]), "fc"),
        (lambda h: h["bias"].update(shape=[3]), "bias"),
        (lambda h: h["bias"].update(shape=[1 << 40]), "bias"),
        (lambda h: h["bias"].update(shape=[2, True]), "is not a shape"),
        (lambda h: h["bias"].update(shape=None), "is not a shape"),
        (lambda h: h["bias"].update(dtype="F64"), "bias"),
        (lambda h: h["bias"].update(dtype="F8_E4M3"), "none of F64"),
        (lambda h: h["bias"].update(dtype=["F32"]), "none of F64"),
        (lambda h: h["bias"].update(dtype="I32", shape=[1, 2, 1], more=0), "no others"),
        (lambda h: h.update(bias=[]), "no others"),
        (lambda h: h["fc"].update(dtype="I8"), "fc: its codes are not one row of type U8"),
        (lambda h: h["fc"].update(shape=[1, h["fc"]["shape"][0]]), "not one row"),
        (lambda h: h.pop("rows"), "rows is in the plan, but not in the index"),
        (lambda h: h.pop("bias"), "holes"),
        (
            lambda h: h.update(__inputs__={"data_offsets": [0, 0], "dtype": "U8", "shape": [0]}),
            "can only hold",
        ),
        (lambda h: h.update(extra={"data_offsets": [0, 8], "dtype": "F32", "shape": [2]}), "holes"),
        (
            lambda h: h.update(z={"data_offsets": [10, 10], "dtype": "U8", "shape": [10**17, 0]}),
            "max_elements",
        ),
    ],
)
def test_indices_that_lie(change: Callable[[Json], None], reason: str) -> None:
    refuse(altered(lambda header, plan: change(header)), reason)


def test_data_behind_the_last_entry() -> None:
    refuse(altered(lambda header, plan: None, opened(SMALL)[2] + b"\0" * 8), "but there are")


# -- the data ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "offset", "value", "reason"),
    [
        ("fc", 4, b"\xff\xff\xff", r"fc: codes: code 15 is not in \[0, 15\)"),
        ("fc", 0, b"\0\0\xc0\x7f", "fc: its scale holds values that are not finite"),
        ("rows", 0, b"\0\0\x80\xff", "rows: its centroids holds values that are not finite"),
        ("rows", 16, b"\x80", "rows: codes: the unused bits"),
        ("mask", 0, b"\2", "mask: a boolean is neither 0 nor 1"),
    ],
)
def test_data_that_cannot_be(name: str, offset: int, value: bytes, reason: str) -> None:
    payload = bytearray(opened(SMALL)[2])
    start, stop = place(name)
    assert start + offset + len(value) <= stop
    payload[start + offset : start + offset + len(value)] = value
    with pytest.raises(CorruptArtifact, match=reason):
        from_bytes(altered(lambda header, plan: None, bytes(payload)))


def test_dense_data_is_the_users_own() -> None:
    payload = bytearray(opened(SMALL)[2])
    payload[:4] = b"\0\0\xc0\x7f"
    assert from_bytes(altered(lambda header, plan: None, bytes(payload))).decode("bias")[0].isnan()


# -- oversized claims --------------------------------------------------------------------------


def free(shape: list[int], recipe: Json = None) -> bytes:
    """A signed file whose one tensor claims `shape` at 4 bytes: one scalar codeword, no bits per code."""
    recipe = recipe or ["Codebook", 1, {"block": [1, 1]}]
    header = {
        "__metadata__": {"bitbook": "1", "crc32": "0" * 8},
        "w": {"data_offsets": [0, 4], "dtype": "U8", "shape": [4]},
    }
    return closed(header, {"recipes": [recipe], "tensors": {"w": [shape, 0]}}, b"\0\0\x80\x3f")


BOMBS = [
    free([10**12]),
    free([10**6, 10**6]),
    free([5000, 5000]),
    free([10**9, 0, 10**9]),
    free([1, 1], ["Uniform", 4, {"block": [10**6, 10**6], "pad": True}]),
    free([1, 1], ["Codebook", 10**17, {"block": [1, 1]}]),
    free(
        [1, 1],
        [
            "Codebook",
            1,
            {"block": [10**6, 10**6], "centroids": ["Codebook", 1, {"block": [1, 1]}], "pad": True},
        ],
    ),
    free([1, 1], ["Codebook", 10**9, {"block": [1, 1], "centroids": ["Codebook", 1, {"block": [1, 1]}]}]),
]


@pytest.mark.parametrize("data", BOMBS)
def test_bombs_are_not_set_off(data: bytes) -> None:
    """Each would take more memory than this machine has, or minutes of it."""
    tracemalloc.start()
    begin = time.process_time()
    refuse(data, "the file claims more than 16777216 elements; if you trust it, raise max_elements")
    assert time.process_time() - begin < 1
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_the_limit_is_the_callers_to_lift() -> None:
    data = free([500, 600])
    with pytest.raises(CorruptArtifact, match="more than 700000 elements"):
        from_bytes(data, max_elements=700_000)
    assert from_bytes(data).decode("w").shape == (500, 600)
    assert from_bytes(data, max_elements=1_000_000).decode("w").unique().tolist() == [1.0]


def test_many_small_claims_add_up() -> None:
    header, plan, payload = opened(free([2000, 2000]))
    for i in range(9):
        header[f"w{i}"] = {"data_offsets": [4 + 4 * i, 8 + 4 * i], "dtype": "U8", "shape": [4]}
        plan["tensors"][f"w{i}"] = [[2000, 2000], 0]
    refuse(closed(header, plan, payload * 10), "max_elements")


# -- anything else -----------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.sampled_from([10**6, 10**12, 10**17, 10**18, 2**63, 0.5, -0.0, float("inf"), float("nan")])
    | st.sampled_from(
        ["", "0", "U8", "F32", "fc", "Float", "Uniform", "Codebook", "block", "bfloat16", "batch", "\ud800"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["block", "scale", "fc", "range"]), inner, max_size=3)
    ),
    max_leaves=6,
)
WHOLE = per_tensor(contents()["scalar"])


def spots(value: Json) -> list[tuple[Json, Any]]:
    """Every place in a JSON value that can be replaced: its container and its key there."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [spot for key in keys for spot in spots(value[key])]


@given(st.data())
def test_random_headers_are_content_or_corrupt(data: st.DataObject) -> None:
    header, plan, payload = opened(data.draw(st.sampled_from([SMALL, WHOLE])))
    for _ in range(data.draw(st.integers(1, 3))):
        where = spots(data.draw(st.sampled_from([header, plan])))
        if where:
            container, key = data.draw(st.sampled_from(where))
            if data.draw(st.booleans()):
                container[key] = data.draw(VALUES)
            else:
                del container[key]
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["plan"] = json.dumps(plan, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    file = signed(text_of(header), payload)
    try:
        artifact = from_bytes(file)
    except CorruptArtifact:
        return
    artifact.state_dict()
    assert per_tensor(artifact) == file  # one content, one file


@given(st.binary(max_size=200))
def test_random_bytes_are_corrupt(data: bytes) -> None:
    refuse(data)
    refuse(signed(data, data))
