from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitbook.artifact import text
from bitbook.errors import CorruptArtifact, PlanError

MLP = {
    "recipes": [["Uniform", 5, {"scale": ["Float", "bfloat16"]}], ["Uniform", 3, {"scale": ["Float", "bfloat16"]}]],
    "tensors": {
        **{f"fc{i + 1}.bias": [[n], 0] for i, n in enumerate((128, 64, 10))},
        **{f"fc{i + 1}.weight": [list(shape), 1] for i, shape in enumerate(((128, 784), (64, 128), (10, 64)))},
    },
}
LINES = st.binary(max_size=300).map(lambda data: data.replace(b"\n", b""))
WORDS = st.lists(st.sampled_from(['"weight"', '"bias"', "[[", "],", "0", "128", "Uniform", "{", "é"]), max_size=80)


def plan() -> bytes:
    return json.dumps(MLP, sort_keys=True, separators=(",", ":")).encode()


@given(LINES | WORDS.map(lambda words: "".join(words).encode()))
def test_any_line_comes_back(line: bytes) -> None:
    assert text.decode(text.encode(line)) == line


def test_a_plan_costs_what_is_new_in_it() -> None:
    assert len(text.encode(plan())) <= 40  # of 254
    assert len(text.encode(b"{}")) <= 2


def test_frozen_bytes() -> None:
    """A format that is written anywhere is never changed."""
    assert text.encode(b'{"tensors":{"weight":[[2,3],"F32"]}}').hex() == "f06f76b61c"


def test_plain_python_gives_the_same_bytes() -> None:
    code = (
        "import sys\n"
        "sys.modules['numba'] = None\n"
        "from bitbook.artifact import text\n"
        "line = sys.stdin.buffer.read()\n"
        "data = text.encode(line)\n"
        "assert text.decode(data) == line\n"
        "sys.stdout.buffer.write(data)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, input=plan(), capture_output=True, env=environment, check=True)
    assert result.stdout == text.encode(plan())


@given(st.binary(max_size=60))
def test_random_bytes_are_a_text_or_corrupt(data: bytes) -> None:
    try:
        line = text.decode(data)
    except CorruptArtifact:
        return
    assert text.encode(line) == data


def test_every_flipped_bit_gives_another_text_or_none() -> None:
    data = text.encode(plan())
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        try:
            line = text.decode(flipped)
        except CorruptArtifact:
            continue
        assert line != plan()
        assert text.encode(line) == flipped


def test_truncated_and_extended() -> None:
    data = text.encode(plan())
    for length in range(len(data)):
        try:
            assert text.encode(text.decode(data[:length])) == data[:length]
        except CorruptArtifact:
            continue
    with pytest.raises(CorruptArtifact, match="ends before its bytes do"):
        text.decode(data + b"\1")


def test_what_is_no_line() -> None:
    with pytest.raises(PlanError, match="one line"):
        text.encode(b"a\nb")
    with pytest.raises(PlanError, match="at most 1048576"):
        text.encode(bytes(text.LONGEST + 1))


def test_a_text_without_an_end_takes_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes may stand for any number of equal characters."""
    data = text.encode(b"a" * 100_000)
    assert len(data) < 100
    begin = time.process_time()
    monkeypatch.setattr(text, "LONGEST", 50_000)
    with pytest.raises(CorruptArtifact, match="does not end within 50000 bytes"):
        text.decode(data)
    assert time.process_time() - begin < 1
