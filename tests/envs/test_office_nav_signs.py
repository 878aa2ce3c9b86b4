"""The signs' pixels: text from our own glyphs, floor plans from which every office's colour can be read."""

import hashlib
import itertools

import numpy as np
import pytest

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav import glyphs, language, signs
from fleetgym.envs.office_nav.layout import LAYOUTS

# Pixels are part of the environment: who changes one of these changes what trained agents see.
GOLDEN = {
    "text 12": "e41856a02073a326",
    "text 18": "31dc489fd18f382b",
    "text released": "f182479c428f4f0e",
    "pictures standard": "e93321862f67d453",
    "pictures tall": "331ca59ce5d1f294",
    "pictures tall_skinny": "ba7f8f9b7ae1fafc",
}


def digest(*arrays):
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def buildings(offices, count, seed):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield generator.permutation(np.concatenate([np.arange(6), generator.integers(6, size=offices - 6)]))


def test_golden_pixels():
    found = {
        "text 12": digest(signs.text_signs(language.phrase_table(12)[0])),
        "text 18": digest(signs.text_signs(language.phrase_table(18)[0])),
        "text released": digest(signs.text_signs(language.released_phrase_table()[0])),
    }
    for name in LAYOUTS:
        styles = signs.picture_styles(name)
        found[f"pictures {name}"] = digest(styles.base, styles.region, styles.palette, styles.shade)
    assert found == GOLDEN


# -- Text -------------------------------------------------------------------------------------------------------------


def test_font_has_all_that_the_grammar_says_and_no_two_glyphs_alike():
    said = {
        c for offices in (12, 18) for steps in (1, 2) for phrase in language.phrases(offices, steps) for c in phrase
    }
    said |= {c for phrase in language.released_phrase_table()[0] for c in phrase}
    assert said <= set(glyphs.characters())
    assert len({glyphs.glyph(c).tobytes() for c in glyphs.characters()}) == len(glyphs.characters()) == 37
    for one, other in itertools.combinations(glyphs.characters(), 2):
        assert (glyphs.glyph(one) != glyphs.glyph(other)).sum() >= 2
    assert not glyphs.glyph(" ").any()
    with pytest.raises(UserError, match="'É'"):
        glyphs.glyph("É")


def read(image):
    """The text of a sign, from its pixels."""
    known = {glyphs.glyph(c).tobytes(): c for c in glyphs.characters()}
    dark = (image == 0).all(axis=2)
    assert (dark | (image == 255).all(axis=2)).all()
    lines = []
    for top in range(2, signs.SIZE - glyphs.HEIGHT, glyphs.LINE):
        cells = [dark[top : top + glyphs.HEIGHT, 2 + 6 * k : 7 + 6 * k] for k in range(signs.COLUMNS)]
        lines.append("".join(known[np.ascontiguousarray(cell).tobytes()] for cell in cells).rstrip())
    return " ".join(line for line in lines if line)


def test_every_phrase_fits_and_can_be_read_back_from_the_pixels():
    for offices, steps in ((12, 1), (12, 2), (18, 1), (18, 2)):
        strings = sorted(language.phrases(offices, steps))
        images = signs.text_signs(strings)
        assert images.shape == (len(strings), 84, 84, 3) and images.dtype == np.uint8
        assert [read(image) for image in images] == strings
    assert max(len(signs.wrap(phrase)) for phrase in language.phrases(18)) == 4


def test_first_letters_lie_where_the_paper_has_them():
    image = signs.text_sign("upper left corner")
    rows, columns = np.nonzero((image == 0).all(axis=2))
    assert rows.min() >= 2 and columns.min() == 2
    assert signs.wrap("upper left corner") == ["upper left", "corner"]
    assert (image[12 : 12 + 9, 2:7] == 0).any() and not (image[22:] == 0).any()


def test_text_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="9 lines"):
        signs.text_sign("office in the " * 9)
    with pytest.raises(UserError, match="font"):
        signs.text_sign("Upper left corner")
    assert signs.text_signs([]).shape == (0, 84, 84, 3)


def test_texture_is_the_same_text_in_large():
    texture = signs.text_texture(["left of", "second", "room"], 96, 128, ink=(10, 20, 30), paper=(250, 240, 230))
    assert texture.shape == (96, 128, 3) and texture.dtype == np.uint8
    assert {tuple(pixel) for pixel in texture.reshape(-1, 3)} == {(10, 20, 30), (250, 240, 230)}
    dark = (texture == (10, 20, 30)).all(axis=2)
    small = glyphs.line_bitmap("left of")[:, :-1]
    top, left = (96 - 29 * 3) // 2, (128 - 41 * 3) // 2
    assert (dark[top : top + 27 : 3, left : left + 123 : 3] == small).all()
    assert dark.sum() == 9 * sum(glyphs.line_bitmap(line).sum() for line in ("left of", "second", "room"))
    assert (signs.text_texture([], 8, 8) == 255).all() and (signs.text_texture([""], 8, 8) == 255).all()
    with pytest.raises(UserError, match="need 9 x 41 pixels"):
        signs.text_texture(["left of"], 96, 40)


