"""FLOPs: by formula against traced programs, and traced against XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from detclipv2_jax import config as config_lib
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.models import flops
from detclipv2_jax.models.swin import Swin
from detclipv2_jax.models.text_encoder import TextEncoder


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
        (Kind.GROUNDING, (1344, 800), "global", {"deformable": False}),
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

    for function, times in ((loss, 1), (jax.grad(loss), 3)):
        traced = flops.of(function, params)
        xla = jax.jit(function).lower(params).cost_analysis()["flops"]
        assert traced <= xla <= 1.05 * traced
        assert traced == pytest.approx(times * 512 * 2 * flops.formula_text(_text_config(model)), rel=0.05)


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
    conv = jax.grad(lambda k: jnp.sum(_conv(jnp.zeros((1, 16, 16, 4)), k)))
    assert flops.of(conv, jnp.zeros((3, 3, 4, 8))) == pytest.approx(2 * 2 * 8 * 8 * 9 * 4 * 8, rel=0.2)


def _conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
