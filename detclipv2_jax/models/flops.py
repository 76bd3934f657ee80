"""Arithmetic of a step, counted without compiling: in traced programs, and by formula from the configuration.

Counted are products of matrices and convolutions, a multiplication and an addition as two; all else is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh

from detclipv2_jax.chips import chip_of
from detclipv2_jax.geometry.anchors import level_sizes
from detclipv2_jax.models import by_length, detclip

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# forward passes that a training step costs: one, and one each for the gradients to inputs and to weights
TRAINING = 3.0


def peak_per_second(mesh: Mesh) -> float | None:
    """Returns the bf16 FLOP/s of all devices of a mesh at most; None where that is not known, e.g. of CPUs."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    return chip.peak * mesh.size if chip else None


def num_anchors(canvas: tuple[int, int]) -> int:
    """Returns the anchors of a canvas (height, width) px."""
    return sum(h * w for h, w in level_sizes(canvas))


def of_step(
    config: ConfigDict, kind: str, canvas: tuple[int, int], *, table_rows: int, num_devices: int
) -> Callable[[float], float]:
    """Returns the function from the number of distinct concepts of a batch to the FLOPs of its training step.

    What the backward pass computes again is counted once. `table_rows` are those of the concept table of all hosts.
    """
    settings = config.model.copy_and_resolve_references()
    settings.remat, settings.head.deform_impl = "none", "gather"  # the banded form multiplies with zeros
    with settings.unlocked():  # configurations of old runs have no such key
        settings.swin.attention_impl = "xla"  # what happens within a kernel is not counted
    # what the tokens of classes are changes no count
    class_tokens = np.zeros((len(settings.text.classes), settings.text.context_length), np.int32)
    model, batch_size = detclip.from_config(settings, class_tokens=class_tokens), config[kind].batch_size
    image, extent = jnp.zeros((1, *canvas, 3), jnp.uint8), jnp.zeros((1, 2), jnp.int32)
    tokens = jnp.zeros((1, settings.text.context_length), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), image, extent, tokens, train=False))

    def forward(method: str, *arguments: Any, **options: Any) -> float:
        return of(lambda params: model.apply(params, *arguments, method=method, **options), params)

    towers = TRAINING * (batch_size * forward("encode_image", image, extent, train=False))
    rows = _num_compared(config, kind, canvas, num_devices)
    if num_tokens := _num_tokens(config, kind):
        towers += TRAINING * batch_size * forward("encode_tokens", tokens)
        return lambda num_concepts: towers + 2.0 * batch_size * rows * settings.embed_dim * num_tokens
    for length, num in _texts(config, kind, table_rows):
        towers += TRAINING * num * forward("encode_text", tokens[:, :length])
    return lambda num_concepts: towers + 2.0 * batch_size * rows * settings.embed_dim * num_concepts


def _texts(config: ConfigDict, kind: str, table_rows: int) -> list[tuple[int, int]]:
    """Returns (length, number) of the texts that a step encodes, where no group of lengths is full."""
    if config.optimizer.text_once:
        return []
    whole = [(config.model.text.context_length, 1.0)]
    return by_length.num_rows(config.optimizer.text_lengths[kind] or whole, table_rows)


def _num_tokens(config: ConfigDict, kind: str) -> int:
    """Returns how many concepts a batch has of which every token of a caption is one, padding included; else 0."""
    if kind != "image_text" or config.loss.interaction != "tokens":
        return 0
    return config[kind].batch_size * config.model.text.context_length


def _num_compared(config: ConfigDict, kind: str, canvas: tuple[int, int], num_devices: int) -> float:
    """Returns how many regions of an image are compared with all concepts, forward and backward."""
    if kind != "image_text":
        return TRAINING * num_anchors(canvas)
    compared = TRAINING * min(config.loss.num_proposals, num_anchors(canvas))
    if config.loss.selection.startswith("text_batch"):  # proposals are chosen without a gradient
        compared += num_anchors(canvas) / (num_devices if config.loss.selection_scope == "device" else 1)
    return compared


