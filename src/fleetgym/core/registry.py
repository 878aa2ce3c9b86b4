"""Names for things that are imported only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from fleetgym.core.errors import UserError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to an object, or to ``"module:attribute"`` imported at first use.

    Third parties add names through a Python entry-point group; ours win where both have one.

    Args:
        kind: What the names stand for; it appears in error messages.
        group: Entry-point group to look into, or None.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._items: dict[str, T | str] = {}

    def register(self, name: str, target: T | str | None = None) -> Callable[[T], T] | None:
        """Adds ``name``; without ``target`` it is a decorator.

        Raises:
            UserError: The name is taken by something else.
        """
        if target is None:

            def decorate(item: T) -> T:
                self.register(name, item)
                return item

            return decorate
        if name in self._items and self._items[name] != target:
            raise UserError(f"{self.kind} {name!r} is registered already; choose another name")
        self._items[name] = target
        return None

    def _foreign(self) -> dict[str, Any]:
        return {point.name: point for point in entry_points(group=self.group)} if self.group else {}

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted({*self._items, *self._foreign()})

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def get(self, name: str) -> T:
        """The object behind ``name``, imported if need be.

        Raises:
            UserError: Unknown name (with the three nearest), or a plug-in that does not import.
        """
        target = self._items.get(name)
        if target is None:
            point = self._foreign().get(name)
            if point is None:
                raise unknown(self.kind, name, self.names())
            try:
                return point.load()
            except Exception as error:
                origin = f"{self.kind} {name!r} from the plug-in {point.value!r}"
                raise UserError(f"{origin} does not load: {error}") from error
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            return getattr(importlib.import_module(module), attribute)
        return target
