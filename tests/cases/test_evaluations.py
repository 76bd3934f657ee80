"""Evaluations whose truth or photos are wrong: refused before anything is predicted; nothing found is found twice."""

import json
import os
import pathlib
import time

import jax
import planted
import pytest
from micro import micro_config
from PIL import Image

from detclipv2_jax import config_json, session
from detclipv2_jax.data import checks
from detclipv2_jax.data import streams as streams_lib
from detclipv2_jax.eval import coco, grounding, loop, odinw, result
from detclipv2_jax.inference import Detector, Predictor
from detclipv2_jax.runs import sharding

NUM_IMAGES = 9


@pytest.fixture
def dataset(tmp_path):
    return planted.write_dataset(tmp_path / "set", num_images=NUM_IMAGES)


def make_evaluator(dataset, workdir, **section):
    """Returns the evaluator of the planted model on a data set, its parameters, and the list of what it predicts."""
    config, model, params = planted.make()
    config.eval.annotations, config.eval.images = str(dataset), str(dataset.parent / "images")
    config.eval.update({"batch_size": 2, "num_pictures": 1, "max_detections": 20} | section)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    streams = streams_lib.eval_streams(config.eval, input_config=config.input)
    evaluator = loop.Evaluator(config, Detector(model, mesh=mesh), streams=streams, workdir=workdir)
    predicted, predict = [], evaluator._predict

    def noted(params, batch, text):
        found = predict(params, batch, text)
        predicted.extend(batch.example_id[batch.image_mask].tolist())
        return found

    evaluator._predict = noted
    return evaluator, params, predicted


def change(dataset, edit):
    content = json.loads(dataset.read_text())
    edit(content)
    dataset.write_text(json.dumps(content))


def renamed(new):
    def edit(content):
        for image in content["images"]:
            image["id"] = new(image["id"])
        for row in content["annotations"]:
            row["image_id"] = new(row["image_id"])

    return edit


def rows_changed(**values):
    def edit(content):
        for row in content["annotations"][:3]:
            row |= values

    return edit


def corners_without_sizes(content):
    for image in content["images"]:
        del image["height"], image["width"]
    for row in content["annotations"]:
        x, y, width, height = row["bbox"]
        row["bbox"] = [x + 1, y + 1, x + width, y + height]


