"""Parts of reading COCO jsons: vocabularies, kinds of files, sizes of photos."""

import json

import numpy as np
import pytest
from conftest import detection_json, grounding_json, write_image
from PIL import Image

from detclipv2_jax.data import box_json, canvases, evaluation_set, sources
from detclipv2_jax.data.concepts import Vocabulary
from detclipv2_jax.data.schema import DataError, Kind
from detclipv2_jax.data.selection import Dropped


def test_a_json_of_boxes_has_its_two_lists(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(detection_json()))
    assert box_json.load_json(path).keys() == {"images", "annotations", "categories"}
    path.write_text(json.dumps([{"image_id": 1}]))
    with pytest.raises(ValueError, match=r"d\.json"):
        box_json.load_json(path)


def test_a_vocabulary_has_the_categories_in_order(tmp_path):
    categories = [{"id": 7, "name": "red_car", "def": "a car"}, {"id": "x", "name": 3}, {"id": 1, "name": "cat"}]
    dictionary = Vocabulary(("cats",), ("a pet",))
    found = box_json.vocabulary_of({"categories": categories}, tmp_path, dictionary)
    assert found == Vocabulary(("red car", "3", "cat"), ("a car", "", "a pet"), (7, "x", 1))
    for wrong, message in (
        ([], "lists no categories"),
        ([{"id": 1, "name": " "}], r"categories\[0\] .* needs an id and a name"),
        ([{"id": 1, "name": True}], r"categories\[0\] .* needs an id and a name"),
        ([{"id": 2, "name": "a"}, {"id": "2", "name": "b"}], "two categories with the id 2"),
    ):
        with pytest.raises(ValueError, match=message):
            box_json.vocabulary_of({"categories": wrong}, tmp_path, None)
    path = tmp_path / "d.json"
    path.write_text(json.dumps(detection_json() | {"categories": categories}))
    (tmp_path / "dictionary.tsv").write_text("cat\ta pet\nred car\tnot this\n")
    assert box_json.read_vocabulary(path, dictionary=str(tmp_path / "dictionary.tsv")) == found
    assert box_json.read_vocabulary(path).definitions == ("a car", "", "")


