"""Evaluation from images to scores with a planted model: any batch size, 1 and 8 devices, continuing."""

import itertools
import json
import os
import shutil
import types

import jax
import numpy as np
import planted
import pytest
from PIL import Image

from detclipv2_jax import files
from detclipv2_jax.data import streams as streams_lib
from detclipv2_jax.data import tokenizer
from detclipv2_jax.eval import coco, loop, lvis, names, result
from detclipv2_jax.inference import Detections, Detector
from detclipv2_jax.runs import sharding

NUM_IMAGES = 19  # no multiple of a batch


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return planted.write_dataset(tmp_path_factory.mktemp("data") / "set", num_images=NUM_IMAGES)


def _evaluator(dataset, workdir, *, batch_size=8, num_devices=8, **section):
    config, model, params = planted.make()
    config.eval.annotations, config.eval.images = str(dataset), str(dataset.parent / "images")
    config.eval.update({"batch_size": batch_size, "num_pictures": 2, "max_detections": 20} | section)
    mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
    streams = streams_lib.eval_streams(config.eval, input_config=config.input)
    return loop.Evaluator(config, Detector(model, mesh=mesh), streams=streams, workdir=workdir), params


@pytest.mark.slow
def test_planted_objects_are_found(dataset, tmp_path):
    evaluate, params = _evaluator(dataset, tmp_path)
    scores = evaluate(params, step=12)
    # the planted model rounds boxes to whole canvas pixels, up to 6 px of the photo
    assert scores["AP50"] > 0.95
    assert scores["AR100"] > 0.7
    assert scores["top1"] > 0.95
    assert scores.keys() > {*coco.METRICS, "APr", "APc", "APf", "found", "top1"}
    stored = json.loads((tmp_path / "eval" / "step_00000012_scores.json").read_text())
    protocol = stored.pop("protocol")
    assert stored == scores
    assert (protocol["images_evaluated"], protocol["images_listed"]) == (NUM_IMAGES, NUM_IMAGES)
    assert (protocol["checkpoint_step"], protocol["ema"], protocol["prompts"]) == (12, False, ["red", "blue"])
    assert protocol["prompts_truncated"] == 0
    assert protocol["annotations_sha256"] == files.sha256(dataset)
    detections = tmp_path / "eval" / protocol["detections"]
    # what is written is what was scored
    assert coco.evaluate(dataset, detections) | names.evaluate(dataset, detections) == scores
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == ["step_00000012_found_1000.jpg", "step_00000012_found_1014.jpg"]
    with Image.open(pictures[0]) as picture:
        assert np.asarray(picture).std() > 10
    assert not list((tmp_path / "eval").glob(".partial*"))

    # other batches and one device find the same
    evaluate, params = _evaluator(dataset, tmp_path / "other", batch_size=3, num_devices=1)
    assert evaluate(params, step=12) == pytest.approx(scores, abs=1e-9)
    rows = [json.loads(path.read_text()) for path in (detections, tmp_path / "other" / "eval" / detections.name)]
    assert [row["image_id"] for row in rows[0]] == [row["image_id"] for row in rows[1]]
    np.testing.assert_allclose([row["bbox"] for row in rows[0]], [row["bbox"] for row in rows[1]], atol=2e-3)


