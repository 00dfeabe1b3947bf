"""Attacks on files of format 2: one entry for the whole model."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as stock_save
from tests.artifact.forge import Json, closed_one, opened_one, signed_one, text_of
from tests.golden.make import contents, counted

from bitbook.artifact import Artifact, from_bytes, text, to_bytes
from bitbook.artifact.read import ledger_from_bytes
from bitbook.coding.fixed import Fixed
from bitbook.errors import CorruptArtifact
from bitbook.scalar.uniform import Uniform
from bitbook.vector.codebook import Codebook


def one(artifact: Artifact) -> bytes:
    return to_bytes(artifact, Fixed(), "one")[0]


def small() -> bytes:
    """fc: 2 × 3 weights of 15 levels; rows: 3 rows, one of 2; bias: 2 floats; mask: 2 booleans."""
    tensors = {
        "fc": counted(Uniform(4), (2, 3)),
        "rows": counted(Codebook(2, (1, -1)), (3, 2)),
        "bias": torch.ones(2),
        "mask": torch.tensor([True, False]),
    }
    return one(Artifact(tensors, aliases={"tied": "fc"}))


SMALL = small()
PLAN, REST = opened_one(SMALL)
CODES = len(REST) - 8 - 2


def altered(change: Callable[[Json], None], rest: bytes = REST) -> bytes:
    plan = json.loads(PLAN)
    change(plan)
    return closed_one(text_of(plan), rest)


def refuse(data: bytes, reason: str | None = None) -> None:
    for reader in (from_bytes, ledger_from_bytes):
        with pytest.raises(CorruptArtifact, match=reason):
            reader(data)


def test_signing_is_the_formats() -> None:
    assert altered(lambda plan: None) == SMALL
    assert text_of(json.loads(PLAN)) == PLAN


# -- accidents ---------------------------------------------------------------------------------


def test_every_flipped_bit_is_found() -> None:
    flipped = bytearray(SMALL)
    for position in range(len(SMALL)):
        for mask in (*(1 << bit for bit in range(8)), 0xFF):
            flipped[position] ^= mask
            with pytest.raises(CorruptArtifact):
                from_bytes(memoryview(flipped))
            flipped[position] ^= mask


def test_every_truncation_and_extension_is_found() -> None:
    for length in range(len(SMALL)):
        refuse(SMALL[:length])
    refuse(SMALL + b"\0", "does not say that one entry holds")


# -- around the plan ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (stock_save({"bitbook": torch.zeros(200, dtype=torch.uint8)}), "one entry|no bitbook file"),
        (SMALL.replace(b'"U8"', b'"I8"'), "does not say that one entry"),
        (signed_one(b"", 2), "plan: its length does not end"),
        (signed_one(b"\0", 3), "newer bitbook, in format 3"),
        (signed_one(b"\0", 255), "newer bitbook, in format 255"),
        (signed_one(b"\0", 1), "unknown format version 1"),
        (signed_one(b"\0", 0), "unknown format version 0"),
        (signed_one(b"\x80\x80\x80\x80\x01"), "does not end within 4 bytes"),
        (signed_one(b"\x80\x00"), "shortest form"),
        (signed_one(b"\x05ab"), "plan: it claims 5 bytes; 2 are there"),
        (signed_one(b"\xff\xff\xff\x7f"), "plan: it claims 268435455 bytes; 0 are there"),
        (signed_one(b"\x20" + b"\x55" * 32), "plan: "),
        (closed_one(b"", b""), "plan: it is not JSON"),
        (closed_one(b"[]", b""), "plan: it is not a JSON object"),
        (closed_one(b'{"recipes": []}', b""), "canonical"),
        (closed_one(b'{"x":1,"x":1}', b""), "twice"),
        (closed_one(b"[" * 50_000, b""), "nested too deeply"),
        (closed_one(b"\xff", b""), "not JSON in UTF-8"),
        (closed_one(b"{}", b"\0"), "1 bytes of codes, and the plan names none"),
    ],
)
def test_around_the_plan(data: bytes, reason: str) -> None:
    refuse(data, reason)


def test_an_entry_too_short() -> None:
    header = b'{"bitbook":{"data_offsets":[0,4],"dtype":"U8","shape":[4]}}'
    refuse(len(header).to_bytes(8, "little") + header + b"\2\0\0\0", "an entry of 4 bytes is too short")


def test_an_endless_text(monkeypatch: pytest.MonkeyPatch) -> None:
    data = closed_one(b"a" * 3000, b"")
    monkeypatch.setattr(text, "LONGEST", 2000)
    refuse(data, "plan: a text does not end within 2000 bytes")


# -- the plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: p.update(extra=1), "unknown or empty keys"),
        (lambda p: p.update(coder="Huffman"), "the coder 'Huffman' is unknown"),
        (lambda p: p["tensors"].update(bias=[[2], "F8"]), "the type 'F8' is none of F64"),
        (lambda p: p["tensors"].update(bias=[[2], ["F32"]]), "by number"),
        (lambda p: p["tensors"].update(bias=[[2], None]), "by number"),
        (lambda p: p["tensors"].update(bias=[[2], "F64"]), "codes: the codes take"),
        (lambda p: p["tensors"].update(bias=[[200], "F32"]), "the dense tensors take 802 bytes, but there are"),
        (lambda p: p["tensors"].update(bias=[[10**17] * 3, "F32"]), "the dense tensors take"),
        (lambda p: p["tensors"].update(z=[[10**17, 0], "F32"]), "max_elements"),
        (lambda p: p["tensors"].update(bias=[[2, -1], "F32"]), "is not a shape"),
        (lambda p: p["tensors"].update(bias=[[2, True], "F32"]), "is not a shape"),
        (lambda p: p["tensors"].update(bias=[[1] * 65, "F32"]), "at most 64"),
        (lambda p: p["tensors"].pop("bias"), "codes: the codes take"),
        (lambda p: p["tensors"].pop("rows"), "order of first use"),
        (lambda p: p["tensors"].update(fc=[[2, 4], 0], rows=[[3, 3], 1]), "codes: the codes take"),
        (lambda p: p["tensors"].update(fc=[[10**18 - 1] * 64, 0]), "max_elements"),
        (lambda p: p["tensors"].update(__inputs__=[[2], "F32"]), "__inputs__ can only hold"),
        (lambda p: p["tensors"].update(__metadata__=[[2], "F32"]), "__metadata__ no tensor"),
        (lambda p: p["recipes"].__setitem__(0, "Float"), "never as codes"),
        (lambda p: p["recipes"].__setitem__(1, ["Codebook", 0.5, {"block": [1, -1]}]), "rows: .*resolve"),
        (lambda p: p.update(aliases={"tied": "nothing"}), "alias"),
        (lambda p: p.update(aliases={"bias": "fc"}), "alias"),
        (lambda p: p.update(aliases={"__inputs__": "fc"}), "alias"),
        (lambda p: p.update(aliases={"__metadata__": "fc"}), "alias"),
        (lambda p: p.update(aliases={"a": "tied", "tied": "fc"}), "alias"),
        (lambda p: p.update(activations=[["Codebook", 2]], inputs={"fc": 0}), "cannot quantize activations"),
        (
            lambda p: p.update(activations=[{"range": "calibrated", "recipe": ["Uniform", 4]}], inputs={"fc": 0}),
            "codes: the codes take",
        ),
    ],
)
def test_plans_that_lie(change: Callable[[Json], None], reason: str) -> None:
    refuse(altered(change), reason)


# -- the data ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (4, b"\xff\xff\xff", r"codes: codes: code 15 is not in \[0, 15\)"),
        (0, b"\0\0\xc0\x7f", "fc: its scale holds values that are not finite"),
        (7, b"\0\0\x80\xff", "rows: its centroids holds values that are not finite"),
        (CODES - 1, b"\x80", "codes: codes: the unused bits"),
        (CODES + 8, b"\2", "mask: a boolean is neither 0 nor 1"),
    ],
)
def test_data_that_cannot_be(offset: int, value: bytes, reason: str) -> None:
    rest = bytearray(REST)
    rest[offset : offset + len(value)] = value
    assert len(rest) == len(REST)
    with pytest.raises(CorruptArtifact, match=reason):
        from_bytes(altered(lambda plan: None, bytes(rest)))


@pytest.mark.parametrize(
    ("shape", "recipe"),
    [
        ([10**6, 10**6], ["Codebook", 1, {"block": [1, 1]}]),
        ([10**9, 0, 10**9], ["Codebook", 1, {"block": [1, 1]}]),
        ([1, 1], ["Uniform", 4, {"block": [10**6, 10**6], "pad": True}]),
        ([1, 1], ["Codebook", 10**17, {"block": [1, 1]}]),
    ],
)
def test_bombs_are_not_set_off(shape: list[int], recipe: Json) -> None:
    """Each would take more memory than this machine has, or minutes of it."""
    data = closed_one(text_of({"recipes": [recipe], "tensors": {"w": [shape, 0]}}), b"\0\0\x80\x3f")
    tracemalloc.start()
    begin = time.process_time()
    refuse(data, "the file claims more than 16777216 elements; if you trust it, raise max_elements")
    assert time.process_time() - begin < 1
    assert tracemalloc.get_traced_memory()[1] < 20_000_000  # room for the longest plan, whatever the file claims
    tracemalloc.stop()


@given(st.binary(max_size=200))
def test_random_bytes_are_corrupt(data: bytes) -> None:
    refuse(signed_one(data))


@pytest.mark.parametrize("name", contents())
def test_the_same_content_has_one_file(name: str) -> None:
    data = one(contents()[name])
    assert closed_one(*opened_one(data)) == data
