"""A dense program's graph as a list of calls of torch's operators. Nothing in it is compiled, evaluated or unpickled."""

# Shapes: B rows, T tasks, E width of all embeddings, D dense columns; of a linear layer X inputs, N outputs.

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from models.torch_compat import onednn_linear
from pipeline.serving import operators
from pipeline.serving.archive import DTYPES, Argument, GraphModule, NamedArgument, Node

ATEN = "torch.ops.aten."
POSITIONAL, KEYWORD = 1, 2  # torch._export.serde.schema.ArgumentKind
STRIDED, CONTIGUOUS, PRESERVED = 7, 1, 4  # and its Layout, MemoryFormat
LINEAR = f"{ATEN}linear.default"
TEXT = re.compile("[a-z_,>-]{0,64}")  # modes, and equations of einsum
ONEDNN = torch.backends.mkldnn.is_available()
MAX_MADE = 1 << 28  # numbers of all tensors that depend on weights alone
MAX_OF_ROW = 1 << 22  # numbers of a tensor for each row, and so many times the numbers that the row has:
MAX_TIMES = 64
FEW_ROWS = 8  # up to which oneDNN prepares its product for longer than it takes

Values = list[Any]  # of all tensors and sizes of a graph, by their places


class Call(NamedTuple):
    """An operator, how it finds its positional arguments among the values, and the places of those and of its results.

    result: one place, or those of the tensors of a list.
    """

    function: Callable[..., Any]
    arguments: Sequence[Callable[[Values], Any]]
    reads: frozenset[int]
    result: int | list[int]


class GraphError(ValueError):
    """What no dense program has."""


