"""The language of the floor plan: the grammar, its parser, and how likely each phrase is for each office.

The grammar is that of ``LocationDescription`` in the code released with Liu et al. 2023 (arXiv 2306.08400), with its
bounds set right. An office is named directly, by a corner, by a row at the edge or by column and row, or relative to
one of its (up to) eight neighbours::

    direct    = ("upper" | "lower") " " ("left" | "right") " corner"
              | ORDINAL " office in the " ("upper" | "lower") " row"
              | ORDINAL " office in the " ORDINAL " row"
    one step  = RELATION " the " direct
    two steps = RELATION " the office " RELATION " the " direct
    RELATION  = "left of" | "right of" | "above" | "below" | ("left of" | "right of") " and " ("above" | "below")

Cells are numbered ``row * columns + column``, row 0 at the top and column 0 at the left; ordinals count from "1st".

A draw takes an integer below ``UNIT`` and a cumulative table of integers, so that NumPy, numba and torch pick the same
phrase from the same random bits.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fleetgym.core.errors import UserError, unknown
from fleetgym.envs.office_nav.rng import UNIT

#: Columns of a building by its number of offices; all have three rows.
COLUMNS = {12: 4, 18: 6}
ROWS = 3
#: The part that no training phrase contains: its words are all seen, this pair of column and row is not.
HELD_OUT = "3rd office in the 2nd row"
#: The subsets of the grammar that ``phrase_table`` knows.
SPLITS = ("all", "train", "phrases")

# On a corner u < 0.3 names it so; on the upper and lower rows u < 0.6 names the row; else column and row are counted.
_CORNER = Fraction(3, 10)
_PERIMETER = Fraction(6, 10)


@dataclass(frozen=True)
class Corner:
    """Such as "upper left corner"."""

    vertical: str
    horizontal: str

    def __str__(self) -> str:
        return f"{self.vertical} {self.horizontal} corner"


@dataclass(frozen=True)
class Perimeter:
    """Such as "2nd office in the lower row"; ``column`` counts from 1."""

    column: int
    vertical: str

    def __str__(self) -> str:
        return f"{ordinal(self.column)} office in the {self.vertical} row"


@dataclass(frozen=True)
class Plain:
    """Such as "3rd office in the 2nd row"; ``column`` and ``row`` count from 1."""

    column: int
    row: int

    def __str__(self) -> str:
        return f"{ordinal(self.column)} office in the {ordinal(self.row)} row"


@dataclass(frozen=True)
class Relative:
    """Such as "left of and above the 1st office in the 2nd row".

    Attributes:
        columns: Where the office lies seen from ``of``: -1 left of it, 1 right of it, 0 in its column.
        rows: -1 above it, 1 below it, 0 in its row.
        of: What is referred to; another ``Relative`` in a phrase of two steps.
    """

    columns: int
    rows: int
    of: Corner | Perimeter | Plain | Relative

    def __str__(self) -> str:
        sides = ({-1: "left of", 0: "", 1: "right of"}[self.columns], {-1: "above", 0: "", 1: "below"}[self.rows])
        link = " the office " if isinstance(self.of, Relative) else " the "
        return " and ".join(side for side in sides if side) + link + str(self.of)


Phrase = Corner | Perimeter | Plain | Relative


def ordinal(number: int) -> str:
    """The ordinal as it stands on the signs, such as ``"2nd"``."""
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number, 'th') }"


def _columns(offices: int) -> int:
    if isinstance(offices, bool) or offices not in COLUMNS:
        raise UserError(f"offices {offices!r}: a building has {' or '.join(map(str, COLUMNS))} offices")
    return COLUMNS[offices]


# -- Parser -----------------------------------------------------------------------------------------------------------

_ORDINAL = r"([1-9][0-9]*)(?:st|nd|rd|th)"
_DIRECT: tuple[tuple[re.Pattern[str], type], ...] = (
    (re.compile(r"(upper|lower) (left|right) corner"), Corner),
    (re.compile(_ORDINAL + r" office in the (upper|lower) row"), Perimeter),
    (re.compile(_ORDINAL + r" office in the " + _ORDINAL + r" row"), Plain),
)
_RELATION = re.compile(
    r"(?:(left|right) of(?: and (above|below))?|(above|below)) the (office (?=left|right|above|below))?"
)


def parse(phrase: str) -> Phrase:
    """The tree of a phrase: ``str(parse(phrase)) == phrase``. Any number of steps is understood.

    Raises:
        UserError: The phrase is not of the grammar; the message repeats it with what cannot be read.
    """
    relations = []
    if not isinstance(phrase, str):
        raise UserError(f"phrase {phrase!r} is not a string")
    rest = phrase
    while found := _RELATION.match(rest):
        across, diagonal, upright = found.group(1, 2, 3)
        relations.append(
            ({"left": -1, "right": 1, None: 0}[across], {"above": -1, "below": 1, None: 0}[diagonal or upright])
        )
        rest = rest[found.end() :]
        if not found.group(4):  # "the office" goes on with a relation, "the" ends with a direct description
            break
    tree: Phrase | None = None
    for pattern, kind in _DIRECT:
        if found := pattern.fullmatch(rest):
            tree = kind(*(int(part) if part.isdigit() else part for part in found.groups()))
    if tree is not None:
        for columns, rows in reversed(relations):
            tree = Relative(columns, rows, tree)
    if tree is None or str(tree) != phrase:  # the comparison finds "2st" and the like
        raise UserError(
            f"phrase {phrase!r} is not of the floor plan's grammar (from {rest!r} on); it reads like "
            f"'upper left corner', '{HELD_OUT}', 'right of and below the 1st office in the upper row'"
        )
    return tree


def resolve(phrase: str, offices: int = 12, *, released: bool = False) -> int:
    """The cell that a phrase names.

    Args:
        phrase: A phrase of the grammar, of any number of steps.
        offices: 12 or 18.
        released: Offices that are only referred to may lie outside the building, below it or right of it, as in the
            phrases of the released code.

    Returns:
        ``row * columns + column``.

    Raises:
        UserError: Not of the grammar, or it speaks of an office that the building does not have.
    """
    columns = _columns(offices)
    tree, steps = parse(phrase), []
    while isinstance(tree, Relative):
        steps.append((tree.columns, tree.rows))
        tree = tree.of
    if isinstance(tree, Plain):
        column, row = tree.column - 1, tree.row - 1
    else:
        row = 0 if tree.vertical == "upper" else ROWS - 1
        if isinstance(tree, Perimeter):
            column = tree.column - 1
        else:
            column = 0 if tree.horizontal == "left" else columns - 1
    places = [(column, row)]
    for across, down in reversed(steps):
        places.append((places[-1][0] + across, places[-1][1] + down))
    for place, (column, row) in enumerate(places):
        beyond = column >= columns or row >= ROWS
        if column < 0 or row < 0 or (beyond and not (released and place < len(places) - 1)):
            raise UserError(
                f"phrase {phrase!r}: there is no office in column {column + 1} of row {row + 1}; "
                f"a building of {offices} offices has {columns} columns and {ROWS} rows"
            )
    column, row = places[-1]
    return row * columns + column


# -- Grammar ----------------------------------------------------------------------------------------------------------


def _direct(column: int, row: int, last_column: int, last_row: int) -> Iterator[tuple[Phrase, Fraction]]:
    """The direct descriptions of a place with their probabilities."""
    edge = row in (0, last_row)
    corner = edge and column in (0, last_column)
    vertical = "upper" if row == 0 else "lower"
    if corner:
        yield Corner(vertical, "left" if column == 0 else "right"), _CORNER
    if edge:
        yield Perimeter(column + 1, vertical), _PERIMETER - corner * _CORNER
    yield Plain(column + 1, row + 1), 1 - edge * _PERIMETER


def _steps(column: int, row: int, last_column: int, last_row: int, steps: int) -> Iterator[tuple[Phrase, Fraction]]:
    """The descriptions of a place in that many steps with their probabilities."""
    if steps == 0:
        yield from _direct(column, row, last_column, last_row)
        return
    offsets = [(across, down) for across in (-1, 0, 1) for down in (-1, 0, 1) if across or down]
    inside = [
        (across, down)
        for across, down in offsets
        if 0 <= column + across <= last_column and 0 <= row + down <= last_row
    ]
    for across, down in inside:
        for tree, probability in _steps(column + across, row + down, last_column, last_row, steps - 1):
            yield Relative(-across, -down, tree), probability / len(inside)


@functools.cache
def _grammar(offices: int, steps: int, released: bool = False) -> tuple[tuple[tuple[str, Fraction], ...], ...]:
    """For every cell its phrases of exactly that many steps and their probabilities."""
    columns = _columns(offices)
    last_column, last_row = columns - 1, ROWS - 1
    if released:
        # The released code takes the last column from the offices' y and the last row from their x, both in tiles of
        # the grid: 5 and 11. It so speaks of a 5th office and of a 4th row, and never of a lower row.
        last_column, last_row = 5, 11
    return tuple(
        tuple((str(tree), p) for tree, p in _steps(cell % columns, cell // columns, last_column, last_row, steps))
        for cell in range(offices)
    )


def direct_phrases(cell: int, offices: int = 12) -> tuple[str, ...]:
    """The direct phrases for a cell: by corner and by edge row where it has one, then by column and row."""
    return tuple(phrase for phrase, _ in _grammar(offices, 0)[cell])


@functools.cache
def phrases(offices: int = 12, steps: int = 1) -> frozenset[str]:
    """The phrases of the grammar.

    Args:
        offices: 12 or 18.
        steps: 0: the direct ones (24; 34 with 18 offices). 1: those and the relative ones, which is what signs say
            (126; 192). 2: those of two steps, which no sign says (574 with 12 offices).

    Raises:
        UserError: Another number of offices or steps.
    """
    _columns(offices)
    if steps not in (0, 1, 2):
        raise UserError(f"steps {steps!r}: the grammar has phrases of 0, 1 or 2 steps")
    wanted = (0, 1) if steps == 1 else (steps,)
    return frozenset(phrase for step in wanted for cell in _grammar(offices, step) for phrase, _ in cell)


# -- Tables -----------------------------------------------------------------------------------------------------------


def probabilities(cell: int, offices: int = 12, split: str = "all") -> dict[str, Fraction]:
    """How likely each phrase is on the sign when ``cell`` is the goal, exactly.

    Half of the signs are direct and half relative. In the splits the phrases that must not occur are left out within
    each half; a half of which nothing is left gives its share to the other. (The released code shows the held-out
    phrase in that case.)

    Args:
        cell: The goal.
        offices: 12 or 18.
        split: ``"all"``; ``"train"``: without the held-out phrases; ``"phrases"``: only those. In the last, only the
            goals of ``goals(offices, "phrases")`` have any: the others get an empty dict.

    Raises:
        UserError: Unknown split, impossible cell or number of offices.
    """
    _columns(offices)
    if split not in SPLITS:
        raise unknown("phrase split", split, SPLITS)
    if not 0 <= cell < offices:
        raise UserError(f"cell {cell!r}: a building of {offices} offices has the cells 0 to {offices - 1}")
    halves = []
    for steps in (0, 1):
        kept = {
            phrase: p
            for phrase, p in _grammar(offices, steps)[cell]
            if split == "all" or (HELD_OUT in phrase) == (split == "phrases")
        }
        if kept:
            halves.append({phrase: p / sum(kept.values()) for phrase, p in kept.items()})
    return {phrase: p / len(halves) for half in halves for phrase, p in half.items()}


def goals(offices: int = 12, split: str = "all") -> tuple[int, ...]:
    """The cells for which a split has phrases: a building may be used in a split only if its goal is one of these.

    All cells, except that ``"phrases"`` has only the held-out cell and its eight neighbours.
    """
    return tuple(cell for cell in range(offices) if probabilities(cell, offices, split))


def held_out_phrases(offices: int = 12) -> frozenset[str]:
    """The phrases of training's grammar that contain ``HELD_OUT``: one direct, eight relative."""
    return frozenset(phrase for phrase in phrases(offices) if HELD_OUT in phrase)


