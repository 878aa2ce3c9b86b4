"""Derives a :class:`~fleetgym.core.weights.WeightSpec` by tracing a module and following its feature axes.

Every value in the trace carries two *wires* along its last dimension: one says which permutable units lie there, the
other which sign vector they carry. A wire is a list of nodes; rules tie wires together (a residual sum ties both
summands), split nodes (a slice, a concatenation) or pin them (an output, an operation that only works in this order).
What is left free at the end is the symmetry.

To teach it a layer: write a rule that takes the wires in, assigns wires to the layer's parameters
(:meth:`Derivation.assign`) and returns the wires out, and enter it with :func:`rule` under the module's type, the
function, or the method's name.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fleetgym.core.errors import UserError
from fleetgym.core.tracing.build import build
from fleetgym.core.tracing.wires import (
    Conflict,
    Node,
    Wire,
    cut,
    fixed_wire,
    is_fixed,
    leaves,
    pin,
    product_signs,
    resize,
    tie,
    total,
)
from fleetgym.core.weights import WeightSpec

# ---- values ---------------------------------------------------------------------------------------------------------


@dataclass
class _Value:
    """A tensor in the trace: what lies along its last dimension. All other dimensions are batch or time."""

    perm: Wire
    sign: Wire
    rank: int | None = None
    source: bool = False  # straight from an argument of forward

    @property
    def size(self) -> int | None:
        return total(self.perm)

    @property
    def fixed(self) -> bool:
        return is_fixed(self.perm) and is_fixed(self.sign)


@dataclass
class _Memory:
    """Recurrent state [rows, B, H]: each row (layer and direction) lies on its own wire. None: no longer told apart."""

    rows: list[_Value] | None


@dataclass
class _Param:
    """A parameter or buffer that the module uses directly."""

    key: str
    tensor: Tensor
    transposed: bool = False


class _Zero:
    """A tensor of zeros: any permutation and any sign leaves it as it is."""


class _Plain:
    """Something that is not a tensor: a size, a dtype, a device."""


class _LastSize(_Plain):
    """The length of a tensor's last dimension."""


class _Shape(_Plain):
    """A tensor's shape."""


def _constant(value: _Value | None = None, size: int | None = None, rank: int | None = None) -> _Value:
    return _Value(fixed_wire(size), fixed_wire(size), rank if value is None else value.rank)


RULES: dict[Any, Callable[..., Any]] = {}


