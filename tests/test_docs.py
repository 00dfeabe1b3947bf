"""The pages of the documentation: code runs, tables are those of the measurements, and Sphinx has nothing to say."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest

import bitbook
from bitbook import plan
from bitbook.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if p.parent.name != "results" and "_build" not in p.parts)
NOT_RUN = r"(?:<!-- not run: [^\n]+ -->\n)?"
FENCE = re.compile(rf"^({NOT_RUN})```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SILENT = ("", "text", "toctree", "eval-rst", "bibtex")
"""Blocks that are no code: diagrams, what a file says, and directives of Sphinx."""
LONG = ("methods/budgets.md",)
"""Pages whose code takes many seconds; README.md runs the like in every test."""


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Mark, language and text of each block."""
    return [(mark, kind.strip("{}"), text) for mark, kind, text in FENCE.findall(page.read_text(encoding="utf-8"))]


def has_its_own_test(page: Path) -> bool:
    """Whether a test of its own names the page and reads its scripts and manifests."""
    name = f"docs/{page.relative_to(DOCS).as_posix()}"
    return any(name in test.read_text(encoding="utf-8") for test in (ROOT / "tests").rglob("test_*.py"))


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases() -> list[object]:
    found = [(page, page.relative_to(DOCS).as_posix()) for page in PAGES if blocks(page)]
    found = [(page, name) for page, name in found if not has_its_own_test(page)]
    return [pytest.param(page, id=name, marks=[pytest.mark.slow] if name in LONG else []) for page, name in found]


@pytest.mark.parametrize("page", cases())
def test_code_runs_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Python and commands of bitbook, all in one folder and one scope; what is not run says why."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = ModuleType("page")  # dataclasses and pickle look for their module
    monkeypatch.setitem(sys.modules, "page", module)
    with patch.dict(plan.KINDS):  # which a page may add to
        run(page, vars(module), capfd)


def run(page: Path, scope: dict[str, object], capfd: pytest.CaptureFixture[str]) -> None:
    for mark, kind, text in blocks(page):
        assert kind in ("python", "console", *SILENT), f"{page}: nobody runs {kind!r}"
        if mark:
            assert kind in ("python", "console"), f"{page}: only code is marked as not run"
        elif kind == "python":
            exec(compile(text, str(page), "exec"), scope)
        elif kind == "console":
            for command in re.findall(r"^\$ bitbook ([^#\n]*)", text, re.MULTILINE):
                assert main(shlex.split(command)) == 0, capfd.readouterr().err


def test_commands_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in [*PAGES, *ROOT.glob("*.md")]:
        for target in re.findall(r"(?:^\$ |`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert target in targets, f"{page}: there is no make {target}"


def test_tables_are_those_of_the_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    assert loaded(DOCS / "tables.py").main(["--check"]) == 0, capsys.readouterr().out


def test_picture_is_what_its_script_draws() -> None:
    script = loaded(DOCS / "picture.py")
    assert script.SVG.read_text(encoding="utf-8") == script.picture()


def test_every_public_name_is_documented_once() -> None:
    public = {name for name in vars(bitbook) if not name.startswith("_") and name[0].isalpha()}
    public -= {name for name in public if isinstance(getattr(bitbook, name), ModuleType)} | {"ledger"}
    text = "".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))
    found = re.findall(r"^\.\. auto(?:class|function|data):: bitbook\.(\w+)$", text, re.MULTILINE)
    assert len(found) == len(set(found)), "a name is documented twice"
    assert set(found) == public, f"docs/api lacks {public - set(found)}, and has {set(found) - public} too many"


@pytest.mark.timeout(900)  # seconds, but not on a machine with other work
def test_sphinx_has_no_warnings(tmp_path: Path) -> None:
    """In a process of its own, since Sphinx changes the interpreter that it runs in."""
    pytest.importorskip("sphinx", reason="Sphinx is not installed; pip install 'bitbook[docs]'")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-n", "-W", "--keep-going", "-q", DOCS, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "methods" / "uniform.html").exists()
