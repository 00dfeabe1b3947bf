"""Sphinx: `make docs` builds these pages, with warnings as errors."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pygments.lexers import BashLexer

from bitbook import __version__

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

project, author, version = "bitbook", "The bitbook authors", __version__
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
suppress_warnings = [
    "myst.header",  # a results page may go from its title to a third level
    "misc.highlighting_failure",  # examples leave things out with …, which is no C
]

html_theme = "pydata_sphinx_theme"
html_theme_options = {"navigation_with_keys": False, "show_toc_level": 2, "show_prev_next": False}
html_title = "bitbook"
html_show_sourcelink = False
html_show_copyright = False

default_role = "code"  # docstrings write `code` as Markdown does
autodoc_typehints = "none"  # shapes are strings, which would be taken for names of classes
autodoc_member_order = "bysource"
autoclass_content = "class"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(collections|torch)\..*")]  # pages of others, which a build does not ask for

# --- pages that stand elsewhere

MIRROR = re.compile(r"\A---\nmirror: (\S+)\n---\n")
LINK = re.compile(r"\[([^\[\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def mirrored() -> dict[Path, Path]:
    """File elsewhere in the repository → the page that shows it, or stands for it."""
    found = {ROOT / "README.md": DOCS / "index.md"}
    for page in DOCS.rglob("*.md"):
        if head := MIRROR.match(page.read_text(encoding="utf-8")):
            found[(page.parent / head[1]).resolve()] = page
    return found


def place(app: Any, docname: str, source: list[str]) -> None:
    """Take a page's text from the file that it mirrors, and let links to such files lead to their pages."""
    page, mirrors = DOCS / f"{docname}.md", mirrored()
    origin = next((file for file, shown in mirrors.items() if shown == page != DOCS / "index.md"), page)
    if origin != page:
        source[0] = as_markdown(origin) if origin.suffix == ".py" else origin.read_text(encoding="utf-8")

    def link(found: re.Match[str]) -> str:
        target = (origin.parent / found[2]).resolve()
        if not target.exists():
            # Results are written by commands that may not have been run here; everything else Sphinx reports.
            return found[1] if target.parent == DOCS / "results" else found[0]
        return f"[{found[1]}]({os.path.relpath(mirrors.get(target, target), page.parent)}{found[3] or ''})"

    source[0] = LINK.sub(link, source[0])


def as_markdown(script: Path) -> str:
    """A notebook that is kept as a script, as a page."""
    import jupytext

    cells = jupytext.reads(script.read_text(encoding="utf-8"), "py:percent").cells
    return "\n\n".join(c.source if c.cell_type == "markdown" else f"```python\n{c.source}\n```" for c in cells)


# --- docstrings, which are text for readers of the code and not reStructuredText


def plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape what reStructuredText would take for markup outside of `code`; diagrams become literal blocks."""
    text = "\n".join(lines)
    parts = re.split(r"(`[^`]+`)", text)
    parts[::2] = [re.sub(r"([|*]|(?<=\w)_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def setup(app: Any) -> None:
    """Connect the above."""
    app.add_lexer("sbatch", BashLexer)
    app.connect("source-read", place)
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon
