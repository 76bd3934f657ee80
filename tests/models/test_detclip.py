"""The whole detector: outputs, what is invariant, what receives gradients, names and sizes of its parameters."""

import dataclasses
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_gradients import check, seeded_params

from detclipv2_jax.config import base, parameter_groups
from detclipv2_jax.config import model as model_config
from detclipv2_jax.geometry import anchors
from detclipv2_jax.models import detclip
from detclipv2_jax.runs.optimizer import overview

import cases  # isort: skip  (beside the fixtures; golden_gradients adds their folder)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CANVAS = (64, 96)
TOKENS = np.array([[49406, 320, 49407, 0], [49406, 1929, 2368, 49407]], np.int32)


def small(**changes):
    """Returns a configuration that compiles in seconds, with changes given as dotted keys (`__` for the dots)."""
    config = model_config("nano")
    config.swin.embed_dim, config.swin.depths = 8, (1, 2, 1, 1)
    config.swin.num_heads = (1, 1, 2, 2)
    config.head.channels, config.head.num_convs, config.head.num_groups = 16, 1, 4
    config.text.width, config.text.num_layers, config.embed_dim = 16, 1, 8
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def images(count=2, canvas=CANVAS):
    """Returns (uint8 images, extents), the last image smaller than the canvas."""
    image = np.random.default_rng(0).integers(0, 256, (count, *canvas, 3), np.uint8)
    extent = np.full((count, 2), canvas, np.int32)
    extent[-1] -= [13, 22]
    return image, extent


def init(model, canvas=CANVAS):
    """Returns initial variables with offsets that are not zero, so that the deformable layer does something."""
    image, extent = images(1, canvas)
    variables = jax.jit(lambda key: model.init(key, image, extent, TOKENS, train=False))(jax.random.key(0))

    def steer(path, leaf):
        noise = 0.05 * jax.random.normal(jax.random.key(1), leaf.shape)
        return leaf + noise if "steering" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(steer, variables)


