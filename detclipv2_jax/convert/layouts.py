"""Where public checkpoints keep the parameters of our two towers, and the way there and back.

Swin repository, timm, torchvision and transformers differ in names only: in which stage a patch merging is counted,
and whether query, key and value are one matrix. The four cells of a patch merging come in the same order everywhere,
(0, 0), (1, 0), (0, 1), (1, 1) as (row, column), which is ours. PyTorch keeps kernels as (outputs, inputs), we as
(inputs, outputs); the text projection of OpenAI and open_clip is a bare matrix that is kept as ours is.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from detclipv2_jax.data.tokenizer import VOCABULARY_SIZE
from detclipv2_jax.runs.pretrained import FRESH, ROOTS, Shape, differences

# our module -> theirs, with what comes before "weight" or "bias"; query, key and value where they are apart. Within a
# block and a patch merging names follow that of the block. {stage} counts from 0, {before} is the stage before
_TIMM = {
    "patch_embedding": "patch_embed.proj.",
    "patch_norm": "patch_embed.norm.",
    "merging": "layers.{stage}.downsample.",
    "merging/norm": "norm.",
    "merging/reduction": "reduction.",
    "block": "layers.{stage}.blocks.{block}.",
    "block/norm1": "norm1.",
    "block/attention/relative_position_table": "attn.relative_position_bias_table",
    "block/attention/qkv": "attn.qkv.",
    "block/attention/projection": "attn.proj.",
    "block/norm2": "norm2.",
    "block/mlp_in": "mlp.fc1.",
    "block/mlp_out": "mlp.fc2.",
}
_TRANSFORMERS = _TIMM | {
    "patch_embedding": "embeddings.patch_embeddings.projection.",
    "patch_norm": "embeddings.norm.",
    "merging": "encoder.layers.{before}.downsample.",
    "block": "encoder.layers.{stage}.blocks.{block}.",
    "block/norm1": "layernorm_before.",
    "block/attention/relative_position_table": "attention.self.relative_position_bias_table",
    "block/attention/qkv": "attention.self.query. attention.self.key. attention.self.value.",
    "block/attention/projection": "attention.output.dense.",
    "block/norm2": "layernorm_after.",
    "block/mlp_in": "intermediate.dense.",
    "block/mlp_out": "output.dense.",
}
_OPENAI = {
    "token_embedding": "token_embedding.",
    "position_embedding": "positional_embedding",
    "block": "transformer.resblocks.{block}.",
    "block/norm1": "ln_1.",
    "block/qkv": "attn.in_proj_",
    "block/projection": "attn.out_proj.",
    "block/norm2": "ln_2.",
    "block/mlp_in": "mlp.c_fc.",
    "block/mlp_out": "mlp.c_proj.",
    "norm": "ln_final.",
    "projection/kernel": "text_projection",
}
LAYOUTS: dict[str, dict[str, dict[str, str]]] = {
    "swin": {
        "microsoft": _TIMM | {"merging": "layers.{before}.downsample."},  # the Swin repository
        "timm": _TIMM,
        "torchvision": _TIMM
        | {
            "patch_embedding": "features.0.0.",
            "patch_norm": "features.0.2.",
            "merging": "features.{even}.",
            "block": "features.{odd}.{block}.",
            "block/mlp_in": "mlp.0.",
            "block/mlp_out": "mlp.3.",
        },
        "transformers": _TRANSFORMERS,
        # names of the modules in transformers 5, which differ from those of its files
        "transformers_modules": _TRANSFORMERS
        | {
            "block/attention/relative_position_table": "attention.relative_position_bias.relative_position_bias_table",
            "block/attention/qkv": "attention.q_proj. attention.k_proj. attention.v_proj.",
            "block/attention/projection": "attention.o_proj.",
            "block/mlp_in": "mlp.fc1.",
            "block/mlp_out": "mlp.fc2.",
        },
    },
    "clip_text": {
        "openai": _OPENAI,
        "open_clip": _OPENAI,
        "transformers": {
            "token_embedding": "text_model.embeddings.token_embedding.",
            "position_embedding": "text_model.embeddings.position_embedding.weight",
            "block": "text_model.encoder.layers.{block}.",
            "block/norm1": "layer_norm1.",
            "block/qkv": "self_attn.q_proj. self_attn.k_proj. self_attn.v_proj.",
            "block/projection": "self_attn.out_proj.",
            "block/norm2": "layer_norm2.",
            "block/mlp_in": "mlp.fc1.",
            "block/mlp_out": "mlp.fc2.",
            "norm": "text_model.final_layer_norm.",
            "projection": "text_projection.",
        },
    },
}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_NAME = re.compile(r"(?:swin|text_encoder)/(?:(?:stage(\d)_)?(block|merging)(\d*)/)?(.+)")
# wrappers of whole models; any number of them may stand before a name
_PREFIXES = re.compile(r"^((module|model|state_dict|backbone|swin|clip|text|text_model)\.)+")
# what classifiers and CLIP have beyond a tower
_BEYOND = {
    "swin": re.compile(
        r"(norm|layernorm|head|head\.fc|classifier)\.(weight|bias)|.*(relative_position_index|attn_mask)"
    ),
    "clip_text": re.compile(
        r"(visual|vision_model|visual_projection)\..*|logit_scale|logit_bias|input_resolution|context_length|vocab_size"
        r"|attn_mask|embeddings\.position_ids"
    ),
}
_DEEPEST = 64  # blocks looked for in a stage
_TO_OURS, _TO_THEIRS = (2, 3, 1, 0), (3, 2, 0, 1)  # axes of convolutions; of matrices both are swapped


class Found(NamedTuple):
    """A tower found in a checkpoint."""

    layout: str
    params: dict[str, np.ndarray]  # by our names
    left_out: list[str]  # names of the checkpoint


def from_checkpoint(part: str, weights: Mapping[str, np.ndarray], *, what: str) -> Found:
    """Returns the tower `part` of a checkpoint in any known layout; types of numbers stay as they are.

    Raises:
      ValueError: no known layout, or missing, unexpected or reshaped names, with the nearest known layout.
    """
    names = {_short(name): name for name in weights}
    if len(names) < len(weights):
        twice = min(weights.keys() - names.values())
        raise ValueError(f"{what} holds several models: {twice} is there under another prefix too; save one of them")
    tables = {(key, layout): _table(key, layout) for key in LAYOUTS for layout in LAYOUTS[key]}
    num_known = {
        place: sum(name in names for theirs in table.values() for name in theirs) for place, table in tables.items()
    }
    nearest, layout = max(num_known, key=lambda place: num_known[place])
    if not num_known[nearest, layout]:
        known = "; ".join(f"{key}: {', '.join(LAYOUTS[key])}" for key in LAYOUTS)
        raise ValueError(f"{what}: not one of its {len(names)} names is of a known layout ({known})")
    if nearest != part:
        raise ValueError(f"{what} holds no {part} but {nearest} in the layout {layout}: convert {nearest}")

    table = {name: theirs for name, theirs in tables[part, layout].items() if any(short in names for short in theirs)}
    sizes = {
        name: _turn(weights[names[theirs[0]]], name, theirs[0], _TO_OURS).shape
        for name, theirs in table.items()
        if len(theirs) == 1
    }
    blank = {name: np.broadcast_to(np.float32(0), shape) for name, shape in _expected(part, table, sizes).items()}
    want = {_short(name): value.shape for name, value in _renamed(part, blank, layout).items()}
    left_out = [name for short, name in names.items() if short not in want and _BEYOND[part].fullmatch(short)]
    have = {short: weights[name].shape for short, name in names.items() if name not in left_out}
    if lines := differences(have, want):
        near = f"nearest known layout: {layout}, {len(have.keys() & want.keys())} of {len(want)} names"
        raise ValueError(f"{what} is no complete {part} ({near}):\n" + "\n".join(lines))
    params = {}
    for name in blank:
        parts = [weights[names[short]] for short in table[name]]
        params[name] = np.ascontiguousarray(_turn(np.concatenate(parts), name, table[name][0], _TO_OURS))
    return Found(layout, params, left_out)


def to_checkpoint(part: str, params: Mapping[str, np.ndarray], *, layout: str, what: str) -> Found:
    """Returns the tower `part` under the names of a layout; what the layout has no place for is left out.

    Raises:
      ValueError: unknown layout, or parameters that are missing, unexpected or of another shape.
    """
    if layout not in LAYOUTS[part]:
        raise ValueError(f"layout {layout!r} is unknown; allowed for {part}: {', '.join(LAYOUTS[part])}")
    mine = {name: params[name] for name in params if name.startswith(f"{ROOTS[part]}/") and name not in FRESH}
    shapes = {name: value.shape for name, value in mine.items()}
    if lines := differences(shapes, _expected(part, shapes, shapes)):
        raise ValueError(f"{what} is no complete {part}:\n" + "\n".join(lines))
    renamed = {name: np.ascontiguousarray(value) for name, value in _renamed(part, mine, layout).items()}
    return Found(layout, renamed, [name for name in params if name not in mine])


def swin_shapes(width: int, depths: Sequence[int], tables: Sequence[Shape]) -> dict[str, Shape]:
    """Returns our names and shapes of a backbone; `tables` has the shape of a relative-position table a stage."""
    shapes = {"swin/patch_embedding/kernel": (4, 4, 3, width), "swin/patch_embedding/bias": (width,)}
    shapes |= _norm("swin/patch_norm", width)
    for stage, (depth, table) in enumerate(zip(depths, tables, strict=True), start=1):
        if stage > 1:
            merging = f"swin/stage{stage}_merging"
            shapes |= _norm(f"{merging}/norm", 4 * width) | {f"{merging}/reduction/kernel": (4 * width, 2 * width)}
            width *= 2
        for block in range(depth):
            name = f"swin/stage{stage}_block{block}"
            shapes |= {f"{name}/attention/relative_position_table": table} | _block(name, width, "attention/")
    return shapes


def text_shapes(width: int, depth: int, *, positions: int, embed_dim: int) -> dict[str, Shape]:
    """Returns our names and shapes of a text tower."""
    root = "text_encoder"
    shapes = _norm(f"{root}/norm", width) | {f"{root}/token_embedding/embedding": (VOCABULARY_SIZE, width)}
    shapes |= {f"{root}/position_embedding": (positions, width), f"{root}/projection/kernel": (width, embed_dim)}
    for block in range(depth):
        shapes |= _block(f"{root}/block{block}", width, "")
    return shapes


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}/scale": (width,), f"{name}/bias": (width,)}


def _block(name: str, width: int, attention: str) -> dict[str, Shape]:
    shapes = _norm(f"{name}/norm1", width) | _norm(f"{name}/norm2", width)
    for part, inputs, outputs in (
        (f"{attention}qkv", width, 3 * width),
        (f"{attention}projection", width, width),
        ("mlp_in", width, 4 * width),
        ("mlp_out", 4 * width, width),
    ):
        shapes |= {f"{name}/{part}/kernel": (inputs, outputs), f"{name}/{part}/bias": (outputs,)}
    return shapes


def _expected(part: str, names: Iterable[str], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Returns all names and shapes of the tower that `names` are of; sizes are what most of `shapes` agree on."""
    depths: collections.Counter[int] = collections.Counter()
    for name in names:
        if (match := _NAME.fullmatch(name)) and match[2] == "block":
            stage = int(match[1] or 1)
            depths[stage] = max(depths[stage], int(match[3]) + 1)

    def size(pattern: str, axis: int) -> int:
        sizes = [shape[axis] for name, shape in shapes.items() if re.fullmatch(pattern, name) and len(shape) > axis]
        return collections.Counter(sizes).most_common(1)[0][0] if sizes else 0

    if part == "clip_text":
        return text_shapes(
            size(r"text_encoder/(.*/)?norm\d?/scale", 0),
            max(depths[1], 1),
            positions=size("text_encoder/position_embedding", 0),
            embed_dim=size("text_encoder/projection/kernel", 1),
        )
    tables = [rf"swin/stage{stage}_block\d+/attention/relative_position_table" for stage in range(1, 5)]
    return swin_shapes(
        size(r"swin/patch_.*/(scale|bias)", 0),
        [max(depths[stage], 1) for stage in range(1, 5)],
        [(size(table, 0), size(table, 1)) for table in tables],
    )


