"""Equal blocks in a row, compiled once: a program grows with what is written in it, and so does compiling it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

MIN_REPEATS = 4  # below, a loop costs more than it saves: it copies what the backward pass needs


def repeat(
    parent: nn.Module,
    blocks: Sequence[nn.Module],
    names: Sequence[str],
    x: jax.Array,
    inputs: Sequence[Any] = (),
    *,
    remat: bool,
    kept: Sequence[str] = (),
    static: tuple[Any, ...] = (),
) -> jax.Array:
    """Returns x after len(names) blocks, of which block i is `blocks[i % len(blocks)]`.

    Block i is called with (x, *its inputs, *static) and owns the parameters `names[i]` of `parent`, as if it had been
    written there. From `MIN_REPEATS` turns on, the turns are a `lax.scan` over parameters that are stacked when traced.

    Args:
      parent: the module, in its compact method.
      blocks: those of one turn, made with `parent=None`.
      names: of all blocks' parameters.
      x: of the same shape after every block.
      inputs: arrays whose first axis counts the blocks.
      static: further arguments, the same for all.
      remat: whether a block's values are computed again in the backward pass instead of kept.
      kept: names of values (`jax.ad_checkpoint.checkpoint_name`) that are kept all the same.
    """
    if parent.is_initializing():
        for i, name in enumerate(names):
            x = blocks[i % len(blocks)].clone(parent=parent, name=name)(x, *(array[i] for array in inputs), *static)
        return x
    keys = jax.random.split(parent.make_rng("dropout"), len(names)) if parent.has_rng("dropout") else None
    rows: list[Any] = [
        (parent.get_variable("params", name), [array[i] for array in inputs], None if keys is None else keys[i])
        for i, name in enumerate(names)
    ]
    turns = [rows[i : i + len(blocks)] for i in range(0, len(rows), len(blocks))]
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    scanned = len(turns) >= MIN_REPEATS and len(turns[-1]) == len(blocks)

    def one_turn(x: jax.Array, rows: Sequence[Any]) -> tuple[jax.Array, None]:
        for block, row in zip(blocks, rows, strict=False):  # the last turn may be a part of one

            def call(x: jax.Array, row: Any, block: nn.Module = block) -> Any:
                params, given, key = row
                return block.apply(
                    {"params": params}, x, *given, *static, rngs=None if key is None else {"dropout": key}
                )

            # a scan keeps the two passes apart
            x = (jax.checkpoint(call, prevent_cse=not scanned, policy=policy) if remat else call)(x, row)
        return x, None

    if scanned:
        return jax.lax.scan(one_turn, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *turns))[0]
    for turn in turns:
        x, _ = one_turn(x, turn)
    return x