REFUSED = {
    "corners": (corners_without_sizes, "look like x1, y1, x2, y2"),
    "box null": (rows_changed(bbox=None), "3 of .* annotations cannot be used"),
    "box of texts": (rows_changed(bbox=["1", "2", "3", "4"]), "3 of .* annotations cannot be used"),
    "no annotations": (lambda content: content["annotations"].clear(), "has no annotations"),
    "image of nobody": (rows_changed(image_id="nobody"), "3 of .* annotations cannot be used"),
    "equal names": (lambda content: content["categories"][1].update(name="Red"), "are both called 'Red'|both called"),
    "image id twice": (lambda content: content["images"][1].update(id=content["images"][0]["id"]), "has the id"),
    "name null": (lambda content: content["categories"][1].update(name=None), "needs an id and a name"),
    "crowd unclear": (rows_changed(iscrowd="some"), 'has iscrowd "some"'),
    "photos missing": (
        lambda content: [image.update(file_name=f"no{i}.png") for i, image in enumerate(content["images"]) if i > 2],
        r"6 of 9 photos do not exist:(\n  \S*no[3-8]\.png){6}$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scored_is_refused_before_anything_is_compiled(dataset, tmp_path, name):
    edit, message = REFUSED[name]
    change(dataset, edit)
    config = micro_config()
    config.scenes.num_eval = 0
    config.scenes.num_grounding = config.scenes.num_image_text = 0
    config.eval.annotations, config.eval.images = str(dataset), str(dataset.parent / "images")
    with pytest.raises(ValueError, match=rf"config\.eval: .*({message})"):
        session.setup(config, tmp_path / "run", training=True)
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(ValueError, match=message):
        make_evaluator(dataset, tmp_path / "other")
    members = tmp_path / "odinw" / "Aquarium" / "test"
    members.mkdir(parents=True)
    for path in (dataset.parent / "images").iterdir():
        (members / path.name).write_bytes(path.read_bytes())
    (members / "annotations.json").write_bytes(dataset.read_bytes())
    (tmp_path / "config.json").write_text(config_json.to_json(planted.make()[0]))
    with pytest.raises(ValueError, match=rf"^Aquarium: .*({message})"):
        odinw.run(data=tmp_path / "odinw", checkpoint=str(tmp_path), output=tmp_path / "o")


def test_photos_that_are_missing_are_all_named(tmp_path):
    names = [f"folder {i}/é{i}.jpg" for i in range(50)]
    (tmp_path / "folder 7").mkdir()
    (tmp_path / names[7]).write_bytes(b"photo")
    (tmp_path / "folder 9").mkdir()
    (tmp_path / names[9]).mkdir()  # a folder is no photo
    with pytest.raises(ValueError, match=r"t\.json: 49 of 50 photos do not exist:") as error:
        checks.photo_facts((f"{tmp_path}/{name}" for name in names), where="t.json")
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [f"{tmp_path}/{name}" for name in names if name != names[7]]


def test_photos_are_all_named_where_the_folder_is_wrong_or_none_of_the_first_is_there(dataset):
    content, images = json.loads(dataset.read_text()), dataset.parent / "images"
    content["images"] = [{"id": f"missing {i}", "file_name": f"no{i}.png"} for i in range(70)] + content["images"]
    dataset.write_text(json.dumps(content))
    config = planted.make()[0]
    config.eval.annotations, config.eval.images = str(dataset), str(images)
    for num, hint in ((70, ""), (79, r" \(`images` must name the folder .*\)")):
        with pytest.raises(ValueError, match=rf"{num} of 79 photos do not exist{hint}:\n") as error:
            streams_lib.eval_streams(config.eval, input_config=config.input)
        lines = str(error.value).splitlines()[1:]
        assert [pathlib.Path(line.strip()).name for line in lines][:70] == [f"no{i}.png" for i in range(70)]
        assert len(lines) == num
        for photo in images.iterdir():
            photo.unlink()


def test_empty_photos_and_links_out_of_the_folder_are_all_named_too(dataset):
    images = dataset.parent / "images"
    outside = dataset.parent / "outside.png"
    names = sorted(path.name for path in images.iterdir())
    (images / names[1]).rename(outside)
    for name in names[1:4]:
        (images / name).unlink(missing_ok=True)
        (images / name).symlink_to(outside)
    (images / names[4]).write_bytes(b"")
    (images / names[5]).unlink()

    def paths(places):
        return "".join(rf"\n  {images.resolve()}/{names[i]}" for i in places)

    config = planted.make()[0]
    config.eval.annotations, config.eval.images = str(dataset), str(images)
    said = f"do not exist:{paths([5])}\n1 of 9 photos are empty:{paths([4])}"
    links = rf"\n3 of 9 photos are links out of the image folder, which follow_links allows:{paths([1, 2, 3])}"
    for config.eval.follow_links in (False, True):
        with pytest.raises(ValueError, match=said + (links if not config.eval.follow_links else "") + "$"):
            streams_lib.eval_streams(config.eval, input_config=config.input)


def test_every_member_of_odinw_is_checked_before_the_first_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Checkpoint, "load", lambda *_, **__: pytest.fail("a checkpoint was loaded"))
    edits = {"Aquarium": lambda content: None, "Packages": rows_changed(bbox=None)}
    edits["pothole"] = REFUSED["photos missing"][0]
    (tmp_path / "config.json").write_text(config_json.to_json(planted.make()[0]))
    for name, edit in edits.items():
        made = planted.write_dataset(tmp_path / name / "test", num_images=NUM_IMAGES)
        change(made, edit)
        for path in (made.parent / "images").iterdir():
            path.rename(made.parent / path.name)
        made.rename(made.with_name("annotations.json"))
        tuned = tmp_path / "tuned" / name
        tuned.mkdir(parents=True)
        (tuned / "config.json").write_text(config_json.to_json(planted.make()[0]))
    for options in ({"checkpoint": str(tmp_path)}, {"finetuned": str(tmp_path / "tuned")}):
        with pytest.raises(ValueError, match=r"(?s)^Packages: .* cannot be used .*\npothole: .*photos do not exist"):
            odinw.run(data=tmp_path, output=tmp_path / "o", **options)


@pytest.mark.slow
def test_odd_truths_are_scored_as_repaired_ones(dataset, tmp_path):
    evaluate, params, _ = make_evaluator(dataset, tmp_path / "expected")
    expected = evaluate(params, step=1)
    assert expected["AP50"] > 0.95
    for name, edit in {
        "text ids": renamed(lambda i: f"photo {i}"),
        "huge ids": renamed(lambda i: i + (1 << 63)),
        "ids of both types": renamed(lambda i: str(i) if i % 2 else i),
        "no annotation ids": lambda content: [row.pop("id") for row in content["annotations"]],
        "area null": rows_changed(area=None),
        "crowd text": rows_changed(iscrowd="0"),
    }.items():
        original = dataset.read_bytes()
        change(dataset, edit)
        evaluate, params, _ = make_evaluator(dataset, tmp_path / name)
        scores = evaluate(params, step=1)
        assert scores == pytest.approx(expected, abs=1e-9), name
        folder = tmp_path / name / "eval"
        protocol = json.loads((folder / "step_00000001_scores.json").read_text())["protocol"]
        assert bool(protocol["repaired"]) == (name in ("no annotation ids", "area null", "crowd text"))
        found = folder / "step_00000001_detections.json"
        assert coco.evaluate(dataset, found).items() <= scores.items()
        ids = {image["id"] for image in json.loads(dataset.read_text())["images"]}
        assert {row["image_id"] for row in json.loads(found.read_text())} <= ids
        (picture,) = (tmp_path / name / "pictures").iterdir()
        assert picture.suffix == ".jpg"
        dataset.write_bytes(original)


@pytest.mark.slow
def test_detections_are_on_disk_before_they_are_scored_and_a_repaired_truth_predicts_nothing_again(
    dataset, tmp_path, monkeypatch
):
    evaluate, params, predicted = make_evaluator(dataset, tmp_path / "run")
    expected = make_evaluator(dataset, tmp_path / "other")
    expected = expected[0](expected[1], step=2)
    monkeypatch.setattr(evaluate, "_score", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(params, step=2)
    assert len(predicted) == NUM_IMAGES
    written = tmp_path / "run" / "eval" / "step_00000002_detections.json"
    assert coco.evaluate(dataset, written).items() <= expected.items()
    change(dataset, renamed(lambda i: 5000 - i))  # other ids, in another order
    change(dataset, lambda content: content["annotations"].reverse())
    evaluate, params, predicted = make_evaluator(dataset, tmp_path / "run")
    scores = evaluate(params, step=2)
    assert predicted == []
    assert scores["AP"] == pytest.approx(expected["AP"], abs=0.02)  # of equal scores other images come first
    assert coco.evaluate(dataset, written).items() <= scores.items()
    assert not list((tmp_path / "run" / "eval").glob(".partial*"))


def test_what_a_killed_evaluation_left_goes_with_a_later_one_unless_it_may_go_on(tmp_path):
    now = time.time()
    for name, age in (("old", 8 * 24 * 3600), ("new", 3600)):
        parts = result.Parts(tmp_path, fingerprint={"of": name})
        parts.add(result.Rows.concatenate([]))
        parts.write()
        (folder,) = (path for path in tmp_path.iterdir() if path.stat().st_mtime > now - 60)
        os.utime(folder, (now - age, now - age))
    assert len(list(tmp_path.iterdir())) == 2
    result.Parts(tmp_path, fingerprint={"of": "another"}).remove()
    assert result.Parts(tmp_path, fingerprint={"of": "new"}).done == 1
    assert result.Parts(tmp_path, fingerprint={"of": "old"}).done == 0


def repainted(folder):
    path = sorted(folder.iterdir())[0]
    with Image.open(path) as image:
        image.convert("L").convert("RGB").save(path)


def touched(folder):
    path = sorted(folder.iterdir())[-1]
    os.utime(path, (1, 1))


@pytest.mark.parametrize("exchange", [repainted, touched])
def test_a_continued_evaluation_belongs_to_its_photos(dataset, tmp_path, monkeypatch, exchange):
    monkeypatch.setattr(result, "PART_SECONDS", -1)

    def killed_after(num):
        evaluate, params, predicted = make_evaluator(dataset, tmp_path / "run")
        predict = evaluate._predict

        def until(*arguments):
            if len(predicted) >= num:
                raise KeyboardInterrupt
            return predict(*arguments)

        evaluate._predict = until
        with pytest.raises(KeyboardInterrupt):
            evaluate(params, step=3)
        return predicted

    assert len(killed_after(4)) >= 4
    assert len(list(pathlib.Path(tmp_path).rglob("*.rows"))) >= 2
    exchange(dataset.parent / "images")
    evaluate, params, predicted = make_evaluator(dataset, tmp_path / "run")
    evaluate(params, step=3)
    assert sorted(predicted) == list(range(NUM_IMAGES))


def grounding_json(folder, boxes):
    """Writes photos with a red rectangle and a json that has a box for each, and returns the command's arguments."""
    images, rows = [], []
    for i, box in enumerate(boxes):
        Image.fromarray(planted.paint((100, 250), {"red": (20 + i, 10, 80 + i, 60)})).save(folder / f"{i}.png")
        os.utime(folder / f"{i}.png", (1, 1))
        images.append({"id": i, "file_name": f"{i}.png", "caption": "red and blue"})
        rows.append({"id": i, "image_id": i, "tokens_positive": [[0, 3]], "bbox": box})
    (folder / "g.json").write_text(json.dumps({"images": images, "annotations": rows}))
    arguments = {"checkpoint": "run", "annotations": str(folder / "g.json"), "images": str(folder)}
    return arguments | {"task": "phrases", "folder": folder / "scores"}


def test_a_continued_search_for_phrases_belongs_to_its_photos_and_not_to_the_boxes(tmp_path, monkeypatch):
    monkeypatch.setattr(result, "PART_SECONDS", -1)
    predictor = Predictor(*planted.make(), step=5)
    monkeypatch.setattr(Predictor, "from_checkpoint", lambda workdir: predictor)
    ground, seen = predictor.ground, []

    def run(boxes, *, killed_at=99):
        seen.clear()

        def until(image, *rest, **limits):
            if len(seen) == killed_at:
                raise KeyboardInterrupt
            seen.append(pathlib.Path(image).name)
            return ground(image, *rest, **limits)

        monkeypatch.setattr(predictor, "ground", until)
        return grounding.run(**grounding_json(tmp_path, boxes))

    wrong, right = [[150, 60, 60, 30]] * 3, [[20 + i, 10, 60, 50] for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        run(wrong, killed_at=2)
    assert run(right)["R@1"] == 1.0
    assert seen == ["2.png"]
    with pytest.raises(KeyboardInterrupt):
        run(right, killed_at=2)
    grounding_json(tmp_path, right)
    monkeypatch.setattr(os, "utime", lambda path, times: os.truncate(path, os.path.getsize(path)))  # now
    run(right)
    assert seen == ["0.png", "1.png", "2.png"]
    (tmp_path / "1.png").unlink()
    arguments = {"checkpoint": "run", "annotations": str(tmp_path / "g.json"), "images": str(tmp_path)}
    with pytest.raises(ValueError, match=r"1 of 3 photos do not exist:\n.*1\.png"):
        grounding.run(**arguments, task="phrases", folder=tmp_path / "scores")
