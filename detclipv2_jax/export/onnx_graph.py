"""From a traced JAX function to an ONNX graph.

A trace is a list of equations between arrays of known types; `onnx_rules` turns each into one node or a few. What keeps
the graph small:

1. what follows from constants alone is computed here;
2. a value that is repeated keeps the size 1 until something needs the repetitions: ONNX's arithmetic repeats by itself;
3. free sizes (photos, words) and what follows from them are computed once, from the shapes of the inputs.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from onnx import helper, numpy_helper

Shape = tuple[Any, ...]  # integers and, where a size is free, symbolic sizes


@dataclasses.dataclass(frozen=True)
class Value:
    """An array of the graph; a size is 1 where its array in the trace repeats it."""

    shape: Shape
    dtype: np.dtype
    name: str = ""  # of what is not known
    constant: np.ndarray | None = None  # its content where it is known


def constant(array: Any) -> Value:
    """Returns a known value."""
    array = np.asarray(array)
    return Value(array.shape, array.dtype, constant=array)


def element_type(dtype: Any) -> int:
    """Returns ONNX's number of a type."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


class Graph:
    """Nodes in the making; the body of a loop is a graph of its own that sees the names of the one around it."""

    def __init__(self, parent: Graph | None = None):
        self.nodes: list[onnx.NodeProto] = []
        self.root: Graph = parent.root if parent else self
        self.constants: dict[str, np.ndarray] = {}  # of the root
        self._stored: dict[Any, str] = {}  # content of a constant → its name
        self._sizes: dict[str, Value] = {}
        self._num_names = 0

    def name(self) -> str:
        """Returns one that is new."""
        self.root._num_names += 1
        return f"v{self.root._num_names}"

    def reference(self, value: Value) -> str:
        """Returns the name under which nodes find a value; a constant is stored when it is first used."""
        if value.constant is None:
            return value.name
        array, root = np.ascontiguousarray(value.constant).reshape(value.shape), self.root
        key = (array.dtype.str, array.shape, hashlib.sha256(array.data).digest())  # equal ones are stored once
        if key not in root._stored:
            root._stored[key] = self.name()
            root.constants[root._stored[key]] = array
        return root._stored[key]

    def nodes_of(
        self, operator: str, inputs: Sequence[Value | None], types: Sequence[tuple[Shape, Any]], **attributes: Any
    ) -> list[Value]:
        """Adds a node and returns its outputs, given their shapes and types; an input that is None is left out."""
        outputs = [Value(shape, np.dtype(dtype), self.name()) for shape, dtype in types]
        names = [self.reference(value) if value else "" for value in inputs]
        self.nodes.append(helper.make_node(operator, names, [value.name for value in outputs], **attributes))
        return outputs

    def node(self, operator: str, *inputs: Value, shape: Shape, dtype: Any, **attributes: Any) -> Value:
        """Adds a node with one output and returns that."""
        return self.nodes_of(operator, inputs, [(shape, dtype)], **attributes)[0]

    # shapes

    def size(self, size: Any) -> Value:
        """Returns int64[1], a size; nodes that compute it from the inputs' shapes come first in the root."""
        if not jax.export.is_symbolic_dim(size):
            return constant(np.array([size], np.int64))
        key = str(size)
        if key not in self.root._sizes:
            self.root._sizes[key] = self.root._compute(ast.parse(key, mode="eval").body)
        return self.root._sizes[key]

    def take_sizes(self, value: Value) -> None:
        """Learns the free sizes of an input from its shape."""
        for axis, size in enumerate(value.shape):
            if jax.export.is_symbolic_dim(size) and str(size) not in self._sizes:
                self._sizes[str(size)] = self.node("Shape", value, shape=(1,), dtype=np.int64, start=axis, end=axis + 1)

    def _compute(self, tree: ast.AST) -> Value:
        """Returns the value of an expression of sizes: sums, products, `floordiv` and `mod`."""

        def binary(operator: str, left: Value, right: Value) -> Value:
            return self.node(operator, left, right, shape=(1,), dtype=np.int64)

        match tree:
            case ast.Constant(value=int(value)):
                return constant(np.array([value], np.int64))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return binary("Mul", self._compute(operand), constant(np.array([-1], np.int64)))
            case ast.Name(id=name) if name in self._sizes:
                return self._sizes[name]
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() as operator, right=right):
                return binary(type(operator).__name__.replace("Mult", "Mul"), self._compute(left), self._compute(right))
            case ast.Call(func=ast.Name(id="mod"), args=[left, right]):
                return binary("Mod", self._compute(left), self._compute(right))
            case ast.Call(func=ast.Name(id="floordiv"), args=[left, right]):  # ONNX's division cuts towards zero
                top, bottom = self._compute(left), self._compute(right)
                return binary("Div", binary("Sub", top, binary("Mod", top, bottom)), bottom)
        raise ValueError(f"--format=onnx cannot compute the size {ast.unparse(tree)}; give --batch_size")

    def sizes(self, shape: Shape) -> Value:
        """Returns int64[rank]."""
        parts = [self.size(size) for size in shape]
        known = [part.constant for part in parts if part.constant is not None]
        if len(known) == len(parts):
            return constant(np.concatenate(known) if known else np.zeros(0, np.int64))
        return self.node("Concat", *parts, shape=(len(parts),), dtype=np.int64, axis=0)

    def reshape(self, value: Value, shape: Shape) -> Value:
        """Returns the value in another shape."""
        if value.shape == shape:
            return value
        if value.constant is not None:
            return constant(value.constant.reshape(shape))
        free = [jax.export.is_symbolic_dim(size) for size in shape]
        wanted = tuple(-1 if is_free else size for is_free, size in zip(free, shape, strict=True))
        sizes = constant(np.array(wanted, np.int64)) if sum(free) < 2 else self.sizes(shape)
        return self.node("Reshape", value, sizes, shape=shape, dtype=value.dtype)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Returns the value with its axes in another order."""
        order = [int(axis) for axis in order]
        if order == sorted(order):
            return value
        if value.constant is not None:
            return constant(value.constant.transpose(order))
        shape = tuple(value.shape[axis] for axis in order)
        return self.node("Transpose", value, shape=shape, dtype=value.dtype, perm=order)

    def cast(self, value: Value, dtype: Any) -> Value:
        """Returns the value in another type."""
        if value.dtype == dtype:
            return value
        if value.constant is not None:
            return constant(value.constant.astype(dtype))
        return self.node("Cast", value, shape=value.shape, dtype=dtype, to=element_type(dtype))

    def whole(self, value: Value, shape: Shape) -> Value:
        """Returns the value with its repetitions."""
        if value.shape == shape:
            return value
        if value.constant is not None and not any(map(jax.export.is_symbolic_dim, shape)):
            return constant(np.broadcast_to(value.constant, shape))
        return self.node("Expand", value, self.sizes(shape), shape=shape, dtype=value.dtype)

    # equations

    def translate(
        self, jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[Value], rules: Mapping[str, Callable]
    ) -> list[Value]:
        """Adds the nodes of a trace and returns its results.

        Args:
          jaxpr: the trace.
          constants: of it.
          arguments: what it is called with.
          rules: name of an operation → function of (graph, equation, inputs) that returns a value or a list of them;
            one with the attribute `repeats` takes inputs without their repetitions.
        """
        known: dict[Any, Value] = dict(zip(jaxpr.constvars, map(constant, constants), strict=True))
        known |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Value:
            is_literal: Any = isinstance(atom, Literal)
            return constant(np.asarray(atom.val, atom.aval.dtype)) if is_literal else known[atom]

        for equation in jaxpr.eqns:
            name, inputs = equation.primitive.name, [read(atom) for atom in equation.invars]
            inner = equation.params.get("call_jaxpr", equation.params.get("jaxpr"))
            if name not in rules and isinstance(inner, Jaxpr | ClosedJaxpr):  # a function that was called
                closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
                outputs = self.translate(closed.jaxpr, closed.consts, inputs, rules)
            else:
                if name not in rules:
                    raise ValueError(f"--format=onnx has no form of the operation {name}; export with stablehlo")
                outputs = self._apply(rules[name], equation, inputs)
            known |= zip(equation.outvars, outputs, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, rule: Any, equation: Any, inputs: list[Value]) -> list[Value]:
        """Returns the results of an equation: known ones if everything is known, else of new nodes."""
        repeats = getattr(rule, "repeats", False)
        if not repeats:
            inputs = [self.whole(value, atom.aval.shape) for value, atom in zip(inputs, equation.invars, strict=True)]
        arrays = [value.constant for value in inputs if value.constant is not None]
        is_known = 0 < len(arrays) == len(inputs) and not equation.primitive.multiple_results
        if is_known and equation.primitive.name != "broadcast_in_dim":  # which would repeat them
            arrays = list(np.broadcast_arrays(*arrays)) if repeats else arrays
            return [constant(equation.primitive.bind(*map(np.asarray, arrays), **equation.params))]
        outputs = rule(self, equation, *inputs)
        return outputs if isinstance(outputs, list) else [outputs]

    def close(self, name: str, inputs: Sequence[Value], outputs: Sequence[tuple[str, Value]]) -> onnx.GraphProto:
        """Returns the graph; outputs get the given names."""
        for given, value in outputs:  # results may be inputs, constants or twice the same
            self.nodes.append(helper.make_node("Identity", [self.reference(value)], [given]))
        types = [
            [
                helper.make_tensor_value_info(given, element_type(value.dtype), _sizes(value.shape))
                for given, value in pairs
            ]
            for pairs in ([(value.name, value) for value in inputs], outputs)
        ]
        constants = [numpy_helper.from_array(array, given) for given, array in self.constants.items()]
        return helper.make_graph(self.nodes, name, types[0], types[1], initializer=constants)


def _sizes(shape: Shape) -> list[int | str]:
    return [str(size) if jax.export.is_symbolic_dim(size) else int(size) for size in shape]
