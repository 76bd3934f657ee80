import json
import logging
import os
import random
import types

import numpy as np
import pytest
from conftest import CAPTIONS, NAMES, PHRASES, SIZES, detection_json, grounding_json, write_image

from detclipv2_jax.data import box_json, canvases, sources, spans
from detclipv2_jax.data.concepts import Vocabulary
from detclipv2_jax.data.schema import Kind, UnusableError
from detclipv2_jax.data.selection import Dropped


def detection(world, content, **options):
    (world / "d.json").write_text(json.dumps(content))
    return box_json.read_detection(str(world / "d.json"), str(world / "images"), **options)


def grounding(world, content, **options):
    (world / "g.json").write_text(json.dumps(content))
    return box_json.read_grounding(str(world / "g.json"), str(world / "images"), **options)


def pairs(world, text, **options):
    (world / "p.tsv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return sources.read_pairs(str(world / "p.tsv"), str(world / "images"), **options)


def test_detection_records(world):
    source = detection(world, detection_json())
    assert len(source) == len(SIZES)
    record = source[1]
    assert record.kind is Kind.DETECTION
    assert record.example_id == 1
    assert record.size == SIZES[1]
    assert record.concepts == ("dog", "red car")  # underscores are spaces
    np.testing.assert_array_equal(record.boxes, np.float32([[5, 6, 25, 16], [11, 4, 41, 29]]))
    assert [record.concepts[i] for i in record.box_concepts] == ["dog", "red car"]
    assert source.vocabulary.names == tuple(name.replace("_", " ") for name in NAMES)
    assert source.vocabulary.category_ids == (1, 2, 3, 4, 5, 6)
    assert source.image_ids == [10 + i for i in range(len(SIZES))]
    assert source.most_concepts == 2
    assert source.counters == {}


def test_bad_boxes_are_dropped_and_counted_alone(world):
    content = detection_json()
    bad = [
        {"bbox": [1, 1, 0, 5]},
        {"bbox": [9, 1, -3, 5]},
        {"bbox": [float("nan"), 1, 3, 5]},
        {"bbox": [500, 1, 3, 5]},
        {"bbox": [1, 1, 3]},
        {"bbox": None},
        {},
        {"bbox": [1, 1, 3, 3], "category_id": 99},
        {"bbox": [1, 1, 3, 3], "image_id": 12345},
        {"bbox": [1, 1, 3, 3], "iscrowd": 1},
    ]
    content["annotations"] += [{"image_id": 10, "category_id": 1, "id": 100, **annotation} for annotation in bad]
    source = detection(world, content, max_bad_share=0.5)
    assert source.counters == {
        "box without area": 1,
        "box inverted": 1,
        "box not finite": 1,
        "box outside the image": 1,
        "box without four numbers": 3,
        "box of an unlisted category": 1,
        "box of an image that is not listed": 1,
        "crowd box left out": 1,
    }
    clean = detection(world, detection_json())
    for record, expected in zip(source, clean, strict=True):
        np.testing.assert_array_equal(record.boxes, expected.boxes)
    with pytest.raises(ValueError, match=r"9 of 23 boxes cannot be used \(3 box without four numbers"):
        detection(world, content, max_bad_share=0.3)


def test_a_box_over_the_border_is_clipped(world):
    content = detection_json()
    content["annotations"][0]["bbox"] = [-10.0, 50.0, 500.0, 100.0]
    source = detection(world, content, max_bad_share=0.1)
    assert source[0].boxes[0].tolist() == [0, 50, 80, 60]
    assert source.counters == {"box cut at the border": 1}
    with pytest.raises(ValueError, match=r"1 of 14 boxes cannot be used \(1 box cut at the border"):
        detection(world, content)


def test_duplicate_image_ids(world):
    content = detection_json()
    content["images"].append(dict(content["images"][0]))
    assert detection(world, content).counters == {"image listed twice": 1}
    for caption, num_bad in (("a cat", 0), ("a dog", 2)):  # spans of boxes would be cut out of the wrong one
        content["images"][-1] = content["images"][0] | {"caption": caption}
        content["images"][0]["caption"] = "a cat"
        assert (
            detection(world, content, max_bad_share=1).counters.get("sharing their id with another image", 0) == num_bad
        )
    content["images"].append({**content["images"][0], "file_name": "1.jpg"})
    source = detection(world, content, max_bad_share=0.5)
    assert source.counters["sharing their id with another image"] == 3
    assert source.image_ids == [11, 12, 13, 14, 15, 16]  # the other images are untouched


def test_max_examples_takes_the_first_images(world):
    source = detection(world, detection_json(), max_examples=3)
    assert source.image_ids == [10, 11, 12]
    assert sum(len(record.boxes) for record in source) == 6
    assert source.counters == {}


def test_lvis_fields(world):
    content = detection_json()
    content["images"][0] |= {"neg_category_ids": [5, 99], "not_exhaustive_category_ids": [2]}
    content["images"][1].pop("file_name")
    content["images"][1]["coco_url"] = "http://images.cocodataset.org/train2017/1.jpg"
    (world / "images" / "train2017").mkdir()
    (world / "images" / "train2017" / "1.jpg").write_bytes((world / "images" / "1.jpg").read_bytes())
    content["categories"][0]["def"] = "a small animal"
    content["categories"][1]["definition"] = "a loyal animal"
    source = detection(world, content)
    assert source[0].negatives == ("traffic light",)
    assert source[0].not_negatives == ("dog",)
    assert source[2].negatives == source[2].not_negatives == ()
    assert source[1].image.endswith("images/train2017/1.jpg")
    assert source.vocabulary.texts(definitions=True)[:3] == ["cat, a small animal", "dog, a loyal animal", "red car"]


def test_definitions_from_the_dictionary(world):
    (world / "dictionary.tsv").write_text("name\tdefinition\nRed cars\ta vehicle\ncat\tnot used\n")
    content = detection_json()
    content["categories"][0]["def"] = "own"
    source = detection(world, content, dictionary=str(world / "dictionary.tsv"))
    assert source.vocabulary.definitions == ("own", "", "a vehicle", "", "", "")


def test_grounding_records(world):
    source = grounding(world, grounding_json())
    record = source[1]
    assert record.caption == CAPTIONS[1]
    assert record.concepts == ("red car", "tree")
    assert record.boxes.shape == (2, 4)
    assert set(source.vocabulary.names) == {phrase for phrases in PHRASES for phrase in phrases}


def test_spans(world):
    caption = "a red, star and blue house."
    assert spans.phrase_of(caption, [[2, 5], [7, 11]]) == "red star"
    assert spans.phrase_of(caption, [[16, 500]]) == "blue house"
    assert spans.phrase_of(caption, [[100, 200]]) == ""
    assert spans.phrase_of(caption, [[5, 2]]) == ""
    for broken in (None, [], [3], [["a", "b"]], [[1]]):
        assert spans.phrase_of(caption, broken) == ""
    content = grounding_json()
    content["annotations"][0]["tokens_positive"] = [[100, 200]]
    source = grounding(world, content, max_bad_share=0.2)
    assert source.counters == {"box whose spans are not in the caption": 1}
    assert source[0].concepts == ("a dog",)


def test_one_phrase_with_several_boxes_and_one_box_with_several_phrases(world):
    content = grounding_json()
    first = content["annotations"][0]
    content["annotations"] += [
        {**first, "id": 90, "bbox": [30, 30, 5, 5]},
        {**first, "id": 91, "tokens_positive": [[2, 5]]},
        {**first, "id": 92, "bbox": [40, 30, 6, 5], "tokens_positive": [[0, 5], [10, 15]]},
    ]
    source = grounding(world, content)
    record = source[0]
    found = [(record.concepts[i], box) for i, box in zip(record.box_concepts, record.boxes.tolist(), strict=True)]
    first_box, last_box = [2, 3, 22, 23], [40, 30, 46, 35]
    assert found == [
        ("a cat", first_box),
        ("a dog", [7, 3, 27, 23]),
        ("a cat", [30, 30, 35, 35]),
        ("cat", first_box),
        ("a cat", last_box),
        ("a dog", last_box),
    ]
    assert [source[1].concepts[i] for i in source[1].box_concepts] == ["red car", "tree"]
    assert source.most_concepts == 3


def test_empty_captions_are_left_out(world):
    content = grounding_json()
    content["images"][0]["caption"] = "  "
    source = grounding(world, content, max_bad_share=0.2)
    assert len(source) == len(SIZES) - 1
    assert source[0].caption == CAPTIONS[1]
    assert source.counters["image without a caption"] == 1
    with pytest.raises(ValueError, match="1 of 7 images cannot be used"):
        grounding(world, content)


def test_pair_records(world):
    source = pairs(world, (world / "pairs.tsv").read_text())
    assert len(source) == len(SIZES)
    assert source[0].concepts == (CAPTIONS[0], *PHRASES[0])
    assert source[0].boxes.shape == (0, 4)
    assert [record.example_id for record in source] == list(range(len(SIZES)))
    assert source.most_concepts == 3


def test_max_examples_takes_the_first_lines(world):
    source = pairs(world, (world / "pairs.tsv").read_text(), max_examples=2)
    assert [record.caption for record in source] == list(CAPTIONS[:2])


def test_odd_lines_of_a_tsv(world, caplog):
    long_caption = "word " * 2000
    text = "".join(
        [
            "0.jpg\ta cat\t[]\r\n",
            "no tab here\n",
            "\n",
            "1.jpg\t   \n",
            f"2.jpg\t{long_caption}\n",
            '3.jpg\ta dog\t["a dog", 3]\n',
            "3.jpg\ta dog\t{not json\n",
            "../secret.jpg\ta dog\n",
            "/etc/passwd\ta dog\n",
            '4.jpg\ta "quoted" caf\u00e9\t["café", " "]',
        ]
    )
    source = pairs(world, text.encode().replace(b"a cat", b"a c\xffat"), max_bad_share=0.5)
    assert [record.concepts for record in source] == [
        ("a cat",),
        (long_caption.strip(),),
        ("a dog",),
        ("a dog",),
        ('a "quoted" café', "café"),
    ]
    assert [record.image.rsplit("/")[-1] for record in source] == ["0.jpg", "2.jpg", "3.jpg", "3.jpg", "4.jpg"]
    assert source.counters == {
        "without a tab": 1,
        "with an empty caption": 1,
        "with a file name outside the folder": 2,
        "invalid UTF-8 left out": 1,
        "phrase column that is no JSON list of texts left out": 2,
    }
    with pytest.raises(ValueError, match="4 of 9 lines cannot be used"):
        pairs(world, text, max_bad_share=0.4)


def test_a_tsv_without_phrases_warns_once(world, caplog):
    source = pairs(world, "0.jpg\ta cat\n1.jpg\ta dog\n")
    assert source[1].concepts == ("a dog",)
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "the caption alone is the concept" in caplog.text


@pytest.mark.parametrize("name", ["../images/0.jpg", "/etc/passwd", "a/../../0.jpg", "..\\0.jpg", ""])
def test_file_names_do_not_leave_the_folder(world, name):
    content = detection_json()
    content["images"][0]["file_name"] = name
    with pytest.raises(ValueError, match="1 with a file name outside the folder"):
        detection(world, content)
    assert len(detection(world, content, max_bad_share=0.2)) == len(SIZES) - 1


def test_links_out_of_the_folder_are_refused_and_links_inside_are_not(world):
    write_image(world / "secret.jpg", SIZES[0], 0)
    (world / "images" / "0.jpg").unlink()
    os.symlink(world / "secret.jpg", world / "images" / "0.jpg")
    os.symlink(world / "images" / "2.jpg", world / "images" / "inside.jpg")
    content = detection_json()
    content["images"][1]["file_name"] = "inside.jpg"
    os.symlink(world / "images", world / "linked")  # the folder itself may be a link
    (world / "d.json").write_text(json.dumps(content))
    source = box_json.read_detection(str(world / "d.json"), str(world / "linked"))
    with pytest.raises(UnusableError, match="link out of the image folder"):
        source[0]
    assert source[1].image.endswith("2.jpg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "no valid json"),
        ("[]", "has a list"),
        ('{"images": []}', "has the keys"),
        ('{"images": [], "annotations": []}', "lists no images"),
        (json.dumps({**detection_json(), "categories": []}), "lists no categories"),
        (json.dumps({**detection_json(), "categories": [{"id": 1}]}), "needs an id and a name"),
        (json.dumps({**detection_json(), "annotations": []}), "no usable box"),
        (json.dumps(grounding_json()), "belongs in config.grounding.annotations"),
        (
            json.dumps({"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]}),
            "captions without boxes",
        ),
    ],
)
def test_json_of_another_kind_as_detection(world, content, message):
    (world / "d.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        box_json.read_detection(str(world / "d.json"), str(world / "images"))


def test_detection_json_as_grounding(world):
    with pytest.raises(ValueError, match=r"belongs in config\.detection\.annotations"):
        grounding(world, detection_json())


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ('{"images": []}', "is a json"), ("x\n", "1 of 1")])
def test_files_that_are_no_tsv(world, text, message):
    with pytest.raises(ValueError, match=message):
        pairs(world, text)


class Noted:
    """Notes the arguments of what stands for a reader."""

    def __init__(self):
        self.calls = []

    def __call__(self, *arguments, **options):
        self.calls.append((arguments, options))
        return types.SimpleNamespace(name="x")


@pytest.mark.parametrize("kind", Kind)
def test_every_option_of_a_section_reaches_what_reads_its_files(config, world, monkeypatch, kind):
    section, read, read_built = config[kind.value], Noted(), Noted()
    (world / "words.tsv").write_text("cat\ta pet\n")
    section.dictionary, section.data = str(world / "words.tsv"), ("one", "other")
    section.max_examples, section.max_bad_share, section.follow_links = 5, 0.25, True
    expected = {"max_examples": 5, "max_bad_share": 0.25, "follow_links": True}
    dropped = ()
    if kind is Kind.DETECTION:
        section.num_shots, section.few_shot_seed, section.drop_categories = 3, 30, ("cat", "of a folder")
        dropped = section.drop_categories
        expected |= {"dictionary": section.dictionary, "num_shots": 3, "few_shot_seed": 30}
        expected["dropped"] = Dropped(dropped, "config.x.drop_categories", ["one 1", "other 1"])
    monkeypatch.setattr(sources, f"read_{'pairs' if kind is Kind.IMAGE_TEXT else kind.value}", read)
    monkeypatch.setattr(sources, "read_built", read_built)
    monkeypatch.setattr(sources, "missing_folders", lambda folders, kind, prefix: [])
    monkeypatch.setattr(sources, "read_names", lambda folder: [f"{folder} 1"])
    assert len(sources.open_sources(kind, section, prefix="config.x")) == 3
    file = section["pairs" if kind is Kind.IMAGE_TEXT else "annotations"]
    assert read.calls == [((file, section.images), expected)]
    words = Vocabulary(("cat",), ("a pet",))
    built = {"dictionary": words, "max_examples": 5, "dropped": dropped}
    assert read_built.calls == [((folder, kind), built) for folder in ("one", "other")]
    section["pairs" if kind is Kind.IMAGE_TEXT else "annotations"] = section.images = ""
    if kind is Kind.DETECTION:  # then a folder must have all of them
        with pytest.raises(ValueError, match=r"^config\.x: one other has no category 'cat'"):
            sources.open_sources(kind, section, prefix="config.x")
        section.drop_categories = ("one 1",)
    assert len(sources.open_sources(kind, section, prefix="config.x")) == 2
    assert len(read.calls) == 1


def test_every_option_of_an_evaluation_reaches_what_reads_it(config, world, monkeypatch):
    section, read = config.eval, Noted()
    (world / "words.tsv").write_text("cat\ta pet\n")
    section.dictionary, section.definitions, section.drop_categories = str(world / "words.tsv"), True, ("cat",)
    section.max_examples, section.max_bad_share, section.follow_links = 5, 0.25, True
    monkeypatch.setattr(sources, "read_evaluation", read)
    assert sources.open_evaluation(section, prefix="config.x")
    expected = {key: section[key] for key in ("dictionary", "max_examples", "max_bad_share", "follow_links")}
    expected |= {"definitions": True, "dropped": Dropped(("cat",), "config.x.drop_categories")}
    assert read.calls == [((section.annotations, section.images), expected)]
    section.annotations = ""
    with pytest.raises(ValueError, match=r"^config\.x\.annotations is empty; it must name a file$"):
        sources.open_evaluation(section, prefix="config.x")
    section.images = ""
    assert sources.open_evaluation(section, prefix="config.x") is None


def test_one_line_with_phrases_is_enough(world, caplog):
    source = pairs(world, '0.jpg\ta cat\t["cat"]\n1.jpg\ta dog\n')
    assert source.counters == {}
    assert source.most_concepts == 2
    assert not caplog.records


def test_few_shots_where_ids_are_missing_or_of_both_types():
    images = [{"id": "b"}, {"file_name": "no id"}, {"id": 2}, {"id": "a"}, {"id": 1}]
    rows = [{"image_id": key, "category_id": 1, "bbox": [1, 1, 9, 9]} for key in (2, None, "a", 1, "b", 7)]
    rows[0]["bbox"] = [1, 1, 1.5, 1]  # no higher than a pixel
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "x"}]}
    order = [1, "a", "b"]
    random.Random(0).shuffle(order)
    for num in (1, 2, 5):
        split = box_json.few_shot(content, num_shots=num, seed=0)
        assert {image["id"] for image in split["images"]} == set(order[:num])


