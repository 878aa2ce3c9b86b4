"""What stands on the table: a pin in a block, a nut on a bolt, a patty before a stop, pieces, a tray, a bowl.

A mechanism says how it looks, where it may be placed, what is observed of it, and how far a task on it has come. All of
it is moved by contact alone: there are no welds between tool and object, and nothing is set after an episode's reset.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fleetgym.envs.fleet_tools.instances import TOOLS, Instance, geom


def _yaw(angle: float) -> np.ndarray:
    return np.array([np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)])


class Mechanism:
    """What the mechanisms share.

    Attributes:
        low, high: Bounds of what ``reset`` draws, the ``pose`` of an object.
        pose_names: What its entries are; metres and radians.
    """

    low: tuple[float, ...] = (0.5, -0.12)
    high: tuple[float, ...] = (0.62, 0.12)
    pose_names: tuple[str, ...] = ("x", "y")

    def xml(self, made: Instance) -> str:
        """MJCF within the world's body; the body ``object`` is what keypoint and pose are of."""
        raise TypeError(f"{type(self).__name__} does not say what it looks like")

    def more_xml(self, made: Instance) -> str:
        """MJCF beside the world's body."""
        return ""

    def contact_xml(self) -> str:
        """MJCF of the contacts' section."""
        return ""


class Pin(Mechanism):
    """A pin that sticks 2 cm out of the hole in its block, held by dry friction and damping.

    After ``FrankaDrakeHammerEnv`` of fleet-tools; success there, too, is a centimetre.
    """

    travel, wanted = 0.02, 0.01

    def xml(self, made: Instance) -> str:
        """See :class:`Mechanism`. The pin's head begins 2 cm above the block."""
        friction = (made.friction, 0.005, 0.0001)
        block = geom(
            "box", (0.05, 0.05, made.height / 2), (0, 0, made.height / 2), rgba="0.72 0.55 0.35 1", conaffinity=3
        )
        top = made.height + self.travel
        head = geom(
            "cylinder", (made.head, 0.003), (0, 0, top - 0.003), rgba="0.8 0.8 0.84 1", mass=0.03, friction=friction
        )
        shank = geom(
            "cylinder", (made.radius, self.travel / 2 + 0.005), (0, 0, top - self.travel / 2 - 0.008),
            rgba="0.6 0.6 0.65 1", mass=0.02, contype=0, conaffinity=0,
        )  # fmt: skip
        joint = (
            f'<joint name="slide" type="slide" axis="0 0 -1" range="0 {self.travel}" frictionloss="{made.grip}" '
            f'damping="{made.damping}" armature="0.02"/>'
        )
        site = f'<site name="keypoint" pos="0 0 {top}" size="0.002" rgba="0 0 0 0"/>'
        return f'<body name="object">{block}<body name="pin" gravcomp="1">{joint}{head}{shank}{site}</body></body>'

    def contact_xml(self) -> str:
        """The pin does not touch its own block."""
        return '<exclude body1="object" body2="pin"/>'

    def place(self, sim: Any, pose: np.ndarray) -> None:
        """Puts the block at ``pose`` = (x, y), the pin at its top."""
        sim.model.body_pos[sim.object][:2] = pose

    def state(self, sim: Any, out: np.ndarray) -> None:
        """Writes where the pin's head is; the rotation is zero."""
        out[:3] = sim.keypoint
        out[3:] = 0.0

    def amount(self, sim: Any) -> float:
        """How deep the pin has gone, metres."""
        return float(sim.data.qpos[sim.slide])


