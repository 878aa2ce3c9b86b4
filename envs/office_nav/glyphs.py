"""The bitmap font of the signs: ours, so that a sign has the same pixels everywhere and always.

(Pillow's default font, which the released code draws with, changed from a bitmap to anti-aliased outlines in 10.1.)
"""

from __future__ import annotations

import functools
from importlib import resources

import numpy as np

from fleetgym.core.errors import UserError

#: Pixels of a glyph; the last two of its rows hang below the line.
WIDTH, HEIGHT = 5, 9
#: Pixels from one glyph to the next, and from one line to the next.
ADVANCE, LINE = 6, 10


@functools.cache
def _glyphs() -> dict[str, np.ndarray]:
    text = resources.files("fleetgym.assets").joinpath("office_nav", "glyphs.txt").read_text(encoding="utf-8")
    glyphs = {}
    for block in text.split("\n= ")[1:]:
        name, *rows = block.strip().split("\n")
        bitmap = np.zeros((HEIGHT, WIDTH), bool)
        for y, row in enumerate(rows):
            bitmap[y] = [pixel == "#" for pixel in row]
        bitmap.flags.writeable = False
        glyphs[" " if name == "space" else name] = bitmap
    return glyphs


@functools.cache
def characters() -> str:
    """All characters that the font has: digits, lower-case letters and the space."""
    return "".join(_glyphs())


def glyph(character: str) -> np.ndarray:
    """The bitmap of a character, bool ``[9, 5]``, read-only; True is ink.

    Raises:
        UserError: The font has no such character.
    """
    if character not in _glyphs():
        raise UserError(f"character {character!r} is not in the signs' font, which has {characters()!r}")
    return _glyphs()[character]


def line_bitmap(text: str) -> np.ndarray:
    """One line of text, bool ``[9, 6 * len(text)]``; the last column is the space to the next glyph.

    Raises:
        UserError: The font lacks one of the characters.
    """
    bitmap = np.zeros((HEIGHT, ADVANCE * len(text)), bool)
    for place, character in enumerate(text):
        bitmap[:, place * ADVANCE : place * ADVANCE + WIDTH] = glyph(character)
    return bitmap
