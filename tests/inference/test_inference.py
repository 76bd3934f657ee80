"""Fused scores against brute force, boxes in original coordinates, the vocabulary, and the Predictor."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from PIL import Image

from detclipv2_jax.colors import color_of
from detclipv2_jax.data import transforms
from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.inference import Found, Limits, Photos, Predictor, vocabulary
from detclipv2_jax.inference.detect import detect
from detclipv2_jax.models.detclip import Regions
from detclipv2_jax.visualize import alignment

CANVAS = (48, 64)
ANCHORS = anchor_lib.grid(CANVAS).boxes
SCALE, BIAS = 0.5, -1.0
OPTIONS = {"score_threshold": 0.1, "nms_iou": 0.5, "pre_nms": 60, "max_detections": 25}


def _case(*, ties: bool, num_images: int = 3, num_words: int = 12):
    """Returns regions, words and photos; with ties embeddings are small integers, so that many scores are equal."""
    rng = np.random.default_rng(int(ties))
    shape = (num_images, len(ANCHORS))
    if ties:
        embeddings, text = rng.integers(-1, 2, (*shape, 4)), rng.integers(-1, 2, (num_words, 4))
        centerness = rng.integers(0, 2, shape)
    else:
        embeddings, text = rng.normal(size=(*shape, 4)), rng.normal(size=(num_words, 4))
        centerness = rng.normal(size=shape)
    deltas = rng.normal(size=(*shape, 4)) * 2
    regions = Regions(*(jnp.asarray(x, jnp.float32) for x in (embeddings, deltas, centerness)), None)
    extent = jnp.array([[48, 64], [30, 64], [48, 40]][:num_images], jnp.int32)
    original = jnp.array([[96, 128], [15, 32], [144, 120]][:num_images], jnp.int32)
    photos = Photos(None, extent, extent / original, original)
    return regions, jnp.asarray(text, jnp.float32), photos


@functools.partial(jax.jit, static_argnames=("word_chunk", "pre_nms", "max_detections", "class_agnostic", "score"))
def _detect(regions, text, text_mask, photos, word_chunk, **options):
    options = {"limits": Limits(**options), "word_chunk": word_chunk}
    return detect(regions, text, text_mask, photos, anchors=ANCHORS, scale=SCALE, bias=BIAS, **options)


def _oracle(
    regions, text, text_mask, photos, *, score_threshold, nms_iou, pre_nms, max_detections, class_agnostic, own=None
):
    """Every score, a stable sort over (anchor, word), decoding and greedy NMS as loops; yields rows of each image."""
    for i in range(len(regions.centerness)):
        # the same arithmetic as the program: the order of nearly equal scores is not what is tested here
        logits = SCALE * jnp.asarray(regions.embeddings[i]) @ text.T + BIAS
        scores = np.array(jax.nn.sigmoid(logits) * jax.nn.sigmoid(regions.centerness[i])[:, None])
        center_x, center_y = (ANCHORS[:, 0] + ANCHORS[:, 2]) / 2, (ANCHORS[:, 1] + ANCHORS[:, 3]) / 2
        height, width = np.asarray(photos.extent[i])
        if own is not None:
            scores = np.array(own[i])[:, None]
        scores[(center_x >= width) | (center_y >= height)] = 0
        scores[:, ~np.asarray(text_mask)[: scores.shape[1]]] = 0
        order = np.argsort(-scores.reshape(-1), kind="stable")[:pre_nms]
        kept = []
        for anchor, word in zip(*np.divmod(order, scores.shape[1]), strict=True):
            if scores[anchor, word] <= score_threshold:
                continue
            x1, y1, x2, y2 = ANCHORS[anchor]
            dx, dy, dw, dh = np.asarray(regions.box_deltas[i, anchor], np.float64) * (0.1, 0.1, 0.2, 0.2)
            w, h = (x2 - x1) * np.exp(dw), (y2 - y1) * np.exp(dh)
            x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
            box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
            box /= np.asarray(photos.scale[i])[[1, 0, 1, 0]]
            box = np.clip(box, 0, np.asarray(photos.original_size[i])[[1, 0, 1, 0]])
            if (box[2] - box[0]) * (box[3] - box[1]) <= 0:
                continue
            if all(_iou(box, b) <= nms_iou for b, _, c in kept if class_agnostic or c == word):
                kept.append((box, scores[anchor, word], word))
        yield kept[:max_detections]


def _iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_detect_equals_brute_force(ties, class_agnostic):
    regions, text, photos = _case(ties=ties)
    text_mask = jnp.arange(12) < 10
    found = _detect(regions, text, text_mask, photos, word_chunk=4, class_agnostic=class_agnostic, **OPTIONS)
    expected = list(_oracle(regions, text, text_mask, photos, class_agnostic=class_agnostic, **OPTIONS))
    assert any(len(rows) == OPTIONS["max_detections"] for rows in expected) or class_agnostic
    for i, rows in enumerate(expected):
        assert rows
        assert found.mask[i].sum() == len(rows)
        boxes, scores, words = map(np.array, zip(*rows, strict=True))
        np.testing.assert_array_equal(found.labels[i][: len(rows)], words)
        np.testing.assert_allclose(found.scores[i][: len(rows)], scores, rtol=1e-6)
        np.testing.assert_allclose(found.boxes[i][: len(rows)], boxes, atol=1e-3)
        for array in (found.boxes, found.scores, found.labels, found.mask):
            assert not array[i][len(rows) :].any()


@pytest.mark.parametrize(
    ("score", "pre_nms"), [("centerness", 20), ("objectness", 60), ("centerness_objectness", 500)]
)  # fewer candidates than boxes that may be found, some of the anchors, more than there are
def test_proposals_are_scored_without_words_and_called_by_the_best_one(score, pre_nms):
    regions, text, photos = _case(ties=False)
    objectness = jnp.asarray(np.random.default_rng(1).normal(size=regions.centerness.shape), jnp.float32)
    regions = regions.replace(objectness=objectness)
    text_mask = jnp.arange(12) < 10
    options = OPTIONS | {"pre_nms": pre_nms, "nms_iou": 0.7}
    found = _detect(regions, text, text_mask, photos, word_chunk=4, class_agnostic=True, score=score, **options)
    heads = {"centerness": jax.nn.sigmoid(regions.centerness), "objectness": jax.nn.sigmoid(objectness)}
    own = np.prod([heads[name] for name in score.split("_")], axis=0) ** (1 / len(score.split("_")))
    expected = list(_oracle(regions, text, text_mask, photos, class_agnostic=True, own=own, **options))
    every = _oracle(regions, text, text_mask, photos, class_agnostic=True, own=own, **options | {"pre_nms": 500})
    assert (sum(map(len, expected)) < sum(map(len, every))) == (pre_nms == 20)
    for i, rows in enumerate(expected):
        boxes, scores, _ = map(np.array, zip(*rows, strict=True))
        assert found.mask[i].sum() == len(rows) > 1
        np.testing.assert_allclose(found.scores[i][: len(rows)], scores, rtol=1e-6)
        np.testing.assert_allclose(found.boxes[i][: len(rows)], boxes, atol=1e-3)
        best = np.argmax(np.asarray(regions.embeddings[i]) @ np.asarray(text[:10]).T, axis=1)
        anchors = [np.argmin(abs(own[i] - value)) for value in scores]
        np.testing.assert_array_equal(found.labels[i][: len(rows)], best[anchors])
        assert not found.labels[i][len(rows) :].any()
    if score != "centerness":
        with pytest.raises(ValueError, match="needs a model with the extra head"):
            _detect(regions.replace(objectness=None), text, text_mask, photos, word_chunk=4, score=score, **OPTIONS)


@pytest.mark.parametrize("ties", [False, True])
def test_chunks_and_padding_change_nothing(ties):
    regions, text, photos = _case(ties=ties)
    padded, mask = vocabulary.pad(np.asarray(text), multiple=16)
    assert padded.shape == (16, 4)
    whole = _detect(regions, padded, mask, photos, word_chunk=16, **OPTIONS)
    parts = _detect(regions, text, np.ones(12, bool), photos, word_chunk=4, **OPTIONS)
    # sums of another chunk width may differ in the last bit
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), whole, parts)


def test_more_candidates_change_nothing_once_they_fill_the_detections():
    """Then the result is that of all pairs, which are more than mmdetection's 1,000 anchors a level with all words."""
    regions, text, photos = _case(ties=False, num_images=1)
    options = OPTIONS | {"score_threshold": 0.0, "max_detections": 20}
    found = {
        pre_nms: _detect(regions, text, jnp.ones(12, bool), photos, word_chunk=4, **options | {"pre_nms": pre_nms})
        for pre_nms in (20, 200, 12 * len(ANCHORS))
    }
    few, enough, every = found.values()
    assert enough.mask.all()
    jax.tree.map(np.testing.assert_array_equal, enough, every)
    assert few.mask.sum() < 20