class Calls:
    """A graph, with what depends on weights alone computed once.

    Args:
        module: the graph. tensors: its weights, by the names that its signature has.
    Call Args:
        embedding_BE, dense_BD.
    Returns: logit_BT.
    Raises:
        GraphError: an operator or an argument that no dense program has. Whatever operators raise for arguments that they
            do not take.
    """

    def __init__(self, module: GraphModule, tensors: Mapping[str, Tensor]) -> None:
        self.places: dict[str, int] = {}
        values: Values = []
        self.inputs = self._place_inputs(module, tensors, values)
        varying, calls, left = {*self.inputs}, list[Call](), MAX_MADE
        for node in module.graph.nodes:
            if (call := self._call(node, values)) is None:
                continue
            if not call.reads & varying:
                left -= _make_within(left, call, values)
                continue
            weights = [self._argument(argument.arg) for argument in node.inputs[1:]]
            if ONEDNN and node.target == LINEAR and not any(reads & varying for _, reads in weights):
                call = _by_onednn(call, [get(values) for get, _ in weights])
            calls.append(call)
            varying |= {*_places(call.result)}
        (output,) = module.graph.outputs
        self.output = self.places[_only(output, "as_tensor")["name"]]
        # Memory that is given back at once is still in the cache for the next call.
        last = {place: number for number, call in enumerate(calls) for place in call.reads & varying}
        last.pop(self.output, None)
        done = [[place for place, at in last.items() if at == number] for number in range(len(calls))]
        self.calls = list(zip(calls, done, strict=True))
        read = frozenset({self.output}).union(*(call.reads for call in calls))
        self.values = [value if place in read else None for place, value in enumerate(values)]

    def __call__(self, embedding_BE: Tensor, dense_BD: Tensor) -> Tensor:  # noqa: D102
        return self._run(embedding_BE, dense_BD, _make)

    def trial(self, embedding_BE: Tensor, dense_BD: Tensor) -> Tensor:
        """A call in which each tensor is measured. Raises GraphError for one that has too many numbers."""
        most = len(dense_BD) * MAX_OF_ROW + MAX_TIMES * (embedding_BE.numel() + dense_BD.numel())
        return self._run(embedding_BE, dense_BD, partial(_make_within, most))

    def _run(self, embedding_BE: Tensor, dense_BD: Tensor, make: Callable[[Call, Values], object]) -> Tensor:
        values: Values = self.values.copy()
        values[self.inputs[0]], values[self.inputs[1]] = embedding_BE, dense_BD
        for call, done in self.calls:
            make(call, values)
            for place in done:
                values[place] = None
        logit_BT: Tensor = values[self.output]
        return logit_BT

    def _place_inputs(self, module: GraphModule, tensors: Mapping[str, Tensor], values: Values) -> list[int]:
        """Places weights, and the two inputs, whose places are returned."""
        inputs = []
        for spec in module.signature.input_specs:
            if stored := spec.parameter or spec.buffer or spec.tensor_constant:
                self._place(stored.arg.name, values, tensors[stored.source])
            elif spec.user_input:
                name = _only(spec.user_input.arg, "as_tensor")["name"]
                inputs.append(self._place(name, values))
        if len(inputs) != 2:
            raise GraphError(f"{len(inputs)} inputs")
        return inputs

    def _place(self, name: str, values: Values, value: Any = None) -> int:
        if name in self.places:
            raise GraphError(f"two values named {name[:100]}")
        values.append(value)
        self.places[name] = len(values) - 1
        return len(values) - 1

    def _call(self, node: Node, values: Values) -> Call | None:
        """The call of a node; None where it gives on its first argument, or nothing."""
        name = node.target.removeprefix(ATEN)
        if name in operators.LEFT_OUT:
            return None
        if name in operators.PASSED_ON:
            (result,) = node.outputs
            self.places[_only(result, "as_tensor")["name"]] = self.places[
                _only(node.inputs[0].arg, "as_tensor")["name"]
            ]
            return None
        function = allowed_operator(node.target)
        pairs = [self._argument(argument.arg) for argument in _positional(node.inputs)]
        if keywords := {argument.name: argument.arg for argument in node.inputs if argument.kind == KEYWORD}:
            fixed = {key: self._argument(argument) for key, argument in keywords.items()}
            if any(reads for _, reads in fixed.values()):
                raise GraphError(f"a tensor among the keywords of {name}")
            function = partial(function, **{key: get([]) for key, (get, _) in fixed.items()})
        reads = frozenset[int]().union(*(reads for _, reads in pairs))
        return Call(function, [get for get, _ in pairs], reads, self._results(node, values))

    def _results(self, node: Node, values: Values) -> int | list[int]:
        (result,) = node.outputs
        kind, value = _entry(result)
        if kind == "as_tensors":
            return [self._place(tensor["name"], values) for tensor in value]
        if kind not in ("as_tensor", "as_sym_int"):
            raise GraphError(f"a result of kind {kind[:100]}")
        return self._place(value["name" if kind == "as_tensor" else "as_name"], values)

    def _argument(self, argument: Argument) -> tuple[Callable[[Values], Any], frozenset[int]]:
        """How an argument is found among the values, and the places that it reads."""
        kind, value = _entry(argument)
        if kind in ("as_tensor", "as_sym_int", "as_optional_tensor"):
            return self._value(value if kind != "as_tensor" else {"as_tensor": value})
        if kind in ("as_tensors", "as_sym_ints", "as_optional_tensors"):
            items = [self._value(item if kind != "as_tensors" else {"as_tensor": item}) for item in value]
            gets = [get for get, _ in items]
            return (lambda values: [get(values) for get in gets]), frozenset[int]().union(
                *(reads for _, reads in items)
            )
        constant = _constant(kind, value)
        return (lambda _: constant), frozenset()

    def _value(self, item: Mapping[str, Any]) -> tuple[Callable[[Values], Any], frozenset[int]]:
        """Of a tensor or a size, or None in their place."""
        kind, value = _entry(item)
        if kind == "as_tensor" or kind == "as_name":
            place = self.places[value["name"] if kind == "as_tensor" else value]
            return itemgetter(place), frozenset({place})
        constant = _constant(kind, value)
        return (lambda _: constant), frozenset()


def allowed_operator(target: str) -> Callable[..., Any]:
    """The operator of a name. Raises GraphError for one that is not listed."""
    name = target.removeprefix(ATEN)
    if not target.startswith(ATEN) or name not in operators.ALLOWED:
        raise GraphError(f"operator {target[:100]}")
    packet, overload = name.split(".")
    function: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    return function


def _make(call: Call, values: Values) -> None:
    found = call.function(*[get(values) for get in call.arguments])
    if isinstance(call.result, int):
        values[call.result] = found
    else:
        for place, value in zip(call.result, found, strict=True):
            values[place] = value


