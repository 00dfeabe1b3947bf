"""What the README shows is executed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bitbook.cli import main

README = Path(__file__).parents[1] / "README.md"


def test_examples_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|console)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert [kind for kind, _ in blocks].count("python") >= 2
    scope: dict[str, object] = {}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, str(README), "exec"), scope)
            continue
        for command in re.findall(r"^\$ bitbook (.*)$", block, re.MULTILINE):
            if not command.startswith("study"):  # `make study` is tried as a whole
                assert main(shlex.split(command)) == 0, capfd.readouterr().err


def test_recipes_in_the_table_are_recipes() -> None:
    from bitbook.plan import parse_recipe

    table = README.read_text(encoding="utf-8").split("| method | recipe |")[1].split("\n\n")[0]
    recipes = re.findall(r"`([A-Z][a-z]+\(.*?\))`(?= |$)", table, re.MULTILINE)
    assert len(recipes) >= 10
    for text in recipes:
        parse_recipe(text)


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target
