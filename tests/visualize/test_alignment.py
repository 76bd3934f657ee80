"""Best regions, ranks and maps against brute force; pictures of a batch."""

import functools

import jax
import numpy as np
import planted
from PIL import Image

from detclipv2_jax.data import tokenizer
from detclipv2_jax.data.schema import Batch
from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.inference import Detector, Photos
from detclipv2_jax.inference.detect import align
from detclipv2_jax.models.detclip import Regions
from detclipv2_jax.runs import sharding
from detclipv2_jax.visualize.alignment import draw_batch

CANVAS = (48, 64)
ANCHORS = anchor_lib.grid(CANVAS).boxes
SCALE = 0.5


def level_of(anchor):
    """Returns how many levels lie below an anchor's."""
    return int(np.searchsorted(np.cumsum(anchor_lib.grid(CANVAS).levels), anchor, side="right"))


def test_align_equals_brute_force():
    rng = np.random.default_rng(0)
    shape = (3, len(ANCHORS))
    values = (rng.normal(size=(*shape, 4)), rng.normal(size=(*shape, 4)), rng.normal(size=shape))
    regions = Regions(*(value.astype(np.float32) for value in values), None)
    extent = np.array([[48, 64], [30, 64], [48, 40]], np.int32)
    original = np.array([[96, 128], [15, 32], [144, 120]], np.int32)
    photos = Photos(None, extent, (extent / original).astype(np.float32), original)
    phrases, index = rng.normal(size=(3, 4)).astype(np.float32), 1
    found = jax.jit(functools.partial(align, canvas=CANVAS, scale=SCALE))(regions, phrases, photos, index=index)
    similarity = SCALE * np.einsum("bad,md->bma", regions.embeddings, phrases)
    center = (ANCHORS[:, :2] + ANCHORS[:, 2:]) / 2
    outside = (center[None, :, ::-1] >= np.asarray(photos.extent)[:, None]).any(-1)
    similarity = np.where(outside[:, None], -np.inf, similarity)
    best = similarity.max(-1)
    np.testing.assert_allclose(found.scores, best[index], rtol=1e-5)
    for box, anchor in zip(found.boxes, similarity[index].argmax(-1), strict=True):
        (dx, dy, dw, dh), size = regions.box_deltas[index, anchor] * (0.1, 0.1, 0.2, 0.2), 8 * 8 * 2 ** level_of(anchor)
        (x, y), (w, h) = center[anchor] + np.array([dx, dy]) * size, np.exp([dw, dh]) * size
        expected = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * (original / extent)[index][[1, 0, 1, 0]]
        np.testing.assert_allclose(box, np.clip(expected, 0, original[index][[1, 0, 1, 0]]), atol=1e-3)
    np.testing.assert_array_equal(found.ranks, 1 + (best > best[index]).sum(0))
    maps = found.photo_maps(photos.extent[index])
    assert maps.shape == (3, 4, 8)  # 30 x 64 px of P3, whose cells are 8 px
    assert np.isfinite(maps).all()
    np.testing.assert_allclose(maps.max((1, 2)), best[index], rtol=1e-5)
    for extent in ([48, 64], [28, 29], [4, 13], [1, 1]):  # rows and columns whose centre lies on the photo
        on_photo = [max(sum(8 * i + 4 < side for i in range(8)), 1) for side in extent]
        assert found.photo_maps(np.array(extent)).shape == (3, *np.minimum(on_photo, [6, 8]))
    # place (y, x) of P3 holds the best of the five cells above it
    starts = np.cumsum([0, *anchor_lib.grid(CANVAS).levels])
    cells = [starts[i] + (2 >> i) * -(-8 >> i) + (5 >> i) for i in range(5)]
    np.testing.assert_allclose(maps[:, 2, 5], similarity[index][:, cells].max(-1), rtol=1e-5)


def test_pictures_of_a_batch(tmp_path):
    """On 8 devices; the photo that shows red is the first of its phrase, the one that does not is behind it."""
    _, model, params = planted.make()
    image = np.stack([planted.paint((64, 128), {"red": (10, 10, 40, 50)} if i == 1 else {}) for i in range(8)])
    sizes = np.full((8, 2), (64, 128), np.int32)
    rows = np.tile([0, 1, 2], (8, 1))
    batch = Batch(
        image=image, extent=sizes, scale=np.ones((8, 2), np.float32), original_size=sizes, image_mask=np.ones(8, bool),
        example_id=np.arange(8), boxes=np.zeros((8, 0, 4)), box_mask=np.zeros((8, 0), bool),
        box_concepts=np.zeros((8, 0)),
        concept_tokens=tokenizer.tokenize(["a red thing", "red", "blue"]), concept_mask=np.ones(3, bool),
        concept_ids=np.zeros((3, 2)), caption_concepts=rows, caption_mask=np.tile([True, True, False], (8, 1)),
    )  # fmt: skip
    detector = Detector(model, mesh=sharding.make_mesh(fsdp=2))
    found = []
    align_compiled = detector.align
    detector.align = lambda *arguments: found.append(align_compiled(*arguments)) or found[0]
    draw_batch(detector, params, batch, num_pictures=2, folder=tmp_path, name="align")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["align_0.jpg", "align_1.jpg"]
    assert found[0].ranks[:, 1].tolist() == [2, 1]
    np.testing.assert_allclose(found[0].boxes[1, 1], [10, 10, 40, 50], atol=0.5)
    with Image.open(tmp_path / "align_1.jpg") as picture:
        assert picture.size[0] > 3 * 440
        assert np.asarray(picture).std() > 10
