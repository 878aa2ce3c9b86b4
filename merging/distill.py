"""Merging by distillation without data: the server teaches one policy what all of them do on sketches of their data.

Robots trained apart on different tasks have no common weights to average. What they have in common is only their
function, each on its own observations. A robot therefore sends, beside its weights, a linear-Gaussian model of its
episodes (:func:`fleetgym.merging.statistics.sketch`); the server lets each policy act in its own sketch, and trains one
policy to act like each of them there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fleetgym.core.errors import UserError
from fleetgym.core.weights import StateDict, WeightSpec
from fleetgym.merging.mergers import Merged, normalised
from fleetgym.merging.statistics import Sketch


def _act(module: nn.Module, observations: Tensor, state: Any) -> tuple[Tensor, Any]:
    output = module(observations) if state is None else module(observations, state)
    return (output[0], output[1]) if isinstance(output, tuple) else (output, None)


@torch.no_grad()
def imagine(
    sketch: Sketch,
    teacher: nn.Module,
    count: int,
    steps: int,
    generator: torch.Generator,
    *,
    actor: nn.Module | None = None,
    noise: float = 0.1,
    clip: float | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """Synthetic episodes: a policy acts in a sketch, a teacher says what it would do.

    Args:
        sketch: The model of a robot's episodes.
        teacher: The robot's policy.
        count: Episodes B.
        steps: Steps T of each.
        generator: Draws.
        actor: Who acts; the teacher if None.
        noise: Standard deviation of what is added to executed actions in every second episode.
        clip: Executed actions are clipped to [-clip, clip]; None for no bound.

    Returns:
        Observations [B, T, Do] and the teacher's actions [B, T, Da].
    """
    z = sketch.start(count, generator)
    disturbed = (torch.arange(count) % 2 == 1)[:, None] * noise
    state, seen = None, []
    for time in range(steps):
        x = sketch.observe(z)
        seen.append(x)
        action, state = _act(actor or teacher, x[:, None], state)
        action = action[:, 0] + disturbed * torch.randn(count, action.shape[-1], generator=generator)
        action = action.clamp(-clip, clip) if clip is not None else action
        z = sketch.step(z, action, time, generator)
    observations = torch.stack(seen, 1)
    return observations, _act(teacher, observations, None)[0]


def _fresh(module: nn.Module, weights: StateDict, seed: int) -> nn.Module:
    """The module with parameters drawn anew, its buffers those of ``weights``; the global generator is untouched."""
    student = copy.deepcopy(module)
    student.load_state_dict(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, part in student.named_modules():
            if not list(part.parameters(recurse=False)):
                continue
            if not callable(getattr(part, "reset_parameters", None)):
                raise UserError(
                    f"{name or 'the policy'} ({type(part).__name__}) has no reset_parameters() to begin anew; give "
                    "start=an index, the policy to begin from"
                )
            part.reset_parameters()
    return student


def distill(
    spec: WeightSpec,
    state_dicts: Sequence[StateDict],
    *,
    module: nn.Module,
    statistics: Sequence[StateDict],
    coefficients: Sequence[float] | None = None,
    steps: int = 2000,
    episodes: int = 64,
    batch_size: int = 2,
    learning_rate: float = 2e-3,
    gradient_clip: float = 1.0,
    noise: float = 0.1,
    clip: float | None = 1.0,
    refreshes: int = 3,
    start: str | int = "fresh",
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> Merged:
    """The merger ``distill``: one policy learns, on sketches of the robots' data, to act like each of them.

    Minimises over theta  sum_i c_i E_{x ~ sketch_i} |f_theta(x_1..t) - f_i(x_1..t)|^2, where each episode is drawn from
    robot i's sketch with its policy f_i (or, after a refresh, the student) acting. Nothing is aligned: the student
    needs no common basis with anyone. The robots must see which task they are on, or their observations must differ.

    Args:
        spec: The policies' symmetry; not used.
        state_dicts: The robots' weights.
        module: A policy of their kind; ``merge`` gives it.
        statistics: What each robot sent: :func:`fleetgym.merging.statistics.statistics` of kind ``sketch``.
        coefficients: Weights c of the robots' losses; equal if None.
        steps: Gradient steps.
        episodes: Synthetic episodes drawn from each sketch.
        batch_size: Episodes of each robot in a gradient step.
        learning_rate: Adam's step size; it falls to 1% along half a cosine.
        gradient_clip: Largest norm of the gradient.
        noise: Of executed actions, in every second episode.
        clip: Executed actions lie in [-clip, clip]; None for no bound.
        refreshes: How often, evenly spread, as many episodes are added in which the student acts.
        start: ``"fresh"`` draws new weights; an index begins from that policy.
        seed: Seed of weights and draws.
        report: Called with (step, loss) now and then.

    Returns:
        The student's weights, identities, and a history of losses.

    Raises:
        UserError: Statistics that are missing, of another kind or size, or not one a policy.
    """
    count = len(state_dicts)
    shares = normalised(coefficients, count)
    if len(statistics) != count:
        raise UserError(f"{len(statistics)} statistics for {count} policies; give one a policy")
    if not (start == "fresh" or isinstance(start, int) and 0 <= start < count):
        raise UserError(f"start={start!r}: 'fresh' or an index below {count} is wanted")
    sketches = [Sketch.of(tensors, f"statistics {i}") for i, tensors in enumerate(statistics)]
    teachers = []
    for state in state_dicts:
        teacher = copy.deepcopy(module).eval()
        teacher.load_state_dict(state)
        teachers.append(teacher.requires_grad_(False))
    student = _fresh(module, state_dicts[0], seed)
    if start != "fresh":
        student.load_state_dict(state_dicts[start])
    student.train()

    generator = torch.Generator().manual_seed(seed)
    longest = max(sketch.length for sketch in sketches)
    mask = torch.stack([(torch.arange(longest) < sketch.length).float() for sketch in sketches])

    def draw(actor: nn.Module | None) -> tuple[Tensor, Tensor]:
        pools = []
        for sketch, teacher in zip(sketches, teachers):
            pair = imagine(sketch, teacher, episodes, sketch.length, generator, actor=actor, noise=noise, clip=clip)
            pools.append([nn.functional.pad(x, (0, 0, 0, longest - sketch.length)) for x in pair])
        return torch.stack([x for x, _ in pools]), torch.stack([y for _, y in pools])

    observations, actions = draw(None)  # [N, B, T, Do] and [N, B, T, Da]
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    weight = torch.tensor(shares)[:, None, None].expand(-1, batch_size, -1) * mask[:, None]
    weight = (weight / (batch_size * mask.sum(-1)[:, None, None])).flatten(0, 1)  # sums to one
    history: list[dict[str, Any]] = []
    rows = torch.arange(count)[:, None]
    every = steps // (refreshes + 1)
    for step in range(steps):
        if refreshes and step and step % every == 0 and step // every <= refreshes:
            student.eval()
            more = draw(student)
            student.train()
            observations, actions = (torch.cat(pair, 1) for pair in zip((observations, actions), more))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * (0.01 + 0.495 * (1 + math.cos(math.pi * step / steps)))
        picked = torch.randint(observations.shape[1], (count, batch_size), generator=generator)
        with torch.enable_grad():
            found, _ = _act(student, observations[rows, picked].flatten(0, 1), None)
            error = (found - actions[rows, picked].flatten(0, 1)).square().mean(-1)
            loss = (error * weight).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, gradient_clip)
        optimiser.step()
        if step % 100 == 99 or step == steps - 1:
            history.append({"step": step + 1, "loss": float(loss.detach())})
            if not math.isfinite(history[-1]["loss"]):
                raise UserError(f"distilling diverged at step {step + 1}; lower learning_rate={learning_rate}")
            if report is not None:
                report(step + 1, history[-1]["loss"])
    weights = {key: value.detach().clone() for key, value in student.state_dict().items()}
    return weights, [spec.identity() for _ in state_dicts], history