def test_wrong_folder_is_told_before_reading(world):
    (world / "empty").mkdir()
    with pytest.raises(ValueError, match=r"7 of 7 photos do not exist \(`images` must name .*\):(\n  \S*/\d\.jpg){7}$"):
        box_json.read_detection(str(world / "detection.json"), str(world / "empty"))


def test_sizes_missing_in_the_json_come_from_the_files(world):
    content = detection_json()
    for image in content["images"]:
        del image["height"], image["width"]
    content["images"][3]["file_name"] = "absent.jpg"
    source = detection(world, content, max_bad_share=0.2)
    canvases.fill_sizes(source)
    expected = [size if i != 3 else (0, 0) for i, size in enumerate(SIZES)]
    assert [tuple(size) for size in source.sizes.tolist()] == expected


def test_real_files(shared_data):
    coco = box_json.read_detection(
        str(shared_data / "coco_train/instances.json"), str(shared_data / "coco_train/images")
    )
    assert (len(coco), len(coco.vocabulary)) == (108, 80)
    assert sum(len(record.boxes) for record in coco) + coco.counters["crowd box left out"] == 963
    phrases = box_json.read_grounding(str(shared_data / "grounding/coco_train_derived.json"), str(shared_data))
    assert (len(phrases), sum(len(record.boxes) for record in phrases)) == (33, 122)
    assert set(phrases[0].concepts) <= {"tables", "chairs", "umbrellas", "closed umbrellas"}
    captions = sources.read_pairs(str(shared_data / "image_text/pairs.tsv"), str(shared_data / "image_text"))
    assert (len(captions), captions.most_concepts) == (120, 1)


