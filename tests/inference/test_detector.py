"""The compiled functions of a model: on one device and on eight, texts in batches of few sizes, closed vocabularies."""

import functools
import re
import types

import jax
import numpy as np
import planted
import pytest
from jax.sharding import NamedSharding

from detclipv2_jax.inference import Detector, Limits, Photos, detector, vocabulary
from detclipv2_jax.runs import sharding


def photos_of(num):
    """Returns photos with a red and a blue thing each."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(num):
        x, y = rng.integers(0, 40, 2)
        images.append(planted.paint((64, 128), {"red": (x, y, x + 24, y + 20), "blue": (x + 50, y, x + 80, y + 24)}))
    sizes = np.full((num, 2), (64, 128), np.int32)
    return Photos(np.stack(images), sizes, np.ones((num, 2), np.float32), sizes)


def test_each_phrase_is_found_as_if_it_were_the_only_word():
    config, model, params = planted.make()
    limits, photos = Limits.from_config(config.eval, max_detections=7), photos_of(1)
    compute = Detector(model)
    phrases = np.float32([[0, 1], [1, 0], [0.6, 0.8]])
    found = compute.ground(params, photos, phrases, limits)
    assert found.mask.any(axis=1).all()
    for i, phrase in enumerate(phrases):
        alone = compute.predict(params, photos, *vocabulary.pad(phrase[None], multiple=128), limits)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b[0], rtol=1e-6), found, alone)


def test_one_device_equals_eight():
    config, model, params = planted.make()
    photos = photos_of(8)
    limits = Limits.from_config(config.eval)
    one, mesh = Detector(model), sharding.make_mesh(fsdp=2)
    eight = Detector(model, mesh=mesh)
    texts = ["red", "blue"]
    np.testing.assert_array_equal(one.encode_vocabulary(params, texts), eight.encode_vocabulary(params, texts))
    text, mask = vocabulary.pad(one.encode_vocabulary(params, texts), multiple=128)
    split = Photos(*(jax.device_put(x, NamedSharding(mesh, sharding.BATCH)) for x in photos))
    found = eight.predict(params, split, text, mask, limits)
    assert found.boxes.sharding.is_fully_replicated
    expected = one.predict(params, photos, text, mask, limits)
    assert expected.mask.any(axis=1).all()
    # nothing but the results moves between devices; left alone, the partitioner gathers the scores of all images
    program = eight.predict.lower(params, split, text, mask, limits).compile().as_text()
    moved = re.findall(r"(\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", program)
    shapes = {(re.sub(r"\{.*", "", shape), kind) for shape, kind in moved}
    results = ("f32[8,300,4]", "f32[8,300]", "s32[8,300]", "pred[8,300]")
    assert shapes == {(shape, "all-gather") for shape in results}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), expected, found)


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [8]), (8, [8]), (9, [16]), (16, [16]), (256, [256]), (257, [256, 256])]
)
def test_texts_are_encoded_in_batches_of_few_sizes(count, sizes):
    detector, seen = Detector(planted.make()[1]), []

    def encode(params, tokens):
        seen.append(len(tokens))
        return tokens[:, :1] * params

    detector._compiled_encode = encode
    tokens = np.arange(2 * count).reshape(count, 2)
    np.testing.assert_array_equal(detector.encode_tokens(3, tokens), 3 * tokens[:, :1])
    assert seen == sizes


def test_a_batch_of_texts_is_a_multiple_of_the_devices():
    compute, seen = Detector(planted.make()[1], mesh=sharding.make_mesh(devices=jax.devices()[:3])), []
    compute._compiled_encode = lambda params, tokens: seen.append(len(tokens)) or tokens[:, :1]
    tokens = np.arange(24).reshape(12, 2)
    np.testing.assert_array_equal(compute.encode_tokens(None, tokens), tokens[:, :1])
    assert seen == [18]  # 16, and so many more that three devices have alike


def test_words_that_a_closed_vocabulary_lacks_are_refused():
    model = planted.Planted({"context_length": 16, "classes": ("red", "blue")})
    params = planted.make()[2]
    assert len(Detector(model).encode_vocabulary(params, ["blue"])) == 1
    with pytest.raises(ValueError, match="words: 1 of 2 texts are none of the 2 classes"):
        Detector(model).encode_vocabulary(params, ["red", "green"])


def test_a_batch_is_put_on_the_devices_as_it_is():
    rng = np.random.default_rng(0)
    batch = types.SimpleNamespace(
        image=rng.integers(0, 255, (8, 4, 6, 3), np.uint8), extent=rng.integers(1, 9, (8, 2)), more=None,
        scale=rng.random((8, 2), np.float32), original_size=rng.integers(1, 99, (8, 2)),
    )  # fmt: skip
    model = planted.make()[1]
    for mesh in (None, sharding.make_mesh(fsdp=2)):
        photos = Detector(model, mesh=mesh).to_global(batch)
        for name, array in zip(Photos._fields, photos, strict=True):
            np.testing.assert_array_equal(array, getattr(batch, name))
            assert mesh is None or array.sharding == NamedSharding(mesh, sharding.BATCH)


def test_an_accelerator_that_is_not_used_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(detector, "warn_of_unused_accelerator", lambda: said.append(1))
    Detector(planted.make()[1])
    assert said == [1]
