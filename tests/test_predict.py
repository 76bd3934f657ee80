"""The command: what it writes, which inputs it takes, and what it says of wrong ones."""

import functools
import io
import json
import logging
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import planted
import pytest
from PIL import Image

from detclipv2_jax import config as config_lib
from detclipv2_jax.data import tokenizer, transforms
from detclipv2_jax.inference import Found, Predictor, vocabulary
from detclipv2_jax.models import detclip
from detclipv2_jax.predict import __main__ as predict
from detclipv2_jax.predict import inputs
from detclipv2_jax.runs import checkpoints, state
from detclipv2_jax.visualize import figures


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of photos, the planted model in place of a checkpoint."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(planted.paint((100, 300), {"red": (200, 20, 260, 80)})).save(folder / "a.png")
    Image.fromarray(planted.paint((300, 100), {"red": (20, 200, 80, 260)})).save(
        folder / "b.jpg", quality=98, subsampling=0
    )
    Image.fromarray(planted.paint((64, 128), {"blue": (40, 10, 90, 50)})).save(folder / "c.png")
    (folder / "notes.txt").write_text("no image, no suffix of one")
    predictor = Predictor(*planted.make(), cache=tmp_path / "cache")
    monkeypatch.setattr(Predictor, "from_checkpoint", lambda workdir: predictor)
    return folder


def _run(photos, *, images=None, words="red, blue", **options):
    output = photos.parent / "out"
    options = {"score_threshold": 0.1, "max_detections": 4} | options
    status = predict.run(checkpoint="run", images=images or str(photos), words=words, output=str(output), **options)
    return status, json.loads((output / "detections.json").read_text()), output


def test_everything_is_written(photos, capsys):
    status, rows, output = _run(photos, batch_size=2)
    assert status == 0
    sizes, iterate = [], Predictor.iterate
    with pytest.MonkeyPatch.context() as patch:  # few photos are no batch of many
        patch.setattr(
            Predictor, "iterate", lambda *given, **more: sizes.append(more["batch_size"]) or iterate(*given, **more)
        )
        assert _run(photos, batch_size=5)[1] == rows
        _run(photos, batch_size=5, tile=400)
    assert sizes == [3, 5]
    capsys.readouterr()
    assert not (output / "coco.json").exists()
    _run(photos, batch_size=2, formats=("coco", "yolo"))
    labels = json.loads((output / "coco.json").read_text())
    assert [row["name"] for row in labels["categories"]] == ["red", "blue"]
    assert [row["bbox"] for row in labels["annotations"]] == [row["bbox"] for row in rows]
    assert (output / "yolo").is_dir()
    summary = capsys.readouterr().out.splitlines()[-1]
    assert (
        summary == f"3 of 3 images, {len(rows)} boxes: {output / 'detections.json'}, pictures in {output / 'pictures'}"
    )
    best = {row["image_id"]: row for row in rows[::-1]}
    assert {i: row["name"] for i, row in best.items()} == {1: "red", 2: "red", 3: "blue"}
    assert {i: row["category_id"] for i, row in best.items()} == {1: 1, 2: 1, 3: 2}
    assert best[2]["file_name"] == str(photos / "b.jpg")
    np.testing.assert_allclose(best[1]["bbox"], [200, 20, 60, 60], atol=5)
    np.testing.assert_allclose(best[2]["bbox"], [20, 200, 60, 60], atol=5)
    np.testing.assert_allclose(best[3]["bbox"], [40, 10, 50, 40], atol=1)
    assert sorted(row["image_id"] for row in rows) == [row["image_id"] for row in rows]
    pictures = sorted((output / "pictures").iterdir())
    assert [path.name for path in pictures] == ["a.jpg", "b.jpg", "c.jpg"]
    for path in pictures:
        with Image.open(path) as picture:
            assert max(picture.size) > 900