def _table(part: str, layout: str) -> dict[str, list[str]]:
    """Returns, for every name that a tower of ours can have, a layout's names without prefix."""
    if part == "swin":
        deepest = swin_shapes(1, [_DEEPEST] * 4, [()] * 4)
    else:
        deepest = text_shapes(1, _DEEPEST, positions=1, embed_dim=1)
    return {name: [_short(theirs) for theirs in _names(part, layout, name)] for name in deepest}


def _short(name: str) -> str:
    """Returns a checkpoint's name without the wrappers before it."""
    return _PREFIXES.sub("", name)


def _names(part: str, layout: str, name: str) -> list[str]:
    """Returns a layout's names for a parameter of ours: one, or three where query, key and value are apart."""
    stems = LAYOUTS[part][layout]
    match = _NAME.fullmatch(name)
    assert match
    number, scope, block, path = match.groups()
    before = ""
    if scope:
        stage = int(number or 1) - 1
        numbers = {"stage": stage, "before": stage - 1, "even": 2 * stage, "odd": 2 * stage + 1, "block": block}
        before, path = stems[scope].format(**numbers), f"{scope}/{path}"
    if path in stems:
        return [before + stems[path]]
    module, _, leaf = path.rpartition("/")
    return [f"{before}{stem}{_LEAVES[leaf]}" for stem in stems[module].split()]


def _renamed(part: str, params: Mapping[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """Returns the parameters as a layout has them."""
    renamed: dict[str, np.ndarray] = {}
    for name, value in params.items():
        names = _names(part, layout, name)
        turned = _turn(value, name, names[0], _TO_THEIRS)
        renamed |= zip(names, np.split(turned, len(names)) if len(names) > 1 else [turned], strict=True)
    return renamed


def _turn(value: np.ndarray, name: str, theirs: str, axes: tuple[int, ...]) -> np.ndarray:
    """Returns a kernel with its axes as the other side has them."""
    if not name.endswith("/kernel") or not theirs.endswith("weight"):
        return value
    return value.transpose(axes) if value.ndim == 4 else value.T
