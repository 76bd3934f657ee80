"""Example boxes as queries: which region they take, how they are averaged, kept and read, and what is wrong input."""

import functools
import json
import logging

import jax
import numpy as np
import planted
import pytest
from deltas import encode_deltas
from PIL import Image

from detclipv2_jax.data import selection
from detclipv2_jax.geometry import anchors as anchor_lib
from detclipv2_jax.inference import Photos, Predictor, exemplars
from detclipv2_jax.inference.detect import describe
from detclipv2_jax.models.detclip import Regions

CANVAS = (48, 64)
RED, BLUE = (20, 10, 60, 50), (70, 5, 110, 45)


@pytest.fixture(scope="module")
def photo():
    return planted.paint((64, 128), {"red": RED, "blue": BLUE})


@pytest.fixture(scope="module")
def predictor():
    return Predictor(*planted.make())


def test_a_box_is_described_by_the_central_region_that_overlaps_it():
    rng = np.random.default_rng(0)
    anchors = anchor_lib.grid(CANVAS).boxes
    values = (
        rng.normal(size=(2, len(anchors), 4)),
        rng.normal(size=(2, len(anchors), 4)),
        rng.normal(size=(2, len(anchors))),
    )
    regions = Regions(*(value.astype(np.float32) for value in values), None)
    extent, original = np.array([[48, 64], [24, 64]], np.int32), np.array([[96, 128], [12, 32]], np.int32)
    photos = Photos(None, extent, (extent / original).astype(np.float32), original)
    boxes = np.array([[40, 30, 110, 80], [2, 1, 30, 11]], np.float32)
    centers = (anchors[:, 1] + anchors[:, 3]) / 2
    padding = int(np.flatnonzero(centers >= extent[1, 0])[0])  # has the very box, but does not count
    regions.box_deltas[1, padding] = encode_deltas(anchors[padding], boxes[1] * 2)
    regions.centerness[1, padding] = 9.0
    found = jax.jit(functools.partial(describe, canvas=CANVAS))(regions, boxes, photos)
    for i in range(2):
        best, most = None, -1.0
        columns = (regions.box_deltas[i], regions.embeddings[i], 1 / (1 + np.exp(-regions.centerness[i])))
        for anchor, delta, embedding, centerness in zip(anchors, *columns, strict=True):
            center, size = (anchor[:2] + anchor[2:]) / 2, anchor[2] - anchor[0]
            if (center[::-1] >= extent[i]).any():
                continue
            middle, half = center + delta[:2] * 0.1 * size, np.exp(delta[2:] * 0.2) * size / 2
            x1, y1, x2, y2 = np.concatenate([middle - half, middle + half]) * 2.0 ** (1 - 2 * i)  # px of the original
            a1, b1, a2, b2 = boxes[i]
            shared = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            iou = shared / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - shared)
            if iou * centerness > most + 1e-6:
                best, most = embedding, iou * centerness
        np.testing.assert_allclose(found[i], best / np.linalg.norm(best), rtol=1e-5)


def test_an_example_finds_what_its_word_finds(predictor, photo):
    other = planted.paint((90, 100), {"red": (10, 20, 50, 70), "blue": (60, 20, 90, 80)})
    by_words = predictor(other, ["blue", "red"], score_threshold=0.1)
    found = predictor(other, ["blue"], exemplars={"like this": [(photo, RED)]}, score_threshold=0.1)
    assert found.vocabulary == ("blue", "like this")
    for name, word in (("blue", "blue"), ("like this", "red")):
        np.testing.assert_allclose(found.boxes[found.names.index(name)], by_words.boxes[by_words.names.index(word)])
    alone = predictor([other], exemplars={"like this": [(photo, RED)]}, score_threshold=0.1)[0]
    assert set(alone.names) == {"like this"}
    np.testing.assert_allclose(alone.boxes[0], by_words.boxes[by_words.names.index("red")])


def test_examples_are_averaged(predictor, photo):
    shown = {"both": [(photo, RED), (photo, BLUE)], "mostly red": [(photo, RED), (photo, BLUE), (photo, RED)]}
    names, text, mask = predictor.vocabulary(exemplars=shown)
    assert names == ("both", "mostly red")
    assert mask.sum() == 2
    assert len(text) == 128
    # their length makes the logit of an example's own region 0: the planted scale is 10, the bias -5
    np.testing.assert_allclose(text[0], 0.5 * np.array([1, 1]) / 2**0.5, rtol=1e-6)
    np.testing.assert_allclose(text[1], 0.5 * np.array([2, 1]) / 5**0.5, rtol=1e-6)