def rule(*targets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enters a rule for module types, functions or names of methods.

    A module's rule is called with the derivation, the module's path, the module and the arguments; the others with the
    derivation and the arguments.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for target in targets:
            RULES[target] = function
        return function

    return enter


def _module_rule(module: nn.Module) -> Callable[..., Any] | None:
    for base in type(module).__mro__:
        if base in RULES and type(module).forward is base.forward:
            return RULES[base]
    return None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _module_rule(m) is not None or super().is_leaf_module(m, module_qualified_name)


class Derivation:
    """One run of the derivation; rules receive it to assign axes to parameters."""

    def __init__(self, module: nn.Module, strict: bool) -> None:
        self.module, self.strict = module, strict
        self.dims: dict[str, list[tuple[Wire, Wire] | None]] = {}
        self.tensors = dict(module.state_dict(keep_vars=True))

    def assign(self, key: str, *dims: tuple[Wire, Wire]) -> None:
        """Says which wires (permutation, signs) lie along the dimensions of a tensor; ties them if it has some."""
        if key not in self.tensors:
            return
        known = self.dims.setdefault(key, [None] * len(dims))
        for i, (perm, sign) in enumerate(dims):
            for wire in (perm, sign):
                resize(wire, self.tensors[key].shape[i])
            if known[i] is None:
                known[i] = (perm, sign)
            else:
                tie(known[i][0], perm)
                tie(known[i][1], sign)

    def axes_of(self, param: _Param) -> list[tuple[Wire, Wire]]:
        """The wires of a parameter that is used directly; fresh ones if it was not seen before."""
        if param.key not in self.dims:
            shape = param.tensor.shape
            names = [f"{param.key}:{i}" if len(shape) > 1 else param.key for i in range(len(shape))]
            self.dims[param.key] = [([Node(n, n == 1, name)], [Node(n, n == 1, name)]) for n, name in zip(shape, names)]
        dims = self.dims[param.key]
        return dims[::-1] if param.transposed else dims

    def value(self, item: Any) -> _Value:
        """A value of any kind as a tensor value."""
        if isinstance(item, _Value):
            return item
        if isinstance(item, _Param):
            dims = self.axes_of(item)
            for perm, sign in dims[:-1]:
                pin(perm, sign)  # only its last dimension is followed
            return _Value(*dims[-1], rank=len(dims)) if dims else _constant(size=1, rank=0)
        raise Conflict(f"{type(item).__name__.strip('_').lower()} where a tensor of features is expected")

    def linear(self, path: str, x: _Value, weight: str, bias: str | None) -> _Value:
        """The rule of ``x W^T + b`` for keys of the state dict."""
        size = self.tensors[weight].shape[0]
        if weight in self.dims and self.dims[weight][0] is not None:
            out = self.dims[weight][0]
        else:
            out = ([Node(size, name=path)], [Node(size, name=path)])
        self.assign(weight, out, (x.perm, x.sign))
        if bias is not None:
            self.assign(bias, out)
        return _Value(*out, rank=x.rank)


# ---- rules for modules ----------------------------------------------------------------------------------------------


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@rule(nn.Linear)
def _linear_module(d: Derivation, path: str, module: nn.Linear, x: Any) -> _Value:
    bias = _key(path, "bias") if module.bias is not None else None
    return d.linear(path or "linear", d.value(x), _key(path, "weight"), bias)


@rule(nn.RNN, nn.GRU, nn.LSTM)
def _recurrent(d: Derivation, path: str, module: nn.RNNBase, x: Any, state: Any = None) -> Any:
    x = d.value(x)
    lstm = module.mode == "LSTM"
    # Which blocks of rows change sign with their unit: the tanh candidate's, never the sigmoid gates'.
    blocks = {"RNN_TANH": (True,), "RNN_RELU": (False,), "GRU": (False, False, True)}
    signed = blocks.get(module.mode, (False, False, True, False))
    given = (list(state) if isinstance(state, (tuple, list)) else [state, state]) if state is not None else []
    hidden_rows, cell_rows = [], []
    for layer in range(module.num_layers):
        outs = []
        for suffix in ("", "_reverse")[: 2 if module.bidirectional else 1]:
            name = f"{path}.{layer}".lstrip(".") + suffix.replace("_", ".")
            n, p = module.hidden_size, module.proj_size
            unit: Wire = [Node(n, name=name)]
            sign: Wire = [Node(n, name=name)] if any(signed) else fixed_wire(n)
            out, out_sign = unit, sign
            if p:
                out, out_sign = [Node(p, name=f"{name}.proj")], [Node(p, name=f"{name}.proj")]
                d.assign(_key(path, f"weight_hr_l{layer}{suffix}"), (out, out_sign), (unit, sign))
            # Stacked blocks of rows are the same unit over and over; the same node then stands in the wire repeatedly.
            rows = (unit * len(signed), [node for flag in signed for node in (sign if flag else fixed_wire(n))])
            d.assign(_key(path, f"weight_ih_l{layer}{suffix}"), rows, (x.perm, x.sign))
            d.assign(_key(path, f"weight_hh_l{layer}{suffix}"), rows, (out, out_sign))
            for bias in ("bias_ih", "bias_hh"):
                d.assign(_key(path, f"{bias}_l{layer}{suffix}"), rows)
            outs.append(_Value(out, out_sign))
            hidden_rows.append(_Value(out, out_sign, rank=2))
            cell_rows.append(_Value(unit, sign, rank=2))
        x = _Value([n for o in outs for n in o.perm], [n for o in outs for n in o.sign], rank=3)
    for item, rows in zip(given, (hidden_rows, cell_rows)):
        _accept_state(d, item, rows)
    return x, ((_Memory(hidden_rows), _Memory(cell_rows)) if lstm else _Memory(hidden_rows))


def _accept_state(d: Derivation, item: Any, rows: list[_Value]) -> None:
    """Memory that comes in from outside moves with the symmetry; memory computed from features ties or pins it."""
    if item is None or isinstance(item, (_Zero, _Memory)) or (isinstance(item, _Value) and item.source):
        return
    value = d.value(item)
    for row in rows:
        if len(rows) > 1 or value.fixed:
            pin(row.perm, row.sign, value.perm, value.sign)
        else:
            tie(row.perm, value.perm)
            tie(row.sign, value.sign)


def _norm_affine(d: Derivation, path: str, module: nn.Module, x: _Value, keeps_sign: bool) -> _Value:
    if len(module.normalized_shape) != 1:
        raise Conflict(f"normalises over {len(module.normalized_shape)} dimensions; only the last one is followed")
    resize(x.perm, module.normalized_shape[0])
    if not keeps_sign:
        pin(x.sign)  # the mean over the units mixes their signs
    if getattr(module, "weight", None) is not None:
        d.assign(_key(path, "weight"), (x.perm, fixed_wire(x.size)))
    if getattr(module, "bias", None) is not None:
        d.assign(_key(path, "bias"), (x.perm, x.sign))
    return x


@rule(nn.LayerNorm)
def _layer_norm(d: Derivation, path: str, module: nn.LayerNorm, x: Any) -> _Value:
    return _norm_affine(d, path, module, d.value(x), keeps_sign=False)


if hasattr(nn, "RMSNorm"):

    @rule(nn.RMSNorm)
    def _rms_norm(d: Derivation, path: str, module: nn.Module, x: Any) -> _Value:
        return _norm_affine(d, path, module, d.value(x), keeps_sign=True)


@rule(nn.PReLU)
def _prelu(d: Derivation, path: str, module: nn.PReLU, x: Any) -> _Value:
    x = d.value(x)
    pin(x.sign)
    if module.num_parameters > 1 and x.rank != 2:
        pin(x.perm)  # its slopes lie along dimension 1, the last one only for [B, C]
    size = module.num_parameters
    d.assign(_key(path, "weight"), (x.perm, fixed_wire(size)) if size > 1 else (fixed_wire(1), fixed_wire(1)))
    return x


@rule(nn.Embedding)
def _embedding(d: Derivation, path: str, module: nn.Embedding, x: Any) -> _Value:
    size = module.embedding_dim
    out = ([Node(size, name=path)], [Node(size, name=path)])
    if module.max_norm is None:
        d.assign(_key(path, "weight"), (fixed_wire(module.num_embeddings), fixed_wire(module.num_embeddings)), out)
        return _Value(*d.dims[_key(path, "weight")][1])
    return _constant(size=size)


# ---- rules for functions and methods --------------------------------------------------------------------------------


def _same(d: Derivation, x: Any, *_: Any, **__: Any) -> Any:
    """Leaves permutation and sign alone: odd functions, copies, casts."""
    return x if isinstance(x, (_Memory, _Zero, _Plain, _Param)) else d.value(x)


def _unsigned(d: Derivation, x: Any, *_: Any, **__: Any) -> _Value:
    """An element-wise function that is neither odd nor even."""
    x = d.value(x)
    pin(x.sign)
    return x


def _even(d: Derivation, x: Any, *_: Any, **__: Any) -> _Value:
    x = d.value(x)
    return _Value(x.perm, fixed_wire(x.size), x.rank)


ODD = (
    "tanh sin sinh asinh atan arctan sign neg negative erf trunc round nan_to_num softsign tanhshrink softshrink "
    "hardshrink"
)
ANY = (
    "relu relu_ gelu silu elu selu celu sigmoid logsigmoid softplus leaky_relu rrelu hardswish hardsigmoid mish relu6 "
    "threshold exp expm1 log log1p log2 sqrt rsqrt reciprocal floor ceil sigmoid_ exp2 clamp_min clamp_max"
)
COPIES = (
    "dropout alpha_dropout feature_alpha_dropout identity clone contiguous detach to float double half bfloat16 cpu "
    "cuda type"
)
EVEN = "abs square cos cosh absolute"
for _names, _function in ((ODD, _same), (ANY, _unsigned), (COPIES, _same), (EVEN, _even)):
    for _name in _names.split():
        RULES[_name] = _function
        for _home in (torch, F, torch.special, operator):
            if callable(getattr(_home, _name, None)):
                RULES[getattr(_home, _name)] = _function
RULES.update({operator.abs: _even, "type_as": _same, "tanh_": _same, F.hardtanh_: _same})


def _as_module(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda d, path, module, *args, **kwargs: function(d, *args, **kwargs)


for _names, _function in (
    ("Tanh Identity Dropout AlphaDropout Softsign Tanhshrink Softshrink Hardshrink", _same),
    (
        "ReLU GELU SiLU ELU SELU CELU Sigmoid LogSigmoid Softplus LeakyReLU RReLU Hardswish Hardsigmoid Mish ReLU6 "
        "Threshold",
        _unsigned,
    ),
):
    for _name in _names.split():
        RULES[getattr(nn, _name)] = _as_module(_function)


@rule(nn.Hardtanh)
def _hardtanh_module(d: Derivation, path: str, module: nn.Hardtanh, x: Any) -> _Value:
    return _clamp(d, x, module.min_val, module.max_val)


@rule(torch.clamp, torch.clip, "clamp", "clip", F.hardtanh)
def _clamp(d: Derivation, x: Any, low: Any = None, high: Any = None, **kwargs: Any) -> _Value:
    low = kwargs.get("min", kwargs.get("min_val", low))
    high = kwargs.get("max", kwargs.get("max_val", high))
    numbers = isinstance(low, (int, float)) and isinstance(high, (int, float))
    x = d.value(x)
    for bound in (low, high):
        if isinstance(bound, (_Value, _Param)):
            value = d.value(bound)
            if value.size != 1:
                tie(x.perm, value.perm)
            pin(value.sign)
    return x if numbers and low == -high else _unsigned(d, x)


def _scalar(item: Any) -> bool:
    return isinstance(item, (int, float, bool, complex, _Plain)) or (
        isinstance(item, _Param) and item.tensor.dim() == 0
    )


def _pair(d: Derivation, a: Any, b: Any) -> tuple[_Value, _Value]:
    a, b = d.value(a), d.value(b)
    if a.size != 1 and b.size != 1:  # else one is spread over the other's units
        tie(a.perm, b.perm)
    return a, b


def _pin_signs(d: Derivation, items: Iterable[Any]) -> None:
    for item in items:
        if isinstance(item, (_Value, _Param)) and not _scalar(item):
            pin(d.value(item).sign)


def _rank(a: _Value, b: _Value) -> int | None:
    return None if a.rank is None or b.rank is None else max(a.rank, b.rank)


@rule(torch.add, torch.sub, operator.add, operator.sub, operator.iadd, operator.isub, "add", "sub", "add_", "sub_")
def _sum(d: Derivation, a: Any, b: Any, **_: Any) -> Any:
    if _scalar(a) and _scalar(b):
        return _Plain()
    if isinstance(a, _Zero) or isinstance(b, _Zero):
        return b if isinstance(a, _Zero) else a
    if _scalar(a) or _scalar(b):
        return _same(d, a if b == 0 else b) if 0 in (a, b) else _unsigned(d, b if _scalar(a) else a)
    a, b = _pair(d, a, b)
    if a.size != 1 and b.size != 1:
        tie(a.sign, b.sign)
    else:
        pin(a.sign, b.sign)
    big = b if a.size == 1 else a
    return _Value(big.perm, big.sign, _rank(a, b))


@rule(
    torch.mul, torch.div, operator.mul, operator.truediv, operator.imul, operator.itruediv, "mul", "div", "mul_", "div_"
)
def _product(d: Derivation, a: Any, b: Any, rounding_mode: str | None = None, **_: Any) -> Any:
    if rounding_mode is not None:  # rounding down is not odd
        _pin_signs(d, (a, b))
    if _scalar(a) and _scalar(b):
        return _Plain()
    if isinstance(a, _Zero) or isinstance(b, _Zero):
        return _Zero()
    if _scalar(a) or _scalar(b):
        return _same(d, b if _scalar(a) else a)
    for item in (a, b):
        if isinstance(item, _Param) and item.key not in d.dims:
            pin(*[sign for _, sign in d.axes_of(item)])  # a gain: the sign stays with what it scales
    a, b = _pair(d, a, b)
    if 1 in (a.size, b.size):
        big, small = (b, a) if a.size == 1 else (a, b)
        pin(small.sign)
        return _Value(big.perm, big.sign, _rank(a, b))
    return _Value(a.perm, product_signs(a.sign, b.sign), _rank(a, b))


@rule(torch.pow, operator.pow, "pow")
def _power(d: Derivation, x: Any, exponent: Any) -> _Value:
    if isinstance(exponent, int) and not isinstance(exponent, bool):
        return _same(d, x) if exponent % 2 else _even(d, x)
    return _unsigned(d, x)


@rule(F.linear)
def _linear_function(d: Derivation, x: Any, weight: Any, bias: Any = None) -> _Value:
    if not isinstance(weight, _Param) or weight.transposed or not (bias is None or isinstance(bias, _Param)):
        raise Conflict("its weight is computed, not a parameter")
    path = weight.key.rpartition(".")[0] or weight.key
    return d.linear(path, d.value(x), weight.key, bias.key if bias else None)


@rule(torch.matmul, operator.matmul, torch.mm, "matmul", "mm")
def _matmul(d: Derivation, x: Any, weight: Any) -> _Value:
    if not isinstance(weight, _Param) or weight.tensor.dim() != 2:
        raise Conflict("only a product with a parameter matrix on the right is followed")
    x = d.value(x)
    (in_perm, in_sign), out = d.axes_of(weight)
    resize(x.perm, weight.tensor.shape[1 if weight.transposed else 0])
    tie(in_perm, x.perm)
    tie(in_sign, x.sign)
    return _Value(*out, rank=x.rank)


@rule("t", torch.t)
def _transposed(d: Derivation, x: Any) -> Any:
    if isinstance(x, _Param) and x.tensor.dim() == 2:
        return _Param(x.key, x.tensor, not x.transposed)
    raise Conflict("only parameters are transposed with t()")


@rule(F.layer_norm)
def _layer_norm_function(
    d: Derivation, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 0
) -> _Value:
    x = d.value(x)
    pin(x.sign)
    for param in (weight, bias):
        if param is not None:
            value = d.value(param)
            tie(x.perm, value.perm)
            pin(value.sign)
    return x


@rule(torch.cat, torch.concat)
def _cat(d: Derivation, items: Any, dim: int = 0, **kwargs: Any) -> Any:
    dim = kwargs.get("axis", dim)
    if any(isinstance(item, _Memory) for item in items):
        return _Memory(None)
    values = [d.value(item) for item in items if not isinstance(item, _Zero)]
    if _on_last(values[0], dim):
        if len(values) < len(items):
            raise Conflict("zeros of a size that the trace does not show are joined to features")
        perm = [node for value in values for node in value.perm]
        return _Value(perm, [node for value in values for node in value.sign], values[0].rank)
    return _tie_all(values, values[0].rank)


@rule(torch.stack)
def _stack(d: Derivation, items: Any, dim: int = 0) -> Any:
    if any(isinstance(item, _Memory) for item in items):
        return _Memory(None)
    values = [d.value(item) for item in items if not isinstance(item, _Zero)]
    rank = None if values[0].rank is None else values[0].rank + 1
    if _on_last(_Value([], [], rank), dim):
        raise Conflict("stacks along a new last dimension")
    return _tie_all(values, rank)


def _tie_all(values: list[_Value], rank: int | None) -> _Value:
    for value in values[1:]:
        tie(values[0].perm, value.perm)
        tie(values[0].sign, value.sign)
    return _Value(values[0].perm, values[0].sign, rank)


def _on_last(value: _Value, dim: Any) -> bool:
    """Whether ``dim`` is the dimension of features."""
    if not isinstance(dim, int):
        raise Conflict(f"dimension {dim!r} is not a plain number")
    if dim < 0 or value.rank is not None:
        return dim in (-1, (value.rank or 0) - 1)
    if dim == 0:
        return False  # [B, ..., features] has a dimension before the features
    raise Conflict(f"whether dimension {dim} is the last does not show; pass example_input, or count from the end")


@rule(torch.chunk, "chunk")
def _chunk(d: Derivation, x: Any, chunks: int, dim: int = 0) -> Any:
    if isinstance(x, _Memory):
        return _Memory(None)
    x = d.value(x)
    if not _on_last(x, dim):
        return tuple(x for _ in range(chunks))
    if x.size is None:
        return tuple(_constant(x) for _ in range(chunks))
    return _pieces(x, -(-x.size // chunks))


@rule(torch.split, "split")
def _split(d: Derivation, x: Any, sizes: Any, dim: int = 0) -> Any:
    x = d.value(x)
    if not _on_last(x, dim):
        raise Conflict("only a split of the last dimension is followed")
    if x.size is None:
        if isinstance(sizes, int):
            raise Conflict("the number of pieces does not show; pass example_input")
        return tuple(_constant(size=size, rank=x.rank) for size in sizes)
    return _pieces(x, sizes)


def _pieces(x: _Value, sizes: Any) -> tuple[_Value, ...]:
    if isinstance(sizes, int):
        sizes = [min(sizes, x.size - start) for start in range(0, x.size, sizes)]
    out, start = [], 0
    for size in sizes:
        out.append(_Value(cut(x.perm, start, start + size), cut(x.sign, start, start + size), x.rank))
        start += size
    return tuple(out)


@rule(operator.getitem)
def _getitem(d: Derivation, x: Any, index: Any) -> Any:
    if isinstance(x, (tuple, list, dict)):
        return x[index]
    if isinstance(x, _Shape):
        return _LastSize() if index == -1 else _Plain()
    if isinstance(x, _Plain):
        return _Plain()
    if isinstance(x, _Memory):
        return x.rows[index] if x.rows is not None and isinstance(index, int) else _Memory(None)
    x = d.value(x)
    entries = list(index) if isinstance(index, tuple) else [index]
    rank = x.rank
    if rank is not None:
        rank += sum(e is None for e in entries) - sum(isinstance(e, int) and not isinstance(e, bool) for e in entries)
    if Ellipsis in entries:
        last = entries[-1] if entries[-1] is not Ellipsis else slice(None)
    elif x.rank is not None:
        last = entries[-1] if sum(e is not None for e in entries) == x.rank else slice(None)
    elif x.fixed:
        return _constant()
    elif len(entries) == 1:
        last = slice(None)
    else:
        raise Conflict(
            "whether this index reaches the last dimension does not show; pass example_input, or use [..., i]"
        )
    if last == slice(None):
        return _Value(x.perm, x.sign, rank)
    if (
        isinstance(last, slice)
        and last.step in (None, 1)
        and all(isinstance(e, (int, type(None))) for e in (last.start, last.stop))
    ):
        if x.size is not None:
            start, stop, _ = last.indices(x.size)
            return _Value(cut(x.perm, start, stop), cut(x.sign, start, stop), rank)
        start, stop = last.start or 0, last.stop
        known = stop is not None and (start >= 0) == (stop >= 0)
        return _constant(size=stop - start if known else None, rank=rank)
    pin(x.perm, x.sign)
    return _constant(rank=rank)


@rule(
    torch.mean,
    torch.sum,
    torch.amax,
    torch.amin,
    torch.var,
    torch.std,
    torch.prod,
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
)
def _reduce(d: Derivation, x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> _Value:
    x = d.value(x)
    dims = list(range(x.rank)) if dim is None and x.rank else [-1] if dim is None else dim
    dims = list(dims) if isinstance(dims, (tuple, list)) else [dims]
    lost = 0 if keepdim else len(dims)
    rank = None if x.rank is None else x.rank - lost
    if dim is None or any(_on_last(x, i) for i in dims):
        pin(x.sign)
        if not keepdim:
            pin(x.perm)  # what becomes the last dimension then is not followed
        return _constant(size=1 if keepdim else None, rank=rank)
    if d.current not in ("mean", "sum"):
        pin(x.sign)  # a maximum or a variance over time is not odd
    return _Value(x.perm, x.sign, rank)


@rule(F.softmax, torch.softmax, "softmax")
def _softmax(d: Derivation, x: Any, dim: Any = None, **_: Any) -> _Value:
    return _unsigned(d, x)


@rule("transpose", torch.transpose, "swapaxes")
def _transpose(d: Derivation, x: Any, a: int, b: int) -> Any:
    if isinstance(x, _Memory):
        return _Memory(None)
    x = d.value(x)
    if _on_last(x, a) or _on_last(x, b):
        raise Conflict("moves the last dimension")
    return x


@rule("unsqueeze", torch.unsqueeze)
def _unsqueeze(d: Derivation, x: Any, dim: int) -> Any:
    if isinstance(x, (_Memory, _Zero)):
        return _Memory(None) if isinstance(x, _Memory) else x
    x = d.value(x)
    rank = None if x.rank is None else x.rank + 1
    if _on_last(_Value([], [], rank), dim):
        raise Conflict("adds a new last dimension")
    return _Value(x.perm, x.sign, rank)


@rule("squeeze", torch.squeeze)
def _squeeze(d: Derivation, x: Any, dim: int) -> Any:
    if isinstance(x, _Memory):
        return _Memory(None)
    x = d.value(x)
    if _on_last(x, dim):
        raise Conflict("removes the last dimension")
    return _Value(x.perm, x.sign, None if x.rank is None else x.rank - 1)


@rule("reshape", "view", torch.reshape)
def _reshape(d: Derivation, x: Any, *shape: Any) -> Any:
    if isinstance(x, (_Memory, _Zero)):
        return _Memory(None) if isinstance(x, _Memory) else x
    x = d.value(x)
    shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    last = shape[-1]
    if isinstance(last, _LastSize) or (isinstance(last, int) and last == x.size):
        return _Value(x.perm, x.sign, len(shape))
    raise Conflict(
        "does not keep the last dimension, or it does not show; end the new shape with that dimension's size"
    )


@rule("new_zeros", torch.zeros, torch.zeros_like)
def _zeros(d: Derivation, *_: Any, **__: Any) -> _Zero:
    return _Zero()


@rule("size", "dim", getattr)
def _attribute(d: Derivation, x: Any, name: Any = None, *_: Any) -> Any:
    if name in (-1,):
        return _LastSize()
    return _Shape() if name in (None, "shape") else _Plain()


@rule(torch._assert, fx._symbolic_trace._assert_is_none, operator.eq)
def _nothing(d: Derivation, *_: Any, **__: Any) -> _Plain:
    return _Plain()


# ---- the derivation -------------------------------------------------------------------------------------------------


def _flat(item: Any) -> list[Any]:
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, (tuple, list)):
        return [leaf for part in item for leaf in _flat(part)]
    if isinstance(item, slice):
        return _flat((item.start, item.stop, item.step))
    return [item]


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Arguments of forward that have a default: the trace takes it."""
    out = {}
    for name, parameter in inspect.signature(type(module).forward).parameters.items():
        if parameter.default is not parameter.empty:
            out[name] = parameter.default
    return out


def derive_symbolically(module: nn.Module, *, strict: bool = True) -> WeightSpec:
    """Derives the symmetry without an example; see :meth:`fleetgym.core.WeightSpec.from_module`."""
    d = Derivation(module, strict)
    kind = type(module).__name__
    sources: list[_Value] = []

    def source() -> _Value:
        sources.append(_Value(fixed_wire(None, "in"), fixed_wire(None, "in"), source=True))
        return sources[-1]

    if _module_rule(module) is not None:
        # A bare layer: torch.fx does not look into it, and its own rule is all there is to say.
        result = _run(d, lambda: _module_rule(module)(d, "", module, source()), kind, "")
        return _finish(d, module, result, sources)

    concrete = _defaults(module)
    try:
        graph = _Tracer().trace(module, concrete_args=concrete)
    except Exception as error:  # torch.fx raises whatever the module's own code raises on a symbolic value
        raise UserError(
            f"cannot trace {kind}: {error}; its forward must not branch or loop on the values or sizes of its inputs "
            "(give such arguments a default, which the trace then takes), or pass example_input to have it run instead"
        ) from error
    env: dict[fx.Node, Any] = {}
    result = None
    for node in graph.nodes:
        args = fx.node.map_arg(node.args, env.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
        if node.op == "placeholder":
            plain = node.args and not isinstance(node.args[0], Tensor)
            out: Any = node.args[0] if plain else source()
        elif node.op == "get_attr":
            out = _attribute_value(module, node.target)
        elif node.op == "output":
            result = args[0]
            break
        else:
            where = _where(node)
            if node.op == "call_module":
                child = module.get_submodule(node.target)
                function, name = _module_rule(child), type(child).__name__
                call = [d, _true_path(module, child, node.target), child, *args]
            else:
                function = RULES.get(node.target)
                name = (
                    node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
                )
                call = [d, *args]
            d.current = name
            values = [leaf for leaf in _flat([args, kwargs]) if isinstance(leaf, (_Value, _Memory, _Param, _Zero))]
            still = all(isinstance(v, _Value) and v.fixed or isinstance(v, _Zero) for v in values)
            if function is None and (still and node.op != "call_module" or not strict):
                # Whatever it is, it works on axes that do not move (and on nothing else, once they are pinned).
                _pin_all(d, values)
                out = _constant() if values else _Plain()
            elif function is None:
                raise UserError(
                    f"no symmetry rule for {name!r} ({where}); pass example_input, with which more are "
                    "followed, register one with fleetgym.core.tracing.rule, or pass strict=False to keep fixed what "
                    "goes through it"
                )
            else:
                try:
                    out = _run(d, lambda: function(*call, **kwargs), name, where)  # noqa: B023  (called at once)
                except UserError:
                    # Preprocessing may do as it likes with observations: fixed axes stay fixed.
                    if not still and strict or node.op == "call_module":
                        raise
                    _pin_all(d, values)
                    out = _constant()
        env[node] = out
    return _finish(d, module, result, sources)


def _run(d: Derivation, call: Callable[[], Any], name: str, where: str) -> Any:
    try:
        return call()
    except (Conflict, TypeError, KeyError) as error:
        raise UserError(f"cannot follow {name!r} ({where}): {error}") from error


def _where(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = node.target if node.op == "call_module" else next(reversed(stack.values()), ("", None))[0] if stack else ""
    return f"in {path}" if path else "in the module's own forward"


def _true_path(root: nn.Module, child: nn.Module, path: str) -> str:
    """The path under which a shared module's tensors were seen first, so that both uses meet in one tensor."""
    return next((name for name, module in root.named_modules() if module is child), path)


def _attribute_value(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    return _Param(path, value) if isinstance(value, Tensor) else value


def _pin_all(d: Derivation, values: list[Any]) -> None:
    for value in values:
        if isinstance(value, _Param):
            for perm, sign in d.axes_of(value):
                pin(perm, sign)
        rows = value.rows or [] if isinstance(value, _Memory) else [value] if isinstance(value, _Value) else []
        for row in rows:
            pin(row.perm, row.sign)


def _finish(d: Derivation, module: nn.Module, result: Any, sources: list[_Value]) -> WeightSpec:
    top = list(result.values()) if isinstance(result, dict) else result
    outputs = top if isinstance(top, (tuple, list)) else [top]
    memory = []
    for position, output in enumerate(outputs):
        items = _flat(output)
        if any(isinstance(leaf, _Memory) for leaf in items) and all(
            isinstance(leaf, (_Memory, type(None))) for leaf in items
        ):
            memory.append(position)
        for leaf in items:
            if isinstance(leaf, _Value):
                pin(leaf.perm, leaf.sign)
                for node in leaves(leaf.perm):
                    node.name = "out" if node.name != "in" else "in"

    state = module.state_dict()
    wires = {key: d.dims.get(key) or [None] * state[key].dim() for key in state}
    # Two names of one tensor (tied weights) have one set of axes.
    by_storage: dict[int, str] = {}
    for key, tensor in d.tensors.items():
        if d.dims.get(key):
            first = by_storage.setdefault(id(tensor), key)
            for one, other in zip(d.dims[first], d.dims[key]):
                for a, b in zip(one, other):
                    tie(a, b)
    for key, tensor in d.tensors.items():
        if not d.dims.get(key) and id(tensor) in by_storage:
            wires[key] = d.dims[by_storage[id(tensor)]]
    return build(module, wires, [total(value.perm) for value in sources], memory)
