"""Policy networks, alone and as a stack of N that runs as one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fleetgym.core.errors import UserError, unknown

CELLS: dict[str, type[nn.Module] | None] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN, "mlp": None}

META_WORLD_DIFFERENCES = ((0, 36, 3), (4, 36, 3), (0, 4, 3))
"""For Meta-World's observation: hand (0-2) to goal (36-38), first object (4-6) to goal, hand to object."""

FLEET_TOOLS_DIFFERENCES = ((15, 21, 3), (18, 21, 3), (21, 0, 3))
"""For fleet-tools' observation: the tool's working end (21-23) to the object (15-17), and to the second piece (18-20;
without one the numbers are a rotation, and the difference is of no use), the hand (0-2) to the tool's end."""

CONVOLUTIONS = ((16, 8, 4), (32, 4, 2))
"""Channels, kernel and stride of an :class:`ImagePolicy`'s convolutions: those of Mnih et al., "Playing Atari with Deep
Reinforcement Learning", 2013."""


POINT_LAYERS = (32, 64)
"""Widths of a :class:`PointPolicy`'s layers that see points."""

POINT_SCALE = 0.1
"""Metres; about the size of a tool."""


class Normaliser(nn.Module):
    """Standardises observations with fixed statistics, ``(x - mean) / std``.

    The statistics are buffers: they travel with the weights and are never trained.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:  # [..., Do] -> [..., Do]
        """Standardises the last axis."""
        return (x - self.mean) / self.std


class RecurrentPolicy(nn.Module):
    """A deterministic policy: encoder, recurrent core, head.

    ``Linear-Tanh -> GRU | LSTM | RNN (any depth), or Linear-Tanh layers -> Linear-Tanh -> Linear``. It satisfies
    :class:`fleetgym.core.Policy` (Stable-Baselines3's ``predict``), and its symmetry follows from
    ``WeightSpec.from_module(policy)``: tanh and the gated cells leave it invariant to signed permutations.

    Args:
        observation_size: Do, the size of the environment's observation.
        action_size: Da.
        cell: ``gru``, ``lstm``, ``rnn`` or ``mlp`` (no memory).
        hidden: Width H of every hidden layer.
        layers: Layers of the core.
        differences: Triples ``(i, j, n)``: the policy also sees ``obs[i:i+n] - obs[j:j+n]``. A goal relative to the
            hand is tiny beside the range of either, and standardising each alone hides it.
        action_low: Actions from ``predict`` are clipped to ``[action_low, action_high]``; None for no bound.
        action_high: See ``action_low``.

    Raises:
        UserError: Unknown cell, a size below one, or a difference outside the observation.
    """

    architecture = "recurrent_policy"

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        cell: str = "gru",
        hidden: int = 64,
        layers: int = 1,
        differences: Sequence[Sequence[int]] = (),
        action_low: float | None = -1.0,
        action_high: float | None = 1.0,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise unknown("cell", cell, CELLS)
        for name, value in (
            ("observation_size", observation_size),
            ("action_size", action_size),
            ("hidden", hidden),
            ("layers", layers),
        ):
            if value < 1:
                raise UserError(f"{name}={value}: it must be at least 1")
        for i, j, n in differences:
            if min(i, j) < 0 or n < 1 or max(i, j) + n > observation_size:
                raise UserError(f"difference ({i}, {j}, {n}) reaches outside an observation of size {observation_size}")
        self.config: dict[str, Any] = {
            "observation_size": observation_size,
            "action_size": action_size,
            "cell": cell,
            "hidden": hidden,
            "layers": layers,
            "differences": [list(map(int, d)) for d in differences],
            "action_low": action_low,
            "action_high": action_high,
        }
        self.differences = tuple(tuple(d) for d in self.config["differences"])
        features = observation_size + sum(n for _, _, n in self.differences)
        self.normaliser = Normaliser(features)
        self.encoder = nn.Linear(features, hidden)
        if cell == "mlp":
            blocks = [module for _ in range(layers) for module in (nn.Linear(hidden, hidden), nn.Tanh())]
            self.core: nn.Module = nn.Sequential(*blocks)
        else:
            self.core = CELLS[cell](hidden, hidden, num_layers=layers, batch_first=True)
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, action_size))

    def features(self, observations: Tensor) -> Tensor:  # [..., Do] -> [..., Df]
        """Observations with the differences appended; what the normaliser's statistics are of."""
        return features(observations, self.differences)

    def forward(self, observations: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Runs the policy over sequences.

        Args:
            observations: [B, T, Do].
            state: What the last call returned, or None for a fresh memory: [L, B, H], a pair of it for an LSTM.

        Returns:
            Actions [B, T, Da] (not clipped), and the new state (None for an MLP).
        """
        return self._act(self.encoder(self.normaliser(self.features(observations))), state)

    def _act(self, encoded: Tensor, state: Any) -> tuple[Tensor, Any]:
        """All that follows the encoder's linear layer, whose outputs are [B, T, H]."""
        x = torch.tanh(encoded)
        if self.config["cell"] == "mlp":
            x = self.core(x)
        else:
            x, state = self.core(x, state)
        return self.head(x), state

    @property
    def sight_shape(self) -> tuple[int, ...] | None:
        """Shape of what it sees beside the numbers; None: nothing."""
        return None

    def example(self) -> tuple[Tensor, ...] | None:
        """What ``WeightSpec.from_module`` and ``merge`` are to be given as ``example_input``; None: they need none."""
        return None

    def _rows(self, observation: Any) -> tuple[bool, tuple[np.ndarray, ...]]:
        """Whether an observation is a single one, and its parts as batches, in the order of ``forward``."""
        observation = np.asarray(observation)
        size = self.config["observation_size"]
        if observation.ndim not in (1, 2) or observation.shape[-1] != size:
            raise UserError(f"observation of shape {observation.shape}; this policy takes [B, {size}] or [{size}]")
        single = observation.ndim == 1
        return single, (np.asarray(observation[None] if single else observation, np.float32),)

    @torch.no_grad()
    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Stable-Baselines3's ``predict``. The policy is deterministic whatever ``deterministic`` says.

        Args:
            observation: [Do] or [B, Do].
            state: What the last call returned: arrays [B, L, H] (one; two for an LSTM; None for an MLP).
            episode_start: [B], True where the memory is to be forgotten.
            deterministic: Accepted for the interface.

        Returns:
            The action ([Da] or [B, Da], clipped, float32) and the new state.

        Raises:
            UserError: The observation has another size than the policy's.
        """
        single, parts = self._rows(observation)
        device = self.encoder.weight.device
        inputs = [torch.as_tensor(part, device=device)[:, None] for part in parts]
        memory: Any = None
        if state is not None and self.config["cell"] != "mlp":
            parts = [torch.as_tensor(part, dtype=torch.float32, device=device) for part in state]
            if episode_start is not None:
                keep = 1.0 - torch.as_tensor(np.atleast_1d(episode_start), dtype=torch.float32, device=device)
                parts = [part * keep[:, None, None] for part in parts]
            parts = [part.transpose(0, 1).contiguous() for part in parts]
            memory = tuple(parts) if len(parts) > 1 else parts[0]
        actions, memory = self(*inputs, state=memory)
        out = actions[:, 0].cpu().numpy()
        low, high = self.config["action_low"], self.config["action_high"]
        if low is not None or high is not None:
            out = np.clip(out, low, high)
        new_state = None
        if memory is not None:
            parts = memory if isinstance(memory, tuple) else (memory,)
            new_state = tuple(part.transpose(0, 1).cpu().numpy() for part in parts)
        return (out[0] if single else out), new_state

    @torch.no_grad()
    def renormalise(self, mean: Tensor, std: Tensor) -> RecurrentPolicy:
        """Re-expresses the first layer under other statistics, in place; the function stays the same.

        ``W (x - m) / s + b = W' (x - m') / s' + b'`` with ``W' = W s'/s`` and ``b' = b + W (m' - m)/s``. Policies that
        were normalised with their own data can be merged only after this.

        Args:
            mean: New mean, [Df].
            std: New standard deviation, [Df], positive.

        Returns:
            This policy.
        """
        old = self.normaliser
        mean, std = mean.to(old.mean), std.to(old.std)
        self.encoder.bias += self.encoder.weight @ ((mean - old.mean) / old.std)
        self.encoder.weight *= std / old.std
        old.mean.copy_(mean)
        old.std.copy_(std)
        return self


class ImagePolicy(RecurrentPolicy):
    """A :class:`RecurrentPolicy` that sees a picture beside a few numbers.

    Two convolutions with ReLU (:data:`CONVOLUTIONS`) look at the picture; a linear layer of what they give is added to
    the encoder's output before its tanh. Its symmetry follows from ``WeightSpec.from_module`` with :meth:`example`:
    besides the signed permutations of the hidden units, those of the convolutions' channels, without signs.

    Args:
        observation_size: Do, how many numbers there are.
        action_size: Da.
        image_size: S, pixels a side of the picture.
        **options: ``cell``, ``hidden``, ``layers``, ``differences``, ``action_low`` and ``action_high`` of
            :class:`RecurrentPolicy`.

    Raises:
        UserError: See :class:`RecurrentPolicy`; or pictures too small for the convolutions.
    """

    architecture = "image_policy"

    def __init__(self, observation_size: int, action_size: int, image_size: int = 48, **options: Any) -> None:
        super().__init__(observation_size, action_size, **options)
        self.config["image_size"] = image_size
        cells, convolutions, channels = convolved(image_size), [], 3
        for number, kernel, stride in CONVOLUTIONS:
            convolutions += [nn.Conv2d(channels, number, kernel, stride), nn.ReLU()]
            channels = number
        self.eye = nn.Sequential(*convolutions)
        self.sight = nn.Linear(channels * cells * cells, self.config["hidden"], bias=False)

    def forward(self, observations: Tensor, images: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Runs the policy over sequences.

        Args:
            observations: [B, T, Do].
            images: [B, T, S, S, 3], 0 to 255.
            state: See :meth:`RecurrentPolicy.forward`.

        Returns:
            See :meth:`RecurrentPolicy.forward`.
        """
        seen = self.eye(pixels(images.flatten(0, 1), observations.dtype)).flatten(1)
        seen = self.sight(seen).view(*images.shape[:2], -1)
        return self._act(self.encoder(self.normaliser(self.features(observations))) + seen, state)

    @property
    def sight_shape(self) -> tuple[int, ...]:
        """Shape of a picture."""
        return self.config["image_size"], self.config["image_size"], 3

    def example(self) -> tuple[Tensor, ...]:
        """An example input: numbers [2, 3, Do] and pictures [2, 3, S, S, 3], the same at every call."""
        rng, size = torch.Generator().manual_seed(0), self.config["image_size"]
        weight = self.encoder.weight
        observations = torch.randn(2, 3, self.config["observation_size"], generator=rng)
        images = torch.randint(0, 256, (2, 3, size, size, 3), generator=rng, dtype=torch.uint8)
        return observations.to(weight), images.to(weight.device)

    def _rows(self, observation: Any) -> tuple[bool, tuple[np.ndarray, ...]]:
        size = self.config["image_size"]
        wanted = f"a mapping of 'state' [B, {self.config['observation_size']}] and 'pixels' [B, {size}, {size}, 3]"
        if not isinstance(observation, Mapping) or not {"state", "pixels"} <= set(observation):
            found = sorted(observation) if isinstance(observation, Mapping) else np.shape(observation)
            raise UserError(f"observation of {found}; this policy takes {wanted}, or both without B")
        single, parts = super()._rows(observation["state"])
        images = np.asarray(observation["pixels"])[None] if single else np.asarray(observation["pixels"])
        if images.dtype != np.uint8 or images.shape != (len(parts[0]), size, size, 3):
            raise UserError(
                f"'pixels' of shape {np.shape(observation['pixels'])} and type {images.dtype}; this policy takes "
                f"{wanted} of uint8, or both without B"
            )
        return single, (*parts, images)


