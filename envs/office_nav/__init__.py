"""OfficeNav: an office building with a floor plan on the wall that an agent must learn to read.

Source: E. Z. Liu, S. Suri, T. Mu, A. Zhou, C. Finn, "Simple Embodied Language Learning as a Byproduct of
Meta-Reinforcement Learning", ICML 2023 (arXiv 2306.08400). Geometry, colours, rewards and grammar are those of the
released environment, whose mistakes only ``OfficeNav-Released-v0`` keeps.

Importing this package compiles nothing and does not import torch.
"""

import importlib

_WHERE = {
    "OfficeNavEnv": "env",
    "OfficeNavVectorEnv": "vector",
    "TorchOfficeNav": "torch_env",
    "VARIANTS": "variants",
    "Variant": "variants",
}

__all__ = ["VARIANTS", "OfficeNavEnv", "OfficeNavVectorEnv", "TorchOfficeNav", "Variant"]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
