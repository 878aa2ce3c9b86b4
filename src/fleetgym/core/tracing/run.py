"""Tracing by running: the module works on an example, and every torch function that it calls is followed.

All of Python runs as it is (loops, shapes, ``isinstance``), so whatever the module is made of, only the functions that
touch its tensors need a rule. A rule is entered by the function's name with :func:`operation`::

    @operation("roll")
    def _roll(run, out, x, shifts, dims): ...

It gets the run, what the function returned, and the function's own arguments, and returns a
:class:`~fleetgym.core.tracing.values.Value` (or a tuple of them) for what the function returned. Functions of
``torch.nn.functional`` without a rule are followed through their bodies.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fleetgym.core.errors import UserError
from fleetgym.core.tracing.build import build
from fleetgym.core.tracing.values import Value, constant, flat, free, uniform
from fleetgym.core.tracing.wires import Conflict, leaves
from fleetgym.core.weights import WeightSpec, evaluating

OPERATIONS: dict[str, Callable[..., Any]] = {}
HAND_WRITTEN = (
    "write the spec by hand, WeightSpec(axes, groups, ...), and check it with spec.verify(module, example_input)"
)
# What Python reads of values, and then may branch on.
_READS = {"__bool__", "__float__", "__int__", "__index__", "__complex__", "item", "tolist", "numpy", "__array__",
          "__contains__", "equal", "allclose", "is_nonzero"}  # fmt: skip
_PROPERTIES = {"T": "t", "mT": "mT", "data": "detach", "real": "detach"}


def operation(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enters a rule for torch functions and tensor methods of these names; ``__iadd__``, ``__radd__`` are ``add``."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            OPERATIONS[name] = function
        return function

    return enter


def _tensors(item: Any) -> list[Tensor]:
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, Mapping):
        item = list(item.values())
    if isinstance(item, (tuple, list)):
        return [tensor for part in item for tensor in _tensors(part)]
    if isinstance(item, slice):
        return _tensors((item.start, item.stop, item.step))
    return []


def _name(function: Any) -> str:
    name = getattr(function, "__name__", str(function))
    if name == "__get__":
        name = getattr(function.__self__, "__name__", "")
        return _PROPERTIES.get(name, "")
    return name


def _open(function: types.FunctionType) -> types.FunctionType:
    """A Python function of torch that does not ask for overrides, so that its body is run."""
    never = {
        name: (lambda *_: False)
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    }
    made = types.FunctionType(
        function.__code__, {**function.__globals__, **never}, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class Run(TorchFunctionMode):
    """One run of a module; rules receive it to look up the values of tensors.

    Attributes:
        name: The operation at work.
        path: The path of the submodule at work.
        fresh: Ids of the parameters that the operation is the first to use.
    """

    def __init__(self, module: nn.Module, strict: bool) -> None:
        super().__init__()
        self.module, self.strict = module, strict
        self.name = self.path = ""
        self.values: dict[int, tuple[Tensor, Value]] = {}
        self.params: dict[int, tuple[Tensor, str]] = {}
        self.used: dict[str, Value] = {}
        self.fresh: set[int] = set()
        self.order: dict[str, float] = {}
        for key, tensor in module.state_dict(keep_vars=True).items():
            self.params.setdefault(id(tensor), (tensor, key))
            self.order[key] = len(self.order) * 1e-6
        self._paths = {m: name for name, m in reversed(list(module.named_modules()))}
        self._stack: list[str] = []

    # ---- values -----------------------------------------------------------------------------------------------------

    def known(self, tensor: Any) -> bool:
        """Whether a tensor has to do with inputs or parameters."""
        return isinstance(tensor, Tensor) and (id(tensor) in self.values or id(tensor) in self.params)

    def value(self, tensor: Any) -> Value:
        """The value of a tensor, a parameter or a number."""
        if not isinstance(tensor, Tensor):
            return constant(())
        if id(tensor) in self.values:
            return self.values[id(tensor)][1]
        if id(tensor) in self.params:
            key = self.params[id(tensor)][1]
            made = Value([self._axis(key, i, tensor) for i in range(tensor.dim())])
            self.used[key] = made
            self.values[id(tensor)] = (tensor, made)
            return made
        # A constant of the module's own making: if its entries are equal, their order is no matter.
        if tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
            zero = not bool(tensor.flatten()[0])
            return Value([flat(n) if zero else uniform(n) for n in tensor.shape], zero=zero)
        return constant(tensor.shape)

    def _axis(self, key: str, i: int, tensor: Tensor) -> Any:
        # Groups are named after the first layer whose rows they are.
        path, _, last = key.rpartition(".")
        later = self.order[key]
        plain = last == "weight" and path
        if tensor.dim() == 1:
            return free(len(tensor), key, rank=8 + later)
        if i == 0:
            return free(tensor.shape[0], path if plain else key, rank=4 + later)
        return free(tensor.shape[i], f"{path if plain else key}:{i}", rank=7 + later)

    def set(self, tensor: Any, value: Any) -> None:
        """Says what a tensor, or each of a tuple, carries."""
        if isinstance(tensor, Tensor):
            self.values[id(tensor)] = (tensor, value if isinstance(value, Value) else constant(tensor.shape))
        elif isinstance(tensor, (tuple, list)):
            parts = list(value) if isinstance(value, (tuple, list)) else [value] * len(tensor)
            for one, part in zip(tensor, parts):
                self.set(one, part)

    # ---- following --------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        rule = OPERATIONS.get(name) or OPERATIONS.get(_bare(name))
        inputs = [tensor for tensor in _tensors((args, kwargs)) if self.known(tensor)]
        if rule is None and isinstance(func, types.FunctionType) and inputs:
            with self:
                return _open(func)(*args, **kwargs)
        if rule is None and hasattr(func, "__wrapped__") and inputs:
            with self:
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self.name = name.strip("_")
        if name in _READS and inputs and not isinstance(out, Tensor):
            raise UserError(
                f"cannot follow {type(self.module).__name__}: its forward reads values of tensors ({self.name!r} "
                f"{self.where()}) and may branch on them; {HAND_WRITTEN}"
            )
        if name == "__setitem__" and any(self.known(tensor) for tensor in _tensors(args)):
            out = args[0]  # what was written into
        made = _tensors(out)
        if not made or (not inputs and rule is None) or (rule is not None and not inputs and name not in _SOURCES):
            return out
        self.fresh = {id(t) for t in inputs if id(t) in self.params and self.params[id(t)][1] not in self.used}
        values = [self.value(tensor) for tensor in inputs]
        if rule is not None:
            try:
                kwargs = {("dim" if k == "axis" else k): v for k, v in kwargs.items() if k != "out"}
                result = rule(self, out, *args, **kwargs)
            except (Conflict, UserError, TypeError, KeyError, IndexError) as error:
                if not all(v.fixed for v in values) and self.strict:
                    raise UserError(f"cannot follow {self.name!r} ({self.where()}): {error}; {HAND_WRITTEN}") from error
                self._pin(values)
                result = None
        elif all(v.fixed for v in values) or not self.strict:
            # Whatever it is, it works on axes that do not move (and on nothing else, once they are pinned).
            self._pin(values)
            result = None
        else:
            raise UserError(
                f"no symmetry rule for {self.name!r} ({self.where()}); register one with "
                "fleetgym.core.tracing.operation, pass strict=False to keep fixed what goes through it, or "
                f"{HAND_WRITTEN}"
            )
        if isinstance(out, Tensor) and isinstance(result, Value):
            sizes = tuple(dim.size for dim in result.dims)
            if sizes != tuple(out.shape):
                raise UserError(f"internal: the rule of {self.name!r} gives {sizes}, the tensor is {tuple(out.shape)}")
        self.set(out, result)
        return None if name == "__setitem__" else out

    def _pin(self, values: list[Value]) -> None:
        for value in values:
            value.pin()

    def where(self) -> str:
        """The submodule at work, in words."""
        return f"in {self.path}" if self.path else "in the module's own forward"

    def label(self, name: str) -> str:
        """A name for a group of the submodule at work."""
        return f"{self.path}.{name}" if self.path else name

    def enter(self, module: nn.Module, *_: Any) -> None:
        """A submodule starts."""
        self._stack.append(self.path)
        self.path = self._paths.get(module, self.path)

    def leave(self, *_: Any) -> None:
        """A submodule ends."""
        self.path = self._stack.pop()


_SOURCES = ("zeros", "zeros_like", "new_zeros")


def _bare(name: str) -> str:
    """``__iadd__``, ``__radd__`` and ``add_`` as ``add``."""
    if name.startswith("__") and name.endswith("__"):
        inner = name[2:-2]
        if inner in OPERATIONS:
            return inner
        return inner[1:] if inner[:1] in ("i", "r") and inner[1:] in OPERATIONS else name
    return name[:-1] if name.endswith("_") else name


def derive_by_running(module: nn.Module, example_input: Any, *, strict: bool = True) -> WeightSpec:
    """Derives the symmetry from a run on an example; see :meth:`fleetgym.core.WeightSpec.from_module`."""
    kind = type(module).__name__
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    run = Run(module, strict)
    sources = []
    for tensor in _tensors(args):
        # A fresh view: the same tensor may be given twice.
        value = Value([flat(n, "in") for n in tensor.shape], source=True, zero=False)
        run.values[id(tensor)] = (tensor, value)
        sources.append(tensor.shape[-1] if tensor.dim() else None)
    checks = torch.distributions.Distribution._validate_args
    handles = [
        nn.modules.module.register_module_forward_pre_hook(run.enter),
        nn.modules.module.register_module_forward_hook(run.leave),
    ]
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        with evaluating(module), torch.no_grad(), torch.random.fork_rng(devices=[]), run:
            result = module(*args)
    except UserError:
        raise
    except Exception as error:  # whatever the module's own code raises
        raise UserError(f"cannot run {kind} on the example ({run.where()}): {type(error).__name__}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
        torch.distributions.Distribution.set_default_validate_args(checks)
    return _finish(run, module, result, sources)


def _finish(run: Run, module: nn.Module, result: Any, sources: list[int | None]) -> WeightSpec:
    top = list(result.values()) if isinstance(result, Mapping) else result
    outputs = top if isinstance(top, (tuple, list)) else [top]
    memory = []
    for position, output in enumerate(outputs):
        values = [run.value(tensor) for tensor in _tensors(output)]
        if values and all(value.memory for value in values):
            memory.append(position)
            continue
        for value in values:
            named = [leaf for dim in value.dims for leaf in leaves(dim.perm)]
            value.pin()
            for leaf in named:
                for node in leaf.leaves():
                    node.name = "out" if node.name != "in" else "in"
    # A parameter that nothing else was ever tied to was not really used (times zeros, say).
    for value in run.used.values():
        for dim in value.dims:
            for leaf in leaves(dim.perm):
                if not leaf.seen and leaf.home is None:
                    leaf.fix()
    wires = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        first = run.params[id(tensor)][1]
        used = run.used.get(first)
        wires[key] = [(dim.perm, dim.sign) for dim in used.dims] if used else [None] * tensor.dim()
    return build(module, wires, sources, memory)