@pytest.mark.slow
def test_federated_annotations_are_scored_by_lvis_rules(dataset, tmp_path):
    truth = json.loads(dataset.read_text())
    for image in truth["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    truth["annotations"] = [row for row in truth["annotations"] if row["category_id"] == 5]  # nobody looked for blue
    federated = dataset.with_name("federated.json")
    federated.write_text(json.dumps(truth))
    evaluate, params = _evaluator(federated, tmp_path, num_pictures=0)
    scores = evaluate(params, step=1)
    assert scores["AP50"] > 0.95
    assert scores["fixed_AP50"] > 0.95
    assert (scores["APr"], scores["fixed_APr"]) == (-1.0, -1.0)
    folder = tmp_path / "eval"
    files = federated, folder / "step_00000001_detections.json"
    assert lvis.evaluate(*files) | names.evaluate(*files) == scores  # blue ones are in the file
    assert 3 in {row["category_id"] for row in json.loads((folder / "step_00000001_detections.json").read_text())}
    protocol = json.loads((folder / "step_00000001_scores.json").read_text())["protocol"]
    assert protocol["ap"] == lvis.AP_KIND


def test_a_killed_evaluation_continues(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(result, "PART_SECONDS", -1)
    expected = _evaluator(dataset, tmp_path / "whole")
    expected = expected[0](expected[1], step=3)
    evaluate, params = _evaluator(dataset, tmp_path / "killed")
    predict, seen = evaluate._predict, []

    def killed_at_third(params, batch, text):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(batch.example_id[batch.image_mask].tolist())
        return predict(params, batch, text)

    monkeypatch.setattr(evaluate, "_predict", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate(params, step=3)
    evaluate, params = _evaluator(dataset, tmp_path / "killed")
    predict, rest = evaluate._predict, []
    monkeypatch.setattr(
        evaluate, "_predict", lambda *a: rest.append(a[1].example_id[a[1].image_mask].tolist()) or predict(*a)
    )
    assert evaluate(params, step=3) == expected
    assert sorted(itertools.chain(*seen, *rest)) == list(range(NUM_IMAGES))
    assert rest
    assert not list((tmp_path / "killed" / "eval").glob(".partial*"))


def test_part_of_the_images_and_what_is_drawn_and_recorded(dataset, tmp_path, monkeypatch, caplog):
    drawn = []
    monkeypatch.setattr(loop.figures, "detections", lambda *given, **options: drawn.append((given, options)))
    evaluate, params = _evaluator(dataset, tmp_path, max_examples=4, num_pictures=3)
    with caplog.at_level("INFO", logger="absl"):
        scores = evaluate(params, step=0)
    named = {name: value for name, value in scores.items() if name.startswith(names.SCORES)}
    assert caplog.messages[-1].endswith(f":\n{coco.table(scores)}\n{names.table(named)}")
    assert scores["AP50"] > 0.95  # the others do not count as missed
    protocol = json.loads((tmp_path / "eval" / "step_00000000_scores.json").read_text())["protocol"]
    assert (protocol["images_evaluated"], protocol["images_listed"]) == (4, NUM_IMAGES)
    # found and annotated boxes are those of the picture, each with its name
    content = json.loads(dataset.read_text())
    name_of = {row["id"]: row["name"] for row in content["categories"]}
    for (picture, boxes, labels, words), options in drawn:
        (image,) = (i for i in content["images"] if options["title"] == f"{i['file_name']} after 0 steps")
        rows = [row for row in content["annotations"] if row["image_id"] == image["id"]]
        truth_boxes, truth_labels = options["truth"]
        assert [words[i] for i in truth_labels] == [name_of[row["category_id"]] for row in rows]
        factor = picture.shape[1] / image["width"], picture.shape[0] / image["height"]
        expected = [[x, y, x + width, y + height] for x, y, width, height in (row["bbox"] for row in rows)]
        np.testing.assert_allclose(truth_boxes, np.multiply(expected, [*factor, *factor]), atol=1)
        for box, label in zip(truth_boxes, truth_labels, strict=True):
            same = boxes[labels == label]
            assert np.abs(same - box).max(axis=1).min() < 2
        assert options["max_drawn"] == max(3, len(rows))
    assert len(drawn) == 3
    # its scores are those of the same evaluation only, wherever the file lies now
    moved = shutil.copy(dataset, tmp_path / "moved.json")
    images = str(dataset.parent / "images")
    for change, known in (({}, True), ({"max_detections": 21}, False), ({"max_examples": 5}, False)):
        section = {"max_examples": 4, "annotations": str(moved), "images": images} | change
        again, _ = _evaluator(dataset, tmp_path, **section)
        assert again.recorded(0) == (scores if known else None)
        assert again.recorded(1) is None
        assert again.recorded(0, params=params) == (scores if known else None)
        assert again.recorded(0, params=jax.tree.map(lambda x: 2 * x, params)) is None


def test_twenty_boxes_are_drawn_at_most(dataset, tmp_path, monkeypatch):
    content = json.loads(dataset.read_text())
    content["annotations"] += [content["annotations"][0] | {"id": 1000 + i} for i in range(30)]
    dataset = dataset.with_name("many.json")
    dataset.write_text(json.dumps(content))
    evaluate, _ = _evaluator(dataset, tmp_path)
    drawn = []
    monkeypatch.setattr(loop.figures, "detections", lambda *_, **options: drawn.append(options["max_drawn"]))
    sample = loop._Sample(0, np.zeros((8, 8, 3), np.uint8), np.ones(4), np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    evaluate._draw(sample, path=tmp_path / "a.jpg", step=1)
    assert drawn == [20]


def test_the_protocol_says_what_scores_depend_on(dataset, tmp_path):
    given = {"score_threshold": 0.125, "nms_iou": 0.375, "max_detections": 21, "pre_nms": 77, "max_examples": 5}
    evaluate, _ = _evaluator(dataset, tmp_path, **given)
    evaluate._config.optimizer.ema_decay = 0.5
    longest = int(max(tokenizer.num_tokens(["red", "blue"])))
    for length, num_truncated in ((longest, 0), (longest - 1, 2)):
        evaluate._config.model.text.context_length = length
        assert evaluate._protocol(3)["prompts_truncated"] == num_truncated
    protocol = evaluate._protocol(3)
    expected = given | {
        "checkpoint_step": 3, "ema": True, "annotations": str(dataset), "prompts": ["red", "blue"], "short_side": 64,
        "long_side": 128, "definitions": False, "score": loop.SCORE, "nms": "within each category", "repaired": {},
    }  # fmt: skip
    assert {key: protocol[key] for key in expected} == expected
    assert protocol["canvases"] == [list(canvas) for canvas in planted.CANVASES]


def test_what_was_found_belongs_to_photos_parameters_and_limits_not_to_boxes(dataset, tmp_path):
    shutil.copytree(dataset.parent / "images", tmp_path / "images")
    content = json.loads(dataset.read_text())
    path = tmp_path / "set.json"
    path.write_text(dataset.read_text())

    def fingerprint(step=3, weights=(1.0,), **section):
        evaluate, _ = _evaluator(path, tmp_path, **section)
        return evaluate._fingerprint(step, list(weights))

    first = fingerprint()
    content["annotations"][0]["bbox"][2] += 1
    path.write_text(json.dumps(content))
    assert fingerprint() == first
    for change in ({"step": 4}, {"weights": (2.0,)}, {"batch_size": 16}, {"max_detections": 21}, {"nms_iou": 0.3}):
        assert fingerprint(**change) != first
    content["images"][0]["width"] += 1
    path.write_text(json.dumps(content))
    assert fingerprint() != first  # boxes are in other pixels
    path.write_text(dataset.read_text())
    assert fingerprint() == first
    os.utime(next((tmp_path / "images").iterdir()), (1, 1))
    assert fingerprint() != first


def test_batches_from_any_on(dataset, tmp_path):
    evaluate, _ = _evaluator(dataset, tmp_path, batch_size=3, num_devices=1)
    numbers = [stream.num_batches for stream in evaluate._streams]
    assert min(numbers) > 1
    batches = [batch.example_id.tolist() for batch in evaluate._batches(0)]
    assert len(batches) == sum(numbers)
    for done in range(sum(numbers) + 1):
        assert [batch.example_id.tolist() for batch in evaluate._batches(done)] == batches[done:]


def test_photos_of_one_canvas_are_one_stream(dataset, tmp_path):
    evaluate, _ = _evaluator(dataset, tmp_path, max_examples=1)
    (stream,) = evaluate._streams
    assert stream.ground_truth is evaluate._truth
    assert evaluate._fingerprint(3, [1.0])["batch_size"] == stream.batch_size
    assert len(list(evaluate._batches(0))) == stream.num_batches == 1


def test_first_photos_in_their_pixels_and_numbers_of_parameters():
    batch = types.SimpleNamespace(
        image=np.arange(3 * 4 * 6 * 3).reshape(3, 4, 6, 3), image_mask=np.array([True, False, True]),
        extent=np.array([[2, 5], [1, 1], [4, 3]]), scale=np.array([[0.5, 2.0], [1, 1], [3.0, 4.0]]),
        example_id=np.array([7, 8, 9]),
    )  # fmt: skip
    numbers = np.arange(6).reshape(3, 2)
    found = Detections(boxes=np.zeros((3, 2, 4)), scores=numbers / 8, labels=numbers, mask=numbers > 0)
    first, last = loop._samples(batch, found, limit=5)
    assert (first.example_id, first.scale.tolist(), first.labels.tolist()) == (7, [2.0, 0.5, 2.0, 0.5], [1])
    assert (last.example_id, last.scale.tolist(), last.scores.tolist()) == (9, [4.0, 3.0, 4.0, 3.0], [0.5, 0.625])
    np.testing.assert_array_equal(last.image, batch.image[2, :4, :3])
    assert [sample.example_id for sample in loop._samples(batch, found, limit=1)] == [7]
    np.testing.assert_array_equal(loop._checksum({"a": np.array([1.0, -2.0]), "b": np.float32(-5)}), [3.0, 5.0])


def test_padding_finds_nothing():
    """The last batch is filled up with images of which rows are left out, whatever is found there."""
    mask = np.array([[True, False], [True, True], [True, True]])
    boxes, numbers = np.arange(24, dtype=np.float32).reshape(3, 2, 4), np.arange(6).reshape(3, 2)
    found = Detections(boxes=boxes, scores=numbers / 8, labels=numbers, mask=mask)
    rows = loop.Evaluator._rows(None, found, np.array([5, 6, 0]), np.array([True, True, False]))
    assert rows.image_ids.tolist() == [5, 6, 6]
    assert rows.category_ids.tolist() == [0, 2, 3]
    assert rows.scores.tolist() == [0.0, 0.25, 0.375]
    np.testing.assert_array_equal(rows.boxes, boxes[[0, 1, 1], [0, 0, 1]])


def test_sizes_are_checked_first(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size 12 is not divisible by the number of devices 8 \(remainder 4\)"):
        _evaluator(dataset, tmp_path, batch_size=12)
    config, model, _ = planted.make()
    with pytest.raises(ValueError, match=r"set config\.eval\.annotations and config\.eval\.images"):
        loop.make(config, Detector(model, mesh=sharding.make_mesh()), tmp_path)


def test_another_size_than_the_run_s_is_said(micro, tmp_path, monkeypatch, caplog):
    averaged = micro.copy_and_resolve_references()
    averaged.optimizer.ema_decay = 0.5
    checkpoint = loop.Checkpoint(averaged, None, {}, 7)
    loaded, made = [], []
    load = lambda workdir, *, fsdp: loaded.append((workdir, fsdp)) or checkpoint  # noqa: E731
    monkeypatch.setattr(loop.Checkpoint, "load", load)

    def make(config, *_):
        made.append(config.optimizer.ema_decay)
        return lambda params, *, step: {"AP": float(step)}

    monkeypatch.setattr(loop, "make", make)
    config = micro.copy_and_resolve_references()
    config.mesh.fsdp = 2
    with caplog.at_level("WARNING", logger="absl"):
        assert loop.make_evaluation(config, tmp_path)() == {"AP": 7.0}
        assert not caplog.records
        config.eval.short_side = 320
        loop.make_evaluation(config, tmp_path)
    assert "at a short side of 320 px, the run did so at 64 px" in caplog.text
    config.init_from.checkpoint = "another run"  # of which a workdir without checkpoints gets the scores
    loop.make_evaluation(config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    loop.make_evaluation(config, tmp_path)
    assert loaded == [(workdir, 2) for workdir in (tmp_path, tmp_path, "another run", tmp_path)]
    assert config.optimizer.ema_decay == micro.optimizer.ema_decay  # the caller's stays
    assert made == [0.5] * 4  # as the checkpoint was averaged


def test_the_second_evaluation_has_its_own_files_and_folder(dataset, tmp_path):
    config, model, _ = planted.make()
    detector = Detector(model, mesh=sharding.make_mesh())
    assert loop.make_second(config, detector, tmp_path) is None
    config.forgetting.annotations, config.forgetting.images = str(dataset), str(dataset.parent / "images")
    before = config.eval.to_json()
    second = loop.make_second(config, detector, tmp_path)
    assert config.eval.to_json() == before
    config.eval.update(config.forgetting)
    assert sum(stream.num_examples for stream in loop.make_streams(config)) == NUM_IMAGES
    assert second._workdir == tmp_path / "forgetting"
    config.forgetting.annotations = ""
    with pytest.raises(ValueError, match=r"config\.forgetting\.annotations is empty"):
        loop.make_second(config, detector, tmp_path)
    config.forgetting.annotations = str(dataset)
    config.forgetting.images += "_absent"
    with pytest.raises(ValueError, match=r"config\.forgetting\.images: the folder .*_absent does not exist"):
        loop.make_second(config, detector, tmp_path)


def test_one_process_has_its_own_value():
    value = {"a": (1, 2)}
    assert loop.from_first_process(value) is value


def test_texts_that_the_model_cannot_tell_apart_or_does_not_have_are_refused(dataset, tmp_path):
    config, *_ = planted.make()
    content = json.loads(dataset.read_text())
    for row, last in zip(content["categories"], ("red", "blue"), strict=True):
        row["name"] = "a thing of very many words which do not say before their end what it is that is " + last
    path = dataset.with_name("long.json")
    path.write_text(json.dumps(content))
    config.eval.annotations, config.eval.images = str(path), str(dataset.parent / "images")
    with pytest.raises(ValueError, match="as far as 16 tokens go"):
        loop.make_streams(config)
    config.eval.annotations, config.model.text.classes = str(dataset), ("red", "green")
    with pytest.raises(ValueError, match=r"config\.second: 1 of 2 texts are none of the 2 classes .*'blue'"):
        loop.make_streams(config, prefix="config.second")


def test_all_processes_get_what_the_first_has(monkeypatch):
    sent = []

    def broadcast(value):
        if jax.process_index() == 0:
            sent.append(np.array(value))
        else:
            assert np.shape(value) == sent[0].shape  # as devices need it
        return sent[-1] if jax.process_index() == 0 else sent.pop(0)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop.multihost_utils, "broadcast_one_to_all", broadcast)
    boxes = np.arange(8, dtype=np.float32).reshape(2, 4)
    rows = result.Rows(np.array([3, 1]), np.array([7, 8]), boxes, np.float32([0.5, 0.25]))
    none = result.Rows.concatenate([])
    for process, own, value in ((0, rows, {"a": [1, 2.5]}), (1, none, None)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        got = loop._rows_of_first_process(own)
        for name in ("image_ids", "category_ids", "boxes", "scores"):
            np.testing.assert_array_equal(getattr(got, name), getattr(rows, name))
            assert getattr(got, name).dtype == getattr(rows, name).dtype
        assert loop.from_first_process(value) == {"a": [1, 2.5]}


def test_the_maximum_over_processes_is_exact(monkeypatch):
    one, other = np.array([[0.1, -2.0], [3.0, 5e-324]]), np.array([[0.1 + 1e-16, 7.0], [-1.0, 0.0]])
    both = lambda own: np.stack([own, other.reshape(-1).view(np.uint8)])  # noqa: E731
    monkeypatch.setattr(loop.multihost_utils, "process_allgather", both)
    np.testing.assert_array_equal(loop._maximum_over_processes(one), np.maximum(one, other))
