"""What a training run carries from step to step, and its sharded creation."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from detclipv2_jax.data.concepts import class_tokens
from detclipv2_jax.models import detclip
from detclipv2_jax.models.detclip import DetCLIP
from detclipv2_jax.runs import kept, pretrained
from detclipv2_jax.runs.optimizer import named_shapes
from detclipv2_jax.runs.sharding import REPLICATED, param_shardings

if TYPE_CHECKING:
    from ml_collections import ConfigDict


@flax.struct.dataclass
class TrainState:
    """Step (number of steps done), parameters (float32), optimizer state, and the average of the parameters if kept."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    ema: Any  # None without optimizer.ema_decay


def make_model(config: ConfigDict) -> DetCLIP:
    """Returns the model of `config.model`; ValueError if two names of its closed vocabulary are the same."""
    text = config.text
    return detclip.from_config(config, class_tokens=class_tokens(text.classes, context_length=text.context_length))


def init_params(model: DetCLIP, key: jax.Array, *, context_length: int) -> Any:
    """Returns fresh parameters; shapes do not depend on the canvas, so a small one is traced."""
    image = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    extent = jnp.full((1, 2), 64, jnp.int32)
    tokens = jnp.zeros((1, context_length), jnp.int32)
    return model.init(key, image, extent, tokens, train=False)["params"]


def param_shapes(model: DetCLIP, *, context_length: int) -> Any:
    """Returns the tree of parameter shapes without computing anything."""
    return jax.eval_shape(lambda key: init_params(model, key, context_length=context_length), jax.random.key(0))


def report_differences(stored: Any, expected: Any, *, what: str) -> None:
    """Raises a ValueError that lists missing, unexpected and reshaped parameters of `stored`, if there are any."""
    _report(named_shapes(stored), named_shapes(expected), what=what)


def _report(stored: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], *, what: str) -> None:
    if lines := pretrained.differences(stored, expected):
        raise ValueError(f"{what} does not fit the model of this configuration:\n" + "\n".join(lines))


def checked_model(config: ConfigDict, params: Any, *, what: str, folder: str | os.PathLike[str]) -> DetCLIP:
    """Returns the model of a configuration; ValueError if there is none, or `params` (`what`) are not its parameters.

    Both come from a folder, and may be a stranger's.
    """
    try:
        model = make_model(config.model)
        shapes = kept.value(
            lambda: named_shapes(param_shapes(model, context_length=config.model.text.context_length)),
            of=("parameter shapes", str(model), config.model.text.context_length),
        )
    except Exception as error:  # of whatever part of the model cannot have the sizes of a stranger's config.json
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder}/config.json: no model has the values of config.model ({reason})") from error
    _report(named_shapes(params), {name: tuple(shape) for name, shape in shapes.items()}, what=what)
    return model


def state_shardings(mesh: Mesh, tx: optax.GradientTransformation, shapes: Any, *, ema: bool) -> TrainState:
    """Returns the sharding of every array of the state: moments and average like their parameter, others replicated."""
    replicated: Any = NamedSharding(mesh, REPLICATED)
    shardings = param_shardings(mesh, shapes)

    def frozen(moment: Any) -> bool:  # there is none
        return isinstance(moment, optax.MaskedNode)

    opt_state = optax.tree_utils.tree_map_params(
        tx,
        lambda moment, sharding: moment if frozen(moment) else sharding,
        jax.eval_shape(tx.init, shapes),
        shardings,
        transform_non_params=lambda _: replicated,
        is_leaf=frozen,
    )
    return TrainState(step=replicated, params=shardings, opt_state=opt_state, ema=shardings if ema else None)


def create(params: Any, tx: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """Returns the state before the first step. Jit it with `state_shardings`: `jit(tx.init)` replicates moments."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )
