"""What a robot may send beside its weights: sums over its data, from which no single episode can be read.

Each function here runs on the robot and turns a policy and its demonstrations into a few tensors; mergers on the server
take them in place of data. :func:`save_statistics` writes them as safetensors, :func:`sent_bytes` says what they weigh.

| kind | what is sent | who takes it |
|---|---|---|
| ``gram`` | for each linear or recurrent layer, the second moments of its inputs and a 1, float32 | ``regmean`` |
| ``fisher`` | for each parameter, the mean squared derivative of the log-likelihood, float32 | ``fisher`` |
| ``sketch`` | a linear-Gaussian model of how observations follow on observations and actions | ``distill`` |
| ``last`` | of a common policy's last layer: second moments of inputs, their products with actions | ``refit_last`` |
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.weights import evaluating

if TYPE_CHECKING:
    from fleetgym.core.demonstrations import SequenceBatch

Statistics = dict[str, Tensor]
KINDS = ("gram", "fisher", "sketch", "last")


def statistics(module: nn.Module, demonstrations: Any, kinds: Sequence[str] = ("gram",), **options: Any) -> Statistics:
    """Computes what a robot sends beside its weights.

    Args:
        module: The robot's trained policy, mapping observations [B, T, Do] to actions [B, T, Da], or to a tuple that
            begins with them.
        demonstrations: Its episodes: a ``SequenceBatch``, or ``Demonstrations`` (which are padded).
        kinds: Which of ``gram``, ``fisher``, ``sketch`` and ``last``.
        options: Options of :func:`fisher` and :func:`sketch`.

    Returns:
        Tensors by name, ``KIND/...``, and ``count`` [1], the number of steps they are of.

    Raises:
        UserError: Unknown kind or option, no data, or a layer that has no rule; the message names it.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind of statistics", kind, KINDS)
    accepted = {"fisher": ("draws", "seed"), "sketch": ("segments", "ridge")}
    known = [name for kind in kinds for name in accepted.get(kind, ())]
    for name in options:
        if name not in known:
            raise unknown(f"option of the statistics {', '.join(kinds)}", name, known)
    batch = as_batch(demonstrations)
    made: Statistics = {"count": batch.mask.sum().reshape(1)}
    makers = {"gram": gram, "fisher": fisher, "sketch": sketch, "last": last}
    for kind in kinds:
        chosen = {name: value for name, value in options.items() if name in accepted.get(kind, ())}
        made |= {f"{kind}/{name}": value for name, value in makers[kind](module, batch, **chosen).items()}
    return made


def as_batch(demonstrations: Any) -> SequenceBatch:
    """Demonstrations as one padded batch.

    Raises:
        UserError: They are of another type, or there is none.
    """
    batch = demonstrations.padded() if callable(getattr(demonstrations, "padded", None)) else demonstrations
    if not all(hasattr(batch, name) for name in ("observations", "actions", "mask")):
        raise UserError(f"statistics of a {type(batch).__name__}; give Demonstrations or a SequenceBatch")
    if not bool(batch.mask.any()):
        raise UserError("statistics of nothing: the demonstrations have no step")
    return batch


def save_statistics(path: str | os.PathLike, tensors: Statistics) -> int:
    """Writes statistics as safetensors, atomically.

    Returns:
        The bytes of the file.
    """
    from fleetgym.core.checkpoint import save_tensors
    from fleetgym.core.files import atomic_write

    with atomic_write(path) as temporary:
        save_tensors(temporary, tensors)
    return os.path.getsize(path)


def load_statistics(path: str | os.PathLike) -> Statistics:
    """Reads what :func:`save_statistics` wrote.

    Raises:
        UserError: The file is missing, damaged, or holds values that are not finite.
    """
    from fleetgym.core.checkpoint import load_tensors

    tensors = load_tensors(path)
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{path}: {name!r} holds values that are not finite; compute the statistics anew")
    return tensors


