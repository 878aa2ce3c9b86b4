"""What hangs on the wall: signs of text and drawn floor plans, 84 x 84 RGB, as integer arrays to be looked up.

Text: white paper, black ink, wrapped at 13 characters, line ``i`` at (2, 10 i + 2), as in the code released with Liu et
al. 2023. The glyphs are ours.

Pictures: the paper shows floor plans in 100 styles made by a style transfer network; those pictures are not available,
so these are our own, drawn by the rules below. A picture is composed by ``compose``, in integers alone, so that NumPy,
numba and torch agree on every pixel::

    where(region >= 0, (palette[colour of the office] * shade + 127) // 255, base)
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav import glyphs
from fleetgym.envs.office_nav.layout import Layout, layout

#: Height and width of a sign.
SIZE = 84
#: Characters of a line.
COLUMNS = 13

# -- Text -------------------------------------------------------------------------------------------------------------


def wrap(text: str, width: int = COLUMNS) -> list[str]:
    """The lines of a text of words, none longer than ``width`` characters."""
    return textwrap.wrap(text, width)


def text_sign(text: str) -> np.ndarray:
    """The sign that says ``text``, uint8 ``[84, 84, 3]``.

    Raises:
        UserError: It does not fit, or the font lacks a character.
    """
    lines = wrap(text)
    if len(lines) * glyphs.LINE + 2 > SIZE:
        raise UserError(
            f"text {text!r}: {len(lines)} lines do not fit on a sign, which has {(SIZE - 2) // glyphs.LINE}"
        )
    image = np.full((SIZE, SIZE, 3), 255, np.uint8)
    for number, line in enumerate(lines):
        ink = glyphs.line_bitmap(line)
        top = 2 + glyphs.LINE * number
        image[top : top + ink.shape[0], 2 : 2 + ink.shape[1]][ink] = 0
    return image


def text_signs(strings: Sequence[str]) -> np.ndarray:
    """The signs of some texts, uint8 ``[len(strings), 84, 84, 3]``.

    Raises:
        UserError: One does not fit, or the font lacks a character.
    """
    return np.stack([text_sign(string) for string in strings]) if strings else np.zeros((0, SIZE, SIZE, 3), np.uint8)


def text_texture(
    lines: Sequence[str],
    height: int,
    width: int,
    *,
    ink: tuple[int, int, int] = (0, 0, 0),
    paper: tuple[int, int, int] = (255, 255, 255),
) -> np.ndarray:
    """A texture with lines of text as large as they fit, centred as a block and flush left: a sign of a 3D world.

    Args:
        lines: The lines from the top.
        height: Of the texture, in pixels.
        width: Of the texture, in pixels.
        ink: RGB of the letters.
        paper: RGB behind them.

    Returns:
        uint8 ``[height, width, 3]``; every pixel of a glyph is a square of the same whole number of pixels.

    Raises:
        UserError: The lines do not fit, or the font lacks a character.
    """
    lines = list(lines)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = paper
    columns = max((len(line) for line in lines), default=0) * glyphs.ADVANCE - 1
    if columns < 1:
        return image
    rows = len(lines) * glyphs.LINE - 1
    scale = min(height // rows, width // columns)
    if scale < 1:
        raise UserError(f"lines {lines!r} need {rows} x {columns} pixels, the texture has {height} x {width}")
    top, left = (height - rows * scale) // 2, (width - columns * scale) // 2
    for number, line in enumerate(lines):
        bitmap = glyphs.line_bitmap(line)[:, :-1].repeat(scale, 0).repeat(scale, 1)
        y = top + number * glyphs.LINE * scale
        image[y : y + bitmap.shape[0], left : left + bitmap.shape[1]][bitmap] = ink
    return image


# -- Pictures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PictureStyles:
    """The floor plan of one layout, drawn in S styles.

    Attributes:
        names: The styles' names.
        train: Which styles training shows, bool ``[S]``; the others are held out.
        base: The picture without its offices, uint8 ``[S, 84, 84, 3]``.
        region: The office whose colour a pixel takes, -1 none, int8 ``[S, 84, 84]``.
        palette: The colours of the offices as drawn, in the order of ``COLOURS``, uint8 ``[S, 6, 3]``.
        shade: By what, of 255, the office's colour is multiplied, uint8 ``[S, 84, 84]``.
    """

    names: tuple[str, ...]
    train: np.ndarray
    base: np.ndarray
    region: np.ndarray
    palette: np.ndarray
    shade: np.ndarray

    def indices(self, split: str = "train") -> np.ndarray:
        """The numbers of the styles that a split shows: the held-out ones if it is ``"style"``."""
        return np.flatnonzero(~self.train if split == "style" else self.train)


def compose(styles: PictureStyles, style: int, colours: np.ndarray) -> np.ndarray:
    """The picture of a building.

    Args:
        styles: Of the building's layout.
        style: The style's number.
        colours: The colour of each office, int ``[n]``.

    Returns:
        uint8 ``[84, 84, 3]``.
    """
    region = styles.region[style]
    # Where there is no office, -1 picks the last one's colour, and the picture takes its base there.
    painted = styles.palette[style][np.asarray(colours)[region]].astype(np.int32)
    painted = (painted * styles.shade[style][..., None] + 127) // 255
    return np.where(region[..., None] >= 0, painted, styles.base[style]).astype(np.uint8)


#: Blue, green, grey, purple, red and yellow as MiniGrid has them.
_PURE = np.array([(0, 0, 255), (0, 255, 0), (100, 100, 100), (112, 39, 195), (255, 0, 0), (255, 255, 0)], float)


def _tint(towards: tuple[int, int, int], share: float, colours: np.ndarray = _PURE) -> np.ndarray:
    return np.floor(colours * (1 - share) + np.array(towards) * share + 0.5)


def _ink(*colours: tuple[int, int, int]) -> np.ndarray:
    return np.array(colours, float)


class _Plan:
    """A canvas with the plan's coordinates: helpers that return masks [84, 84] of pixels.

    Only sums, products and comparisons, no library functions, so that every machine draws the same.
    """

    def __init__(
        self,
        plan: Layout,
        *,
        margin: tuple[int, int, int, int] = (2, 2, 2, 2),
        skew: float = 0.0,
        wobble: float = 0.0,
    ):
        self.plan = plan
        left, top, right, bottom = margin
        self.scale_x = (SIZE - left - right) / plan.width
        self.scale_y = (SIZE - top - bottom) / plan.height
        self.row, self.column = np.mgrid[:SIZE, :SIZE]
        x, y = self.column + 0.5, self.row + 0.5
        if wobble:  # a hand that is not steady: lines wander as triangular waves
            x, y = (
                x + wobble * (np.abs((self.row + self.column // 3) % 23 - 11.5) / 5.75 - 1),
                y + wobble * (np.abs((self.column + self.row // 4 + 9) % 19 - 9.5) / 4.75 - 1),
            )
        if skew:
            x = x + skew * (y - SIZE / 2)
        self.x, self.y = (x - left) / self.scale_x, (y - top) / self.scale_y

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, radius: float = 0.0) -> np.ndarray:
        """A rectangle in cells; its corners are rounded by a radius in pixels."""
        dx = np.maximum(x0 - self.x, self.x - x1) * self.scale_x + radius
        dy = np.maximum(y0 - self.y, self.y - y1) * self.scale_y + radius
        if radius:
            return (np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2 <= radius * radius) & (np.maximum(dx, dy) <= radius)
        return (dx < 0) & (dy < 0)

    def disc(self, x: float, y: float, radius: float) -> np.ndarray:
        """A disc around the middle of a cell; the radius is in pixels."""
        dx, dy = (self.x - x - 0.5) * self.scale_x, (self.y - y - 0.5) * self.scale_y
        return dx * dx + dy * dy <= radius * radius

    def rooms(self, across: float, along: float, reach: float, radius: float = 0.0, shape: str = "") -> np.ndarray:
        """The offices, int8, -1 elsewhere: their cells, grown into the walls and towards their doors, in cells."""
        region = np.full((SIZE, SIZE), -1, np.int8)
        for k, ((x, y), (door, _)) in enumerate(zip(self.plan.office_xy.tolist(), self.plan.door_xy.tolist())):
            left, right = (reach, across) if door < x else (across, reach)
            if shape:
                cx = x + (right - left) / 2
                mask = self.disc(cx, y, radius)
                if shape == "diamond":
                    dx, dy = np.abs(self.x - cx - 0.5) * self.scale_x, np.abs(self.y - y - 0.5) * self.scale_y
                    mask = dx + dy <= radius
            else:
                mask = self.rectangle(x - left, y - along, x + 1 + right, y + 1 + along, radius)
            region[mask] = k
        return region

    def gap(self) -> float:
        """Half of the wall between two rows of offices, in cells."""
        return (self.plan.office_xy[self.plan.columns, 1] - self.plan.office_xy[0, 1] - 1) / 2

    def halls(self, grow: float = 0.0) -> np.ndarray:
        """Hallways, corridor, the alcove of the sign and the door cells."""
        mask = np.zeros((SIZE, SIZE), bool)
        offices = {tuple(xy) for xy in self.plan.office_xy.tolist()}
        doors = {tuple(xy) for xy in self.plan.door_xy.tolist()}
        for y, x in np.argwhere(~self.plan.walls).tolist():
            if (x, y) not in offices:
                more = 0.0 if (x, y) in doors else grow
                mask |= self.rectangle(x - more, y - more, x + 1 + more, y + 1 + more)
        return mask

    def doors(self, thick: float, tall: float) -> np.ndarray:
        """A leaf in the middle of every door cell."""
        mask = np.zeros((SIZE, SIZE), bool)
        for x, y in self.plan.door_xy.tolist():
            mask |= self.rectangle(x + 0.5 - thick / 2, y + 0.5 - tall / 2, x + 0.5 + thick / 2, y + 0.5 + tall / 2)
        return mask

    def here(self, radius: float) -> np.ndarray:
        """The place of the sign."""
        return self.disc(*self.plan.sign_xy, radius)

    def start(self) -> np.ndarray:
        """A wedge that points east where episodes begin."""
        x, y, _ = self.plan.start
        dx, dy = (self.x - x - 0.15) * self.scale_x, np.abs(self.y - y - 0.5) * self.scale_y
        return (dx >= 0) & (dx + 2 * dy <= max(0.8 * self.scale_x, 4.5))

    def building(self, inset: float = 0.0) -> np.ndarray:
        """All of the plan but for a rim of ``inset`` cells."""
        return self.rectangle(inset, inset, self.plan.width - inset, self.plan.height - inset)


def _grow(mask: np.ndarray, pixels: int = 1, corners: bool = True) -> np.ndarray:
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        grown = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        if corners:
            grown = grown | padded[:-2, :-2] | padded[:-2, 2:] | padded[2:, :-2] | padded[2:, 2:]
        mask = grown
    return mask


def _shift(mask: np.ndarray, down: int, right: int) -> np.ndarray:
    moved = np.zeros_like(mask)
    moved[max(down, 0) : SIZE + min(down, 0), max(right, 0) : SIZE + min(right, 0)] = mask[
        max(-down, 0) : SIZE - max(down, 0), max(-right, 0) : SIZE - max(right, 0)
    ]
    return moved


def _borders(region: np.ndarray) -> np.ndarray:
    """Pixels of a room beside those of another or of none."""
    padded = np.pad(region, 1, constant_values=-1)
    centre = padded[1:-1, 1:-1]
    same = (padded[:-2, 1:-1] == centre) & (padded[2:, 1:-1] == centre)
    same &= (padded[1:-1, :-2] == centre) & (padded[1:-1, 2:] == centre)
    return (centre >= 0) & ~same


def _noise(key: int, cell: int = 1) -> np.ndarray:
    """Values 0 to 255 that look random, the same for squares of ``cell`` pixels."""
    with np.errstate(over="ignore"):
        row, column = (axis // cell for axis in np.mgrid[:SIZE, :SIZE].astype(np.uint32))
        bits = row * np.uint32(0x9E3779B1) ^ column * np.uint32(0x85EBCA77) ^ np.uint32(key * 0xC2B2AE3D & 0xFFFFFFFF)
        for _ in range(2):
            bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
            bits = (bits ^ (bits >> np.uint32(12))) * np.uint32(0x297A2D39)
        return ((bits ^ (bits >> np.uint32(15))) >> np.uint32(24)).astype(np.int64)


class _Picture:
    """What a style fills in: a base to paint on, regions, a shade and a palette."""

    def __init__(self, paper: tuple[int, int, int]):
        self.base = np.empty((SIZE, SIZE, 3))
        self.base[:] = paper
        self.shade = np.full((SIZE, SIZE), 255.0)
        self.region = np.full((SIZE, SIZE), -1, np.int8)
        self.palette = _PURE

    def paint(self, mask: np.ndarray, colour: tuple[int, int, int], share: float = 1.0) -> None:
        self.base[mask] = self.base[mask] * (1 - share) + np.array(colour) * share

    def grain(self, noise: np.ndarray, amount: int, rooms: bool = True) -> None:
        """Darkens or lightens by up to ``amount`` of 255."""
        self.base += ((noise - 128) * amount / 128)[..., None]
        if rooms:
            self.shade = np.minimum(self.shade, 255 - noise * amount / 128)

    def arrays(self) -> tuple[np.ndarray, ...]:
        shade = np.where(self.region >= 0, self.shade, 255)
        rounded = [np.clip(np.floor(a + 0.5), 0, 255).astype(np.uint8) for a in (self.base, self.palette, shade)]
        return rounded[0], self.region, rounded[1], rounded[2]


def _print(plan: Layout) -> _Picture:
    """Black lines and flat colours on white paper."""
    canvas, picture = _Plan(plan), _Picture((255, 255, 255))
    picture.region = canvas.rooms(0.4, canvas.gap() * 0.7, 0.5)
    picture.paint(canvas.building() & ~canvas.building(0.15), (0, 0, 0))
    halls = canvas.halls(0.1)
    picture.paint(_grow(picture.region >= 0) | _grow(halls), (0, 0, 0))
    picture.paint(halls, (255, 255, 255))
    picture.paint(canvas.here(2.5), (0, 0, 0))
    picture.paint(canvas.start(), (0, 0, 0))
    return picture


def _grid(plan: Layout) -> _Picture:
    """True to scale, as the gridworld itself is drawn: thick grey walls, black floor, cells with lines."""
    canvas, picture = _Plan(plan), _Picture((100, 100, 100))
    picture.region = canvas.rooms(0, 0, 0)
    halls = canvas.halls()
    picture.paint(halls, (0, 0, 0))
    cells = np.diff(np.floor(canvas.x), axis=1, prepend=-1) + np.diff(np.floor(canvas.y), axis=0, prepend=-1) != 0
    picture.paint(halls & cells, (60, 60, 60))
    picture.paint(canvas.doors(0.7, 0.7), (170, 0, 0))
    picture.paint(canvas.doors(0.3, 0.35), (0, 0, 0))
    picture.paint(canvas.here(2.5), (0, 220, 220))
    picture.paint(canvas.start(), (255, 0, 0))
    picture.palette = _tint((0, 0, 0), 0.1)
    return picture


def _blueprint(plan: Layout) -> _Picture:
    """White double lines on blue paper that is ruled."""
    canvas, picture = _Plan(plan), _Picture((24, 54, 130))
    picture.paint((canvas.row % 7 == 3) | (canvas.column % 7 == 3), (62, 92, 168))
    picture.region = canvas.rooms(0.3, canvas.gap() * 0.5, 0.35)
    rooms, halls = picture.region >= 0, canvas.halls()
    lines = (_grow(rooms, 2) & ~_grow(rooms)) | (_grow(halls) & ~halls)
    picture.paint(lines, (235, 242, 255))
    picture.paint(_grow(rooms) & ~rooms, (24, 54, 130))
    picture.paint(canvas.doors(0.9, 0.35), (235, 242, 255))
    picture.paint(canvas.here(3) & ~canvas.here(1.6), (235, 242, 255))
    picture.palette = _ink(
        (70, 130, 255), (90, 215, 130), (175, 182, 195), (165, 95, 225), (240, 85, 95), (245, 235, 110)
    )
    return picture


def _pastel(plan: Layout) -> _Picture:
    """Soft colours, round corners and no line on cream."""
    canvas, picture = _Plan(plan), _Picture((250, 243, 224))
    picture.region = canvas.rooms(0.35, canvas.gap() * 0.75, 0.3, radius=3.5)
    picture.paint(canvas.halls(0.2), (232, 214, 190))
    picture.paint(canvas.here(3), (240, 150, 140))
    picture.palette = _ink(
        (140, 160, 240), (165, 225, 165), (190, 188, 186), (195, 150, 215), (245, 150, 150), (248, 236, 140)
    )
    return picture


def _sepia(plan: Layout) -> _Picture:
    """An old print: brown ink on spotted paper, all colours faded."""
    canvas, picture = _Plan(plan), _Picture((226, 202, 160))
    picture.region = canvas.rooms(0.4, canvas.gap() * 0.7, 0.5)
    halls = canvas.halls(0.1)
    picture.paint(canvas.building() & ~canvas.building(0.3), (92, 58, 28))
    picture.paint(_grow(picture.region >= 0) | _grow(halls), (92, 58, 28))
    picture.paint(halls, (240, 222, 186))
    picture.paint(canvas.here(2.5), (92, 58, 28))
    middle = (canvas.row - SIZE / 2) ** 2 + (canvas.column - SIZE / 2) ** 2
    picture.grain(_noise(5, 2), 14)
    picture.base -= (middle / 42)[..., None]
    picture.palette = _ink(
        (66, 84, 178), (104, 152, 62), (136, 124, 106), (140, 62, 132), (190, 60, 40), (222, 186, 66)
    )
    return picture


def _hatched(plan: Layout) -> _Picture:
    """Rooms hatched, every other row of them the other way, and walls filled with black."""
    canvas, picture = _Plan(plan), _Picture((255, 255, 255))
    picture.region = canvas.rooms(0.3, canvas.gap() * 0.5, 0.35)
    picture.paint(canvas.building(), (20, 20, 20))
    picture.paint(canvas.halls(0.05), (245, 245, 245))
    sign = np.where(picture.region // plan.columns % 2 == 0, 1, -1)
    picture.shade[(canvas.column + sign * canvas.row) % 4 == 0] = 40
    picture.paint(canvas.here(2.5), (20, 20, 20))
    picture.paint(canvas.start(), (20, 20, 20))
    picture.palette = _tint((255, 255, 255), 0.15)
    return picture


def _night(plan: Layout) -> _Picture:
    """Black paper with light on it; every room glows from its rim."""
    canvas, picture = _Plan(plan), _Picture((6, 6, 14))
    picture.region = canvas.rooms(0.3, canvas.gap() * 0.6, 0.35, radius=1.5)
    halls = canvas.halls(0.05)
    picture.paint(_grow(halls, 1) & ~halls, (90, 96, 120))
    inner = (picture.region >= 0) & ~_borders(picture.region)
    picture.shade[inner] = 150
    picture.paint(canvas.here(3) & ~canvas.here(1.4), (255, 255, 255))
    picture.paint(canvas.start(), (255, 255, 255))
    picture.palette = _ink((60, 90, 255), (40, 255, 90), (185, 185, 185), (190, 70, 255), (255, 60, 60), (255, 255, 70))
    return picture


def _pencil(plan: Layout) -> _Picture:
    """Drawn by hand: wavering lines of grey, walls scribbled over, rooms coloured in strokes."""
    canvas, picture = _Plan(plan, margin=(4, 4, 4, 4), wobble=0.9), _Picture((246, 246, 242))
    picture.region = canvas.rooms(0.35, canvas.gap() * 0.55, 0.35)
    rooms, halls = picture.region >= 0, canvas.halls(0.05)
    scribble = canvas.building() & ((canvas.column + 2 * canvas.row + _noise(8, 3) // 100) % 5 == 0)
    picture.paint(scribble, (150, 150, 155))
    picture.paint(halls, (246, 246, 242))
    picture.paint((_grow(rooms) & ~rooms) | (_grow(halls, 1, False) & ~halls), (80, 80, 88))
    picture.shade[(canvas.row - canvas.column // 2 + _noise(9, 4) // 128) % 3 == 0] = 205
    picture.paint(canvas.here(2.5), (80, 80, 88))
    picture.grain(_noise(10), 8)
    picture.palette = _tint((246, 246, 242), 0.28)
    return picture


def _leaning(plan: Layout) -> _Picture:
    """Seen from aside: the plan leans, and rooms are blocks with a dark side."""
    canvas, picture = _Plan(plan, margin=(13, 6, 14, 8), skew=0.28), _Picture((205, 222, 226))
    picture.paint(_shift(canvas.building(), 4, 2), (120, 140, 146))
    picture.paint(canvas.building(), (236, 236, 228))
    picture.paint(canvas.halls(0.05), (176, 186, 184))
    picture.region = canvas.rooms(0.3, canvas.gap() * 0.45, 0.35)
    rooms = picture.region >= 0
    for depth in (3, 2, 1):
        picture.paint(_shift(rooms, depth, depth - 1), (54, 62, 70))
    upper = rooms & ~_shift(rooms, 2, 0)
    picture.shade[rooms & ~upper] = 215
    picture.paint(canvas.here(2.5), (200, 60, 40))
    picture.palette = _ink((45, 85, 225), (60, 180, 75), (150, 150, 150), (140, 60, 180), (225, 60, 55), (245, 220, 60))
    return picture


def _halftone(plan: Layout) -> _Picture:
    """A newspaper: rooms of dots, halls of fine lines."""
    canvas, picture = _Plan(plan), _Picture((238, 234, 222))
    rooms = canvas.rooms(0.4, canvas.gap() * 0.7, 0.4)
    halls = canvas.halls()
    picture.paint(halls & (canvas.row % 3 == 0), (120, 116, 108))
    picture.paint(_grow(rooms >= 0) & (rooms < 0), (150, 146, 138))
    dots = (canvas.row % 4 - 1.5) ** 2 + (canvas.column % 4 - 1.5) ** 2 <= 2.6
    picture.region = np.where(dots, rooms, -1).astype(np.int8)
    picture.paint(canvas.here(3), (40, 38, 34))
    picture.palette = _tint((30, 30, 30), 0.18)
    return picture


def _stations(plan: Layout) -> _Picture:
    """The plan of an underground: halls are thick lines, rooms are stations on them."""
    canvas, picture = _Plan(plan), _Picture((255, 255, 255))
    line = np.zeros((SIZE, SIZE), bool)
    (sign_x, sign_y), (_, corridor, _) = plan.sign_xy, plan.start
    line |= canvas.rectangle(1, corridor + 0.3, plan.width - 1, corridor + 0.7)
    line |= canvas.rectangle(sign_x + 0.3, corridor + 0.3, sign_x + 0.7, sign_y + 0.5)
    for x in {x + (1 if door > x else -1) * 2 for (x, _), (door, _) in zip(plan.office_xy, plan.door_xy)}:
        line |= canvas.rectangle(x + 0.3, plan.office_xy[0, 1] + 0.3, x + 0.7, corridor + 0.7)
    for (x, y), (door, _) in zip(plan.office_xy, plan.door_xy):
        line |= canvas.rectangle(min(x, 2 * door - x) + 0.5, y + 0.36, max(x, 2 * door - x) + 0.5, y + 0.64)
    picture.paint(line, (44, 44, 60))
    picture.region = canvas.rooms(0, 0, 0, radius=min(4.6, canvas.scale_x * 0.82), shape="disc")
    rooms = picture.region >= 0
    picture.paint(_grow(rooms, 1) & ~rooms, (44, 44, 60))
    picture.paint(canvas.here(3.2), (44, 44, 60))
    picture.paint(canvas.here(1.5), (255, 255, 255))
    picture.palette = _ink((20, 60, 220), (0, 160, 70), (140, 140, 140), (130, 40, 160), (225, 30, 40), (255, 215, 0))
    return picture


def _mosaic(plan: Layout) -> _Picture:
    """Little tiles with dark joints, each a bit lighter or darker than its neighbours."""
    canvas, picture = _Plan(plan), _Picture((206, 198, 182))
    rooms = canvas.rooms(0.4, canvas.gap() * 0.8, 0.45)
    picture.paint(canvas.building(), (150, 104, 84))
    picture.paint(canvas.halls(0.1), (226, 218, 202))
    picture.paint(canvas.here(4), (20, 130, 136))
    picture.grain(_noise(12, 4), 30, rooms=False)
    picture.shade -= _noise(12, 4) * 60 // 255
    joints = (canvas.row % 4 == 3) | (canvas.column % 4 == 3)
    picture.paint(joints, (70, 62, 56), 0.8)
    picture.region = np.where(joints, -1, rooms).astype(np.int8)
    picture.palette = _ink((40, 80, 250), (50, 200, 70), (170, 170, 170), (160, 60, 215), (245, 55, 45), (255, 230, 50))
    return picture


def _chalk(plan: Layout) -> _Picture:
    """Chalk on a green board."""
    canvas, picture = _Plan(plan, margin=(4, 4, 4, 4), wobble=0.5), _Picture((38, 74, 58))
    picture.grain(_noise(20, 6), 9, rooms=False)
    picture.region = canvas.rooms(0.3, canvas.gap() * 0.6, 0.35)
    rooms, halls = picture.region >= 0, canvas.halls(0.05)
    chalk = ((_grow(rooms) & ~rooms) | (_grow(halls) & ~halls)) & (_noise(21) > 50)
    picture.paint(chalk, (226, 232, 224))
    dust = ((canvas.row + canvas.column) % 3 == 0) | (_noise(22) < 40)
    picture.shade[dust] = 130
    picture.paint(canvas.here(3) & (_noise(23) > 40), (226, 232, 224))
    picture.palette = _ink(
        (120, 150, 255), (130, 235, 140), (200, 200, 200), (205, 130, 245), (255, 125, 120), (255, 245, 130)
    )
    return picture


def _watercolour(plan: Layout) -> _Picture:
    """Washes that run thin towards the middle of a room, on rough paper, no line anywhere."""
    canvas, picture = _Plan(plan, wobble=0.7), _Picture((252, 250, 244))
    halls = canvas.halls(0.3)
    picture.paint(canvas.building(), (214, 222, 218))
    picture.paint(halls, (250, 240, 222))
    picture.region = canvas.rooms(0.4, canvas.gap() * 0.75, 0.4, radius=2.5)
    inside = picture.region >= 0
    level = np.full((SIZE, SIZE), 165.0)
    for _ in range(3):
        edge = _borders(np.where(inside, picture.region, -1))
        inside = inside & ~edge
        level[inside] += 30
    picture.shade = level
    picture.grain(_noise(30, 2), 10, rooms=False)
    picture.shade -= _noise(30, 2) * 18 // 255
    picture.paint(canvas.here(3.4), (90, 150, 160), 0.8)
    picture.palette = _ink(
        (95, 120, 235), (120, 205, 120), (180, 180, 184), (175, 110, 215), (240, 110, 100), (250, 225, 110)
    )
    return picture


def _gems(plan: Layout) -> _Picture:
    """Cut stones on dark felt in brass settings."""
    canvas, picture = _Plan(plan), _Picture((70, 22, 34))
    picture.grain(_noise(40), 12, rooms=False)
    picture.paint(canvas.halls(-0.1), (120, 52, 58))
    picture.region = canvas.rooms(0.2, 0, 0.2, radius=min(6.0, canvas.scale_x * 1.15), shape="diamond")
    rooms = picture.region >= 0
    picture.paint(_grow(rooms, 1, False) & ~rooms, (214, 172, 84))
    facets = [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    for x, y in plan.office_xy.tolist():
        for number, (across, down) in enumerate(facets):
            part = ((canvas.x - x - 0.5) * across > 0) & ((canvas.y - y - 0.5) * down > 0)
            near = canvas.disc(x, y, 8)
            picture.shade[part & near & rooms] = (255, 225, 200, 165)[number]
    picture.paint(canvas.here(3), (214, 172, 84))
    picture.palette = _ink((50, 80, 245), (40, 200, 90), (180, 180, 180), (150, 55, 205), (240, 40, 50), (250, 225, 60))
    return picture


#: Every style by name; the last three are held out.
STYLES = {
    "print": _print,
    "grid": _grid,
    "blueprint": _blueprint,
    "pastel": _pastel,
    "sepia": _sepia,
    "hatched": _hatched,
    "night": _night,
    "pencil": _pencil,
    "leaning": _leaning,
    "halftone": _halftone,
    "stations": _stations,
    "mosaic": _mosaic,
    "chalk": _chalk,
    "watercolour": _watercolour,
    "gems": _gems,
}
#: The styles that training never shows.
HELD_OUT_STYLES = ("chalk", "watercolour", "gems")


def picture_styles(plan: Layout | str = "standard") -> PictureStyles:
    """The floor plan of a layout in all styles; drawn once, the arrays are read-only.

    Args:
        plan: One of ``LAYOUTS``, or its name: ``"standard"``, ``"tall"`` or ``"tall_skinny"``.

    Raises:
        UserError: Unknown layout.
    """
    return _picture_styles(plan.name if isinstance(plan, Layout) else plan)


@functools.cache
def _picture_styles(name: str) -> PictureStyles:
    plan = layout(name)
    drawn = [style(plan).arrays() for style in STYLES.values()]
    train = np.array([style not in HELD_OUT_STYLES for style in STYLES])
    base, region, palette, shade = (np.stack(parts) for parts in zip(*drawn))
    for array in (train, base, region, palette, shade):
        array.flags.writeable = False
    return PictureStyles(tuple(STYLES), train, base, region, palette, shade)