def test_options_reach_the_predictor_and_the_pictures(photos, monkeypatch):
    monkeypatch.setattr(transforms, "MAX_PIXELS", 20_000)  # the JPEG has 30,000: it is read at half size
    asked, drawn = [], []

    def iterate(self, images, words, **options):
        asked.append((dict(words), options))
        for i, pixels in enumerate(images):
            found = np.float32([[1, 2, 5, 8], [0, 0, 3, 4]]), np.float32([0.75, 0.5]), np.array([1, 0])
            yield i, Found(*found, tuple(words), pixels.shape[:2])

    monkeypatch.setattr(Predictor, "iterate", iterate)
    monkeypatch.setattr(figures, "detections", lambda *given, **options: drawn.append((given, options)))
    (photos.parent / "words.txt").write_text("red: a colour\n")
    options = {
        "score_threshold": 0.125, "nms_iou": 0.375, "max_detections": 3, "score": "centerness", "tile": 64,
        "tile_overlap": 0.25, "batch_size": 5,
    }  # fmt: skip
    names = {"words": "", "words_file": str(photos.parent / "words.txt"), "vocabulary": "coco"}
    _, rows, output = _run(photos, images=f"{photos}/[bc].*", draw_threshold=0.5, max_drawn=7, **names, **options)
    ((words, given),) = asked
    assert given == options | {"exemplars": {}}
    assert (len(words), words["red"], words["cat"]) == (81, "a colour", "")
    assert [row["bbox"] for row in rows] == [[2, 4, 8, 12], [0, 0, 6, 8], [1, 2, 4, 6], [0, 0, 3, 4]]
    assert [row["name"] for row in rows] == 2 * ["bicycle", "person"]
    for name, ((pixels, boxes, labels, vocabulary_of_found), one) in zip(("b.jpg", "c.png"), drawn, strict=True):
        assert pixels.shape == {"b.jpg": (150, 50, 3), "c.png": (64, 128, 3)}[name]
        np.testing.assert_allclose(boxes, [[1, 2, 5, 8], [0, 0, 3, 4]])
        assert [vocabulary_of_found[label] for label in labels] == ["bicycle", "person"]
        assert one.pop("scores").tolist() == [0.75, 0.5]
        path = output / "pictures" / f"{name[0]}.jpg"
        assert one == {"min_score": 0.5, "max_drawn": 7, "title": name, "path": path}


def test_numbers_that_make_no_sense_are_refused_first(photos):
    for wrong, message in (
        ({"batch_size": 0}, "--batch_size=0 must be 1 or more"),
        ({"max_drawn": -1}, "--max_drawn=-1 0 or more"),
        ({"tile": 31}, "tile is 31; it must be 0, for none, or at least 32 px"),
        ({"formats": ("voc",)}, "--formats: there is no format 'voc'"),
    ):
        with pytest.raises(ValueError, match=message):
            _run(photos, images="no such file", **wrong)
    with pytest.raises(ValueError, match="no image in"):
        _run(photos, images="no such file", max_drawn=0, batch_size=1, tile=32)


def test_other_pictures_need_another_command(photos):
    image = str(photos / "c.png")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            _run(photos, images=image)
    for changed in ({"draw_threshold": 0.3}, {"max_drawn": 5}):
        with pytest.raises(ValueError, match="holds what a command with other pictures found"):
            _run(photos, images=image, **changed)
    assert _run(photos, images=image)[0] == 0


