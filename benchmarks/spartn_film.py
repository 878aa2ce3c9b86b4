"""A film of a policy that is pushed on its way: from outside, from the palm, and as a field of the scene shows it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from fleetgym.core.checkpoint import Checkpoint
from fleetgym.core.errors import UserError
from fleetgym.core.policy import Policy
from fleetgym.core.run import find_checkpoint
from fleetgym.envs import suite
from fleetgym.envs.grasping.names import HORIZON

SIZE = 240
"""Height of a frame, pixels."""
PAUSE = 4
"""Frames for which the film lingers at a push and at the end."""
_PUSHED = np.array([200, 30, 30], np.uint8)
_BORDER = 5


def load_policy(name: str | os.PathLike, task: str) -> tuple[Policy, dict[str, Any]]:
    """A policy to film, and the options of the environment that it sees.

    Args:
        name: ``"expert"``, or the folder of a checkpoint or of a run that has one.
        task: Whose expert.

    Raises:
        UserError: There is no checkpoint, or it holds something else than a policy that sees a picture.
    """
    if str(name) == "expert":
        # The expert is done after 20 steps; policies are given as many again.
        return suite("grasping").expert(task), {"observation": ("rgb",), "horizon": HORIZON}
    checkpoint = Checkpoint.load(find_checkpoint(name))
    if checkpoint.architecture != "visual_policy":
        raise UserError(f"{name} holds a {checkpoint.architecture}; a visual_policy, or expert, can be filmed here")
    policy = checkpoint.module()
    keys = ("rgb", "depth") if policy.config["depth"] else ("rgb",)
    return policy, {"observation": keys, "image_size": policy.config["image_size"]}


def film(
    policy: Policy, make: Callable[..., gym.Env], seed: int, *, views: int = 64, iterations: int = 120
) -> tuple[list[np.ndarray], bool]:
    """Films one episode; the field is fitted to pictures of its scene before.

    Args:
        policy: Acts on what the simulator's camera sees.
        make: ``make(render_mode=, render_size=)`` makes a ``Grasping/...-v0`` with a disturbance.
        seed: Of the episode.
        views: Pictures that the field is fitted to.
        iterations: Of its fit.

    Returns:
        Frames [240, 440, 3], red-rimmed where the hand was pushed, and whether the object was lifted.
    """
    from fleetgym.envs.fields import fit
    from fleetgym.envs.fields.captures import Intrinsics
    from fleetgym.envs.grasping.nerf import capture_episode, scaled
    from fleetgym.envs.grasping.poses import FOV, HAND_EYE

    env = make(render_mode="rgb_array", render_size=(SIZE, 4 * SIZE // 3))
    world = env.unwrapped
    frames: list[np.ndarray] = []
    try:
        size = world.image_size
        capture = capture_episode(seed, world.family, objects=world.objects, image_size=size, views=views)
        if hasattr(policy, "attach"):
            policy.attach(env)
        observation, _ = env.reset(seed=seed)
        fields = fit("voxel", [capture], centre=world.sim.object_pose()[:3, 3], iterations=iterations)
        lens = Intrinsics.from_fov(FOV, size, size)

        def frame(observation: Any, pushed: bool) -> np.ndarray:
            drawn = fields.render((observation["pose"] @ HAND_EYE)[None], intrinsics=lens)[0, 0]
            drawn = np.where(world.gripper_mask[..., None], world.gripper_picture, drawn)
            beside = np.concatenate([scaled(observation["rgb"], SIZE // 2), scaled(drawn, SIZE // 2)])
            picture = np.concatenate([env.render(), beside], 1)
            if pushed:
                picture[:_BORDER] = picture[-_BORDER:] = picture[:, :_BORDER] = picture[:, -_BORDER:] = _PUSHED
            return picture

        frames += [frame(observation, False)] * PAUSE
        over, state, info = False, None, {}
        while not over:
            batch = {key: np.asarray(value)[None] for key, value in observation.items()}
            action, state = policy.predict(batch, state, np.array([len(frames) == PAUSE]), True)
            observation, _, over, _, info = env.step(np.clip(action[0], -1, 1))
            frames += [frame(observation, info["knocked"])] * (PAUSE if info["knocked"] or over else 1)
        return frames, bool(info["success"])
    finally:
        env.close()


def make(task: str, objects: Any = "all", **options: Any) -> Callable[..., gym.Env]:
    """What :func:`film` takes: a disturbed world, of 40 steps unless ``options`` of its environment say otherwise."""
    options = {"objects": objects, "disturbance": "knocks", "horizon": 2 * HORIZON, **options}
    return functools.partial(suite("grasping").make, task, **options)
