"""Models that read networks: NFN, NFT and UNF, and the two that they are measured against.

All of them take a :class:`WeightBatch` and give [B, outputs], or another batch where they edit. Those with a head that
pools follow what made the difference on policies: batch normalisation of the pooled vector, and standard deviations
beside means. Without them the differences between networks with many hidden units vanish in the average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fleetgym.core import UserError, WeightSpec
from fleetgym.core.errors import unknown
from fleetgym.merging.functionals.attention import NFAttention
from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.encodings import FourierFeatures, IOEncoding, LearnedEncoding
from fleetgym.merging.functionals.layout import Layout
from fleetgym.merging.functionals.linear import NFLinear, UNFLinear
from fleetgym.merging.functionals.norm import NFBlock, NFNorm
from fleetgym.merging.functionals.pool import NFPool

HEADS = ("classifier", "regressor", "editor")


class Reader(nn.Module):
    """What all models here share: the layout, and statistics of the weights to normalise by.

    Args:
        spec: The symmetry that the model has, or a layout.
        channels: C of the input.
    """

    def __init__(self, spec: WeightSpec | Layout, channels: int = 1) -> None:
        super().__init__()
        if channels < 1:
            raise UserError(f"channels={channels}: the input needs at least one")
        self.layout, self.channels = Layout.of(spec), channels
        self.register_buffer("mean", torch.zeros(self.layout.size, channels))
        self.register_buffer("std", torch.ones(self.layout.size, channels))

    @torch.no_grad()
    def normalise(self, weights: WeightBatch, by: str = "part") -> None:
        """Takes the statistics that inputs are normalised by from the networks of a training set.

        Args:
            weights: The training set.
            by: ``part`` gives all places of a part one mean and one deviation, which keeps the symmetry. ``weight``
                gives each scalar its own, which breaks it and is right where all networks began at the same weights.

        Raises:
            UserError: Another word, or weights of another network.
        """
        if by not in ("part", "weight"):
            raise unknown("normalisation", by, ("part", "weight"))
        x = self.fitted(weights)
        for part, view in x:
            places = view.reshape(x.batch, part.count, -1).double()
            dims = (0, 1) if by == "part" else (0,)
            mean, std = places.mean(dims), places.var(dims, unbiased=False).sqrt()
            # A part that never varies (a bias at zero) is left as it is.
            std = torch.where(std > 1e-12, std, torch.ones_like(std))
            for buffer, value in ((self.mean, mean), (self.std, std)):
                rows = value.expand(part.count, -1).reshape(part.length, self.channels)
                buffer[part.offset : part.offset + part.length] = rows.to(buffer)

    def fitted(self, x: WeightBatch) -> WeightBatch:
        """The batch in this model's layout: its own may have other fixed axes.

        Raises:
            UserError: It holds the weights of another network, or has other channels.
        """
        if isinstance(x, WeightBatch) and x.layout != self.layout:
            ours, theirs = self.layout.shapes, x.layout.shapes
            if theirs == ours:
                x = WeightBatch(self.layout, self.layout.gather(x.layout.scatter(x.data)))
            elif missing := [key for key in ours if key not in theirs and key in x.layout.spec.axes]:
                # A buffer along inputs, such as a policy's normaliser, is among the weights where inputs are free.
                raise UserError(
                    f"{type(self).__name__}: the batch has no {missing[0]!r}, which nothing moves in the spec that it "
                    "was stacked with; stack the networks with the layout of the model"
                )
        return WeightBatch.expect(x, self.layout, self.channels, type(self).__name__)

    def _standard(self, x: WeightBatch) -> WeightBatch:
        x = self.fitted(x)
        return x.replace((x.data - self.mean.to(x.data.dtype)) / self.std.to(x.data.dtype))


class PooledHead(nn.Module):
    """Statistics of the features, normalised over the batch, and a multi-layer perceptron.

    Args:
        spec: The symmetry, or a layout.
        channels: C of the features.
        outputs: How many numbers come out.
        hidden: Width of the two hidden layers.
        stats: See :class:`NFPool`.
        dropout: Before the last layer.
    """

    def __init__(
        self,
        spec: WeightSpec | Layout,
        channels: int,
        outputs: int,
        hidden: int = 128,
        stats: Sequence[str] = ("mean", "std"),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pool = NFPool(spec, stats)
        self.perceptron = perceptron(self.pool.features * channels, hidden, outputs, dropout)

    def forward(self, x: WeightBatch) -> Tensor:
        """[B, P, C] to [B, outputs]."""
        return self.perceptron(self.pool(x))


def perceptron(inputs: int, hidden: int, outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Batch normalisation and a multi-layer perceptron of two hidden layers: [B, inputs] to [B, outputs]."""
    for name, value in {"inputs": inputs, "hidden": hidden, "outputs": outputs}.items():
        if value < 1:
            raise UserError(f"{name}={value}: it must be at least 1")
    return nn.Sequential(
        nn.BatchNorm1d(inputs),
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, outputs),
    )