def test_photos_whose_names_are_not_utf_8_lose_no_prediction(photos, caplog):
    names = [b"\xff\xe9.png", b"A.png", b"\xe9/\xff.png", b"line\nend.png", "\u202ea.png".encode()]
    for name in names:
        path = pathlib.Path(os.fsdecode(os.fsencode(photos) + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((photos / "a.png").read_bytes())
    (pathlib.Path(os.fsdecode(os.fsencode(photos) + b"/\xfe.png"))).write_bytes(b"no photo")
    status, rows, output = _run(photos)
    assert status == 1  # the one that is no photo
    assert caplog.messages[-1] == rf"cannot read '{photos}/\udcfe.png': not an image"
    written = {os.fsencode(row["file_name"]).removeprefix(os.fsencode(photos) + b"/") for row in rows}
    assert written == {*names, b"a.png", b"b.jpg", b"c.png"}
    pictures = [path.name.casefold() for path in (output / "pictures").iterdir()]
    assert len(set(pictures)) == len(pictures) == 8
    assert all(name.isprintable() and name.encode() for name in pictures)
    assert len({row["image_id"] for row in rows}) == 8


def test_an_image_that_cannot_be_read_stops_nothing(photos, caplog, capsys):
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:500])
    (photos / "d.png").write_bytes(b"")
    with caplog.at_level(logging.ERROR, logger="absl"):
        status, rows, output = _run(photos)
    assert status == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"2 of 4 images, {len(rows)} boxes: ")
    assert "error: images that could not be read: 2;" in captured.err
    assert {row["image_id"] for row in rows} == {1, 3}
    assert [path.name for path in sorted((output / "pictures").iterdir())] == ["a.jpg", "c.jpg"]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"cannot read {photos / 'b.jpg'}: truncated image",
        f"cannot read {photos / 'd.png'}: empty file",
    ]


def test_ways_to_name_images(photos, monkeypatch):
    names = [photos / name for name in ("a.png", "b.jpg", "c.png")]
    assert inputs.list_images(str(photos)) == names
    assert inputs.list_images(str(photos / "*.png")) == [names[0], names[2]]
    assert inputs.list_images(str(photos.parent / "**" / "*.jpg")) == [names[1]]
    assert inputs.list_images(str(photos.parent)) == names  # of a sub-folder
    assert inputs.list_images(str(names[1])) == [names[1]]
    bracket = photos / "x[1].png"
    names[0].rename(bracket)
    assert inputs.list_images(str(bracket)) == [bracket]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{names[1]}\n\n {names[2]}\n"))
    assert inputs.list_images("-") == names[1:]
    piped = io.TextIOWrapper(io.BytesIO(os.fsencode(names[1]) + b"\n\n /x/\xff.png \n"), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", piped)
    assert inputs.list_images("-") == [names[1], pathlib.Path(os.fsdecode(b"/x/\xff.png"))]
    with pytest.raises(ValueError, match=r"no image in '.*absent\*'; quote the pattern"):
        inputs.list_images(str(photos / "absent*"))
    empty = photos / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"no image in the folder .*empty \(it looks for \.jpg"):
        inputs.list_images(str(empty))


def test_what_a_folder_has_beside_photos_is_counted(photos, caplog):
    for name in ("d.TXT", "README", "e.PNG", "f.Mp4"):
        (photos / name).write_bytes(b"")
    (photos / "more").mkdir()
    (photos / "more" / "0.webp").write_bytes(b"")
    (photos / "linked").symlink_to(photos / "more")
    with caplog.at_level(logging.WARNING, logger="absl"):
        names = [str(path.relative_to(photos)) for path in inputs.list_images(str(photos))]
    assert names == ["a.png", "b.jpg", "c.png", "e.PNG", "f.Mp4", "more/0.webp"]
    assert caplog.messages == [f"--images={photos}: left out: 2 .txt, 1 linked folder, 1 without suffix"]
    assert len(inputs.list_images(str(photos), output=str(photos / "more"))) == 5


def test_what_was_drawn_into_the_folder_of_photos_is_no_photo(photos):
    for _ in range(2):
        predict.run(checkpoint="run", images=str(photos), words="red", output=str(photos / "found"))
    rows = json.loads((photos / "found" / "detections.json").read_text())
    assert {row["file_name"] for row in rows} <= {str(photos / name) for name in ("a.png", "b.jpg", "c.png")}
    assert len(list((photos / "found" / "pictures").iterdir())) == 3


