"""How pictures of tuned models look: their colours, long names, and the file."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.textpath import TextPath

from ..data.geometry import area_resize
from ..data.record import Pixels

ACCENT, PALE, FAINT = "#2f6f9f", "#9aa5b1", "#d0d5da"
LONGEST = 900  # pixels of a picture's longest side
BESIDE = ("#c8561b", "#5a5fc0", "#4d8032", "#a83279", "#a3790a")


def wrapped(text: str, width: int) -> str:
    """Text in lines of so many characters, six at most: file names and classes are as long as their owner likes."""
    return fill(text, width, max_lines=6, placeholder=" …")


def fitted(text: str, inches: float, size: float) -> str:
    """Text of a font size in lines that are about so wide, however wide its letters are."""
    letters = TextPath((0, 0), text.replace("$", "S"), size).get_extents().width / 72
    return wrapped(text, max(8, int(inches / letters * len(text)))) if letters > inches else text


def save(figure: Figure, path: Path) -> None:
    """Write a PNG. No text is read as a formula: `$` is part of somebody's name."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def reduced(pixels: Pixels) -> Pixels:
    """Pixels (H, W, …) averaged over areas so that the longest side is at most `LONGEST`."""
    height, width = pixels.shape[:2]
    factor = max(1.0, max(height, width) / LONGEST)
    return area_resize(pixels, (max(1, round(height / factor)), max(1, round(width / factor))))