class Scale(nn.Module):
    """A learned factor for each part, small at first: an editor begins near the identity.

    Args:
        spec: The symmetry, or a layout.
        initial: The factors at first.
    """

    def __init__(self, spec: WeightSpec | Layout, initial: float = 0.01) -> None:
        super().__init__()
        self.layout = Layout.of(spec)
        self.factors = nn.Parameter(torch.full((len(self.layout.parts),), float(initial)))
        which = [torch.full((part.length,), i) for i, part in enumerate(self.layout.parts)]
        self.register_buffer("which", torch.cat(which), persistent=False)

    def forward(self, x: WeightBatch) -> WeightBatch:
        """[B, P, C] to [B, P, C]."""
        return x.replace(x.data * self.factors[self.which][:, None])


class _Model(Reader):
    """Encodings, a body of equivariant layers, and a head."""

    def __init__(self, spec: WeightSpec | Layout, channels: int, head: str, outputs: int) -> None:
        if head not in HEADS:
            raise unknown("head", head, HEADS)
        if head != "editor" and outputs < 1:
            raise UserError(f"outputs={outputs}: a {head} needs at least one")
        super().__init__(spec, channels)
        self.head_name = head

    def _finish(self, features: int, outputs: int, last: Callable[[int], nn.Module], **options: Any) -> None:
        """Makes the head on top of so many features."""
        if self.head_name == "editor":
            self.head: nn.Module = nn.Sequential(last(self.channels), Scale(self.layout))
        else:
            self.head = PooledHead(self.layout, features, outputs, **options)

    def features(self, x: WeightBatch) -> WeightBatch:
        """Equivariant features of each scalar."""
        return self.body(self._standard(x))

    def forward(self, x: WeightBatch) -> Any:
        """[B, outputs]: logits of a classifier, numbers of a regressor. An editor gives weights U + gamma f(U)."""
        out = self.head(self.features(x))
        if self.head_name == "editor":
            # The correction is in units of the weights' own deviations.
            x = self.fitted(x)
            return x.replace(x.data + out.data * self.std.to(out.data.dtype))
        return out


