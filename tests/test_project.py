"""What a repository says about itself: the Japanese README, the notebook, the citation."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import bitbook

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "from_notebook_to_bitbook.py"
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def recipes(text: str) -> list[str]:
    """Those of the table, row by row."""
    return re.findall(r"^\| .+? \| (`[^`]+`(?: · `[^`]+`)*) \|$", text, re.MULTILINE)


def test_japanese_readme_has_the_blocks_and_recipes_of_the_english_one() -> None:
    english, japanese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ja.md"))
    assert FENCE.findall(japanese) == FENCE.findall(english)  # which tests/test_readme.py runs
    assert recipes(japanese) == recipes(english)
    sections = [len(re.findall("^## ", text, re.MULTILINE)) for text in (english, japanese)]
    assert sections[0] == sections[1]


@pytest.mark.parametrize("name", ["README.ja.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_linked_files_exist(name: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_files_that_are_named_exist() -> None:
    """Paths in backticks, as SECURITY.md and CONTRIBUTING.md name them."""
    for name in ("CONTRIBUTING.md", "SECURITY.md"):
        for path in re.findall(r"`([\w/*.]+\.(?:py|md|txt))`", (ROOT / name).read_text(encoding="utf-8")):
            places = [*ROOT.glob(path), *(ROOT / "src" / "bitbook").glob(path)]
            assert places, f"{name} names {path}, which is not there"


def test_security_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "SECURITY.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, "SECURITY.md", "exec"), {})


def test_citation_is_true() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; pip install 'bitbook[docs]'")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited.keys() >= {"cff-version", "message", "title", "authors"}  # what the format asks for
    assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software")
    assert str(cited["version"]) == project["version"] == bitbook.__version__
    assert cited["license"] == project["license"]
    assert [author["name"] for author in cited["authors"]] == [author["name"] for author in project["authors"]]
    assert cited["title"].startswith(project["name"])


# -- the notebook ------------------------------------------------------------------------------
def test_notebook_is_its_script() -> None:
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed; pip install 'bitbook[docs]'")
    script = jupytext.read(NOTEBOOK)
    notebook = jupytext.read(NOTEBOOK.with_suffix(".ipynb"))
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in script.cells]
    assert not any(cell.get("outputs") for cell in notebook.cells)  # a result that nobody computed again


@pytest.mark.timeout(900)  # a quarter of a minute, but not on a machine with other work
@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_script_runs(seeds: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With one seed for its study, and as it is."""
    monkeypatch.delenv("BITBOOK_STARTS", raising=False)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert text.count("SEEDS = 3\n") == 1
    exec(compile(text.replace("SEEDS = 3\n", f"SEEDS = {seeds}\n"), str(NOTEBOOK), "exec"), {"__name__": "notebook"})
    said = capsys.readouterr().out
    assert said.count("  - ") == 6  # answers
    monkeypatch.delenv("BITBOOK_STARTS")


def test_every_old_helper_has_its_replacement() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    for helper in ("train", "compute_accuracy", "replace_linear_with_quantizedlinear", "replace_linear_with_vqlinear",
                   "replace_linear_with_vsqlinear", "compute_model_size"):  # fmt: skip
        assert f"\ndef {helper}(" in text
        assert re.search(rf"^# \| `{helper}` \| `", text, re.MULTILINE), helper
