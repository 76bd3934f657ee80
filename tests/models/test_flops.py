"""FLOPs: by formula against traced programs, and traced against XLA's own count."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax import config as config_lib
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.models import flops
from detclipv2_jax.models.swin import Swin
from detclipv2_jax.models.text_encoder import TextEncoder
from detclipv2_jax.runs import sharding


def small(**head):
    """A configuration as wide as the real ones, but shallow: counting takes no time, tracing does."""
    c = config_lib.base()
    c.model.swin.depths, c.model.text.num_layers, c.model.head.num_convs = (1, 1, 1, 1), 1, 1
    c.model.head.update(head)
    return c


@pytest.mark.parametrize(
    ("kind", "canvas", "scope", "head"),
    [
        (Kind.DETECTION, (800, 1344), "global", {}),
        (Kind.IMAGE_TEXT, (320, 320), "device", {"objectness": "iou"}),
    ],
)
def test_formula_is_near_the_traced_program(kind, canvas, scope, head):
    config = small(**head)
    config.loss.selection_scope = scope
    counts = {"table_rows": 12_800, "num_devices": 32}
    for num_concepts in (0, 9_000):
        traced = flops.of_step(config, kind, canvas, **counts)(num_concepts)
        assert flops.formula(config, kind, canvas, num_concepts=num_concepts, **counts) == pytest.approx(
            traced, rel=0.05
        )


def test_what_is_added_counts_in_the_formula_as_in_the_traced_program():
    """A small output, and all else; sides that no window divides."""
    canvas, counts = (96, 160), {"table_rows": 40, "num_devices": 2}

    def both(**changes):
        config = config_lib.base()
        config.model = config_lib.model("nano")
        config.detection.batch_size = 8
        for section, change in changes.items():
            config.model[section].update(change)
        formula = flops.formula(config, Kind.DETECTION, canvas, num_concepts=30, **counts)
        return np.array([formula, flops.of_step(config, Kind.DETECTION, canvas, **counts)(30)])

    base = both()
    assert base[0] == pytest.approx(base[1], rel=0.005)
    for changes in (
        {"head": {"objectness": "iou"}},
        {"head": {"deformable": False}, "swin": {"depths": (2, 1, 3, 2)}, "text": {"num_layers": 3}},
    ):
        formula, traced = both(**changes) - base
        assert formula == pytest.approx(traced, rel=0.01), changes


def test_texts_in_groups_by_length_cost_what_their_groups_take():
    config, counts = config_lib.base(), {"table_rows": 400, "num_devices": 2, "num_concepts": 30}
    config.model = config_lib.model("nano")

    def both():
        traced = flops.of_step(config, Kind.GROUNDING, (64, 64), table_rows=400, num_devices=2)(30)
        return np.array([flops.formula(config, Kind.GROUNDING, (64, 64), **counts), traced])

    whole = both()
    config.optimizer.text_lengths.grounding = ((12, 0.25), (4, 0.5))
    saved = whole - both()
    rows = {16: 400, 12: -100, 4: -200}
    expected = 2 * flops.TRAINING * sum(num * flops.formula_text(config.model, n) for n, num in rows.items())
    np.testing.assert_allclose(saved, expected, rtol=0.01)


def test_texts_that_are_known_cost_nothing(monkeypatch):
    config = config_lib.base()
    config.model = config_lib.model("nano")
    counts = {"table_rows": 400, "num_devices": 2}

    def formula():
        return flops.formula(config, Kind.DETECTION, (64, 64), num_concepts=30, **counts)

    def of_step():
        return flops.of_step(config, Kind.DETECTION, (64, 64), **counts)(30)

    class Towers:
        def init(self, *_, **__):
            return {}

        def apply(self, params, *given, method, **_):
            rows = {"encode_image": 2, "encode_text": 7}[method]
            return jnp.zeros((rows, 3)) @ jnp.zeros((3, 5))

    monkeypatch.setattr(flops.detclip, "from_config", lambda *_, **__: Towers())
    whole_of_step = of_step()
    whole, texts = formula(), flops.TRAINING * 2 * 400 * flops.formula_text(config.model, 16)
    assert texts > 0.05 * whole
    config.optimizer.text_once = True
    assert whole - formula() == pytest.approx(texts)
    assert whole_of_step - of_step() == flops.TRAINING * 400 * 2 * 7 * 3 * 5
    config.optimizer.text_once, config.model.text.classes = False, ("a", "b")
    assert whole - formula() == pytest.approx(texts)


@pytest.mark.parametrize(
    ("selection", "scope", "canvas", "compared"),
    [
        ("text_batch", "global", (320, 320), 3 * 100 + 2134),
        ("text_batch_centerness", "device", (320, 320), 3 * 100 + 2134 / 4),
        ("text_sample", "global", (320, 320), 3 * 100),
        ("centerness", "global", (64, 64), 3 * 86),  # fewer anchors than proposals
    ],
)
def test_regions_that_are_compared_with_concepts(selection, scope, canvas, compared):
    config = config_lib.base()
    config.loss.selection, config.loss.selection_scope = selection, scope
    assert flops._num_compared(config, "image_text", canvas, 4) == compared
    assert flops._num_compared(config, "grounding", (800, 1344), 4) == 3 * 22_400


def test_every_token_of_every_caption_is_compared():
    config = small()
    config.loss.interaction = "tokens"
    counts = {"table_rows": 1, "num_devices": 1}
    traced = flops.of_step(config, "image_text", (320, 320), **counts)
    assert traced(0) == traced(7)
    formula = flops.formula(config, "image_text", (320, 320), num_concepts=0, **counts)
    assert formula == pytest.approx(traced(0), rel=0.05)
    config.loss.interaction = "phrases"
    b = config.image_text.batch_size
    counts["table_rows"] = b
    phrases = flops.of_step(config, "image_text", (320, 320), **counts)(16 * b)
    projections = 3 * 2 * 15 * b * config.model.text.width * config.model.embed_dim
    assert traced(0) - phrases == pytest.approx(projections)


def test_the_peak_is_of_all_devices_of_a_known_chip():
    def mesh(kind):
        return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind=kind)] * 4), size=4)

    assert flops.peak_per_second(mesh("NVIDIA H100 80GB HBM3")) == 4 * 989e12
    assert flops.peak_per_second(mesh("cpu")) is None


def test_of_the_paper_s_backbones():
    """Its authors give 4.5 and 103.9 G multiplications for 224 and 384 px; the classifier has next to none."""
    for size, side, expected in (("swin_t", 224, 4.5e9), ("swin_l", 384, 103.9e9)):
        model = config_lib.model(size)
        swin = Swin(**model.swin)
        image = jnp.zeros((1, side, side, 3))
        params = jax.eval_shape(lambda s=swin, x=image: s.init(jax.random.key(0), x, train=False))
        traced = flops.of(lambda p, s=swin, x=image: s.apply(p, x, train=False), params)
        assert traced / 2 == pytest.approx(expected, rel=0.02)


def test_traced_programs_agree_with_xla():
    """XLA counts elementwise work too, so it is a little above."""
    model = TextEncoder(256, 1, 4, context_length=16, embed_dim=256)
    tokens = jnp.zeros((512, 16), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(params):
        return jnp.sum(model.apply(params, tokens))

    for function, times in ((loss, 1), (jax.grad(loss), flops.TRAINING)):
        traced = flops.of(function, params)
        xla = jax.jit(function).lower(params).cost_analysis()["flops"]
        assert traced <= xla <= 1.05 * traced
        assert traced == pytest.approx(times * 512 * 2 * flops.formula_text(_text_config(model), 16), rel=0.05)


def _text_config(model):
    c = config_lib.model("nano")
    c.text.width, c.text.num_layers, c.embed_dim = model.width, model.num_layers, model.embed_dim
    return c


def test_loops_devices_and_branches():
    x = jnp.zeros((8, 8))
    product = 2 * 8**3

    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=7)[0]

    assert flops.of(loop, x) == 7 * product
    assert flops.of(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, x), x) == 2 * product
    mesh, rows = sharding.make_mesh(), sharding.BATCH
    split = jax.shard_map(lambda x: x @ jnp.ones((8, 4)), mesh=mesh, in_specs=rows, out_specs=rows)
    assert flops.of(split, jnp.zeros((16, 8))) == 2 * 16 * 8 * 4  # of all devices
    conv = jax.grad(lambda k: jnp.sum(_conv(jnp.zeros((1, 16, 16, 4)), k)))
    assert flops.of(conv, jnp.zeros((3, 3, 4, 8))) == pytest.approx(2 * 2 * 8 * 8 * 9 * 4 * 8, rel=0.2)


def _conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