def many_images(seed):
    """Returns a COCO json of 40 images with 0 to 3 of 5 categories, the last of them rare, ids in no order."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(1000)[:40].tolist()
    rows = [
        {"image_id": image_id, "category_id": int(c) + 1, "bbox": [1, 1, 1 if i % 10 == 0 else 9, 9]}
        for i, image_id in enumerate(ids)
        for c in rng.choice(5, size=rng.integers(0, 4), replace=False, p=(0.3, 0.3, 0.2, 0.19, 0.01))
    ]
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in ids]
    categories = [{"id": i + 1, "name": str(i)} for i in range(5)]
    return {"images": images, "annotations": rows, "categories": categories}


@pytest.mark.parametrize("seed", [3, 30, 300])
@pytest.mark.parametrize("num_shots", [1, 3, 5, 10])
def test_few_shots_have_every_category_as_often_and_no_image_more(num_shots, seed):
    content = many_images(seed)
    split = box_json.few_shot(content, num_shots=num_shots, seed=seed)
    taken = [image["id"] for image in split["images"]]
    turned = box_json.few_shot(content | {"images": content["images"][::-1]}, num_shots=num_shots, seed=seed)
    assert turned["images"] == split["images"][::-1]  # the order of the file does not matter
    categories_of = {i: {row["category_id"] for row in content["annotations"] if row["image_id"] == i} for i in taken}
    usable = {row["image_id"] for row in content["annotations"] if row["bbox"][2] > 1}
    assert set(taken) <= usable
    assert {row["image_id"] for row in split["annotations"]} == set(taken)
    for category in range(1, 6):
        available = {r["image_id"] for r in content["annotations"] if r["category_id"] == category} & usable
        has = sum(category in categories_of[i] for i in taken)
        assert has >= min(num_shots, len(available))
    # the rule, image by image in the order of the seed
    order = sorted(usable)
    random.Random(seed).shuffle(order)
    need = dict.fromkeys(range(1, 6), num_shots)
    for image_id in order:
        present = {row["category_id"] for row in content["annotations"] if row["image_id"] == image_id}
        assert (image_id in taken) == any(need[category] > 0 for category in present)
        if image_id in taken:
            for category in present:
                need[category] -= 1


def test_few_shots_of_the_real_members(shared_data, caplog):
    for name, most in (("Packages", 1), ("NorthAmericaMushrooms", 2)):
        folder = shared_data / "odinw" / name / "train"
        arguments = str(folder / "annotations.json"), str(folder)
        one, whole = (
            box_json.read_detection(*arguments, num_shots=1, few_shot_seed=3),
            box_json.read_detection(*arguments),
        )
        assert 1 <= len(one) <= most < len(whole)
        assert set(one.image_ids) < set(whole.image_ids)
        seeds = {
            tuple(box_json.read_detection(*arguments, num_shots=1, few_shot_seed=s).image_ids) for s in (3, 30, 300)
        }
        assert len(seeds) > 1
        with caplog.at_level(logging.INFO, logger="absl"):
            box_json.read_detection(*arguments, num_shots=3, few_shot_seed=30)
        assert "images for 3 shots, seed 30" in caplog.records[-1].getMessage()
