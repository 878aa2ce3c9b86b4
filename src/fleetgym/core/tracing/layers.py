"""Rules of layers: convolutions, normalisations, pooling, embeddings, attention and recurrent cells."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fleetgym.core.tracing.rules import LETTERS, interleave, moved, name_heads
from fleetgym.core.tracing.run import Run, operation
from fleetgym.core.tracing.values import Dim, Value, broadcast, contract, flat, join, plain, split, tidy
from fleetgym.core.tracing.wires import Conflict, Node, Wire, fixed_wire, is_fixed, leaves, pin, tie

# ---- convolutions ---------------------------------------------------------------------------------------------------


def _digit(run: Run) -> int:
    return next(int(c) for c in run.name if c.isdigit())


def _spatial(value: Value, count: int) -> None:
    for dim in value.dims[len(value.dims) - count :]:
        plain(dim).pin()


def _convolution(run: Run, out: Tensor, x: Any, weight: Any, bias: Any, groups: int, transposed: bool) -> Value:
    k = _digit(run)
    value, kernel = run.value(x), run.value(weight)
    _spatial(value, k)
    _spatial(kernel, k)
    batch, channels = value.dims[: len(value.dims) - k - 1], value.dims[len(value.dims) - k - 1]
    into, outof = (kernel.dims[0], kernel.dims[1]) if transposed else (kernel.dims[1], kernel.dims[0])
    if transposed:
        for leaf in leaves(outof.perm):
            leaf.name, leaf.rank = (run.path or leaf.name, leaf.rank - 3) if leaf.rank >= 7 else (leaf.name, leaf.rank)
    if groups == 1:
        join([(channels, into)], [True])
        made = outof
    elif groups == channels.size and not transposed:
        # Depthwise: a channel and its filters move together. A filter's sign stays with the channel's.
        channels = plain(channels)
        count = outof.size // groups
        if count == 1:
            tie(channels.perm, outof.perm)
            pin(outof.sign)
            made = Dim(outof.size, channels.perm, channels.sign)
        else:
            pin(channels.sign)
            rows, _ = split(outof, [groups, count], run.label("groups"))
            tie(rows.perm, channels.perm)
            made = outof
    else:
        # Grouped: whole groups move, and outputs inside their group. One weight tensor serves the inputs of all
        # groups by place, so inputs keep their place inside a group.
        if transposed:
            channels = plain(channels)
            pin(channels.sign, into.sign, outof.sign)
            rows, inside = split(channels, [groups, channels.size // groups], run.label("groups"))
            blocks, columns = split(into, [groups, into.size // groups], run.label("groups"))
            join([(rows, blocks), (inside, columns)], [True, True])
            outof.pin()
            whole = Node(groups * outof.size, home=rows.perm[0], rigid=True) if len(rows.perm) == 1 else None
            if whole is None:
                pin(rows.perm)
                whole = Node(groups * outof.size, True)
            made = Dim(whole.size, [whole], fixed_wire(whole.size))
        else:
            channels = plain(channels)
            rows, inside = split(channels, [groups, channels.size // groups], run.label("groups"))
            plain(inside)
            if is_fixed(rows.perm):
                channels.pin()
            into.pin()
            blocks, _ = split(outof, [groups, outof.size // groups], run.label("groups"))
            tie(rows.perm, blocks.perm)
            made = outof
    result = Value(tidy([*batch, made, *[flat(n) for n in out.shape[out.dim() - k :]]]))
    if bias is not None:
        place = len(batch)
        one = run.value(bias).dims[0]
        (pair,) = join([(result.dims[place], one)], [True])
        result.dims[place] = pair[0]
    return result


@operation("conv1d", "conv2d", "conv3d")
def _conv(run: Run, out: Tensor, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
          dilation: Any = 1, groups: int = 1) -> Value:  # fmt: skip
    return _convolution(run, out, x, weight, bias, groups, False)


@operation("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(run: Run, out: Tensor, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
                    output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Value:  # fmt: skip
    return _convolution(run, out, x, weight, bias, groups, True)


_POOLS = [f"{kind}_pool{k}d" for k in (1, 2, 3) for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max")]


@operation(*_POOLS, *[f"{name}_with_indices" for name in _POOLS])
def _pool(run: Run, out: Any, x: Any, *_: Any, **__: Any) -> Any:
    value = run.value(x)
    if "avg" not in run.name:
        value.pin_signs()  # a maximum over places is not odd
    first = out if isinstance(out, Tensor) else out[0]
    return _resampled(value, first, _digit(run))


def _resampled(value: Value, out: Tensor, spatial: int) -> Value:
    _spatial(value, spatial)
    keep = len(value.dims) - spatial
    return Value(tidy([*value.dims[:keep], *[flat(n) for n in out.shape[keep:]]]))


@operation("interpolate", "upsample", "upsample_nearest", "upsample_bilinear")
def _interpolate(run: Run, out: Tensor, x: Any, *_: Any, **__: Any) -> Value:
    value = run.value(x)
    return _resampled(value, out, len(value.dims) - 2)


@operation("pixel_shuffle")
def _pixel_shuffle(run: Run, out: Tensor, x: Any, factor: int) -> Value:
    value = run.value(x)
    _spatial(value, 2)
    place = len(value.dims) - 3
    channels = plain(value.dims[place])
    pin(channels.sign)
    outer, inner = split(channels, [channels.size // factor**2, factor**2], run.label("blocks"))
    plain(inner)
    return Value(tidy([*value.dims[:place], outer, *[flat(n) for n in out.shape[-2:]]]))


# ---- normalisations -------------------------------------------------------------------------------------------------


def _channelwise(run: Run, value: Value, tensors: dict[Any, bool]) -> Value:
    """Statistics, gains and shifts of each channel (dimension 1); the flag: whether they have the channel's sign."""
    dims = list(value.dims)
    place = min(1, len(dims) - 1)
    for tensor, signed in tensors.items():
        if tensor is None:
            continue
        other = run.value(tensor).dims[0]
        if not signed:
            pin(other.sign)
        ((dims[place], _),) = join([(dims[place], other)], [signed])
    return moved(Value(value.dims), dims)


