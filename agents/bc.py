"""``fleetgym train bc``: one policy from demonstrations, by behaviour cloning."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from gymnasium import spaces

from fleetgym.agents.imitation import FleetLearner, ImitationConfig
from fleetgym.agents.networks import FLEET_TOOLS_DIFFERENCES, META_WORLD_DIFFERENCES, RecurrentPolicy, features
from fleetgym.core.checkpoint import Checkpoint
from fleetgym.core.demonstrations import Demonstrations
from fleetgym.core.errors import UserError
from fleetgym.core.run import Run
from fleetgym.core.seeding import seed_everything


@dataclass
class Args:
    """Train one (recurrent) policy on demonstrations by behaviour cloning."""

    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATASET ...")]
    """Folders of demonstrations, as `fleetgym collect` writes them; all of one layout."""
    out: Path
    """Folder of the run."""
    cell: Literal["gru", "lstm", "rnn", "mlp"] = "gru"
    """Core of the policy."""
    hidden: int = 64
    """Width of every hidden layer."""
    layers: int = 1
    """Layers of the core."""
    imitation: Annotated[ImitationConfig, tyro.conf.arg(name="")] = field(default_factory=ImitationConfig)
    """How to optimise."""
    seed: int = 0
    """Of the initial weights and the draws."""
    device: str = "cpu"
    """cpu or cuda."""
    save_every: float = 20.0
    """Seconds between saved states: what a kill may cost."""
    resume: bool = False
    """Go on in the folder of a run that was stopped."""


def train_bc(args: Args, run: Run) -> Checkpoint:
    """Trains, saving the state now and then, and writes the checkpoint ``last``.

    Args:
        args: What to train on, and how.
        run: The open run.

    Returns:
        The checkpoint.

    Raises:
        UserError: Datasets that do not fit each other or the policy, or training that diverges.
    """
    seed_everything(args.seed)
    demonstrations = Demonstrations.concatenate([Demonstrations.load(path) for path in args.datasets])
    for kind in ("observation", "action"):
        space = getattr(demonstrations, f"{kind}_space")
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise UserError(f"bc learns vectors from vectors; these demonstrations have the {kind} space {space}")
    batch = demonstrations.padded()
    observation_size, action_size = batch.observations.shape[-1], batch.actions.shape[-1]
    differences = _differences(demonstrations)
    low, high = float(demonstrations.action_space.low.min()), float(demonstrations.action_space.high.max())
    policy = RecurrentPolicy(
        observation_size,
        action_size,
        cell=args.cell,
        hidden=args.hidden,
        layers=args.layers,
        differences=differences,
        action_low=low if np.isfinite(low) else None,
        action_high=high if np.isfinite(high) else None,
    )
    statistics = demonstrations.statistics(
        transform=lambda x: features(torch.as_tensor(x), differences).numpy(), floor=1e-3
    )
    policy.normaliser.mean.copy_(torch.as_tensor(statistics.mean))
    policy.normaliser.std.copy_(torch.as_tensor(statistics.std))
    learner = FleetLearner([policy], [batch], args.imitation, seed=args.seed, device=args.device)
    saved = run.load_state()
    if saved is not None:
        learner.load_state(saved[1], saved[2])
    loss, last_save = None, time.monotonic()
    for step in run.track(args.imitation.steps, "bc", start=learner.step_count):
        loss = float(learner.train(1)[0])
        done = step + 1 == args.imitation.steps
        if done or (step + 1) % 10 == 0:
            run.log(step + 1, loss=loss, learning_rate=learner.learning_rate(step))
        if done or time.monotonic() - last_save > args.save_every:
            run.save_state(learner.step_count, *learner.state())
            last_save = time.monotonic()
    trained = learner.stack.policies()[0].cpu()
    if loss is None:  # resumed after the last step
        loss = next(row["loss"] for row in reversed(run.metrics()) if "loss" in row)
    info = {
        "metrics": {"loss": loss},
        "tasks": [part.get("task", "") for part in demonstrations.info["parts"]],
        "episodes": len(demonstrations),
    }
    return run.save_checkpoint("last", trained, info=info)


def _differences(demonstrations: Demonstrations) -> tuple[tuple[int, int, int], ...]:
    """Offsets that a policy also sees where the observation's layout is known."""
    known = {"MetaWorld": META_WORLD_DIFFERENCES, "FleetTools": FLEET_TOOLS_DIFFERENCES}
    homes = {str(part.get("env_id", "")).partition("/")[0] for part in demonstrations.info["parts"]}
    return known.get(homes.pop(), ()) if len(homes) == 1 else ()


def main(argv: Sequence[str]) -> int:
    """``fleetgym train bc``."""
    args = tyro.cli(Args, args=list(argv), prog="fleetgym train bc", config=(tyro.conf.OmitArgPrefixes,))
    if not args.datasets:
        raise UserError("no dataset: name at least one folder, such as one that `fleetgym collect` wrote")
    for path in args.datasets:
        Demonstrations.load(path)  # a bad dataset is said before the run's folder is made
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: no such device here; `fleetgym doctor` lists what there is")
    # Names, not paths: the run means the same when its folder is moved.
    config = {
        "system": "bc",
        **{
            k: v
            for k, v in dataclasses.asdict(args).items()
            if k not in ("out", "resume", "datasets", "device", "save_every")
        },
        "datasets": [path.name for path in args.datasets],
    }
    with Run.open(args.out, config, resume=args.resume, name="bc") as run:
        checkpoint = train_bc(args, run)
    loss = checkpoint.info["metrics"]["loss"]
    print(f"loss {loss:.4g} after {args.imitation.steps} steps; written to {checkpoint.path}")
    return 0
