"""Rules of element-wise functions, of sums and products, and of everything that moves or reduces dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fleetgym.core.tracing.run import Run, operation
from fleetgym.core.tracing.symbolic import ANY, COPIES, EVEN, ODD
from fleetgym.core.tracing.values import (
    Dim,
    Value,
    broadcast,
    constant,
    contract,
    drop,
    empty,
    flat,
    join,
    narrow,
    pick,
    plain,
    reshape,
    tidy,
    uniform,
)
from fleetgym.core.tracing.wires import Conflict, fixed_wire, is_fixed, leaves, pin, spread

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def moved(value: Value, dims: Sequence[Dim]) -> Value:
    """The same entries with their dimensions in another order."""
    return Value(tidy(dims), source=value.source, zero=value.zero, memory=value.memory)


def number(run: Run, item: Any) -> bool:
    """Whether something is a plain number."""
    return not isinstance(item, Tensor) or (item.dim() == 0 and not run.known(item))


# ---- element by element ---------------------------------------------------------------------------------------------


@operation(*ODD.split(), *COPIES.split(), "type_as", "requires_grad_", "feature_dropout", "dropout1d", "dropout2d",
           "dropout3d", "deg2rad", "rad2deg", "erfinv")  # fmt: skip
def _same(run: Run, out: Tensor, x: Any, *_: Any, **__: Any) -> Value:
    return run.value(x)


@operation(*ANY.split(), "logit", "frac", "isfinite", "isnan", "isinf", "logical_not")
def _unsigned(run: Run, out: Tensor, x: Any, *_: Any, **__: Any) -> Value:
    value = run.value(x)
    value.pin_signs()
    return Value(value.dims)


@operation(*EVEN.split())
def _even(run: Run, out: Tensor, x: Any, *_: Any, **__: Any) -> Value:
    return Value([dim.like(sign=fixed_wire(wire_length(dim))) for dim in run.value(x).dims])


def wire_length(dim: Dim) -> int:
    """The length of a dimension's wires: those of all blocks for a local one."""
    return sum(leaf.size for leaf in leaves(dim.perm))


@operation("clamp", "clip", "hardtanh")
def _clamp(run: Run, out: Tensor, x: Any, *bounds: Any, **kwargs: Any) -> Value:
    low, high = (*bounds[:2], None, None)[:2]
    if run.name.startswith("hardtanh"):
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    low = kwargs.get("min", kwargs.get("min_val", low))
    high = kwargs.get("max", kwargs.get("max_val", high))
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low == -high:
        return run.value(x)
    return broadcast([run.value(item) for item in (x, low, high) if isinstance(item, Tensor)], "none")


@operation("zeros", "zeros_like", "new_zeros")
def _zeros(run: Run, out: Tensor, *_: Any, **__: Any) -> Value:
    value = constant(out.shape)
    value.zero = True
    return value


@operation("ones_like", "full_like", "new_ones", "new_full")
def _ones(run: Run, out: Tensor, *_: Any, **__: Any) -> Value:
    return Value([uniform(n) for n in out.shape])


@operation("empty_like", "rand_like", "randn_like", "randint_like", "new_empty", "new_tensor")
def _fresh(run: Run, out: Tensor, *_: Any, **__: Any) -> Value:
    return constant(out.shape)


# ---- sums and products ----------------------------------------------------------------------------------------------


@operation("add", "sub", "subtract")
def _sum(run: Run, out: Tensor, a: Any, b: Any, **_: Any) -> Value:
    if number(run, a) or number(run, b):
        x, shift = (b, a) if number(run, a) else (a, b)
        return run.value(x) if not isinstance(shift, Tensor) and shift == 0 else _unsigned(run, out, x)
    return broadcast([run.value(a), run.value(b)], "sum")