def test_a_json_of_another_kind_is_refused(tmp_path):
    box_json.check_kind(detection_json(), tmp_path, Kind.DETECTION)
    box_json.check_kind(grounding_json(), tmp_path, Kind.GROUNDING)
    for content, kind, message in (
        (grounding_json(), Kind.DETECTION, "it belongs in config.grounding.annotations"),
        (detection_json(), Kind.GROUNDING, "a COCO json belongs in config.detection.annotations"),
        ({"annotations": [{"caption": "a cat"}]}, Kind.DETECTION, "config.image_text.pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            box_json.check_kind(content, tmp_path, kind)


def test_sizes_that_are_not_given_are_those_of_the_files(tmp_path):
    write_image(tmp_path / "a.jpg", (20, 30), 0)
    images = [{"file_name": "a.jpg"}, {"file_name": "a.jpg", "height": 5, "width": 6}, {"file_name": "b.jpg"}, 3]
    box_json.probe_sizes(images, str(tmp_path), follow_links=False)
    assert [(image.get("height"), image.get("width")) for image in images[:3]] == [(20, 30), (5, 6), (None, None)]


def test_sizes_that_canvases_need_are_those_of_upright_photos(tmp_path):
    write_image(tmp_path / "0.jpg", (20, 30), 0)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(tmp_path / "0.jpg").save(tmp_path / "1.jpg", exif=turned)
    content = detection_json()
    content["images"] = [{"id": image["id"], "file_name": f"{i}.jpg"} for i, image in enumerate(content["images"][:3])]
    (tmp_path / "d.json").write_text(json.dumps(content))
    source = box_json.read_detection(str(tmp_path / "d.json"), str(tmp_path), max_bad_share=1)
    source.sizes[:] = 0  # as of photos that were not probed
    canvases.fill_sizes(source)
    assert source.sizes.tolist() == [[20, 30], [30, 20], [0, 0]]  # the third is missing


def test_categories_that_are_dropped_are_gone_before_boxes_are_read(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(detection_json()))
    _, folder, content, counts = box_json.open_detection(
        str(path), str(tmp_path / "images" / ".."), dropped=Dropped(("cat",)), fitting_ids=False
    )
    assert folder == str(tmp_path)
    assert "cat" not in {category["name"] for category in content["categories"]}
    assert counts == {"box of a dropped category": 3}
    assert len(content["annotations"]) == len(detection_json()["annotations"]) - 3


def test_an_evaluation_has_photos_without_boxes_and_the_truth(world, config):
    path = world / "e.json"
    path.write_text(json.dumps(detection_json()))
    source, truth = evaluation_set.read_evaluation(str(path), str(world / "images"), max_examples=3)
    assert (len(source), len(source[0].boxes)) == (3, 0)
    assert truth.vocabulary.names == ("cat", "dog", "red car", "tree", "traffic light", "cup")
    assert truth.images.tolist() == [0, 1, 2]
    assert not truth.definitions
    content = detection_json()
    content["annotations"][3]["category_id"] = str(content["annotations"][3]["category_id"])
    path.write_text(json.dumps(content))
    less, _ = evaluation_set.read_evaluation(str(path), str(world / "images"), dropped=Dropped(("cat",)))
    assert less.counters == {
        "box of a dropped category": 3, "category_id of another type than the id it names": 1
    }  # fmt: skip
    path.write_text(json.dumps(detection_json()))
    config.eval.annotations, config.eval.images = str(path), str(world / "images")
    config.eval.definitions = True
    opened, truth = sources.open_evaluation(config.eval, prefix="config.eval")
    assert len(opened) == 7
    assert truth.definitions
    (world / "images" / "3.jpg").unlink()
    with pytest.raises(ValueError, match=r"(?s)^config\.eval: .*e\.json: 1 of 7 photos do not exist:.*3\.jpg"):
        sources.open_evaluation(config.eval, prefix="config.eval")
    with pytest.raises(DataError, match="1 of 7 photos"):
        evaluation_set.read_evaluation(str(path), str(world / "images"))
    config.eval.annotations = config.eval.images = ""
    assert sources.open_evaluation(config.eval, prefix="config.eval") is None


def test_categories_with_boxes_are_told_apart_by_their_texts(world):
    content, path = detection_json(), world / "e.json"
    first, second = content["categories"][:2]
    for names, texts, definitions, fine in (
        (("crane", "crane"), ("a bird", "a machine"), True, True),
        (("crane", "crane"), ("a bird", "a machine"), False, False),
        (("crane", "Crane"), ("a bird", "a bird"), True, False),
        (("crane", "crane"), ("", ""), True, False),
    ):
        for category, name, text in zip((first, second), names, texts, strict=True):
            category |= {"name": name, "def": text}
        path.write_text(json.dumps(content))
        if fine:
            evaluation_set.read_evaluation(str(path), str(world / "images"), definitions=definitions)
        else:
            with pytest.raises(DataError, match=r"the categories 1 and 2 are both called .* and have boxes"):
                evaluation_set.read_evaluation(str(path), str(world / "images"), definitions=definitions)
    first["name"], second["name"] = (
        "a crane of a very old harbour in the north",
        "A crane of a very old harbour in the south",
    )
    path.write_text(json.dumps(content))
    _, truth = evaluation_set.read_evaluation(str(path), str(world / "images"))
    evaluation_set.refuse_equal_texts(truth, context_length=16)
    with pytest.raises(DataError, match=r"are both called 'A crane of .*, as far as 8 tokens go, and have boxes"):
        evaluation_set.refuse_equal_texts(truth, context_length=8)
    first["name"] = second["name"] = "crane"
    content["annotations"] = [row for row in content["annotations"] if row["category_id"] != 2]
    path.write_text(json.dumps(content))
    _, truth = evaluation_set.read_evaluation(str(path), str(world / "images"))
    assert truth.vocabulary.category_ids == (1, 3, 4, 5, 6)  # what has no box is not asked for twice
    assert truth.categories.tolist() == [0, 2, 3, 4, 5]


def test_a_line_of_pairs():
    parse = sources.parse_pair
    assert parse(b'a.jpg\t a cat \t["cat", " ", " a dog "]') == ("a.jpg", "a cat", ["cat", "a dog"], [])
    assert parse(b"a.jpg\ta cat") == ("a.jpg", "a cat", [], [])
    for column in (b"[1]", b"{}", b"cat"):
        _, _, phrases, repaired = parse(b"a.jpg\ta cat\t" + column)
        assert (phrases, repaired) == ([], ["phrase column that is no JSON list of texts left out"])
    assert parse(b"a.jpg\tcaf\xe9\t")[1:] == ("caf", [], ["invalid UTF-8 left out"])


def test_what_looks_like_a_json(tmp_path):
    for text, expected in ((b" {", True), (b"\xef\xbb\xbf[{", True), (b"[x]\ta cat", False), (b"", False)):
        (tmp_path / "f").write_bytes(text)
        assert sources.is_json(tmp_path / "f") == expected


def test_boxes_of_a_source_are_those_of_its_json(world):
    path = world / "d.json"
    path.write_text(json.dumps(detection_json()))
    source = box_json.read_detection(str(path), str(world / "images"))
    np.testing.assert_allclose(source[0].boxes[0], [5, 6, 25, 16])
