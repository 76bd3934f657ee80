"""Training data of the wrong kind: boxes, names, ids, phrases, mirrored sides, photos of other sets, changed files."""

import json
import shutil

import building
import numpy as np
import pytest
from micro import micro_config
from PIL import Image
from test_truth import many_boxes

from detclipv2_jax import config as config_lib
from detclipv2_jax import session, validation
from detclipv2_jax.data import box_json, identity, mirroring, scenes, sources, spans
from detclipv2_jax.data.leakage import photo_of
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.data.selection import Dropped
from detclipv2_jax.data.streams import eval_streams, train_streams
from detclipv2_jax.prepare import inspect

SIZE = (640, 480)


@pytest.fixture
def folder(tmp_path):
    """Photos of white with a black left half."""
    pixels = np.full((48, 64, 3), 255, np.uint8)
    pixels[:, :32] = 0
    for i in range(4):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def detection_json(names=("cup", "fork"), *, size=(64, 48), boxes=None, **changes):
    """Returns a COCO json of four photos, one box each."""
    boxes = [[10.0 + i, 8, 20, 16] for i in range(4)] if boxes is None else boxes
    images = [{"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]} for i in range(4)]
    rows = [
        {"id": i, "image_id": i % 4, "category_id": i % len(names), "bbox": list(box)} | changes
        for i, box in enumerate(boxes)
    ]
    return {
        "images": images, "annotations": rows, "categories": [{"id": i, "name": n} for i, n in enumerate(names)]
    }  # fmt: skip


def read(folder, content, **options):
    (folder / "d.json").write_text(json.dumps(content))
    return box_json.read_detection(str(folder / "d.json"), str(folder), **options)


# --- boxes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes_known", [True, False])
def test_boxes_of_another_form_are_refused_with_what_they_look_like(folder, seed, sizes_known):
    corners = many_boxes(seed, size=SIZE).reshape(-1, 4)
    right = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    for boxes, look in (
        (corners, r"60 boxes that look like x1, y1, x2, y2; they must be x, y, width, height"),
        (right / [*SIZE, *SIZE], "60 boxes that look relative to the image's size"),
        (corners / [*SIZE, *SIZE], "60 boxes that look relative to the image's size"),
        (np.hstack([right[:, :2] + right[:, 2:] / 2, right[:, 2:]]), "60 boxes that look like centre x, centre y"),
    ):
        content = detection_json(size=SIZE, boxes=boxes.tolist())
        if not sizes_known:
            for image in content["images"]:
                del image["width"], image["height"]
                Image.new("RGB", SIZE).save(folder / image["file_name"])
        with pytest.raises(ValueError, match=rf"60 of 60 boxes cannot be used \({look}.*max_bad_share"):
            read(folder, content, max_bad_share=0.5)
        assert list(read(folder, content, max_bad_share=1.0).counters.values())[-1] == 60
        if sizes_known:
            content["images"] = [image | {"width": 640, "height": 480} for image in content["images"]]
    assert read(folder, detection_json(size=SIZE, boxes=right.tolist())).counters == {}


def test_boxes_cut_at_the_border_or_below_a_pixel_are_counted_and_too_many_are_refused(folder):
    right = [[10.0, 8, 20, 16]] * 20
    odd = [[50.0, 8, 40, 16], [10, 40, 20, 30], [5, 5, 0.4, 8]]
    content = detection_json(boxes=[*right, *odd])
    assert read(folder, content, max_bad_share=0.2).counters == {"box cut at the border": 2, "box below a pixel": 1}
    with pytest.raises(ValueError, match=r"3 of 23 boxes .*\(2 box cut at the border, 1 box below a pixel\)"):
        read(folder, content, max_bad_share=0.1)
    assert read(folder, detection_json(boxes=[*right, [62, 8, 3, 16]])).counters == {}  # a rounded border


@pytest.mark.slow
def test_inspect_shows_what_is_odd(folder):
    content = detection_json(boxes=[[10.0, 8, 20, 16]] * 20 + [[50.0, 8, 40, 16]])
    content["annotations"][3] |= {"image_id": "3"}
    (folder / "d.json").write_text(json.dumps(content))
    config = small(folder)
    config.detection.annotations, config.detection.images, config.detection.max_bad_share = (
        str(folder / "d.json"), str(folder), 0.1
    )  # fmt: skip
    report = inspect.inspect(str(folder / "out"), config=config, num_examples=4)
    assert report["detection/64x64"]["left out or repaired"] == {
        "image_id of another type than the id it names": 1,
        "box cut at the border": 1,
    }


def small(folder):
    config = micro_config()
    for key in ("num_detection", "num_grounding", "num_image_text", "num_eval"):
        config.scenes[key] = 0
    for kind in config_lib.KINDS:
        config[kind].batch_size = 8
    return config


# --- names and ids


@pytest.mark.parametrize("name", [None, "", " ", "_", "__ ", "\u200b", "\xa0\x01", [], True, {"a": 1}])
def test_categories_without_a_name_are_refused(folder, name):
    with pytest.raises(ValueError, match=r"categories\[1\] .* needs an id and a name"):
        read(folder, detection_json(names=("cup", name)))


@pytest.mark.parametrize("ids", [["0", "1", "2", "3"], [0.0, 1.0, 2.0, 3.0]])
@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_ids_of_another_type_name_the_same_image_and_category(folder, ids, key):
    content = detection_json(names=("cup", "fork", "knife", "plate"))
    expected = [record.boxes.tolist() for record in read(folder, content)]
    for row, value in zip(content["annotations"], ids, strict=True):
        row[key] = value
    source = read(folder, content)
    assert [record.boxes.tolist() for record in source] == expected
    assert source.counters == {f"{key} of another type than the id it names": 4}


def test_boxes_of_outlines(folder):
    content = detection_json(bbox=None, segmentation=[[3, 4, 23, 4, 23, 24]])
    source = read(folder, content)
    assert source.counters == {"box taken from the outline for want of a bbox": 4}
    assert source[2].boxes.tolist() == [[3, 4, 23, 24]]


def test_shots_are_chosen_by_boxes_of_outlines_and_ids_of_both_types(folder):
    content = detection_json(names=("cup", "fork", "knife", "plate"))
    for place, name in ((1, "one"), (2, "2")):
        content["images"][place]["id"] = content["annotations"][place]["image_id"] = name
    chosen = read(folder, content, num_shots=1).image_ids
    assert sorted(map(str, chosen)) == ["0", "2", "3", "one"]
    for row in content["annotations"]:
        x, y, width, height = row.pop("bbox")
        row["segmentation"] = [[x, y, x + width, y, x + width, y + height]]
    content["annotations"][3] = {**content["annotations"][3], "segmentation": [[1, 2, True]]}
    assert set(read(folder, content, num_shots=1, max_bad_share=0.5).image_ids) == {*chosen} - {3}


def test_definitions_that_are_no_texts_are_none(folder):
    content = detection_json(names=("cup", "fork", "knife"))
    for category, given in zip(content["categories"], (["a mug"], float("nan"), " "), strict=True):
        category |= {"def": given, "definition": "for the table"}
    assert read(folder, content).vocabulary.definitions == ("for the table",) * 3


def test_names_that_differ_in_case_are_dropped_as_they_are_written(folder):
    content = detection_json(names=("Cup", "cup"))
    assert read(folder, content, dropped=Dropped(("Cup",))).vocabulary.names == ("cup",)
    (folder / "d.json").write_text(json.dumps(content))
    building.build("coco_json", input=str(folder / "d.json"), images=str(folder), output=str(folder / "built"))
    config = small(folder)
    config.detection.data, config.detection.drop_categories = (str(folder / "built"),), ("cup",)
    assert drawn(config)[2].names == ("Cup",)
    config.detection.drop_categories = ("CUP",)
    with pytest.raises(ValueError, match="has no category 'CUP', which drop_categories names"):
        drawn(config)


def test_lists_of_lvis_may_name_categories_as_text_and_hold_nothing_else(folder):
    content = detection_json()
    content["images"][0]["neg_category_ids"] = ["1", 0.0, [1], None, 7, "x"]
    content["images"][1]["not_exhaustive_category_ids"] = [True, 0]
    source = read(folder, content)
    assert source[0].negatives == ("fork", "cup")
    assert source[1].not_negatives == ("fork", "cup")
    content["images"][2]["neg_category_ids"] = 5
    with pytest.raises(ValueError, match=r"d\.json: image 2 has neg_category_ids 5, not a list of ids"):
        read(folder, content)


# --- categories without a box


def roboflow():
    content = detection_json(names=("creatures", "fish", "crab"))
    for row in content["annotations"]:
        row["category_id"] = 1
    for category in content["categories"][1:]:
        category["supercategory"] = "creatures"
    content["categories"][0]["supercategory"] = "none"
    return content


def test_categories_without_a_box_are_said_and_can_be_dropped(folder, caplog):
    source = read(folder, roboflow(), dropped=Dropped(("creatures", "crab")))
    assert source.vocabulary.names == ("fish",)
    assert "no box anywhere" not in caplog.text
    content = roboflow()
    content["annotations"][0]["category_id"] = 2
    assert read(folder, content, dropped=Dropped(("crab",))).counters == {"box of a dropped category": 1}
    with pytest.raises(
        ValueError, match=r"no category 'creature', which drop_categories names; did you mean creatures"
    ):
        read(folder, roboflow(), dropped=Dropped(("creature",)))


def test_dropped_categories_are_neither_asked_for_nor_scored(folder, caplog):
    config = small(folder)
    (folder / "d.json").write_text(json.dumps(roboflow()))
    config.eval.annotations, config.eval.images = str(folder / "d.json"), str(folder)
    (stream,) = eval_streams(config.eval, input_config=config.input)
    assert stream.ground_truth.texts == ["creatures", "fish", "crab"]
    assert "config.eval.drop_categories" in caplog.text
    config.eval.drop_categories = ("creatures", "crab")
    (stream,) = eval_streams(config.eval, input_config=config.input)
    assert stream.ground_truth.texts == ["fish"]
    assert len(stream.ground_truth.truth.categories) == 1


def test_built_folders_can_drop_categories(folder):
    (folder / "d.json").write_text(json.dumps(roboflow()))
    options = {"input": str(folder / "d.json"), "images": str(folder), "drop_categories": ("creatures", "crab")}
    building.build("coco_json", output=str(folder / "built"), **options)
    assert json.loads((folder / "built" / "vocabulary.json").read_text())["names"] == ["fish"]
    with pytest.raises(ValueError, match="--drop_categories chooses by category; grounding_json has none"):
        building.build("grounding_json", output=str(folder / "other"), **options)


def test_built_folders_say_which_categories_have_no_box(folder, caplog):
    (folder / "d.json").write_text(json.dumps(roboflow()))
    building.build("coco_json", input=str(folder / "d.json"), images=str(folder), output=str(folder / "built"))
    caplog.clear()
    config = small(folder)
    config.detection.data = (str(folder / "built"),)
    sources.open_sources(Kind.DETECTION, config.detection, prefix="config.detection")
    said = "built: 2 of 3 categories have no box anywhere: 'creatures', 'crab'. They are asked for all the same; "
    assert said + "config.detection.drop_categories leaves out those that it names" in caplog.text
    caplog.clear()
    config.detection.drop_categories = ("creatures", "crab")
    sources.open_sources(Kind.DETECTION, config.detection, prefix="config.detection")
    assert "no box anywhere" not in caplog.text


def drawn(config):
    """Returns the names on each photo with their boxes, the negatives, and the vocabulary of what is trained on."""
    (source,) = sources.open_sources(Kind.DETECTION, config.detection, prefix="config.detection")
    records = [source[i] for i in range(len(source))]
    boxes = [sorted(zip([r.concepts[i] for i in r.box_concepts], r.boxes.tolist(), strict=True)) for r in records]
    assert all(r.box_concepts.dtype == np.int32 for r in records)
    others = [(r.negatives, r.not_negatives) for r in records]
    return boxes, others, source.vocabulary, source.counters


@pytest.mark.parametrize("dropped", [("creatures",), ("crab_",), ("creatures", "fish"), ("fish", "crab")])
def test_built_folders_are_read_without_dropped_categories_like_raw_files(folder, dropped):
    content = detection_json(names=("creatures", "fish", "crab"))
    for i, image in enumerate(content["images"]):
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [i % 3], [(i + 1) % 3]
    content["annotations"] += [row | {"id": 50 + i, "category_id": i % 3, "bbox": [2 + i, 1, 9, 8]}
                               for i, row in enumerate(content["annotations"] * 2)]  # fmt: skip
    (folder / "d.json").write_text(json.dumps(content))
    building.build("coco_json", input=str(folder / "d.json"), images=str(folder), output=str(folder / "built"))
    config = small(folder)
    config.detection.drop_categories = dropped
    config.detection.annotations, config.detection.images = str(folder / "d.json"), str(folder)
    raw = drawn(config)
    config.detection.annotations, config.detection.images = "", ""
    config.detection.data = (str(folder / "built"),)
    built = drawn(config)
    assert built[:3] == raw[:3]
    assert {name for boxes in built[0] for name, _ in boxes} == set(built[2].names)
    assert built[3]["dropped category"] == len(dropped)
    config.detection.drop_categories = ("creatures", "fish", "crab")
    with pytest.raises(ValueError, match="has no category beside those that drop_categories names"):
        drawn(config)


def test_a_dropped_category_is_one_of_any_source(folder):
    config = small(folder)
    for name, names in (("a", ("fish", "crab")), ("b", ("fish", "owl"))):
        (folder / f"{name}.json").write_text(json.dumps(detection_json(names=names)))
        building.build("coco_json", input=str(folder / f"{name}.json"), images=str(folder), output=str(folder / name))
    config.detection.data = (str(folder / "a"), str(folder / "b"))
    config.detection.drop_categories = ("owl", "crab")

    def names():
        opened = sources.open_sources(Kind.DETECTION, config.detection, prefix="config.detection")
        return [source.vocabulary.names for source in opened]

    assert names() == [("fish",), ("fish",)]
    config.detection.annotations, config.detection.images = str(folder / "a.json"), str(folder)
    assert names() == [("fish",)] * 3
    config.detection.drop_categories = ("owls",)
    with pytest.raises(ValueError, match=r"a\.json has no category 'owls', .* did you mean owl"):
        names()
    config.detection.annotations, config.detection.images = "", ""
    with pytest.raises(ValueError, match=r"a .*b has no category 'owls', .* did you mean owl"):
        names()


def test_lists_of_words_are_checked():
    config = config_lib.base()
    config.detection.drop_categories, config.image_text.unflippable_words = (3,), ("",)
    with pytest.raises(ValueError, match=r"(?s)image_text\.unflippable_words .*detection\.drop_categories is \(3,\)"):
        validation.validate(config, num_devices=1)


# --- mirrored sides


@pytest.mark.parametrize(
    "text",
    [
        "arrow left", "turn_left", "Left-hand glove", "leftmost", "RIGHT", "turnLeft", "LeftTurn",
        "right-handed scissors", "clockwise", "counter-clockwise arrow", "anticlockwise",
        "counter clockwise", "rightwards arrow", "left2", "2_right", "left/right", "righthand",
        "a man on the left.", "lefthander", "topleft", "bottomright corner", "turnleft", "leftside", "LEFTTURN",
        "ccw_arrow", "cw", "facingLeft", "leftfacing", "noleftturn", "rightlane", "arrow ←", "↱", "👈",
        "\uff2c\uff25\uff26\uff34", "mergeleft", "straightRight", "leftToRight", "righteye", "bearleft", "downleft",
        "turnsright", "leftbound", "leftUTurn", "lefthandtraffic",
    ],
)  # fmt: skip
def test_texts_that_speak_of_sides(text):
    assert mirroring.speaks_of_sides(["cup", text], mirroring.pattern((), english=True))


@pytest.mark.parametrize(
    "text",
    [
        "bright light", "leftover", "copyright", "cleft", "clock", "upright piano", "alright", "fright", "wisely",
        "downright", "rights", "stopright", "↑ up", "↔", "é", "cwt",
        "righteous", "leftist", "downrights",
    ],
)  # fmt: skip
def test_texts_that_do_not(text):
    assert not mirroring.speaks_of_sides([text], mirroring.pattern((), english=True))


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        (("links",), "links abbiegen", True), (("links",), "LINKS_abbiegen", True), (("links",), "linksrum", False),
        (("à gauche",), "tournez à gauche", True), (("左",), "左转", True), (("a.b",), "axb", False),
        (("links", "rechts"), "nach rechts", True), (("à gauche",), "va_à-gauche", True),
        ((), "left", False), (("à gauche",), "tourne a\u0300 gauche", True),
    ],
)  # fmt: skip
def test_words_of_other_languages(words, text, expected):
    assert mirroring.speaks_of_sides([text], mirroring.pattern(words, english=False)) is expected