class _Pointwise(nn.Module):
    """A module that acts on channels alone, on a batch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: WeightBatch) -> WeightBatch:
        return x.replace(self.module(x.data))


class _Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: WeightBatch) -> WeightBatch:
        return x.replace(x.data + self.layers(x).data)


def _stack(
    layout: Layout, linear: Callable[[int, int], nn.Module], sizes: Sequence[int], norm: bool, dropout: float
) -> list[nn.Module]:
    """Linear maps with normalisation and rectifiers behind them."""
    layers: list[nn.Module] = []
    for c_in, c_out in zip(sizes, sizes[1:]):
        if norm and c_out > 1:  # one channel normalised is zero
            layers.append(NFBlock(linear(c_in, c_out), NFNorm(layout, c_out)))
        else:
            layers += [linear(c_in, c_out), _Pointwise(nn.ReLU())]
        layers += [_Pointwise(nn.Dropout(dropout))] if dropout else []
    return layers


class NFN(_Model):
    """Neural functional network for feed-forward networks (Zhou et al., NeurIPS 2023, arXiv 2302.14040).

    Args:
        spec: The networks' symmetry as it is derived; ``symmetry`` says what becomes of its inputs and outputs.
        outputs: Classes of a classifier, numbers of a regressor; not used by an editor.
        channels: C of the input.
        hidden: Channels of the layers.
        symmetry: ``np`` permutes inputs and outputs too and encodes which they are; ``hnp`` keeps them fixed.
        head: ``classifier``, ``regressor`` or ``editor``.
        encoding: Whether inputs, outputs and layers are encoded; by default with ``np``.
        norm: Whether features are normalised after each layer.
        dropout: Of features, and before the last layer of the head.
        head_hidden: Width of the head.
        stats: Statistics of the pool.

    Raises:
        UserError: An unknown head or symmetry, no channels or outputs, or a network that is no feed-forward chain
            (:class:`UNF` reads those).
    """

    def __init__(
        self,
        spec: WeightSpec,
        outputs: int = 1,
        *,
        channels: int = 1,
        hidden: Sequence[int] = (64, 64, 64),
        symmetry: str = "np",
        head: str = "classifier",
        encoding: bool | None = None,
        norm: bool = True,
        dropout: float = 0.0,
        head_hidden: int = 128,
        stats: Sequence[str] = ("mean", "std"),
    ) -> None:
        if symmetry not in ("np", "hnp"):
            raise unknown("symmetry", symmetry, ("np", "hnp"))
        _check_hidden(hidden)
        layout = Layout.of(spec.free("in", "out") if symmetry == "np" else spec.fix("in", "out"))
        super().__init__(layout, channels, head, outputs)

        def linear(c_in: int, c_out: int) -> nn.Module:
            return NFLinear(self.layout, c_in, c_out, symmetry=None)

        first, start = _encoded(layout, channels, symmetry == "np" if encoding is None else encoding)
        self.body = nn.Sequential(*first, *_stack(layout, linear, [start, *hidden], norm, dropout))
        self._finish(
            hidden[-1], outputs, lambda c: linear(hidden[-1], c), hidden=head_hidden, stats=stats, dropout=dropout
        )


class UNF(_Model):
    """Universal neural functional, for any network with a spec (Zhou et al., NeurIPS 2024, arXiv 2402.05232).

    Args:
        spec: The symmetry; free axes are permuted, fixed ones are not.
        outputs: Classes of a classifier, numbers of a regressor; not used by an editor.
        channels: C of the input.
        hidden: Channels of the layers.
        head: ``classifier``, ``regressor`` or ``editor``.
        encoding: Whether inputs, outputs and layers are encoded; by default where inputs or outputs are free.
        norm: Whether features are normalised after each layer.
        dropout: Of features, and before the last layer of the head.
        head_hidden: Width of the head.
        stats: Statistics of the pool.
        max_rank: See :class:`UNFLinear`.
        max_terms: See :class:`UNFLinear`.

    Raises:
        UserError: An unknown head, or no channels or outputs.
    """

    def __init__(
        self,
        spec: WeightSpec,
        outputs: int = 1,
        *,
        channels: int = 1,
        hidden: Sequence[int] = (16, 16, 16),
        head: str = "classifier",
        encoding: bool | None = None,
        norm: bool = True,
        dropout: float = 0.0,
        head_hidden: int = 128,
        stats: Sequence[str] = ("mean", "std"),
        max_rank: int | None = None,
        max_terms: int | None = None,
    ) -> None:
        _check_hidden(hidden)
        super().__init__(spec, channels, head, outputs)
        layout = self.layout
        free = any(group.split(".")[0] in ("in", "out") for group in layout.groups)

        def linear(c_in: int, c_out: int) -> nn.Module:
            return UNFLinear(layout, c_in, c_out, max_rank=max_rank, max_terms=max_terms)

        first, start = _encoded(layout, channels, free if encoding is None else encoding)
        self.body = nn.Sequential(*first, *_stack(layout, linear, [start, *hidden], norm, dropout))
        self._finish(
            hidden[-1], outputs, lambda c: linear(hidden[-1], c), hidden=head_hidden, stats=stats, dropout=dropout
        )


class NFTBlock(nn.Module):
    """x + SA(norm x), then x + feed-forward(norm x), with channels mixed pointwise (arXiv 2305.13546).

    Args:
        spec: The symmetry, or a layout.
        channels: C.
        heads: Heads of the attention.
        factor: Width of the feed-forward layer in units of C.
        dropout: Of both branches.
    """

    def __init__(
        self, spec: WeightSpec | Layout, channels: int, heads: int = 4, factor: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        norms = [NFNorm(spec, channels) if channels > 1 else nn.Identity() for _ in range(2)]
        feed = nn.Sequential(nn.Linear(channels, factor * channels), nn.GELU(), nn.Linear(factor * channels, channels))
        drop = [_Pointwise(nn.Dropout(dropout))] if dropout else []
        self.attention = _Residual(norms[0], NFAttention(spec, channels, heads), *drop)
        self.feed = _Residual(norms[1], _Pointwise(feed), *drop)

    def forward(self, x: WeightBatch) -> WeightBatch:
        """[B, P, C] to [B, P, C]."""
        return self.feed(self.attention(x))


class NFT(_Model):
    """Neural functional transformer, for any network with a spec (Zhou et al., NeurIPS 2023, arXiv 2305.13546).

    Inputs and outputs are free and told apart by learned vectors, as are tensors.

    Args:
        spec: The networks' symmetry as it is derived.
        outputs: Classes of a classifier, numbers of a regressor; not used by an editor.
        channels: C of the input.
        width: Channels of the blocks.
        blocks: How many.
        heads: Of the attention; they divide the width.
        factor: Of the feed-forward layers.
        head: ``classifier``, ``regressor`` or ``editor``.
        frequencies: Random frequencies that values are encoded by; 0 for none.
        scale: Their standard deviation. Weights are normalised before, so it is less than where they are not.
        dropout: Of the blocks, and before the last layer of the head.
        head_hidden: Width of the head.
        stats: Statistics of the pool.

    Raises:
        UserError: An unknown head, no channels, blocks or outputs, or heads that do not divide the width.
    """

    def __init__(
        self,
        spec: WeightSpec,
        outputs: int = 1,
        *,
        channels: int = 1,
        width: int = 64,
        blocks: int = 3,
        heads: int = 4,
        factor: int = 2,
        head: str = "classifier",
        frequencies: int = 32,
        scale: float = 0.3,
        dropout: float = 0.0,
        head_hidden: int = 128,
        stats: Sequence[str] = ("mean", "std"),
    ) -> None:
        if blocks < 1:
            raise UserError(f"blocks={blocks}: at least one is needed")
        super().__init__(Layout.of(spec.free("in", "out")), channels, head, outputs)
        self.body = nft_body(self.layout, channels, width, blocks, heads, factor, frequencies, scale, dropout)
        self._finish(
            width,
            outputs,
            lambda c: _Pointwise(nn.Linear(width, c)),
            hidden=head_hidden,
            stats=stats,
            dropout=dropout,
        )


def nft_body(
    layout: Layout,
    channels: int,
    width: int,
    blocks: int,
    heads: int,
    factor: int,
    frequencies: int,
    scale: float,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Values and their Fourier features, learned positions, blocks, a last norm: [B, P, C] to [B, P, width]."""
    first: list[nn.Module] = []
    if frequencies:
        first.append(FourierFeatures(channels, frequencies, scale, keep=True))
        channels = first[0].channels
    first.append(_Pointwise(nn.Linear(channels, width)))
    return nn.Sequential(
        *first,
        LearnedEncoding(layout, width),
        *(NFTBlock(layout, width, heads, factor, dropout) for _ in range(blocks)),
        NFNorm(layout, width) if width > 1 else nn.Identity(),
    )


