"""What a terminal shows while a command works: a bar with a rate, once it has worked for two seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer

SHOWN_AFTER = 2.0
"""Seconds: what is done before needs no bar."""

Update = Callable[[str, float, float | None], None]
"""Called with what is being done, how much of it is done, and of how much, where that is known."""


@contextmanager
def progress(unit: str, *, shown: bool = True) -> Iterator[Update]:
    """Give a function that moves a bar on standard error, where that is a terminal; elsewhere it does nothing.

    unit: what is counted, such as "examples"; "bytes" are shown as kB, MB and so on. What is printed meanwhile stands
    above the bar. A call with another text starts a new count.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Left
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(rate_text(task.completed, task.total, task.speed, unit))

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), Rate(), TimeElapsedColumn(), Left())
    # Both streams on one terminal would draw over each other; a pipe gets what is printed as it is.
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stdout.isatty(),
    )
    task = bar.add_task("working", total=None)
    now = "working"

    def update(what: str, done: float, total: float | None) -> None:
        nonlocal now
        if what != now:
            bar.reset(task, description=what, total=total)
            now = what
        bar.update(task, completed=done, total=total)

    timer = Timer(SHOWN_AFTER, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield update
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def rate_text(done: float, total: float | None, speed: float | None, unit: str) -> str:
    """How much is done and how fast: "1,200/60,000 examples, 340 examples/s", or "3/40 epochs, 12 s per epoch"."""
    if not done and total is None:
        return ""
    one = unit.removesuffix("s")
    amount = _bytes if unit == "bytes" else lambda n: f"{n:,.0f}"
    counted = amount(done) + ("" if total is None else f"/{amount(total)}") + ("" if unit == "bytes" else f" {unit}")
    if not speed:
        return counted
    if unit == "bytes":
        return f"{counted}, {_bytes(speed)}/s"
    pace = f"{speed:,.3g} {unit}/s" if speed < 1000 else f"{speed:,.0f} {unit}/s"
    return f"{counted}, {pace if speed >= 1 else f'{1 / speed:.3g} s per {one}'}"


def _bytes(number: float) -> str:
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:.0f} B"


@contextmanager
def interruptible(how_to_go_on: str) -> Iterator[None]:
    """Say on Ctrl-C what is kept and how to go on; the command then ends as interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{how_to_go_on}", file=sys.stderr)
        raise