def test_more_room_than_pairs():
    regions, text, photos = _case(ties=False, num_images=1, num_words=1)
    options = OPTIONS | {"pre_nms": 500, "max_detections": 500, "nms_iou": 1.0, "score_threshold": 0.0}
    found = _detect(regions, text, jnp.ones(1, bool), photos, word_chunk=1, **options)
    assert 0 < found.mask.sum() <= len(ANCHORS)


def test_a_score_of_exactly_the_threshold_is_none():
    regions, text, photos = _case(ties=False, num_images=1)
    regions = regions.replace(embeddings=jnp.zeros_like(regions.embeddings))  # every score is sigmoid(BIAS) / 2
    regions = regions.replace(centerness=jnp.zeros_like(regions.centerness))
    run = functools.partial(_detect, regions, text, jnp.ones(12, bool), photos, word_chunk=4)
    score = run(**OPTIONS | {"score_threshold": 0.0}).scores[0, 0]
    np.testing.assert_allclose(score, jax.nn.sigmoid(BIAS) * 0.5, rtol=1e-6)
    for threshold, some in ((score, False), (np.nextafter(score, np.float32(0)), True)):
        assert run(**OPTIONS | {"score_threshold": threshold}).mask.any() == some


def test_word_count_must_fill_the_chunks():
    regions, text, photos = _case(ties=False)
    with pytest.raises(ValueError, match=r"12 words are no multiple of word_chunk=5; use vocabulary\.pad"):
        _detect(regions, text, jnp.ones(12, bool), photos, word_chunk=5, **OPTIONS)


