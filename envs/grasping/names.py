"""The tasks' names, their objects, and how these are split. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from fleetgym.core.errors import UserError, unknown

#: Steps of an episode, and the number of them that the expert's plan and the input ``remaining`` count.
HORIZON = 20

#: Task -> what it asks for.
INSTRUCTIONS: dict[str, str] = {
    "Procedural": "Grasp the unknown object in front of the palm and lift it.",
    "Named": "Grasp the toy or block in front of the palm and lift it.",
    "Household": "Grasp the box, can, bottle, bowl or mug in front of the palm and lift it.",
    "YCB": "Grasp the household object in front of the palm and lift it.",
}
FAMILIES: tuple[str, ...] = tuple(INSTRUCTIONS)

PROCEDURAL = tuple(f"{index:03d}" for index in range(1000))
NAMED = ("duck", "teddy", "lego", "cube", "sphere", "jenga", "block", "soccerball")
#: Classes of what is made from parameters; an object's number modulo five tells its class.
HOUSEHOLD_CLASSES = ("box", "can", "bottle", "bowl", "mug")
HOUSEHOLD = tuple(f"{index:03d}" for index in range(500))
YCB = (
    "003_cracker_box",
    "004_sugar_box",
    "005_tomato_soup_can",
    "006_mustard_bottle",
    "010_potted_meat_can",
    "021_bleach_cleanser",
    "024_bowl",
    "025_mug",
    "061_foam_brick",
)
#: Family -> split -> names. Named objects are for training and those of YCB are held out, as in GA-DDPG.
OBJECTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Procedural": {"all": PROCEDURAL, "train": PROCEDURAL[:900], "held_out": PROCEDURAL[900:]},
    "Named": {"all": NAMED, "train": NAMED},
    "Household": {"all": HOUSEHOLD, "train": HOUSEHOLD[:400], "held_out": HOUSEHOLD[400:]},
    "YCB": {"all": YCB, "held_out": YCB},
}
SPLITS: dict[str, tuple[str, ...]] = {
    "all": FAMILIES,
    "train": ("Procedural", "Named", "Household"),
    "held_out": ("YCB",),
}


def env_id(family: str) -> str:
    """The Gymnasium id of a family of objects, such as ``Grasping/YCB-v0``."""
    return f"Grasping/{family}-v0"


def resolve_objects(family: str, objects: str | Sequence[str]) -> tuple[str, ...]:
    """The names of a split's objects, or those of a sequence.

    Args:
        family: One of :data:`FAMILIES`.
        objects: ``"all"``, ``"train"``, ``"held_out"``, or names of the family's objects.

    Raises:
        UserError: Unknown family, split or object, or no object at all.
    """
    if family not in OBJECTS:
        raise unknown("family of objects", family, FAMILIES)
    splits = OBJECTS[family]
    if isinstance(objects, str):
        if objects in splits:
            return splits[objects]
        if objects in ("train", "held_out"):
            raise UserError(f"objects={objects!r}: {env_id(family)} has no such share; it has {', '.join(splits)}")
        raise UserError(
            f"objects={objects!r} is no split of {env_id(family)}; it has {', '.join(splits)}, or give a sequence of "
            f"names, such as [{splits['all'][0]!r}]"
        )
    names = tuple(objects)
    for name in names:
        if name not in splits["all"]:
            raise unknown(f"object of {env_id(family)}", name, splits["all"])
    if not names:
        raise UserError(f"objects is empty; name objects of {env_id(family)}, or one of {', '.join(splits)}")
    return names
