"""The picture of docs/start/concepts.md: `python docs/picture.py` writes docs/start/concepts.svg."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

SVG = Path(__file__).parent / "start" / "concepts.svg"
WIDTH, HEIGHT, BOX = 900, 372, 40
BLUE, ORANGE, GREEN, INK = "#0072b2", "#d55e00", "#009e73", "#333333"  # Okabe & Ito's, told apart by all eyes


def box(x: int, y: int, width: int, text: str, colour: str = INK) -> str:
    """A rounded box with its left upper corner at (x, y)."""
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{BOX}" rx="6" fill="white" stroke="{colour}"/>'
    return shape + label(x + width // 2, y + 25, text, colour, size=15)


def label(x: int, y: int, text: str, colour: str = INK, size: int = 13, anchor: str = "middle") -> str:
    """Text around x."""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def arrow(points: str, colour: str, dashed: bool = False) -> str:
    """A line through points, with a head at its end."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6" marker-end="url(#head)"{dash}/>'
    )


def picture() -> str:
    """Three rows: a file is written, read, and trained for."""
    parts = [
        '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 10 5 0 10z" fill="context-stroke"/></marker>',
        label(16, 30, "compress", BLUE, 15, "start"),
        box(16, 44, 90, "w", BLUE), box(220, 44, 130, "side tensors", BLUE), box(460, 44, 90, "codes", BLUE),
        box(670, 44, 214, "file + ledger"),
        arrow("106,64 218,64", BLUE), label(162, 57, "fit"),
        arrow("350,64 458,64", BLUE), label(404, 57, "encode"),
        arrow("550,64 668,64", BLUE), label(609, 57, "coder → bytes"),
        arrow("320,84 320,106 250,106 250,86", BLUE),
        label(285, 122, "each stored through a Quantizer of its own"),
        label(16, 166, "load", ORANGE, 15, "start"),
        arrow("777,84 777,178", ORANGE), label(786, 136, "decode bytes", anchor="start"),
        box(670, 180, 214, "Quantized: codes + side", ORANGE),
        arrow("670,200 352,200", ORANGE), label(511, 193, "decode"),
        box(16, 180, 334, "weight of a plain model, float32", ORANGE),
        label(16, 276, "train", GREEN, 15, "start"),
        box(16, 290, 110, "latent w", GREEN), box(220, 290, 130, "FakeQuantize", GREEN),
        box(460, 290, 130, "layer.weight", GREEN), box(770, 290, 114, "loss", GREEN),
        arrow("126,310 218,310", GREEN),
        arrow("350,310 458,310", GREEN), label(404, 303, "ŵ, bit for bit"),
        arrow("590,310 768,310", GREEN), label(679, 303, "forward"),
        arrow("827,330 827,354 71,354 71,332", GREEN, dashed=True), label(449, 349, "gradient, straight through"),
        arrow("285,290 285,250 777,250 777,222", GREEN), label(531, 243, "freeze"),
    ]  # fmt: skip
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    SVG.write_text(picture(), encoding="utf-8")