class Nut(Mechanism):
    """A hexagonal nut on a bolt's thread, held by dry friction; clockwise turns take it down.

    After ``FrankaDrakeWrenchEnv`` of fleet-tools; success there, too, is 0.4 radians.
    """

    low, high = (0.55, -0.1, -0.5), (0.67, 0.1, 0.5)
    pose_names = ("x", "y", "yaw")
    wanted = 0.4

    def xml(self, made: Instance) -> str:
        """See :class:`Mechanism`. A hexagon is the union of three boxes."""
        friction = (made.friction, 0.005, 0.0001)
        half, w = made.height / 2, made.size / 2
        z = made.base + half + 0.01
        base = geom("cylinder", (0.022, made.base / 2), (0, 0, made.base / 2), rgba="0.35 0.37 0.42 1", conaffinity=3)
        bolt = geom("cylinder", (0.0085, 0.03), (0, 0, z), rgba="0.75 0.75 0.8 1", contype=0, conaffinity=0)
        nut = "".join(
            geom(
                "box", (w, w / np.sqrt(3), half), euler=(0, 0, k * np.pi / 3), rgba="0.85 0.7 0.3 1",
                mass=0.02, friction=friction,
            )
            for k in range(3)
        )  # fmt: skip
        joints = (
            '<joint name="thread" type="slide" axis="0 0 1" armature="0.1" damping="5"/>'
            f'<joint name="turn" type="hinge" axis="0 0 1" frictionloss="{made.grip}" damping="0.05" '
            'armature="0.0005"/>'
        )
        site = '<site name="keypoint" size="0.002" rgba="0 0 0 0"/>'
        nut = f'<body name="nut" pos="0 0 {z}" gravcomp="1">{joints}{nut}{site}</body>'
        return f'<body name="object">{base}{bolt}{nut}</body>'

    def more_xml(self, made: Instance) -> str:
        """The thread: one turn is one pitch."""
        pitch = made.pitch / (2 * np.pi)
        # Stiff: with MuJoCo's own numbers, a wrench that leans on the nut pushes it a centimetre down its thread.
        hard = 'solref="0.008 1" solimp="0.999 0.9999 0.001"'
        return f'<equality><joint joint1="thread" joint2="turn" polycoef="0 {pitch:.9g} 0 0 0" {hard}/></equality>'

    def contact_xml(self) -> str:
        """The nut does not touch what its bolt stands on."""
        return '<exclude body1="object" body2="nut"/>'

    def place(self, sim: Any, pose: np.ndarray) -> None:
        """Puts the bolt at (x, y), and turns the nut to ``yaw`` (its flats repeat every 60 degrees)."""
        sim.model.body_pos[sim.object][:2] = pose[:2]
        sim.model.body_quat[sim.nut] = _yaw(pose[2])
        sim.first = float(pose[2])

    def state(self, sim: Any, out: np.ndarray) -> None:
        """Writes where the nut's middle is, and its yaw."""
        out[:3] = sim.keypoint
        out[3] = out[4] = 0.0
        out[5] = sim.first + sim.data.qpos[sim.turn]

    def amount(self, sim: Any) -> float:
        """How far the nut was turned clockwise, radians."""
        return -float(sim.data.qpos[sim.turn])


class Patty(Mechanism):
    """A patty (an ellipsoid) before a low stop, which keeps it from being pushed ahead of the blade.

    After ``FrankaDrakeSpatulaEnv`` of fleet-tools; success there, too, is 5 cm above the table.
    """

    low, high = (0.52, -0.1, -0.3), (0.62, 0.1, 0.3)
    pose_names = ("x", "y", "yaw")
    wanted = 0.05

    def xml(self, made: Instance) -> str:
        """See :class:`Mechanism`."""
        a, b, c = made.radius, made.radius * made.ellipse, made.height
        patty = geom(
            "ellipsoid", (a, b, c), rgba="0.5 0.28 0.16 1", mass=made.mass, friction=(made.friction, 0.01, 0.001),
            condim=4,
        )  # fmt: skip
        site = '<site name="keypoint" size="0.002" rgba="0 0 0 0"/>'
        stop = geom("box", (0.004, 0.068, 0.009), (a + 0.006, 0, 0.0145), rgba="0.4 0.42 0.46 1")
        stop += geom("box", (0.004, 0.004, 0.012), (a + 0.006, 0.072, 0.012), rgba="0.4 0.42 0.46 1", conaffinity=2)
        stop += geom("box", (0.004, 0.004, 0.012), (a + 0.006, -0.072, 0.012), rgba="0.4 0.42 0.46 1", conaffinity=2)
        return (
            f'<body name="object" pos="0.55 0 {c}"><freejoint name="object"/>{patty}{site}</body>'
            f'<body name="stop">{stop}</body>'
        )

    def place(self, sim: Any, pose: np.ndarray) -> None:
        """Puts the patty at (x, y), the stop behind it as seen along ``yaw``."""
        sim.model.body_pos[sim.stop][:2] = pose[:2]
        sim.model.body_quat[sim.stop] = _yaw(pose[2])
        q = sim.free[0]
        sim.data.qpos[q : q + 3] = (*pose[:2], sim.object_instance.height)
        sim.data.qpos[q + 3 : q + 7] = _yaw(pose[2])
        sim.first = float(pose[2])

    def state(self, sim: Any, out: np.ndarray) -> None:
        """Writes the patty's place and rotation."""
        out[:3] = sim.keypoint
        out[3:] = sim.rotation_of(sim.object)

    def amount(self, sim: Any) -> float:
        """Height of the patty's middle above the table, metres; 0 where it has fallen off the table."""
        return float(sim.keypoint[2])


