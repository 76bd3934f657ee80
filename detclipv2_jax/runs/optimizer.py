"""AdamW with parameter groups chosen by regex, and learning rates: warmup, then cosine (paper Table 9) or in steps.

Steps come at fixed shares of the run, or when the scores of evaluations stop improving (Table 11): `verdict`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

if TYPE_CHECKING:
    from ml_collections import ConfigDict

SCHEDULES = ("cosine", "step", "plateau", "constant")  # of the learning rate, after the warmup
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

    def assign(path: Any, _: Any) -> int:
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


def frozen_mask(params: Any, frozen: str) -> Any:
    """Returns the tree of whether each parameter stays as it is: its whole name matches the regex `frozen`.

    Raises:
      ValueError: the regex is not empty and matches no parameter, or all of them.
    """
    mask = jax.tree_util.tree_map_with_path(lambda path, _: bool(re.fullmatch(frozen, param_name(path))), params)
    if frozen and len(set(jax.tree.leaves(mask))) == 1:
        which = "all parameters" if any(jax.tree.leaves(mask)) else "no parameter"
        raise ValueError(f"optimizer.frozen {frozen!r} matches {which}; it must match some, e.g. 'text_encoder/.*'")
    return mask


def without_frozen(grads: Any, frozen: str) -> Any:
    """Returns the gradients, zero where a parameter is frozen, so that neither their norm nor the compiler sees it."""
    if not frozen:
        return grads
    return jax.tree.map(lambda stays, grad: jnp.zeros_like(grad) if stays else grad, frozen_mask(grads, frozen), grads)


@dataclasses.dataclass
class _Row:
    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    learning_rate: str  # factor of the group, or frozen
    weight_decay: str


def overview(params: Any, groups: Sequence[Group], *, frozen: str = "") -> str:
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
            "frozen" if re.fullmatch(frozen, name) else f"x {group_of[name][1]:g}",
            "yes" if group_of[name][2] else "no",
        )
        for name, x in sorted((param_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params))
    ]
    from clu import parameter_overview  # here: a step needs no table

    return f"{parameter_overview.make_table(rows)}\nTotal: {sum(row.size for row in rows):,}"


def learning_rate(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Returns the learning rate at every step: linear warmup, then as `config.schedule` says.

    cosine ends at `min_learning_rate`; step falls at shares of the run; plateau's `verdict` comes on top.
    `total_steps` are those of all epochs, not of `num_steps`: a run stopped early and continued stays the same run.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        # optax needs at least one step of decay; a run shorter than its warmup never gets there
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, warmup, max(total_steps, warmup + 1), end_value=config.min_learning_rate
        )
    # optax's own warmup_constant_schedule stays at zero without warmup steps
    ramp = optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    decays = config.decay_at if config.schedule == "step" else ()
    steps = optax.piecewise_constant_schedule(
        1.0, {round(share * total_steps): config.decay_factor for share in decays}
    )
    return lambda step: ramp(step) * steps(step)


class Verdict(NamedTuple):
    """What the scores of a run's evaluations lead to."""

    factor: float  # on the learning rate; 1 but for plateau
    over: bool  # no better score for `stop_patience` evaluations


def verdict(scores: Mapping[int, float], config: ConfigDict) -> Verdict:
    """Returns what follows from all scores so far, given by the step of their evaluation; no other state is kept.

    1. A score above all before it is a gain. Evaluations before the end of the warmup are not held against the run.
    2. plateau: `patience` evaluations without a gain multiply the rate by `decay_factor`, and the count starts again;
       the rate does not fall below `min_learning_rate`.
    3. `stop_patience` evaluations without a gain, with plateau at that smallest rate, end the run.
    """
    factor, best, waited = 1.0, -math.inf, 0
    smallest = config.min_learning_rate / config.learning_rate if config.schedule == "plateau" else 1.0
    for step in sorted(scores):
        waited = 0 if scores[step] > best or step < config.warmup_steps else waited + 1  # 1
        best = max(best, scores[step])
        if factor > smallest and waited >= config.patience:  # 2
            factor, waited = max(factor * config.decay_factor, smallest), 0
        elif factor <= smallest and config.stop_patience and waited >= config.stop_patience:  # 3
            return Verdict(factor, True)
    return Verdict(factor, False)


class FactorState(NamedTuple):
    """The factor on the learning rate that evaluations lead to."""

    rate_factor: Float[Array, ""]


def _scale_by_factor() -> optax.GradientTransformation:
    """Returns the transformation that scales updates by a factor of its state; see `with_rate_factor`."""
    return optax.GradientTransformation(
        lambda _: FactorState(jnp.ones((), jnp.float32)),
        lambda updates, state, _=None: (optax.tree.scale(state.rate_factor, updates), state),
    )


def with_rate_factor(opt_state: Any, factor: Array) -> Any:
    """Returns the state of a plateau optimizer with another factor, float32 []."""
    return optax.tree_utils.tree_set(opt_state, rate_factor=factor)


def make_optimizer(config: ConfigDict, params: Any, total_steps: int) -> optax.GradientTransformation:
    """Returns AdamW for `params` (arrays or shapes) as `config.optimizer` says.

    The update of a parameter is -lr(step) * factor * (adam + weight_decay * parameter), the decay only in groups that
    have it. Gradients are clipped by their global norm first. What is frozen has no update and nothing in the state.

    Raises:
      ValueError: a parameter is in no group.
    """
    groups = [tuple(group) for group in config.groups]
    assigned, frozen = assign_groups(params, groups), frozen_mask(params, config.frozen)
    factors = jax.tree.map(lambda index, stays: optax.MaskedNode() if stays else groups[index][1], assigned, frozen)
    decayed = jax.tree.map(lambda index: groups[index][2], assigned)
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    plateau = [_scale_by_factor()] if config.schedule == "plateau" else []
    tx = optax.chain(
        *clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.stateless(lambda updates, _: jax.tree.map(lambda update, factor: update * factor, updates, factors)),
        optax.scale_by_learning_rate(learning_rate(config, total_steps)),
        *plateau,
    )
    return optax.selective_transform(tx, freeze_mask=frozen) if config.frozen else tx
