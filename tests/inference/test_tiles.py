"""Large photos in tiles: what is cut, what is merged, and that one tile is no tile."""

import os

import numpy as np
import planted
import pytest
from PIL import Image

from detclipv2_jax.data import transforms
from detclipv2_jax.inference import Found, Limits, Predictor, tiles
from detclipv2_jax.inference.tiles import Place


@pytest.fixture(scope="module")
def predictor():
    return Predictor(*planted.make())


def limits(**given):
    return Limits(0.0, 0.6, pre_nms=100, max_detections=10, **given)


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [((100, 300), 100, 0.2), ((257, 130), 64, 0.5), ((99, 101), 50, 0)]
)
def test_tiles_cover_the_photo_and_overlap(size, tile, overlap):
    found = tiles.places(size, tile=tile, overlap=overlap)
    seen = np.zeros(size, int)
    for place in found:
        assert (place.width, place.height) == (tile, tile)
        seen[place.y : place.y + tile, place.x : place.x + tile] += 1
    assert seen.min() >= 1
    for axis in (0, 1):
        starts = np.unique([place[axis] for place in found])
        assert np.diff(starts).max(initial=0) <= tile - int(tile * overlap) + 1
        assert starts[0] == 0
        assert starts[-1] == max(size[1 - axis] - tile, 0)
    assert len(tiles.places((50, 130), tile=50, overlap=0.21)) == 3  # of whole px: 10 of them
    shrunk = [
        tiles.places(size, tile=max(size) - 1, overlap=overlap),
        tiles.places(size, tile=max(size), overlap=overlap),
    ]
    assert [len(places) for places in shrunk] == [2, 1]
    assert shrunk[1] == [Place(0, 0, size[1], size[0])]


def test_a_photo_of_one_tile_is_predicted_as_without_tiles(predictor, tmp_path):
    pixels = planted.paint((100, 300), {"red": (200, 20, 260, 80)})
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    for photo in (pixels, tmp_path / "photo.png"):
        (plain,) = predictor([photo], ["red", "blue"])
        (tiled,) = predictor([photo], ["red", "blue"], tile=300)
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(getattr(tiled, name), getattr(plain, name))
        assert tiled.size == plain.size == (100, 300)


def test_what_is_too_small_on_the_photo_is_found_in_tiles_where_it_is(predictor, tmp_path, monkeypatch):
    box = (1500, 130, 1540, 170)  # less than 3 px of the canvas, which is 128 wide
    pixels = planted.paint((300, 2000), {"red": box, "blue": (100, 10, 1100, 290)})
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=98, subsampling=0)
    asked = {"score_threshold": 0.3, "max_detections": 20}
    assert "red" not in predictor([pixels], ["red", "blue"], **asked)[0].names
    for batch_size, photo in ((3, pixels), (5, tmp_path / "photo.jpg")):
        (found,) = predictor([photo], ["red", "blue"], tile=128, batch_size=batch_size, **asked)
        best = found.boxes[found.names.index("red")]
        np.testing.assert_allclose(best, box, atol=5)
        np.testing.assert_allclose(found.boxes[found.names.index("blue")], (100, 10, 1100, 290), atol=16)
        assert found.size == (300, 2000)
        assert (np.diff(found.scores) <= 0).all()
    monkeypatch.setattr(transforms, "MAX_PIXELS", 300_000)  # it is read at half size
    (found,) = predictor([tmp_path / "photo.jpg"], ["red", "blue"], tile=64, **asked)
    assert found.size == (300, 2000)
    np.testing.assert_allclose(found.boxes[found.names.index("red")], box, atol=16)


def test_several_photos_of_all_sizes_come_back_each_with_its_own(predictor):
    photos = [planted.paint((100, 300), {"red": (10 + 40 * i, 20, 50 + 40 * i, 80)}) for i in range(4)]
    photos.insert(2, planted.paint((64, 64), {"blue": (10, 10, 40, 40)}))
    found = predictor(photos, ["red", "blue"], tile=100, batch_size=4, score_threshold=0.3)
    assert [one.names[0] for one in found] == ["red", "red", "blue", "red", "red"]
    for i, one in zip((0, 1, 2, 3), [*found[:2], *found[3:]], strict=True):
        np.testing.assert_allclose(one.boxes[0], (10 + 40 * i, 20, 50 + 40 * i, 80), atol=5)


