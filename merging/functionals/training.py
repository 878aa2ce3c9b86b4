"""One training loop for all models that read weights, and how well they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fleetgym.core import UserError
from fleetgym.core.errors import unknown
from fleetgym.core.seeding import generator
from fleetgym.core.weights import evaluating
from fleetgym.merging.functionals.batch import WeightBatch

if TYPE_CHECKING:
    from fleetgym.core.run import Run

Inputs = WeightBatch | Tensor
LOSSES = ("cross_entropy", "bce", "mse")


@dataclass
class Fitted:
    """What a training gave.

    Attributes:
        score: The best validation score; that of the last step without validation. Higher is better.
        step: The step that it was reached at. The model has the weights of this step.
        history: A row for each evaluation: ``step``, ``loss`` (mean over the steps before) and validation metrics.
    """

    score: float
    step: int
    history: list[dict[str, float]] = field(default_factory=list)


def select(inputs: Inputs, index: Tensor) -> Inputs:
    """Some networks of a batch, or rows of a tensor."""
    if isinstance(inputs, WeightBatch):
        return inputs.replace(inputs.data[index.to(inputs.data.device)])
    return inputs[index.to(inputs.device)]


def kendall_tau(predictions: Tensor, targets: Tensor) -> float:
    """Kendall's rank correlation tau-b; zero where either is constant."""
    from scipy.stats import kendalltau

    value = float(kendalltau(predictions.double().cpu().numpy(), targets.double().cpu().numpy()).statistic)
    return value if math.isfinite(value) else 0.0


@torch.no_grad()
def predict(model: nn.Module, inputs: Inputs, batch_size: int = 256, device: str | torch.device = "cpu") -> Tensor:
    """The outputs of a model in evaluation mode, [N, outputs], on the CPU."""
    out = []
    with evaluating(model):
        for index in torch.arange(len(inputs)).split(batch_size):
            out.append(model(select(inputs, index).to(device)).cpu())
    return torch.cat(out)


