"""Stable-Baselines3 beside fleetgym.

Its models are policies already: ``rollout``, ``evaluate`` and ``collect`` take them as they are, and its
``evaluate_policy`` takes ours (see :class:`fleetgym.core.Policy`). What is here opens a model for those who work on
weights. Models are loaded by Stable-Baselines3 itself (its ``.zip`` files hold pickles, which fleetgym never opens).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fleetgym.core.errors import UserError


class Rescale(nn.Module):
    """Maps actions in [-1, 1] to [low, high]; it has buffers, and nothing to train.

    Args:
        low: Lower bounds, [Da].
        high: Upper bounds, [Da].
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", (high - low) / 2)
        self.register_buffer("centre", (high + low) / 2)

    def forward(self, x: Tensor) -> Tensor:  # [B, Da] -> [B, Da]
        """Applies the map."""
        return x * self.scale + self.centre


def actor(model: Any) -> nn.Sequential:
    """The deterministic actor of a PPO, A2C, SAC or TD3 model (DDPG and TQC likewise) as one plain ``Sequential``.

    Its parameters *are* the model's: ``actor(model).load_state_dict(merged)`` puts merged weights back into it.
    ``WeightSpec.from_module`` and ``merge`` take it like any other module::

        merged = merge("fleet_merge", [actor(model_a), actor(model_b)])
        actor(model_a).load_state_dict(merged.weights)

    Args:
        model: An SB3 or sb3-contrib algorithm with an MLP policy on vector observations.

    Returns:
        Maps observations [B, Do] to what ``model.predict(..., deterministic=True)`` gives before it clips: actions
        [B, Da], or the logits of discrete actions (``predict`` takes their maximum).

    Raises:
        UserError: The model is of another kind.
    """
    from gymnasium import spaces
    from stable_baselines3.common.torch_layers import FlattenExtractor

    name = type(model).__name__
    policy = getattr(model, "policy", None)
    if policy is None:
        raise UserError(f"a {name} is no model of Stable-Baselines3: it lacks .policy")
    space = policy.observation_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise UserError(f"{name} has the observation space {space}; only vectors (a one-dimensional Box) are supported")
    part = getattr(policy, "actor", None) or policy
    if hasattr(part, "lstm_actor"):
        raise UserError(f"{name} has a recurrent policy; only 'MlpPolicy' is supported")
    if hasattr(part, "mlp_extractor"):  # PPO, A2C, TRPO
        if not isinstance(policy.action_space, (spaces.Box, spaces.Discrete)):
            raise UserError(f"{name} has the action space {policy.action_space}; only Box and Discrete are supported")
        layers = [part.mlp_extractor.policy_net, part.action_net]
        squashed = policy.squash_output
        if squashed:
            layers.append(nn.Tanh())
    elif hasattr(part, "latent_pi"):  # SAC, TQC
        layers = [part.latent_pi, part.mu, nn.Tanh()]
        squashed = True
    elif isinstance(getattr(part, "mu", None), nn.Sequential):  # TD3, DDPG
        layers, squashed = [part.mu], True
    else:
        raise UserError(f"{name} has no actor network; PPO, A2C, SAC and TD3 with 'MlpPolicy' are supported")
    extractor = getattr(part, "pi_features_extractor", None) or getattr(part, "features_extractor", None)
    if not isinstance(extractor, FlattenExtractor):
        raise UserError(f"{name} extracts features by a {type(extractor).__name__}; only 'MlpPolicy' is supported")
    flat = [
        layer for module in layers for layer in (module.children() if isinstance(module, nn.Sequential) else [module])
    ]
    if squashed:
        low, high = (
            torch.as_tensor(x, device=model.device) for x in (policy.action_space.low, policy.action_space.high)
        )
        if not (torch.all(low == -1) and torch.all(high == 1)):
            flat.append(Rescale(low, high))
    return nn.Sequential(*flat)