def test_the_length_of_a_query_is_at_most_that_of_a_word(predictor, monkeypatch):
    for scale, bias, length in ((10.0, -5.0, 0.5), (1.0, -4.6, 1.0), (10.0, 1.0, 0.1)):
        monkeypatch.setattr(
            planted.Planted, "logit_parameters", lambda self, s=scale, b=bias: (np.float32(s), np.float32(b))
        )
        assert predictor.detector.query_length(predictor.params) == pytest.approx(length)


def test_the_box_is_of_the_photo_as_displayed(predictor, photo, tmp_path):
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(photo)))
    exif = turned.getexif()
    exif[0x0112] = 6  # a viewer turns it back
    turned.save(tmp_path / "turned.png", exif=exif)
    _, text, _ = predictor.vocabulary(exemplars={"a": [(tmp_path / "turned.png", RED)], "b": [(photo, BLUE)]})
    np.testing.assert_allclose(text[:2], np.eye(2) / 2)


def test_stored_examples_are_not_embedded_again(photo, tmp_path, monkeypatch):
    config, model, params = planted.make()
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    described = []

    def embedded(*examples, **changes):
        predictor = Predictor(config, model, params | changes, cache=tmp_path / "cache")
        describe = predictor.detector.describe
        monkeypatch.setattr(predictor.detector, "describe", lambda *given: described.append(0) or describe(*given))
        before = len(described)
        predictor.vocabulary(exemplars={"a": list(examples)})
        predictor.vocabulary(exemplars={"another name": list(examples)})
        return len(described) - before

    assert embedded((path, RED)) == 1
    assert embedded((path, RED)) == 0
    assert embedded((path, BLUE)) == 1
    assert embedded((path, RED), (path, BLUE)) == 2
    predictor = Predictor(config, model, params, cache=tmp_path / "cache")
    names, text, mask = predictor.vocabulary(exemplars={"a": [(path, RED)], "b": [(path, BLUE)]})  # a name each
    assert (names, int(mask.sum())) == (("a", "b"), 2)
    np.testing.assert_allclose(text[:2], np.eye(2) / 2)
    assert embedded((path, RED), text_encoder={"weights": np.zeros(2)}) == 1
    Image.fromarray(photo[:, ::-1].copy()).save(path)
    assert embedded((path, RED)) == 1  # another photo of the same name
    config.eval.short_side = 32
    assert embedded((path, RED)) == 1
    assert embedded((photo, RED)) == 1
    assert embedded((photo.reshape(128, 64, 3), RED)) == 1  # the same bytes in another shape