def evaluate(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    loss: str,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """How well a model does.

    Args:
        model: Gives [B, outputs].
        inputs: N networks, or N rows.
        targets: Classes [N] for ``cross_entropy``, else numbers [N].
        loss: See :func:`fit`.
        batch_size: Networks at a time.
        device: Where to compute.

    Returns:
        ``loss`` and ``score``, with ``accuracy`` for classes, and ``tau`` (Kendall) and ``r2`` for numbers. The score
        is accuracy or tau.
    """
    outputs = predict(model, inputs, batch_size, device)
    targets = targets.cpu()
    metrics = {"loss": float(_loss(loss, outputs, targets))}
    if loss == "cross_entropy":
        metrics["accuracy"] = metrics["score"] = float((outputs.argmax(-1) == targets).double().mean())
        return metrics
    values = outputs.squeeze(-1).sigmoid() if loss == "bce" else outputs.squeeze(-1)
    metrics["tau"] = metrics["score"] = kendall_tau(values, targets)
    spread = float((targets.double() - targets.double().mean()).square().sum())
    errors = float((targets.double() - values.double()).square().sum())
    metrics["r2"] = 1 - errors / spread if spread > 0 else 0.0
    return metrics


def _loss(kind: str, outputs: Tensor, targets: Tensor) -> Tensor:
    if kind == "cross_entropy":
        return F.cross_entropy(outputs, targets)
    values, targets = outputs.squeeze(-1), targets.to(outputs.dtype)
    return F.binary_cross_entropy_with_logits(values, targets) if kind == "bce" else F.mse_loss(values, targets)


def _check(inputs: Inputs, targets: Tensor, loss: str, what: str) -> None:
    if len(inputs) != len(targets):
        raise UserError(f"{what}: {len(inputs)} networks and {len(targets)} targets; give one a network")
    if not len(inputs):
        raise UserError(f"{what}: there are no networks")
    if targets.dim() != 1:
        raise UserError(f"{what}: targets have shape {tuple(targets.shape)}, expected [N]")
    if loss == "cross_entropy":
        if targets.is_floating_point() or int(targets.min()) < 0:
            raise UserError(f"{what}: loss 'cross_entropy' needs classes 0, 1, ... as integers, got {targets.dtype}")
        return
    if not bool(torch.isfinite(targets).all()):
        n = int((~torch.isfinite(targets)).nonzero()[0])
        raise UserError(f"{what}: target {n} is {float(targets[n])}; leave the network out")
    if loss == "bce" and not bool(((targets >= 0) & (targets <= 1)).all()):
        raise UserError(f"{what}: loss 'bce' needs targets in [0, 1], got {float(targets.min())} to {targets.max()}")


def fit(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    *,
    loss: str = "bce",
    validation: tuple[Inputs, Tensor] | None = None,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: int = 50,
    clip: float | None = 1.0,
    evaluate_every: int = 100,
    augment: Callable[[Inputs, np.random.Generator], Inputs] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    run: Run | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
) -> Fitted:
    """Trains a model on labelled networks, and leaves it with its best weights on the validation set.

    AdamW; the step size rises over ``warmup`` steps and falls to 1 % along half a cosine. Models with ``fitted`` get
    their inputs in their own layout once, before training.

    Args:
        model: Takes a batch of the inputs and gives [B, outputs].
        inputs: N networks, or N rows of another input (latents).
        targets: [N]: classes for ``cross_entropy``, numbers in [0, 1] for ``bce``, numbers for ``mse``.
        loss: See above; ``bce`` fits rates of success, and the sigmoid of the output is the prediction.
        validation: Inputs and targets to select the best step by; without them the last step stays.
        steps: Gradient steps.
        batch_size: Networks in one; no more than there are.
        learning_rate: Largest step size.
        weight_decay: Of AdamW.
        warmup: See above.
        clip: Largest norm of the gradient; None for no bound.
        evaluate_every: Steps between evaluations.
        augment: Changes a batch before the model sees it.
        seed: Draws batches, dropout and ``augment``. The model's first weights are the caller's.
        device: Where to compute; the model comes back to where it was.
        run: Keeps state and metrics there, and goes on from its saved state.
        report: Called with each row of the history.

    Returns:
        The best score, its step and the history.

    Raises:
        UserError: Unknown loss, or targets that do not fit it or the networks.
    """
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    _check(inputs, targets, loss, "training set")
    if validation is not None:
        _check(*validation, loss, "validation set")
    if hasattr(model, "fitted"):
        inputs = model.fitted(inputs)
        validation = validation and (model.fitted(validation[0]), validation[1])
    batch_size = min(batch_size, len(inputs))
    if batch_size < 2 and any(isinstance(m, nn.BatchNorm1d) for m in model.modules()):
        raise UserError(f"a batch of {batch_size}: batch normalisation needs at least two networks")
    inputs, targets = inputs.to(device), targets.to(device)

    def step_loss(index: Tensor, rng: np.random.Generator) -> Tensor:
        batch = select(inputs, index)
        return _loss(loss, model(augment(batch, rng) if augment else batch), targets[index.to(targets.device)])

    def judge() -> dict[str, float]:
        return evaluate(model, *validation, loss, device=device)

    return train(
        model,
        step_loss,
        len(inputs),
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        clip=clip,
        evaluate_every=evaluate_every,
        judge=judge if validation is not None else None,
        seed=seed,
        device=device,
        run=run,
        report=report,
    )


def train(
    model: nn.Module,
    step_loss: Callable[[Tensor, np.random.Generator], Tensor],
    count: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    warmup: int = 50,
    clip: float | None = 1.0,
    evaluate_every: int = 100,
    judge: Callable[[], Mapping[str, float]] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    run: Run | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
) -> Fitted:
    """The loop of :func:`fit` for any loss.

    What a step draws depends on the seed and its number alone, so a run that was stopped and resumed ends at the same
    weights, and the global generator is left as it was.

    Args:
        model: What is trained.
        step_loss: From the indices of a batch [B] and a generator to a scalar.
        count: How many examples there are; each comes once an epoch.
        steps: See :func:`fit`, as the other arguments.
        batch_size: At most ``count``.
        learning_rate: See there.
        weight_decay: See there.
        warmup: See there.
        clip: See there.
        evaluate_every: See there; state is saved at the same steps.
        judge: Gives metrics with ``score``, higher being better; the best weights are kept.
        seed: See there.
        device: See there.
        run: See there.
        report: See there.

    Returns:
        The best score, its step and the history. Without ``judge`` the score is minus the mean loss of the last steps.

    Raises:
        UserError: A number below one, or a loss that is not finite.
    """
    for name, value in {"steps": steps, "batch_size": batch_size, "evaluate_every": evaluate_every}.items():
        if value < 1:
            raise UserError(f"{name}={value}: it must be at least 1")
    if not learning_rate > 0:
        raise UserError(f"learning_rate={learning_rate}: it must be positive")
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = {m: m.training for m in model.modules()}
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    result, best, start = Fitted(-math.inf, 0), _copy(model), 0
    saved = run.load_state() if run is not None else None
    if saved is not None:
        start, tensors, meta = saved
        _restore(model, optimizer, best, tensors)
        result = Fitted(meta["score"], meta["best_step"], meta["history"])
    losses: list[Tensor] = []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate(step, steps, warmup)
        rng = generator("functionals", seed, "step", step)
        index = batch_indices(count, batch_size, step, seed)
        with _drawing(rng, device):
            value = step_loss(index, rng)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(value.detach())
        if (step + 1) % evaluate_every and step + 1 < steps:
            continue
        row = {"step": step + 1, "loss": float(torch.stack(losses).mean())}
        losses.clear()
        if not math.isfinite(row["loss"]):
            raise UserError(f"the loss is {row['loss']} at step {step + 1}; lower learning_rate={learning_rate}")
        metrics = dict(judge()) if judge is not None else {"score": -row["loss"]}
        row |= {f"validation_{name}": value for name, value in metrics.items()} if judge is not None else {}
        if judge is None or metrics["score"] > result.score:
            result.score, result.step, best = metrics["score"], step + 1, _copy(model)
        result.history.append(row)
        if report is not None:
            report(row)
        if run is not None:
            run.log(step + 1, **{name: value for name, value in row.items() if name != "step"})
            meta = {"score": result.score, "best_step": result.step, "history": result.history}
            run.save_state(step + 1, _state(model, optimizer, best), meta)
    model.load_state_dict(best)
    model.to(home)
    for module, mode in modes.items():
        module.training = mode
    return result


def rate(step: int, steps: int, warmup: int) -> float:
    """The share of the largest step size: a linear rise over ``warmup`` steps, then half a cosine down to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The examples of a step: each epoch has its own order, and what is left over at its end waits for the next."""
    per_epoch = max(1, count // batch_size)
    epoch, place = divmod(step, per_epoch)
    order = generator("functionals", seed, "epoch", epoch).permutation(count)
    return torch.from_numpy(order[place * batch_size : (place + 1) * batch_size])


@contextmanager
def _drawing(rng: np.random.Generator, device: str | torch.device) -> Iterator[None]:
    """What torch draws inside (dropout) follows from ``rng``; the global generator is then as it was."""
    index = torch.device(device)
    devices = [index.index or 0] if index.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(rng.integers(2**62)))
        yield


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"best/{key}": value for key, value in best.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{key}": value for key, value in state.items()}
    return tensors


def _restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    model.load_state_dict(under("model/"))
    best.update({key: value.to(best[key].device) for key, value in under("best/").items()})
    states: dict[int, dict[str, Any]] = {}
    for key, value in under("optimizer/").items():
        i, _, name = key.partition("/")
        states.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