def test_parts_of_an_object_go_into_the_whole_one():
    boxes = np.array([[0, 0, 100, 50], [0, 0, 60, 50], [55, 0, 100, 50], [300, 0, 340, 40], [0, 0, 60, 50]], np.float32)
    scores, labels = np.array([0.3, 0.9, 0.5, 0.4, 0.8], np.float32), np.array([0, 0, 0, 0, 1])
    is_cut = np.array([False, True, True, True, True])
    kept, merged = tiles.merge(boxes, scores, labels, is_cut, limits=limits())
    # the parts of label 0 are gone, their whole has the best score; a part without a whole stays, so do other names
    assert kept.tolist() == [0, 4, 3]
    np.testing.assert_allclose(merged[kept], [0.9, 0.8, 0.4])
    boxes[2] = [75, 0, 125, 50]  # just half of it is in the whole: it may be another object
    assert tiles.merge(boxes, scores, labels, is_cut, limits=limits())[0].tolist() == [0, 4, 2, 3]
    boxes[2] = [74, 0, 124, 50]
    assert tiles.merge(boxes, scores, labels, is_cut, limits=limits())[0].tolist() == [0, 4, 3]
    for apart in ([200, 150, 230, 170], [0, 50.5, 60, 51.5], [101, 0, 102, 50]):  # diagonally, a line below, one beside
        boxes[2] = apart
        assert tiles.merge(boxes, scores, labels, is_cut, limits=limits())[0].tolist() == [0, 4, 2, 3]
    # of two that hold it the better one takes its score
    twice = np.array([[0, 0, 60, 50], [0, 0, 100, 50], [0, 0, 109, 90], [0, 0, 140, 140]], np.float32)
    given = np.array([0.9, 0.3, 0.5, 0.4], np.float32)
    kept, merged = tiles.merge(twice, given, np.zeros(4, int), np.array([True] + 3 * [False]), limits=limits())
    np.testing.assert_allclose(merged, [0.9, 0.3, 0.9, 0.4])
    boxes[2] = [55, 0, 100, 50]
    kept, merged = tiles.merge(boxes, scores, labels, np.zeros(5, bool), limits=limits())
    assert kept.tolist() == [1, 4, 2, 3, 0]
    np.testing.assert_array_equal(merged, scores)
    kept, _ = tiles.merge(boxes, scores, labels, np.zeros(5, bool), limits=limits(class_agnostic=True))
    assert kept.tolist() == [1, 2, 3, 0]
    kept, _ = tiles.merge(boxes[:0], scores[:0], labels[:0], is_cut[:0], limits=limits())
    assert kept.tolist() == []


def test_what_was_found_on_tiles_is_put_on_the_photo():
    """The photo was read at half its size; a hundredth of a tile's side from its border a box is cut."""

    def found(**boxes):
        scores = np.array([float(name[1:]) / 10 for name in boxes], np.float32)
        array = np.array(list(boxes.values()), np.float32)
        return Found(array, scores, np.zeros(len(boxes), int), ("a",), (200, 400))

    whole = found(s3=[20, 20, 198, 200])
    left = found(s8=[70, 20, 98, 40], s7=[20, 70, 99, 90])  # 2 px from the border; 1 px, and it is in the whole one
    right = found(s6=[1, 10, 30, 60])  # is in no whole one
    parts = [(whole, None), (left, Place(0, 0, 100, 100)), (right, Place(100, 0, 100, 100))]
    image = tiles._Image((100, 200), np.full(4, 0.5, np.float32), 3, parts)
    merged = tiles._merged(image, tile=100, limits=limits())
    assert merged.boxes.tolist() == [[140, 40, 196, 80], [20, 20, 198, 200], [202, 20, 260, 120]]
    np.testing.assert_allclose(merged.scores, [0.8, 0.7, 0.6])
    assert (merged.size, merged.vocabulary) == ((200, 400), ("a",))


def test_boxes_are_cut_by_borders_inside_the_photo_only():
    boxes = np.array([[0, 20, 30, 50], [20, 0, 50, 30], [60, 20, 99, 50], [20, 70, 50, 100], [5, 5, 90, 90]])
    corner, middle = Place(0, 0, 100, 100), Place(50, 50, 100, 100)
    assert tiles.cut_boxes(boxes, corner, (200, 200), margin=1).tolist() == [False, False, True, True, False]
    assert tiles.cut_boxes(boxes, middle, (200, 200), margin=1).tolist() == [True, True, True, True, False]
    assert tiles.cut_boxes(boxes, middle, (150, 150), margin=1).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("side", range(4))
def test_a_box_just_beyond_the_margin_is_whole(side):
    place, border = Place(50, 50, 100, 80), [0, 0, 100, 80][side]
    for distance, is_cut in ((-1.5, False), (-1, True), (1, True), (1.5, False)):
        box = np.array([[20.0, 20, 60, 60]])
        box[0, side] = border + distance
        assert tiles.cut_boxes(box, place, (300, 300), margin=1).tolist() == [is_cut]


def test_wrong_tiles_are_one_clear_error(predictor, tmp_path):
    with pytest.raises(ValueError, match="tile is 8; it must be 0, for none, or at least 32 px"):
        predictor([np.zeros((9, 9, 3), np.uint8)], ["red"], tile=8)
    for overlap in (0.0, 0.9):
        tiles.check(tile=32, overlap=overlap)
    with pytest.raises(ValueError, match="tile is 31"):
        tiles.check(tile=31, overlap=0.2)
    with pytest.raises(ValueError, match=r"tile_overlap is -0\.1; it"):
        tiles.check(tile=32, overlap=-0.1)
    with pytest.raises(ValueError, match=r"tile_overlap is 1; it must lie between 0 and 0\.9"):
        tiles.check(tile=64, overlap=1)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"cannot read the image .*pipe.png is not a regular file"):
        predictor([str(tmp_path / "pipe.png")], ["red"])
    with pytest.raises(ValueError, match=r"cannot read the image .*pipe.png.* is not a regular file"):
        predictor([tmp_path / "pipe.png"], ["red"], tile=64)
    with pytest.raises(ValueError, match=r"cannot read the image .*absent.png"):
        predictor([tmp_path / "absent.png"], ["red"], tile=64)
