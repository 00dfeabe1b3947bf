"""A coverage-guided fuzzer of the reader: files that reach new lines are kept and changed further.

    python -m tests.artifact.fuzz 600      for ten minutes; prints what it did, fails at the first surprise

Checksums are put right after almost every change, so that the layers behind them are reached.  Each file must
be refused by name or be content, within a second, and content must be written again as it was read.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from tests.artifact.forge import Json, closed, closed_one, opened, opened_one, signed, signed_one, text_of
from tests.golden.make import contents, mixed, trellis
from torch import Generator

from bitbook import (
    E8P,
    ECSQ,
    NF4,
    Balanced,
    Codebook,
    FitOptions,
    GainShape,
    Lattice,
    Permuted,
    PowersOfTwo,
    Residual,
    Rotated,
    SignMagnitude,
    Table,
    Uniform,
    quantize,
)
from bitbook.artifact import Artifact, from_bytes, to_bytes
from bitbook.artifact.contents import CODERS
from bitbook.artifact.one import OPENING
from bitbook.artifact.read import ledger_from_bytes, parse
from bitbook.artifact.span import Span
from bitbook.errors import CorruptArtifact

ELEMENTS = 1 << 16  # what a file may claim here, so that thousands can be tried
SECONDS = 1.0  # of processor time for one file
_VALUES: list[Json] = [
    *(None, True, 0, 1, -1, 2, 7, 255, 256, 65536, 10**6, 10**12, 10**17, 10**18, 0.5, -0.0, float("inf")),
    *("", "0", "U8", "F32", "BF16", "BOOL", "Float", "Uniform", "Codebook", "Pruned", "Binary", "bfloat16", "batch"),
    *("Trellis", "TCQ", "Lattice", "E8P", "Rotated", "Balanced", "Permuted", "Residual", "SignMagnitude", "GainShape"),
    *([0], [0, 4], [4, 0, 3], {"block": [1, 10**8], "pad": True}),
    *("Fixed", "__inputs__", "\ud800", [], [1, 1], [1, -1], {}, {"block": [1, 2]}, {"pad": True}, ["Uniform", 4]),
    *CODERS,
]


class Report(NamedTuple):
    """What a run did."""

    files: int
    read: int
    arcs: int
    corpus: int
    grown: int
    """Bytes by which the process' largest memory grew."""


def fuzz(*, seed: int, files: int | None = None, seconds: float | None = None) -> Report:
    """Try changed files until either limit; raises whatever a reader must not raise."""
    rng = random.Random(seed)
    corpus = beginning()
    for data in corpus:
        check(data)  # compiles, before anything is measured
    known: set[tuple[str, int, int]] = set()
    tried = read = 0
    before, begin = _memory(), time.monotonic()
    while (files is None or tried < files) and (seconds is None or time.monotonic() - begin < seconds):
        data = mutate(rng.choice(corpus), rng, corpus)
        clock = time.process_time()
        with coverage() as arcs:
            read += check(data)
        took = time.process_time() - clock
        assert took < SECONDS, f"{took:.1f} s for {data!r}"
        if arcs - known:
            known |= arcs
            corpus.append(data)
        tried += 1
    return Report(tried, read, len(known), len(corpus), _memory() - before)


def beginning() -> list[bytes]:
    """Files that hold something of everything, to be changed."""
    files = [
        to_bytes(artifact, coder, layout)[0]
        for artifact in contents().values()
        for coder in CODERS.values()
        for layout in ("one", "per-tensor")
    ]
    return files + [to_bytes(artifact)[0] for artifact in (mixed(), trellis(), family())]


def family() -> Artifact:
    """One of each kind that no golden file has."""
    w = torch.randn(8, 16, generator=Generator().manual_seed(0))
    book, options = Codebook(4, (1, 4), centroids=Uniform(4)), FitOptions(iterations=3)
    recipes = (
        Rotated(Uniform(3)), Balanced(ECSQ()), Permuted(book), Residual((book, Uniform(2))), SignMagnitude(book),
        GainShape(4), Lattice("D4"), E8P(), Table(NF4), PowersOfTwo(3),
    )  # fmt: skip
    generator = Generator().manual_seed(0)
    return Artifact({f"w{i}": quantize(r, w, options=options, generator=generator) for i, r in enumerate(recipes)})


