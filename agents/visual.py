"""A policy that grasps by what an eye in the hand sees, and how it is trained: point matching on single steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetgym.core.demonstrations import Demonstrations
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.run import Run
from fleetgym.core.seeding import torch_generator

#: Points of the gripper in the hand's frame, metres: the hand, and two places along each finger (they close along y).
CONTROL_POINTS = (
    (0.0, 0.0, 0.0),
    (0.0, 0.053, 0.075),
    (0.0, -0.053, 0.075),
    (0.0, 0.053, 0.105),
    (0.0, -0.053, 0.105),
)
PRECISIONS = ("auto", "float32", "bfloat16")
#: Depths are cut here, metres.
FARTHEST = 1.0


class _Residual(nn.Module):
    """Two convolutions 3x3, the first with stride 2, beside a convolution 1x1 (He et al., CVPR 2016), no statistics."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, 2, 1)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1)
        self.beside = nn.Conv2d(inside, outside, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.beside(x) + self.second(F.relu(self.first(x))))


class VisualPolicy(nn.Module):
    """One picture and the time that remains -> a motion of the hand; without memory.

    A convolution 5x5 and three residual blocks, each of stride 2, two linear layers, tanh. It satisfies
    :class:`fleetgym.core.Policy`.

    Args:
        image_size: S, pixels a side.
        depth: Whether it sees depth beside colours.
        width: Channels of the first convolution; the blocks have 1.5, 2 and 2 times as many.
        hidden: Width of the hidden layer.

    Raises:
        UserError: A size below 16, or a width below 1.
    """

    architecture = "visual_policy"

    def __init__(self, image_size: int = 64, depth: bool = False, width: int = 32, hidden: int = 128) -> None:
        super().__init__()
        if image_size < 16:
            raise UserError(f"image_size={image_size}: it must be at least 16")
        for name, value in (("width", width), ("hidden", hidden)):
            if value < 1:
                raise UserError(f"{name}={value}: it must be at least 1")
        self.config: dict[str, Any] = {"image_size": image_size, "depth": depth, "width": width, "hidden": hidden}
        widths = [width, width * 3 // 2, 2 * width, 2 * width]
        layers: list[nn.Module] = [nn.Conv2d(4 if depth else 3, width, 5, 2, 2), nn.ReLU()]
        layers += [_Residual(first, second) for first, second in zip(widths, widths[1:])]
        self.eye = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            size = self.eye(torch.zeros(1, 4 if depth else 3, image_size, image_size)).shape[1]
        self.head = nn.Sequential(nn.Linear(size + 1, hidden), nn.ReLU(), nn.Linear(hidden, 6))

    def forward(self, pictures: Tensor, remaining: Tensor) -> Tensor:
        """Chooses actions.

        Args:
            pictures: [B, C, S, S], see :func:`prepared`.
            remaining: [B, 1], share of the time that remains.

        Returns:
            Actions [B, 6] within -1..1.
        """
        return torch.tanh(self.head(torch.cat([self.eye(pictures), remaining], dim=1)))

    @torch.no_grad()
    def predict(
        self, observation: Mapping[str, Any], state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, None]:
        """Stable-Baselines3's ``predict``; the policy is deterministic and has no memory.

        Args:
            observation: ``rgb`` [S, S, 3] uint8 and ``remaining`` [1], ``depth`` [S, S] for policies that see depth;
                or batches of them.
            state: Ignored.
            episode_start: Ignored.
            deterministic: Ignored.

        Returns:
            The action [6], or [B, 6], float32; and None.

        Raises:
            UserError: The observation lacks what the policy sees, or has another size.
        """
        size, depth = self.config["image_size"], self.config["depth"]
        wanted = ("rgb", "remaining", "depth") if depth else ("rgb", "remaining")
        if not isinstance(observation, Mapping) or not set(wanted) <= set(observation):
            found = sorted(observation) if isinstance(observation, Mapping) else np.shape(observation)
            raise UserError(f"observation of {found}; this policy takes a mapping of {', '.join(wanted)}")
        pictures = np.asarray(observation["rgb"])
        single = pictures.ndim == 3
        if pictures.shape[-3:] != (size, size, 3) or pictures.dtype != np.uint8:
            raise UserError(
                f"'rgb' of shape {pictures.shape} and type {pictures.dtype}; this policy takes [{size}, {size}, 3] of "
                "uint8, or a batch of them"
            )
        device = self.head[0].weight.device
        depths = torch.as_tensor(np.asarray(observation["depth"], np.float32), device=device) if depth else None
        if single:
            pictures, depths = pictures[None], None if depths is None else depths[None]
        remaining = torch.as_tensor(np.asarray(observation["remaining"], np.float32), device=device)
        actions = self(prepared(torch.as_tensor(pictures, device=device), depths), remaining.reshape(len(pictures), 1))
        actions = actions.cpu().numpy()
        return (actions[0] if single else actions), None


def prepared(rgb: Tensor, depth: Tensor | None = None) -> Tensor:
    """Pictures [B, S, S, 3] of bytes, and depths [B, S, S] in metres, as what the policy takes: [B, C, S, S]."""
    x = (rgb.float() / 255.0 - 0.5).permute(0, 3, 1, 2)
    if depth is None:
        return x.contiguous()
    return torch.cat([x, (depth.float().clamp(0, FARTHEST) / FARTHEST - 0.5)[:, None]], dim=1)


def rotations(vectors: Tensor) -> Tensor:
    """Rotation matrices [B, 3, 3] of rotation vectors [B, 3], radians, with derivatives at 0 too."""
    square = (vectors * vectors).sum(-1, keepdim=True)[..., None]
    angle = square.clamp_min(1e-12).sqrt()
    first, second = torch.sin(angle) / angle, (1 - torch.cos(angle)) / angle**2
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).view(-1, 3, 3)
    return torch.eye(3).to(vectors) + first * cross + second * (cross @ cross)