@pytest.fixture(scope="module")
def detector():
    """Returns (model, variables)."""
    model = detclip.from_config(small())
    return model, init(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("objectness", ["none", "classification", "iou"])
def test_shapes_and_types(dtype, objectness):
    model = detclip.from_config(small(dtype=dtype, head__objectness=objectness))
    image, extent = images()
    params = jax.eval_shape(lambda key: model.init(key, image, extent, TOKENS, train=False), jax.random.key(0))
    regions, text = jax.eval_shape(
        lambda v: (
            model.apply(v, image, extent, train=False, method="encode_image"),
            model.apply(v, TOKENS, method="encode_text"),
        ),
        params,
    )
    count = sum(anchors.grid(CANVAS).levels)
    assert (regions.embeddings.shape, regions.embeddings.dtype) == ((2, count, 8), jnp.dtype(dtype))
    assert (regions.box_deltas.shape, regions.box_deltas.dtype) == ((2, count, 4), jnp.float32)
    assert (regions.centerness.shape, regions.centerness.dtype) == ((2, count), jnp.float32)
    assert (regions.objectness is None) == (objectness == "none")
    if objectness != "none":
        assert (regions.objectness.shape, regions.objectness.dtype) == ((2, count), jnp.float32)
    assert (text.shape, text.dtype) == ((2, 8), jnp.float32)


def test_embeddings_are_normalized_and_start_with_the_prior(detector):
    model, variables = detector
    image, extent = images()
    regions = jax.jit(lambda v: model.apply(v, image, extent, train=False, method="encode_image"))(variables)
    text = jax.jit(lambda v: model.apply(v, TOKENS, method="encode_text"))(variables)
    np.testing.assert_allclose(np.linalg.norm(regions.embeddings, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(text, axis=-1), 1, atol=1e-5)
    tokens = jax.jit(lambda v: model.apply(v, TOKENS, method="encode_tokens"))(variables)
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(tokens[np.arange(len(TOKENS)), TOKENS.argmax(axis=1)], text, atol=1e-5)
    scale, bias = model.apply(variables, method="logit_parameters")
    assert (scale, jax.nn.sigmoid(bias)) == (10.0, pytest.approx(0.01))
    plain = detclip.from_config(small(logit__normalize_regions=False))
    raw = jax.jit(lambda v: plain.apply(v, image, extent, train=False, method="encode_image"))(variables).embeddings
    length = np.linalg.norm(raw, axis=-1, keepdims=True)
    assert length.std() > 0
    np.testing.assert_allclose(raw / length, regions.embeddings, atol=1e-5)


def test_what_the_padding_holds_does_not_matter(detector):
    model, variables = detector
    image, extent = images()
    run = jax.jit(lambda v, image: model.apply(v, image, extent, train=False, method="encode_image"))
    other = image.copy()
    other[-1, extent[-1, 0] :] = 7
    other[-1, :, extent[-1, 1] :] = 255
    assert not np.array_equal(image, other)
    jax.tree.map(np.testing.assert_array_equal, run(variables, image), run(variables, other))


def test_images_do_not_influence_each_other(detector):
    model, variables = detector
    image, extent = images()
    run = jax.jit(lambda v, image, extent: model.apply(v, image, extent, train=False, method="encode_image"))
    together, alone = run(variables, image, extent), run(variables, image[::-1], extent[::-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[::-1], atol=1e-5), together, alone)


@pytest.mark.slow
def test_regions_and_gradients_equal_torch():
    case = cases.WHOLE
    head = case.head._asdict()
    config = small(
        embed_dim=head.pop("embed_dim"),
        logit__normalize_regions=False,
        **{f"head__{key}": value for key, value in head.items()},
        **{f"swin__{key}": value for key, value in case.swin._asdict().items()},
    )
    model = detclip.from_config(config)
    image, extent = case.images()
    params = seeded_params("", model, image, extent, train=False, method="encode_image")
    logit = {name: params.pop(name) for name in ("logit_scale", "logit_bias")}

    def run(params, _):
        regions = model.apply({"params": params | logit}, image, extent, train=False, method="encode_image")
        return {field.name: getattr(regions, field.name) for field in dataclasses.fields(regions)}

    check("detector", run, params=params)


def gradients(config, variables, output):
    """Returns the gradient of a weighted sum of one output of the image side; squares are blind to unit vectors."""
    model = detclip.from_config(config)
    image, extent = images()

    @jax.jit
    def gradient(variables):
        def loss(variables):
            regions = model.apply(variables, image, extent, train=False, method="encode_image")
            value = getattr(regions, output)
            return jnp.sum(value * jnp.cos(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape))

        return jax.grad(loss)(variables)["params"]

    return gradient(variables)


def size(tree):
    """Returns the largest absolute entry."""
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_classes_train_the_box_tower_through_the_offsets_only(detector):
    _, variables = detector
    config = small(logit__normalize_regions=False)
    head = gradients(config, variables, "embeddings")["head"]
    assert size(head["box_tower"]) > 0
    assert size(head["deformable"]["steering"]) > 0
    assert size(head["class_tower"]) > 0
    for outputs in ("box_deltas", "centerness", "level_scales"):
        assert size(head[outputs]) == 0.0
    rest = {key: value for key, value in variables["params"]["head"].items() if key != "deformable"}
    without = {"params": variables["params"] | {"head": rest}}
    plain = gradients(small(logit__normalize_regions=False, head__deformable=False), without, "embeddings")["head"]
    assert size(plain["box_tower"]) == 0.0


def test_boxes_do_not_train_the_class_branch(detector):
    _, variables = detector
    for output in ("box_deltas", "centerness"):
        head = gradients(small(), variables, output)["head"]
        assert size(head["box_tower"]) > 0
        assert size([head["class_tower"], head["deformable"], head["embedding"]]) == 0.0


@pytest.mark.slow
def test_recomputation_changes_no_gradient(detector):
    _, variables = detector
    plain = gradients(small(), variables, "embeddings")
    recomputed = gradients(small(remat="all"), variables, "embeddings")  # of blocks alone: test_swin.py
    scale = size(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), plain, recomputed)


@pytest.mark.slow
def test_what_is_computed_again_is_not_kept(detector):
    _, variables = detector
    image, extent = images()

    def kept_bytes(remat):  # between the passes: what the function that pulls back the gradient closes over
        model = detclip.from_config(small(remat=remat))

        def pull(variables):
            return jax.vjp(lambda v: model.apply(v, image, extent, train=False, method="encode_image"), variables)[1]

        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(pull, variables)))

    kept = {remat: kept_bytes(remat) for remat in detclip.REMATS}
    assert kept["all"] < kept["blocks"] < 0.7 * kept["none"], kept
    b, height, width, _ = image.shape
    values = (depth * 8 * 2**i * (height >> i) * (width >> i) for i, depth in enumerate(small().swin.depths))
    attention = b * sum(values) // 16  # one value a channel of every cell of every block
    assert kept["blocks_but_attention"] - kept["blocks"] >= 4 * attention, kept
    assert kept["blocks_but_attention"] < 0.8 * kept["none"], kept
    assert kept["all"] < kept["heads"] < 0.95 * kept["none"], kept