class Pieces(Mechanism):
    """Two pieces that stand side by side.

    After ``FrankaDrakeKnifeEnv`` of fleet-tools; success there, too, is a distance that has grown by 5 cm.
    """

    low, high = (0.5, -0.1, -0.4), (0.62, 0.1, 0.4)
    pose_names = ("x", "y", "yaw")
    wanted = 0.05

    def xml(self, made: Instance) -> str:
        """See :class:`Mechanism`."""
        parts = ""
        for name, colour in (("object", "0.55 0.75 0.35 1"), ("other", "0.9 0.5 0.25 1")):
            shape = geom(
                "cylinder", (made.radius, made.height / 2), rgba=colour, mass=made.mass,
                friction=(made.friction, 0.005, 0.0001),
            )  # fmt: skip
            site = f'<site name="{"keypoint" if name == "object" else "second"}" size="0.002" rgba="0 0 0 0"/>'
            parts += f'<body name="{name}"><freejoint name="{name}"/>{shape}{site}</body>'
        return parts

    def place(self, sim: Any, pose: np.ndarray) -> None:
        """Puts the pieces to both sides of (x, y), their line turned by ``yaw`` from the y axis."""
        made = sim.object_instance
        half = made.radius + made.gap / 2
        across = np.array([-np.sin(pose[2]), np.cos(pose[2])])
        for q, side in zip(sim.free, (1, -1)):
            sim.data.qpos[q : q + 2] = pose[:2] + side * half * across
            sim.data.qpos[q + 2] = made.height / 2
            sim.data.qpos[q + 3 : q + 7] = (1, 0, 0, 0)
        sim.first = 2 * half

    def state(self, sim: Any, out: np.ndarray) -> None:
        """Writes the places of both pieces."""
        out[:3] = sim.keypoint
        out[3:] = sim.second

    def amount(self, sim: Any) -> float:
        """How much further apart the pieces are than at first, metres."""
        x, y, _ = (sim.keypoint - sim.second).tolist()
        return math.hypot(x, y) - sim.first


def _ball(made: Instance, radius: float, colour: str) -> str:
    """A free ball. Rolling friction of half a millimetre lets it come to rest within seconds."""
    shape = geom(
        "sphere", (radius,), rgba=colour, mass=made.mass, friction=(made.friction, 0.005, 0.0005), condim=6
    )  # fmt: skip
    site = '<site name="keypoint" size="0.002" rgba="0 0 0 0"/>'
    return f'<body name="object" pos="0.55 0 {radius}"><freejoint name="object"/>{shape}{site}</body>'


class Tray(Mechanism):
    """A ball in an open tray, which is fixed to the table.

    Success is a ball that the scoop carries, 5 cm above the table: it must lie in the scoop, so that to throw it, or to
    squeeze it against a wall, is not enough.
    """

    low, high = (0.54, -0.1, -0.3, -0.02, 0.0), (0.62, 0.1, 0.3, 0.02, 0.04)
    pose_names = ("x", "y", "yaw", "the ball sideways", "the ball from the far wall")
    wanted = 0.05
    #: Half the thickness of floor and walls, metres.
    thin = 0.002

    def xml(self, made: Instance) -> str:
        """See :class:`Mechanism`."""
        thin, x, y, tall = self.thin, made.length / 2, made.width / 2, made.height / 2
        look = {"rgba": "0.3 0.45 0.55 1", "conaffinity": 3, "friction": (made.friction, 0.005, 0.0001)}
        tray = geom("box", (x + 2 * thin, y + 2 * thin, thin), (0, 0, thin), **look)
        for side in (-1, 1):
            tray += geom("box", (thin, y + 2 * thin, tall), (side * (x + thin), 0, 2 * thin + tall), **look)
            tray += geom("box", (x, thin, tall), (0, side * (y + thin), 2 * thin + tall), **look)
        return f'{_ball(made, made.radius, "0.95 0.55 0.15 1")}<body name="vessel">{tray}</body>'

    def place(self, sim: Any, pose: np.ndarray) -> None:
        """Puts the tray's middle at (x, y), turned by ``yaw``, and the ball near to its far wall."""
        made = sim.object_instance
        sim.model.body_pos[sim.vessel][:2] = pose[:2]
        sim.model.body_quat[sim.vessel] = _yaw(pose[2])
        c, s = np.cos(pose[2]), np.sin(pose[2])
        along, across = made.length / 2 - made.radius - 0.003 - pose[4], pose[3]
        q = sim.free[0]
        sim.data.qpos[q : q + 3] = (
            pose[0] + c * along - s * across, pose[1] + s * along + c * across, 2 * self.thin + made.radius,
        )  # fmt: skip
        sim.data.qpos[q + 3 : q + 7] = _yaw(pose[2])
        sim.first = float(pose[2])
        #: The foot of the far wall, in the middle.
        sim.wall = np.array([pose[0] + c * made.length / 2, pose[1] + s * made.length / 2])

    def state(self, sim: Any, out: np.ndarray) -> None:
        """Writes where the ball is, x and y of the middle of the tray's far wall, and the tray's yaw."""
        out[:3] = sim.keypoint
        out[3:5] = sim.wall
        out[5] = sim.first

    def amount(self, sim: Any) -> float:
        """Height of the ball's middle above the table, metres, while the scoop carries it; else 0."""
        x, y, z = (sim.tool_rotation.T @ (sim.keypoint - sim.tool_place)).tolist()
        points = sim.keypoints
        rear, front = points["tail"][0], points["head"][0]
        above = z - points["head"][2]
        carried = rear < x < front and abs(y) < points["side"][1] and 0 < above < 2 * sim.object_instance.radius
        return float(sim.keypoint[2]) if carried else 0.0


