"""What the README shows is executed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_python_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)


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
