"""Optimizers that are learned: a network reads weights, gradients and momenta, and says how to step.

:class:`LearnedOptimizer` is the update rule of Zhou et al., "Universal Neural Functionals" (NeurIPS 2024,
arXiv 2402.05232, section 4.2): momentum SGD plus a small correction f that is equivariant to the symmetry of the
network it trains. :class:`UNFOptimizer` applies a rule to any module in the usual loop. :func:`pes_train` learns a rule
by persistent evolution strategies (Vicol et al., ICML 2021, arXiv 2112.13835) on many small problems
(:class:`InnerTask`) at once; ``meta_gradient.gradient_train`` by derivatives, which needs far fewer steps.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_map

from fleetgym.core import Axis, Checkpoint, Run, UserError, WeightSpec
from fleetgym.core.checkpoint import MODULES, check_keys
from fleetgym.core.errors import unknown
from fleetgym.core.run import find_checkpoint, track
from fleetgym.core.seeding import torch_generator
from fleetgym.merging.functionals import Layout, NFLinear, UNFLinear, WeightBatch

ARCHITECTURE = "learned_optimizer"
KINDS = ("unf", "nfn", "deepset")
SYMMETRIES = ("np", "hidden", "full")
SCALES = ("tensor", "both", "none")
DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
"""The rates of the momenta that f sees."""
PERIODS = (10.0, 40.0, 160.0, 640.0, 2560.0, 10240.0)
"""Periods in steps of the features of time: the sine of each and the cosine of all but the last."""
FEATURES = 2 + len(DECAYS) + 2 * len(PERIODS) - 1

MODULES.register(ARCHITECTURE, "fleetgym.merging.learned_optimizer:LearnedOptimizer")


# ---- update rules ---------------------------------------------------------------------------------------------------


class UpdateRule(nn.Module):
    """How weights step, as a function of flat tensors; its parameters are what meta-training learns.

    ``rule(weights [B, P], gradients [B, P], moments [B, P, slots], t [B])`` gives new weights and moments. The P
    scalars of a network lie in the order of ``rule.layout``. ``t`` counts steps from 0.

    Attributes:
        layout: The order of the weights.
        slots: How many numbers the rule keeps for each weight; they are zero at first.
    """

    layout: Layout
    slots: int

    def on(self, spec: WeightSpec) -> UpdateRule:
        """The same rule for another network."""
        raise UserError(f"{type(self).__name__} has no form for another network")

    def fresh(self, count: int) -> Tensor:
        """The moments before the first step of ``count`` networks, [B, P, slots]."""
        like = next(self.parameters())
        return torch.zeros(count, self.layout.size, self.slots, dtype=like.dtype, device=like.device)


class Momentum(UpdateRule):
    """SGD with momentum, m <- gamma m + gradient, W <- W - alpha m, whose two numbers can be meta-trained.

    Args:
        spec: The network's symmetry, or its layout.
        alpha: Step size.
        gamma: Rate of the momentum.
    """

    slots = 1

    def __init__(self, spec: WeightSpec | Layout, alpha: float = 0.1, gamma: float = 0.9) -> None:
        super().__init__()
        self.layout = Layout.of(spec)
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.gamma = nn.Parameter(torch.tensor(float(gamma)))

    def on(self, spec: WeightSpec) -> Momentum:
        """The same numbers for another network."""
        return Momentum(spec, self.alpha.item(), self.gamma.item()).to(self.alpha)

    def forward(self, weights: Tensor, gradients: Tensor, moments: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`UpdateRule`."""
        moments = moments * self.gamma + gradients[..., None]
        return weights - self.alpha * moments[..., 0], moments


