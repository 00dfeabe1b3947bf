"""The wheel holds everything, in an environment that has only it and, without copies, what it depends on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import json, sys
from pathlib import Path
import bitbook
from bitbook.study.report.page import SCRIPTS, read
assert Path(bitbook.__file__).is_relative_to(sys.prefix), bitbook.__file__
assert all(map(read, (*SCRIPTS, "page.html", "page.css")))
"""


def run(*command: str | Path, cwd: Path) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_a_wheel_in_a_clean_environment(tmp_path: Path) -> None:
    if find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed: pip install 'bitbook[dev]'")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("bitbook-*.whl")
    assert wheel.stat().st_size < 1_000_000
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (packages,) = environment.glob("lib/*/site-packages")
    # What bitbook depends on, from here; .pth files in that folder, such as that of the source tree, are not followed.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-c", USE, cwd=tmp_path)
    command = environment / "bin" / "bitbook"
    assert re.fullmatch(r"bitbook \d+\.\d+\.\d+\n", run(command, "--version", cwd=tmp_path))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert first is not None
    run(python, "-c", first[1], cwd=tmp_path)
    assert "Uniform(4)" in run(command, "inspect", "small.safetensors", cwd=tmp_path)
