"""Rigid motions as matrices [..., 4, 4], in batches: from rotation vectors and back, inverses, checks.

``X_AB`` is the pose of frame B in frame A: it takes coordinates in B to coordinates in A.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fleetgym.core.errors import UserError


def rotation(vector: Any) -> np.ndarray:
    """Rotation matrices [..., 3, 3] of rotation vectors [..., 3], radians (Rodrigues' formula)."""
    vector = np.asarray(vector, np.float64)
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    small = angle < 1e-4
    safe = np.where(small, 1.0, angle)
    first = np.where(small, 1.0 - angle**2 / 6, np.sin(safe) / safe)
    second = np.where(small, 0.5 - angle**2 / 24, (1.0 - np.cos(safe)) / safe**2)
    x, y, z = np.moveaxis(vector, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*vector.shape[:-1], 3, 3)
    return np.eye(3) + first * cross + second * (cross @ cross)


def rotation_vector(matrix: Any) -> np.ndarray:
    """Rotation vectors [..., 3], radians, of angle 0..pi, of rotation matrices [..., 3, 3]."""
    r = np.asarray(matrix, np.float64)
    axis = np.stack([r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]], axis=-1)
    sine = 0.5 * np.linalg.norm(axis, axis=-1)
    cosine = 0.5 * (np.trace(r, axis1=-2, axis2=-1) - 1.0)
    angle = np.arctan2(sine, cosine)
    factor = np.where(sine > 1e-6, 0.5 * angle / np.where(sine > 1e-6, sine, 1.0), 0.5)
    found = axis * factor[..., None]
    # At half a turn the antisymmetric part is gone: the axis is a column of (R + 1) / 2.
    half = (sine <= 1e-6) & (cosine < 0)
    if np.any(half):
        diagonal = np.diagonal(r, axis1=-2, axis2=-1)
        column = np.argmax(diagonal, axis=-1)
        lifted = r + np.eye(3)
        chosen = np.take_along_axis(lifted, column[..., None, None], axis=-1)[..., 0]
        chosen = chosen / np.linalg.norm(chosen, axis=-1, keepdims=True)
        found = np.where(half[..., None], chosen * angle[..., None], found)
    return found


def pose(translation: Any, vector: Any) -> np.ndarray:
    """Poses [..., 4, 4] of translations [..., 3], metres, and rotation vectors [..., 3], radians."""
    translation, turned = np.asarray(translation, np.float64), rotation(vector)
    out = np.zeros((*turned.shape[:-2], 4, 4))
    out[..., :3, :3], out[..., :3, 3], out[..., 3, 3] = turned, translation, 1.0
    return out


def parts(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    """Translations [..., 3], metres, and rotation vectors [..., 3], radians, of poses [..., 4, 4]."""
    matrix = np.asarray(matrix, np.float64)
    return matrix[..., :3, 3].copy(), rotation_vector(matrix[..., :3, :3])


def inverse(matrix: Any) -> np.ndarray:
    """Inverses of rigid motions [..., 4, 4], exact up to rounding."""
    matrix = np.asarray(matrix, np.float64)
    out = np.zeros_like(matrix)
    turned = np.swapaxes(matrix[..., :3, :3], -1, -2)
    out[..., :3, :3] = turned
    out[..., :3, 3] = -(turned @ matrix[..., :3, 3, None])[..., 0]
    out[..., 3, 3] = 1.0
    return out


def check(matrix: Any, what: str, tolerance: float = 1e-4) -> np.ndarray:
    """Rigid motions as float64 [..., 4, 4].

    Args:
        matrix: The candidates.
        what: What they are, for the message.
        tolerance: Largest error of an entry of R^T R.

    Raises:
        UserError: Another shape, numbers that are not finite, a mirror, or a matrix that scales or shears.
    """
    found = np.asarray(matrix, np.float64)
    if found.shape[-2:] != (4, 4):
        raise UserError(f"{what} has shape {found.shape}; poses are [..., 4, 4]")
    flat = found.reshape(-1, 4, 4)
    for index, one in enumerate(flat):
        where = what if len(flat) == 1 else f"{what}, pose {index}"
        if not np.isfinite(one).all():
            raise UserError(f"{where} holds numbers that are not finite")
        r = one[:3, :3]
        if np.abs(r.T @ r - np.eye(3)).max() > tolerance or np.abs(one[3] - [0, 0, 0, 1]).max() > tolerance:
            raise UserError(f"{where} is no rigid motion (it scales or shears): {np.round(one, 4).tolist()}")
        if np.linalg.det(r) < 0:
            raise UserError(f"{where} is a mirror (its determinant is -1); flip one axis of the camera")
    return found