@operation("mul", "div", "multiply", "divide", "true_divide", "truediv")
def _product(run: Run, out: Tensor, a: Any, b: Any, **kwargs: Any) -> Value:
    if kwargs.get("rounding_mode"):
        return broadcast([run.value(item) for item in (a, b) if isinstance(item, Tensor)], "none")
    if number(run, a) or number(run, b):
        return run.value(b if number(run, a) else a)
    for item in (a, b):
        if id(item) in run.fresh:
            run.value(item).pin_signs()  # a gain: the sign stays with what it scales
    return broadcast([run.value(a), run.value(b)], "product")


@operation("pow")
def _power(run: Run, out: Tensor, x: Any, exponent: Any, **_: Any) -> Value:
    if isinstance(exponent, (int, float)) and float(exponent).is_integer():
        return run.value(x) if int(exponent) % 2 else _even(run, out, x)
    return broadcast([run.value(item) for item in (x, exponent) if isinstance(item, Tensor)], "none")


@operation("maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "atan2", "arctan2", "lerp", "addcmul", "addcdiv",
           "remainder", "fmod", "floor_divide", "floordiv", "mod", "logical_and", "logical_or", "logical_xor", "and",
           "or", "xor", "bitwise_and", "bitwise_or", "hypot", "__rpow__", "rpow", "fmax", "fmin", "normal",
           "isclose", "logaddexp", "xlogy", "__ror__", "__rand__")  # fmt: skip
def _joint(run: Run, out: Tensor, *items: Any, **kwargs: Any) -> Value:
    tensors = [item for item in (*items, *kwargs.values()) if isinstance(item, Tensor)]
    value = broadcast([run.value(item) for item in tensors], "none")
    if run.name == "normal":
        value.pin()  # the noise has an order of its own
    return value


@operation("where")
def _where(run: Run, out: Tensor, condition: Any, a: Any = None, b: Any = None, **kwargs: Any) -> Any:
    a, b = kwargs.get("input", a), kwargs.get("other", b)
    if a is None:
        run.value(condition).pin()
        return None
    mask = run.value(condition)
    mask.pin_signs()
    mask = Value(mask.dims)
    sides = [run.value(item) for item in (a, b) if not number(run, item)]
    zeros = [item for item in (a, b) if number(run, item) and float(item) == 0]
    if len(sides) + len(zeros) < 2:
        return broadcast([mask, *sides], "none")
    return broadcast([mask, broadcast(sides, "sum")], "product")


@operation("masked_fill")
def _masked_fill(run: Run, out: Tensor, x: Any, mask: Any, value: Any) -> Value:
    if isinstance(value, Tensor) or value != 0:
        return broadcast([run.value(x), run.value(mask)], "none")
    return broadcast([run.value(x), run.value(mask)], "product")


def product(run: Run, a: Value, b: Value) -> Value:
    """The matrix product of values."""
    n, m = len(a.dims), len(b.dims)
    lead = LETTERS[: max(n, m)]
    left = (lead[len(lead) - (n - 2) :] if n > 2 else "") + ("XY" if n > 1 else "Y")
    right = (lead[len(lead) - (m - 2) :] if m > 2 else "") + ("YZ" if m > 1 else "Y")
    batch = lead[len(lead) - max(n - 2, m - 2, 0) :] if max(n, m) > 2 else ""
    out = contract(a, b, left, right, batch + ("X" if n > 1 else "") + ("Z" if m > 1 else ""))
    if n > 2 and m > 2:
        name_heads(run, a.dims[-1], "qk")
        if out.dims[-1].outer is not None:
            name_heads(run, out.dims[-1], "v")
    return out


def name_heads(run: Run, dim: Dim, suffix: str) -> None:
    """Names the channels of attention heads, and the heads, after the module."""
    if dim.outer is None:
        return
    for leaf in leaves(dim.perm):
        if leaf.home is not None and not leaf.rigid and leaf.rank > 1:
            leaf.name, leaf.rank = run.label(suffix), 1
        home = leaf.home.root() if leaf.home is not None else leaf
        if leaf.home is not None and home.rank > 1:
            home.name, home.rank = run.label("heads"), 1


