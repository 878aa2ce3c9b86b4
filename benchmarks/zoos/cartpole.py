"""Zoos of cart-pole policies, cloned from a scripted expert; what is measured is how often they keep the pole up.

The physics is Gymnasium's CartPole-v1 for a batch of carts. Each policy has a teacher, demonstrations and optimisation
of its own: how many episodes it saw, how often the teacher erred, how hard the teacher pulls to the centre, learning
rate and steps are drawn at random, and its success varies with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fleetgym.agents.networks import PolicyStack, RecurrentPolicy
from fleetgym.benchmarks.zoos.stacked import fan_in_uniform, linear, log_uniform, train
from fleetgym.benchmarks.zoos.zoo import Part, chunk
from fleetgym.core.errors import UserError
from fleetgym.core.seeding import torch_generator

# As in gymnasium.envs.classic_control.cartpole: metres, radians, kilograms, newtons, seconds.
GRAVITY, CART, POLE, HALF_LENGTH, FORCE, TIME_STEP = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
MAX_POSITION, MAX_ANGLE = 2.4, 12 * 2 * math.pi / 360
#: What an observation is divided by, and the largest start of a demonstration: position, velocity, angle, its rate.
SCALE = (1.2, 1.0, 0.1, 1.0)
#: The expert pushes right where this times the state is positive; ``gain`` multiplies the first two.
EXPERT = (0.05, 0.1, 1.0, 0.25)
_AT_ONCE = 250


def cart_pole_step(state: Tensor, right: Tensor) -> Tensor:
    """One step of CartPole-v1 (explicit Euler, 0.02 s).

    Args:
        state: [..., 4]: position, velocity, angle, angular rate.
        right: Bool [...]: whether the force of 10 N points to the right.

    Returns:
        The next state, [..., 4].
    """
    x, x_rate, angle, rate = state.unbind(-1)
    total = CART + POLE
    sine, cosine = torch.sin(angle), torch.cos(angle)
    push = (torch.where(right, FORCE, -FORCE).to(state.dtype) + POLE * HALF_LENGTH * rate * rate * sine) / total
    turn = (GRAVITY * sine - cosine * push) / (HALF_LENGTH * (4 / 3 - POLE * cosine * cosine / total))
    pull = push - POLE * HALF_LENGTH * turn * cosine / total
    return torch.stack(
        [x + TIME_STEP * x_rate, x_rate + TIME_STEP * pull, angle + TIME_STEP * rate, rate + TIME_STEP * turn], -1
    )


def failed(state: Tensor) -> Tensor:
    """Whether the cart has left the track or the pole leans too far; [..., 4] -> bool [...]."""
    return (state[..., 0].abs() > MAX_POSITION) | (state[..., 2].abs() > MAX_ANGLE)


def starts(rng: torch.Generator, *shape: int) -> Tensor:
    """States uniform within :data:`SCALE`, [*shape, 4]."""
    return (2 * torch.rand((*shape, 4), generator=rng) - 1) * torch.tensor(SCALE)


@dataclass(frozen=True)
class CartPole:
    """Feed-forward policies 4-H-H-1 with tanh; they push right where the output is positive.

    Attributes:
        policies: N.
        hidden: H.
        demonstrations: Fewest and most episodes of the teacher; log-uniform.
        noise: Least and largest share of the teacher's actions that are the wrong one; uniform.
        gain: Bounds of the factor on the expert's first two gains; log-uniform. Below 1 the cart drifts, far above 1
            the pole falls.
        learning_rate: Bounds; log-uniform.
        steps: Bounds of the number of gradient steps; log-uniform.
        batch: Steps of the demonstrations in a gradient step.
        length: Steps of a demonstration.
        episodes: Evaluation episodes a policy; all policies have the same starts.
        horizon: Steps that a policy must last.
        spread: Evaluation starts are within this share of those of the demonstrations.
        seed: Of everything.
        shares: Of train, val and test.

    Raises:
        UserError: A number below one, or bounds that are not rising and positive.
    """

    name: ClassVar[str] = "cartpole"
    version: ClassVar[int] = 1
    policies: int = 3000
    hidden: int = 16
    demonstrations: tuple[int, int] = (1, 24)
    noise: tuple[float, float] = (0.0, 0.3)
    gain: tuple[float, float] = (0.05, 4.0)
    learning_rate: tuple[float, float] = (3e-3, 3e-2)
    steps: tuple[int, int] = (30, 300)
    batch: int = 64
    length: int = 50
    episodes: int = 24
    horizon: int = 250
    spread: float = 0.7
    seed: int = 0
    shares: tuple[float, float, float] = (2 / 3, 2 / 15, 1 / 5)

    def __post_init__(self) -> None:
        for name in ("policies", "hidden", "batch", "length", "episodes", "horizon"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")
        for name in ("demonstrations", "gain", "learning_rate", "steps", "noise"):
            low, high = getattr(self, name)
            if not (0 <= low <= high if name == "noise" else 0 < low <= high) or name == "noise" and high > 0.5:
                what = "within 0 and 0.5" if name == "noise" else "positive"
                raise UserError(f"{name}={(low, high)}: give the lower and the upper bound, {what}")
        if not self.spread > 0:
            raise UserError(f"spread={self.spread}: it must be positive")

    def network(self) -> tuple[str, dict[str, Any]]:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        return "mlp", {"sizes": [4, self.hidden, self.hidden, 1], "activation": "tanh"}

    def parts(self) -> int:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        return -(-self.policies // _AT_ONCE)

    def part(self, number: int, device: str) -> Part:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        rng = torch_generator("zoo", self.name, self.seed, number)
        settings = self._settings(len(chunk(self.policies, _AT_ONCE, number)), rng)
        observations, actions, mask = (tensor.to(device) for tensor in self._demonstrations(settings, rng))
        settings = {name: value.to(device) for name, value in settings.items()}
        weights = {name: value.to(device) for name, value in self._initial(len(mask), rng).items()}
        loss = self._loss(observations, actions, mask, settings["demonstrations"], rng)
        options = {name: settings[name] for name in ("steps", "learning_rate")}
        train(weights, loss, **options)
        alive, lasted = self.evaluate(weights)
        targets = {"success": alive.float().mean(1), "survival": lasted.mean(1) / self.horizon, **settings}
        return Part({name.replace("/", "."): value for name, value in weights.items()}, targets)

    def _settings(self, number: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Each policy's own settings, [N] each, the longest training first."""
        low, high = self.demonstrations
        return {
            "steps": log_uniform(*self.steps, number, rng=rng).round().sort(descending=True).values,
            "learning_rate": log_uniform(*self.learning_rate, number, rng=rng),
            "demonstrations": log_uniform(low, high + 0.999, number, rng=rng).floor(),
            "gain": log_uniform(*self.gain, number, rng=rng),
            "noise": self.noise[0] + (self.noise[1] - self.noise[0]) * torch.rand(number, generator=rng),
        }

    def _demonstrations(self, settings: Mapping[str, Tensor], rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Episodes of the teachers: scaled states [N, D, T, 4], whether they pushed right [N, D, T], and the mask.

        An episode goes on after a failure, but its mask is 0 there.
        """
        number, most = len(settings["gain"]), int(settings["demonstrations"].max())
        gains = torch.tensor(EXPERT).repeat(number, 1)
        gains[:, :2] *= settings["gain"][:, None]
        state = starts(rng, number, most)
        alive = torch.ones(number, most, dtype=torch.bool)
        states, actions, mask = [], [], []
        for _ in range(self.length):
            errs = torch.rand(number, most, generator=rng) < settings["noise"][:, None]
            right = (torch.einsum("ndk,nk->nd", state, gains) > 0) ^ errs
            states.append(state)
            actions.append(right)
            mask.append(alive)
            state = cart_pole_step(state, right)
            alive = alive & ~failed(state)
        scaled = torch.stack(states, 2) / torch.tensor(SCALE)
        return scaled, torch.stack(actions, 2).float(), torch.stack(mask, 2).float()

    def _initial(self, number: int, rng: torch.Generator) -> dict[str, Tensor]:
        sizes = self.network()[1]["sizes"]
        shapes = {}
        for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
            shapes |= {f"layers.{i}.weight": (outputs, inputs), f"layers.{i}.bias": (outputs,)}
        return fan_in_uniform(shapes, number, rng)

    def _loss(
        self, observations: Tensor, actions: Tensor, mask: Tensor, episodes: Tensor, rng: torch.Generator
    ) -> Callable[[Mapping[str, Tensor], int, int], Tensor]:
        """Cross-entropy of the teacher's action in random draws from a policy's own episodes."""
        observations, actions, mask = (tensor.flatten(1, 2) for tensor in (observations, actions, mask))
        rows = torch.arange(len(actions), device=actions.device)[:, None]

        def loss(weights: Mapping[str, Tensor], count: int, step: int) -> Tensor:
            uniform = torch.rand(count, self.batch, generator=rng).to(actions.device)
            index = (uniform * (episodes[:count, None] * self.length)).long()
            logits = _feed_forward(weights, observations[rows[:count], index])
            return _cross_entropy(logits, actions[rows[:count], index], mask[rows[:count], index])

        return loss

    @torch.no_grad()
    def evaluate(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Runs every policy from the same starts.

        Args:
            weights: Tensors [N, ...] by the keys of training.

        Returns:
            Whether each episode lasts :attr:`horizon` steps, bool [N, E], and how many it lasts, [N, E].
        """
        first = next(iter(weights.values()))
        state = self.spread * starts(torch_generator("zoo", self.name, "evaluation", self.seed), self.episodes)
        state = state.to(first).expand(len(first), -1, -1)
        scale = torch.tensor(SCALE).to(first)
        alive = torch.ones(state.shape[:2], dtype=torch.bool, device=first.device)
        lasted = torch.zeros(state.shape[:2], device=first.device)
        memory = None
        for _ in range(self.horizon):
            output, memory = self._act(weights, state / scale, memory)
            state = cart_pole_step(state, output > 0)
            alive &= ~failed(state)
            lasted += alive
        return alive, lasted

    def _act(self, weights: Mapping[str, Tensor], x: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """The output [N, E] for scaled states [N, E, 4]."""
        return _feed_forward(weights, x), memory


def _feed_forward(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:  # [N, M, 4] -> [N, M]
    for i in range(3):
        x = linear(x, weights[f"layers.{i}.weight"], weights[f"layers.{i}.bias"])
        x = torch.tanh(x) if i < 2 else x
    return x[..., 0]


def _cross_entropy(logits: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    """The mean over steps whose mask is 1: [N, ...] -> [N]."""
    losses = F.binary_cross_entropy_with_logits(logits, actions, reduction="none") * mask
    return losses.flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


@dataclass(frozen=True)
class CartPoleGRU(CartPole):
    """Recurrent policies that see position and angle only, so that they must remember to know how fast things move.

    They are ``RecurrentPolicy(2, 1, "gru", hidden)``: encoder, GRU and head with tanh. Settings are those of
    :class:`CartPole`, but ``batch`` counts whole episodes.
    """

    name: ClassVar[str] = "cartpole_gru"
    demonstrations: tuple[int, int] = (4, 48)
    noise: tuple[float, float] = (0.05, 0.25)
    learning_rate: tuple[float, float] = (4e-3, 2e-2)
    steps: tuple[int, int] = (60, 300)
    spread: float = 0.4
    batch: int = 4

    def network(self) -> tuple[str, dict[str, Any]]:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        return "recurrent_policy", RecurrentPolicy(2, 1, "gru", self.hidden).config

    def part(self, number: int, device: str) -> Part:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        part = super().part(number, device)
        # The normaliser, which does nothing here, belongs to the state dict.
        buffers = RecurrentPolicy(**self.network()[1]).named_buffers()
        number = len(part.targets["gain"])
        return Part({**part.weights, **{name: value.expand(number, -1) for name, value in buffers}}, part.targets)

    def _demonstrations(self, settings: Mapping[str, Tensor], rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        states, actions, mask = super()._demonstrations(settings, rng)
        return states[..., [0, 2]], actions, mask

    def _initial(self, number: int, rng: torch.Generator) -> dict[str, Tensor]:
        policy = RecurrentPolicy(**self.network()[1])
        shapes = {name.replace(".", "/"): tuple(value.shape) for name, value in policy.named_parameters()}
        return fan_in_uniform(shapes, number, rng)

    def _loss(
        self, observations: Tensor, actions: Tensor, mask: Tensor, episodes: Tensor, rng: torch.Generator
    ) -> Callable[[Mapping[str, Tensor], int, int], Tensor]:
        stack = PolicyStack([RecurrentPolicy(**self.network()[1])]).to(actions.device)
        buffers = dict(stack.named_buffers())
        rows = torch.arange(len(actions), device=actions.device)[:, None]

        def loss(weights: Mapping[str, Tensor], count: int, step: int) -> Tensor:
            uniform = torch.rand(count, self.batch, generator=rng).to(actions.device)
            index = (uniform * episodes[:count, None]).long()
            own = {name: value.expand(count, -1) for name, value in buffers.items()}
            inputs = (observations[rows[:count], index],)
            logits = torch.func.functional_call(stack, {**weights, **own}, inputs)[..., 0]
            return _cross_entropy(logits, actions[rows[:count], index], mask[rows[:count], index])

        return loss

    def _act(self, weights: Mapping[str, Tensor], x: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """One step of N stacked policies; ``memory`` is [N, E, H] or None."""

        def layer(x: Tensor, name: str) -> Tensor:
            return linear(x, weights[f"{name}/weight"], weights[f"{name}/bias"])

        x = torch.tanh(layer(x[..., [0, 2]], "encoder"))
        size = self.hidden
        memory = x.new_zeros(*x.shape[:2], size) if memory is None else memory
        inputs = linear(x, weights["core/weight_ih_l0"], weights["core/bias_ih_l0"])
        kept = linear(memory, weights["core/weight_hh_l0"], weights["core/bias_hh_l0"])
        reset, update = torch.sigmoid(inputs[..., : 2 * size] + kept[..., : 2 * size]).split(size, -1)
        new = torch.tanh(inputs[..., 2 * size :] + reset * kept[..., 2 * size :])
        memory = torch.lerp(new, memory, update)
        return layer(torch.tanh(layer(memory, "head/0")), "head/2")[..., 0], memory