def _check_hidden(hidden: Sequence[int]) -> None:
    if not hidden or min(hidden) < 1:
        raise UserError(f"hidden={tuple(hidden)}: give at least one layer, each with at least one channel")


def _encoded(layout: Layout, channels: int, wanted: bool) -> tuple[list[nn.Module], int]:
    if not wanted:
        return [], channels
    encoding = IOEncoding(layout)
    return [encoding], channels + encoding.extra


class FlatMLP(Reader):
    """A perceptron on the weights as one vector: it knows no symmetry, and is what others are measured against.

    Args:
        spec: The symmetry, or a layout; only the number of weights matters.
        outputs: How many numbers come out.
        channels: C of the input.
        hidden: Width of the two hidden layers.
        dropout: Before the last layer.
    """

    def __init__(
        self, spec: WeightSpec | Layout, outputs: int = 1, *, channels: int = 1, hidden: int = 128, dropout: float = 0.0
    ) -> None:
        super().__init__(spec, channels)
        self.perceptron = perceptron(self.layout.size * channels, hidden, outputs, dropout)

    def forward(self, x: WeightBatch) -> Tensor:
        """[B, outputs]."""
        return self.perceptron(self._standard(x).data.flatten(1))


class StatNN(Reader):
    """A perceptron on seven statistics of each tensor (Unterthiner et al., arXiv 2002.11448).

    Mean, variance and the quantiles 0, 1/4, 1/2, 3/4 and 1. It is invariant to more than the symmetry.

    Args:
        spec: The symmetry, or a layout; only the tensors matter.
        outputs: How many numbers come out.
        channels: C of the input.
        hidden: Width of the two hidden layers.
        dropout: Before the last layer.
    """

    def __init__(
        self, spec: WeightSpec | Layout, outputs: int = 1, *, channels: int = 1, hidden: int = 128, dropout: float = 0.0
    ) -> None:
        super().__init__(spec, channels)
        self.perceptron = perceptron(7 * channels * len(self.layout.keys), hidden, outputs, dropout)

    def statistics(self, x: WeightBatch) -> Tensor:
        """The statistics, [B, tensors * C * 7]."""
        out = []
        for tensor in self.fitted(x).tensors().values():
            values = tensor.reshape(x.batch, -1, self.channels).sort(1).values
            places = torch.linspace(0, values.shape[1] - 1, 5, dtype=torch.float64)
            low, share = places.floor().long(), (places - places.floor()).to(values)[:, None]
            high = places.ceil().long()
            quantiles = values[:, low] + share * (values[:, high] - values[:, low])  # [B, 5, C]
            stats = [values.mean(1, keepdim=True), values.var(1, unbiased=False, keepdim=True), quantiles]
            out.append(torch.cat(stats, 1).flatten(1))
        return torch.cat(out, 1)

    def forward(self, x: WeightBatch) -> Tensor:
        """[B, outputs]."""
        return self.perceptron(self.statistics(x))