# -- Pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_arrays_of_the_styles(name):
    styles = signs.picture_styles(name)
    count = len(styles.names)
    assert styles.train.sum() >= 10 and (~styles.train).sum() >= 2
    assert set(styles.indices("train")) | set(styles.indices("style")) == set(range(count))
    assert not set(styles.indices("train")) & set(styles.indices("style"))
    assert {styles.names[s] for s in styles.indices("style")} == set(signs.HELD_OUT_STYLES)
    shapes = {"base": (count, 84, 84, 3), "region": (count, 84, 84), "palette": (count, 6, 3), "shade": (count, 84, 84)}
    for field, shape in shapes.items():
        array = getattr(styles, field)
        assert array.shape == shape and not array.flags.writeable
        assert array.dtype == (np.int8 if field == "region" else np.uint8)
    for region in styles.region:
        sizes = np.bincount(region[region >= 0], minlength=LAYOUTS[name].offices)
        assert len(sizes) == LAYOUTS[name].offices and sizes.min() >= 20
    assert styles is signs.picture_styles(LAYOUTS[name])


def test_unknown_layout():
    with pytest.raises(UserError, match="'tall'"):
        signs.picture_styles("tal")


@pytest.mark.parametrize("name", LAYOUTS)
def test_offices_are_drawn_in_their_order(name):
    plan, styles = LAYOUTS[name], signs.picture_styles(name)
    for region in styles.region:
        middles = np.array([np.argwhere(region == k).mean(axis=0) for k in range(plan.offices)])
        middles = middles.reshape(plan.rows, plan.columns, 2)
        assert (np.diff(middles[..., 0], axis=0) > 8).all()  # rows from the top
        assert (np.diff(middles[..., 1], axis=1) > 4).all()  # columns from the left


@pytest.mark.parametrize("name", LAYOUTS)
def test_colours_of_all_offices_can_be_read_from_the_picture(name):
    plan, styles = LAYOUTS[name], signs.picture_styles(name)
    for style in range(len(styles.names)):
        masks = [styles.region[style] == k for k in range(plan.offices)]
        # By the style's own palette.
        light = np.array([styles.shade[style][mask].mean() / 255 for mask in masks])
        seen, truth = [], []
        for colours in buildings(plan.offices, 12, style):
            image = signs.compose(styles, style, colours)
            means = np.array([image[mask].mean(axis=0) for mask in masks])
            distance = np.abs(means[:, None] / light[:, None, None] - styles.palette[style]).sum(axis=2)
            assert (distance.argmin(axis=1) == colours).all()
            seen.append(means)
            truth.append(colours)
        # And by what the offices of other buildings look like, which is all that an agent has to go by.
        seen, truth = np.concatenate(seen), np.concatenate(truth)
        typical = np.array([seen[truth == colour].mean(axis=0) for colour in range(6)])
        for colours in buildings(plan.offices, 12, 100 + style):
            image = signs.compose(styles, style, colours)
            means = np.array([image[mask].mean(axis=0) for mask in masks])
            assert (np.abs(means[:, None] - typical).sum(axis=2).argmin(axis=1) == colours).all()


def test_blue_is_the_bluest_colour_of_every_style():
    # What was learned of other styles must hold for a held-out one.
    for palette in signs.picture_styles().palette.astype(int):
        assert (palette[:, 2] - palette[:, :2].max(axis=1)).argmax() == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_styles_are_visibly_different(name):
    styles = signs.picture_styles(name)
    colours = next(buildings(LAYOUTS[name].offices, 1, 0))
    images = [signs.compose(styles, style, colours).astype(int) for style in range(len(styles.names))]
    for (one, a), (other, b) in itertools.combinations(zip(styles.names, images), 2):
        assert np.abs(a - b).mean() > 15, (one, other)


@pytest.mark.parametrize("name", LAYOUTS)
def test_composition_is_the_documented_integer_formula(name):
    styles = signs.picture_styles(name)
    for style, colours in enumerate(buildings(LAYOUTS[name].offices, len(styles.names), 7)):
        image = signs.compose(styles, style, colours)
        assert image.dtype == np.uint8
        region = styles.region[style]
        assert (image[region < 0] == styles.base[style][region < 0]).all()
        for y, x in np.argwhere(region >= 0)[::37]:
            paint = [int(c) for c in styles.palette[style, colours[region[y, x]]]]
            assert image[y, x].tolist() == [(c * int(styles.shade[style, y, x]) + 127) // 255 for c in paint]
