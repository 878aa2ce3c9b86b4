"""The census, the round trip from cell to phrase to cell, and the probabilities of the floor plan's grammar."""

import collections
import random

import numpy as np
import pytest

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav import language


def ordinal(number):
    return ("1st", "2nd", "3rd")[number - 1] if number < 4 else f"{number}th"


def spoken(generator, column, row, last_column, last_row, steps):
    """A direct sampler, written from the description of the released grammar and from nothing of ours."""
    if steps == 0:
        u = generator.random()
        edge_row, edge_column = row in (0, last_row), column in (0, last_column)
        upper = "upper" if row == 0 else "lower"
        if edge_row and edge_column and u < 0.3:
            return f"{upper} {'left' if column == 0 else 'right'} corner"
        if edge_row and u < 0.6:
            return f"{ordinal(column + 1)} office in the {upper} row"
        return f"{ordinal(column + 1)} office in the {ordinal(row + 1)} row"
    x, y = generator.choice(
        [
            (x, y)
            for x in range(column - 1, column + 2)
            for y in range(row - 1, row + 2)
            if (x, y) != (column, row) and 0 <= x <= last_column and 0 <= y <= last_row
        ]
    )
    sides = [side for side, holds in (("right of", x < column), ("left of", x > column)) if holds]
    sides += [side for side, holds in (("below", y < row), ("above", y > row)) if holds]
    link = "the office" if steps > 1 else "the"
    return f"{' and '.join(sides)} {link} {spoken(generator, x, y, last_column, last_row, steps - 1)}"


def total_variation(strings, cumulative, samples):
    counts = collections.Counter(samples)
    assert set(counts) <= set(strings)
    expected = np.diff(cumulative, prepend=0) / language.UNIT
    seen = np.array([counts[string] for string in strings]) / len(samples)
    return np.abs(expected - seen).sum() / 2


@pytest.mark.parametrize("offices, direct, relative, two", [(12, 24, 102, 574), (18, 34, 158, 938)])
def test_census(offices, direct, relative, two):
    assert len(language.phrases(offices, 0)) == direct
    assert len(language.phrases(offices)) == direct + relative
    assert len(language.phrases(offices, 2)) == two
    assert language.phrases(offices, 0) < language.phrases(offices)
    assert not language.phrases(offices) & language.phrases(offices, 2)


@pytest.mark.parametrize("offices", [12, 18])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_no_phrase_is_ambiguous_and_the_parser_finds_its_cell(offices, steps):
    found = collections.defaultdict(set)
    for cell in range(offices):
        for phrase, probability in language._grammar(offices, steps)[cell]:
            assert probability > 0
            found[phrase].add(cell)
    assert all(len(cells) == 1 for cells in found.values())
    for phrase, (cell,) in found.items():
        assert str(language.parse(phrase)) == phrase
        assert language.resolve(phrase, offices) == cell
    assert set(found) <= language.phrases(offices, steps)
    if steps != 1:
        assert set(found) == language.phrases(offices, steps)


def test_phrases_of_the_paper():
    cells = {
        "upper left corner": 0,
        "lower right corner": 11,
        "4th office in the upper row": 3,
        "2nd office in the 3rd row": 9,
        "3rd office in the 2nd row": 6,
        "above the 2nd office in the 2nd row": 1,
        "right of and below the upper left corner": 5,
        "left of the 3rd office in the lower row": 9,
        "above the office right of and below the upper left corner": 1,
        "left of the office above the office below the upper right corner": 2,
    }
    for phrase, cell in cells.items():
        assert language.resolve(phrase) == cell
    assert language.resolve("lower right corner", 18) == 17
    assert language.parse("left of and above the lower right corner") == language.Relative(
        -1, -1, language.Corner("lower", "right")
    )


@pytest.mark.parametrize(
    "phrase",
    [
        "",
        "upper corner",
        "upper left corner ",
        "Upper left corner",
        "2st office in the upper row",
        "0th office in the upper row",
        "above of the upper left corner",
        "above and left of the lower right corner",
        "above the office upper left corner",
        "above the office",
        "above the ",
        "3rd office in the 2nd row\n",
        "left of and right of the upper left corner",
        7,
        None,
    ],
)
def test_what_is_not_of_the_grammar_is_refused(phrase):
    with pytest.raises(UserError) as caught:
        language.resolve(phrase)
    assert repr(phrase) in str(caught.value)


@pytest.mark.parametrize(
    "phrase",
    [
        "5th office in the upper row",
        "1st office in the 4th row",
        "above the upper left corner",
        "right of the upper right corner",
        "above the 1st office in the 4th row",
        "below the office above the upper left corner",
    ],
)
def test_offices_that_the_building_lacks_are_refused(phrase):
    with pytest.raises(UserError, match="4 columns and 3 rows"):
        language.resolve(phrase)


def test_other_bad_input():
    for call in (
        lambda: language.phrases(13),
        lambda: language.phrases(12, 3),
        lambda: language.resolve("upper left corner", 4),
        lambda: language.phrase_table(True),
        lambda: language.probabilities(12),
        lambda: language.probabilities(-1),
    ):
        with pytest.raises(UserError):
            call()
    with pytest.raises(UserError, match="'train'"):
        language.phrase_table(12, "trian")


