"""Environments of the peers' own in `.bench/`, which share the torch of the running interpreter."""

from __future__ import annotations

import fcntl
import os
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".bench"


def environment(name: str, requirements: Sequence[str], folder: Path = ENVIRONMENTS) -> Path | str:
    """The interpreter of the environment `name`, made where it lacks the requirements; or why there is none.

    The folder of the running torch is named in a .pth file, and pip must keep that torch: another one would be a
    download of gigabytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:  # networks may run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _made(folder / name, requirements)


def _made(home: Path, requirements: Sequence[str]) -> Path | str:
    python, done = home / "bin" / "python", home / "installed"
    wanted = " ".join([*requirements, f"torch=={torch.__version__}"])
    if done.exists() and done.read_text() == wanted:
        return python
    print(f"installing {' '.join(requirements)} for {home.name}", flush=True)
    try:
        venv.create(home, with_pip=True, clear=True)
    except (subprocess.CalledProcessError, OSError) as error:
        return f"no environment: {shown(str(error))}"
    packages = next(home.glob("lib/python*/site-packages"))
    (packages / "reused-torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    constraints = home / "constraints.txt"
    constraints.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints, *requirements]
    result = subprocess.run(pip, capture_output=True, text=True, env=own_variables())
    if result.returncode:
        return f"it does not install: {last_line(result.stderr) or 'pip failed'}"
    done.write_text(wanted)
    return python


def own_variables() -> dict[str, str]:
    """Variables of the environment without our PYTHONPATH, which would bring our packages into a peer's; one thread."""
    return {name: v for name, v in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return shown(lines[-1]) if lines else ""


def shown(text: str) -> str:
    """An error as a document can have it: no folder of this machine, one line."""
    return " ".join(text.replace(str(ROOT), ".").split())[:200]