@operation("matmul", "mm", "bmm", "mv", "dot", "vdot")
def _matmul(run: Run, out: Tensor, a: Any, b: Any) -> Value:
    return product(run, run.value(a), run.value(b))


@operation("__rmatmul__")
def _rmatmul(run: Run, out: Tensor, a: Any, b: Any) -> Value:
    return product(run, run.value(b), run.value(a))


@operation("addmm", "addmv", "baddbmm")
def _addmm(run: Run, out: Tensor, start: Any, a: Any, b: Any, **_: Any) -> Value:
    return broadcast([run.value(start), product(run, run.value(a), run.value(b))], "sum")


@operation("linear")
def _linear(run: Run, out: Tensor, x: Any, weight: Any, bias: Any = None) -> Value:
    value = run.value(x)
    lead = LETTERS[: len(value.dims) - 1]
    out_ = contract(value, run.value(weight), lead + "Y", "ZY", lead + "Z")
    return out_ if bias is None else broadcast([out_, run.value(bias)], "sum")


@operation("outer", "ger")
def _outer(run: Run, out: Tensor, a: Any, b: Any) -> Value:
    return contract(run.value(a), run.value(b), "X", "Y", "XY")


@operation("einsum")
def _einsum(run: Run, out: Tensor, equation: Any, *operands: Any) -> Value:
    if not isinstance(equation, str):
        raise Conflict("only equations are followed")
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    values = [run.value(tensor) for tensor in tensors]
    terms, _, result = equation.replace(" ", "").partition("->")
    inputs = terms.split(",")
    if "->" not in equation:
        letters = terms.replace(",", "").replace(".", "")
        result = ("..." if "..." in terms else "") + "".join(sorted(x for x in letters if letters.count(x) == 1))
    spare = [x for x in LETTERS if x not in equation]
    depth = max(len(v.dims) - len(t.replace("...", "")) for v, t in zip(values, inputs))
    dots = "".join(spare[:depth])
    full = []
    for v, t in zip(values, inputs):
        own = len(v.dims) - len(t.replace("...", ""))
        full.append(t.replace("...", dots[depth - own :]))
        if len(set(full[-1])) < len(full[-1]):
            raise Conflict("a diagonal is not followed")
    result = result.replace("...", dots)
    value, letters = values[0], full[0]
    for i in range(1, len(values)):
        later = result + "".join(full[i + 1 :])
        kept = "".join(dict.fromkeys(x for x in letters + full[i] if x in later))
        if len(values) == 2:
            kept = result
        value, letters = contract(value, values[i], letters, full[i], kept), kept
    gone = [i for i, x in enumerate(letters) if x not in result]
    value = drop(value, gone, False) if gone else value
    letters = "".join(x for x in letters if x in result)
    if len(tensors) == 2:
        local = [dim for dim, x in zip(values[0].dims, full[0]) if x in full[1] and x not in result]
        for dim in local:
            name_heads(run, dim, "qk")
        for dim in value.dims:
            name_heads(run, dim, "v")
    return moved(value, [value.dims[letters.index(x)] for x in result])


# ---- shapes ---------------------------------------------------------------------------------------------------------