class PointPolicy(RecurrentPolicy):
    """A :class:`RecurrentPolicy` that sees a cloud of points beside a few numbers.

    Two layers with ReLU (:data:`POINT_LAYERS`) look at each point by itself, the largest value of each channel over the
    points is kept, and a linear layer of those is added to the encoder's output before its tanh: the encoder of Qi et
    al., "PointNet: Deep Learning on Point Sets for 3D Classification and Segmentation", CVPR 2017, without its
    alignment networks. Places are divided by :data:`POINT_SCALE` first. It does not depend on the order of the points.

    Args:
        observation_size: Do, how many numbers there are.
        action_size: Da.
        points: P, how many points.
        **options: ``cell``, ``hidden``, ``layers``, ``differences``, ``action_low`` and ``action_high`` of
            :class:`RecurrentPolicy`.

    Raises:
        UserError: See :class:`RecurrentPolicy`; or no points.
    """

    architecture = "point_policy"

    def __init__(self, observation_size: int, action_size: int, points: int = 128, **options: Any) -> None:
        super().__init__(observation_size, action_size, **options)
        if points < 1:
            raise UserError(f"points={points}: it must be at least 1")
        self.config["points"] = points
        layers: list[nn.Module] = []
        channels = 4
        for number in POINT_LAYERS:
            layers += [nn.Linear(channels, number), nn.ReLU()]
            channels = number
        self.eye = nn.Sequential(*layers)
        self.sight = nn.Linear(channels, self.config["hidden"], bias=False)

    def forward(self, observations: Tensor, points: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Runs the policy over sequences.

        Args:
            observations: [B, T, Do].
            points: [B, T, 4, P]: places in metres, and a mask.
            state: See :meth:`RecurrentPolicy.forward`.

        Returns:
            See :meth:`RecurrentPolicy.forward`.
        """
        seen = self.sight(self.eye(scaled(points)).amax(-2))
        return self._act(self.encoder(self.normaliser(self.features(observations))) + seen, state)

    @property
    def sight_shape(self) -> tuple[int, ...]:
        """Shape of a cloud."""
        return 4, self.config["points"]

    def example(self) -> tuple[Tensor, ...]:
        """An example input: numbers [2, 3, Do] and points [2, 3, 4, P], the same at every call."""
        rng = torch.Generator().manual_seed(0)
        weight = self.encoder.weight
        observations = torch.randn(2, 3, self.config["observation_size"], generator=rng)
        return observations.to(weight), (0.1 * torch.randn(2, 3, *self.sight_shape, generator=rng)).to(weight)

    def _rows(self, observation: Any) -> tuple[bool, tuple[np.ndarray, ...]]:
        shape = self.sight_shape
        wanted = f"a mapping of 'state' [B, {self.config['observation_size']}] and 'points' [B, 4, {shape[1]}]"
        if not isinstance(observation, Mapping) or not {"state", "points"} <= set(observation):
            found = sorted(observation) if isinstance(observation, Mapping) else np.shape(observation)
            raise UserError(f"observation of {found}; this policy takes {wanted}, or both without B")
        single, parts = super()._rows(observation["state"])
        points = np.asarray(observation["points"], np.float32)
        points = points[None] if single else points
        if points.shape != (len(parts[0]), *shape):
            raise UserError(f"'points' of shape {points.shape}; this policy takes {wanted}, or both without B")
        return single, (*parts, points)


def scaled(points: Tensor) -> Tensor:
    """Clouds [..., 4, P] as what a layer takes: [..., P, 4], places in units of :data:`POINT_SCALE`."""
    return points.transpose(-1, -2) * points.new_tensor([1 / POINT_SCALE] * 3 + [1.0])


def convolved(image_size: int) -> int:
    """Cells a side that :data:`CONVOLUTIONS` leave of a picture of ``image_size`` pixels a side.

    Raises:
        UserError: None are left.
    """
    cells, least = image_size, 1
    for _, kernel, stride in CONVOLUTIONS:
        cells = (cells - kernel) // stride + 1 if cells >= kernel else 0
    for _, kernel, stride in reversed(CONVOLUTIONS):
        least = (least - 1) * stride + kernel
    if cells < 1:
        raise UserError(f"image_size={image_size}: the convolutions need pictures of at least {least} pixels a side")
    return cells


def pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Pictures [M, S, S, 3], 0 to 255, as what convolutions take: [M, 3, S, S], -2 to 2.

    The channels stay last in memory, which makes the convolutions of small pictures 1.6 times as fast on a CPU.
    """
    return ((images.to(dtype) - 128) / 64).permute(0, 3, 1, 2)


def features(observations: Tensor, differences: Sequence[Sequence[int]]) -> Tensor:
    """Appends ``obs[..., i:i+n] - obs[..., j:j+n]`` for each (i, j, n) of ``differences``."""
    if not differences:
        return observations
    extra = [observations[..., i : i + n] - observations[..., j : j + n] for i, j, n in differences]
    return torch.cat([observations, *extra], dim=-1)


class PolicyStack(nn.Module):
    """N policies of one architecture whose parameters are stacked, so that a fleet trains as one batch.

    Robot n's parameters are row n of every tensor; nothing flows between rows. With N = 1 it is a plain policy that
    trains faster than torch's own GRU on a CPU: the time loop is fused (see :class:`_GRUScan`).

    Args:
        policies: The policies to stack; they stay untouched.

    Raises:
        UserError: No policies, or policies of different configuration.
    """

    def __init__(self, policies: Sequence[RecurrentPolicy]) -> None:
        super().__init__()
        if not policies:
            raise UserError("a stack needs at least one policy")
        for i, policy in enumerate(policies):
            if policy.config != policies[0].config:
                raise UserError(f"policy {i} has configuration {policy.config}, policy 0 has {policies[0].config}")
        # Kept out of the module tree: it is only the mould for unstacking.
        self._mould = [copy.deepcopy(policies[0])]
        self.config = policies[0].config
        states = [policy.state_dict() for policy in policies]
        trained = dict(policies[0].named_parameters())
        for name in states[0]:
            value = torch.stack([state[name] for state in states])
            key = name.replace(".", "/")
            if name in trained:
                self.register_parameter(key, nn.Parameter(value))
            else:
                self.register_buffer(key, value)

    def __len__(self) -> int:
        return len(getattr(self, "encoder/weight"))

    def __getitem__(self, name: str) -> Tensor:
        """The stacked tensor [N, ...] behind a policy's key, such as ``encoder.weight``."""
        return getattr(self, name.replace(".", "/"))

    def state_dicts(self) -> list[dict[str, Tensor]]:
        """Each robot's state dict (copies)."""
        state = self.state_dict()
        return [{key.replace("/", "."): value[n].clone() for key, value in state.items()} for n in range(len(self))]

    @torch.no_grad()
    def load(self, state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
        """Writes one state dict a robot (or one for all) into the stack."""
        if len(state_dicts) == 1:
            state_dicts = list(state_dicts) * len(self)
        for name in state_dicts[0]:
            self[name].copy_(torch.stack([state[name] for state in state_dicts]))

    def policies(self) -> list[RecurrentPolicy]:
        """Each robot's policy (copies)."""
        out = []
        for state in self.state_dicts():
            policy = copy.deepcopy(self._mould[0])
            policy.load_state_dict(state)
            out.append(policy)
        return out

    def forward(self, observations: Tensor, sights: Tensor | None = None, *, rows: slice | None = None) -> Tensor:
        """Runs every policy over its own sequences, from fresh memories.

        Args:
            observations: [N, B, T, Do].
            sights: [N, B, T, S, S, 3], 0 to 255, or [N, B, T, 4, P], for policies that see pictures or points.
            rows: The robots to run, N of them; all if None.

        Returns:
            Actions [N, B, T, Da].
        """
        num, batch, time = observations.shape[:3]

        def own(name: str) -> Tensor:  # [N, ...]
            return self[name] if rows is None else self[name][rows]

        def linear(x: Tensor, name: str) -> Tensor:  # [N, M, I] -> [N, M, O]
            return torch.baddbmm(own(f"{name}.bias")[:, None], x, own(f"{name}.weight").transpose(1, 2))

        x = features(observations, self.config["differences"])
        x = (x - own("normaliser.mean")[:, None, None]) / own("normaliser.std")[:, None, None]
        # Time before batch: the scan then reads and writes contiguous slices.
        x = linear(x.transpose(1, 2).reshape(num, time * batch, -1), "encoder")
        if sights is not None:
            look = self._seen_points if "points" in self.config else self._seen
            seen = look(sights.transpose(1, 2).flatten(1, 2), own)
            x = x + torch.bmm(seen, own("sight.weight").transpose(1, 2))
        x = torch.tanh(x)
        cell = self.config["cell"]
        for layer in range(self.config["layers"]):
            if cell == "mlp":
                x = torch.tanh(linear(x, f"core.{2 * layer}"))
                continue
            names = [f"core.{part}_l{layer}" for part in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")]
            w_ih, b_ih, w_hh, b_hh = (own(name) for name in names)
            gates = torch.baddbmm(b_ih[:, None], x, w_ih.transpose(1, 2))
            gates = gates.view(num, time, batch, -1).transpose(0, 1).contiguous()
            x = _SCANS[cell](gates, w_hh, b_hh)  # [T, N, B, H]
            x = x.transpose(0, 1).reshape(num, time * batch, -1)
        x = linear(torch.tanh(linear(x, "head.0")), "head.2")
        return x.view(num, time, batch, -1).transpose(1, 2)

    @staticmethod
    def _seen(images: Tensor, own: Callable[[str], Tensor]) -> Tensor:
        """What each robot's convolutions make of its pictures: [N, M, S, S, 3] -> [N, M, F].

        The robots' convolutions are called one after the other. As one call with groups, or under ``vmap``, they take
        3 times as long on a CPU (6 robots, 120 pictures of 48 pixels each, forward and back).
        """
        names = [(f"eye.{2 * i}", stride) for i, (_, _, stride) in enumerate(CONVOLUTIONS)]
        layers = [(own(f"{name}.weight").unbind(), own(f"{name}.bias").unbind(), stride) for name, stride in names]
        out = []
        for robot, pictures in enumerate(images):
            x = pixels(pictures, layers[0][0][robot].dtype)
            for weights, biases, stride in layers:
                x = F.relu(F.conv2d(x, weights[robot], biases[robot], stride))
            out.append(x.flatten(1))
        return torch.stack(out)

    @staticmethod
    def _seen_points(points: Tensor, own: Callable[[str], Tensor]) -> Tensor:
        """What each robot's layers make of its points: [N, M, 4, P] -> [N, M, C]."""
        num, many, _, size = points.shape
        x = scaled(points).reshape(num, many * size, 4)
        for i in range(len(POINT_LAYERS)):
            bias, weight = own(f"eye.{2 * i}.bias"), own(f"eye.{2 * i}.weight")
            x = F.relu(torch.baddbmm(bias[:, None], x, weight.transpose(1, 2)))
        return x.view(num, many, size, -1).amax(2)


class _GRUScan(torch.autograd.Function):
    """The GRU recurrence over time for N stacked cells, with its derivative written out.

    Autograd would record a dozen nodes a step; here the backward loop holds one matrix product and a few
    element-wise operations a step, and everything that does not depend on the gradient is computed for all steps at
    once (2x faster than autograd on the same loop, 2.8x faster than N ``nn.GRU``; ``fleetgym bench speed``).
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, w_hh: Tensor, b_hh: Tensor) -> Tensor:
        """Gates [T, N, B, 3H] are the inputs' share (W_ih x + b_ih); returns the hidden states [T, N, B, H]."""
        time, num, batch, width = gates.shape
        size = width // 3
        w_t, bias = w_hh.transpose(1, 2).contiguous(), b_hh[:, None]
        h = gates.new_zeros(time + 1, num, batch, size)
        rz = gates.new_empty(time, num, batch, 2 * size)
        n, hn = gates.new_empty(time, num, batch, size), gates.new_empty(time, num, batch, size)
        for t in range(time):
            g, gh = gates[t], torch.baddbmm(bias, h[t], w_t)
            torch.add(g[..., : 2 * size], gh[..., : 2 * size], out=rz[t]).sigmoid_()
            hn[t] = gh[..., 2 * size :]
            torch.addcmul(g[..., 2 * size :], rz[t, ..., :size], hn[t], out=n[t]).tanh_()
            torch.lerp(n[t], h[t], rz[t, ..., size:], out=h[t + 1])
        ctx.save_for_backward(h, rz, n, hn, w_hh)
        return h[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Back-propagation through time."""
        h, rz, n, hn, w_hh = ctx.saved_tensors
        time, num, batch, size = n.shape
        r, z = rz[..., :size], rz[..., size:]
        to_n = (1 - z) * (1 - n * n)
        to_z = (h[:-1] - n) * z * (1 - z)
        to_r = hn * r * (1 - r)
        d_h_gates = n.new_empty(time, num, batch, 3 * size)  # with respect to W_hh h + b_hh
        d_gates = torch.empty_like(d_h_gates)  # with respect to W_ih x + b_ih
        dh = torch.zeros_like(h[0])
        for t in range(time - 1, -1, -1):
            dh = dh + grad[t]
            dn, out = dh * to_n[t], d_h_gates[t]
            torch.mul(dn, to_r[t], out=out[..., :size])
            torch.mul(dh, to_z[t], out=out[..., size : 2 * size])
            torch.mul(dn, r[t], out=out[..., 2 * size :])
            d_gates[t, ..., 2 * size :] = dn
            dh = torch.baddbmm(dh * z[t], out, w_hh)
        d_gates[..., : 2 * size] = d_h_gates[..., : 2 * size]
        flat = d_h_gates.transpose(0, 1).reshape(num, time * batch, 3 * size)
        before = h[:-1].transpose(0, 1).reshape(num, time * batch, size)
        return d_gates, torch.bmm(flat.transpose(1, 2), before), flat.sum(1)


def _rnn_scan(gates: Tensor, w_hh: Tensor, b_hh: Tensor) -> Tensor:
    """Elman recurrence, gates [T, N, B, H] -> [T, N, B, H]."""
    h, w_t, bias, out = torch.zeros_like(gates[0]), w_hh.transpose(1, 2), b_hh[:, None], []
    for gate in gates:
        h = torch.tanh(gate + torch.baddbmm(bias, h, w_t))
        out.append(h)
    return torch.stack(out)


def _lstm_scan(gates: Tensor, w_hh: Tensor, b_hh: Tensor) -> Tensor:
    """LSTM recurrence (gate order i, f, g, o), gates [T, N, B, 4H] -> [T, N, B, H]."""
    size = gates.shape[-1] // 4
    h = c = torch.zeros_like(gates[0, ..., :size])
    w_t, bias, out = w_hh.transpose(1, 2), b_hh[:, None], []
    for gate in gates:
        i, f, g, o = (gate + torch.baddbmm(bias, h, w_t)).split(size, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    return torch.stack(out)


def gru_scan(gates: Tensor, w_hh: Tensor, b_hh: Tensor) -> Tensor:
    """The recurrence of N stacked GRUs over their own sequences, from a memory of zeros.

    Args:
        gates: The inputs' share, ``W_ih x + b_ih``, [T, N, B, 3H]; gates in torch's order (reset, update, new).
        w_hh: [N, 3H, H].
        b_hh: [N, 3H].

    Returns:
        The hidden states, [T, N, B, H].
    """
    return _GRUScan.apply(gates, w_hh, b_hh)


_SCANS = {"gru": gru_scan, "rnn": _rnn_scan, "lstm": _lstm_scan}


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the valid steps.

    Args:
        prediction: [..., B, T, Da].
        target: [..., B, T, Da].
        mask: [..., B, T], True where a step is real.

    Returns:
        [...], the mean over B, T (valid steps only) and Da.
    """
    error = F.mse_loss(prediction, target, reduction="none").mean(-1) * mask
    return error.sum((-1, -2)) / mask.sum((-1, -2)).clamp(min=1)
