"""Trial functions for test_run.py, in a module of their own that workers import quickly."""

import os
import signal
import sys
import time
from pathlib import Path


def square(cell):
    """Cells: x, and optionally `seconds` to sleep and a `log` file that gets a line per execution."""
    time.sleep(cell.get("seconds", 0.01))
    if "log" in cell:
        with open(cell["log"], "a") as file:
            file.write(f"{cell['x']}\n")
    return {"x": cell["x"], "square": cell["x"] ** 2, "objectives": [cell["x"] + 1, cell["x"] % 7]}


def deadly_once(cell):
    """Like `square`, but the first worker that runs a cell with a `marker` file dies of it."""
    marker = Path(cell["marker"]) if "marker" in cell else None
    if marker is not None and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(cell)


def deadly(cell):
    if cell["x"] == 3:
        print("these are my last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return square(cell)


def faulty(cell):
    if cell["x"] == 3:
        raise ValueError("three is too much")
    if cell["x"] == 4:
        sys.exit(5)
    if cell["x"] == 5:
        return {"objectives": [1, float("nan")]}
    return square(cell)


def environment(cell):
    return {"threads": os.environ["OMP_NUM_THREADS"]}


not_a_function = 3
