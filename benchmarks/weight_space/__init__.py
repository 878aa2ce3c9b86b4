"""What networks that read networks are good for, measured: ``fleetgym bench nfn``, ``nft`` and ``unf``.

The three commands are one harness with different tasks; each task is a frozen dataclass of settings in :data:`TASKS`.
"""

from __future__ import annotations

from typing import Any

from fleetgym.core.registry import Registry

TASKS: Registry[Any] = Registry("weight-space task", group="fleetgym.weight_space")
"""Name -> :class:`~fleetgym.benchmarks.weight_space.task.Task`, a dataclass of settings."""
for _name, _home in {
    "cnn": "cnn:CNN",
    "contrast": "editing:Contrast",
    "dilate": "editing:Dilate",
    "gru_policy": "policies:GRUPolicy",
    "inr_copies": "inr:Copies",
    "inr_independent": "inr:Independent",
    "inr_shared": "inr:Shared",
    "meta_world_policy": "policies:MetaWorldPolicy",
    "optimizer_cnn": "optimizers:OptimizerCNN",
    "optimizer_mlp": "optimizers:OptimizerMLP",
    "optimizer_policy": "optimizers:OptimizerPolicy",
    "optimizer_rnn": "optimizers:OptimizerRNN",
    "optimizer_transformer": "optimizers:OptimizerTransformer",
    "policy": "policies:Policy",
    "rnn": "rnn:RNN",
    "tickets": "tickets:Tickets",
}.items():
    TASKS.register(_name, f"fleetgym.benchmarks.weight_space.{_home}")

BENCHES: dict[str, tuple[str, ...]] = {
    "nfn": ("policy", "meta_world_policy", "cnn", "inr_independent", "inr_shared", "dilate", "contrast", "tickets"),
    "nft": ("inr_copies",),
    "unf": (
        "gru_policy",
        "rnn",
        "optimizer_mlp",
        "optimizer_cnn",
        "optimizer_rnn",
        "optimizer_transformer",
        "optimizer_policy",
    ),
}
"""The tasks of each command, unless others are asked for."""

ABOUT: dict[str, str] = {
    "nfn": "Permutation equivariant neural functionals",
    "nft": "Neural functional transformers and Inr2Array",
    "unf": "Universal neural functionals and learned optimizers",
}
"""What each command is about; the title of its page."""