def test_what_is_found_on_one_photo(photos):
    predictor = Predictor.from_checkpoint("run")
    found = predictor(str(photos / "a.png"), ["blue", "red"], score_threshold=0.1)
    (same,) = predictor([photos / "a.png"], ["blue", "red"], score_threshold=0.1)
    pixels = np.asarray(Image.open(photos / "a.png"))
    from_pixels = predictor(pixels, ["blue", "red"], score_threshold=0.1)
    assert str(found) == str(same) == str(from_pixels)
    header, best, *others = str(found).splitlines()
    assert header.split() == ["score", "word", "x1", "y1", "x2", "y2"]
    assert best.split()[1] == "red"
    assert len(others) == len(found.scores) - 1
    row = found.to_coco(image_id=5)[0]
    assert (row["image_id"], row["category_id"], row["name"]) == (5, 2, "red")
    np.testing.assert_allclose(row["bbox"], [200, 20, 60, 60], atol=5)
    plotted, factor = found.plot(photos / "a.png", max_drawn=1), 900 / pixels.shape[1]
    assert plotted.size == (900, round(factor * pixels.shape[0]))
    enlarged = Image.fromarray(pixels).resize(plotted.size, Image.Resampling.LANCZOS)
    changed = np.abs(np.asarray(plotted, int) - np.asarray(enlarged, int))
    assert 190 * factor <= np.flatnonzero(changed.sum(axis=(0, 2))).min() <= 206 * factor  # the left side of the box
    assert str(predictor(pixels, ["blue", "red"], score_threshold=0.999)) == "nothing found of 2 words"
    np.testing.assert_array_equal(predictor(pixels, ["red"], score_threshold=0.999).plot(pixels), enlarged)


def test_a_printed_table_ends_after_twenty_boxes():
    def found(num: int) -> Found:
        scores = np.linspace(0.9, 0.1, num, dtype=np.float32)
        words = ("red", *["a name of a box that is not shown"] * (num > 20))
        labels = (np.arange(num) >= 20).astype(int)
        return Found(np.tile(np.float32([1, 2, 3, 4]), (num, 1)), scores, labels, words, (8, 8))

    assert [len(str(found(num)).splitlines()) for num in (1, 20)] == [2, 21]
    header, *rows, last = str(found(25)).splitlines()
    assert header.split() == ["score", "word", "x1", "y1", "x2", "y2"]
    assert [row.split()[1] for row in rows] == ["red"] * 20
    assert {len(row) for row in rows} == {len(header)} == {len(str(found(20)).splitlines()[0])}
    assert last == "and 5 more, none with a higher score than 0.23"


def test_what_is_found_goes_to_supervision(photos, monkeypatch):
    class Detections:
        def __init__(self, **columns):
            self.__dict__ = columns

    monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=Detections))
    found = Predictor.from_checkpoint("run")(photos / "a.png", ["blue", "red"], score_threshold=0.1)
    detections = found.to_supervision()
    np.testing.assert_array_equal(detections.xyxy, found.boxes)
    np.testing.assert_array_equal(detections.confidence, found.scores)
    assert detections.class_id[0] == 1
    assert detections.data["class_name"][0] == "red"


def test_pictures_have_names_of_their_own(tmp_path):
    paths = [pathlib.Path(name) for name in ("x/1.jpg", "y/1.png", "z/1.png", "1_2.jpg")]
    names = [path.name for path in inputs.name_pictures(paths, tmp_path)]
    assert names[:3] == ["1.jpg", "1_2.jpg", "1_3.jpg"]
    assert len(set(names)) == 4
    with pytest.raises(ValueError, match="would overwrite an image of the input"):
        inputs.name_pictures([tmp_path / "1.jpg"], tmp_path)


