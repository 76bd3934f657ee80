"""The exported detector as ONNX models, one for each canvas and one for words."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import onnx
from onnx import helper

from detclipv2_jax.export.onnx_graph import Graph, Value, constant
from detclipv2_jax.export.onnx_rules import RULES

OPSETS = range(18, onnx.defs.onnx_opset_version() + 1)  # from 18 on the axes of every reduction are an input
SMALLEST = 1024  # weights; smaller arrays stay in float32
CHANNELS = {"Conv": (1, 0), "MatMul": (1, 1), "GatherND": (0, 0)}  # operator → input with weights, its channels' axis


def build(
    name: str,
    function: Callable,
    shapes: tuple[Any, ...],
    *,
    names: tuple[str, ...],
    weights: Mapping[str, np.ndarray],
    text: np.ndarray | None = None,
    opset: int,
    as_int8: bool = False,
    about: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    """Returns a function as an ONNX model.

    Args:
      name: of the graph.
      function: one of `programs.make_functions`.
      shapes: of its arguments; the first is all weights by name.
      names: of the other arguments.
      weights: that become constants of the model.
      text: the last argument, if it is to be a constant too.
      opset: version of ONNX's operators, of `OPSETS`.
      as_int8: store the weights of large layers as int8 with a scale for every channel.
      about: entries of the model's metadata, stored as JSON.
    """
    traced, graph = jax.jit(function).trace(*shapes), Graph()
    inputs = [Value(shape.shape, shape.dtype, given) for given, shape in zip(names, shapes[1:], strict=True)]
    known = [constant(weights[name]) for name in sorted(weights)]  # as JAX orders them
    arguments: list[Value] = inputs
    if text is not None:
        *inputs, _ = inputs
        arguments = [*inputs, constant(text)]
    for value in inputs:
        graph.take_sizes(value)
    jaxpr, constants = traced.jaxpr.jaxpr, traced.jaxpr.consts
    results = graph.translate(jaxpr, constants, [*known, *arguments], RULES)
    results = [graph.whole(value, variable.aval.shape) for value, variable in zip(results, jaxpr.outvars, strict=True)]
    if as_int8:
        _store_as_int8(graph)
    outputs = sorted(traced.out_info) if isinstance(traced.out_info, dict) else ["text"]
    proto = graph.close(name, inputs, list(zip(outputs, results, strict=True)))
    imports = [helper.make_opsetid("", opset)]
    version = helper.find_min_ir_version_for(imports)
    model = helper.make_model(proto, opset_imports=imports, ir_version=version, producer_name="detclipv2_jax")
    helper.set_model_props(model, {key: json.dumps(value, ensure_ascii=False) for key, value in (about or {}).items()})
    onnx.checker.check_model(model)
    return model


def save(path: pathlib.Path, model: onnx.ModelProto) -> None:
    """Writes a model as one file."""
    path.write_bytes(model.SerializeToString())


def check_opset(opset: int) -> None:
    """Raises a ValueError unless the installed onnx knows this version of the operators, and they suffice."""
    if opset not in OPSETS:
        raise ValueError(
            f"--opset is {opset}; this program and onnx {onnx.__version__} can write {OPSETS[0]} to {OPSETS[-1]}"
        )


def _store_as_int8(graph: Graph) -> None:
    """Stores the weights of matrices, kernels and tables as int8, to be multiplied by a scale for every channel."""
    first = []
    for node in graph.nodes:
        place, axis = CHANNELS.get(node.op_type, (0, 0))
        name = node.input[place] if node.op_type in CHANNELS else ""
        array = graph.constants.get(name)
        if array is None or array.dtype != np.float32 or array.size < SMALLEST:
            continue
        others = tuple(i for i in range(array.ndim) if i != axis)
        scale = np.maximum(np.abs(array).max(axis=others, keepdims=True) / 127.0, np.finfo(np.float32).tiny)
        del graph.constants[name]
        graph.constants |= {f"{name}_int8": np.rint(array / scale).astype(np.int8), f"{name}_scale": scale.reshape(-1)}
        first.append(helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [name], axis=axis))
    graph.nodes[:0] = first
