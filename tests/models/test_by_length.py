"""Texts in groups by length: the same embeddings and gradients as of one group, whatever the batch holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.models import flops, split
from detclipv2_jax.models.by_length import encode_by_length, num_rows
from detclipv2_jax.models.text_encoder import TextEncoder
from detclipv2_jax.preflight import hlo
from detclipv2_jax.runs import sharding

EOS = 49_407
ROWS = 16  # of a device
GROUPS = ((16, 0.25), (7, 0.5))
MODEL = TextEncoder(32, 2, 2, context_length=16, embed_dim=24)


def texts(lengths):
    """Returns tokens and mask of texts of so many tokens each; 0: a row that is not used."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, EOS - 1, (len(lengths), 16))
    place, lengths = np.arange(16)[None], np.array(lengths)[:, None]
    tokens = np.where(place < lengths - 1, tokens, np.where(place == lengths - 1, EOS, 0)).astype(np.int32)
    return tokens, lengths[:, 0] > 0


def encode(params, tokens):
    return MODEL.apply({"params": params}, tokens)


def one_length(params, tokens, mask, bar):
    return jnp.sum(jnp.where(mask[:, None], encode(params, tokens), 0.0) * bar)


def by_length(params, tokens, mask, bar):
    text, is_full = encode_by_length(encode, params, tokens, mask, GROUPS)
    return jnp.sum(text * bar), (text, is_full)


@functools.cache
def compiled(num_devices):
    mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))["params"]
    return mesh, params, jax.jit(jax.value_and_grad(by_length, has_aux=True)), jax.jit(jax.grad(one_length))


LONG, SHORT, UNUSED = [16, 9, 12, 8], [7, 3, 5, 4, 7, 6, 3, 7], [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("num_devices", "lengths", "is_full"),
    [
        (1, [*SHORT[:3], *LONG, *SHORT[3:], *UNUSED], False),  # every group is filled to its last row
        (1, [*SHORT, *LONG[:2], *UNUSED, 0, 0], False),  # short ones have room among the long ones
        (1, [*SHORT, *LONG, 8, 0, 0, 0], True),  # one text is too long for its group
        (1, [*SHORT, *LONG, 3, 0, 0, 0], True),  # one row too many
        (1, [16] * ROWS, True),
        (1, [0] * ROWS, False),
        (2, [*SHORT, *LONG, *UNUSED, *UNUSED, *SHORT, *LONG], False),
        (2, [*SHORT, *LONG, *UNUSED, *LONG, *LONG, *SHORT], True),  # on the second device alone
    ],
)
def test_groups_change_no_embedding_and_no_gradient(num_devices, lengths, is_full):
    mesh, params, function, reference = compiled(num_devices)
    tokens, mask = texts(lengths)
    bar = np.random.default_rng(0).normal(size=(len(lengths), 24)).astype(np.float32)
    place = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    with jax.set_mesh(mesh):
        given = [jax.device_put(x, place) for x in (tokens, mask, bar)]
        (_, (text, full)), gradient = function(params, *given)
        expected = reference(params, *given)
    whole = encode(params, tokens)
    np.testing.assert_allclose(text, np.where(mask[:, None], whole, 0.0), rtol=1e-4, atol=1e-5)
    assert bool(full) == is_full
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, expected)


def test_shares_are_of_a_devices_rows_and_never_more_than_all():
    assert num_rows(((16, 0.2), (8, 0.5)), 9) == [(16, 2), (8, 5)]  # rounded up: what a share promises has room
    assert num_rows(((16, 0.5), (8, 0.5)), 7) == [(16, 4), (8, 3)]
    assert num_rows((), 7) == []


def test_arithmetic_is_that_of_the_groups_alone():
    _, params, _, _ = compiled(1)
    tokens, mask = texts([16] * ROWS)

    def forward(params, groups):
        return encode_by_length(encode, params, tokens, mask, groups)[0]

    second = flops.of(encode, params, tokens)  # a count takes the second pass, too
    groups = flops.of(encode, params, tokens[:4]) + flops.of(encode, params, tokens[:8, :7])
    assert flops.of(functools.partial(forward, groups=GROUPS), params) - second == groups
    assert groups < 0.5 * second


def test_preflight_counts_no_second_pass():
    mesh, params, function, _ = compiled(1)
    tokens, mask = texts([16] * ROWS)
    with jax.set_mesh(mesh):
        program = function.lower(params, tokens, mask, np.zeros((ROWS, 24), np.float32)).compile().as_text()
    assert f"{split.RARELY}/" in program
    rows = hlo.traffic(program).rows
    assert rows
    assert not [row for row in rows if f"{split.RARELY}/" in row.place]