def test_definitions_and_truncation_reach_the_model(photos, caplog):
    seen = []
    predictor = Predictor.from_checkpoint("run")
    encode = predictor._embed._encode
    predictor._embed._encode = lambda texts: seen.append(texts) or encode(texts)
    long = " ".join(["a colour"] * 12)
    with caplog.at_level(logging.WARNING, logger="absl"):
        _run(photos, images=str(photos / "c.png"), words=f"red: {long}, blue")
    assert seen == [[f"red, {long}", "blue"]]
    assert "1 of 2 concepts have more than 16 tokens and lose their end: “red, a colour" in caplog.text


@pytest.mark.slow
def test_command_line(tmp_path):
    """Help, and errors that need no checkpoint to be found, in a process of their own."""
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(pathlib.Path.cwd())}

    def command(*arguments):
        line = [sys.executable, "-m", "detclipv2_jax.predict", *arguments]
        return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)

    help_text = command("--help").stdout
    for flag in ("checkpoint", "images", "words", "words_file", "output", "score_threshold", "nms_iou", "batch_size"):
        assert f"--{flag} " in help_text
    (tmp_path / "photo.png").write_bytes(b"")
    required = [f"--images={tmp_path}", f"--output={tmp_path / 'out'}", f"--checkpoint={tmp_path}"]
    wrong = command(*required, "--words=cat")
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1].startswith(f"error: {tmp_path} is no workdir: it has no config.json")


def test_a_checkpoint_of_a_run_is_read(tmp_path, monkeypatch):
    config = config_lib.base()
    config.model = config_lib.model("nano")
    model = detclip.from_config(config.model)
    tokens = tokenizer.tokenize(["cat, a pet", "red car"])
    params = jax.jit(functools.partial(state.init_params, model, context_length=16))(jax.random.key(1))
    monkeypatch.setattr(checkpoints, "load_for_inference", lambda workdir: (config, params, 7))
    predictor = Predictor.from_checkpoint(tmp_path)
    assert predictor.step == 7
    names, text, mask = predictor.vocabulary({"cat": "a pet", "red car": ""})
    assert names == ("cat", "red car")
    assert mask.tolist() == [True, True] + [False] * 126
    expected = jax.jit(lambda params: model.apply({"params": params}, tokens, method="encode_text"))(params)
    np.testing.assert_allclose(text[:2], expected, atol=1e-6)
    (stored,) = (tmp_path / "vocabularies").iterdir()
    key = predictor._embed.key(["cat, a pet", "red car"])
    np.testing.assert_array_equal(vocabulary.load(stored, key=key), text[:2])


def test_boxes_of_a_photo_that_is_read_at_half_size_are_of_the_whole(photos, monkeypatch):
    monkeypatch.setattr(transforms, "MAX_PIXELS", 20_000)  # it has 30,000
    _, rows, _ = _run(photos, images=str(photos / "b.jpg"))
    assert rows[0]["name"] == "red"
    np.testing.assert_allclose(rows[0]["bbox"], [20, 200, 60, 60], atol=8)


def test_examples_are_looked_for_beside_words(photos):
    shown = {"like this": [{"image": "photos/c.png", "box": [40, 10, 90, 50]}]}
    (photos.parent / "shown.json").write_text(json.dumps(shown))
    options = {"exemplars": str(photos.parent / "shown.json")}
    _, rows, _ = _run(photos, words="red", **options)
    best = {row["image_id"]: row for row in rows[::-1]}
    assert {i: (row["name"], row["category_id"]) for i, row in best.items()} == {
        1: ("red", 1), 2: ("red", 1), 3: ("like this", 2)
    }  # fmt: skip
    np.testing.assert_allclose(best[3]["bbox"], [40, 10, 50, 40], atol=1)
    _, alone, _ = _run(photos, words="", **options)
    assert {(row["image_id"], row["name"]) for row in alone} == {(3, "like this")}