def sent_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors' entries, without any header."""
    return sum(value.numel() * value.element_size() for value in tensors.values())


def pack(symmetric: Tensor) -> Tensor:
    """The upper triangle [n (n + 1) / 2] of a symmetric matrix [n, n], as float32."""
    rows, columns = torch.triu_indices(*symmetric.shape)
    return symmetric[rows, columns].float()


def unpack(triangle: Tensor) -> Tensor:
    """The symmetric matrix [n, n] in float64 of its upper triangle."""
    size = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    out = torch.zeros(size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size)
    out[rows, columns] = triangle.double()
    out[columns, rows] = triangle.double()
    return out


# ---- second moments of what layers see ------------------------------------------------------------------------------


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The linear and recurrent layers of a module by name: those that closed-form merging has a rule for.

    Raises:
        UserError: A recurrent layer has two directions or projections.
    """
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.RNNBase):
            if layer.bidirectional or layer.proj_size:
                raise UserError(f"{name!r}: Gram matrices of two directions or projections are not supported")
            found[name] = layer
        elif isinstance(layer, nn.Linear):
            found[name] = layer
    return found


@contextmanager
def _listening(module: nn.Module, heard: dict[str, Tensor]) -> Iterator[None]:
    """Runs the module in evaluation mode and notes the input of each of its linear and recurrent layers."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: heard.__setitem__(name, inputs[0].detach()))
        for name, layer in layers_of(module).items()
    ]
    try:
        with evaluating(module):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def gram(module: nn.Module, batch: SequenceBatch) -> Statistics:
    """Mean second moments of the inputs of every linear and recurrent layer.

    For a linear layer G = E[z z^T] with z = [x, 1]; for layer l of a recurrent module, under ``NAME.l``, z = [x_t,
    h_{t-1}, 1], because gates see both at once. The mean is over the real steps of all episodes; tensors are packed
    upper triangles in float32, n (n + 1) / 2 entries of 4 bytes each.

    Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023 (linear layers);
    the recurrent layers are ours.

    Args:
        module: The policy.
        batch: Its episodes.

    Returns:
        Packed matrices by the layer's name.

    Raises:
        UserError: The module has no such layer, or one that runs outside the batch of episodes.
    """
    heard: dict[str, Tensor] = {}
    with _listening(module, heard):
        module(batch.observations)
    layers = layers_of(module)
    if not layers:
        raise UserError(f"{type(module).__name__} has neither linear nor recurrent layers: there is nothing to sum")
    out: Statistics = {}
    mask = batch.mask
    for name, layer in layers.items():
        if name not in heard:
            continue
        x = heard[name]
        if x.shape[:2] != mask.shape:
            raise UserError(f"{name!r} sees {tuple(x.shape)}, not [B, T, n] with B, T = {tuple(mask.shape)}")
        if not isinstance(layer, nn.RNNBase):
            out[name] = _second_moments(x[mask])
            continue
        for number in range(layer.num_layers):
            single = single_layer(layer, number)
            h = single(x)[0]
            before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
            out[f"{name}.{number}"] = _second_moments(torch.cat([x, before], -1)[mask])
            x = h
    return out


@torch.no_grad()
def last(module: nn.Module, batch: SequenceBatch) -> Statistics:
    """What the last linear layer of a common policy would need to fit the robot's actions by least squares.

    With z = [x, 1] its inputs and a the demonstrated actions: ``gram`` E[z z^T], packed, and ``product`` E[z a^T], both
    float32. Summed over robots they are those of all data together, so :func:`refit_last` loses nothing by not having
    it; but all robots must compute them with the same trunk, which takes a trip from the server first.

    Args:
        module: The policy that the server sent.
        batch: The robot's episodes.

    Raises:
        UserError: The module has no linear layer, or its last one does not put the actions out.
    """
    heard: dict[str, Tensor] = {}
    with _listening(module, heard):
        module(batch.observations)
    name = last_linear(module, heard)
    x = heard[name]
    if x.shape[:2] != batch.mask.shape:
        raise UserError(f"{name!r} sees {tuple(x.shape)}, not [B, T, n] with B, T = {tuple(batch.mask.shape)}")
    z = x[batch.mask].double()
    z = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1)
    a = batch.actions[batch.mask].double()
    if a.shape[-1] != dict(module.named_modules())[name].out_features:
        raise UserError(f"{name!r} is not what puts the {a.shape[-1]} actions out")
    return {"gram": pack(z.T @ z / len(z)), "product": (z.T @ a / len(z)).float()}