class ProbeEncoder(Reader):
    """Learned inputs that are run through the networks, and a perceptron on what comes out.

    It reads a network by what it does, and is invariant to whatever leaves that alone; after Kahana et al., "Deep
    linear probe generators for weight space learning" (ICLR 2025). It needs networks that can be run.

    Args:
        spec: The networks' symmetry, or a layout.
        module: A network of the kind; it gives ``forward`` and those buffers that a batch has not.
        inputs: Shape of one input without its batch: ``(Do,)``, ``(T, Do)`` for a recurrent policy, ``(C, h, w)``.
        outputs: How many numbers come out.
        probes: How many inputs.
        hidden: Width of the two hidden layers.
        dropout: Before the last layer.
        scale: Standard deviation of the inputs at first, in the units that they are learned in.
        units: Mean and standard deviation of a usual input, each like one input or to be broadcast to it; inputs are
            learned in these units. None: as they are.
        squash: Reads where the outputs are large and which sign they have, not how large: each network's outputs are
            divided by their root mean square, and a tanh of learned steepness follows. Right for networks that act by
            a sign or by the largest output, which a positive factor does not change.

    Raises:
        UserError: No probes, or a module that cannot take such inputs.
    """

    def __init__(
        self,
        spec: WeightSpec | Layout,
        module: nn.Module,
        inputs: Sequence[int],
        outputs: int = 1,
        *,
        probes: int = 64,
        hidden: int = 128,
        dropout: float = 0.0,
        scale: float = 1.0,
        units: tuple[Tensor, Tensor] | None = None,
        squash: bool = False,
    ) -> None:
        super().__init__(spec, 1)
        if probes < 1:
            raise UserError(f"probes={probes}: at least one is needed")
        for name, value in zip(("center", "unit"), units or (torch.zeros(()), torch.ones(()))):
            self.register_buffer(name, value.detach().clone())
        self.probes = nn.Parameter(torch.randn(probes, *inputs) * scale)
        # Not a submodule: its weights are not the model's.
        object.__setattr__(self, "_network", module)
        rest = {k: v for k, v in module.state_dict().items() if k not in self.layout.shapes}
        self._rest = tuple(rest)
        self.steepness = nn.Parameter(torch.ones(())) if squash else None
        for i, value in enumerate(rest.values()):
            self.register_buffer(f"rest{i}", value.detach().clone())
        own = {k: v for k, v in module.state_dict().items() if k in self.layout.shapes}
        try:
            with torch.no_grad():
                size = self.responses(WeightBatch.stack(self.layout, [own])).shape[1]
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{type(module).__name__} does not take {probes} inputs of shape {tuple(inputs)}: {error}"
            ) from error
        self.perceptron = perceptron(size, hidden, outputs, dropout)

    def responses(self, x: WeightBatch) -> Tensor:
        """What the networks answer to the probes, [B, probes * outputs of the network]."""
        x = self.fitted(x)
        rest = {key: getattr(self, f"rest{i}") for i, key in enumerate(self._rest)}
        tensors = {key: tensor[..., 0] for key, tensor in x.tensors().items()}
        inputs = self.center + self.unit * self.probes
        found = run_networks(self._network, tensors, inputs, rest).flatten(1)
        if self.steepness is None:
            return found
        size = found.square().mean(1, keepdim=True).add(1e-12).sqrt()
        return torch.tanh(self.steepness * found / size)

    def forward(self, x: WeightBatch) -> Tensor:
        """[B, outputs]."""
        return self.perceptron(self.responses(x))


