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
    categories = [
        {"id": 7, "name": "red_car", "definition": "not this", "def": "a car"},
        {"id": "x", "name": 3, "def": " ", "definition": None},
        {"id": 1, "name": "cat", "def": " "},
    ]
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
    content["annotations"] = [row for row in content["annotations"] if row["category_id"] not in (1, 2)]
    path.write_text(json.dumps(content))
    _, truth = evaluation_set.read_evaluation(str(path), str(world / "images"))
    evaluation_set.refuse_equal_texts(truth, context_length=8)  # neither has a box
    content = detection_json()
    first, second = content["categories"][:2]
    first["name"] = second["name"] = "crane"
    content["annotations"] = [row for row in content["annotations"] if row["category_id"] != 2]
    path.write_text(json.dumps(content))
    _, truth = evaluation_set.read_evaluation(str(path), str(world / "images"))
    assert truth.vocabulary.category_ids == (1, 3, 4, 5, 6)  # what has no box is not asked for twice
    assert truth.categories.tolist() == [0, 2, 3, 4, 5]
    for row in content["annotations"]:
        row["category_id"] = {1: 2}.get(row["category_id"], row["category_id"])
    path.write_text(json.dumps(content))
    _, truth = evaluation_set.read_evaluation(str(path), str(world / "images"))
    assert truth.vocabulary.category_ids == (2, 3, 4, 5, 6)  # wherever the one with boxes stands


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


def read(world, content, **options):
    (world / "d.json").write_text(json.dumps(content))
    spans = any("tokens_positive" in row for row in content["annotations"])
    reader = box_json.read_grounding if spans else box_json.read_detection
    return reader(str(world / "d.json"), str(world / "images"), **options)


@pytest.mark.parametrize(("num", "fine"), [(2, True), (3, False)])
def test_one_box_in_a_hundred_may_be_doubtful(world, num, fine):
    content = detection_json()
    odd = [[-50, 9, 60, 20], [40, 3, 0.5, 9], [-0.7, -99, 0.9, 200]]  # the last one is cut, too
    boxes = [[1 + i / 9, 2, 9, 9] for i in range(200 - num)] + odd[-num:]
    content["annotations"] = [{"image_id": 10, "category_id": 1, "bbox": box} for box in boxes]
    if fine:
        counts = {"box cut at the border": 1, "box below a pixel": 1}
        assert read(world, content).counters == counts
    else:
        with pytest.raises(DataError, match=r"3 of 200 boxes cannot be used \(2 box cut at the border, 1 box below"):
            read(world, content)


def test_corners_of_photos_whose_json_has_no_sizes_are_told(world):
    for content in (detection_json(), grounding_json()):
        for row in content["annotations"]:
            row["bbox"] = [9, 9, 20, 20]
        assert read(world, content)
        for image in content["images"]:
            image["file_name"] = "1.jpg"  # 60 × 80 px
            del image["height"], image["width"]
        for row in content["annotations"]:
            row["bbox"] = [20, 30, 59, 79]
        with pytest.raises(DataError, match="boxes that look like x1, y1, x2, y2"):
            read(world, content)


def test_nothing_outside_of_the_folder_is_read_for_its_size(tmp_path):
    write_image(tmp_path / "secret.jpg", (20, 30), 0)
    (tmp_path / "images").mkdir()
    image = {"file_name": "../secret.jpg"}
    box_json.probe_sizes([image], str(tmp_path / "images"), follow_links=False)
    assert image == {"file_name": "../secret.jpg"}


def test_lists_of_an_image_name_categories_by_number_or_text(world):
    content = detection_json()
    content["images"][2] |= {"neg_category_ids": ["5", 6.0, [1]], "not_exhaustive_category_ids": None}
    source = read(world, content)
    assert source[2].negatives == ("traffic light", "cup")
    assert source[2].not_negatives == ()
    for field, federated in (("neg_category_ids", True), ("not_exhaustive_category_ids", True), ("other", False)):
        content = detection_json()
        content["images"][2][field] = [5]
        source = read(world, content)
        assert source.federated == source[0].federated == federated
        content["images"][2][field] = 5
        if federated:
            with pytest.raises(DataError, match=f"image 12 has {field} 5, not a list of ids"):
                read(world, content)


def test_odd_spans_of_a_grounding_json_are_counted(world):
    content = grounding_json()
    content["annotations"][0]["tokens_positive"] = [[-3, 5]]
    assert read(world, content).counters == {"span that begins before the caption": 1}
    (world / "d.json").write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(ValueError, match="has no usable box for its 7 images"):
        box_json.read_grounding(str(world / "d.json"), str(world / "images"))


def test_categories_without_a_box_are_said(world, caplog):
    content = detection_json()
    content["annotations"] = [row for row in content["annotations"] if row["category_id"] != 4]
    source = read(world, content, dropped=Dropped((), option="--this_one"))
    assert "1 of 6 categories have no box anywhere: 'tree'" in caplog.text
    assert "--this_one leaves out" in caplog.text
    assert source.with_boxes == {0, 1, 2, 4, 5}


def test_an_evaluation_asks_once_for_categories_that_are_listed_twice_or_called_alike(world, caplog):
    content = detection_json()
    content["categories"] += [dict(content["categories"][2]), *({"id": i, "name": "Bird"} for i in (7, 8))]
    for image in content["images"]:
        del image["height"], image["width"]
    (world / "e.json").write_text(json.dumps(content))
    source, truth = evaluation_set.read_evaluation(str(world / "e.json"), str(world / "images"))
    assert truth.vocabulary.category_ids == (1, 2, 3, 4, 5, 6, 7)  # of two birds without a box the first
    assert "1 categories without a box have the text of another one and are not asked for: 8" in caplog.text
    assert "e.json: 1 × entry listed twice" in caplog.text
    assert tuple(source.sizes[3]) == (40, 120)
    name = content["images"][1]["file_name"]
    content["images"][1]["file_name"] = "../1.jpg"
    (world / "e.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"1 of 7 images cannot be used \(1 with a file name outside the folder"):
        evaluation_set.read_evaluation(str(world / "e.json"), str(world / "images"))
    content["images"][1]["file_name"] = name
    content["images"][1]["id"] = None
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] != 11]
    (world / "e.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"images\[1\]"):
        evaluation_set.read_evaluation(str(world / "e.json"), str(world / "images"))


def test_photos_of_an_evaluation_are_links_only_where_that_is_allowed(world):
    (world / "e.json").write_text(json.dumps(detection_json()))
    (world / "images" / "2.jpg").rename(world / "away.jpg")
    (world / "images" / "2.jpg").symlink_to(world / "away.jpg")
    arguments = str(world / "e.json"), str(world / "images")
    with pytest.raises(DataError, match="1 of 7 photos are links out of the image folder"):
        evaluation_set.read_evaluation(*arguments)
    source, truth = evaluation_set.read_evaluation(*arguments, follow_links=True)
    assert source[2].image == f"{world}/images/2.jpg"
    assert len(truth.photos) == 64


def test_boxes_of_a_source_are_those_of_its_json(world):
    path = world / "d.json"
    path.write_text(json.dumps(detection_json()))
    source = box_json.read_detection(str(path), str(world / "images"))
    np.testing.assert_allclose(source[0].boxes[0], [5, 6, 25, 16])
