"""``fleetgym play``: an environment with discrete actions on the keyboard, drawn in the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from fleetgym.cli.options import parse
from fleetgym.core.errors import UserError

#: Keys and the names of the actions they stand for; the arrows send escape sequences.
KEYS = {"w": "forward", "a": "left", "d": "right", " ": "toggle", "e": "toggle"}
ARROWS = {"A": "w", "D": "a", "C": "d"}
HELP = "w forward   a left   d right   space open or close   r next episode   n next trial   q quit"


@dataclass
class Options:
    """Play an environment on the keyboard: w forward, a and d turn, space opens doors, r next episode, q quits."""

    env: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV_ID")] = "OfficeNav-v0"
    """An environment of the OfficeNav suite."""

    seed: int | None = None
    """Seed of the first trial; without, another one each time."""

    split: str | None = None
    """Where trials come from: train, test, phrases, layout or style."""

    task_id: int | None = None
    """The building to play in first."""

    view: bool = False
    """Show only what the agent sees, not the whole building."""


@contextlib.contextmanager
def _keys() -> Iterator[Iterator[str]]:
    """Keys one by one as they are pressed, or the characters of a pipe; ends with the input."""
    if not sys.stdin.isatty():
        yield (key for line in sys.stdin for key in line.rstrip("\n"))
        return
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)

    def pressed() -> Iterator[str]:
        while key := os.read(number, 1).decode("latin-1"):
            if key == "\x1b":  # an arrow is an escape, a bracket and a letter
                key = ARROWS.get(os.read(number, 2).decode("latin-1")[-1:], "")
            if key == "\x04":
                return
            yield key

    tty.setcbreak(number, termios.TCSADRAIN)  # Ctrl-C still interrupts; keys pressed already count
    try:
        yield pressed()
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def half_blocks(picture: Any) -> str:
    """A picture in characters, two pixels each, in 24-bit colours.

    Args:
        picture: uint8 ``[H, W, 3]``.
    """
    import numpy as np

    picture = np.asarray(picture)
    if len(picture) % 2:
        picture = np.concatenate([picture, picture[-1:]])
    lines = []
    for upper, lower in zip(picture[::2].tolist(), picture[1::2].tolist()):
        cells = (f"\x1b[38;2;{a};{b};{c};48;2;{d};{e};{f}m▀" for (a, b, c), (d, e, f) in zip(upper, lower))
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def braille(picture: Any) -> str:
    """The dark pixels of a picture as dots, eight to a character.

    Args:
        picture: uint8 ``[H, W, 3]``.
    """
    import numpy as np

    dark = np.asarray(picture).mean(-1) < 128
    height, width = dark.shape
    dark = np.pad(dark, ((0, -height % 4), (0, -width % 2)))
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    blocks = dark.reshape(len(dark) // 4, 4, -1, 2).transpose(0, 2, 1, 3)
    lines = ["".join(chr(0x2800 + code) for code in row) for row in (blocks * bits).sum((2, 3)).tolist()]
    return "\n".join(lines).rstrip("\u2800\n")


def sign_text(sign: Any, colour: bool) -> str:
    """A sign for the terminal: text as dots, pictures in colours where there are any."""
    grey = (sign[..., 0] == sign[..., 1]).all() and (sign[..., 1] == sign[..., 2]).all()
    drawn = half_blocks(sign) if colour and not grey else braille(sign)
    width = sign.shape[1] // (1 if colour and not grey else 2)
    lines = (line + " " * (width - len(line)) if grey or not colour else line for line in drawn.split("\n"))
    return "\n".join(["┌" + "─" * width + "┐", *(f"│{line}│" for line in lines), "└" + "─" * width + "┘"])


def main(argv: Sequence[str]) -> int:
    """Plays until q or the end of the input."""
    options = parse(Options, argv, "play")

    import gymnasium as gym

    names = [name for name in gym.registry if name.startswith("OfficeNav")]
    if options.env not in names:
        raise UserError(f"{options.env!r} cannot be played on the keyboard; play one of {', '.join(names)}")
    colour = sys.stdout.isatty()
    env = gym.make(options.env, render_mode=_mode(options.env, colour), disable_env_checker=True)
    wanted = {"split": options.split, "task_id": options.task_id}
    chosen = {key: value for key, value in wanted.items() if value is not None}
    actions = _actions(env)
    try:
        with _keys() as keys:
            _play(env, keys, options, chosen, actions, colour)
    finally:
        env.close()
    return 0


def _mode(env_id: str, colour: bool) -> str:
    """Characters where the environment has them, else pixels."""
    from importlib import import_module

    import gymnasium as gym

    entry = gym.spec(env_id).entry_point
    module, _, name = entry.partition(":") if isinstance(entry, str) else (entry.__module__, ":", entry.__qualname__)
    modes = getattr(import_module(module), name).metadata["render_modes"]
    return "ansi" if "ansi" in modes else "rgb_array"


def _actions(env: Any) -> dict[str, int]:
    variant = getattr(env.unwrapped, "variant", None)
    names = getattr(variant, "actions", None) or ("left", "right", "forward", "toggle")
    return {name: index for index, name in enumerate(names)}


def _play(
    env: Any, keys: Iterator[str], options: Options, chosen: dict[str, Any], actions: dict[str, int], colour: bool
) -> None:
    observation, info = env.reset(seed=options.seed, options=chosen or None)
    total, steps, over, news = 0.0, 0, False, "Find the blue office; a sign tells where it is."
    while True:
        _show(env, observation, options.view, colour)
        place = f"trial {info['trial']}, episode {info['episode_index'] + 1}, step {steps}, return {total:.2f}"
        print(f"{place}\n{news}\n{HELP}", flush=True)
        news = ""
        key = next(keys, "q").lower()
        if key == "q":
            return
        if key in ("r", "n"):
            observation, info = env.reset(options={"new_trial": True} if key == "n" else None)
            total, steps, over, news = 0.0, 0, False, "All doors are closed again."
        elif over:
            news = "The episode is over: r goes on."
        elif key in KEYS:
            observation, reward, terminated, truncated, info = env.step(actions[KEYS[key]])
            total, steps, over = total + reward, steps + 1, terminated or truncated
            if terminated:
                news = "You are in the blue office! r goes on." if info.get("success", True) else "Over. r goes on."
            elif truncated:
                news = "Time is up. r goes on."
        else:
            news = f"{key!r} is no key."


def _show(env: Any, observation: Any, view: bool, colour: bool) -> None:
    if colour:
        print("\x1b[H\x1b[2J", end="")
    image = observation["image"] if isinstance(observation, dict) else observation
    if view and image.shape[0] > 7:
        print(half_blocks(image))
    else:
        drawn = env.render()
        print(drawn if isinstance(drawn, str) else half_blocks(drawn))
    if isinstance(observation, dict) and int(observation.get("on_sign", 0)):
        print(sign_text(observation["sign"], colour))
