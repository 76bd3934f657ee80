import collections
import io
import json
import os
import pathlib
import shutil

import building
import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from detclipv2_jax.data import box_json, scene_drawing, scenes, shapes, sources, spans, workers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "scenes.png"
COUNTS = {"num_detection": 30, "num_grounding": 40, "num_image_text": 80, "num_eval": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes")
    scenes.write(path, **COUNTS, size_px=96, seed=3)
    return path


def load(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


def test_the_world_is_as_large_as_promised():
    assert len({*scenes.BASE_SHAPES, *scenes.NOVEL_SHAPES}) >= 24
    assert len(scenes.NOVEL_SHAPES) >= 8
    assert len(scenes.COLORS) == 10
    assert len(scene_drawing.TEXTURES) == 4
    assert set(shapes.outlines()) == {*scenes.BASE_SHAPES, *scenes.NOVEL_SHAPES}
    for parts in shapes.outlines().values():
        assert max(np.abs(polygon).max() for entry, polygon in parts if entry) <= 1.0


def golden_tiles():
    """Returns pictures of 48 px: every shape on plain ground, then whole scenes, the largest ones last."""
    cv2.ipp.setUseIPP_NotExact(False)  # as worlds are written
    every, tiles = (*scenes.BASE_SHAPES, *scenes.NOVEL_SHAPES), []
    for i, shape in enumerate(every):
        for k in range(2):
            color, texture = [*scenes.COLORS][(i + 5 * k) % 10], scene_drawing.TEXTURES[(i + k) % 4]
            image = np.full((48, 48, 3), 128, np.float32)
            scene_drawing._paint(image, scenes.Thing(shape, color, texture, (0.5, 0.5), 0.45, 24 * k))
            tiles.append(image.clip(0, 255).astype(np.uint8))
    for i in range(12):
        scene = scenes.draw(
            np.random.default_rng(i), shapes=every, size_px=288 if i > 5 else 48, training=True, distinct=i % 2 > 0
        )
        tiles.append(cv2.resize(scene.image, (48, 48), interpolation=cv2.INTER_AREA))
    return np.stack(tiles)


def test_pictures_are_as_they_were():
    """Worlds of one format are the same: REWRITE_GOLDEN=1 rewrites the picture after a deliberate change."""
    tiles = golden_tiles()
    if os.environ.get("REWRITE_GOLDEN"):
        sheet = tiles.reshape(5, 12, 48, 48, 3).swapaxes(1, 2).reshape(5 * 48, 12 * 48, 3)
        cv2.imwrite(str(GOLDEN), sheet[..., ::-1])
    golden = cv2.imread(str(GOLDEN))[..., ::-1].reshape(5, 48, 12, 48, 3).swapaxes(1, 2).reshape(60, 48, 48, 3)
    difference = np.abs(tiles.astype(int) - golden)
    assert difference[:48].max() <= 24  # rounding of edges
    assert difference[48:].mean(axis=(1, 2, 3)).max() < 0.3


@pytest.mark.parametrize("angle", [0, 30, -30])
def test_a_turned_shape_is_painted_to_its_ends(angle):
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    for shape, parts in shapes.outlines().items():
        points = np.concatenate([polygon for entry, polygon in parts if entry])
        turned = np.stack([points[:, 0] * cosine - points[:, 1] * sine, points[:, 0] * sine + points[:, 1] * cosine], 1)
        image = np.full((100, 100, 3), 255, np.float32)
        box = scene_drawing._paint(image, scenes.Thing(shape, "black", "plain", (0.5, 0.5), 0.25, angle))
        seen = [np.flatnonzero((image < 200).all(axis=2).any(axis=axis))[[0, -1]] for axis in (0, 1)]
        np.testing.assert_allclose(box, [seen[0][0], seen[1][0], seen[0][1] + 1, seen[1][1] + 1], atol=1)
        if all(entry for entry, _ in parts):  # else a hole may reach an end
            np.testing.assert_allclose(box, 50 + 25 * np.array([*turned.min(axis=0), *turned.max(axis=0)]), atol=1)


def test_two_things_are_sometimes_told_by_their_sides():
    rng = np.random.default_rng(0)
    left, right = (
        scenes.Thing("star", color, "plain", (x, 0.5), 0.2, 0.0) for color, x in (("orange", 0.3), ("red", 0.7))
    )
    scene = scenes.Scene(np.zeros((1, 1, 3), np.uint8), (right, left), np.zeros((2, 4), np.float32), "sand")
    told = collections.Counter()
    for _ in range(1000):
        caption, spans_of = scenes._grounding_caption(rng, scene)
        assert [caption[start:end] for [start, end] in spans_of] == ["red star", "orange star"]
        told[caption] += 1
    sided = {caption: num for caption, num in told.items() if "right of" in caption}
    assert 250 < sum(sided.values()) < 350
    assert len(sided) == 4
    assert "a picture of a red star and an orange star on sand" in told.keys() - sided.keys()
    assert not any("left of" in caption for caption in told)
    assert (
        sum(
            scenes._caption(rng, ["cup", "key", "ladder"], "sand")[0].count("a cup, a key and a ladder")
            for _ in range(9)
        )
        == 9
    )


def test_a_texture_is_told_now_and_then():
    rng, texts = np.random.default_rng(0), []
    for texture in ("plain", "striped"):
        thing = scenes.Thing("star", "red", texture, (0.5, 0.5), 0.2, 0.0)
        texts.append([scenes._phrase(rng, thing) for _ in range(2000)])
    assert set(texts[0]) == {"red star"}
    assert set(texts[1]) == {"red star", "striped red star"}
    assert 0.12 < texts[1].count("striped red star") / 2000 < 0.18


def test_writing_is_deterministic_and_scenes_do_not_depend_on_their_number(folder, tmp_path):
    scenes.write(tmp_path, **COUNTS | {"num_detection": 10, "num_eval": 0}, size_px=96, seed=3)
    for name in ("grounding.json", "pairs.tsv", "images/grounding/000003.jpg", "images/detection/000009.jpg"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert load(tmp_path, "detection")["images"] == load(folder, "detection")["images"][:10]
    assert not (tmp_path / "eval.json").exists()
    shutil.rmtree(tmp_path)
    scenes.write(tmp_path, **COUNTS, size_px=96, seed=4)
    assert (tmp_path / "pairs.tsv").read_bytes() != (folder / "pairs.tsv").read_bytes()


def test_a_large_part_is_written_by_another_process_the_same(folder, tmp_path, monkeypatch):
    written, write_part = [], scenes._write_part

    def here(where, part, count, **options):
        written.append(part)
        write_part(where, part, count, **options)

    monkeypatch.setattr(scenes, "_NUM_BESIDE", 8)
    here.__module__, here.__name__ = write_part.__module__, write_part.__name__
    monkeypatch.setattr(scenes, "_write_part", here)
    cv2.ipp.setUseIPP_NotExact(True)  # as after a photo was read
    scenes.write(tmp_path, **COUNTS, size_px=96, seed=3)
    assert written == ["grounding", "image_text", "eval"]
    for path in folder.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes()


def test_what_another_process_cannot_do_is_raised_here(tmp_path):
    (tmp_path / "images").write_text("no folder")
    world = {"size_px": 32, "seed": 0, "novel_captions": True, "named_share": 0.5, "wrong_share": 0.0}
    with pytest.raises(NotADirectoryError), workers.beside(scenes._write_part, str(tmp_path), "eval", 1, **world):
        pass


def test_parts_have_scenes_of_their_own_and_captions_the_side_that_is_seen(folder):
    photos = [path.read_bytes() for path in sorted(folder.glob("images/*/*.jpg"))]
    assert len(set(photos)) == len(photos) == sum(COUNTS.values())
    content, told = load(folder, "grounding"), 0
    for image in content["images"]:
        first, *second = (row["bbox"] for row in content["annotations"] if row["image_id"] == image["id"])
        for side, sign in ((" left of ", 1), (" right of ", -1)):
            if side in image["caption"]:
                told += 1
                assert sign * (second[0][0] + second[0][2] / 2 - first[0] - first[2] / 2) > 0
    assert told >= 2


def test_writing_again_does_nothing_and_another_world_is_refused(folder):
    (folder / "pairs.tsv").touch()
    before = (folder / "pairs.tsv").stat().st_mtime_ns
    scenes.write(folder, **COUNTS, size_px=96, seed=3)
    assert (folder / "pairs.tsv").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="choose another folder"):
        scenes.write(folder, **COUNTS, size_px=96, seed=4)
    with pytest.raises(ValueError, match="size_px is 16"):
        scenes.write(folder / "x", **COUNTS, size_px=16, seed=4)


def test_files_are_read_as_real_data(folder):
    detection = box_json.read_detection(str(folder / "detection.json"), str(folder))
    assert len(detection) == 30
    assert set(detection.vocabulary.names) == {f"{c} {s}" for c in scenes.COLORS for s in scenes.BASE_SHAPES}
    grounding = box_json.read_grounding(str(folder / "grounding.json"), str(folder))
    assert len(grounding) == 40
    pairs = sources.read_pairs(str(folder / "pairs.tsv"), str(folder))
    assert len(pairs) == 80
    for source in (detection, grounding, pairs):
        assert source.counters == {}
        for record in source:
            assert cv2.imread(record.image).shape == (96, 96, 3)
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(like := io.BytesIO(), "JPEG", quality=95, subsampling="4:4:4")
    with Image.open(folder / "images/detection/000000.jpg") as stored, Image.open(like) as expected:
        assert (stored.quantization, stored.layer) == (expected.quantization, expected.layer)
    coco = COCO(str(folder / "eval.json"))
    assert sorted(coco.getImgIds()) == list(range(1, 41))
    assert sorted(coco.getAnnIds()) == list(range(1, len(coco.getAnnIds()) + 1))
    assert len(coco.getCatIds()) == 240


@pytest.mark.parametrize(
    ("kind", "file", "count"),
    [("coco_json", "detection.json", 30), ("grounding_json", "grounding.json", 40), ("image_text", "pairs.tsv", 80)],
)
def test_files_are_built_as_real_data(folder, tmp_path, kind, file, count):
    report = building.build(kind, input=str(folder / file), output=str(tmp_path))
    assert (report["examples"], report["dropped"]) == (count, {})


def test_base_and_novel_shapes_stay_where_they_belong(folder):
    for part in ("detection", "eval"):
        for category in load(folder, part)["categories"]:
            assert category["frequency"] == ("r" if category["name"].split()[1] in scenes.NOVEL_SHAPES else "f")
            assert category["name"].split()[1] == category["supercategory"]
            assert part == "eval" or category["frequency"] == "f"
    grounding, pairs = (folder / "grounding.json").read_text(), (folder / "pairs.tsv").read_text()
    assert not any(f" {shape}" in grounding for shape in scenes.NOVEL_SHAPES)
    assert all(f" {shape}" in pairs for shape in scenes.NOVEL_SHAPES)
    detection_ids = {c["name"]: c["id"] for c in load(folder, "detection")["categories"]}
    eval_ids = {c["name"]: c["id"] for c in load(folder, "eval")["categories"]}
    assert detection_ids.items() <= eval_ids.items()
    assert sorted(eval_ids.values()) == [*range(1, 241)]
    for part in ("detection", "grounding", "eval"):
        rows = load(folder, part)["annotations"]
        assert [row["id"] for row in rows] == [*range(1, len(rows) + 1)]
        assert {row["iscrowd"] for row in rows} == {0}


def test_eval_has_lvis_fields_and_held_out_combinations(folder):
    content = load(folder, "eval")
    ids = {category["id"] for category in content["categories"]}
    for image in content["images"]:
        present = {a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]}
        assert image["neg_category_ids"] == sorted(ids - present)
        assert image["not_exhaustive_category_ids"] == []
    held_out = [annotation["held_out"] for annotation in content["annotations"]]
    assert 0 < sum(held_out) < 0.3 * len(held_out)
    assert not any(annotation["held_out"] for annotation in load(folder, "detection")["annotations"])


def test_spans_of_grounding_captions_name_the_categories(folder):
    content = load(folder, "grounding")
    captions = {image["id"]: image["caption"] for image in content["images"]}
    for annotation in content["annotations"]:
        phrase = spans.phrase_of(captions[annotation["image_id"]], annotation["tokens_positive"])
        color, shape = phrase.split()[-2:]
        assert color in scenes.COLORS
        assert shape in scenes.BASE_SHAPES
        assert len(phrase.split()) == 2 or phrase.split()[0] in scene_drawing.TEXTURES


def test_wrong_captions_are_those_of_other_images(folder, tmp_path):
    right = (folder / "pairs.tsv").read_text().splitlines()
    scenes.write(tmp_path, **COUNTS | {"num_detection": 0, "num_eval": 0}, size_px=96, seed=3, wrong_share=0.6)
    wrong = (tmp_path / "pairs.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in wrong] == [line.split("\t")[0] for line in right]
    captions = [[line.split("\t", 1)[1] for line in lines] for lines in (right, wrong)]
    assert sorted(captions[0]) == sorted(captions[1])
    assert wrong == scenes.exchange_captions(right, 0.6, seed=(3, 5))  # whichever other options there are
    assert 0.3 <= np.mean([old != new for old, new in zip(*captions, strict=True)]) <= 0.9
    for file in folder.glob("images/image_text/*"):
        assert (tmp_path / file.relative_to(folder)).read_bytes() == file.read_bytes()
    lines = [f"{i}.jpg\tcaption {i}\t[]\n" for i in range(2000)]
    assert scenes.exchange_captions(lines, 0.0, seed=1) == lines
    assert scenes.exchange_captions(lines, 1.0, seed=1)[:2] == ["0.jpg\tcaption 1999\t[]\n", "1.jpg\tcaption 0\t[]\n"]
    other = scenes.exchange_captions(lines, 0.3, seed=1)
    assert 0.27 < np.mean([old != new for old, new in zip(lines, other, strict=True)]) < 0.33
    assert other != scenes.exchange_captions(lines, 0.3, seed=2)
    with pytest.raises(ValueError, match=r"wrong_share is 1.5; it must be from 0 to 1"):
        scenes.write(tmp_path / "other", **COUNTS, wrong_share=1.5)


def test_class_names_are_folders_of_images_with_one_object_each(tmp_path):
    scenes.write_class_names(tmp_path / "classes", num_images=60, size_px=64, seed=5)
    photos = sorted((tmp_path / "classes").glob("*/*.jpg"), key=lambda path: path.name)
    assert [path.stem for path in photos] == [f"{i:06d}" for i in range(60)]
    names = {path.parent.name for path in photos}
    assert {name.split()[0] for name in names} == set(scenes.COLORS)
    assert {name.split()[1] for name in names} & set(scenes.NOVEL_SHAPES)
    assert {name.split()[1] for name in names} & set(scenes.BASE_SHAPES)
    for i, photo in enumerate(photos):
        rng = np.random.default_rng((5, 4, i))
        every = (*scenes.BASE_SHAPES, *scenes.NOVEL_SHAPES)
        scene = scenes.draw(rng, shapes=every, size_px=64, training=True, distinct=True, alone=True)
        assert [thing.name for thing in scene.things] == [photo.parent.name]
        assert not scene.things[0].held_out
        assert np.abs(cv2.imread(str(photo))[..., ::-1].astype(float) - scene.image).mean() < 5


@pytest.mark.parametrize(("share", "low", "high"), [(0.5, 0.45, 0.7), (0.9, 0.85, 0.95), (1.0, 1.0, 1.0)])
def test_captions_are_incomplete_and_noisy(share, low, high):
    shown = mentioned = absent = 0
    for i in range(300):
        rng = np.random.default_rng(i)
        scene = scenes.draw(rng, shapes=scenes.BASE_SHAPES, size_px=64, training=True, distinct=True)
        _, caption, phrases = (
            scenes._image_text_line(rng, scene, "x.jpg", shapes=scenes.BASE_SHAPES, named_share=share)
            .rstrip("\n")
            .split("\t")
        )
        phrases = json.loads(phrases)
        assert all(phrase in caption for phrase in phrases)
        names = [" ".join(phrase.split()[-2:]) for phrase in phrases]
        present = {thing.name for thing in scene.things}
        assert len(present) == len(scene.things)
        shown += len(present)
        mentioned += len(present & set(names))
        absent += bool(set(names) - present)
    assert low <= mentioned / shown <= high  # at least one of each scene
    assert 0.04 < absent / 300 < 0.16


def test_the_share_that_captions_name_belongs_to_a_world(tmp_path):
    counts = {"num_detection": 0, "num_grounding": 0, "num_image_text": 20, "num_eval": 0}
    for share in (0.5, 1.0):
        scenes.write(tmp_path / str(share), **counts, size_px=32, named_share=share)
    half, whole = (json.loads((tmp_path / name / "scenes.json").read_text()) for name in ("0.5", "1.0"))
    assert (half.keys() ^ whole.keys(), whole["named_share"]) == ({"named_share"}, 1.0)  # worlds of before have none
    named = [(tmp_path / name / "pairs.tsv").read_text().count(" a") for name in ("0.5", "1.0")]
    assert named[0] < named[1]
    scenes.write(tmp_path / "0.5", **counts, size_px=32)  # the same
    with pytest.raises(ValueError, match=r"holds generated scenes with .*choose another folder"):
        scenes.write(tmp_path / "0.5", **counts, size_px=32, named_share=0.25)
    with pytest.raises(ValueError, match=r"named_share is 1.5; it must be from 0 to 1"):
        scenes.write(tmp_path / "other", **counts, size_px=32, named_share=1.5)


def test_captions_may_leave_novel_shapes_out(tmp_path):
    for novel_captions in (True, False):
        scenes.write(
            tmp_path / str(novel_captions), num_detection=0, num_grounding=0, num_image_text=20, num_eval=0, size_px=48,
            novel_captions=novel_captions,
        )  # fmt: skip
    named, silent = (tmp_path / name / "pairs.tsv" for name in ("True", "False"))
    assert any(f" {shape}" in named.read_text() for shape in scenes.NOVEL_SHAPES)
    assert not any(f" {shape}" in silent.read_text() for shape in scenes.NOVEL_SHAPES)
    picture = "images/image_text/000007.jpg"
    assert (tmp_path / "True" / picture).read_bytes() == (tmp_path / "False" / picture).read_bytes()
    assert len(sources.read_pairs(str(silent), str(tmp_path / "False"))) == 20


@pytest.mark.parametrize("shape", [*scenes.BASE_SHAPES, *scenes.NOVEL_SHAPES])
def test_boxes_are_tight(shape):
    rng = np.random.default_rng(0)
    for angle, center in ((0.0, (0.5, 0.5)), (25.0, (0.3, 0.7)), (-30.0, (0.1, 0.95))):
        thing = scenes.Thing(shape, "red", scene_drawing.TEXTURES[rng.integers(4)], center, 0.2, angle)
        ground = np.full((128, 128, 3), 128, np.float32)
        box = scene_drawing._paint(ground, thing)
        ys, xs = np.nonzero(np.abs(ground - 128).max(axis=2) > 40)
        np.testing.assert_allclose(box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=1.0)


def test_an_eighth_of_the_combinations_is_held_out_and_no_caption_names_one_twice():
    held_out = [
        scenes.Thing(shape, color, texture, (0.5, 0.5), 0.1, 0.0).held_out
        for shape in (*scenes.BASE_SHAPES, *scenes.NOVEL_SHAPES)
        for color in scenes.COLORS
        for texture in scene_drawing.TEXTURES
    ]
    assert sum(held_out[: 16 * 40]) == 16 * 40 / 8
    assert not any(held_out[16 * 40 :])
    rng, shapes = np.random.default_rng(0), ("star", "cup")
    scene = scenes.draw(rng, shapes=shapes, size_px=256, training=True, distinct=True)
    assert len(scene.things) > 2
    for _ in range(400):
        line = scenes._image_text_line(rng, scene, "x.jpg", shapes=shapes, named_share=0.5)
        *_, phrases = line.rstrip("\n").split("\t")
        names = [" ".join(phrase.split()[-2:]) for phrase in json.loads(phrases)]
        assert len(set(names)) == len(names)


def test_things_are_turned_clockwise():
    """The apex of a triangle points up, and to the right after a quarter turn: most of it lies at the other side."""
    for angle, side in ((0.0, (0, 1)), (90.0, (-1, 0)), (180.0, (0, -1)), (-90.0, (1, 0))):
        image = np.full((128, 128, 3), 128, np.float32)
        scene_drawing._paint(image, scenes.Thing("triangle", "red", "plain", (0.5, 0.5), 0.3, angle))
        ys, xs = np.nonzero(np.abs(image - 128).max(axis=2) > 40)
        np.testing.assert_allclose((xs.mean() - 63.5, ys.mean() - 63.5), np.multiply(side, 7), atol=3)


def test_colors_are_those_of_the_names_and_areas_those_of_the_boxes(folder):
    content = load(folder, "detection")
    files = {image["id"]: image["file_name"] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    checked = 0
    for row in content["annotations"]:
        x, y, width, height = row["bbox"]
        assert row["area"] == pytest.approx(width * height, abs=0.006)
        color = scenes.COLORS[names[row["category_id"]].split()[0]]
        if abs(color[0] - color[2]) > 150:
            checked += 1
            image = cv2.imread(str(folder / files[row["image_id"]]))[..., ::-1].astype(int)
            inside = image[int(y) : int(y + height), int(x) : int(x + width)]
            assert np.abs(inside[..., 0] - inside[..., 2] - (color[0] - color[2])).min() < 70
    assert checked > 10


def test_boxes_are_neither_too_large_nor_too_small_on_the_whole():
    errors = []
    for shape in (*scenes.BASE_SHAPES, *scenes.NOVEL_SHAPES):
        for angle, center in ((0.0, (0.5, 0.5)), (25.0, (0.3, 0.7))):
            image = np.full((128, 128, 3), 128, np.float32)
            box = scene_drawing._paint(image, scenes.Thing(shape, "red", "plain", center, 0.2, angle))
            ys, xs = np.nonzero(np.abs(image - 128).max(axis=2) > 40)
            errors.append(box - [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    np.testing.assert_allclose(np.mean(errors, axis=0), 0, atol=0.25)


def test_things_stay_apart_and_inside():
    for i in range(100):
        scene = scenes.draw(
            np.random.default_rng(i), shapes=scenes.BASE_SHAPES, size_px=96, training=False, distinct=False
        )
        assert 1 <= len(scene.things) <= 4
        assert scene.boxes.shape == (len(scene.things), 4)
        assert (scene.boxes >= 0).all()
        assert (scene.boxes <= 96).all()
        assert ((scene.boxes[:, 2:] - scene.boxes[:, :2]) > 8).all()
