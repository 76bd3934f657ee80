"""AdamW with parameter groups chosen by regex, linear warmup and cosine decay (paper Table 9)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax
from clu import parameter_overview
from ml_collections import ConfigDict

Group = tuple[str, float, bool]  # regex over the path, factor on the learning rate, weight decay


def param_name(path: Sequence[Any]) -> str:
    """Returns the public name of a parameter, "head/box_tower/conv0/kernel", from its path in the tree."""
    return "/".join(str(getattr(key, "key", key)) for key in path)


def named_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by its public name."""
    return {param_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(params)}


def assign_groups(params: Any, groups: Sequence[Group]) -> Any:
    """Returns the tree of the group each parameter belongs to: the first whose regex matches its whole name.

    Raises:
      ValueError: parameters that match no group, all of them named.
    """
    lost = []

    def assign(path, _):
        name = param_name(path)
        for index, (regex, _, _) in enumerate(groups):
            if re.fullmatch(regex, name):
                return index
        lost.append(name)
        return -1

    assigned = jax.tree_util.tree_map_with_path(assign, params)
    if lost:
        raise ValueError(
            f"{len(lost)} parameters match no regex of optimizer.groups: {', '.join(lost[:10])}"
            f"{' …' if len(lost) > 10 else ''}; add a group for them"
        )
    return assigned


@dataclasses.dataclass
class _Row:
    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    learning_rate: str  # factor of the group
    weight_decay: str


def overview(params: Any, groups: Sequence[Group]) -> str:
    """Returns a table of names, shapes and groups of `params` (arrays or shapes), one parameter a line."""
    group_of = {
        param_name(path): groups[i] for path, i in jax.tree_util.tree_leaves_with_path(assign_groups(params, groups))
    }
    rows = [
        _Row(
            name,
            tuple(x.shape),
            str(x.dtype),
            math.prod(x.shape),
            f"x {group_of[name][1]:g}",
            "yes" if group_of[name][2] else "no",
        )
        for name, x in sorted((param_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params))
    ]
    return f"{parameter_overview.make_table(rows)}\nTotal: {sum(row.size for row in rows):,}"


def learning_rate(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Returns the learning rate at every step: linear warmup, then cosine to zero at `total_steps` (or constant).

    `total_steps` are those of all epochs, not of `num_steps`: a run stopped early and continued stays the same run.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        # optax's own warmup_constant_schedule stays at zero without warmup steps
        return optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    # optax needs at least one step of decay; a run shorter than its warmup never gets there
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(total_steps, warmup + 1))


def make_optimizer(config: ConfigDict, params: Any, total_steps: int) -> optax.GradientTransformation:
    """Returns AdamW for `params` (arrays or shapes) as `config.optimizer` says.

    The update of a parameter is -lr(step) * factor * (adam + weight_decay * parameter), the decay only in groups that
    have it. Gradients are clipped by their global norm first.

    Raises:
      ValueError: a parameter is in no group.
    """
    groups = [tuple(group) for group in config.groups]
    assigned = assign_groups(params, groups)
    factors = jax.tree.map(lambda index: groups[index][1], assigned)
    decayed = jax.tree.map(lambda index: groups[index][2], assigned)
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.stateless(lambda updates, _: jax.tree.map(lambda update, factor: update * factor, updates, factors)),
        optax.scale_by_learning_rate(learning_rate(config, total_steps)),
    )