def _make_within(most: int, call: Call, values: Values) -> int:
    """Applies a call. Returns how many numbers it made. Raises GraphError for more than `most`, before as far as it says so."""
    named = _named(call, [get(values) for get in call.arguments])
    if named <= most:
        _make(call, values)
        found = [values[place] for place in _places(call.result)]
        named = sum(value.numel() for value in found if isinstance(value, Tensor))
    if named > most:
        raise GraphError(f"a tensor of {named:,} numbers")
    return named


def _named(call: Call, arguments: Sequence[Any]) -> int:
    """The numbers of a tensor whose size is among the arguments; 0 of operators that take none."""
    name = (call.function.func if isinstance(call.function, partial) else call.function).__name__
    if name == "pad.default":
        ends = [sum(arguments[1][place : place + 2]) for place in range(0, len(arguments[1]), 2)]
        return math.prod(size + end for size, end in zip_longest(reversed(arguments[0].shape), ends, fillvalue=0))
    if (place := operators.SIZES.get(name)) is None:
        return 0
    if place >= len(arguments):
        raise GraphError(f"a size of {name} by keyword")
    last = place + 1 if name in operators.REPEATING else len(arguments)
    sizes = arguments[place] if isinstance(arguments[place], list) else arguments[place:last]
    times = arguments[0].numel() if name in operators.REPEATING else 1
    return times * math.prod(max(abs(int(size)), 1) for size in sizes) ** (2 if name == "eye.default" else 1)


def _places(result: int | list[int]) -> list[int]:
    return [result] if isinstance(result, int) else result


def _by_onednn(call: Call, fixed: Sequence[Tensor | None]) -> Call:
    """A linear layer by oneDNN, whose kernels take half the time of those behind aten.linear. fixed: weight and bias."""
    weight_NX, bias_N = (fixed[0], fixed[1] if len(fixed) > 1 else None) if fixed else (None, None)
    if weight_NX is None or weight_NX.dtype != torch.float32 or weight_NX.ndim != 2:
        return call
    if bias_N is not None and (bias_N.dtype != torch.float32 or bias_N.shape != weight_NX.shape[:1]):
        return call
    layer = partial(_linear, weight_NX.contiguous(), None if bias_N is None else bias_N.contiguous())
    return Call(layer, call.arguments[:1], call.reads, call.result)


def _linear(weight_NX: Tensor, bias_N: Tensor | None, x: Tensor) -> Tensor:
    # oneDNN's operator checks no sizes: it would read beyond the end.
    if x.shape[-1] != weight_NX.shape[1] or x.dtype != torch.float32 or x.shape[0] < FEW_ROWS:
        return functional.linear(x, weight_NX, bias_N)
    return onednn_linear(x, weight_NX, bias_N)


def _entry(argument: Mapping[str, Any]) -> tuple[str, Any]:
    """The kind and the value of one of torch's unions."""
    if len(argument) != 1:
        raise GraphError("an argument of several kinds")
    return next(iter(argument.items()))


def _only(argument: Mapping[str, Any], kind: str) -> Any:
    found, value = _entry(argument)
    if found != kind:
        raise GraphError(f"{found[:100]} in the place of {kind}")
    return value


def _positional(inputs: Sequence[NamedArgument]) -> list[NamedArgument]:
    if any(argument.kind not in (POSITIONAL, KEYWORD) for argument in inputs):
        raise GraphError("an argument without a place")
    return [argument for argument in inputs if argument.kind == POSITIONAL]


def _constant(kind: str, value: Any) -> Any:
    """The value of an argument that is no tensor. Of its type operators make sure."""
    if kind == "as_none":
        return None
    if kind in ("as_int", "as_ints", "as_bool", "as_bools", "as_floats"):
        return value
    if kind == "as_float":
        return float(value)  # infinities are texts
    if kind == "as_string" and TEXT.fullmatch(value):
        return value
    constants = {
        "as_scalar_type": lambda: DTYPES[value],
        "as_layout": lambda: {STRIDED: torch.strided}[value],
        "as_memory_format": lambda: {CONTIGUOUS: torch.contiguous_format, PRESERVED: torch.preserve_format}[value],
        "as_device": lambda: {"cpu": torch.device("cpu")}[value["type"]],
    }
    if kind not in constants:
        raise GraphError(f"an argument of kind {kind[:100]}")
    return constants[kind]()
