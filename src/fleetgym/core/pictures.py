"""What is measured of pictures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fleetgym.core.errors import UserError


def psnr(pictures: Any, truth: Any, where: Any = None, most: float = math.inf) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pictures; ``most`` where they are equal.

    Args:
        pictures: [..., 3] uint8.
        truth: The same shape.
        where: Booleans that broadcast to [...]: the pixels that count; None for all.
        most: Not more than this is returned; JSON has no infinity.

    Raises:
        UserError: No pixel counts.
    """
    error = (np.asarray(pictures, np.float64) - np.asarray(truth, np.float64)) / 255
    error = error if where is None else error[np.broadcast_to(where, error.shape[:-1])]
    if not error.size:
        raise UserError("no pixel counts; a PSNR needs one")
    mean = float(np.mean(error**2))
    return min(most, -10 * math.log10(mean)) if mean else most