@pytest.mark.parametrize(
    ("kind", "text", "words", "mirrored"),
    [
        ("detection", "arrow left", (), False),
        ("detection", "turn_left", (), False),
        ("detection", "links abbiegen", (), True),
        ("detection", "links abbiegen", ("links",), False),
        ("detection", "cup", (), True),
        ("grounding", "an arrow pointing left", (), False),
        ("grounding", "ein Pfeil nach links", ("links",), False),
        ("grounding", "ein Pfeil nach links", (), True),
        ("image_text", "an arrow pointing left", (), True),  # pairs are mirrored anyway
        ("image_text", "an arrow pointing left", ("left",), False),
    ],
)
def test_what_speaks_of_sides_is_not_mirrored(folder, kind, text, words, mirrored):
    config = small(folder)
    section = config[kind]
    section.images, section.flip_prob, section.unflippable_words = str(folder), 1.0, words
    if kind == "image_text":
        section.pairs = str(folder / "p.tsv")
        (folder / "p.tsv").write_text("".join(f"{i}.png\t{text}\t[]\n" for i in range(4)))
    else:
        content = detection_json(names=(text, "plate"))
        for row in content["annotations"]:
            row["category_id"] = 0
        if kind == "grounding":
            for image, row in zip(content["images"], content["annotations"], strict=True):
                image["caption"], row["tokens_positive"] = text, [[0, len(text)]]
        section.annotations = str(folder / "a.json")
        (folder / "a.json").write_text(json.dumps(content))
    (stream,) = train_streams(config)
    batch = stream.batch(0)
    left = [image[: extent[0] // 2, 2].mean() for image, extent in zip(batch.image, batch.extent, strict=True)]
    assert all((pixel > 200) == mirrored for pixel in left)  # the black half is at the left


# --- spans


@pytest.mark.parametrize(
    ("caption", "given", "problem"),
    [
        ("red toy cars", [[5, 10]], spans.WITHIN_A_WORD),
        ("red toy cars 😀", [[5, 10]], spans.WITHIN_A_WORD),  # what comes later shifts nothing
        ("café red toy car", [[6, 17]], spans.OTHER_UNITS),  # bytes
        ("😀 red toy car", [[3, 14]], spans.OTHER_UNITS),  # UTF-16
        ("😀 a b", [[3, 5]], spans.OTHER_UNITS),  # at the space
        ("café red", [[5, 9]], spans.OTHER_UNITS),  # beyond the end
        ("red car", [[0, float("inf")]], spans.NOT_IN_CAPTION),
        ("wow !!! car", [[4, 7]], spans.NOT_IN_CAPTION),
        ("red car", [[7, 0]], spans.NOT_IN_CAPTION),
        ("red car", [[[0, 3]]], spans.NOT_IN_CAPTION),
        ("red car", [0, 3], spans.NOT_IN_CAPTION),
        ("red car", [], spans.NOT_IN_CAPTION),
        ("red car", None, spans.NOT_IN_CAPTION),
        ("red car", {"a": 1}, spans.NOT_IN_CAPTION),
        ("é " * 30_000, [[2 * i, 2 * i + 1] for i in range(30_000)], spans.NOT_IN_CAPTION),  # would take minutes
        ("é " * 100, [[2 * i, 2 * i + 1] for i in range(100)], ""),
        ("😀 red toy car", [[2, 13]], ""),
        ("一只红色的猫 on 桌子", [[2, 6]], ""),  # no spaces between its words
        ("the man's hat", [[4, 7]], ""),
    ],
)
def test_spans_that_give_no_phrase(caption, given, problem):
    assert spans.problem_of(caption, given) == problem


@pytest.mark.parametrize(
    ("caption", "given", "phrase", "odd"),
    [
        ("red toy car", [[-8, 3]], "red", ["span that begins before the caption"]),
        ("red toy car", [[8, 99]], "car", ["span that ends after the caption"]),
        ("red toy cars", [[8, 11]], "car", ["span that ends within a word"]),
        ("red toy car", [[0, 7], [4, 11]], "red toy car", ["spans that overlap or cover nothing"]),
        ("red toy car", [[4, 7], [0, 11]], "red toy car", ["spans that overlap or cover nothing"]),
        ("red toy car", [[0, 7], [4, 5]], "red toy", ["spans that overlap or cover nothing"]),
        ("red toy car", [["0", 3]], "red", ["span that is not two whole numbers"]),
        ("red toy car", [[False, 3]], "red", ["span that is not two whole numbers"]),
        ("red toy car", [[0, 3], [3, 7]], "red toy", []),
        ("red toy car", [[-3, 3]], "red", ["span that begins before the caption"]),
        ("red toy car", [[0.0, 3.0]], "red", ["span that is not two whole numbers"]),
        ("red\ntoy\tcar here", [[0, 11]], "red toy car", []),
        ("the old table near the table", [[23, 28], [4, 7]], "old table", []),
    ],
)
def test_odd_spans_are_counted(caption, given, phrase, odd):
    assert not spans.problem_of(caption, given)
    assert spans.phrase_of(caption, given) == phrase
    assert list(spans.oddities_of(caption, given)) == odd


# --- photos of other sets


@pytest.mark.parametrize(
    ("name", "photo"),
    [
        ("COCO_val2014_000000000042.jpg", "000000000042"),
        ("val2017/000000000042.jpg", "000000000042"),
        ("000000581929.JPEG", "000000581929"),
        ("cam1_202305041530.jpg", "cam1_202305041530.jpg"),
        ("202305041530.jpg", "202305041530.jpg"),
        ("x_000000000042.jpg", "x_000000000042.jpg"),
        ("000000000042.png", "000000000042.png"),
        ("000000000042_2.jpg", "000000000042_2.jpg"),
        ("1000000000042.jpg", "1000000000042.jpg"),
    ],
)
def test_only_photos_of_coco_are_known_by_their_number(name, photo):
    assert photo_of(name) == photo


# --- changed data


def test_a_run_goes_on_with_its_data_only(tmp_path):
    scenes.write(tmp_path / "w", num_detection=8, num_grounding=8, num_image_text=0, num_eval=0, size_px=64)
    options = {"input": str(tmp_path / "w/detection.json"), "images": str(tmp_path / "w")}
    building.build("coco_json", output=str(tmp_path / "built"), **options)
    config = small(tmp_path)
    config.grounding.annotations, config.grounding.images = str(tmp_path / "w/grounding.json"), str(tmp_path / "w")
    config.detection.data = (str(tmp_path / "built"),)
    workdir = tmp_path / "run"
    data = identity.of_run(config)
    assert len(data) == 5
    session.check_data(workdir, data, allowed=False)  # nothing there
    (workdir / "checkpoints/3").mkdir(parents=True)
    (workdir / "data.json").write_text(json.dumps(data))
    session.check_data(workdir, identity.of_run(config), allowed=False)
    content = json.loads((tmp_path / "w/grounding.json").read_text())
    content["annotations"][0]["bbox"][0] += 1
    (tmp_path / "w/grounding.json").write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "built")
    building.build("coco_json", output=str(tmp_path / "built"), num_examples=6, **options)
    (tmp_path / "d.tsv").write_text("cup\ta vessel\n")
    config.detection.dictionary = str(tmp_path / "d.tsv")
    changed = identity.of_run(config)
    with pytest.raises(ValueError, match="go on with --changed_data") as error:
        session.check_data(workdir, changed, allowed=False)
    lines = str(error.value).splitlines()
    assert "  config.grounding.annotations changed" in lines
    assert "  config.detection.data[0] index.npz changed" in lines
    assert "  config.detection.dictionary is new" in lines
    session.check_data(workdir, changed, allowed=True)
    for section in (config.eval, config.forgetting):
        section.annotations, section.dictionary = str(tmp_path / "w/detection.json"), str(tmp_path / "d.tsv")
    began = identity.of_run(config)
    assert identity.changes(changed, began) == []  # a run may go on with another evaluation
    (tmp_path / "d.tsv").write_text("cup\ta mug\n")
    lines = identity.changes(began, identity.of_run(config))
    assert lines == [
        "config.detection.dictionary changed", f"config.eval.dictionary {tmp_path}/d.tsv changed",
        f"config.forgetting.dictionary {tmp_path}/d.tsv changed",
    ]  # fmt: skip
    (tmp_path / "w/detection.json").write_text((tmp_path / "w/detection.json").read_text() + " ")
    assert f"config.eval.annotations {tmp_path}/w/detection.json changed" in identity.changes(
        began, identity.of_run(config)
    )
    config.eval.annotations = config.eval.dictionary = config.forgetting.annotations = config.forgetting.dictionary = ""
    with pytest.raises(ValueError, match=r"config\.grounding\.annotations changed"):
        session.setup(config, workdir, training=True)


def test_a_folder_that_was_built_again_of_another_file_has_changed(folder):
    content, config = detection_json(), config_lib.base()
    config.detection.data = (str(folder / "built"),)

    def built_of(name):
        shutil.rmtree(folder / "built", ignore_errors=True)
        (folder / name).write_text(json.dumps(content))
        building.build("coco_json", output=str(folder / "built"), input=str(folder / name), images=str(folder))
        return identity.of_run(config)

    began = built_of("a.json")
    assert identity.changes(began, built_of("moved.json")) == []
    content["annotations"][2]["bbox"][0] += 1  # which is not in the index
    now = built_of("a.json")
    (line,) = identity.changes(began, now)
    assert line == "config.detection.data[0], files it was built of, changed"
    del began[line.removesuffix(" changed")]  # as of a run that began before this was noted
    assert identity.changes(began, now) == []
