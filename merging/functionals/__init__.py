"""Networks whose input is the weights of other networks.

A :class:`WeightBatch` holds the weights of B networks of one architecture as one tensor; every layer takes and gives
one, and is equivariant to the symmetry that a :class:`fleetgym.core.WeightSpec` describes. The papers are those of
Zhou et al. on permutation equivariant neural functionals (arXiv 2302.14040), neural functional transformers
(arXiv 2305.13546) and universal neural functionals (arXiv 2402.05232).
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "FlatMLP": "models",
    "FourierFeatures": "encodings",
    "IOEncoding": "encodings",
    "Layout": "layout",
    "LayerEncoding": "encodings",
    "LearnedEncoding": "encodings",
    "NFAttention": "attention",
    "NFLinear": "linear",
    "NFN": "models",
    "NFBlock": "norm",
    "NFNorm": "norm",
    "NFPool": "pool",
    "NFT": "models",
    "NFTBlock": "models",
    "Part": "layout",
    "ProbeEncoder": "models",
    "QueryPool": "pool",
    "Signs": "augment",
    "StatNN": "models",
    "UNF": "models",
    "UNFLinear": "linear",
    "WeightBatch": "batch",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"fleetgym.merging.functionals.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fleetgym.merging.functionals' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