def test_memory_does_not_grow_with_the_vocabulary():
    grid, dim = anchor_lib.grid((800, 1344)).boxes, 512
    shape = jax.ShapeDtypeStruct
    embeddings, deltas = shape((1, len(grid), dim), jnp.bfloat16), shape((1, len(grid), 4), jnp.float32)
    regions = Regions(embeddings, deltas, shape((1, len(grid)), jnp.float32), None)
    sizes, scales = shape((1, 2), jnp.int32), shape((1, 2), jnp.float32)
    limits = Limits(score_threshold=0.0, nms_iou=0.6, pre_nms=1000, max_detections=300)
    run = jax.jit(functools.partial(detect, anchors=grid, scale=1.0, bias=-4.6, limits=limits))
    temporary = {}
    for num_words in (1203, 21_000):
        rows = -(-num_words // 128) * 128
        text, mask = shape((rows, dim), jnp.float32), shape((rows,), bool)
        compiled = run.lower(regions, text, mask, Photos(None, sizes, scales, sizes)).compile()
        temporary[num_words] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary[21_000] <= 1.2 * temporary[1203]
    assert temporary[21_000] < len(grid) * 21_000 * 4 / 20  # a 20th of the scores that are never held


def test_panorama_lands_on_its_object():
    """Regions made by hand for a 3:1 photo: one cell knows the object, given in the photo's coordinates."""
    size, canvas = (1000, 3000), (64, 128)
    truth = np.array([2100.0, 300.0, 2500.0, 700.0])
    out = np.zeros((*canvas, 3), np.uint8)
    extent, original = transforms.place(
        np.zeros((*size, 3), np.uint8), out, annotated_size=(0, 0), short_side=64, long_side=128
    )
    assert (extent, original) == ((43, 128), size)  # the long side bounds it
    grid = anchor_lib.grid(canvas).boxes
    scale = np.array(extent) / original
    target = truth * scale[[1, 0, 1, 0]]
    anchor = int(np.argmin(np.abs((grid[:, :2] + grid[:, 2:]) / 2 - (target[:2] + target[2:]) / 2).sum(1)))
    side, size = grid[anchor, 2:] - grid[anchor, :2], target[2:] - target[:2]
    shift = (target[:2] + target[2:] - grid[anchor, :2] - grid[anchor, 2:]) / 2
    deltas = np.zeros((1, len(grid), 4), np.float32)
    deltas[0, anchor] = np.concatenate([shift / side / 0.1, np.log(size / side) / 0.2])
    embeddings = np.zeros((1, len(grid), 2), np.float32)
    embeddings[0, anchor, 1] = 1.0
    below = int(np.flatnonzero((grid[:, 1] + grid[:, 3]) / 2 >= extent[0])[0])
    embeddings[0, below, 1] = 2.0  # a better score, on the padding: must not count
    regions = Regions(*map(jnp.asarray, (embeddings, deltas, np.zeros((1, len(grid)), np.float32))), None)
    limits = Limits(score_threshold=0.4, nms_iou=0.6, pre_nms=100, max_detections=5)
    run = jax.jit(functools.partial(detect, anchors=grid, scale=8.0, bias=-4.0, limits=limits, word_chunk=2))
    photos = Photos(None, np.array([extent]), np.float32(scale[None]), np.array([original]))
    found = run(regions, jnp.eye(2), jnp.ones(2, bool), photos)
    assert found.mask[0].tolist() == [True, False, False, False, False]
    assert found.labels[0, 0] == 1
    np.testing.assert_allclose(found.boxes[0, 0], truth, atol=0.05)


# --- the model compiled, and the Predictor


@pytest.fixture(scope="module")
def predictor():
    return Predictor(*planted.make())


def test_predictor_finds_words_on_images_of_any_size(predictor, tmp_path):
    truth = {"red": (2100, 300, 2500, 700), "blue": (300, 500, 900, 900)}
    panorama = planted.paint((1000, 3000), truth)
    Image.fromarray(panorama).save(tmp_path / "panorama.png")
    upright = np.ascontiguousarray(panorama.transpose(1, 0, 2))
    small = planted.paint((40, 50), {"red": (10, 10, 30, 30)})
    options = {"score_threshold": 0.1, "max_detections": 5}
    found = predictor([tmp_path / "panorama.png", upright, small], ["blue", "red"], batch_size=2, **options)
    assert [image.size for image in found] == [(1000, 3000), (3000, 1000), (40, 50)]
    for image, swap in ((found[0], [0, 1, 2, 3]), (found[1], [1, 0, 3, 2])):
        for name, box in truth.items():
            best = image.names.index(name)
            # a canvas pixel is 23 px of the photo, and the planted model rounds to whole pixels
            np.testing.assert_allclose(image.boxes[best], np.array(box)[swap], atol=24)
    assert set(found[2].names) == {"red"}
    np.testing.assert_allclose(found[2].boxes[0], [10, 10, 30, 30], atol=1)
    alone = predictor([panorama, small], {"blue": "", "red": ""}, **options)
    for a, b in zip([found[0], found[2]], alone, strict=True):
        np.testing.assert_allclose(a.boxes, b.boxes, rtol=1e-5)
        assert a.names == b.names


def test_every_image_is_found_once_in_batches_of_one_size(predictor, monkeypatch):
    sizes, predict = [], predictor.detector.predict

    def counted(params, photos, *more):
        sizes.append(len(photos.image))
        return predict(params, photos, *more)

    monkeypatch.setattr(predictor.detector, "predict", counted)
    image = planted.paint((40, 50), {"red": (10, 10, 30, 30)})
    assert [i for i, _ in predictor.iterate([image] * 3, ["red"], batch_size=2)] == [0, 1, 2]
    assert sizes == [2, 2]


def test_what_was_found_is_written_and_drawn(monkeypatch):
    boxes = np.array([[2.3333, 4, 20, 18.66666], [20, 10, 40, 30]], np.float32)
    found = Found(boxes, np.array([0.9, 0.3], np.float32), np.array([1, 0]), ("cat", "dog"), (60, 80))
    assert [line.split()[:2] for line in str(found).splitlines()[1:]] == [["0.90", "dog"], ["0.30", "cat"]]
    assert found.to_coco(image_id=3) == [
        {"image_id": 3, "category_id": 2, "bbox": [2.333, 4.0, 17.667, 14.667], "score": 0.9, "name": "dog"},
        {"image_id": 3, "category_id": 1, "bbox": [20.0, 10.0, 20.0, 20.0], "score": 0.3, "name": "cat"},
    ]
    pixels = np.full((60, 80, 3), 128, np.uint8)
    first = Found(boxes[:1], found.scores[:1], found.labels[:1], found.vocabulary, found.size).plot(pixels)
    for options in ({"max_drawn": 1}, {"min_score": 0.31}):
        np.testing.assert_array_equal(found.plot(pixels, **options), first)
    assert not np.array_equal(found.plot(pixels, min_score=0.3), first)
    assert first.size == (900, 675)  # enlarged, so that labels can be read
    assert found.plot(np.zeros((1200, 1000, 3), np.uint8)).size == (1000, 1200)
    for shape in ((1, 1200), (1200, 1)):
        assert found.plot(np.zeros((*shape, 3), np.uint8)).size == shape[::-1]
    places = np.flatnonzero((np.asarray(first) == np.array(color_of("dog"))).all(-1).any(axis=0))  # columns
    assert abs(places.min() - 2.3333 * 900 / 80) < 4
    # a photo that was read at half its size
    monkeypatch.setattr(transforms, "read", lambda path: transforms.Photo(pixels, (120, 160)))
    twice = Found(2 * boxes, found.scores, found.labels, found.vocabulary, (120, 160))
    np.testing.assert_array_equal(twice.plot("a.jpg"), found.plot(pixels))


def test_predictor_says_what_is_wrong(predictor, tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="words must be a list of words, or a dict name → definition, but are 'red'"):
        predictor([image], "red")
    with pytest.raises(ValueError, match="texts that are not empty"):
        predictor([image], ["red", " "])
    for pixels in (image / 255, image[..., 0], image[..., [0, 1, 2, 2]], image[:0], image[None]):
        with pytest.raises(ValueError, match=r"cannot read the image array: it is .*, not RGB uint8"):
            predictor([pixels], ["red"])
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*text\.jpg: not an image"):
        predictor([tmp_path / "text.jpg"], ["red"])
    with pytest.raises(ValueError, match=r"cannot read the image .*absent\.jpg: .*No such file"):
        predictor([tmp_path / "absent.jpg"], ["red"])
    with pytest.raises(ValueError, match=r"nms_iou is 1\.5; it must lie between 0 and 1"):
        predictor([image], ["red"], nms_iou=1.5)
    with pytest.raises(ValueError, match="max_detections is 0; it must lie between 1 and 100,000"):
        predictor([image], ["red"], max_detections=0)


def test_predictor_aligns_captions_of_any_number_of_phrases(predictor):
    image, sizes = planted.paint((64, 128), {"red": (5, 5, 35, 35)}), []
    for num in (1, 2, 7, 8):
        found = predictor.align([image], [f"{color} {i}" for i, color in enumerate(["red", "blue"] * 4)][:num])
        assert found.scores.tolist() == [10.0, 0.0, 10.0, 0.0, 10.0, 0.0, 10.0, 0.0][:num]
        sizes.append(predictor.detector.align._cache_size())
    assert len(set(sizes)) == 1  # one program for all


def test_predictor_aligns_a_caption(predictor):
    images = [planted.paint((60, 100), {"red": (5, 5, 35, 35)}), planted.paint((90, 60), {"blue": (5, 5, 40, 40)})]
    found = predictor.align(images, ["red", "blue"], index=0)
    assert found.scores.tolist() == [10.0, 0.0]
    assert found.ranks.tolist() == [1, 2]
    assert found.maps.shape == (2, 8, 13)  # 60 x 100 px shown as 64 x 107
    assert found.maps[0].max() == 10.0
    np.testing.assert_allclose(found.boxes[0], [5, 5, 35, 35], atol=1)
    other = predictor.align(images, ["red", "blue"], index=1)  # on another canvas, which is 128 px high
    assert other.scores.tolist() == [0.0, 10.0]
    assert other.ranks.tolist() == [2, 1]
    assert other.maps.shape == (2, 12, 8)  # 90 x 60 px shown as 96 x 64
    np.testing.assert_allclose(other.boxes[1], [5, 5, 40, 40], atol=1)


def test_phrases_are_looked_for_one_by_one_in_eights(predictor, monkeypatch):
    asked = []

    def ground(params, photos, phrases, limits):
        asked.append((photos.image.shape, len(phrases), limits))
        return phrases

    monkeypatch.setattr(predictor.detector, "ground", ground)
    phrases = np.arange(18.0).reshape(9, 2)
    found = predictor.ground(planted.paint((64, 128), {}), phrases, max_detections=7)
    np.testing.assert_array_equal(found, phrases)
    ((shape, num, limits),) = asked
    assert (shape, num) == ((1, 64, 128, 3), 16)
    assert (limits.max_detections, limits.score, limits.class_agnostic) == (7, "words", False)


def test_a_photo_is_put_on_the_canvas_that_shows_it_largest(monkeypatch):
    config, model, params = planted.make()
    config.eval.canvases = ((64, 64), (128, 64), (64, 128), (64, 192), (128, 128))
    config.eval.short_side, config.eval.long_side = 128, 192
    predictor = Predictor(config, model, params)
    shapes = {
        (64, 64): (128, 128), (50, 100): (64, 128), (60, 180): (64, 192), (180, 60): (128, 64), (100, 50): (128, 64)
    }  # fmt: skip
    for size, canvas in shapes.items():
        photo = predictor._photo(np.zeros((*size, 3), np.uint8))
        assert photo.image.shape[:2] == canvas, size  # of equals the smallest
        np.testing.assert_allclose(photo.scale, photo.extent / np.array(size), rtol=1e-6)
        assert photo.original_size.tolist() == list(size)
    given = predictor.photos([np.zeros((60, 180, 3), np.uint8), np.zeros((100, 50, 3), np.uint8)], index=1)
    assert given.image.shape == (2, 128, 64, 3)


def test_words_of_the_model_are_looked_for_where_none_are_given(caplog):
    predictor = Predictor(*planted.make())
    predictor.words = {"red": "a colour", "blue": ""}
    assert predictor.vocabulary()[0] == ("red", "blue")
    assert predictor.vocabulary(["blue"])[0] == ("blue",)
    seen = []
    predictor._embed._encode = lambda texts: seen.extend(texts) or np.zeros((len(texts), 2), np.float32)
    predictor.vocabulary(["other " * 20])
    assert "have more than 16 tokens and lose their end" in caplog.text
    predictor.vocabulary({"cat": "a pet", "dog": ""})
    assert seen[1:] == ["cat, a pet", "dog"]


def test_the_alignment_of_a_photo_is_drawn_from_a_checkpoint(predictor, tmp_path):
    images = [planted.paint((60, 100), {"red": (5, 5, 35, 35)}), planted.paint((60, 100), {"blue": (5, 5, 40, 40)})]
    Image.fromarray(images[0]).save(tmp_path / "photo.png")
    path = tmp_path / "figure.png"
    picture = alignment.draw(predictor, [tmp_path / "photo.png", images[1]], ["red", "blue"], caption="a", path=path)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
    other = alignment.draw(predictor, images, ["red", "blue"], index=1, caption="a")
    nameless = alignment.draw(predictor, images, ["red", "blue"], caption="a")
    assert nameless.shape == other.shape
    assert not np.array_equal(nameless, other)
    title = len(picture) - len(nameless)  # the file's name stands above
    assert title > 0
    np.testing.assert_array_equal(picture[title:], nameless)


def test_limits_take_the_given_values_only():
    config = planted.make()[0].eval
    limits = Limits.from_config(config, nms_iou=0.0, max_detections=4000)
    assert (limits.score_threshold, limits.nms_iou, limits.max_detections) == (config.score_threshold, 0.0, 4000)
    assert limits.pre_nms == 4000  # no fewer candidates than detections
    assert Limits.from_config(config, max_detections=config.pre_nms - 1).pre_nms == config.pre_nms
    assert Limits.from_config(config, max_detections=100_000).max_detections == 100_000
    for name in ("score_threshold", "nms_iou"):
        assert getattr(Limits.from_config(config, **{name: 1.0}), name) == 1.0
        for value in (-0.01, 1.01, 1.9):
            with pytest.raises(ValueError, match=f"{name} is {value}; it must lie between 0 and 1"):
                Limits.from_config(config, **{name: value})
    assert Limits.from_config(config, max_detections=1).max_detections == 1
    assert (limits.score, limits.class_agnostic) == ("words", False)
    assert Limits.from_config(config, score="centerness").class_agnostic
    with pytest.raises(ValueError, match="score is 'iou'; allowed are words, centerness, objectness, "):
        Limits.from_config(config, score="iou")
    for num in (0, 100_001):
        with pytest.raises(ValueError, match=f"max_detections is {num}; it must lie between 1 and 100,000"):
            Limits.from_config(config, max_detections=num)


@pytest.mark.parametrize("num", [3, 0])
def test_what_was_found_becomes_detections_of_supervision(num, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=types.SimpleNamespace))
    boxes = np.arange(4.0 * num).reshape(num, 4)
    found = Found(boxes, np.linspace(0.9, 0.1, num), np.arange(num) % 2, ("a", "b"), (8, 8))
    detections = found.to_supervision()
    assert detections.xyxy.shape == (num, 4)
    np.testing.assert_array_equal(detections.xyxy, boxes)
    np.testing.assert_array_equal(detections.confidence, np.linspace(0.9, 0.1, num).astype(np.float32))
    assert detections.class_id.tolist() == [0, 1, 0][:num]
    assert detections.data["class_name"].tolist() == ["a", "b", "a"][:num]
