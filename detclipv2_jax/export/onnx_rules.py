"""What JAX's operations are in ONNX: those that the detector consists of, as functions of (graph, equation, inputs)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from detclipv2_jax.export.onnx_graph import Graph, Shape, Value, constant

NODES = {  # operation → node that computes the same
    "abs": "Abs", "add": "Add", "and": "And", "div": "Div", "eq": "Equal", "erf": "Erf", "exp": "Exp",
    "floor": "Floor", "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "logistic": "Sigmoid",
    "lt": "Less", "max": "Max", "min": "Min", "mul": "Mul", "neg": "Neg", "not": "Not", "or": "Or", "sign": "Sign",
    "sqrt": "Sqrt", "sub": "Sub",
}  # fmt: skip
RULES: dict[str, Callable] = {}


def _rule(*names: str, repeats: bool = False) -> Callable:
    """Enters a function into `RULES`; with `repeats` its inputs come without their repetitions."""

    def enter(function: Any) -> Any:
        function.repeats = repeats
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def _common(inputs: Sequence[Value]) -> Shape:
    """Returns the shape of what arithmetic makes of arrays that repeat each other."""
    rank = max(len(value.shape) for value in inputs)
    shapes = [(1,) * (rank - len(value.shape)) + value.shape for value in inputs]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*shapes, strict=True))


# --- arithmetic


@_rule(*NODES, repeats=True)
def _same(graph: Graph, equation: Any, *inputs: Value) -> Value:
    name, dtype = equation.primitive.name, equation.outvars[0].aval.dtype
    if name in ("and", "or", "not", "max", "min") and (inputs[0].dtype == bool) != (name in ("and", "or", "not")):
        raise ValueError(f"--format=onnx has no {name} of {inputs[0].dtype}; export with stablehlo")
    return graph.node(NODES[name], *inputs, shape=_common(inputs), dtype=dtype)


@_rule("ne", repeats=True)
def _ne(graph: Graph, equation: Any, *inputs: Value) -> Value:
    equal = graph.node("Equal", *inputs, shape=_common(inputs), dtype=bool)
    return graph.node("Not", equal, shape=equal.shape, dtype=bool)


@_rule("rem", repeats=True)
def _rem(graph: Graph, equation: Any, *inputs: Value) -> Value:
    return graph.node("Mod", *inputs, shape=_common(inputs), dtype=inputs[0].dtype, fmod=1)


@_rule("square", "integer_pow", repeats=True)
def _power(graph: Graph, equation: Any, x: Value) -> Value:
    if equation.params.get("y", 2) != 2:
        raise ValueError(f"--format=onnx has no power {equation.params['y']}; export with stablehlo")
    return graph.node("Mul", x, x, shape=x.shape, dtype=x.dtype)


@_rule("rsqrt", repeats=True)
def _rsqrt(graph: Graph, equation: Any, x: Value) -> Value:
    root = graph.node("Sqrt", x, shape=x.shape, dtype=x.dtype)
    return graph.node("Reciprocal", root, shape=x.shape, dtype=x.dtype)


@_rule("stop_gradient", "name", repeats=True)
def _identity(graph: Graph, equation: Any, *inputs: Value) -> list[Value]:
    return list(inputs)


@_rule("convert_element_type", repeats=True)
def _convert(graph: Graph, equation: Any, x: Value) -> Value:
    return graph.cast(x, equation.params["new_dtype"])


@_rule("select_n", repeats=True)
def _select(graph: Graph, equation: Any, which: Value, no: Value, yes: Value) -> Value:
    return _choose(graph, graph.cast(which, bool), yes, no)


def _choose(graph: Graph, which: Value, yes: Value, no: Value) -> Value:
    if yes.dtype != bool:
        return graph.node("Where", which, yes, no, shape=_common((which, yes, no)), dtype=yes.dtype)
    # runtimes choose no truth values
    first = graph.node("And", which, yes, shape=_common((which, yes)), dtype=bool)
    other = graph.node("Not", which, shape=which.shape, dtype=bool)
    second = graph.node("And", other, no, shape=_common((other, no)), dtype=bool)
    return graph.node("Or", first, second, shape=_common((first, second)), dtype=bool)


# --- shapes


@_rule("broadcast_in_dim", repeats=True)
def _broadcast(graph: Graph, equation: Any, x: Value) -> Value:
    shape: list[Any] = [1] * len(equation.params["shape"])
    for axis, size in zip(equation.params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return graph.reshape(x, tuple(shape))


@_rule("reshape", "squeeze")
def _reshape(graph: Graph, equation: Any, x: Value) -> Value:
    return graph.reshape(x, equation.outvars[0].aval.shape)


@_rule("transpose")
def _transpose(graph: Graph, equation: Any, x: Value) -> Value:
    return graph.transpose(x, equation.params["permutation"])


@_rule("concatenate", "stack")
def _concatenate(graph: Graph, equation: Any, *inputs: Value) -> Value:
    shape = equation.outvars[0].aval.shape
    axis = int(equation.params.get("axis", equation.params.get("dimension")))
    if equation.primitive.name == "stack":
        inputs = tuple(graph.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:])) for x in inputs)
    return graph.node("Concat", *inputs, shape=shape, dtype=inputs[0].dtype, axis=axis)


@_rule("split")
def _split(graph: Graph, equation: Any, x: Value) -> list[Value]:
    sizes = constant(np.array(equation.params["sizes"], np.int64))
    types = [(variable.aval.shape, x.dtype) for variable in equation.outvars]
    return graph.nodes_of("Split", [x, sizes], types, axis=int(equation.params["axis"]))


@_rule("iota")
def _iota(graph: Graph, equation: Any) -> Value:
    axis, dtype, sizes = equation.params["dimension"], equation.params["dtype"], equation.params["shape"]
    shape = tuple(size if i == axis else 1 for i, size in enumerate(sizes))
    if not jax.export.is_symbolic_dim(sizes[axis]):
        return constant(np.arange(sizes[axis]).astype(dtype).reshape(shape))
    end = graph.reshape(graph.size(sizes[axis]), ())
    numbers = [constant(np.int64(number)) for number in (0, 1)]
    count = graph.node("Range", numbers[0], end, numbers[1], shape=(sizes[axis],), dtype=np.int64)
    return graph.reshape(graph.cast(count, dtype), shape)


@_rule("dim_as_value")
def _size(graph: Graph, equation: Any) -> Value:
    return graph.cast(graph.reshape(graph.size(equation.params["dim"]), ()), equation.outvars[0].aval.dtype)


def _cut(graph: Graph, x: Value, axes: Sequence[int], starts: Any, ends: Any, steps: Any, shape: Shape) -> Value:
    bounds = [constant(np.array(values, np.int64)) for values in (starts, ends, axes, steps)]
    return graph.node("Slice", x, *bounds, shape=shape, dtype=x.dtype)


@_rule("slice")
def _slice(graph: Graph, equation: Any, x: Value) -> Value:
    values, shape = equation.params, equation.outvars[0].aval.shape
    steps = values["strides"] or (1,) * len(shape)
    axes = [i for i, size in enumerate(x.shape) if size != shape[i]]
    bounds = (values["start_indices"], values["limit_indices"], steps)
    starts, ends, steps = ([numbers[i] for i in axes] for numbers in bounds)
    return _cut(graph, x, axes, starts, ends, steps, shape) if axes else x


@_rule("rev")
def _reverse(graph: Graph, equation: Any, x: Value) -> Value:
    axes = equation.params["dimensions"]
    ones = [1] * len(axes)
    return _cut(graph, x, axes, np.negative(ones), [np.iinfo(np.int64).min] * len(axes), np.negative(ones), x.shape)


@_rule("pad")
def _pad(graph: Graph, equation: Any, x: Value, value: Value) -> Value:
    before, after, between = zip(*equation.params["padding_config"], strict=True)
    if any(between):
        raise ValueError("--format=onnx has no padding between elements; export with stablehlo")
    sizes = graph.sizes((*before, *after))
    return graph.node("Pad", x, sizes, value, shape=equation.outvars[0].aval.shape, dtype=x.dtype)


# --- sums, products, orders


@_rule("reduce_sum", "reduce_max", "reduce_and", "reduce_or")
def _reduce(graph: Graph, equation: Any, x: Value) -> Value:
    names = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_or": "ReduceMax"}
    operator = names.get(equation.primitive.name, "ReduceMin")
    axes = constant(np.array(equation.params["axes"], np.int64))
    number = graph.cast(x, np.int32) if x.dtype == bool else x
    shape = equation.outvars[0].aval.shape
    return graph.cast(graph.node(operator, number, axes, shape=shape, dtype=number.dtype, keepdims=0), x.dtype)


@_rule("cumsum")
def _cumsum(graph: Graph, equation: Any, x: Value) -> Value:
    axis, reverse = constant(np.int64(equation.params["axis"])), int(equation.params["reverse"])
    return graph.node("CumSum", x, axis, shape=x.shape, dtype=x.dtype, reverse=reverse)


@_rule("argmax")
def _argmax(graph: Graph, equation: Any, x: Value) -> Value:
    (axis,), shape = equation.params["axes"], equation.outvars[0].aval.shape
    place = graph.node("ArgMax", x, shape=shape, dtype=np.int64, axis=int(axis), keepdims=0)
    return graph.cast(place, equation.params["index_dtype"])


def _order(graph: Graph, x: Value, axis: int, num: Any, *, largest: bool) -> list[Value]:
    """Returns the first values and their places, int64; of equals the first comes first."""
    shape = (*x.shape[:axis], num, *x.shape[axis + 1 :])
    types = [(shape, x.dtype), (shape, np.int64)]
    return graph.nodes_of("TopK", [x, graph.size(num)], types, axis=axis, largest=int(largest), sorted=1)


@_rule("top_k")
def _top_k(graph: Graph, equation: Any, x: Value) -> list[Value]:
    values, places = _order(graph, x, int(equation.params["axis"]), equation.params["k"], largest=True)
    return [values, graph.cast(places, equation.outvars[1].aval.dtype)]


@_rule("sort")
def _sort(graph: Graph, equation: Any, *inputs: Value) -> list[Value]:
    """Orders by the last key, then that by the one before it, and so on: every step keeps the order of equals."""
    axis, shape = int(equation.params["dimension"]), inputs[0].shape

    def in_order(x: Value, order: Value | None) -> Value:
        return x if order is None else graph.node("GatherElements", x, order, shape=shape, dtype=x.dtype, axis=axis)

    order = None
    for key in reversed(inputs[: equation.params["num_keys"]]):
        _, places = _order(graph, in_order(key, order), axis, shape[axis], largest=False)
        order = places if order is None else in_order(order, places)
    return [in_order(x, order) for x in inputs]


@_rule("dot_general")
def _dot(graph: Graph, equation: Any, left: Value, right: Value) -> Value:
    (contract, batch), shape = equation.params["dimension_numbers"], equation.outvars[0].aval.shape
    if len(right.shape) == 2 and list(contract[0]) == [len(left.shape) - 1] and not batch[0]:
        right = graph.transpose(right, (contract[1][0], 1 - contract[1][0]))
        return graph.node("MatMul", left, right, shape=shape, dtype=left.dtype)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    names = [[next(letters) for _ in value.shape] for value in (left, right)]
    for pairs in (contract, batch):
        for first, second in zip(*pairs, strict=True):
            names[1][second] = names[0][first]
    free = [
        [name for axis, name in enumerate(own) if axis not in (*contract[i], *batch[i])] for i, own in enumerate(names)
    ]
    result = [*(names[0][axis] for axis in batch[0]), *free[0], *free[1]]
    equation_text = f"{''.join(names[0])},{''.join(names[1])}->{''.join(result)}"
    return graph.node("Einsum", left, right, shape=shape, dtype=left.dtype, equation=equation_text)


@_rule("conv_general_dilated")
def _conv(graph: Graph, equation: Any, x: Value, kernel: Value) -> Value:
    values = equation.params
    if set(values["lhs_dilation"]) != {1} or values["batch_group_count"] != 1:
        raise ValueError("--format=onnx has no transposed convolutions; export with stablehlo")
    numbers, shape = values["dimension_numbers"], equation.outvars[0].aval.shape
    x, kernel = graph.transpose(x, numbers.lhs_spec), graph.transpose(kernel, numbers.rhs_spec)
    result = graph.node(
        "Conv",
        x,
        kernel,
        shape=tuple(shape[axis] for axis in numbers.out_spec),
        dtype=x.dtype,
        pads=[int(pair[end]) for end in (0, 1) for pair in values["padding"]],
        strides=list(values["window_strides"]),
        dilations=list(values["rhs_dilation"]),
        group=values["feature_group_count"],
    )
    return graph.transpose(result, np.argsort(numbers.out_spec).tolist())


# --- places


@_rule("gather")
def _gather(graph: Graph, equation: Any, x: Value, places: Value) -> Value:
    """Takes elements, rows or windows at places that are in bounds; only those of a window are brought there."""
    numbers, shape = equation.params["dimension_numbers"], equation.outvars[0].aval.shape
    sizes, axes = equation.params["slice_sizes"], numbers.start_index_map
    if places.constant is not None and places.constant.ndim == 1:
        starts = places.constant
        cut = tuple(sizes[i] if i in axes else size for i, size in enumerate(x.shape))
        ends = [int(start) + sizes[axis] for start, axis in zip(starts, axes, strict=True)]
        return graph.reshape(_cut(graph, x, axes, starts, ends, [1] * len(axes), cut), shape)
    batch = numbers.operand_batching_dims
    num_batch, gone = len(batch), {*batch, *numbers.collapsed_slice_dims}
    rest = [i for i in range(len(x.shape)) if i not in (*batch, *axes)]
    leading = tuple(range(num_batch))
    windows = [axis for axis in axes if axis not in gone]
    is_plain = numbers.start_indices_batching_dims == leading and all(sizes[i] == x.shape[i] for i in rest)
    if not is_plain or (windows and len(axes) > 1):
        raise ValueError("--format=onnx has no form of this choice of elements; export with stablehlo")
    places = graph.cast(places, np.int64)
    if windows:  # the start of a window → all of its places
        (axis,), size = axes, sizes[axes[0]]
        last = graph.node("Sub", graph.size(x.shape[axis]), graph.size(size), shape=(1,), dtype=np.int64)
        places = graph.node("Min", places, last, shape=places.shape, dtype=np.int64)
        places = graph.node("Max", places, constant(np.int64(0)), shape=places.shape, dtype=np.int64)
        found = (*places.shape[:-1], size, 1)
        places = graph.reshape(places, (*places.shape[:-1], 1, 1))
        places = graph.node("Add", places, constant(np.arange(size)[:, None]), shape=found, dtype=np.int64)
    x = graph.transpose(x, [*batch, *axes, *rest])
    result_shape = (*places.shape[:-1], *(sizes[i] for i in rest))
    result = graph.node("GatherND", x, places, shape=result_shape, dtype=x.dtype, batch_dims=num_batch)
    # axes of the result: those of the places, then a window's, then the rest; wanted: as `offset_dims` says
    offset = [i for i in range(len(sizes)) if i not in gone]
    first = len(places.shape) - 1
    origin = {axis: first - 1 if axis in windows else first + rest.index(axis) for axis in offset}
    plain, within = iter(range(first - len(windows))), iter(offset)
    order = [origin[next(within)] if i in numbers.offset_dims else next(plain) for i in range(len(shape))]
    return graph.transpose(result, order)


@_rule("scatter")
def _scatter(graph: Graph, equation: Any, x: Value, places: Value, updates: Value) -> Value:
    """Puts elements at places along one axis; what lies behind its end is dropped: it goes to one place more."""
    numbers = equation.params["dimension_numbers"]
    (axis,) = numbers.scatter_dims_to_operand_dims
    batch = tuple(range(len(x.shape) - 1))
    if numbers.update_window_dims or numbers.operand_batching_dims != batch or axis != len(batch):
        raise ValueError("--format=onnx has no form of this change of elements; export with stablehlo")
    size = x.shape[axis]
    pads = constant(np.array([0] * (2 * axis + 1) + [1], np.int64))
    longer = graph.node("Pad", x, pads, shape=(*x.shape[:axis], size + 1), dtype=x.dtype)
    places = graph.reshape(places, places.shape[:-1])
    end = constant(np.asarray(size, places.dtype))
    places = graph.node("Min", places, end, shape=places.shape, dtype=places.dtype)
    changed = graph.node("ScatterElements", longer, places, updates, shape=longer.shape, dtype=x.dtype, axis=axis)
    return _cut(graph, changed, [axis], [0], [size], [1], x.shape)


# --- control


def _body(
    graph: Graph, closed: Any, fixed: Sequence[Value], types: Sequence[tuple[Shape, Any]]
) -> tuple[Graph, list[Value], list[Value]]:
    """Returns a graph for the body of a loop, its inputs, and what it computes from `fixed` and them."""
    inner = Graph(graph)
    inputs = [Value(shape, np.dtype(dtype), inner.name()) for shape, dtype in types]
    return inner, inputs, inner.translate(closed.jaxpr, closed.consts, [*fixed, *inputs], RULES)


def _whole(graph: Graph, values: Sequence[Value], variables: Sequence[Any]) -> list[Value]:
    return [graph.whole(value, variable.aval.shape) for value, variable in zip(values, variables, strict=True)]


@_rule("scan")
def _scan(graph: Graph, equation: Any, *inputs: Value) -> list[Value]:
    values, closed = equation.params, equation.params["jaxpr"]
    num_fixed, num_carried = values["num_consts"], values["num_carry"]
    if values["reverse"]:
        raise ValueError("--format=onnx has no loop from the end; export with stablehlo")
    types = [(variable.aval.shape, variable.aval.dtype) for variable in closed.jaxpr.invars[num_fixed:]]
    inner, names, results = _body(graph, closed, inputs[:num_fixed], types)
    outputs = [(inner.name(), value) for value in _whole(inner, results, closed.jaxpr.outvars)]
    body = inner.close("body", names, outputs)
    results_types = [(variable.aval.shape, variable.aval.dtype) for variable in equation.outvars]
    num_scanned = len(inputs) - num_fixed - num_carried
    return graph.nodes_of("Scan", inputs[num_fixed:], results_types, body=body, num_scan_inputs=num_scanned)


@_rule("while")
def _while(graph: Graph, equation: Any, *inputs: Value) -> list[Value]:
    """Loops while one image of a batch wants to; images that do not keep their state."""
    test, body = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]
    num_test, num_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    fixed, state = inputs[: num_test + num_body], inputs[num_test + num_body :]
    types = [(variable.aval.shape, variable.aval.dtype) for variable in equation.outvars]

    def wants(graph: Graph, state: Sequence[Value]) -> Value:
        (result,) = graph.translate(test.jaxpr, test.consts, [*fixed[:num_test], *state], RULES)
        return graph.whole(result, test.out_avals[0].shape)

    def any_wants(graph: Graph, state: Sequence[Value]) -> Value:
        number = graph.cast(wants(graph, state), np.int32)
        return graph.cast(graph.node("ReduceMax", number, shape=(), dtype=np.int32, keepdims=0), bool)

    inner, names, results = _body(graph, body, fixed[num_test:], types)
    if test.out_avals[0].shape:
        which = wants(inner, names)
        for i, (new, old) in enumerate(zip(_whole(inner, results, equation.outvars), names, strict=True)):
            per_image = inner.reshape(which, which.shape + (1,) * (len(old.shape) - len(which.shape)))
            results[i] = _choose(inner, per_image, new, old)
    results = _whole(inner, results, equation.outvars)
    count, before = Value((), np.dtype(np.int64), inner.name()), Value((), np.dtype(bool), inner.name())
    outputs = [(inner.name(), value) for value in (any_wants(inner, results), *results)]
    closed = inner.close("body", [count, before, *names], outputs)
    return graph.nodes_of("Loop", [None, any_wants(graph, state), *state], types, body=closed)
