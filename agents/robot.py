"""One robot of a fleet that merges across machines: its demonstrations, its learner, and what it keeps on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from gymnasium import spaces
from torch import Tensor

from fleetgym.agents.imitation import FleetLearner, ImitationConfig
from fleetgym.agents.networks import RecurrentPolicy, features
from fleetgym.core.demonstrations import Demonstrations, SequenceBatch, Statistics
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import read_json, write_json
from fleetgym.core.seeding import seed_everything

if TYPE_CHECKING:
    from fleetgym.core.run import Run

IDENTITY = "identity.json"


class CloningRobot:
    """A robot that clones its own demonstrations whenever the fleet's server asks for it.

    It keeps Adam's moments between rounds, but for those from before the first merge, which belong to other weights.
    Initial weights and the episodes of each gradient step depend on the plan's seed, the robot's name and the number
    of the step alone, and its state is saved before a reply is sent: a robot that is killed and started again, or is
    asked for a round twice, gives the same bytes.

    Args:
        name: Its name in the fleet.
        demonstrations: Its own.
        run: The folder of its state.
        task: Which of the fleet's tasks it does, for a fleet whose policy sees a one-hot of the task; by default what
            the demonstrations note.
        device: Where to train.

    Raises:
        UserError: Demonstrations that are not vectors.
    """

    def __init__(
        self, name: str, demonstrations: Demonstrations, run: Run, *, task: str | None = None, device: str = "cpu"
    ) -> None:
        for kind in ("observation", "action"):
            space = getattr(demonstrations, f"{kind}_space")
            if not isinstance(space, spaces.Box) or len(space.shape) != 1:
                raise UserError(
                    f"robots clone vectors from vectors; the {kind} space of these demonstrations is {space}"
                )
        self.name, self.run, self.device = name, run, device
        self.batch = demonstrations.padded()
        noted = {str(part.get("task", "")) for part in demonstrations.info.get("parts", ())}
        self.task = task or (noted.pop() if len(noted) == 1 else "")
        file = run.path / IDENTITY
        if not file.exists():
            write_json(file, {"identity": secrets.token_hex(16)})
        self.identity = str(read_json(file)["identity"])
        self.finished = False
        self._learner: FleetLearner | None = None
        self._plan: dict[str, Any] = {}
        self._done: dict[str, Any] = {}  # the last round: number, key of the order, loss

    def _data(self, plan: Mapping[str, Any]) -> SequenceBatch:
        """The demonstrations as the fleet's policy sees them: with a one-hot of the task, if it has tasks."""
        tasks = list(plan.get("tasks") or ())
        if not tasks:
            return self.batch
        if self.task not in tasks:
            raise unknown("task of this fleet", self.task, tasks)
        one_hot = torch.zeros(*self.batch.mask.shape, len(tasks))
        one_hot[..., tasks.index(self.task)] = self.batch.mask.float()
        return dataclasses.replace(self.batch, observations=torch.cat([self.batch.observations, one_hot], -1))

    def describe(self, plan: Mapping[str, Any]) -> tuple[dict[str, int], Statistics]:
        """Sizes, and statistics of the policy's features over the real steps.

        Raises:
            UserError: A task that the fleet does not have, or a policy that these observations do not fit.
        """
        batch = self._data(plan)
        sizes = {"observation_size": batch.observations.shape[-1], "action_size": batch.actions.shape[-1]}
        differences = plan["policy"].get("differences", ())
        RecurrentPolicy(**sizes, **plan["policy"])  # says what does not fit
        values = features(batch.observations[batch.mask].double(), differences).numpy()
        return sizes, Statistics.of(values, floor=1e-3)

    def _prepare(self, order: Any) -> FleetLearner:
        """The learner for an order's plan, in the state that the last round has left."""
        plan = order.plan
        anew = order.weights is None and self._done and self._done["key"] != order.key  # the fleet began again
        if self._learner is not None and self._plan == plan and not anew:
            return self._learner
        # One number for this robot's initial weights and draws, whatever other robots there are.
        seed = int.from_bytes(hashlib.blake2b(f"{plan['seed']}/{self.name}".encode(), digest_size=4).digest(), "big")
        seed_everything(seed)
        batch = self._data(plan)
        policy = RecurrentPolicy(batch.observations.shape[-1], batch.actions.shape[-1], **plan["policy"])
        policy.normaliser.mean.copy_(order.normaliser["mean"])
        policy.normaliser.std.copy_(order.normaliser["std"])
        steps = plan["warmup"] + plan["rounds"] * plan["local_steps"]
        config = ImitationConfig(steps=steps, **plan["imitation"])
        learner = FleetLearner([policy], [batch], config, seed=seed, device=self.device)
        saved, self._done = self.run.load_state(), {}
        if saved is not None and saved[2]["plan"] == plan:
            done = saved[2]["done"]
            if order.weights is not None or done["key"] == order.key:
                learner.load_state(saved[1], saved[2]["learner"])
                self._done = done
        self._learner, self._plan = learner, plan
        return learner

    def _parameters(self) -> dict[str, Tensor]:
        state = self._learner.stack.state_dicts()[0]
        return {name: state[name].cpu() for name, _ in self._learner.stack.policies()[0].named_parameters()}

    def train(self, order: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Takes the gradient steps of an order.

        Args:
            order: A :class:`fleetgym.merging.federated.Order`.

        Returns:
            The parameters after them, and the last loss.

        Raises:
            UserError: The weights do not fit, or the training diverged.
        """
        learner = self._prepare(order)
        if self._done.get("key") == order.key:
            return self._parameters(), {"loss": self._done["loss"]}
        try:
            if order.weights is not None:
                normaliser = {f"normaliser.{name}": value for name, value in order.normaliser.items()}
                learner.receive([{**normaliser, **order.weights}])
                if self._done.get("round", 0) == 0:
                    learner.forget_moments()
            learner.step_count = order.step
            loss = float(learner.train(order.steps)[0])
        except BaseException:
            self._learner = None  # the next order begins from what was saved
            raise
        self._done = {"round": order.number, "key": order.key, "loss": loss}
        tensors, meta = learner.state()
        self.run.log(learner.step_count, loss=loss)
        self.run.save_state(learner.step_count, tensors, {"plan": order.plan, "learner": meta, "done": self._done})
        return self._parameters(), {"loss": loss}

    def finish(self, order: Any) -> None:
        """Writes the fleet's last policy as the checkpoint ``last``."""
        sizes = {name: order.plan[name] for name in ("observation_size", "action_size")}
        policy = RecurrentPolicy(**sizes, **order.plan["policy"])
        normaliser = {f"normaliser.{name}": value for name, value in order.normaliser.items()}
        policy.load_state_dict({**normaliser, **(order.weights or {})})
        info = {"task_set": list(order.plan["tasks"])} if order.plan.get("tasks") else {}
        self.run.save_checkpoint("last", policy, info=info)
        self.finished = True
