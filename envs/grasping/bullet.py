"""PyBullet without the line that it prints when it is imported, and physics clients that are closed in the end."""

from __future__ import annotations

import os
import sys
import weakref
from types import ModuleType

from fleetgym.core.errors import UserError


def _quiet() -> ModuleType:
    """Imports PyBullet; what it prints comes from C, so the file descriptor is turned away meanwhile."""
    if "pybullet" in sys.modules:
        return sys.modules["pybullet"]
    sys.stderr.flush()
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        import pybullet
    except ImportError:
        raise UserError(
            "pybullet is missing, which Grasping needs; it has no wheels beyond Python 3.11. Install it with: "
            "pip install pybullet"
        ) from None
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
    return pybullet


p = _quiet()


def _disconnect(client: int) -> None:
    if p.isConnected(client):
        p.disconnect(client)


class Client:
    """A physics client of its own (``pybullet.DIRECT``): its calls are PyBullet's with the client filled in.

    It is closed by :meth:`close`, or when nothing refers to it any more.
    """

    def __init__(self) -> None:
        self.id = p.connect(p.DIRECT)
        self._close = weakref.finalize(self, _disconnect, self.id)

    def __getattr__(self, name: str):
        function = getattr(p, name)
        client = self.id

        def call(*arguments, **options):
            return function(*arguments, physicsClientId=client, **options)

        setattr(self, name, call)
        return call

    def close(self) -> None:
        """Closes the client; calls after the first do nothing."""
        self._close()