def point_matching(actions: Tensor, wanted: Tensor, translation: float, rotation: float) -> Tensor:
    """How far the gripper's points are apart after two motions.

    Source: L. Wang et al., "Goal-Auxiliary Actor-Critic for 6D Robotic Grasping with Point Clouds", CoRL 2021, and its
    release's ``pose_bc_loss``: the mean over points of the L1 distance. There the points lie on the hand's x axis; the
    fingers close along y, so they lie there here.

    Args:
        actions: [B, 6].
        wanted: [B, 6].
        translation: Metres that an action of 1 means.
        rotation: Radians that an action of 1 means.

    Returns:
        The mean over the batch, metres.
    """
    points = torch.tensor(CONTROL_POINTS).to(actions)

    def moved(a: Tensor) -> Tensor:
        return points @ rotations(rotation * a[:, 3:]).transpose(1, 2) + translation * a[:, None, :3]

    return (moved(actions) - moved(wanted)).abs().sum(-1).mean()


@dataclass(frozen=True)
class Steps:
    """Single steps, whichever episode they are of.

    Attributes:
        rgb: [N, S, S, 3] uint8.
        remaining: [N, 1] float32.
        actions: [N, 6] float32.
        depth: [N, S, S] float16, metres, or None.
    """

    rgb: Tensor
    remaining: Tensor
    actions: Tensor
    depth: Tensor | None = None

    def __len__(self) -> int:
        return len(self.actions)

    @classmethod
    def of(cls, demonstrations: Demonstrations, depth: bool = False) -> Steps:
        """All steps of demonstrations.

        Raises:
            UserError: Observations without ``rgb`` or ``remaining``, or without ``depth`` where that is wanted.
        """
        keys = ["rgb", "remaining", *(["depth"] if depth else [])]
        for episode in demonstrations:
            for key in keys:
                if not isinstance(episode.observations, Mapping) or key not in episode.observations:
                    raise UserError(f"the demonstration of seed {episode.seed} does not observe {key!r}")
        parts = {key: np.concatenate([e.observations[key][: e.length] for e in demonstrations]) for key in keys}
        actions = np.concatenate([episode.actions for episode in demonstrations])
        return cls(
            torch.from_numpy(parts["rgb"]),
            torch.from_numpy(parts["remaining"].astype(np.float32)).reshape(-1, 1),
            torch.from_numpy(actions.astype(np.float32)),
            torch.from_numpy(parts["depth"].astype(np.float16)) if depth else None,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Steps]) -> Steps:
        """All steps of several."""
        depth = None if parts[0].depth is None else torch.cat([part.depth for part in parts])
        names = ("rgb", "remaining", "actions")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names), depth)


