"""Household objects made from parameters: boxes, cans, bottles, bowls and mugs, each of convex pieces.

GA-DDPG's training objects are of such classes, from ShapeNet, whose meshes may not be passed on. These are drawn from
ranges that contain the sizes of the YCB set's nine objects; none of them is a copy of one.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np

from fleetgym.core.seeding import generator
from fleetgym.envs.grasping.names import HOUSEHOLD_CLASSES

#: Sides of what is round.
SIDES = 16

Draw = Callable[[float, float], float]


def parts(name: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The pieces and colours of an object.

    Args:
        name: One of :data:`fleetgym.envs.grasping.names.HOUSEHOLD`; its number tells the class and is the seed.

    Returns:
        Vertices [n, 3] of each convex piece, metres, upright along z; and colours [3, 3] of body, band and top.
    """
    rng = generator("household", name)
    kind = HOUSEHOLD_CLASSES[int(name) % len(HOUSEHOLD_CLASSES)]
    pieces = _SHAPES[kind](rng.uniform)
    hue = rng.uniform()
    # The label has a colour of its own, or, on crockery, that of the rest.
    plain = kind in ("bowl", "mug") and rng.uniform() < 0.5
    hues = (hue, hue if plain else rng.uniform(), hue if rng.uniform() < 0.5 else rng.uniform())
    colours = [colorsys.hsv_to_rgb(h, rng.uniform(0.0, 0.9), rng.uniform(0.4, 0.97)) for h in hues]
    if plain:
        colours = [colours[0]] * 3
    return pieces, np.array(colours)


def _ring(radius: float | np.ndarray, height: float, squeezed: float = 1.0) -> np.ndarray:
    """Corners [SIDES, 3] of a polygon in a plane of height z; ``squeezed`` is its depth over its width."""
    angle = 2 * np.pi * np.arange(SIDES) / SIDES
    return np.stack([radius * np.cos(angle), squeezed * radius * np.sin(angle), np.full(SIDES, height)], 1)


def _prism(*levels: tuple[float, float], squeezed: float = 1.0) -> np.ndarray:
    """Vertices of a solid of revolution through levels of (radius, height); convex if those are."""
    return np.concatenate([_ring(radius, height, squeezed) for radius, height in levels])


def _wall(levels: list[tuple[float, float]], thick: float) -> list[np.ndarray]:
    """Pieces of a wall: for each side and each pair of levels of (outer radius, height), eight corners."""
    pieces = []
    for (low, z), (high, top) in zip(levels, levels[1:]):
        rings = [_ring(low, z), _ring(low - thick, z), _ring(high, top), _ring(high - thick, top)]
        for side in range(SIDES):
            pieces.append(np.concatenate([ring[[side, (side + 1) % SIDES]] for ring in rings]))
    return pieces


def _block(sides: tuple[float, float, float], middle: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> np.ndarray:
    signs = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    return signs * np.array(sides) + np.array(middle)


def _box(draw: Draw) -> list[np.ndarray]:
    return [_block((draw(0.03, 0.072), draw(0.04, 0.17), draw(0.04, 0.22)))]


def _can(draw: Draw) -> list[np.ndarray]:
    radius, height, squeezed = draw(0.022, 0.037), draw(0.06, 0.16), draw(0.6, 1.0)
    return [_prism((radius / squeezed, 0.0), (radius / squeezed, height), squeezed=squeezed)]


def _bottle(draw: Draw) -> list[np.ndarray]:
    depth, squeezed = draw(0.022, 0.035), draw(0.5, 1.0)
    radius, height = depth / squeezed, draw(0.1, 0.19)
    neck, tall = draw(0.012, 0.02), draw(0.02, 0.06)
    shoulder = height + draw(0.01, 0.03)
    return [
        _prism((radius, 0.0), (radius, height), squeezed=squeezed),
        np.concatenate([_ring(radius, height, squeezed), _ring(neck, shoulder)]),
        _prism((neck, shoulder), (neck, shoulder + tall)),
    ]


def _bowl(draw: Draw) -> list[np.ndarray]:
    radius, height, thick = draw(0.055, 0.085), draw(0.035, 0.07), draw(0.004, 0.007)
    foot = radius * draw(0.4, 0.6)
    middle = foot + (radius - foot) * draw(0.6, 0.8)
    levels = [(foot, 0.0), (middle, 0.4 * height), (radius, height)]
    return [_prism((foot, 0.0), (foot, thick)), *_wall(levels, thick)]


def _mug(draw: Draw) -> list[np.ndarray]:
    radius, height, thick = draw(0.035, 0.048), draw(0.07, 0.11), draw(0.004, 0.006)
    reach, wide = draw(0.02, 0.035), draw(0.008, 0.012)
    low, high = 0.25 * height, 0.8 * height
    out = radius + reach
    handle = [_block((reach, wide, wide), (radius + reach / 2 - thick / 2, 0.0, z)) for z in (low, high)]
    handle.append(_block((wide, wide, high - low + wide), (out - thick / 2, 0.0, (low + high) / 2)))
    return [_prism((radius, 0.0), (radius, thick)), *_wall([(radius, 0.0), (radius, height)], thick), *handle]


_SHAPES = {"box": _box, "can": _can, "bottle": _bottle, "bowl": _bowl, "mug": _mug}