@operation("batch_norm", "instance_norm")
def _batch_norm(run: Run, out: Tensor, x: Any, mean: Any = None, variance: Any = None, weight: Any = None,
                bias: Any = None, *_: Any, **__: Any) -> Value:  # fmt: skip
    return _channelwise(run, run.value(x), {mean: True, variance: False, weight: False, bias: True, None: False})


@operation("group_norm")
def _group_norm(run: Run, out: Tensor, x: Any, groups: int, weight: Any = None, bias: Any = None, *_: Any,
                **__: Any) -> Value:  # fmt: skip
    value = run.value(x)
    channels = value.dims[1]
    if groups == channels.size:
        return _channelwise(run, value, {weight: False, bias: True, None: False})
    pin(plain(channels).sign)  # the mean over a group mixes signs
    if groups > 1:
        split(plain(channels), [groups, channels.size // groups], run.label("groups"))
    return _channelwise(run, value, {weight: False, bias: False, None: False})


@operation("layer_norm", "rms_norm")
def _layer_norm(run: Run, out: Tensor, x: Any, shape: Any, weight: Any = None, bias: Any = None, *_: Any,
                **__: Any) -> Value:  # fmt: skip
    value = run.value(x)
    odd = run.name == "rms_norm"  # no mean is taken away
    count = len(shape)
    dims = list(value.dims)
    if not odd:
        for dim in dims[len(dims) - count :]:
            pin(dim.sign)
    for tensor, signed in ((weight, False), (bias if isinstance(bias, Tensor) else None, True)):
        if tensor is None:
            continue
        other = run.value(tensor)
        if not signed:
            other.pin_signs()
        pairs = join(list(zip(dims[len(dims) - count :], other.dims)), [signed] * count)
        dims[len(dims) - count :] = [p for p, _ in pairs]
    return Value(tidy(dims))


@operation("_weight_norm")
def _weight_norm(run: Run, out: Tensor, direction: Any, gain: Any, *_: Any) -> Value:
    run.value(gain).pin_signs()  # the sign stays with the direction
    return broadcast([run.value(direction), run.value(gain)], "product")


@operation("prelu")
def _prelu(run: Run, out: Tensor, x: Any, weight: Any) -> Value:
    value = run.value(x)
    value.pin_signs()
    return value if weight.numel() == 1 else _channelwise(run, value, {weight: False})


# ---- embeddings and attention ---------------------------------------------------------------------------------------


@operation("embedding")
def _embedding(run: Run, out: Tensor, x: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any,
               **__: Any) -> Value:  # fmt: skip
    rows, columns = run.value(weight).dims
    rows.pin()
    if max_norm is not None:
        columns.pin()
    return Value([*[flat(n) for n in out.shape[:-1]], columns])


@operation("scaled_dot_product_attention")
def _attention(run: Run, out: Tensor, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: Any = None, enable_gqa: bool = False) -> Value:  # fmt: skip
    q, k, v = run.value(query), run.value(key), run.value(value)
    if enable_gqa and q.dims[-3].size != k.dims[-3].size:
        times = q.dims[-3].size // k.dims[-3].size
        k, v = interleave(k, len(k.dims) - 3, times), interleave(v, len(v.dims) - 3, times)
    lead = LETTERS[: len(q.dims) - 2]
    scores = contract(q, k, lead + "TE", lead + "SE", lead + "TS")
    name_heads(run, q.dims[-1], "qk")
    scores.pin_signs()
    if attn_mask is not None:
        scores = broadcast([scores, run.value(attn_mask)], "none")
    if is_causal:
        scores.dims[-1].pin()
        scores.dims[-2].pin()
    made = contract(scores, v, lead + "TS", lead + "SV", lead + "TV")
    name_heads(run, made.dims[-1], "v")
    return made


# ---- recurrent cells ------------------------------------------------------------------------------------------------

# Which blocks of rows change sign with their unit: the tanh candidate's, never the sigmoid gates'.
_BLOCKS = {
    "rnn_tanh": (True,),
    "rnn_relu": (False,),
    "gru": (False, False, True),
    "lstm": (False, False, True, False),
}


def _cell(run: Run, kind: str, name: str, x: Dim, weights: list[Any], size: int) -> tuple[Dim, Dim]:
    """One layer in one direction: its hidden units (projected, if they are) and its cell units."""
    signed = _BLOCKS[kind]
    unit: Wire = [Node(size, name=name, rank=1)]
    sign: Wire = [Node(size, name=name)] if any(signed) else fixed_wire(size)
    rows = (unit * len(signed), [node for flag in signed for node in (sign if flag else fixed_wire(size))])
    w_ih, w_hh, *rest = [run.value(tensor) for tensor in weights if tensor is not None]
    hidden = (unit, sign)
    if rest and len(rest[-1].dims) == 2:
        projection = rest.pop()
        small = projection.dims[0].size
        hidden = ([Node(small, name=f"{name}.proj", rank=1)], [Node(small, name=f"{name}.proj")])
        _lay(projection, hidden, (unit, sign))
    join([(x, w_ih.dims[1])], [True])
    _lay(w_ih, rows)
    _lay(w_hh, rows, hidden)
    for bias in rest:
        _lay(bias, rows)
    return Dim(sum(n.size for n in hidden[0]), *hidden), Dim(size, unit, sign)


def _lay(value: Value, *wires: tuple[Wire, Wire]) -> None:
    for dim, (perm, sign) in zip(value.dims, wires):
        tie(perm, dim.perm)
        tie(sign, dim.sign)


def _take_state(run: Run, state: Any, made: list[Dim]) -> bool:
    """Memory that comes in from outside moves with the symmetry; memory computed from features is tied."""
    value = run.value(state)
    if value.source and bool(state.any()):
        raise Conflict("the example's memory is not zero, and memory moves with the symmetry; give zeros for it")
    if value.zero or value.source:
        return value.source
    if len(made) == 1:
        join([(value.dims[-1], made[0])], [True])
    else:
        value.pin()
        for dim in made:
            dim.pin()
    return False


@operation("rnn_tanh", "rnn_relu", "gru", "lstm")
def _recurrent(
    run: Run, out: Any, x: Any, state: Any, weights: Any, biases: Any, layers: Any = None, *args: Any
) -> Any:
    if isinstance(weights, Tensor):
        raise Conflict("packed sequences are not followed")
    value, kind = run.value(x), run.name
    _, _, both, _ = args[:4]
    each = len(weights) // (layers * (2 if both else 1))
    last = plain(value.dims[-1])
    hidden, cells, place = [], [], 0
    for layer in range(layers):
        outs = []
        for direction in range(2 if both else 1):
            name = run.label(f"{layer}{'.reverse' if direction else ''}")
            own = list(weights[place : place + each])
            place += each
            h, c = _cell(run, kind, name, last, own, own[1].shape[0] // len(_BLOCKS[kind]))
            outs.append(h)
            hidden.append(h)
            cells.append(c)
        last = Dim(sum(o.size for o in outs), [n for o in outs for n in o.perm], [n for o in outs for n in o.sign])
    states = list(state) if isinstance(state, (tuple, list)) else [state]
    for item, made in zip(states, (hidden, cells)):
        _take_state(run, item, made)
    output = Value([*[flat(n) for n in out[0].shape[:-1]], last])
    memories = []
    for tensor, made in zip(out[1:], (hidden, cells)):
        rows = flat(len(made))
        local = Dim(made[0].size, [n for d in made for n in d.perm], [n for d in made for n in d.sign], rows)
        if len(made) == 1:
            local = made[0]
        memories.append(Value([rows, *[flat(n) for n in tensor.shape[1:-1]], local], memory=True))
    return output, *memories


@operation("rnn_tanh_cell", "rnn_relu_cell", "gru_cell", "lstm_cell")
def _recurrent_cell(run: Run, out: Any, x: Any, state: Any, w_ih: Any, w_hh: Any, b_ih: Any = None,
                    b_hh: Any = None) -> Any:  # fmt: skip
    kind = run.name.removesuffix("_cell")
    value = run.value(x)
    states = list(state) if isinstance(state, (tuple, list)) else [state]
    hidden, cell = _cell(run, kind, run.path or kind, plain(value.dims[-1]), [w_ih, w_hh, b_ih, b_hh], w_hh.shape[1])
    outside = [_take_state(run, item, [made]) for item, made in zip(states, (hidden, cell))]
    lead = [flat(n) for n in value_shape(value)[:-1]]
    made = [Value([*lead, dim], memory=flag) for dim, flag in zip((hidden, cell), outside)]
    return tuple(made) if kind == "lstm" else made[0]


def value_shape(value: Value) -> list[int]:
    """Sizes of a value's dimensions."""
    return [dim.size for dim in value.dims]