@pytest.mark.parametrize("offices", [12, 18])
@pytest.mark.parametrize("split", language.SPLITS)
def test_tables_are_distributions_over_the_cells_own_phrases(offices, split):
    strings, cumulative = language.phrase_table(offices, split)
    assert cumulative.dtype == np.int64 and cumulative.shape == (offices, len(strings))
    assert set(strings) == language.phrases(offices) and len(set(strings)) == len(strings)
    assert strings == language.phrase_table(offices)[0]
    mass = np.diff(cumulative, axis=1, prepend=0)
    assert (mass >= 0).all()
    own = np.array([language.resolve(string, offices) for string in strings])
    cells, numbers = np.nonzero(mass)
    assert (own[numbers] == cells).all()
    has = np.isin(np.arange(offices), language.goals(offices, split))
    assert (cumulative[:, -1] == has * language.UNIT).all()
    held_out = np.array([language.HELD_OUT in string for string in strings])
    if split == "train":
        assert not mass[:, held_out].any() and mass[:, ~held_out].any(axis=0).all()
    elif split == "phrases":
        assert mass[:, held_out].any(axis=0).all() and not mass[:, ~held_out].any()
    else:
        assert mass.any(axis=0).all()


def test_tables_match_a_sampler_written_from_the_description():
    generator = random.Random(0)
    strings, cumulative = language.phrase_table(12)
    for cell in range(12):
        samples = [spoken(generator, cell % 4, cell // 4, 3, 2, generator.randrange(2)) for _ in range(8000)]
        assert total_variation(strings, cumulative[cell], samples) < 0.03
    strings, cumulative = language.phrase_table(18)
    for cell in (0, 4, 6, 8, 17):
        samples = [spoken(generator, cell % 6, cell // 6, 5, 2, generator.randrange(2)) for _ in range(8000)]
        assert total_variation(strings, cumulative[cell], samples) < 0.03


def test_training_never_shows_the_held_out_phrase_and_differs_in_nothing_else():
    generator = random.Random(1)
    strings, cumulative = language.phrase_table(12, "train")
    for cell in range(12):
        samples = []
        while len(samples) < 6000:
            steps = generator.randrange(2)
            for _ in range(50):
                phrase = spoken(generator, cell % 4, cell // 4, 3, 2, steps)
                if language.HELD_OUT not in phrase:
                    break
            else:
                phrase = spoken(generator, cell % 4, cell // 4, 3, 2, 1)  # no leak: a relative one instead
            samples.append(phrase)
        assert total_variation(strings, cumulative[cell], samples) < 0.03
    assert language.resolve(language.HELD_OUT) == 6
    assert not set(language.probabilities(6, 12, "train")) & language.phrases(12, 0)


@pytest.mark.parametrize("offices", [12, 18])
def test_nine_phrases_are_held_out(offices):
    held_out = language.held_out_phrases(offices)
    assert len(held_out) == 9 and language.HELD_OUT in held_out
    own = language.resolve(language.HELD_OUT, offices)
    columns = language.COLUMNS[offices]
    around = [own + columns * row + column for row in (-1, 0, 1) for column in (-1, 0, 1)]
    assert language.goals(offices, "phrases") == tuple(sorted(around))
    assert sorted(language.resolve(phrase, offices) for phrase in held_out) == sorted(around)
    # All of its words are seen in training.
    words = {word for phrase in language.phrases(offices) - held_out for word in phrase.split()}
    assert {word for phrase in held_out for word in phrase.split()} <= words


def test_released_table_has_the_bounds_and_the_leak():
    strings, cumulative = language.released_phrase_table()
    direct = [string for string in strings if " the " not in string or string[0].isdigit()]
    assert (len(direct), len(strings) - len(direct)) == (17, 89)
    text = " | ".join(strings)
    assert len({word for string in strings for word in string.split()}) == 17
    assert "4th row" in text and "5th office" in text
    assert "lower" not in text and "right corner" not in text
    mass = np.diff(cumulative, axis=1, prepend=0)
    leak = strings.index(language.HELD_OUT)
    assert mass[6, leak] == language.UNIT // 2
    assert sum(language.HELD_OUT in string for string in strings) == 1
    cells, numbers = np.nonzero(mass)
    for cell, number in zip(cells, numbers, strict=True):
        assert language.resolve(strings[number], released=True) == cell
    generator = random.Random(2)
    for cell in range(12):
        samples = []
        for _ in range(6000):
            steps = generator.randrange(2)
            for _ in range(100):
                phrase = spoken(generator, cell % 4, cell // 4, 5, 11, steps)
                if language.HELD_OUT not in phrase:
                    break
            samples.append(phrase)
        assert total_variation(strings, cumulative[cell], samples) < 0.03


def test_draw_takes_every_phrase_at_its_bounds_and_none_without_mass():
    for strings, cumulative in (language.phrase_table(12, "train"), language.released_phrase_table()):
        mass = np.diff(cumulative, axis=1, prepend=0)
        for cell in range(12):
            for number in np.flatnonzero(mass[cell]):
                assert language.draw(cumulative, cell, cumulative[cell, number] - 1) == number
                assert language.draw(cumulative, cell, cumulative[cell, number] - mass[cell, number]) == number
            last = language.draw(cumulative, cell, language.UNIT - 1)
            assert language.resolve(strings[last], released=True) == cell


def test_longest_phrase_has_fifty_characters():
    assert max(map(len, language.phrases(12))) == max(map(len, language.phrases(18))) == 50