class Bowl(Mechanism):
    """A ball in a round bowl, which is fixed to the table; it is to be stirred.

    Success is one turn around the bowl's middle, either way.
    """

    low, high = (0.5, -0.1, -np.pi, 0.0), (0.6, 0.1, np.pi, 1.0)
    pose_names = ("x", "y", "the ball's direction", "the ball's share of the way to the wall")
    wanted = 2 * np.pi
    #: Half the thickness of floor and walls, metres, and the number of straight walls.
    thin, walls = 0.002, 12

    def xml(self, made: Instance) -> str:
        """See :class:`Mechanism`. The bowl is a ring of boxes on a round floor."""
        thin, tall, r = self.thin, made.height / 2, made.radius
        look = {"rgba": "0.88 0.88 0.84 1", "conaffinity": 3, "friction": (made.friction, 0.005, 0.0001)}
        bowl = geom("cylinder", (r + 2 * thin, thin), (0, 0, thin), **look)
        for k in range(self.walls):
            angle = 2 * np.pi * k / self.walls
            place = ((r + thin) * np.cos(angle), (r + thin) * np.sin(angle), 2 * thin + tall)
            half = (r + 2 * thin) * np.tan(np.pi / self.walls)
            bowl += geom("box", (thin, half, tall), place, euler=(0, 0, angle), **look)
        return f'{_ball(made, made.ball, "0.85 0.2 0.15 1")}<body name="vessel">{bowl}</body>'

    def place(self, sim: Any, pose: np.ndarray) -> None:
        """Puts the bowl's middle at (x, y), and the ball in it; its middle stays free, for a whisk to come down."""
        made = sim.object_instance
        sim.model.body_pos[sim.vessel][:2] = pose[:2]
        nearest = made.ball + TOOLS["whisk"]["bulb"][1] + 0.006
        farthest = made.radius - made.ball - 0.001
        far = nearest + (farthest - nearest) * pose[3]
        q = sim.free[0]
        sim.data.qpos[q : q + 3] = (
            pose[0] + far * np.cos(pose[2]), pose[1] + far * np.sin(pose[2]), 2 * self.thin + made.ball,
        )  # fmt: skip
        sim.data.qpos[q + 3 : q + 7] = (1, 0, 0, 0)
        sim.middle = np.array([pose[0], pose[1], 2 * self.thin])
        #: The ball's direction, as it was last seen, and how far it has come around since the reset, radians.
        sim.direction, sim.stirred = float(pose[2]), 0.0

    def state(self, sim: Any, out: np.ndarray) -> None:
        """Writes where the ball is, and the middle of the bowl's floor."""
        out[:3] = sim.keypoint
        out[3:] = sim.middle

    def amount(self, sim: Any) -> float:
        """How far the ball has come around the bowl's middle since the reset, radians; either way is positive.

        To be called once a control step at least, as it adds up; more calls change nothing. Only what happens within
        the bowl counts.
        """
        x, y, z = (sim.keypoint - sim.middle).tolist()
        made = sim.object_instance
        if z < made.height and x * x + y * y < 1.1 * made.radius**2:
            direction = math.atan2(y, x)
            sim.stirred += (direction - sim.direction + math.pi) % (2 * math.pi) - math.pi
            sim.direction = direction
        return abs(sim.stirred)


#: Class of objects -> its mechanism.
MECHANISMS: dict[str, Any] = {
    "pin": Pin(),
    "nut": Nut(),
    "patty": Patty(),
    "pieces": Pieces(),
    "bin": Tray(),
    "bowl": Bowl(),
}
#: Task -> class of tool, class of object.
ROLES: dict[str, tuple[str, str]] = {
    "Hammer": ("hammer", "pin"),
    "Wrench": ("wrench", "nut"),
    "Spatula": ("spatula", "patty"),
    "Knife": ("knife", "pieces"),
    "WrenchForHammer": ("wrench", "pin"),
    "SpatulaForHammer": ("spatula", "pin"),
    "Scoop": ("scoop", "bin"),
    "Whisk": ("whisk", "bowl"),
}
#: Class of objects -> the class of tools that is meant for it.
USE: dict[str, str] = {
    "pin": "hammer",
    "nut": "wrench",
    "patty": "spatula",
    "pieces": "knife",
    "bin": "scoop",
    "bowl": "whisk",
}