class Adam(UpdateRule):
    """Adam (Kingma and Ba, ICLR 2015) with bias correction, as ``torch.optim.Adam`` computes it.

    Args:
        spec: The network's symmetry, or its layout.
        alpha: Step size.
        beta1: Rate of the first moment.
        beta2: Rate of the second moment.
        epsilon: Added to the root of the second moment.
    """

    slots = 2

    def __init__(
        self,
        spec: WeightSpec | Layout,
        alpha: float = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__()
        self.layout = Layout.of(spec)
        for name, value in (("alpha", alpha), ("beta1", beta1), ("beta2", beta2), ("epsilon", epsilon)):
            setattr(self, name, nn.Parameter(torch.tensor(float(value))))

    def on(self, spec: WeightSpec) -> Adam:
        """The same numbers for another network."""
        values = (v.item() for v in (self.alpha, self.beta1, self.beta2, self.epsilon))
        return Adam(spec, *values).to(self.alpha)

    def forward(self, weights: Tensor, gradients: Tensor, moments: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`UpdateRule`."""
        first = self.beta1 * moments[..., 0] + (1 - self.beta1) * gradients
        second = self.beta2 * moments[..., 1] + (1 - self.beta2) * gradients.square()
        count = t[:, None] + 1
        scale = (second / (1 - self.beta2**count)).sqrt() + self.epsilon
        return weights - self.alpha * (first / (1 - self.beta1**count)) / scale, torch.stack([first, second], -1)


class LearnedOptimizer(UpdateRule):
    """Momentum SGD with a learned, equivariant correction (arXiv 2402.05232, section 4.2).

    m^g <- g m^g + gradient for every rate g, and W <- W - alpha (m^{g0} + beta f(W, gradient, {m^{gi}}, t)). f sees 19
    features of each weight: the weight, its gradient, six momenta (:data:`DECAYS`) and 11 sinusoids of t
    (:data:`PERIODS`; the paper does not give its own). Three pointwise linear layers with ReLU (a deep set) bring
    them to 32 channels, and one layer that reads all weights together brings these to 1. alpha, beta and g0 are learned
    with f.

    The parameters do not depend on the sizes of groups of units, so that with ``symmetry="np"`` a rule serves
    networks of other widths, inputs and outputs too (:meth:`on`).

    Args:
        spec: Symmetry of the network that will be trained; its buffers are left out.
        kind: The last layer: ``unf`` (complete basis), ``nfn`` (feed-forward chains only) or ``deepset`` (pointwise).
        symmetry: What f is equivariant to, of permutations (not of signs). ``np``: hidden units, and inputs and
            outputs as if they had no order either, as in the paper; heads of attention are not kept together.
            ``hidden``: what is a symmetry of the function; other axes are folded into channels, which takes more
            parameters. ``full``: ``np``, and the rest of the fixed axes (positions in the filters of a convolution,
            rows of an embedding) each as a group of its own, which takes the fewest.
        hidden: Channels of the trunk.
        scale: ``tensor`` divides each of the first 8 features by its root mean square over a tensor, so that what
            f says does not depend on the scale of the loss; ``both`` does so too, and multiplies f by the root mean
            square of m^{g0} over the tensor, so that the step as a whole grows with the gradients as that of momentum
            SGD; ``none`` gives the features as they are.
        alpha: Step size to begin with.
        gamma: Rate g0 of the momentum to begin with.
        beta: Weight of f to begin with.
        seed: Draws f.

    Raises:
        UserError: Unknown kind, symmetry or scale, no channels, or ``nfn`` for a network that is no chain.
    """

    architecture = ARCHITECTURE
    slots = 1 + len(DECAYS)

    def __init__(
        self,
        spec: WeightSpec | Mapping[str, Any],
        kind: str = "unf",
        *,
        symmetry: str = "np",
        hidden: int = 32,
        scale: str = "tensor",
        alpha: float = 0.1,
        gamma: float = 0.9,
        beta: float = 0.001,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for what, value, known in (("kind", kind, KINDS), ("symmetry", symmetry, SYMMETRIES), ("scale", scale, SCALES)):
            if value not in known:
                raise unknown(f"{what} of a learned optimizer", value, known)
        if hidden < 1:
            raise UserError(f"hidden={hidden}: the trunk needs at least 1 channel")
        spec = trainable(spec if isinstance(spec, WeightSpec) else WeightSpec.from_dict(spec))
        self._options = {"kind": kind, "symmetry": symmetry, "hidden": hidden, "scale": scale}
        self.config: dict[str, Any] = {"spec": spec.to_dict(), **self._options}
        self.kind, self.scale = kind, scale
        read = _freed(spec, symmetry)
        self.layout = Layout.of(read)
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.gamma = nn.Parameter(torch.tensor(float(gamma)))
        self.beta = nn.Parameter(torch.tensor(float(beta)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = (FEATURES, hidden, hidden, hidden)
            self.trunk = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
            if kind == "unf":
                self.last: nn.Module = UNFLinear(read, hidden, 1)
            elif kind == "nfn":
                self.last = NFLinear(read, hidden, 1, symmetry=None)
            else:
                self.last = nn.Linear(hidden, 1)
        self.register_buffer("rates", torch.tensor(DECAYS), persistent=False)
        self.register_buffer("periods", torch.tensor(PERIODS), persistent=False)

    def on(self, spec: WeightSpec) -> LearnedOptimizer:
        """The same rule, weights and all, for another network.

        Raises:
            UserError: The other network's rule has other parameters: it has other tensors, or other sizes along axes
                that are folded into channels.
        """
        other = LearnedOptimizer(spec, **self._options)
        if other.layout != self.layout:
            source = f"a rule learned for {_brief(self.layout)}, put on {_brief(other.layout)},"
            check_keys(other.state_dict(), self.state_dict(), source)
        other.load_state_dict(self.state_dict())
        return other.to(self.alpha).train(self.training)

    def forward(self, weights: Tensor, gradients: Tensor, moments: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`UpdateRule`."""
        rates = torch.cat([self.gamma[None], self.rates.to(self.gamma)])
        moments = moments * rates + gradients[..., None]
        f = self.correction(weights, gradients, moments[..., 1:], t)
        if self.scale == "both":
            sizes = [part.length for part in self.layout.parts]
            f = torch.cat([a * _rms(m, 1) for a, m in zip(f.split(sizes, 1), moments[..., 0].split(sizes, 1))], dim=1)
        step = moments[..., 0] + self.beta * f
        return weights - self.alpha * step, moments

    def correction(self, weights: Tensor, gradients: Tensor, momenta: Tensor, t: Tensor) -> Tensor:
        """f, [B, P]; ``momenta`` are [B, P, 6], those of :data:`DECAYS`."""
        x = torch.cat([weights[..., None], gradients[..., None], momenta], dim=-1)
        if self.scale != "none":
            pieces = x.split([part.length for part in self.layout.parts], dim=1)
            x = torch.cat([p / _rms(p, 1) for p in pieces], dim=1)
        first, *others = self.trunk
        known = x.shape[-1]
        # The features of time are alike for all weights: their share of the first layer is one vector a network.
        common = self.time(t) @ first.weight[:, known:].T + first.bias
        # In place: with a tensor of some megabytes for each, most of the time would go into fresh memory.
        x = (x @ first.weight[:, :known].T).add_(common[:, None]).relu_()
        for layer in others:
            x = (x @ layer.weight.T).add_(layer.bias).relu_()
        if self.kind == "deepset":
            return self.last(x)[..., 0]
        return self.last(WeightBatch(self.layout, x)).data[..., 0]

    def time(self, t: Tensor) -> Tensor:
        """The features of time, [B] -> [B, 11]."""
        angle = 2 * math.pi * t[:, None] / self.periods.to(self.alpha)
        return torch.cat([angle.sin(), angle[:, :-1].cos()], dim=-1)


def _rms(x: Tensor, dim: int) -> Tensor:
    return (x.square().mean(dim, keepdim=True) + 1e-20).sqrt()


def trainable(spec: WeightSpec, keys: Iterable[str] | None = None) -> WeightSpec:
    """The part of a spec that an optimizer sees.

    Args:
        spec: The symmetry of a module.
        keys: Keys of the tensors that are trained; all but the buffers if None.

    Returns:
        A spec of these tensors, with the groups that lie along them.

    Raises:
        UserError: A key is not of the spec, or none is left.
    """
    keys = [key for key in spec.axes if key not in spec.buffers] if keys is None else list(keys)
    for key in keys:
        if key not in spec.axes:
            raise unknown("tensor of the spec", key, spec.axes)
    if not keys:
        raise UserError("the spec has no parameters: there is nothing to train")
    axes = {key: spec.axes[key] for key in spec.axes if key in set(keys)}
    along = {leaf.group for dims in axes.values() for axis in dims for leaf in axis.leaves}
    along |= {spec.nested[group] for group in along if group in spec.nested}
    return replace(
        spec,
        axes=axes,
        groups={group: size for group, size in spec.groups.items() if group in along},
        signed={group: sign for group, sign in spec.signed.items() if group in along},
        nested={child: parent for child, parent in spec.nested.items() if child in along},
        buffers=(),
    )


def _freed(spec: WeightSpec, symmetry: str) -> WeightSpec:
    """The symmetry that f is made for; see :class:`LearnedOptimizer`."""
    if symmetry == "hidden":
        return spec
    # All permutations of an attention layer's channels, not only those that keep heads together: f has then far fewer
    # terms, and is equivariant to the smaller group as well.
    blocks = set(spec.nested.values())
    groups = {group: size for group, size in spec.groups.items() if group not in blocks}
    spec = replace(spec, groups=groups, nested={}).free("in", "out")
    if symmetry == "np":
        return spec
    groups = dict(spec.groups)

    def free(axis: Axis, name: str) -> Axis:
        if axis.parts:
            return Axis(parts=tuple(free(part, f"{name}.{n}") for n, part in enumerate(axis.parts)))
        if axis.group is not None:
            return axis
        groups[name] = axis.size
        return Axis(name)

    axes = {key: tuple(free(axis, f"{key}:{dim}") for dim, axis in enumerate(dims)) for key, dims in spec.axes.items()}
    return replace(spec, axes=axes, groups=groups)


def _brief(layout: Layout) -> str:
    return f"{len(layout.keys)} tensors ({layout.keys[0]!r} to {layout.keys[-1]!r}, {layout.size} weights)"


def load_rule(path: str | os.PathLike | Checkpoint) -> LearnedOptimizer:
    """Reads a meta-trained rule that ``Checkpoint.save(path, rule)`` or :func:`pes_train` wrote.

    Args:
        path: The checkpoint's folder, a run's folder (its last checkpoint), or a checkpoint.

    Raises:
        UserError: It is missing, damaged, of another architecture, or holds weights that are not finite.
    """
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.load(find_checkpoint(path))
    if checkpoint.architecture != ARCHITECTURE:
        raise UserError(
            f"{checkpoint.path} holds a {checkpoint.architecture!r}, a {ARCHITECTURE!r} is wanted; see pes_train"
        )
    checkpoint.check_finite()
    rule = checkpoint.module()
    assert isinstance(rule, LearnedOptimizer)
    return rule


# ---- training any module --------------------------------------------------------------------------------------------


class UNFOptimizer(torch.optim.Optimizer):
    """Trains a module by an update rule, in the usual loop of ``zero_grad``, ``backward`` and ``step``.

    ``optimizer = UNFOptimizer(module, "runs/rule", example_input=x)`` reads a meta-trained rule and puts it on the
    module's symmetry. A tensor without a gradient stays as it is, and f sees a gradient of zero for it. ``lr``
    multiplies the step (1 is what was learned), so that learning-rate schedulers work.

    ``state_dict`` holds the moments of each parameter and a fingerprint of the rule; ``load_state_dict`` refuses those
    of another rule.

    Args:
        params: The module, or its parameters by name (``module.named_parameters()``).
        weights: A rule, or where :func:`load_rule` finds one. None: a rule that was not trained, momentum SGD with a
            small random perturbation.
        spec: The module's symmetry. Needed where parameters are given; else it is derived.
        example_input: What to derive it with; see ``WeightSpec.from_module``.
        lr: Multiplies every step.
        on_nan: What to do where a gradient is not finite: ``raise``, or ``skip`` the whole step with a warning.

    Attributes:
        rule: The rule, in the type and on the device of the parameters.
        spec: The symmetry, of the parameters only.
        skipped: How many steps were skipped.

    Raises:
        UserError: The parameters do not fit the spec (the message names tensor and axis), are on several devices or
            of several types, of less precision than float32 or not finite; the rule does not fit the network; or an
            option is unknown.
    """

    def __init__(
        self,
        params: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        weights: UpdateRule | Checkpoint | str | os.PathLike | None = None,
        *,
        spec: WeightSpec | None = None,
        example_input: Any = None,
        lr: float = 1.0,
        on_nan: str = "raise",
    ) -> None:
        if on_nan not in ("raise", "skip"):
            raise unknown("on_nan", on_nan, ("raise", "skip"))
        if not (math.isfinite(lr) and lr >= 0):
            raise UserError(f"lr={lr}: a number of at least 0 is wanted; 1 is the step that was learned")
        named = _named(params)
        if spec is None:
            if not isinstance(params, nn.Module):
                raise UserError("parameters without their symmetry: pass spec=WeightSpec.from_module(module, example)")
            spec = WeightSpec.from_module(params, example_input)
        self.spec = trainable(spec, _keys(spec, named))
        self._params = {key: named[key] for key in self.spec.axes}
        for key, tensor in self._params.items():
            if tensor.dtype not in (torch.float32, torch.float64):
                raise UserError(
                    f"{key!r} is {tensor.dtype}; moments need float32 or float64, keep such a copy to train"
                )
        WeightBatch.stack(self.spec, [{key: tensor.detach() for key, tensor in self._params.items()}])
        if weights is None:
            weights = LearnedOptimizer(self.spec)
        rule = weights if isinstance(weights, UpdateRule) else load_rule(weights)
        like = next(iter(self._params.values()))
        self.rule = rule.on(self.spec).to(like.device, like.dtype).requires_grad_(False)
        self.skipped = 0
        self._on_nan = on_nan
        defaults = {"lr": lr, "rule": _fingerprint(self.rule)}
        super().__init__(list(self._params.values()), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: f reads all weights together, so that they are one group."""
        if self.param_groups:
            raise UserError("the rule reads all weights together: make a new UNFOptimizer with all parameters")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the moments of a saved optimizer.

        Raises:
            UserError: It belongs to another rule, or to tensors of other shapes.
        """
        groups = state_dict.get("param_groups", [{}])
        if len(groups) != 1 or groups[0].get("rule") != self.param_groups[0]["rule"]:
            theirs = [group.get("rule") for group in groups]
            raise UserError(
                f"the state belongs to rule {theirs}, this optimizer has {self.param_groups[0]['rule']!r}; construct "
                "it with the weights it had"
            )
        for number, (key, tensor) in zip(groups[0]["params"], self._params.items()):
            moments = state_dict["state"].get(number, {}).get("moments")
            wanted = (*tensor.shape, self.rule.slots)
            if moments is not None and tuple(moments.shape) != wanted:
                raise UserError(f"moments of {key!r} have shape {tuple(moments.shape)}, expected {wanted}")
        super().load_state_dict(dict(state_dict))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Makes a step with the gradients that the parameters have.

        Args:
            closure: Computes the loss and the gradients again; most callers have none.

        Returns:
            The closure's loss, or None.

        Raises:
            UserError: A gradient is sparse, or is not finite while ``on_nan`` is ``raise``. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        live = [key for key, tensor in self._params.items() if tensor.grad is not None]
        if not live or not self._finite(live):
            return loss
        for key in live:
            state, tensor = self.state[self._params[key]], self._params[key]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["moments"] = tensor.new_zeros(*tensor.shape, self.rule.slots)
        layout, rule, slots = self.rule.layout, self.rule, self.rule.slots
        shapes = layout.shapes
        params = [self._params[key] for key in layout.keys]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        moments = [
            self.state[p]["moments"].reshape(-1, slots) if p in self.state else p.new_zeros(p.numel(), slots)
            for p in params
        ]
        flat = layout.gather(torch.cat([p.reshape(-1) for p in params])[None])
        count = max(float(self.state[self._params[key]]["step"]) for key in live)
        new, moments = rule(
            flat,
            layout.gather(torch.cat([g.reshape(-1) for g in gradients])[None]),
            layout.gather(torch.cat(moments)[None]),
            flat.new_full((1,), count),
        )
        new = flat + self.param_groups[0]["lr"] * (new - flat)
        sizes = [prod(shape) for shape in shapes.values()]
        values = layout.scatter(new)[0].split(sizes)
        moments = layout.scatter(moments)[0].split(sizes)
        for key, value, moment in zip(layout.keys, values, moments):
            tensor = self._params[key]
            if tensor.grad is not None:
                tensor.copy_(value.view_as(tensor))
                self.state[tensor]["moments"].copy_(moment.view(*tensor.shape, slots))
                self.state[tensor]["step"] += 1
        return loss

    def _finite(self, live: Sequence[str]) -> bool:
        """Whether all gradients can be used; see ``on_nan``."""
        for key in live:
            gradient = self._params[key].grad
            if gradient.layout != torch.strided:
                raise UserError(
                    f"the gradient of {key!r} is {gradient.layout}; the rule needs dense ones (sparse=False)"
                )
            if bool(torch.isfinite(gradient).all()):
                continue
            bad = int((~torch.isfinite(gradient)).sum())
            text = f"the gradient of {key!r} has {bad} of {gradient.numel()} values that are NaN or infinite"
            if self._on_nan == "raise":
                raise UserError(f"{text}; the loss diverged: lower lr, or pass on_nan='skip' to leave such steps out")
            self.skipped += 1
            warnings.warn(f"{text}; step skipped ({self.skipped} by now)", RuntimeWarning, stacklevel=4)
            return False
        return True


def _named(params: Any) -> dict[str, Tensor]:
    """Parameters by name."""
    if isinstance(params, nn.Module):
        params = params.named_parameters(remove_duplicate=False)
    if not isinstance(params, Mapping):
        items = list(params)
        if not all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in items):
            raise UserError("parameters without names; pass the module or module.named_parameters()")
        params = dict(items)
    if not params:
        raise UserError("no parameters to train")
    return dict(params)


def _keys(spec: WeightSpec, named: Mapping[str, Tensor]) -> list[str]:
    """Keys of the tensors to train, tied ones once."""
    wanted = [key for key in spec.axes if key not in spec.buffers]
    for key in named:
        if key not in spec.axes:
            raise UserError(f"{unknown('parameter', key, spec.axes)}; the spec belongs to another network")
    if missing := [key for key in wanted if key not in named]:
        key = missing[0]
        axes = ", ".join(f"{axis.group or axis.name} {n}" for axis, n in zip(spec.axes[key], spec.shapes[key]))
        raise UserError(
            f"parameter {key!r} with axes [{axes}] is missing; pass the module, or all of "
            "named_parameters(remove_duplicate=False)"
        )
    first: dict[int, str] = {}
    for key in wanted:
        first.setdefault(id(named[key]), key)
    return list(first.values())


def _fingerprint(rule: UpdateRule) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for key, tensor in sorted(rule.state_dict().items()):
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


# ---- problems to learn on -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class InnerTask:
    """A family of small training problems that an update rule is learned on, or compared on.

    Attributes:
        name: Seeds the draws, so that every rule meets the same initial weights and minibatches.
        make: Gives a network with fresh weights, drawn from torch's global generator. It must run under
            ``torch.func``: no in-place changes of its inputs, no dropout, and what it does may not depend on values.
        batches: ``batches(generator, n)`` draws n minibatches: tensors, or a structure of them, [n, ...].
        loss: ``loss(network, minibatch)`` with the network as a function; a scalar.
        sets: Fixed data by name, each as one minibatch, to measure the loss on: ``train``, ``test``.
        example_input: What the symmetry is derived with.
    """

    name: str
    make: Callable[[], nn.Module]
    batches: Callable[[torch.Generator, int], Any]
    loss: Callable[[Callable[..., Any], Any], Tensor]
    sets: Mapping[str, Any] = field(default_factory=dict)
    example_input: Any = None

    @cached_property
    def module(self) -> nn.Module:
        """A network of the family; functions run through it with other weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().requires_grad_(False)

    @cached_property
    def spec(self) -> WeightSpec:
        """The symmetry of the trained tensors."""
        spec = WeightSpec.from_module(self.module, self.example_input)
        return trainable(spec, _keys(spec, _named(self.module)))

    def initial(self, layout: Layout, *keys: int | str) -> Tensor:
        """Fresh weights for a seed, [P] in the order of ``layout``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_generator("initial", self.name, *keys).initial_seed())
            named = dict(self.make().named_parameters())
        return WeightBatch.stack(layout, [{key: named[key].detach() for key in layout.keys}]).data[0, :, 0]

    def value(self, layout: Layout, weights: Tensor, batch: Any) -> Tensor:
        """The loss of weights [P] on a minibatch; a scalar. It can be differentiated and batched by torch.func."""
        sizes = [prod(shape) for shape in layout.shapes.values()]
        pieces = layout.scatter(weights[None])[0].split(sizes)
        tensors = {key: piece.view(shape) for (key, shape), piece in zip(layout.shapes.items(), pieces)}
        return self.loss(lambda *inputs: functional_call(self.module, tensors, inputs), batch)


def check_fits(rule: UpdateRule, task: InnerTask) -> None:
    """Raises unless the rule was made for the task's network."""
    if rule.layout.shapes != {key: tuple(shape) for key, shape in task.spec.shapes.items()}:
        raise UserError(
            f"the rule is made for {_brief(rule.layout)}, task {task.name!r} trains {_brief(Layout.of(task.spec))}; "
            "put it there by rule.on(task.spec)"
        )


@dataclass(frozen=True)
class Curves:
    """What :func:`unroll` measured, of M settings and S seeds.

    Attributes:
        losses: On the minibatch before each step, [M, S, T].
        places: The numbers of steps after which the sets were measured.
        measured: For each of the task's sets the loss on it, [M, S, len(places)].
    """

    losses: Tensor
    places: list[int]
    measured: dict[str, Tensor]


@torch.no_grad()
def unroll(
    rule: UpdateRule,
    task: InnerTask,
    steps: int,
    seeds: Sequence[int],
    *,
    settings: Mapping[str, Tensor] | None = None,
    every: int = 0,
    chunk: int = 64,
) -> Curves:
    """Trains networks of a task by a rule, all seeds (and settings) side by side.

    Args:
        rule: The rule.
        task: What to train.
        steps: T, how many steps.
        seeds: Of the initial weights and minibatches; equal seeds meet equal ones whatever the rule.
        settings: Other values for some of the rule's parameters, each [M, ...]: a grid. None: the rule as it is.
        every: How often to measure on the task's sets; 0: at the start and the end only.
        chunk: How many networks to train at once at most.

    Returns:
        The curves. A network that diverges has losses that are not finite from there on.

    Raises:
        UserError: No steps or seeds, a rule for another network, or a setting that is not a parameter of the rule.
    """
    if steps < 1 or not seeds or chunk < 1:
        raise UserError(f"steps={steps}, seeds={list(seeds)}, chunk={chunk}: at least one of each is wanted")
    check_fits(rule, task)
    own = {name: p.detach() for name, p in rule.named_parameters()}
    for name in settings or {}:
        if name not in own:
            raise unknown("parameter of the rule", name, own)
    count = len(next(iter(settings.values()))) if settings else 1
    group = max(1, chunk // len(seeds))
    if len(seeds) > chunk:
        parts = [
            unroll(rule, task, steps, seeds[i : i + chunk], settings=settings, every=every, chunk=chunk)
            for i in range(0, len(seeds), chunk)
        ]
        return _joined(parts, 1)
    if count > group:
        pieces = [{name: v[i : i + group] for name, v in settings.items()} for i in range(0, count, group)]
        return _joined([unroll(rule, task, steps, seeds, settings=s, every=every, chunk=chunk) for s in pieces], 0)
    layout, like = rule.layout, next(iter(own.values()))
    stacked = {
        n: settings[n].to(like) if settings and n in settings else v.expand(count, *v.shape) for n, v in own.items()
    }
    start = torch.stack([task.initial(layout, seed) for seed in seeds]).to(like)
    weights = start.expand(count, *start.shape)
    moments = rule.fresh(len(seeds)).expand(count, -1, -1, -1)
    slope = vmap(vmap(grad_and_value(lambda w, b: task.value(layout, w, b))), (0, None))
    update = vmap(lambda own, w, g, m, t: functional_call(rule, own, (w, g, m, t)), (0, 0, 0, 0, None))
    whole = vmap(vmap(lambda w, b: task.value(layout, w, b), (0, None)), (0, None))
    generators = [torch_generator("minibatches", task.name, seed) for seed in seeds]
    losses, places, measured = [], [], {name: [] for name in task.sets}

    def measure(done: int) -> None:
        places.append(done)
        for name, batch in task.sets.items():
            measured[name].append(whole(weights, batch))

    measure(0)
    ahead: list[Any] = []
    for step in range(steps):
        if not ahead:
            drawn = [task.batches(generator, min(20, steps - step)) for generator in generators]
            joined = tree_map(lambda *each: torch.stack(each, 1), *drawn)
            ahead = [tree_map(lambda x, n=n: x[n], joined) for n in range(min(20, steps - step))]
        gradients, loss = slope(weights, ahead.pop(0))
        losses.append(loss)
        weights, moments = update(stacked, weights, gradients, moments, start.new_full((len(seeds),), float(step)))
        if (every and (step + 1) % every == 0) or step + 1 == steps:
            measure(step + 1)
    return Curves(torch.stack(losses, -1), places, {name: torch.stack(found, -1) for name, found in measured.items()})


def _joined(parts: Sequence[Curves], dim: int) -> Curves:
    return Curves(
        torch.cat([part.losses for part in parts], dim),
        parts[0].places,
        {name: torch.cat([part.measured[name] for part in parts], dim) for name in parts[0].measured},
    )


# ---- persistent evolution strategies --------------------------------------------------------------------------------

OBJECTIVES = ("mean", "log", "final")


class PES:
    """Gradients of a meta-objective from short pieces of long inner runs, without bias (Vicol et al., ICML 2021).

    N pairs of inner runs go on from piece to piece. Before each piece of K steps a pair draws a perturbation of the
    rule's parameters, e ~ N(0, sigma^2), one run takes theta + e and the other theta - e, and both meet the same
    initial weights and minibatches. With x the sum of a pair's perturbations since its runs began, the estimate is
    the mean of x (L+ - L-) / (2 sigma^2): a perturbation answers for all that came after it. The first runs of the
    pairs have different lengths, so that at any time the pairs are at different places.

    A run whose loss is not finite or exceeds ``cap`` times its first loss counts with that bound from there on, so that
    divergence is bad but not infinitely so, and its pair begins anew after the piece.

    Args:
        rule: Its parameters are theta; it is not changed.
        task: The inner problem.
        pairs: N.
        horizon: T, the length of an inner run in steps.
        truncation: K, the length of a piece; T is a multiple.
        sigma: Standard deviation of a perturbation.
        objective: ``mean``: the mean of the minibatch losses of the whole run. ``log``: the mean of their logarithms,
            to which the end of a run adds as much as its beginning (a loss below 1e-20 counts as that). ``final``: the
            mean of the last piece.
        cap: See above.
        seed: Determines every draw.
        stagger: Whether the first runs have different lengths.
        units: Units in which theta counts some of the rule's parameters, by their names; the others are counted
            in ones. A perturbation of a parameter has ``sigma`` times its unit.

    Attributes:
        theta: The rule's parameters, flat and in their units, [D]; change it between the pieces.
        tensors: What the next piece needs beside theta.
        runs: The number of pairs.

    Raises:
        UserError: A number out of range, an unknown objective, or a rule for another network.
    """

    def __init__(
        self,
        rule: UpdateRule,
        task: InnerTask,
        *,
        pairs: int = 8,
        horizon: int = 200,
        truncation: int = 20,
        sigma: float = 0.01,
        objective: str = "mean",
        cap: float = 4.0,
        seed: int = 0,
        stagger: bool = True,
        units: Mapping[str, float] | None = None,
    ) -> None:
        for name, value in (("pairs", pairs), ("horizon", horizon), ("truncation", truncation)):
            if value < 1:
                raise UserError(f"{name}={value}: it must be at least 1")
        if horizon % truncation:
            raise UserError(f"horizon={horizon} is no multiple of truncation={truncation}; choose one that is")
        if not (math.isfinite(sigma) and sigma > 0):
            raise UserError(f"sigma={sigma}: a positive number is wanted, such as 0.01")
        if not cap > 1:
            raise UserError(f"cap={cap}: it must exceed 1, or every run would count as diverged")
        if objective not in OBJECTIVES:
            raise unknown("objective", objective, OBJECTIVES)
        check_fits(rule, task)
        units = dict(units or {})
        for name, unit in units.items():
            if name not in dict(rule.named_parameters()):
                raise unknown("parameter of the rule", name, dict(rule.named_parameters()))
            if not (math.isfinite(unit) and unit > 0):
                raise UserError(f"units: {unit} for {name!r}; a positive number is wanted")
        self.rule, self.task = rule, task
        self.pairs, self.horizon, self.truncation = pairs, horizon, truncation
        self.runs, self.what = pairs, "pairs of inner runs"
        self.sigma, self.objective, self.cap, self.seed = sigma, objective, cap, seed
        self._shapes = {name: p.shape for name, p in rule.named_parameters()}
        self.units = torch.cat(
            [torch.full_like(p.detach(), units.get(n, 1.0)).reshape(-1) for n, p in rule.named_parameters()]
        )
        self.theta = torch.cat([p.detach().reshape(-1) for p in rule.parameters()]) / self.units
        like, layout = self.theta, rule.layout
        pieces = horizon // truncation
        ends = [math.ceil(pieces * (n + 1) / pairs) if stagger else pieces for n in range(pairs)]
        self.tensors = {
            "weights": like.new_zeros(2 * pairs, layout.size),
            "moments": rule.fresh(2 * pairs),
            "noise": like.new_zeros(pairs, len(like)),
            "first": like.new_zeros(pairs),
            "before": like.new_zeros(2 * pairs),
            "done": torch.zeros(pairs, dtype=torch.int64),
            "ends": torch.tensor(ends) * truncation,
        }
        self._slope = vmap(grad_and_value(lambda w, b: task.value(layout, w, b)))
        # So many runs at a time that their channels stay in the processor's cache; fewer cost more in calls.
        chunk = max(4, 20_000 // layout.size) if like.device.type == "cpu" else None
        self._update = vmap(self._one, chunk_size=chunk)

    def _one(self, own: dict[str, Tensor], w: Tensor, g: Tensor, m: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        w, m = functional_call(self.rule, own, (w[None], g[None], m[None], t[None]))
        return w[0], m[0]

    def parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """Flat parameters [..., D], in units, as the rule's tensors [..., *shape]."""
        theta = theta * self.units
        pieces = theta.split([shape.numel() for shape in self._shapes.values()], dim=-1)
        return {n: piece.reshape((*theta.shape[:-1], *s)) for (n, s), piece in zip(self._shapes.items(), pieces)}

    @torch.no_grad()
    def estimate(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Runs a piece of every inner run.

        Args:
            step: The number of the piece; it seeds the draws.

        Returns:
            The estimate of the gradient at ``theta``, [D], and numbers: ``loss`` (mean over the piece and the runs),
            ``final`` (the same of the runs that have ended, NaN if none has) and ``resets`` (pairs that diverged).
        """
        s, n, k = self.tensors, self.pairs, self.truncation
        layout = self.rule.layout
        fresh = (s["done"] == 0).nonzero()[:, 0].tolist()
        for pair in fresh:
            start = self.task.initial(layout, "pes", self.seed, step, pair).to(self.theta)
            for run in (pair, n + pair):
                s["weights"][run] = start
        if fresh:
            both = [*fresh, *(n + pair for pair in fresh)]
            s["moments"][both] = 0.0
            s["before"][both] = 0.0
            s["noise"][fresh] = 0.0
        draws = torch_generator("pes", self.task.name, self.seed, step)
        shape, kind = (n, len(self.theta)), self.theta.dtype
        noise = (self.sigma * torch.randn(shape, generator=draws, dtype=kind)).to(self.theta.device)
        s["noise"] += noise
        own = self.parameters(torch.cat([self.theta + noise, self.theta - noise]))
        drawn = tree_map(lambda x: x.view(n, k, *x.shape[1:]), self.task.batches(draws, n * k))
        began = torch.zeros(n, dtype=torch.bool)
        began[fresh] = True
        began = began.to(self.theta.device)
        weights, moments = s["weights"], s["moments"]
        total, logs, over = (
            torch.zeros_like(s["before"]),
            torch.zeros_like(s["before"]),
            torch.zeros(2 * n, dtype=torch.bool, device=weights.device),
        )
        for i in range(k):
            batch = tree_map(lambda x: torch.cat([x[:, i], x[:, i]]).to(weights.device), drawn)  # noqa: B023
            gradients, loss = self._slope(weights, batch)
            if i == 0:
                s["first"] = torch.where(began, loss[:n], s["first"])
                bound = self.cap * s["first"].abs().repeat(2)
            over |= ~(loss <= bound)
            counted = torch.where(over, bound, loss)
            total += counted
            logs += counted.clamp_min(1e-20).log()
            t = (s["done"] + i).repeat(2).to(weights)
            weights, moments = self._update(own, weights, gradients, moments, t)
        if not bool(torch.isfinite(s["first"]).all()):
            raise UserError(
                f"task {self.task.name!r}: the loss of fresh weights is not finite; check make() and loss()"
            )
        mean = total / k
        value = {"mean": mean, "log": logs / k, "final": mean - s["before"]}[self.objective]
        gradient = (s["noise"] * (value[:n] - value[n:])[:, None]).mean(0) / (2 * self.sigma**2)
        if self.objective == "final":  # the differences of all pieces add up to the last one; this is their mean
            gradient = gradient * (self.horizon / k)
        s["weights"], s["moments"], s["before"] = weights, moments, mean
        s["done"] = s["done"] + k
        broken = (over[:n] | over[n:]).cpu()
        ended = s["done"] >= s["ends"]
        finals = mean.view(2, n)[:, (ended & ~broken).to(mean.device)]
        info = {
            "loss": float(mean.mean()),
            "final": float(finals.mean()) if finals.numel() else math.nan,
            "resets": int(broken.sum()),
        }
        over_now = ended | broken
        s["done"] = torch.where(over_now, 0, s["done"])
        s["ends"] = torch.where(over_now, self.horizon, s["ends"])
        return gradient, info


@dataclass(frozen=True)
class MetaTrained:
    """What :func:`pes_train` gives.

    Attributes:
        rule: The learned rule, a new one.
        history: A row for every ``log_every`` pieces: ``step``, ``loss``, ``final``, ``resets`` and ``norm`` (of the
            estimate, before clipping), each a mean over these pieces but ``resets``, a sum.
        resets: How many pairs of inner runs diverged and began anew, after a resume since then.
    """

    rule: UpdateRule
    history: list[dict[str, float]]
    resets: int


def pes_train(
    rule: UpdateRule,
    task: InnerTask,
    steps: int,
    *,
    pairs: int = 8,
    horizon: int = 200,
    truncation: int = 20,
    sigma: float = 0.01,
    lr: float = 0.001,
    decay: bool = True,
    clip: float = 1.0,
    objective: str = "mean",
    cap: float = 4.0,
    seed: int = 0,
    units: Mapping[str, float] | None = None,
    run: Run | None = None,
    save_every: int = 200,
    log_every: int = 20,
    report: Callable[[dict[str, float]], None] | None = None,
) -> MetaTrained:
    """Learns a rule's parameters by persistent evolution strategies (:class:`PES`) and Adam.

    Equal arguments give equal rules, on one machine bit by bit, however often a run was stopped and resumed.

    Args:
        rule: Where to begin; it is not changed. It must be made for the task's network (``rule.on(task.spec)``).
        task: The family of inner problems.
        steps: Meta-steps, of ``truncation`` inner steps each.
        pairs: Antithetic pairs of inner runs. All of them are computed side by side.
        horizon: Length of an inner run.
        truncation: Inner steps between meta-steps.
        sigma: Standard deviation of the perturbations.
        lr: Step size of Adam on the parameters.
        decay: Whether ``lr`` goes to zero along half a cosine.
        clip: Largest norm of a gradient; longer ones are scaled down.
        objective: ``mean``, ``log`` or ``final``, see :class:`PES`.
        cap: See :class:`PES`.
        seed: Determines every draw.
        units: See :class:`PES`; ``lr`` counts in them too.
        run: A folder from ``Run.open``: it gets metrics, the state, and at the end the checkpoint ``last``. Where
            it has a state, training goes on from there.
        save_every: Meta-steps between saved states.
        log_every: Meta-steps between rows of the history.
        report: Called with each row of the history, in place of a progress bar.

    Returns:
        The learned rule and its history.

    Raises:
        UserError: A number out of range, a rule for another network or one that cannot be saved; or all pairs diverge
            in 20 meta-steps on end.
    """
    options = {"pairs": pairs, "horizon": horizon, "truncation": truncation, "sigma": sigma}
    pes = PES(rule, task, **options, objective=objective, cap=cap, seed=seed, units=units)
    facts = {**options, "objective": objective, "units": dict(units or {}), "estimator": "pes"}
    return meta_train(
        pes, steps, facts, lr=lr, decay=decay, clip=clip, run=run, save_every=save_every, log_every=log_every,
        report=report,
    )  # fmt: skip


class Estimator(Protocol):
    """What :func:`meta_train` descends: :class:`PES`, or ``meta_gradient.TruncatedGradient``.

    Attributes:
        rule: Where the parameters begin; it is not changed.
        task: The family of inner problems.
        runs: How many are under way; so many may be reset in a step.
        what: What these are.
        seed: Of all draws.
        theta: The rule's parameters, flat, [D].
        tensors: What the next step needs beside them.
    """

    rule: UpdateRule
    task: InnerTask
    runs: int
    what: str
    seed: int
    theta: Tensor
    tensors: dict[str, Tensor]

    def estimate(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The gradient of the objective, [D], and numbers, ``resets`` among them."""
        ...

    def parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """Flat parameters as the rule's tensors."""
        ...


def meta_train(
    estimator: Estimator,
    steps: int,
    facts: Mapping[str, Any],
    *,
    lr: float,
    decay: bool = True,
    clip: float = 1.0,
    run: Run | None = None,
    save_every: int = 200,
    log_every: int = 20,
    report: Callable[[dict[str, float]], None] | None = None,
    judge: Callable[[UpdateRule], float] | None = None,
    judge_every: int = 20,
) -> MetaTrained:
    """Adam on the parameters of a rule along estimated gradients; the loop of :func:`pes_train` and its like.

    Args:
        estimator: Gives the gradients.
        steps: Meta-steps.
        facts: What else the checkpoint says of the training.
        lr: See :func:`pes_train`, as the others.
        decay: See there.
        clip: See there.
        run: See there.
        save_every: See there.
        log_every: See there.
        report: See there.
        judge: Gives a loss of a rule, on networks that nothing else is measured on. The rule of the least is kept, the
            one to begin with among them: a gradient that is far off can spoil a rule at any time. None: the last.
        judge_every: Meta-steps between judgements; there is one after the last step too.

    Returns:
        The learned rule and its history.

    Raises:
        UserError: See there.
    """
    rule, task = estimator.rule, estimator.task
    counts = {"steps": steps, "save_every": save_every, "log_every": log_every, "judge_every": judge_every}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name}={value}: it must be at least 1")
    for name, number in (("lr", lr), ("clip", clip)):
        if not (math.isfinite(number) and number > 0):
            raise UserError(f"{name}={number}: a positive number is wanted")
    if run is not None and not isinstance(rule, LearnedOptimizer):
        raise UserError(f"a {type(rule).__name__} has no checkpoint; train it without run=")
    theta = nn.Parameter(estimator.theta.clone())
    adam = torch.optim.Adam([theta], lr=lr)

    def made(theta: Tensor) -> UpdateRule:
        found = rule.on(task.spec)
        with torch.no_grad():
            for parameter, value in zip(found.parameters(), estimator.parameters(theta).values()):
                parameter.copy_(value)
        return found

    best, least, least_at = theta.detach().clone(), math.inf, 0
    start, resets, diverging = 0, 0, 0
    history: list[dict[str, float]] = []
    rows: list[dict[str, float]] = []
    if run is not None and (saved := run.load_state()) is not None:
        start, tensors, meta = saved
        theta.data.copy_(tensors["theta"])
        moments = {name: tensors[f"adam.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
        adam.load_state_dict({**adam.state_dict(), "state": {0: moments}})
        estimator.tensors = {
            name: tensors[f"inner.{name}"].to(value.device) for name, value in estimator.tensors.items()
        }
        history, rows, diverging = meta["history"], meta["rows"], meta["diverging"]
        best, (least, least_at) = tensors["best"].to(best.device), meta["least"]
        least = math.inf if least is None else least
    elif judge is not None:
        least = judge(made(best))
        least = least if math.isfinite(least) else math.inf
    numbers: Iterable[int] = range(start, steps)
    if report is None:
        numbers = (run.track if run is not None else track)(
            numbers, f"{task.name}: meta-training", total=steps, start=start
        )
    for step in numbers:
        estimator.theta = theta.detach()
        gradient, info = estimator.estimate(step)
        norm = float(gradient.norm())
        theta.grad = gradient * min(1.0, clip / max(norm, 1e-30))
        adam.param_groups[0]["lr"] = lr * (0.5 * (1 + math.cos(math.pi * step / steps)) if decay else 1.0)
        adam.step()
        resets += info["resets"]
        diverging = diverging + 1 if info["resets"] == estimator.runs else 0
        if diverging == 20:
            raise UserError(
                f"{task.name}: all {estimator.runs} {estimator.what} diverged in 20 meta-steps on end; begin with a "
                "smaller alpha, or lower lr or sigma"
            )
        rows.append({**info, "norm": norm})
        done = step + 1
        if judge is not None and (done % judge_every == 0 or done == steps):
            loss = judge(made(theta.detach()))
            rows[-1]["judged"] = loss
            if loss < least:
                best, least, least_at = theta.detach().clone(), loss, done
        if done % log_every == 0 or done == steps:
            history.append({"step": done, **_summary(rows)})
            rows = []
            if report is not None:
                report(history[-1])
            if run is not None:
                run.log(done, **{k: v for k, v in history[-1].items() if k != "step"})
        if run is not None and (done % save_every == 0 or done == steps):
            state = {"theta": theta.detach(), "best": best}
            state |= {f"inner.{name}": value for name, value in estimator.tensors.items()}
            state |= {f"adam.{name}": value for name, value in adam.state_dict()["state"][0].items()}
            meta = {"history": history, "rows": rows, "diverging": diverging, "least": (least, least_at)}
            run.save_state(done, state, meta)
    learned = made(theta.detach() if judge is None else best)
    if run is not None:
        training = {"task": task.name, "steps": steps, **facts, "lr": lr, "clip": clip, "seed": estimator.seed}
        if judge is not None:
            training |= {"judged": least, "judged_at": least_at}
        run.save_checkpoint("last", learned, info={"training": training, "metrics": history[-1] if history else {}})
    return MetaTrained(learned, history, resets)


def _summary(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over meta-steps, of what is a number; resets are added up. JSON's None is NaN."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        known = [row[name] for row in rows if row.get(name) is not None]
        values = [float(value) for value in known if math.isfinite(value)]
        found[name] = sum(values) if name == "resets" else sum(values) / len(values) if values else math.nan
    return found
