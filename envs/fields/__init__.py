"""Worlds kept as fields: each is the weights of a small network, or of grids, that map a place to what is seen there.

All kinds share one door: ``fit(kind, views, **options)`` fits one field to each of N worlds at once and returns their
:class:`Fields`, and ``render(fields, view)`` draws them. What a view is belongs to the kind: an image and a size for
``siren``; for radiance fields (``voxel``, ``hash``, ``nerfstudio``) the pictures of a moving camera with its poses, and
the poses to look from.
"""

from __future__ import annotations

from typing import Any, Protocol

from fleetgym.core.registry import Registry

__all__ = ["FIELDS", "Fields", "fit", "render"]


class Fields(Protocol):
    """N fitted fields of one architecture."""

    weights: dict[str, Any]
    """Stacked state dict, tensors [N, ...]."""

    @classmethod
    def fit(cls, views: Any, **options: Any) -> Fields:
        """Fits one field to each of N worlds, given what is seen of it."""
        ...

    def render(self, view: Any = None) -> Any:
        """Draws all N fields from one view; from the view they were fitted to if None."""
        ...


FIELDS: Registry[type[Fields]] = Registry("kind of field", group="fleetgym.fields")
"""Name -> class with the methods of :class:`Fields`."""
FIELDS.register("nerfstudio", "fleetgym.envs.fields.nerfstudio:Nerfstudios")
FIELDS.register("siren", "fleetgym.envs.fields.siren:Sirens")
FIELDS.register("hash", "fleetgym.envs.fields.hash:Hashes")
FIELDS.register("voxel", "fleetgym.envs.fields.voxel:Voxels")


def fit(kind: str, views: Any, **options: Any) -> Fields:
    """Fits one field to each of N worlds.

    Args:
        kind: A name in :data:`FIELDS`.
        views: What is seen of each world; for ``siren`` images [N, h, w] or [N, h, w, C], for radiance fields a list of
            :class:`fleetgym.envs.fields.captures.Capture`.
        options: Those of the kind's ``fit``: :func:`fleetgym.envs.fields.siren.fit_sirens`,
            :func:`fleetgym.envs.fields.voxel.fit_voxels`, :func:`fleetgym.envs.fields.hash.fit_hashes`,
            :func:`fleetgym.envs.fields.nerfstudio.fit_nerfstudio`.

    Raises:
        UserError: Unknown kind, or views or options that it does not take.
    """
    return FIELDS.get(kind).fit(views, **options)


def render(fields: Fields, view: Any = None) -> Any:
    """Draws fields from one view; from the view they were fitted to if None and the kind has such.

    Args:
        fields: What :func:`fit` returned.
        view: For ``siren`` a size ``(h, w)``, for radiance fields poses [M, 4, 4] or [N, M, 4, 4].
    """
    return fields.render(view)
