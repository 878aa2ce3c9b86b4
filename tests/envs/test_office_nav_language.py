"""The parser, the tables and the draws of the floor plan's language; its grammar is in ``test_office_nav_parity``."""

import numpy as np
import pytest

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav import language


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
