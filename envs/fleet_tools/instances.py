"""Tools and objects made of numbers: twelve of each class, the first six for training, the others held out.

A tool is a rigid body in its own frame T: the origin where it is held, x along the handle towards its working end,
z up when it is used. An object is what a task is done to. Both are collections of primitive shapes, so that contacts
are exact and nothing has to be downloaded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.seeding import generator

#: Instances of each class; the first half trains (as in the release of fleet-tools), the other half is held out.
INSTANCES = 12
TRAIN = tuple(range(INSTANCES // 2))
HELD_OUT = tuple(range(INSTANCES // 2, INSTANCES))
SPLITS: dict[str, tuple[int, ...]] = {"all": TRAIN + HELD_OUT, "train": TRAIN, "held_out": HELD_OUT}

#: Class -> the numbers that its instances differ in: smallest and largest value. Metres, kilograms.
TOOLS: dict[str, dict[str, tuple[float, float]]] = {
    "hammer": {
        "reach": (0.11, 0.17),
        "handle": (0.009, 0.014),
        "head": (0.013, 0.02),
        "face": (0.03, 0.045),
        "mass": (0.25, 0.6),
        "peen": (0.0, 1.0),
        "friction": (0.5, 1.0),
    },
    "wrench": {
        "reach": (0.13, 0.18),
        "handle": (0.008, 0.012),
        "jaw": (0.0302, 0.0311),
        "prong": (0.008, 0.012),
        "height": (0.012, 0.018),
        "mass": (0.15, 0.35),
        "friction": (0.3, 0.6),
    },
    "spatula": {
        "reach": (0.13, 0.18),
        "handle": (0.008, 0.012),
        "width": (0.075, 0.1),
        "length": (0.09, 0.115),
        "drop": (0.045, 0.06),
        "mass": (0.1, 0.2),
        "friction": (0.1, 0.2),
    },
    "knife": {
        "reach": (0.08, 0.12),
        "handle": (0.009, 0.013),
        "length": (0.11, 0.16),
        "height": (0.045, 0.06),
        "thickness": (0.003, 0.005),
        "mass": (0.1, 0.25),
        "friction": (0.2, 0.5),
    },
    "scoop": {
        "reach": (0.14, 0.18),
        "handle": (0.008, 0.012),
        "width": (0.048, 0.06),
        "length": (0.055, 0.07),
        "depth": (0.014, 0.02),
        "drop": (0.06, 0.075),
        "mass": (0.12, 0.25),
        "friction": (0.2, 0.4),
    },
    "whisk": {
        "reach": (0.1, 0.15),
        "handle": (0.008, 0.012),
        "bulb": (0.012, 0.015),
        "length": (0.075, 0.1),
        "wire": (0.0014, 0.002),
        "mass": (0.1, 0.2),
        "friction": (0.08, 0.2),
    },
}
OBJECTS: dict[str, dict[str, tuple[float, float]]] = {
    "pin": {
        "radius": (0.006, 0.009),
        "head": (0.016, 0.022),
        "height": (0.035, 0.06),
        "grip": (20.0, 60.0),
        "damping": (20.0, 60.0),
        "friction": (0.5, 1.0),
    },
    "nut": {
        "size": (0.0281, 0.0291),
        "height": (0.016, 0.024),
        "base": (0.05, 0.075),
        "grip": (0.2, 0.6),
        "pitch": (0.003, 0.006),
        "friction": (0.3, 0.6),
    },
    "patty": {
        "radius": (0.026, 0.036),
        "ellipse": (0.85, 1.0),
        "height": (0.01, 0.014),
        "mass": (0.05, 0.12),
        "friction": (0.5, 0.9),
    },
    "pieces": {
        "radius": (0.018, 0.026),
        "height": (0.04, 0.055),
        "gap": (0.022, 0.032),
        "mass": (0.05, 0.15),
        "friction": (0.3, 0.6),
    },
    "bin": {
        "radius": (0.012, 0.018),
        "mass": (0.01, 0.03),
        "friction": (0.3, 0.6),
        "width": (0.13, 0.16),
        "length": (0.17, 0.2),
        "height": (0.02, 0.03),
    },
    "bowl": {
        "radius": (0.06, 0.075),
        "height": (0.025, 0.04),
        "ball": (0.013, 0.016),
        "mass": (0.005, 0.015),
        "friction": (0.08, 0.2),
    },
}
#: What the numbers mean, for the documentation's tables.
MEANING: Mapping[str, str] = {
    "reach": "from where it is held to its working end, m",
    "handle": "half the handle's thickness, m",
    "head": "radius of the head, m",
    "face": "half the head's length, m",
    "peen": "shape of the back of the head: below 1/3 a ball, below 2/3 a wedge, else flat",
    "jaw": "opening of the jaw, m",
    "prong": "thickness of the jaw's arms, m",
    "width": "width of the blade, or of the tray, m",
    "length": "length of the blade, of the tray, or of the whisk below its handle, m",
    "depth": "height of the scoop's walls, m",
    "bulb": "radius of the whisk's bulb, m",
    "wire": "radius of the whisk's wires, m",
    "ball": "radius of the ball, m",
    "drop": "from the handle down to the blade, m",
    "thickness": "thickness of the blade, m",
    "height": "height, m",
    "mass": "mass, kg",
    "friction": "coefficient of friction",
    "radius": "radius, m",
    "grip": "dry friction of the joint, N or N m",
    "damping": "damping of the joint, N s/m",
    "size": "across flats, m",
    "base": "height of the block below, m",
    "pitch": "advance in a turn, m",
    "ellipse": "ratio of the two radii",
    "gap": "between the pieces, m",
}
_STEEL, _WOOD, _DARK = "0.62 0.64 0.68 1", "0.72 0.5 0.3 1", "0.2 0.21 0.24 1"
#: Group of the shapes that touch and are not seen, as MuJoCo's own pictures leave it out.
UNSEEN = 3
_GRIPS = ("0.75 0.2 0.18 1", "0.15 0.4 0.7 1", "0.2 0.55 0.3 1", _WOOD, _DARK, "0.85 0.6 0.15 1")


@dataclass(frozen=True, eq=False)
class Instance:
    """One tool or object.

    Attributes:
        kind: Its class, such as ``"hammer"``.
        index: Its number within the class.
        numbers: What makes it; see :data:`TOOLS` and :data:`OBJECTS`.
    """

    kind: str
    index: int
    numbers: Mapping[str, float]

    def __post_init__(self) -> None:
        vars(self).update(self.numbers)  # read in every step: so each is found at once

    def __getattr__(self, name: str) -> float:
        raise AttributeError(name)

    @property
    def split(self) -> str:
        """``"train"`` or ``"held_out"``."""
        return "train" if self.index in TRAIN else "held_out"


@functools.cache
def _made(kind: str, index: int) -> Instance:
    ranges = TOOLS[kind] if kind in TOOLS else OBJECTS[kind]
    # A Latin hypercube over the instances of each half: both halves cover every range.
    half, place = divmod(index, INSTANCES // 2)
    rng = generator("fleet_tools", kind, half)
    strata = np.stack([rng.permutation(INSTANCES // 2) for _ in ranges], axis=1)
    shares = (strata + rng.uniform(0.1, 0.9, strata.shape)) / (INSTANCES // 2)
    numbers = {name: low + (high - low) * float(u) for (name, (low, high)), u in zip(ranges.items(), shares[place])}
    return Instance(kind, index, {name: round(value, 5) for name, value in numbers.items()})


def _checked(kind: str, index: int, kinds: Mapping[str, object], what: str) -> Instance:
    if kind not in kinds:
        raise unknown(f"class of {what}s", kind, kinds)
    if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < INSTANCES:
        raise UserError(f"{what} {index!r} of class {kind!r}: instances have the numbers 0 to {INSTANCES - 1}")
    return _made(kind, int(index))


def tool(kind: str, index: int) -> Instance:
    """A tool.

    Raises:
        UserError: Unknown class or number.
    """
    return _checked(kind, index, TOOLS, "tool")


def thing(kind: str, index: int) -> Instance:
    """An object.

    Raises:
        UserError: Unknown class or number.
    """
    return _checked(kind, index, OBJECTS, "object")


# ---- shapes ----------------------------------------------------------------------------------------------------------


def geom(kind: str, size: tuple[float, ...], pos: tuple[float, ...] = (0, 0, 0), **attributes: object) -> str:
    """MJCF of one shape; attributes such as ``rgba``, ``mass``, ``euler`` (radians), ``friction``."""
    values = {"type": kind, "size": size, **({} if "fromto" in attributes else {"pos": pos}), **attributes}
    return "<geom " + " ".join(f'{key}="{_text(value)}"' for key, value in values.items()) + "/>"


def _text(value: object) -> str:
    if isinstance(value, (tuple, list, np.ndarray)):
        return " ".join(f"{float(entry):.6g}" for entry in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _handle(made: Instance, front: float, share: float) -> str:
    """A grip from 6 cm behind the hand to the front of it, and a shank from there to ``front``."""
    grip = _GRIPS[made.index % len(_GRIPS)]
    r, friction = made.handle, (made.friction, 0.005, 0.0001)
    start, middle = -0.06, 0.045
    parts = [
        geom(
            "box",
            ((middle - start) / 2, r, r),
            ((start + middle) / 2, 0, 0),
            rgba=grip,
            mass=0.6 * share * made.mass,
            friction=friction,
        )
    ]
    if front > middle:
        parts.append(
            geom(
                "box",
                ((front - middle) / 2, 0.6 * r, 0.6 * r),
                ((front + middle) / 2, 0, 0),
                rgba=_STEEL,
                mass=0.4 * share * made.mass,
                friction=friction,
            )
        )
    return "".join(parts)


def _hammer(made: Instance) -> tuple[str, dict[str, tuple[float, float, float]]]:
    x, r, half = made.reach, made.head, made.face
    friction = (made.friction, 0.005, 0.0001)
    head = geom("cylinder", (r, half), (x, 0, 0), rgba=_STEEL, mass=0.6 * made.mass, friction=friction)
    if made.peen < 1 / 3:
        head += geom("sphere", (0.9 * r,), (x, 0, half), rgba=_STEEL, mass=0.05 * made.mass, friction=friction)
    elif made.peen < 2 / 3:
        head += geom(
            "box", (0.9 * r, 0.3 * r, 0.6 * r), (x, 0, half), rgba=_STEEL, mass=0.05 * made.mass, friction=friction
        )
    return _handle(made, x, 0.35) + head, {"head": (x, 0, -half), "tail": (x, 0, half), "side": (-0.06, 0, 0)}


def _wrench(made: Instance) -> tuple[str, dict[str, tuple[float, float, float]]]:
    # The middle of the jaw is where the middle of the nut will be. The jaw opens along x, away from the hand; its arms
    # end in a flare that leads the nut in.
    x, gap, arm, half = made.reach, made.jaw / 2, made.prong / 2, made.height / 2
    friction = (made.friction, 0.005, 0.0001)
    share = made.mass / 8
    back, front = -0.62 * made.jaw, 0.42 * made.jaw
    shapes = geom(
        "box", (arm, gap + 2 * arm, half), (x + back - arm, 0, 0), rgba=_STEEL, mass=2 * share, friction=friction
    )
    for side in (-1, 1):
        shapes += geom(
            "box",
            ((front - back) / 2, arm, half),
            (x + (front + back) / 2, side * (gap + arm), 0),
            rgba=_STEEL,
            mass=share,
            friction=friction,
        )
        shapes += geom(
            "box",
            (0.007, 0.6 * arm, half),
            (x + front + 0.005, side * (gap + arm + 0.0028), 0),
            euler=(0, 0, side * 0.5),
            rgba=_STEEL,
            mass=0.2 * share,
            friction=friction,
        )
    keypoints = {"head": (x, 0, 0), "tail": (-0.06, 0, 0), "side": (x, gap, 0)}
    return _handle(made, x + back - arm, 0.45) + shapes, keypoints


def _spatula(made: Instance) -> tuple[str, dict[str, tuple[float, float, float]]]:
    # The blade lies level, below the handle; a neck joins them. Its front edge is the working end.
    rear, drop = made.reach - made.length, made.drop
    thin = 0.0012
    friction = (made.friction, 0.005, 0.0001)
    neck = np.hypot(rear - 0.045, drop)
    shapes = geom(
        "box",
        (neck / 2, 0.4 * made.handle, 0.4 * made.handle),
        ((rear + 0.045) / 2, 0, -drop / 2),
        euler=(0, float(np.arctan2(drop, rear - 0.045)), 0),
        rgba=_STEEL,
        mass=0.2 * made.mass,
        friction=friction,
    )
    shapes += geom(
        "box",
        (made.length / 2, made.width / 2, thin),
        (rear + made.length / 2, 0, -drop),
        rgba=_DARK,
        mass=0.3 * made.mass,
        friction=friction,
        priority=1,
    )
    keypoints = {"head": (made.reach, 0, -drop - thin), "tail": (rear, 0, -drop - thin)}
    keypoints["side"] = (made.reach, made.width / 2, -drop - thin)
    return _handle(made, 0.0, 0.5) + shapes, keypoints


def _knife(made: Instance) -> tuple[str, dict[str, tuple[float, float, float]]]:
    x, thick, tall = made.reach, made.thickness / 2, made.height
    friction = (made.friction, 0.005, 0.0001)
    rear = 0.045
    shapes = geom(
        "box",
        (made.length / 2, thick, tall / 2),
        (rear + made.length / 2, 0, -tall / 2 + made.handle),
        rgba=_STEEL,
        mass=0.5 * made.mass,
        friction=friction,
    )
    edge = made.handle - tall
    return _handle(made, 0.0, 0.5) + shapes, {
        "head": (x, 0, edge),
        "tail": (x, 0, made.handle),
        "side": (-0.06, 0, edge),
    }


def _scoop(made: Instance) -> tuple[str, dict[str, tuple[float, float, float]]]:
    # A shovel: its floor lies level, below the handle, with walls behind and at both sides, open at the front. The neck
    # is upright, so that it passes behind the scoop's back over the wall of a tray.
    rear, drop, across = made.reach - made.length, made.drop, made.width / 2
    thin, tall = 0.0012, made.depth / 2
    friction = (made.friction, 0.005, 0.0001)
    share, middle = made.mass / 10, rear + made.length / 2
    shapes = geom(
        "box",
        (0.4 * made.handle, 0.5 * made.handle, drop / 2),
        (rear - thin, 0, -drop / 2),
        rgba=_STEEL,
        mass=2 * share,
        friction=friction,
    )
    shapes += geom(
        "box",
        (made.length / 2, across, thin),
        (middle, 0, -drop),
        rgba=_STEEL,
        mass=share,
        friction=friction,
        priority=1,
    )
    shapes += geom(
        "box", (thin, across, tall), (rear + thin, 0, -drop + tall), rgba=_STEEL, mass=0.5 * share, friction=friction
    )
    for side in (-1, 1):
        shapes += geom(
            "box",
            (made.length / 2, thin, tall),
            (middle, side * (across + thin), -drop + tall),
            rgba=_STEEL,
            mass=0.5 * share,
            friction=friction,
        )
    keypoints = {"head": (made.reach, 0, -drop - thin), "tail": (rear, 0, -drop - thin)}
    keypoints["side"] = (made.reach, across, -drop - thin)
    return _handle(made, rear, 0.55) + shapes, keypoints


#: Wires of a whisk; with so many, the gaps are narrower than the balls that it stirs.
WIRES = 8


def _whisk(made: Instance) -> tuple[str, dict[str, tuple[float, float, float]]]:
    # It hangs down from the front of the handle: a rod, and below it a bulb of wires, each of three straight parts. The
    # middle part is upright, so that it pushes a ball ahead, and not onto the floor. The other two parts are for the
    # eye: in their place a core touches things, which reaches as far down as the wires do.
    x, bulb, wire, end = made.reach, made.bulb, made.wire, -made.length
    friction = (made.friction, 0.005, 0.0001)
    top = end + 3.2 * bulb
    shapes = geom("cylinder", (0.004, -top / 2), (x, 0, top / 2), rgba=_STEEL, mass=0.15 * made.mass, friction=friction)
    thick = 0.4 * bulb
    shapes += geom(
        "capsule", (thick,), fromto=(x, 0, top, x, 0, end + thick), mass=0.0, friction=friction, group=UNSEEN
    )
    for k in range(WIRES):
        c, s = np.cos(2 * np.pi * k / WIRES), np.sin(2 * np.pi * k / WIRES)
        points = [(0.2, top), (1.0, end + 1.8 * bulb), (1.0, end + 0.45 * bulb), (0.4, end + wire)]
        for part, ((share, z), (next_share, next_z)) in enumerate(zip(points, points[1:])):
            r, next_r = share * (bulb - wire), next_share * (bulb - wire)
            ends = (x + r * c, r * s, z, x + next_r * c, next_r * s, next_z)
            touching = {} if part == 1 else {"contype": 0, "conaffinity": 0}
            shapes += geom(
                "capsule", (wire,), fromto=ends, rgba=_STEEL, mass=0.2 * made.mass / (3 * WIRES), friction=friction,
                **touching,
            )  # fmt: skip
    return _handle(made, x, 0.65) + shapes, {"head": (x, 0, end), "tail": (x, 0, 0), "side": (-0.06, 0, 0)}


_SHAPES = {
    "hammer": _hammer,
    "wrench": _wrench,
    "spatula": _spatula,
    "knife": _knife,
    "scoop": _scoop,
    "whisk": _whisk,
}


def _as_hammer(made: Instance) -> dict[str, tuple[float, float, float]]:
    """Where a tool that is no hammer strikes: a wrench with the bridge of its jaw, a spatula with its blade."""
    if made.kind == "wrench":
        # With the bridge's rear and the shank: further in front, a wide head would meet the edges of the jaw's arms
        # too, and be wedged between them.
        x, z = made.reach - 0.62 * made.jaw - 0.017, max(made.height / 2, 0.6 * made.handle)
        return {"head": (x, 0, -z), "tail": (x, 0, z), "side": (-0.06, 0, -z)}
    x, z = made.reach - 0.4 * made.length, -made.drop
    return {"head": (x, 0, z - 0.0012), "tail": (x, 0, z + 0.02), "side": (made.reach - made.length, 0, z - 0.0012)}


def tool_shapes(made: Instance, use: str) -> tuple[str, dict[str, np.ndarray]]:
    """MJCF of a tool's shapes in its frame T, and its keypoints ``head``, ``tail`` and ``side``, metres.

    Args:
        made: The tool.
        use: The class of tool that it is used as, mostly its own.

    Returns:
        Shapes and keypoints.

    The keypoints are those that the expert's constraints speak of. Head: hammer, the middle of the striking face;
    wrench, the middle of the jaw; spatula and scoop, the middle of the front edge; knife, on the edge; whisk, its lower
    end. Tail: hammer, the back of the head; wrench, the end of the handle; spatula and scoop, the rear of the blade;
    knife, on the spine above the head; whisk, where it hangs from the handle. Side: hammer, knife and whisk, towards
    the end of the handle; wrench, spatula and scoop, sideways of the head.
    """
    shapes, keypoints = _SHAPES[made.kind](made)
    if use == "hammer" and made.kind != "hammer":
        keypoints = _as_hammer(made)
    return shapes, {name: np.array(place, float) for name, place in keypoints.items()}
