"""Behaviour cloning of (recurrent) policies, one robot or a whole fleet in one batch.

Each robot learns from its own demonstrations only. The fleet's parameters are stacked
(:class:`fleetgym.agents.networks.PolicyStack`), so that N small networks cost about as much as one large one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fleetgym.agents.networks import PolicyStack, RecurrentPolicy, masked_mse
from fleetgym.core.demonstrations import Demonstrations, SequenceBatch
from fleetgym.core.errors import UserError
from fleetgym.core.seeding import torch_generator

# What goes through the networks at once, at most: weights that a processor's cache holds, and episodes of one policy.
_WEIGHTS, _EPISODES = 2_000_000, 40


@dataclass(frozen=True)
class SightBatch(SequenceBatch):
    """Sequences of pictures, or of clouds of points, with a few numbers beside them.

    Attributes:
        sights: [B, T, S, S, 3] uint8, the picture that belongs to each of the observations; or [B, T, 4, P] float32,
            the points.
    """

    sights: Tensor

    @classmethod
    def of(cls, demonstrations: Demonstrations) -> SightBatch:
        """All episodes of a dataset whose observations are mappings, padded to the longest.

        They map ``state`` to numbers, and either ``pixels`` to square pictures, which stay bytes, or ``points`` to
        clouds [4, P].

        Raises:
            UserError: The observations are something else.
        """
        spaces = getattr(demonstrations.observation_space, "spaces", {})
        key = "points" if "points" in spaces else "pixels"
        shape = getattr(spaces.get(key), "shape", None) or ()
        if key == "points":
            fine = len(shape) == 2 and shape[0] == 4
        else:
            fine = len(shape) == 3 and shape[0] == shape[1] and spaces[key].dtype == np.uint8
        if "state" not in spaces or not fine:
            raise UserError(
                f"the dataset has the observation space {demonstrations.observation_space}; a mapping of 'state' and "
                "'pixels', square pictures of uint8, or 'points', [4, P], is wanted"
            )
        plain = demonstrations.map(lambda e, _: replace(e, observations=e.observations["state"])).padded()
        sights = [torch.from_numpy(e.observations[key][: e.length]) for e in demonstrations]
        return cls(plain.observations, plain.actions, plain.mask, pad_sequence(sights, batch_first=True))

    @classmethod
    def concatenate(cls, batches: Sequence[SightBatch]) -> SightBatch:
        """See ``SequenceBatch.concatenate``; pictures or clouds of different sizes are refused, too."""
        plain = SequenceBatch.concatenate(batches)
        sizes = {tuple(batch.sights.shape[2:]) for batch in batches}
        if len(sizes) > 1:
            raise UserError(f"batches of different pictures {sorted(sizes)} do not concatenate")
        sights = pad_sequence([episode for batch in batches for episode in batch.sights], batch_first=True)
        return cls(plain.observations, plain.actions, plain.mask, sights)

    def to(self, device: Any) -> SightBatch:
        """The batch on another device."""
        plain = super().to(device)
        return SightBatch(plain.observations, plain.actions, plain.mask, self.sights.to(device))


def inputs(batch: SequenceBatch) -> tuple[Tensor, ...]:
    """What a policy is called with: the observations, and the pictures or points where there are some."""
    return (batch.observations, batch.sights) if isinstance(batch, SightBatch) else (batch.observations,)


@dataclass(frozen=True)
class ImitationConfig:
    """How behaviour cloning optimises.

    The loss is the mean squared error of the action over the real steps of whole episodes: a recurrent policy sees
    each episode from its beginning, as it will when it acts.
    """

    steps: int = 1000
    """Gradient steps in all; the learning rate falls along half a cosine over them."""
    batch_size: int = 8
    """Episodes a robot draws for each gradient step."""
    learning_rate: float = 2e-3
    """Adam's step size at the beginning."""
    final_learning_rate: float = 2e-5
    """Adam's step size at the end."""
    gradient_clip: float = 1.0
    """Largest norm of one robot's gradient."""
    proximal: float = 0.0
    """FedProx's mu: half of it times the squared distance to the weights last received is added to the loss."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: it must be positive")
        if not self.proximal >= 0:
            raise UserError(f"proximal={self.proximal}: it must not be negative")


class FleetLearner:
    """Trains N policies by behaviour cloning, each on its own demonstrations; after :meth:`share`, one for all.

    The episodes of gradient step s depend on (seed, s) alone, so a run that stops and resumes draws the same.

    Args:
        policies: One policy a robot, of one architecture; they are copied.
        demonstrations: One batch of padded episodes a robot ([E, T, Do] and so on; E and T may differ), with pictures
            for policies that see.
        config: Optimisation.
        seed: Seed of the draws.
        device: Where to train.

    Raises:
        UserError: Another number of policies than of demonstrations, sizes that do not fit the policy, or weights or
            data that are not finite.
    """

    def __init__(
        self,
        policies: Sequence[RecurrentPolicy],
        demonstrations: Sequence[SequenceBatch],
        config: ImitationConfig,
        *,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        if len(policies) != len(demonstrations):
            raise UserError(f"{len(policies)} policies for {len(demonstrations)} sets of demonstrations")
        self.config = config
        self.seed = seed
        self.device = device
        self.stack = PolicyStack(policies).to(device)
        wanted = (self.stack.config["observation_size"], self.stack.config["action_size"])
        for robot, batch in enumerate(demonstrations):
            found = (batch.observations.shape[-1], batch.actions.shape[-1])
            if found != wanted:
                raise UserError(
                    f"robot {robot}: demonstrations have observation and action size {found}, its policy has {wanted}"
                )
            if not len(batch.observations):
                raise UserError(f"robot {robot} has no demonstrations")
            seen = tuple(batch.sights.shape[2:]) if isinstance(batch, SightBatch) else None
            if seen != policies[0].sight_shape:
                raise UserError(
                    f"robot {robot}: demonstrations have pictures (or points) of shape {seen}, its policy takes "
                    f"{policies[0].sight_shape}"
                )
        for name, value in self.stack.state_dict().items():
            if not torch.isfinite(value).all():
                bad = int(torch.nonzero(~torch.isfinite(value.flatten(1)).all(1))[0])
                raise UserError(f"robot {bad}: weights {name.replace('/', '.')!r} are not finite")
        self.inputs = tuple(self._stacked(parts).to(device) for parts in zip(*map(inputs, demonstrations)))
        self.actions, self.mask = (
            self._stacked([getattr(batch, field) for batch in demonstrations]).to(device)
            for field in ("actions", "mask")
        )
        if not (torch.isfinite(self.inputs[0]).all() and torch.isfinite(self.actions).all()):
            raise UserError("the demonstrations hold values that are not finite")
        self.episodes = torch.tensor([len(batch.observations) for batch in demonstrations])
        self.optimizer = torch.optim.Adam(self.stack.parameters(), lr=config.learning_rate, foreach=True)
        self.step_count = 0
        self.received: dict[str, Tensor] = {}
        """The weights that training is held near to, with ``proximal``."""

    @staticmethod
    def _stacked(tensors: Sequence[Tensor]) -> Tensor:
        """Pads the episode and time axes to the largest, and stacks: N of [E, T, ...] -> [N, E, T, ...]."""
        tensors = [torch.as_tensor(tensor) for tensor in tensors]
        shape = [len(tensors), max(len(t) for t in tensors), max(t.shape[1] for t in tensors), *tensors[0].shape[2:]]
        out = torch.zeros(shape, dtype=tensors[0].dtype)
        for robot, tensor in enumerate(tensors):
            out[robot, : len(tensor), : tensor.shape[1]] = tensor
        return out

    def learning_rate(self, step: int) -> float:
        """Half a cosine from ``learning_rate`` to ``final_learning_rate``."""
        share = min(step / self.config.steps, 1.0)
        low, high = self.config.final_learning_rate, self.config.learning_rate
        return low + 0.5 * (high - low) * (1 + float(np.cos(np.pi * share)))

    def _draw(self) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Inputs, actions and mask of the next step's episodes: [N, B, T, ...] each, T cut to the longest drawn."""
        robots = len(self.episodes)
        rng = torch_generator("imitation", self.seed, self.step_count)
        uniform = torch.rand((robots, self.config.batch_size), generator=rng)
        index = (uniform * self.episodes[:, None]).long().to(self.device)
        rows = torch.arange(robots, device=self.device)[:, None]
        mask = self.mask[rows, index]
        longest = int(mask.sum(-1).max())
        drawn = tuple(tensor[rows, index, :longest] for tensor in self.inputs)
        return drawn, self.actions[rows, index, :longest], mask[..., :longest]

    def train(self, steps: int) -> Tensor:
        """Takes gradient steps.

        Args:
            steps: How many.

        Returns:
            The last step's loss of each robot, [N].

        Raises:
            UserError: The loss is not finite any more.
        """
        loss = torch.zeros(len(self.episodes))
        for _ in range(steps):
            draw = self._draw()
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(self.step_count)
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._backward(*draw)
            self._hold()
            self._clip()
            self.optimizer.step()
            self.step_count += 1
        if not torch.isfinite(loss).all():
            bad = torch.nonzero(~torch.isfinite(loss)).flatten().tolist()
            raise UserError(f"the loss of robot(s) {bad} is not finite at step {self.step_count}; lower learning_rate")
        return loss.detach().cpu()

    def _backward(self, drawn: tuple[Tensor, ...], actions: Tensor, mask: Tensor) -> Tensor:
        """Adds the gradient of a draw, tensors [N, B, T, ...], to the parameters; returns each robot's loss, [N]."""
        robots, batch = mask.shape[:2]
        if len(self.stack) < robots or len(self.stack) == 1 and batch > _EPISODES:
            return self._backward_together(drawn, actions, mask)
        size = sum(value[0].numel() for value in self.stack.parameters())
        at_once = max(1, _WEIGHTS // size)
        losses = []
        for first in range(0, robots, at_once):
            rows = slice(first, first + at_once)
            longest = int(mask[rows].sum(-1).max())
            own = [tensor[rows, :, :longest] for tensor in drawn]
            prediction = self.stack(*own, rows=rows if at_once < robots else None)
            loss = masked_mse(prediction, actions[rows, :, :longest], mask[rows, :, :longest])
            # The sum keeps robots apart: each one's gradient is that of its own loss.
            loss.sum().backward()
            losses.append(loss.detach())
        return torch.cat(losses)

    def _backward_together(self, drawn: tuple[Tensor, ...], actions: Tensor, mask: Tensor) -> Tensor:
        """``_backward`` where all share one policy: the gradient is that of the mean of the robots' losses."""
        robots, batch = mask.shape[:2]
        *drawn, actions, mask = (tensor.flatten(0, 1) for tensor in (*drawn, actions, mask))
        lengths = mask.sum(-1)
        # Episodes of about one length go together, whosesoever they are: little is computed beyond an episode's end.
        longest_first = torch.argsort(lengths, descending=True, stable=True)
        owner = torch.arange(robots, device=mask.device).repeat_interleave(batch)
        weight = 1 / lengths.view(robots, batch).sum(-1).clamp(min=1)
        losses = torch.zeros(robots, device=mask.device)
        for rows in longest_first.tensor_split(-(-len(mask) // _EPISODES)):
            longest = int(lengths[rows].max())
            prediction = self.stack(*(tensor[rows, :longest][None] for tensor in drawn))[0]
            error = (prediction - actions[rows, :longest]).square().mean(-1) * mask[rows, :longest]
            share = error.sum(-1) * weight[owner[rows]]
            (share.sum() / robots).backward()
            losses.index_add_(0, owner[rows], share.detach())
        return losses

    def receive(self, state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes weights from the server: one state dict a robot, or one for all.

        With ``proximal`` the robots are held near to them from now on (Li et al., "Federated Optimization in
        Heterogeneous Networks", MLSys 2020, equation 2: FedProx).
        """
        self.stack.load(state_dicts)
        if self.config.proximal:
            self.received = {name: p.detach().clone() for name, p in self.stack.named_parameters()}

    @torch.no_grad()
    def _hold(self) -> None:
        """Adds the gradient of the proximal term."""
        for name, parameter in self.stack.named_parameters() if self.received else ():
            if parameter.grad is not None:
                parameter.grad.add_(parameter - self.received[name], alpha=self.config.proximal)

    @torch.no_grad()
    def _clip(self) -> None:
        """Clips each robot's gradient by its own norm."""
        gradients = [p.grad for p in self.stack.parameters() if p.grad is not None]
        norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        scale = (self.config.gradient_clip / norm.clamp(min=1e-12)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))

    def share(self, policy: RecurrentPolicy) -> None:
        """From now on the robots train one common policy, and Adam, with fresh moments, runs at their server.

        A gradient step is then a round of federated SGD (McMahan et al., AISTATS 2017; Adam at the server: Reddi et
        al., ICLR 2021): each robot sends the gradient of its own loss at the common weights, and Adam steps along the
        mean, clipped by its norm. That mean is the gradient of the mean loss and is computed as such, in a few passes.

        Args:
            policy: Where training goes on from; it is copied.

        Raises:
            UserError: It has another configuration than the robots' policies.
        """
        if policy.config != self.stack.config:
            raise UserError(f"policy of configuration {policy.config}, the robots' have {self.stack.config}")
        self.stack = PolicyStack([policy]).to(self.device)
        self.received = {}
        self.optimizer = torch.optim.Adam(self.stack.parameters(), lr=self.config.learning_rate, foreach=True)

    def forget_moments(self) -> None:
        """Resets Adam, whose moments belong to the weights from before a merge."""
        self.optimizer.state.clear()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that training goes on from: tensors, and JSON-able values."""
        tensors = {f"weights/{name}": value for name, value in self.stack.state_dict().items()}
        names = [name for name, _ in self.stack.named_parameters()]
        for name, parameter in zip(names, self.stack.parameters()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam/{key}/{name}"] = value
        tensors |= {f"received/{name}": value for name, value in self.received.items()}
        return tensors, {"step": self.step_count}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Puts back what ``state`` gave."""
        weights = {name[len("weights/") :]: value for name, value in tensors.items() if name.startswith("weights/")}
        self.stack.load_state_dict(weights)
        self.optimizer.state.clear()
        for name, parameter in self.stack.named_parameters():
            moments = {
                key: tensors[f"adam/{key}/{name}"].clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adam/{key}/{name}" in tensors
            }
            if moments:
                # Adam counts its steps on the CPU whatever the device of the weights.
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
                }
        self.received = {
            name: tensors[f"received/{name}"].to(parameter.device).clone()
            for name, parameter in self.stack.named_parameters()
            if f"received/{name}" in tensors
        }
        self.step_count = int(meta["step"])