def of(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the FLOPs of a function of arrays (or their shapes), over all devices.

    A scan counts as often as it is long, a conditional as its larger branch, a loop of unknown length once: all of
    it, if `loss.chunk_bytes` is so large that the loop has one turn.
    """
    # a jitted one is not traced within another: it may have compiler options
    trace = getattr(function, "trace", jax.jit(function).trace)
    return _of_jaxpr(trace(*arguments).jaxpr.jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inputs: list[Any] = [variable.aval for variable in equation.invars]
        outputs: list[Any] = [variable.aval for variable in equation.outvars]
        if name == "dot_general":
            ((summed, _), _) = params["dimension_numbers"]
            total += 2 * outputs[0].size * math.prod(inputs[0].shape[axis] for axis in summed)
        elif name == "conv_general_dilated":
            out_channels = inputs[1].shape[params["dimension_numbers"].rhs_spec[0]]
            # nobody multiplies the zeros of a dilated input
            zeros = math.prod(params["lhs_dilation"])
            total += 2 * outputs[0].size * math.prod(inputs[1].shape) / out_channels / zeros
        inner = [_of_jaxpr(jaxpr) for jaxpr in _inner(params)]
        if inner:
            times = params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
            total += times * (max(inner) if name == "cond" else sum(inner))
    return total


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """Yields the programs that an operation calls."""
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part


def formula(
    config: ConfigDict, kind: str, canvas: tuple[int, int], *, table_rows: int, num_devices: int, num_concepts: float
) -> float:
    """Returns what `of_step` counts, from sizes alone."""
    num_images, rows = config[kind].batch_size, _num_compared(config, kind, canvas, num_devices)
    if num_tokens := _num_tokens(config, kind):
        num_concepts = num_tokens
        texts = num_images * formula_text(config.model, config.model.text.context_length)
    else:
        texts = sum(num * formula_text(config.model, length) for length, num in _texts(config, kind, table_rows))
    towers = num_images * formula_image(config.model, canvas) + texts
    towers += max(num_tokens - num_images, 0) * config.model.text.width * config.model.embed_dim  # projections
    return 2.0 * (TRAINING * towers + num_images * rows * num_concepts * config.model.embed_dim)


def formula_image(model: ConfigDict, canvas: tuple[int, int]) -> float:
    """Returns the multiplications of embedding all regions of an image."""
    total, widths = 0.0, []
    for stage, depth in enumerate(model.swin.depths):
        rows, columns = (-(-side // (4 << stage)) for side in canvas)
        width, window = model.swin.embed_dim << stage, model.swin.window_size
        cells = rows * columns
        padded = -(-rows // window) * -(-columns // window) * window**2
        total += cells * (48 if stage == 0 else 2 * width) * width  # patches; merging has 4 * (width / 2) inputs
        # projections to query, key, value and back, two products with windows, the two layers of the MLP
        total += depth * (padded * (4 * width**2 + 2 * window**2 * width) + cells * 8 * width**2)
        widths.append(width)
    head, sizes = model.head, [h * w for h, w in level_sizes(canvas)]
    conv = 9 * head.channels
    total += sum(size * width * head.channels for size, width in zip(sizes, widths[1:], strict=False))  # laterals
    outputs = model.embed_dim + 4 + 1 + (head.objectness != "none")
    deformable = head.deformable * (head.channels + 27)
    return total + sum(sizes) * conv * ((1 + 2 * head.num_convs) * head.channels + deformable + outputs)


def formula_text(model: ConfigDict, length: int) -> float:
    """Returns the multiplications of embedding one concept of `length` positions."""
    if model.text.classes:
        return 0
    width = model.text.width
    layer = 12 * length * width**2 + 2 * length**2 * width
    return model.text.num_layers * layer + width * model.embed_dim
