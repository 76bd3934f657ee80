"""The regions that a batch's texts choose, and the points that a steered deformable layer samples."""

import types

import jax
import numpy as np
import planted
import pytest
from micro import micro_config

from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.inference import Photos, Predictor
from detclipv2_jax.models import detclip
from detclipv2_jax.models.detclip import Regions
from detclipv2_jax.runs import state as train_state
from detclipv2_jax.visualize import figures, panels, regions


@pytest.fixture
def drawn(monkeypatch):
    """What the pictures were made of."""
    calls = {}
    for module, name in ((figures, "detections"), (panels, "sampling")):
        original = getattr(module, name)

        def spy(*arguments, name=name, original=original, **options):
            calls[name] = (arguments, options)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, spy)
    return calls


def test_texts_of_other_images_choose_regions_too(drawn, tmp_path):
    """Only the other image's caption says blue, but the photo shows it: then its region takes part."""
    config, model, params = planted.make()
    config.loss.num_proposals, config.loss.selection_pre_nms = 2, 64
    boxes = {"red": (10, 10, 40, 50), "blue": (70, 5, 120, 60)}
    photo = planted.paint((64, 128), boxes)
    predictor = Predictor(config, model, params)
    other = planted.paint((64, 128), {})
    picture = regions.draw_proposals(predictor, [photo, other], [["red"], ["blue"]], path=tmp_path / "a.png")
    (_, found, labels, names), options = drawn["detections"]
    assert [names[label] for label in labels] == ["red", "blue"]
    np.testing.assert_allclose(found, list(boxes.values()), atol=1e-3)
    np.testing.assert_allclose(options["scores"], 10.0)
    assert (tmp_path / "a.png").exists()
    assert picture.std() > 10
    with pytest.raises(ValueError, match="2 images have 1 lists of texts"):
        regions.draw_proposals(predictor, [photo, other], [["red"]])


@pytest.mark.slow
def test_sampling_shows_the_offsets(drawn):
    """All offsets (dy, dx) = (1, -0.5) cells, all weights sigmoid(2); the photo is twice as large as the canvas."""
    config = micro_config()
    model = detclip.from_config(config.model)
    init = jax.jit(lambda key: train_state.init_params(model, key, context_length=16))
    params = jax.device_get(init(jax.random.key(0)))
    params["head"]["deformable"]["steering"]["bias"] = np.array([1.0, -0.5] * 9 + [2.0] * 9, np.float32)
    photo = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    picture = regions.draw_sampling(Predictor(config, model, params), photo, ["red star", "cat"])
    _, options = drawn["sampling"]
    step = 2 * options["strides"][:, None]  # px of the photo a cell
    moved = options["points"] - options["regular"]
    np.testing.assert_allclose(moved[..., 0], np.broadcast_to(-0.5 * step, (2, 9)), rtol=1e-5)
    np.testing.assert_allclose(moved[..., 1], np.broadcast_to(step, (2, 9)), rtol=1e-5)
    np.testing.assert_allclose(options["regular"][:, 8] - options["regular"][:, 4], np.tile(step, 2), rtol=1e-5)
    np.testing.assert_allclose(options["weights"], 1 / (1 + np.exp(-2)), rtol=1e-6)
    assert picture.std() > 10
    config.model.head.deformable = False
    with pytest.raises(ValueError, match="has no deformable layer"):
        regions.draw_sampling(Predictor(config, model, params), photo, ["cat"])


def test_points_are_of_the_best_region_on_the_photo_and_in_its_pixels(drawn, monkeypatch):
    """The photo was scaled by 1/2 in y and by 1/4 in x, and the best anchor of all lies on the padding."""
    canvas, place, padding = (64, 96), 9, 8 * 12 - 1  # anchors of P3: the 10th of the first row, the last
    grid = anchor_lib.grid(canvas)
    embeddings = np.zeros((1, len(grid.boxes), 2), np.float32)
    embeddings[0, place, 0], embeddings[0, padding, 0] = 1.0, 2.0
    on_photo = np.ones(embeddings.shape[:2], bool)
    on_photo[0, padding] = False
    nothing = np.zeros((*embeddings.shape[:2], 9, 2), np.float32)
    found = regions.Anchors(
        Regions(embeddings, None, None, None), grid.boxes[None], nothing, nothing[..., 0], on_photo, 1.0, 0.0
    )
    monkeypatch.setattr(regions, "look", lambda *arguments: found)
    photos = Photos(np.zeros((1, *canvas, 3), np.uint8), [[56, 96]], np.array([[0.5, 0.25]]), np.array([[112, 384]]))
    predictor = types.SimpleNamespace(
        config=micro_config(), detector=None, params=None, photos=lambda images: photos,
        vocabulary=lambda phrases: (phrases, np.array([[1.0, 0.0]]), None),
    )  # fmt: skip
    regions.draw_sampling(predictor, np.zeros((112, 384, 3), np.uint8), ["cat"])
    options = drawn["sampling"][1]
    # its centre is at (76, 4) px of the canvas, its cells are 8 px: 16 and 32 px of the photo
    np.testing.assert_allclose(options["regular"][0, 4], [76 * 4, 4 * 2])
    np.testing.assert_allclose(np.ptp(options["regular"][0], axis=0), [2 * 32, 2 * 16])
    np.testing.assert_array_equal(options["points"], options["regular"])
    assert options["strides"].tolist() == [8]