def check(data: bytes) -> bool:
    """Whether `data` is content; raises for anything but content or a named error."""
    try:
        artifact = from_bytes(data, max_elements=ELEMENTS)
        state = artifact.state_dict()
    except CorruptArtifact:
        return False
    assert ledger_from_bytes(data, max_elements=ELEMENTS).total == len(data)
    coder = parse(Span.of(data), ELEMENTS).plan.coder
    again = to_bytes(artifact, coder, "one" if data[8:].startswith(OPENING) else "per-tensor")[0]
    if coder == CODERS["Fixed"]:  # others may have several ways to say the same
        assert again == data, f"{data!r} is written again as {again!r}"
    _check_same(state, from_bytes(again).state_dict())
    return True


def _check_same(state: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert state.keys() == other.keys()
    for name in state:
        torch.testing.assert_close(state[name], other[name], rtol=0, atol=0, equal_nan=True)


# -- changes -----------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random, corpus: list[bytes]) -> bytes:
    """A few changes, each at a depth of its own."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        try:
            data = rng.choice(_CHANGES)(data, rng, rng.choice(corpus))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, CorruptArtifact, RecursionError):
            continue  # too broken to be taken apart
    return data


def _change_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    at = rng.randrange(len(changed) + 1)
    kind = rng.randrange(5)
    if kind == 0 and at < len(changed):
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and at < len(changed):
        changed[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    elif kind == 2:
        changed[at:at] = rng.randbytes(rng.randint(1, 8))
    elif kind == 3:
        del changed[at : at + rng.randint(1, 8)]
    else:
        start = rng.randrange(len(changed) + 1)
        changed[at : at + 16] = changed[start : start + rng.randint(0, 32)]
    return bytes(changed)


def _change_json(value: Json, rng: random.Random) -> Json:
    places = list(_places(value))
    if not places:
        return rng.choice(_VALUES)
    container, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container[key], int):
        container[key] = container[key] * rng.choice([1, 2, -1]) + rng.choice([0, 1, -1])
    elif kind == 2:
        other, place = rng.choice(places)
        container[key] = json.loads(json.dumps(other[place]))
    else:
        container[key] = rng.choice(_VALUES)
    return value


def _places(value: Json) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _anywhere(data: bytes, rng: random.Random, other: bytes) -> bytes:
    return _change_bytes(data, rng)


def _in_plan(data: bytes, rng: random.Random, other: bytes) -> bytes:
    if not data[8:].startswith(OPENING):
        header, plan, payload = opened(data)
        return closed(header, _change_json(plan, rng), payload)
    plan, rest = opened_one(data)
    return closed_one(text_of(_change_json(json.loads(plan), rng)), rest)


def _in_text(data: bytes, rng: random.Random, other: bytes) -> bytes:
    if not data[8:].startswith(OPENING):
        end = 8 + int.from_bytes(data[:8], "little")
        return signed(_change_bytes(data[8:end], rng), data[end:])
    plan, rest = opened_one(data)
    return closed_one(_change_bytes(plan, rng).replace(b"\n", b""), rest)


def _in_index(data: bytes, rng: random.Random, other: bytes) -> bytes:
    if not data[8:].startswith(OPENING):
        header, _, payload = opened(data)
        return signed(text_of(_change_json(header, rng)), payload)
    start = 8 + int.from_bytes(data[:8], "little") + 5
    return signed_one(_change_bytes(data[start:], rng))


def _in_codes(data: bytes, rng: random.Random, other: bytes) -> bytes:
    if not data[8:].startswith(OPENING):
        header, plan, payload = opened(data)
        return closed(header, plan, _change_bytes(payload, rng))
    plan, rest = opened_one(data)
    return closed_one(plan, _change_bytes(rest, rng))


def _crossed(data: bytes, rng: random.Random, other: bytes) -> bytes:
    return closed_one(opened_one(data)[0], opened_one(other)[1])


_CHANGES: list[Callable[[bytes, random.Random, bytes], bytes]] = [
    *(_anywhere, _in_text, _in_index, _crossed),
    *(_in_plan, _in_codes) * 3,
]

# -- what a run is measured by -----------------------------------------------------------------


@contextmanager
def coverage() -> Iterator[set[tuple[str, int, int]]]:
    """Collect which line of the package followed which, within functions."""
    arcs: set[tuple[str, int, int]] = set()

    def enter(frame: FrameType, event: str, argument: object):
        file = frame.f_code.co_filename
        if "/bitbook/" not in file:
            return None
        last = 0

        def line(frame: FrameType, event: str, argument: object):
            nonlocal last
            if event == "line":
                arcs.add((file, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line

    outer = sys.gettrace()
    sys.settrace(enter)
    try:
        yield arcs
    finally:
        sys.settrace(outer)


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(fuzz(seed=random.randrange(1 << 32), seconds=float(sys.argv[1])))