@operation("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "_unsafe_view", "ravel")
def _reshape(run: Run, out: Tensor, x: Any, *_: Any, **__: Any) -> Value:
    return reshape(run.value(x), out.shape)


@operation("squeeze", "unsqueeze")
def _squeeze(run: Run, out: Tensor, x: Any, *_: Any, **__: Any) -> Value:
    return reshape(run.value(x), out.shape)


@operation("permute")
def _permute(run: Run, out: Tensor, x: Any, *order: Any, dims: Any = None) -> Value:
    value = run.value(x)
    order = dims if dims is not None else order[0] if isinstance(order[0], (tuple, list)) else order
    return moved(value, [value.dims[i] for i in order])


@operation("transpose", "swapaxes", "swapdims")
def _transpose(run: Run, out: Tensor, x: Any, a: int = 0, b: int = 1, **kwargs: Any) -> Value:
    value = run.value(x)
    a, b = kwargs.get("dim0", kwargs.get("axis0", a)), kwargs.get("dim1", kwargs.get("axis1", b))
    dims = list(value.dims)
    dims[a], dims[b] = dims[b], dims[a]
    return moved(value, dims)


@operation("t", "mT")
def _t(run: Run, out: Tensor, x: Any) -> Value:
    value = run.value(x)
    dims = list(value.dims)
    return moved(value, dims if len(dims) < 2 else [*dims[:-2], dims[-1], dims[-2]])


@operation("movedim", "moveaxis")
def _movedim(run: Run, out: Tensor, x: Any, source: Any, destination: Any) -> Value:
    value = run.value(x)
    order = torch.movedim(torch.empty(tuple(range(2, 2 + len(value.dims))), device="meta"), source, destination)
    return moved(value, [value.dims[n - 2] for n in order.shape])


@operation("expand", "expand_as", "broadcast_to")
def _expand(run: Run, out: Tensor, x: Any, *_: Any, **__: Any) -> Value:
    value = run.value(x)
    lead = out.dim() - len(value.dims)
    dims = [uniform(n) for n in out.shape[:lead]]
    dims += [dim if dim.size == n else uniform(n) for dim, n in zip(value.dims, out.shape[lead:])]
    return moved(value, dims)


@operation("broadcast_tensors")
def _broadcast_tensors(run: Run, out: Any, *tensors: Any) -> tuple[Value, ...]:
    items = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    return tuple(_expand(run, made, item) for made, item in zip(out, items))


@operation("repeat", "tile")
def _repeat(run: Run, out: Tensor, x: Any, *_: Any, **__: Any) -> Value:
    value = run.value(x)
    lead = out.dim() - len(value.dims)
    dims = [uniform(n) for n in out.shape[:lead]]
    for dim, n in zip(value.dims, out.shape[lead:]):
        if dim.size == n:
            dims.append(dim)
        elif dim.size == 1:
            dims.append(uniform(n))
        else:
            dim, times = plain(dim), n // dim.size
            dims.append(Dim(n, dim.perm * times, dim.sign * times))
    return moved(value, dims)


def interleave(value: Value, place: int, times: int) -> Value:
    """Each entry along a dimension ``times`` times in a row."""
    dims = list(value.dims)
    dim = plain(dims[place])
    dims[place] = Dim(dim.size * times, spread(dim.perm, times), spread(dim.sign, times))
    return moved(value, dims)


@operation("repeat_interleave")
def _repeat_interleave(run: Run, out: Tensor, x: Any, repeats: Any, dim: Any = None, **_: Any) -> Value:
    if not isinstance(repeats, int) or dim is None:
        raise Conflict("only a number of repeats along one dimension is followed")
    value = run.value(x)
    return interleave(value, value.place(dim), repeats)


@operation("cat", "concat", "concatenate")
def _cat(run: Run, out: Tensor, tensors: Any, dim: int = 0) -> Value:
    values = [run.value(tensor) for tensor in tensors if tensor.numel() or tensor.dim() > 1]
    place = values[0].place(dim)
    kept = [v for v in values if not v.zero]
    memory = all(v.memory for v in values)
    if not kept:
        return Value([flat(n) for n in out.shape], zero=True)
    dims = list(kept[0].dims)
    joined: dict[int, Dim] = {}
    for v in kept[1:]:
        others = [i for i in range(len(dims)) if i != place]
        # A dimension that is local to the joined one differs from stretch to stretch.
        for i in others:
            for side in (dims, v.dims):
                if side[i].outer is not None and side[i].outer.tag is side[place].tag:
                    raise Conflict("what is joined is local to the dimension along which it is joined")
        pairs = join([(dims[i], v.dims[i]) for i in others], [True] * len(others))
        for i, (p, _) in zip(others, pairs):
            dims[i] = p
    parts = [plain(v.dims[place]) if not v.zero else empty(v.dims[place].size) for v in values]
    joined[place] = Dim(
        sum(part.size for part in parts),
        [node for part in parts for node in part.perm],
        [node for part in parts for node in part.sign],
    )
    dims[place] = joined[place]
    return Value(tidy(dims), memory=memory)


@operation("stack")
def _stack(run: Run, out: Tensor, tensors: Any, dim: int = 0) -> Value:
    values = [run.value(tensor) for tensor in tensors]
    kept = [v for v in values if not v.zero] or values[:1]
    place = dim if dim >= 0 else dim + len(values[0].dims) + 1
    new = flat(len(values))
    dims = list(kept[0].dims)
    if all(v.memory for v in values) and len({len(v.dims) for v in values}) == 1:
        # Each row keeps its own units: what lies along the others is local to the new dimension.
        dims = [
            Dim(d.size, [n for v in values for n in v.dims[i].perm], [n for v in values for n in v.dims[i].sign], new)
            if all(v.dims[i].outer is None for v in values) and not all(v.dims[i].fixed for v in values)
            else d
            for i, d in enumerate(dims)
        ]
        return Value([*dims[:place], new, *dims[place:]], memory=True)
    for v in kept[1:]:
        pairs = join(list(zip(dims, v.dims)), [True] * len(dims))
        dims = [p for p, _ in pairs]
    return Value(tidy([*dims[:place], new, *dims[place:]]), zero=all(v.zero for v in values))


@operation("chunk", "split", "split_with_sizes", "tensor_split", "hsplit")
def _chunk(run: Run, out: Any, x: Any, *args: Any, **kwargs: Any) -> tuple[Value, ...]:
    value = run.value(x)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    place, start, made = value.place(dim), 0, []
    for piece in out:
        size = piece.shape[place]
        made.append(narrow(value, place, start, start + size))
        start += size
    return tuple(made)


@operation("unbind")
def _unbind(run: Run, out: Any, x: Any, dim: int = 0) -> tuple[Value, ...]:
    value = run.value(x)
    return tuple(pick(value, value.place(dim), i) for i in range(len(out)))


@operation("__iter__")
def _iter(run: Run, out: Any, x: Any) -> Any:
    return None


@operation("select")
def _select(run: Run, out: Tensor, x: Any, dim: int, index: int) -> Value:
    value = run.value(x)
    return pick(value, value.place(dim), index)


@operation("narrow")
def _narrow(run: Run, out: Tensor, x: Any, dim: int, start: int, length: int) -> Value:
    value = run.value(x)
    return narrow(value, value.place(dim), start, start + length)


@operation("index_select")
def _index_select(run: Run, out: Tensor, x: Any, dim: int, index: Any) -> Value:
    value = run.value(x)
    return _taken(value, value.place(dim), 1, [out.shape[value.place(dim)]])


def _taken(value: Value, place: int, count: int, sizes: Sequence[int]) -> Value:
    """Entries along dimensions, chosen by place: they must then stay where they are."""
    dims = list(value.dims)
    tags = {dim.tag for dim in dims[place : place + count]}
    dims = [plain(d) if d.outer is not None and d.outer.tag in tags else d for d in dims]
    for dim in dims[place : place + count]:
        plain(dim).pin()
    return Value(tidy([*dims[:place], *[flat(n) for n in sizes], *dims[place + count :]]))


@operation("getitem")
def _getitem(run: Run, out: Tensor, x: Any, index: Any) -> Value:
    value = run.value(x)
    entries = list(index) if isinstance(index, tuple) else [index]
    entries = [torch.tensor(e) if isinstance(e, list) else e for e in entries]

    def width(entry: Any) -> int:
        if entry is None or entry is Ellipsis or isinstance(entry, bool):
            return 0
        return entry.dim() if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1

    used = sum(width(e) for e in entries)
    if Ellipsis in [e for e in entries if not isinstance(e, Tensor)]:
        at = next(i for i, e in enumerate(entries) if e is Ellipsis)
        entries[at : at + 1] = [slice(None)] * (len(value.dims) - used)
    else:
        entries += [slice(None)] * (len(value.dims) - used)
    chosen = [i for i, e in enumerate(entries) if isinstance(e, Tensor) and e.dim() > 0]
    if len(chosen) > 1 and chosen[-1] - chosen[0] >= len(chosen):
        raise Conflict("indexing by tensors that are not next to each other is not followed")
    place, memory = 0, value.memory and not chosen
    for number_, entry in enumerate(entries):
        if entry is None:
            value = Value([*value.dims[:place], flat(1), *value.dims[place:]], value.source, value.zero)
            place += 1
        elif isinstance(entry, slice):
            start, stop, step = entry.indices(value.dims[place].size)
            if step == 1:
                source = value.source
                value = narrow(value, place, start, max(start, stop))
                value.source = source and value.source
            else:
                value = _taken(value, place, 1, [len(range(start, stop, step))])
            place += 1
        elif isinstance(entry, Tensor) and entry.dim() > 0:
            if number_ != chosen[0]:
                continue
            count = sum(width(entries[i]) for i in chosen)
            rest = len(value.dims) - place - count
            later = sum(e is None for e in entries[number_:]) - sum(
                isinstance(e, int) or isinstance(e, Tensor) and e.dim() == 0 for e in entries[number_:]
            )
            sizes = list(out.shape[place : out.dim() - rest - later])
            value = _taken(value, place, count, sizes)
            place += len(sizes)
        else:
            value, memory = pick(value, place, int(entry)), False
    value = Value(value.dims, value.source, value.zero)
    value.memory = memory
    return value


@operation("setitem")
def _setitem(run: Run, out: Tensor, x: Any, index: Any, item: Any) -> Value:
    value, entries = run.value(x), index if isinstance(index, tuple) else (index,)
    if value.zero and not number(run, item) and Ellipsis not in [e for e in entries if not isinstance(e, Tensor)]:
        # Zeros take the shape of what is written: units lie along the dimensions that are written whole.
        whole = [e == slice(None) for e in entries] + [True] * (len(value.dims) - len(entries))
        value = Value([empty(d.size) if full else flat(d.size) for d, full in zip(value.dims, whole)])
    run.set(x, value)
    part = _getitem(run, x.detach()[index], x, index)
    if number(run, item):
        if isinstance(item, Tensor) or item != 0:
            part.pin_signs()
    else:
        broadcast([part, run.value(item)], "sum")
    return value


@operation("copy")
def _copy(run: Run, out: Tensor, x: Any, source: Any, *_: Any, **__: Any) -> Value:
    value = _expand(run, x, source)
    return broadcast([run.value(x), value], "sum") if x._is_view() else value


def pins_dims(run: Run, value: Value, dim: Any) -> list[int]:
    """Places of dimensions given as a number, several or None for all."""
    if dim is None:
        return list(range(len(value.dims)))
    return [value.place(i) for i in (dim if isinstance(dim, (tuple, list)) else [dim])]


_BEFORE_DIM = {"roll": 1, "diff": 1, "fft_fft": 1}


@operation("cumsum", "cumprod", "flip", "roll", "logcumsumexp", "diff", "fft_fft", "cummax")
def _along(run: Run, out: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    value = run.value(x)
    if run.name == "flip":  # its dimensions may stand one by one
        given = args[0] if len(args) == 1 else args or None
    else:  # behind the shifts of a roll, the order of a difference, the length of a transform
        given = (args[_BEFORE_DIM.get(run.name, 0) :] or (None,))[0]
    dim = kwargs.get("dim", kwargs.get("dims", given))
    for place in pins_dims(run, value, -1 if dim is None and run.name in ("diff", "fft_fft") else dim):
        if not value.dims[place].fixed:
            raise Conflict("it depends on the order of units that may be permuted")
    if run.name not in ("cumsum", "flip", "roll", "diff"):
        value.pin_signs()
    if isinstance(out, Tensor) and tuple(out.shape) == tuple(d.size for d in value.dims):
        return Value(value.dims)
    value.pin()
    return None


@operation("argmax", "argmin", "argsort", "sort", "topk", "multinomial", "kthvalue", "mode", "nonzero", "unique",
           "gather", "take_along_dim")  # fmt: skip
def _readout(run: Run, out: Any, x: Any, *_: Any, **__: Any) -> Any:
    run.value(x).pin()  # the places of units are what it returns
    return None


@operation("pad")
def _pad(run: Run, out: Tensor, x: Any, pads: Any, mode: str = "constant", value: Any = None) -> Value:
    v = run.value(x)
    dims = list(v.dims)
    zero = mode == "constant" and not value
    if not zero:
        v.pin_signs()
    for i in range(len(pads) // 2):
        place, (low, high) = len(dims) - 1 - i, pads[2 * i : 2 * i + 2]
        if low == high == 0:
            continue
        dim = plain(dims[place])
        if mode != "constant" and not is_fixed(dim.perm):
            raise Conflict(f"mode {mode!r} depends on the order of units that may be permuted")
        if dim.fixed or min(low, high) < 0:
            dim.pin()
            dims[place] = flat(out.shape[place])
            continue
        parts = [empty(low) if zero else uniform(low), dim, empty(high) if zero else uniform(high)]
        parts = [part for part in parts if part.size]
        dims[place] = Dim(
            out.shape[place], [n for part in parts for n in part.perm], [n for part in parts for n in part.sign]
        )
    return Value(tidy(dims), zero=v.zero and zero)


# ---- reductions -----------------------------------------------------------------------------------------------------


@operation("mean", "sum", "nanmean", "nansum", "amax", "amin", "var", "std", "prod", "norm", "logsumexp", "all", "any",
           "linalg_vector_norm", "vector_norm", "max", "min", "median", "var_mean", "std_mean", "count_nonzero",
           "frobenius_norm")  # fmt: skip
def _reduce(run: Run, out: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    name, value = run.name, run.value(x)
    other = kwargs.get("other", args[0] if args else None)
    if name in ("max", "min") and isinstance(other, Tensor):
        return _joint(run, out, x, other)
    if name in ("norm", "linalg_vector_norm", "vector_norm"):
        args = args[1:]
    dim = kwargs.get("dim", args[0] if args and not isinstance(args[0], bool) else None)
    places = pins_dims(run, value, dim)
    first = out if isinstance(out, Tensor) else out[0]
    keep = first.dim() == len(value.dims) and bool(places)
    if name in ("mean", "sum", "nanmean", "nansum"):
        made = drop(value, places, keep)
    elif name in ("norm", "linalg_vector_norm", "vector_norm", "var", "std"):
        # Even in every sign of what stays, so the result has none; a norm even in those of what goes.
        if name in ("var", "std"):
            for place in places:
                pin(value.dims[place].sign)
        made = drop(_even(run, first, x), places, keep)
    else:
        value.pin_signs()
        made = drop(value, places, keep)
    if isinstance(out, Tensor):
        return made
    if name in ("var_mean", "std_mean"):
        return made, made
    for i in places:  # the second result is where the extremum is
        value.dims[i].pin()
    return made, Value([d.like(sign=fixed_wire(wire_length(d))) for d in made.dims])


@operation("softmax", "log_softmax", "_softmax", "_log_softmax", "softmin")
def _softmax(run: Run, out: Tensor, x: Any, *_: Any, **__: Any) -> Value:
    return _unsigned(run, out, x)


@operation("glu")
def _glu(run: Run, out: Tensor, x: Any, dim: int = -1) -> Value:
    value = run.value(x)
    place = value.place(dim)
    half = math.ceil(value.dims[place].size / 2)
    gate = narrow(value, place, half, 2 * half)
    gate.pin_signs()
    return broadcast([narrow(value, place, 0, half), gate], "product")