def last_linear(module: nn.Module, order: Mapping[str, Any]) -> str:
    """The linear layer that comes last in ``order``, names in the order in which layers run.

    Raises:
        UserError: There is none.
    """
    layers = layers_of(module)
    names = [name for name in order if isinstance(layers.get(name), nn.Linear)]
    if not names:
        raise UserError(f"{type(module).__name__} has no linear layer to refit")
    return names[-1]


@torch.no_grad()
def refit_last(
    module: nn.Module,
    statistics: Sequence[Mapping[str, Tensor]],
    *,
    example_input: Tensor,
    ridge: float = 1e-4,
    coefficients: Sequence[float] | None = None,
) -> nn.Module:
    """Solves the last linear layer of a merged policy for all robots' actions at once.

    W = (sum_i c_i E_i[a z^T]) (sum_i c_i E_i[z z^T] + e I)^-1: ridge regression on everybody's data, from moments.

    Args:
        module: The policy whose trunk the robots used; not touched.
        statistics: What each robot sent, with kind ``last``.
        example_input: An observation [1, 1, Do] (zeros will do) that shows which layer runs last.
        ridge: e, in units of the mean diagonal.
        coefficients: Weights of the robots; their numbers of steps if None.

    Returns:
        A copy with the new layer.

    Raises:
        UserError: Statistics of another kind or size.
    """
    from fleetgym.merging.mergers import normalised

    missing = [i for i, tensors in enumerate(statistics) if not {"last/gram", "last/product"} <= set(tensors)]
    if missing:
        raise UserError(f"statistics {missing[0]} hold no moments of the last layer; compute them with kinds=('last',)")
    if coefficients is None:
        coefficients = [float(tensors["count"]) for tensors in statistics]
    shares = normalised(coefficients, len(statistics))
    heard: dict[str, Tensor] = {}
    module = copy.deepcopy(module)
    with _listening(module, heard):
        module(example_input)
    layer = module.get_submodule(last_linear(module, heard))
    gram = sum(share * unpack(tensors["last/gram"]) for share, tensors in zip(shares, statistics))
    product = sum(share * tensors["last/product"].double() for share, tensors in zip(shares, statistics))
    if gram.shape[0] != layer.in_features + 1 or product.shape != (layer.in_features + 1, layer.out_features):
        raise UserError(
            f"moments of {gram.shape[0]} inputs for a layer of {layer.in_features}; they are of another policy"
        )
    if layer.bias is None:
        gram, product = gram[:-1, :-1], product[:-1]
    solved = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype), product)
    layer.weight.copy_(solved[: layer.in_features].T)
    if layer.bias is not None:
        layer.bias.copy_(solved[-1])
    return module


def _second_moments(z: Tensor) -> Tensor:
    z = torch.cat([z.double(), torch.ones(len(z), 1, dtype=torch.float64, device=z.device)], 1)
    return pack((z.T @ z / len(z)).cpu())


def single_layer(layer: nn.RNNBase, number: int) -> nn.RNNBase:
    """Layer ``number`` of a stack of recurrent layers, with the same weights and batch first."""
    options = {"nonlinearity": layer.nonlinearity} if isinstance(layer, nn.RNN) else {}
    size = layer.input_size if number == 0 else layer.hidden_size
    single = type(layer)(size, layer.hidden_size, bias=layer.bias, batch_first=True, **options)
    state = {
        f"{key[: -len(f'_l{number}')]}_l0": v for key, v in layer.state_dict().items() if key.endswith(f"_l{number}")
    }
    single.load_state_dict(state)
    return single.to(next(layer.parameters()))