@functools.cache
def phrase_table(offices: int = 12, split: str = "all") -> tuple[tuple[str, ...], np.ndarray]:
    """All phrases and, for every goal, the cumulative distribution over them.

    The phrases and so their numbers are the same in all splits. ``draw(cumulative, cell, bits)`` draws.

    Args:
        offices: 12 or 18.
        split: See ``probabilities``. A goal without phrases has a row of zeros.

    Returns:
        The phrases (direct ones first, by cell), and int64 ``[offices, phrases]`` in units of 2^-24, read-only.

    Raises:
        UserError: Unknown split or number of offices.
    """
    return _table(offices, tuple(probabilities(cell, offices, split) for cell in range(offices)), False)


@functools.cache
def released_phrase_table() -> tuple[tuple[str, ...], np.ndarray]:
    """``phrase_table`` as the released code has it, for 12 offices: 106 phrases, with its bounds and its leak.

    Its last column is 5 and its last row 11, so that signs speak of a "5th office" and a "4th row" and never of the
    lower row or a right corner. It rejects held-out phrases a hundred times and then shows the last one all the same,
    so that half of the signs for the held-out office say the held-out phrase.
    """
    rows = []
    for cell in range(12):
        row: dict[str, Fraction] = {}
        for steps in (0, 1):
            drawn = dict(_grammar(12, steps, True)[cell])
            # A hundred rejections in a row are as good as never, unless there is nothing else to draw.
            kept = {phrase: p for phrase, p in drawn.items() if HELD_OUT not in phrase} or drawn
            row |= {phrase: p / sum(kept.values()) / 2 for phrase, p in kept.items()}
        rows.append(row)
    return _table(12, tuple(rows), True)


def _table(offices: int, rows: tuple[dict[str, Fraction], ...], released: bool) -> tuple[tuple[str, ...], np.ndarray]:
    listed = [phrase for steps in (0, 1) for cell in _grammar(offices, steps, released) for phrase, _ in cell]
    if released:  # only what its signs show: held-out relative phrases never come through
        listed = [phrase for phrase in listed if any(phrase in row for row in rows)]
    strings = tuple(dict.fromkeys(listed))
    cumulative = np.zeros((offices, len(strings)), np.int64)
    for cell, row in enumerate(rows):
        total = Fraction(0)
        for number, phrase in enumerate(strings):
            total += row.get(phrase, 0)
            cumulative[cell, number] = int(total * UNIT + Fraction(1, 2))
    cumulative.flags.writeable = False
    return strings, cumulative


def draw(cumulative: np.ndarray, cell: int, bits: int) -> int:
    """The number of the phrase that 24 random bits pick for a goal: the first whose cumulative value exceeds them.

    Args:
        cumulative: Of ``phrase_table`` or ``released_phrase_table``.
        cell: The goal; it must be one of ``goals`` of the split.
        bits: An integer in ``[0, UNIT)``.
    """
    return int(np.searchsorted(cumulative[cell], bits, side="right"))