def run_networks(
    module: nn.Module, tensors: dict[str, Tensor], inputs: Tensor, rest: dict[str, Tensor] | None = None
) -> Tensor:
    """Runs B networks on the same inputs; gradients flow to weights and inputs.

    Args:
        module: A network of the kind, in evaluation mode while it runs. Recurrent layers run step by step.
        tensors: Weights, each [B, ...].
        inputs: [N, ...].
        rest: Tensors of the state dict that the networks share.

    Returns:
        [B, N, ...]; the first output where there are several.
    """
    from fleetgym.core.weights import evaluating

    def one(state: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(module, {**(rest or {}), **state}, (inputs,))
        while isinstance(out, (tuple, list)):
            out = out[0]
        return out

    with evaluating(module), _StepByStep():
        return torch.func.vmap(one)(tensors)


class _StepByStep(TorchFunctionMode):
    """Computes recurrent layers from elementary functions; torch's own kernels know no batch of weights."""

    _CELLS = {"gru": 1, "lstm": 2, "rnn_tanh": 1, "rnn_relu": 1}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self._CELLS and len(args) == 9 and isinstance(args[3], bool):
            return _recurrent(name, *args)
        return func(*args, **(kwargs or {}))


def _recurrent(
    kind: str,
    x: Tensor,
    state: Any,
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    both: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """``torch.gru`` and its like without dropout; arguments as there."""
    if x.dim() == 3 and batch_first:
        x = x.transpose(0, 1)
    states = state if kind == "lstm" else (state,)
    per = len(weights) // (layers * (1 + both))
    last: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        outs = []
        for way in range(1 + both):
            i = layer * (1 + both) + way
            w = weights[i * per : (i + 1) * per]
            b_ih, b_hh = (w[2], w[3]) if biases else (0.0, 0.0)
            given = (x @ w[0].mT + b_ih).unbind(0)
            now = tuple(s[i] for s in states)
            steps = []
            for g in given[::-1] if way else given:
                now = _CELL_STEPS[kind](g, now[0] @ w[1].mT + b_hh, *now)
                steps.append(now[0])
            # A projected LSTM has a fifth weight, which is refused before: its shapes do not fit.
            outs.append(torch.stack(steps[::-1] if way else steps))
            last.append(now)
        x = torch.cat(outs, -1)
    out = x.transpose(0, 1) if batch_first else x
    return (out, *(torch.stack(s) for s in zip(*last)))


def _gru_step(given: Tensor, recalled: Tensor, h: Tensor) -> tuple[Tensor]:
    r, z, n = given.chunk(3, -1)
    r_, z_, n_ = recalled.chunk(3, -1)
    z = torch.sigmoid(z + z_)
    n = torch.tanh(n + torch.sigmoid(r + r_) * n_)
    return (n + z * (h - n),)


def _lstm_step(given: Tensor, recalled: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (given + recalled).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


_CELL_STEPS: dict[str, Callable[..., Any]] = {
    "gru": _gru_step,
    "lstm": _lstm_step,
    "rnn_tanh": lambda given, recalled, h: (torch.tanh(given + recalled),),
    "rnn_relu": lambda given, recalled, h: (torch.relu(given + recalled),),
}