@pytest.mark.slow
def test_both_forms_of_the_deformable_layer_agree_within_the_model(detector):
    _, variables = detector
    gather, banded = (
        gradients(small(head__deform_impl=impl), variables, "embeddings") for impl in ("gather", "banded")
    )
    scale = size(gather)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), gather, banded)


def parameter_shapes(name):
    """Returns the parameters' shapes of a named size."""
    model = detclip.from_config(model_config(name))
    image, extent = images(1, (64, 64))
    tokens = np.zeros((1, 16), np.int32)
    return jax.eval_shape(lambda key: model.init(key, image, extent, tokens, train=False), jax.random.key(0))["params"]


def count(tree):
    """Returns the number of entries."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def test_parameter_counts_of_the_paper():
    shapes = parameter_shapes("swin_l")
    assert count(shapes["text_encoder"]) == pytest.approx(63.4e6, abs=0.1e6)
    assert count(shapes) == pytest.approx(267e6, rel=0.02)
    assert count(parameter_shapes("swin_t")["swin"]) == pytest.approx(27.5e6, rel=0.01)


@pytest.mark.parametrize("name", ["nano", "swin_l"])
def test_parameters_are_the_golden_ones(name):
    """Names, shapes and groups are a public format: REWRITE_GOLDEN=1 rewrites the files after a deliberate change."""
    groups = base().optimizer.groups if name == "swin_l" else parameter_groups(text_factor=1.0)
    table = overview(parameter_shapes(name), groups) + "\n"
    path = GOLDEN / f"parameters_{name}.txt"
    if os.environ.get("REWRITE_GOLDEN"):
        path.write_text(table)
    assert table == path.read_text()


def test_every_parameter_is_in_the_group_its_name_says():
    groups = base().optimizer.groups
    for name in ("nano", "swin_l"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(parameter_shapes(name)):
            path = jax.tree_util.keystr(path, simple=True, separator="/")
            _, factor, decay = next(group for group in groups if re.fullmatch(group[0], path))
            assert factor == (0.1 if path.startswith("text_encoder") else 1.0), path
            assert decay == path.endswith("kernel"), path
            assert decay == (leaf.ndim > 1 and not re.search("embedding$|table$", path)), path


def test_lengths_are_of_float32_whatever_comes_in():
    x = np.random.default_rng(0).normal(size=(64, 512)) * 30
    for dtype in (jnp.bfloat16, jnp.float32):
        found = detclip.l2_normalize(jnp.asarray(x, dtype))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    assert not np.any(detclip.l2_normalize(jnp.zeros((1, 4))))
    assert np.isfinite(jax.grad(lambda x: jnp.sum(detclip.l2_normalize(x)))(jnp.zeros((1, 4)))).all()


def test_a_closed_vocabulary_needs_the_tokens_of_its_classes():
    config = small(text__classes=("cat", "dog"))
    tokens = np.arange(2 * 16).reshape(2, 16)
    assert detclip.from_config(config, class_tokens=tokens).class_tokens == tuple(map(tuple, tokens))
    for given in (None, tokens[:1]):
        with pytest.raises(ValueError, match=f"{0 if given is None else 1} rows of tokens for 2 classes"):
            detclip.from_config(config, class_tokens=given)
