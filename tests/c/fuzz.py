"""Changed files for the decoder in C, under sanitizers, with the Python reader to tell it right from wrong.

    python -m tests.c.fuzz 600      for ten minutes; prints what it did, fails at the first surprise

The changes are those of `tests/artifact/fuzz.py`, with checksums put right after most of them.  A file must be refused
by both readers, or be the same content to both; memory errors, undefined behaviour and leaks end the program.
"""

from __future__ import annotations

import random
import sys
import time
from typing import NamedTuple

import numpy as np
from tests.artifact.fuzz import ELEMENTS, beginning, mutate
from tests.c.contents import every_recipe, learning
from tests.c.decoder import Fed, checksum

from bitbook.artifact import Artifact, from_bytes, to_bytes
from bitbook.coding.choose import Smallest
from bitbook.coding.context import Context
from bitbook.coding.rans import Rans
from bitbook.errors import CorruptArtifact


class Report(NamedTuple):
    """What a run did."""

    files: int
    read: int
    refused: dict[str, int]
    slowest: float


def fuzz(*, seed: int, files: int | None = None, seconds: float | None = None) -> Report:
    """Try changed files until either limit; raises where the two readers differ, or the decoder breaks."""
    rng, drawing = random.Random(seed), np.random.default_rng(seed)
    corpus = beginning()
    corpus += [to_bytes(learning(0.3), coder)[0] for coder in (Context("small"), Context("fast"), Rans(), Smallest())]
    corpus += [
        to_bytes(Artifact({"w": tensor}), rng.choice((Rans(), Context())))[0] for tensor in every_recipe(drawing)
    ]
    tried, refused, slowest = 0, dict[str, int](), 0.0
    with Fed() as fed:
        for data in corpus:
            check(fed, data)
        begin = time.monotonic()
        while (files is None or tried < files) and (seconds is None or time.monotonic() - begin < seconds):
            data = mutate(rng.choice(corpus), rng, corpus)
            clock = time.monotonic()
            status, found = fed.read(data)
            slowest = max(slowest, time.monotonic() - clock)
            compare(status, found, data)
            refused[status] = refused.get(status, 0) + 1
            if status == "OK" and len(corpus) < 2000:
                corpus.append(data)
            tried += 1
    return Report(tried, refused.pop("OK", 0), refused, slowest)


def check(fed: Fed, data: bytes) -> str:
    """The decoder's status, after comparison with the Python reader."""
    status, found = fed.read(data)
    compare(status, found, data)
    return status


def compare(status: str, found: int, data: bytes) -> None:
    """Fail unless the Python reader says the same."""
    said, wanted = "", 0
    try:
        state = from_bytes(data, max_elements=ELEMENTS).state_dict()
        wanted = checksum({name: tensor.float().numpy() for name, tensor in state.items()})
    except CorruptArtifact as error:
        said = str(error)
    assert (status == "OK") == (not said), f"{status} here, but {said or 'content'} to Python: {data!r}"
    assert found == wanted, f"other content than Python's: {data!r}"


if __name__ == "__main__":
    print(fuzz(seed=random.randrange(1 << 32), seconds=float(sys.argv[1])))