# ---- diagonal Fisher information ------------------------------------------------------------------------------------


def fisher(module: nn.Module, batch: SequenceBatch, *, draws: int = 1, seed: int = 0) -> Statistics:
    """The diagonal of the Fisher information of each parameter, per step.

    The policy is taken as the mean of a Gaussian of unit variance over actions, the likelihood that the squared error
    belongs to. With targets drawn from the model itself, eps ~ N(0, 1) away from it, the derivative of an episode's
    log-likelihood is that of sum_t eps_t . a_t, and the mean of its square is the Fisher information (not the
    "empirical" one, which vanishes where the data is fitted).

    Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022.

    Args:
        module: The policy.
        batch: Its episodes.
        draws: Draws of eps for each episode.
        seed: Their seed.

    Returns:
        A float32 tensor of each parameter's shape.
    """
    parameters = dict(module.named_parameters())
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for episode in range(len(batch.mask)):
            steps = int(batch.mask[episode].sum())
            if not steps:
                continue
            output = module(batch.observations[episode : episode + 1, :steps])
            actions = output[0] if isinstance(output, tuple) else output
            for _ in range(draws):
                eps = torch.randn(actions.shape, generator=generator).to(actions)
                grads = torch.autograd.grad((eps * actions).sum(), list(parameters.values()), retain_graph=True)
                for name, grad in zip(parameters, grads):
                    sums[name] += grad.double().square()
    count = float(batch.mask.sum()) * draws
    return {name: (value / count).float() for name, value in sums.items()}


# ---- a sketch of the data: how observations follow on one another ---------------------------------------------------


@torch.no_grad()
def sketch(module: nn.Module, batch: SequenceBatch, *, segments: int = 4, ridge: float = 1e-3) -> Statistics:
    """A linear-Gaussian model of the robot's episodes: first observation, and step by step from there.

    x_0 ~ N(m, S_0);  x_{t+1} = A_k [x_t, a_t, 1] + e,  e ~ N(0, S_k), with one (A_k, S_k) for each of K stretches of
    time. Only directions in which the robot's observations vary are kept. Fitted by ridge regression from second
    moments alone; no observation is sent, and robots with the same task can add their moments up.

    Args:
        module: Not used; every kind of statistics is called alike.
        batch: The robot's episodes.
        segments: K, stretches of time with equally many steps.
        ridge: Of the regression, in units of the mean second moment of standardised regressors.

    Returns:
        ``mean`` [Do] and ``scale`` [Do] (0 where nothing varies) of observations; in standardised units and for the Dv
        dimensions that vary ``initial_mean`` [Dv], ``initial_covariance`` and ``noise`` [K, ...] (packed triangles),
        ``transition`` [K, Dv, Dv + Da + 1]; ``starts`` [K] int64, the first step of each segment; ``length`` [2] int64,
        the mean and the longest episode.

    Raises:
        UserError: Observations are not vectors, actions are discrete, or there are too few steps.
    """
    x, a, mask = batch.observations.double(), batch.actions.double(), batch.mask
    if x.ndim != 3 or a.ndim != 3:
        raise UserError(
            f"a sketch takes vectors, not observations {tuple(x.shape[2:])} and actions {tuple(a.shape[2:])}"
        )
    follows = mask[:, 1:] & mask[:, :-1]
    if int(follows.sum()) < 2 * segments:
        raise UserError(f"{int(follows.sum())} steps are too few for a sketch of {segments} segments; lower segments")
    mean = x[mask].mean(0)
    scale = x[mask].std(0)
    vary = scale > 1e-6 * mean.abs().clamp(min=1.0)
    scale = torch.where(vary, scale, torch.ones_like(scale))
    z = ((x - mean) / scale)[..., vary]
    times = torch.arange(mask.shape[1] - 1).expand(len(mask), -1)[follows].double()
    starts = torch.quantile(times, torch.arange(segments).double() / segments).long()
    starts[0] = 0
    transition, noise = [], []
    for k in range(segments):
        end = int(starts[k + 1]) if k + 1 < segments else mask.shape[1]
        rows = follows.clone()
        rows[:, : int(starts[k])] = False
        rows[:, end:] = False
        before, acted, after = z[:, :-1][rows], a[:, :-1][rows], z[:, 1:][rows]
        if not len(before):
            raise UserError(f"segment {k} of {segments} has no step; lower segments")
        # The change is regressed, so that the ridge pulls towards "nothing changes".
        regressors = torch.cat([before, acted, torch.ones(len(before), 1, dtype=z.dtype)], 1)
        second = regressors.T @ regressors / len(before)
        second += ridge * second.diagonal().mean() * torch.eye(len(second), dtype=z.dtype)
        change = torch.linalg.solve(second, regressors.T @ (after - before) / len(before)).T
        rest = after - before - regressors @ change.T
        change[:, : z.shape[-1]] += torch.eye(z.shape[-1], dtype=z.dtype)
        transition.append(change)
        noise.append(pack(rest.T @ rest / len(rest)))
    first = z[:, 0][mask[:, 0]]
    centred = first - first.mean(0)
    lengths = mask.sum(1)
    return {
        "mean": mean.float(),
        "scale": (scale * vary).float(),
        "initial_mean": first.mean(0).float(),
        "initial_covariance": pack(centred.T @ centred / max(1, len(first) - 1)),
        "starts": starts,
        "transition": torch.stack(transition).float(),
        "noise": torch.stack(noise),
        "length": torch.stack([lengths.double().mean().round().long(), lengths.max()]),
    }