def test_examples_of_a_data_set(photos):
    folder = photos.parent / "known"
    annotations = planted.write_dataset(folder, num_images=6)
    given = {"exemplars_from": str(annotations), "exemplar_images": str(folder / "images"), "per_class": 2}
    _, rows, _ = _run(photos, words="", **given)
    best = {row["image_id"]: row["name"] for row in rows[::-1]}
    assert best == {1: "red", 2: "red", 3: "blue"}
    with pytest.raises(ValueError, match="the name 'red' is taken, by a word"):
        _run(photos, words="red", **given)
    (photos.parent / "shown.json").write_text('{"red": []}')
    with pytest.raises(ValueError, match="both have examples of 'red'; name one otherwise"):
        _run(photos, words="", exemplars=str(photos.parent / "shown.json"), **given)


def test_thresholds_are_chosen_written_and_used_again(photos):
    folder = photos.parent / "known"
    given = {
        "thresholds_from": str(planted.write_dataset(folder, num_images=12)),
        "threshold_images": f"{folder}/images",
    }
    _, everything, output = _run(photos, score_threshold=0.0, max_detections=50)
    _, rows, _ = _run(photos, score_threshold=0.0, max_detections=50, **given)
    chosen = json.loads((output / "thresholds.json").read_text())
    assert chosen["rule"] == "best F1"
    assert {name: one["examples"] for name, one in chosen["words"].items()} == {"red": 12, "blue": 8}
    assert all(one["f1"] > 0.9 for one in chosen["words"].values())
    threshold = {name: one["threshold"] for name, one in chosen["words"].items()}
    assert rows == [row for row in everything if row["score"] > threshold[row["name"]]]
    assert 0 < len(rows) < len(everything)
    (photos.parent / "kept.json").write_text(json.dumps(chosen))
    again = {"thresholds": str(photos.parent / "kept.json")}
    assert _run(photos, score_threshold=0.0, max_detections=50, **again)[1] == rows
    chosen["words"]["red"]["threshold"] = 1.0
    (photos.parent / "kept.json").write_text(json.dumps(chosen))
    without = _run(photos, score_threshold=0.0, max_detections=50, **again)[1]
    assert without == [row for row in rows if row["name"] == "blue"]
    named = json.loads(pathlib.Path(given["thresholds_from"]).read_text())
    for category in named["categories"]:
        category["name"] = category["name"].capitalize()  # words and names meet without regard to capitals
    pathlib.Path(given["thresholds_from"]).write_text(json.dumps(named))
    before = json.loads((output / "thresholds.json").read_text())["words"]
    _run(photos, words="green, RED, blue", score_threshold=0.0, max_detections=50, **given)
    after = json.loads((output / "thresholds.json").read_text())["words"]
    assert after == {"RED": before["red"], "blue": before["blue"]}  # a word without a category changes nothing
    _run(photos, min_precision=1.0, **given)
    assert json.loads((output / "thresholds.json").read_text())["rule"] == "precision of at least 1"
    federated = named | {"images": [image | {"neg_category_ids": []} for image in named["images"]]}
    (folder / "lvis.json").write_text(json.dumps(federated))
    for wrong, message in (
        (given | again, "exclude each other"),
        ({"min_precision": 0.5}, "--min_precision needs --thresholds_from"),
        (given | {"min_precision": 1.5}, "--min_precision is 1.5; it must lie above 0"),
        (given | {"min_precision": 0.0}, "--min_precision is 0; it must lie above 0"),
        (given | {"threshold_images": ""}, "--threshold_images is empty; it must name a folder"),
        (given | {"threshold_images": str(photos)}, "cannot read 0.png in"),
        (given | {"thresholds_from": str(folder / "lvis.json")}, "does not say of every photo whether"),
        (given | {"words": "cat"}, r"no category of .* is called like a word"),
    ):
        with pytest.raises(ValueError, match=message):
            _run(photos, **wrong)
