"""Pictures of a report for the documents, on a screen, a phone and paper; small enough to be kept.

python -m tests.screenshots runs/digits/report.html docs
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from tests.browser import Browser, browser

COLOURS = 128
OPEN = "const p = points.find(p => p.groupIndex === data.main && p.recipe === arguments[0]); if (p) open(p);"


def take(window: Browser, path: Path, *, whole: bool = False) -> None:
    """Write a PNG with few colours, which suffice for text and lines."""
    window.picture(path, whole=whole)
    with Image.open(path) as image:
        fewer = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    fewer.save(path, optimize=True)


def main() -> None:
    """Take all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="rows, output dense, 50 %", help="the point that is opened")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile), width=1280, height=1000) as window:
        window.open(given.report)
        window.run("document.querySelector('.sentences').open = false")
        take(window, given.folder / "report-desktop.png", whole=True)
        window.run(OPEN, given.recipe)
        window.run("find('detail').scrollTop = document.querySelector('.weights').offsetTop - 50")
        take(window, given.folder / "report-point.png")
        window.run("find('detail').close()")
        window.emulate(media="print")
        take(window, given.folder / "report-print.png", whole=True)
    with (
        tempfile.TemporaryDirectory() as profile,
        browser(Path(profile), width=390, height=844, phone=True) as window,
    ):
        window.open(given.report)
        window.run("document.querySelector('.sentences').open = false; find('group').scrollIntoView()")
        take(window, given.folder / "report-phone.png")


if __name__ == "__main__":
    main()