class Sketch:
    """Draws synthetic episodes from what :func:`sketch` made.

    Args:
        tensors: The tensors of :func:`sketch` (without the prefix ``sketch/``).
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.mean, scale = tensors["mean"].double(), tensors["scale"].double()
        self.vary = scale > 0
        self.scale = scale[self.vary]
        self.initial_mean = tensors["initial_mean"].double()
        self.initial_factor = _factor(unpack(tensors["initial_covariance"]))
        self.starts = tensors["starts"].tolist()
        self.transition = tensors["transition"].double()
        self.noise = torch.stack([_factor(unpack(packed)) for packed in tensors["noise"]])
        self.length = int(tensors["length"][1])
        self.action_size = self.transition.shape[-1] - self.transition.shape[-2] - 1

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str = "statistics") -> Sketch:
        """From what :func:`statistics` gave.

        Raises:
            UserError: There is no sketch among them.
        """
        own = {key.removeprefix("sketch/"): value for key, value in tensors.items() if key.startswith("sketch/")}
        if not own:
            raise UserError(f"{name} hold no sketch; compute them with statistics(policy, demonstrations, ('sketch',))")
        return cls(own)

    def observe(self, z: Tensor) -> Tensor:
        """Standardised varying dimensions [B, Dv] as observations [B, Do], float32."""
        x = self.mean.expand(len(z), -1).clone()
        x[:, self.vary] += z * self.scale
        return x.float()

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """First states, [B, Dv]."""
        draws = torch.randn(count, len(self.initial_mean), generator=generator, dtype=torch.float64)
        return self.initial_mean + draws @ self.initial_factor.T

    def step(self, z: Tensor, action: Tensor, time: int, generator: torch.Generator) -> Tensor:
        """The next states [B, Dv]; they are held within five deviations, so that no model can run away."""
        k = max(i for i, start in enumerate(self.starts) if start <= time)
        regressors = torch.cat([z, action.double(), torch.ones(len(z), 1, dtype=torch.float64)], 1)
        draws = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        return (regressors @ self.transition[k].T + draws @ self.noise[k].T).clamp(-5, 5)


def _factor(covariance: Tensor) -> Tensor:
    """A matrix F with F F^T = covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()