BOX = "the box .*, not four numbers x1, y1, x2, y2 in px"
WRONG = {
    "no list": ({"a": "photo.jpg"}, "the examples of 'a' are no list of pairs"),
    "a pair that is no list": ({"a": ("photo.jpg", RED)}, "the examples of 'a' are no list of pairs"),
    "a list of names": (["a"], "exemplars must be .* not list"),
    "none": ({"a": []}, "'a' has 0 examples; there must be 1 to 5"),
    "six": ({"a": [("photo.jpg", RED)] * 6}, "'a' has 6 examples; there must be 1 to 5"),
    "a word": ({" Cup": [("photo.jpg", RED)]}, "the name ' Cup' is taken, by a word or another example"),
    "twice": ({"a": [("photo.jpg", RED)], "A": [("photo.jpg", RED)]}, "the name 'A' is taken"),
    "empty name": ({" ": [("photo.jpg", RED)]}, "the name ' ' must be a text that is not empty"),
    "no photo": ({"a": [("absent.jpg", RED)]}, "example 1 of 'a': cannot read the image absent.jpg: .*No such file"),
    "no image": ({"a": [("photo.txt", RED)]}, "example 1 of 'a': cannot read the image photo.txt: not an image"),
    "no pixels": ({"a": [(np.zeros((2, 2)), RED)]}, r"cannot read the image array: it is float64\[2, 2\]"),
    "three numbers": ({"a": [("photo.jpg", RED), ("photo.jpg", RED[:3])]}, f"example 2 of 'a': {BOX}"),
    "text": ({"a": [("photo.jpg", "box")]}, BOX),
    "texts": ({"a": [("photo.jpg", ["1", "2", "3", "4"])]}, BOX),
    "nothing": ({"a": [("photo.jpg", None)]}, BOX),
    "an object": ({"a": [("photo.jpg", {"x": 1})]}, BOX),
    "two corners": ({"a": [("photo.jpg", [[1, 2], [30, 40]])]}, BOX),
    "true and false": ({"a": [("photo.jpg", [False, True, 30, 40])]}, BOX),
    "shares of the sides": (
        {"a": [("photo.jpg", (0.1, 0.2, 0.5, 0.9))]},
        r"has no area; .* and 1 px wide and high or more",
    ),
    "ragged": ({"a": [("photo.jpg", [1, 2, [3], 4])]}, BOX),
    "not finite": ({"a": [("photo.jpg", (0, 0, float("nan"), 9))]}, BOX),
    "no area": ({"a": [("photo.jpg", (5, 5, 5, 9))]}, r"the box \[5.0, 5.0, 5.0, 9.0\] has no area"),
    "inverted": ({"a": [("photo.jpg", (9, 5, 5, 9))]}, "has no area"),
    "outside": ({"a": [("photo.jpg", (200, 5, 220, 20))]}, "does not lie on the photo, which is 128 px wide, 64 high"),
    "half outside": ({"a": [("photo.jpg", (100, 5, 140, 20))]}, "does not lie on the photo"),
    "five pixels outside": ({"a": [("photo.jpg", (100, 5, 133, 20))]}, "does not lie on the photo"),
    "at the rim": ({"a": [("photo.jpg", (128, 5, 129, 20))]}, "does not lie on the photo"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_wrong_examples_are_one_clear_error(predictor, photo, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo).save("photo.jpg")
    (tmp_path / "photo.txt").write_text("no image")
    with pytest.raises(ValueError, match=message):
        predictor(photo, ["cup"], exemplars=given)


def test_five_examples_are_enough_and_one(photo):
    for num in (1, 5):
        checked = exemplars.check({"a": [(photo, RED)] * num}, words=["b"])
        assert [box for _, box in checked["a"]] == [RED] * num


def test_neither_words_nor_examples(predictor, photo):
    with pytest.raises(ValueError, match=r"words must be a list of words, .* but are \(\) and there are no exemplars"):
        predictor(photo, exemplars={})


def test_a_box_may_reach_a_pixel_beyond_the_border():
    np.testing.assert_array_equal(exemplars.checked_box([-1, 0, 50.5, 20], (20, 50), where=""), [0, 0, 50, 20])
    np.testing.assert_array_equal(exemplars.checked_box([3, 4, 4, 5], (20, 50), where=""), [3, 4, 4, 5])


def test_a_json_of_examples(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    path = tmp_path / "mugs.json"

    def read(content):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return exemplars.read(path)

    example = {"image": "photos/a.jpg", "box": [1, 2, 3, 4]}
    assert read({"this mug": [example, example]}) == {"this mug": [(tmp_path / "photos" / "a.jpg", [1, 2, 3, 4])] * 2}
    for content, message in (
        ("{", "is no valid json"),
        ([example], "is no object: it must be"),
        ({"mug": example}, "'mug' has .* no list"),
        ({"mug": [{"image": "photos/a.jpg"}]}, r"example 1 of 'mug' is \{.image.: .photos/a.jpg.\}: it must be"),
        ({"mug": [{"image": 3, "box": []}]}, "example 1 of 'mug' is"),
        ({"mug": [example, example | {"box": None}]}, "example 2 of 'mug': the box is null, not four numbers"),
        ({"mug": [example | {"box": "1,2,3,4"}]}, "example 1 of 'mug': the box is .*, not four numbers"),
        ({"mug": [example, example | {"image": "b.jpg"}]}, "example 2 of 'mug': there is no photo .*b.jpg"),
        ('{"mug": [], "mug": []}', "'mug' stands there twice"),
    ):
        with pytest.raises(ValueError, match=message):
            read(content)
    with pytest.raises(ValueError, match=r"--exemplars: cannot read .*absent.json: No such file"):
        exemplars.read(tmp_path / "absent.json")


def coco(folder, rows, *, file_name="{}.jpg"):
    """Writes a COCO json: (image, category, box, other fields) a row."""
    images = [{"id": i, "file_name": file_name.format(i), "width": 100, "height": 100} for i in range(1, 9)]
    categories = [{"id": 1, "name": "red_cup"}, {"id": 2, "name": "blue"}, {"id": 3, "name": "absent"}]
    annotations = [
        {"id": n, "image_id": image, "category_id": category, "bbox": box, **extra}
        for n, (image, category, box, extra) in enumerate(rows, start=1)
    ]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    return path


def test_examples_of_a_whole_data_set(tmp_path, caplog):
    large, small = [10, 10, 50, 50], [10, 10, 5, 5]
    rows = [(image, 1, large, {}) for image in (1, 1, 1, 2, 3)] + [(image, 1, small, {}) for image in (4, 5, 6, 7)]
    rows += [(1, 2, [80, 80, 30, 15], {}), (2, 2, large, {"iscrowd": 1}), (3, 2, large, {"ignore": 1})]
    path = coco(tmp_path, rows)
    with caplog.at_level(logging.WARNING, logger="absl"):
        found = exemplars.from_coco(path, images=str(tmp_path), per_class=3)
    assert "no example of 1 categories: absent" in caplog.text
    assert list(found) == ["red cup", "blue"]
    assert {image for image, _ in found["red cup"]} == {str(tmp_path.resolve() / f"{i}.jpg") for i in (1, 2, 3)}
    assert {tuple(box) for _, box in found["red cup"]} == {(10, 10, 60, 60)}
    assert found["blue"] == [(str(tmp_path.resolve() / "1.jpg"), [80, 80, 100, 95])]  # cut at the border
    assert exemplars.from_coco(path, images=str(tmp_path), per_class=3) == found
    assert len(exemplars.from_coco(path, images=str(tmp_path), per_class=5)["red cup"]) == 5
    orders = set()
    for seed in range(8):
        photos = [
            image for image, _ in exemplars.from_coco(path, images=str(tmp_path), per_class=3, seed=seed)["red cup"]
        ]
        assert len(set(photos)) == 3
        orders.add(tuple(photos))
    assert len(orders) > 1


def test_categories_of_one_name_are_one_query(tmp_path):
    path = coco(tmp_path, [(image, category, [5, 5, 9, 9], {}) for image in (1, 2, 3) for category in (1, 3)])
    path.write_text(path.read_text().replace('"absent"', '"red cup"'))
    options = {"images": str(tmp_path), "per_class": 2}
    found = exemplars.from_coco(path, **options)
    assert {name: len(examples) for name, examples in found.items()} == {"red cup": 2}
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][:2]  # one box of each
    path.write_text(json.dumps(content))
    assert len(exemplars.from_coco(path, **options)["red cup"]) == 2


def test_a_box_of_one_pixel_is_an_example_and_none_below(tmp_path):
    path = coco(tmp_path, [(1, 1, [5, 5, 1, 9], {}), (2, 2, [5, 5, 9, 1], {}), (3, 3, [5, 5, 9, 0.9], {})])
    assert list(exemplars.from_coco(path, images=str(tmp_path), per_class=1)) == ["red cup", "blue"]


def test_wrong_data_sets_of_examples(tmp_path):
    path = coco(tmp_path, [(1, 1, [1, 1, 5, 5], {})])
    for per_class in (0, 6):
        with pytest.raises(ValueError, match=f"--per_class is {per_class}; it must lie between 1 and 5"):
            exemplars.from_coco(path, images=str(tmp_path), per_class=per_class)
    with pytest.raises(ValueError, match="--exemplar_images is empty; it must name a folder"):
        exemplars.from_coco(path, images="", per_class=1)
    with pytest.raises(ValueError, match=r"--exemplars_from: the file .* does not exist"):
        exemplars.from_coco(tmp_path / "absent.json", images=str(tmp_path), per_class=1)
    outside = coco(tmp_path, [(1, 1, [1, 1, 5, 5], {})], file_name="../{}.jpg")
    with pytest.raises(ValueError, match=r"the file name '\.\./1\.jpg' leads out of the folder"):
        exemplars.from_coco(outside, images=str(tmp_path), per_class=1)
    with pytest.raises(ValueError, match=r"here: the file name '\.\./1\.jpg' leads out of the folder"):
        selection.photo_path({"coco_url": "https://host/../1.jpg"}, str(tmp_path), where="here")
