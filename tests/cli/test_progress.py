from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bitbook.cli.progress import progress, rate_text

WORK = """
import time
from bitbook.cli import progress as module
with module.progress("tensors") as update:
    update("quick", 1, 2)
module.SHOWN_AFTER = 0.2
with module.progress("examples") as update:
    for done in range(30):
        update("evaluating", done, 40)
        if done == 20:
            print("a line of its own", flush=True)
        time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((0, None, None, "rows"), ""),
        ((3, None, None, "rows"), "3 rows"),
        ((1200, 60_000, 340.2, "examples"), "1,200/60,000 examples, 340 examples/s"),
        ((9, 10, 12345.6, "examples"), "9/10 examples, 12,346 examples/s"),
        ((3, 40, 1 / 12, "epochs"), "3/40 epochs, 12 s per epoch"),
        ((2_500_000, 1e9, 1.5e6, "bytes"), "2.5 MB/1 GB, 1.5 MB/s"),
        ((0, 1e9, None, "bytes"), "0 B/1 GB"),
    ],
)
def test_rates_in_words(given: tuple[float, float | None, float | None, str], said: str) -> None:
    assert rate_text(*given) == said


def on_a_terminal(code: str) -> str:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the terminal is closed when its last process ends
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert process.wait() == 0, seen
    return seen.decode()


def test_a_bar_with_a_rate_once_it_takes_long() -> None:
    seen = on_a_terminal(WORK)
    assert "evaluating" in seen and "/40 examples, " in seen and "examples/s" in seen
    assert "quick" not in seen and seen.count("a line of its own") == 1


def test_no_bar_in_a_pipe(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitbook.cli.progress.SHOWN_AFTER", 0.0)
    with progress("examples") as update:
        update("evaluating", 3, 4)
    assert capfd.readouterr() == ("", "")