@dataclass(frozen=True)
class VisualConfig:
    """How a :class:`VisualPolicy` is trained."""

    steps: int = 1500
    """Gradient steps."""
    batch_size: int = 64
    """Pictures a step."""
    learning_rate: float = 1e-3
    """Adam's step size at the beginning."""
    final: float = 0.05
    """The step size falls geometrically to this share of it."""
    corrective: float = 0.8
    """Share of corrective pictures in a batch, where there are some."""
    colour: float = 0.03
    """Standard deviation of an offset of each picture's colour channels."""
    mixing: float = 0.0
    """Standard deviation of what is added to the unit matrix that mixes each picture's colour channels."""
    gradient_clip: float = 0.5
    """Largest norm of the gradient."""
    translation: float = 0.06
    """Metres that an action of 1 means."""
    rotation: float = float(np.pi / 6)
    """Radians that an action of 1 means."""
    precision: str = "auto"
    """Of the network's products: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the processor multiplies it."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        for name in ("steps", "batch_size", "learning_rate", "final", "gradient_clip", "translation", "rotation"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: it must be positive")
        for name in ("colour", "mixing"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)}: it must not be negative")
        if not 0 <= self.corrective <= 1:
            raise UserError(f"corrective={self.corrective}: a share within 0..1 is wanted")


def _halves(precision: str, device: torch.device) -> bool:
    """Whether products are taken in bfloat16. On processors without it they would be slower, not quicker."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # torch tells of AVX512-BF16 under a private name; a torch that has dropped it gets float32.
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def train_visual(
    policy: VisualPolicy,
    own: Steps,
    corrective: Steps | None = None,
    config: VisualConfig | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    run: Run | None = None,
    save_every: float = 20.0,
    report: Callable[[int, str], None] | None = None,
) -> list[dict[str, float]]:
    """Behaviour cloning of single steps.

    What is drawn at step s depends on (seed, s) alone, so a run that stops and resumes ends with the same policy.

    Args:
        policy: Trained in place.
        own: Demonstrated steps.
        corrective: Corrective steps, see :mod:`fleetgym.agents.spartn`.
        config: How.
        seed: Seed of the draws.
        device: Where to train.
        run: Its state is saved and resumed.
        save_every: Seconds between saved states.
        report: Called with (steps done, words) now and then.

    Returns:
        ``step``, ``loss`` (metres) and ``cpu_seconds`` (from the first step on, over all runs) at some steps.

    Raises:
        UserError: Nothing to learn from, or the training diverged.
    """
    config = config or VisualConfig()
    if not len(own):
        raise UserError("there are no demonstrated steps to learn from")
    policy.to(device).train()
    # Last in memory, channels make the convolutions of small pictures quicker on a CPU.
    policy.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    history: list[dict[str, float]] = []
    first = 0
    names = dict(policy.named_parameters())
    saved = run.load_state() if run is not None else None
    if saved is not None:
        first, tensors, meta = saved
        history = list(meta["history"])
        with torch.no_grad():
            for name, parameter in names.items():
                parameter.copy_(tensors[f"weight.{name}"])
                if f"first.{name}" in tensors:
                    moments = {"exp_avg": tensors[f"first.{name}"], "exp_avg_sq": tensors[f"second.{name}"]}
                    state = {key: value.to(parameter).clone() for key, value in moments.items()}
                    optimizer.state[parameter] = {"step": torch.tensor(float(first)), **state}
    halves = _halves(config.precision, torch.device(device))
    share = config.corrective if corrective is not None and len(corrective) else 0.0
    sizes = (config.batch_size - round(share * config.batch_size), round(share * config.batch_size))
    last_save = time.monotonic()
    began = time.process_time() - (history[-1]["cpu_seconds"] if history else 0.0)
    total = 0.0
    for step in range(first, config.steps):
        draws = torch_generator("visual", seed, step)
        batch = Steps.concatenate(
            [
                _rows(part, torch.randint(len(part), (size,), generator=draws))
                for part, size in zip((own, corrective), sizes)
                if size and part is not None
            ]
        )
        x = prepared(batch.rgb.to(device), None if batch.depth is None else batch.depth.to(device))
        if config.mixing:
            mix = torch.eye(3) + config.mixing * torch.randn(len(x), 3, 3, generator=draws)
            x[:, :3] = torch.einsum("bij,bjhw->bihw", mix.to(device), x[:, :3])
        x[:, :3] += config.colour * torch.randn(len(x), 3, 1, 1, generator=draws).to(device)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * config.final ** (step / config.steps)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=halves):
            found = policy(x.contiguous(memory_format=torch.channels_last), batch.remaining.to(device))
        loss = point_matching(found.float(), batch.actions.to(device), config.translation, config.rotation)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), config.gradient_clip)
        optimizer.step()
        total += float(loss.detach())
        done = step + 1
        if done % 50 == 0 or done == config.steps:
            mean = total / ((done - 1) % 50 + 1)
            total = 0.0
            if not np.isfinite(mean):
                raise UserError(f"the loss is {mean} at step {done}; lower learning_rate")
            spent = round(time.process_time() - began, 2)
            history.append({"step": done, "loss": mean, "cpu_seconds": spent})
            if report is not None:
                report(done, f"loss {1000 * mean:.1f} mm")
            late = time.monotonic() - last_save > save_every
            if run is not None and (late or done == config.steps):
                tensors = {f"weight.{name}": value.detach() for name, value in names.items()}
                for name, value in names.items():
                    tensors[f"first.{name}"] = optimizer.state[value]["exp_avg"]
                    tensors[f"second.{name}"] = optimizer.state[value]["exp_avg_sq"]
                run.save_state(done, {k: v.cpu().contiguous() for k, v in tensors.items()}, {"history": history})
                last_save = time.monotonic()
    policy.to(memory_format=torch.contiguous_format).eval()
    return history


def _rows(part: Steps, index: Tensor) -> Steps:
    depth = None if part.depth is None else part.depth[index]
    return Steps(part.rgb[index], part.remaining[index], part.actions[index], depth)
