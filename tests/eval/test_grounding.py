"""Recall of phrases and accuracy of expressions with planted answers; the command with a planted model."""

import collections
import json
import os
import pathlib
import pickle

import numpy as np
import planted
import pytest
from PIL import Image

from detclipv2_jax import commands, files
from detclipv2_jax.eval import grounding, result
from detclipv2_jax.inference import Predictor

CAPTION = "a dog , two cats and a dog"


def _write(path):
    spans = {"dog": [[2, 5]], "cats": [[8, 16]], "other dog": [[23, 26]]}
    images = [
        {"id": 7, "file_name": "a.png", "caption": CAPTION},
        {"id": 8, "file_name": "b.png", "caption": "a red hat"},
    ]
    rows = [
        (7, spans["dog"], [0, 0, 10, 10]),
        (7, spans["cats"], [0, 0, 10, 10]),
        (7, spans["cats"], [10, 0, 10, 10]),
        (7, spans["other dog"], [50, 50, 10, 10]),  # the same word, another phrase
        (8, [[2, 5]], [5, 5, 20, 20]),
    ]
    annotations = [
        {"id": i, "image_id": image, "tokens_positive": span, "bbox": box} for i, (image, span, box) in enumerate(rows)
    ]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return str(path)


def test_phrases_are_the_annotations_with_the_same_spans(tmp_path):
    queries = grounding.read_queries(_write(tmp_path / "g.json"), task="phrases")
    assert [(query.file, query.text, len(query.boxes)) for query in queries] == [
        ("a.png", "dog", 1), ("a.png", "two cats", 2), ("a.png", "dog", 1), ("b.png", "red", 1)
    ]  # fmt: skip


def test_phrases_that_only_begin_alike_are_two(tmp_path):
    path = pathlib.Path(_write(tmp_path / "g.json"))
    content = json.loads(path.read_text())
    content["annotations"][2]["tokens_positive"] = [[8, 16], [23, 26]]  # of the two boxes of the cats
    path.write_text(json.dumps(content))
    queries = grounding.read_queries(str(path), task="phrases")
    assert [len(query.boxes) for query in queries] == [1] * 5
    assert [query.text for query in queries][1] == "two cats" != queries[2].text


def test_all_boxes_of_a_caption_are_of_one_expression(tmp_path):
    queries = grounding.read_queries(_write(tmp_path / "g.json"), task="referring")
    assert [(query.text, len(query.boxes)) for query in queries] == [(CAPTION, 4), ("a red hat", 1)]


def test_recall_of_any_box_and_of_merged_boxes(tmp_path):
    queries = grounding.read_queries(_write(tmp_path / "g.json"), task="phrases")
    far = [500.0, 500.0, 5.0, 5.0]
    answers = {
        "dog": [far, far, [0, 0, 10, 5.0], far, far, [50, 50, 10, 10]],  # IoU 0.5 at rank 3, the other dog at rank 6
        "two cats": [[0, 0, 20, 10.0], *[far] * 6, [10, 0, 10, 9.0]],  # both at rank 1 (IoU 0.5 with each), one at 8
        "red": [],
    }

    def find(file, texts):
        assert len(set(texts)) == len(texts)
        return [np.array(answers[text], np.float64).reshape(-1, 4) for text in texts]

    scores = grounding.evaluate(queries, find, task="phrases")
    assert scores == {
        "R@1": 0.25, "R@5": 0.5, "R@10": 0.75, "merged_R@1": 0.25, "merged_R@5": 0.5, "merged_R@10": 0.75
    }  # fmt: skip
    answers["two cats"] = [[10, 0, 10, 9.0], *[far] * 5, [1, 0, 19, 10.0]]  # one cat first, both at rank 7
    scores = grounding.evaluate(queries, find, task="phrases")
    assert (scores["R@1"], scores["merged_R@1"], scores["merged_R@5"], scores["merged_R@10"]) == (0.25, 0.0, 0.25, 0.75)


def test_expressions_are_whole_captions(tmp_path):
    path = tmp_path / "g.json"
    box = [10, 10, 20, 20]
    captions = {1: " left red thing\n", 2: "blue thing", 3: "the largest one"}
    images = [{"id": i, "file_name": "same.png", "caption": caption} for i, caption in captions.items()]
    annotations = [{"id": i, "image_id": i, "bbox": box, "tokens_positive": [[0, 4]]} for i in captions]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    queries = grounding.read_queries(str(path), task="referring")
    assert [query.text for query in queries] == [caption.strip() for caption in captions.values()]
    calls = []

    def find(file, texts):
        calls.append(file)
        return [np.array([[10, 10, 20, 20 if "thing" in text else 50], box], np.float64) for text in texts]

    assert grounding.evaluate(queries, find, task="referring") == {"accuracy": pytest.approx(2 / 3)}
    assert calls == ["same.png"]  # the photo is looked at once
    twice = [grounding.Query("same.png", "thing", np.array([box, [200.0, 10, 20, 20]]))]  # any of its boxes counts
    assert grounding.evaluate(twice, find, task="referring") == {"accuracy": 1.0}


def test_what_cannot_be_found_is_left_out_and_counted(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "caption": c} for i, c in enumerate((CAPTION, "  ", None), start=7)]
    good = {"image_id": 7, "tokens_positive": [[2, 5]], "bbox": [1, 1, 9, 9]}
    changes = [
        {}, {"image_id": 99}, {"bbox": [1, 1, 0, 5]}, {"bbox": [1, 1, 5, 0]}, {"bbox": [1, 1, 9]}, {"image_id": 8},
        {"image_id": 9}, {"tokens_positive": []}, {"iscrowd": 1}, {"image_id": "7", "bbox": [1, 1, 1, 1]},
    ]  # fmt: skip
    path = tmp_path / "g.json"
    path.write_text(json.dumps({"images": images, "annotations": [good | change for change in changes]}))
    odd = collections.Counter()
    (query,) = grounding.read_queries(str(path), task="phrases", max_bad_share=1, odd=odd)
    assert (query.file, query.text, len(query.boxes)) == ("7.png", "dog", 2)
    left_out = {what.removeprefix("annotation left out: "): num for what, num in odd.items() if num}
    (spans,) = (what for what in left_out if what.startswith("tokens_positive: "))
    assert left_out.pop(spans) == 1
    assert left_out == {
        "image_id is not listed": 1, "bbox has no area": 2, "bbox is not four numbers in px": 1,
        "crowd box left out": 1, "caption of its image is no text": 2,
        "image_id of another type than the id it names": 1,
    }  # fmt: skip
    (query,) = grounding.read_queries(str(path), task="referring", max_bad_share=1)
    assert (query.text, len(query.boxes)) == (CAPTION, 3)  # without spans too


def test_what_is_repaired_is_counted_and_boxes_of_another_form_are_refused(tmp_path):
    images = [{"id": 7, "file_name": "a.png", "caption": CAPTION, "width": 20, "height": 20}]
    row = {"image_id": 7, "tokens_positive": [[2, 5]], "bbox": [1, 1, 9, 9]}
    outlined = {"image_id": 7, "tokens_positive": [[2, 4], [3, 5]], "segmentation": [[1, 1, 5, 1, 5, 9]]}
    path, odd = tmp_path / "g.json", collections.Counter()
    rows = [row] * 8 + [outlined, row | {"bbox": [15, 1, 9, 9]}]
    path.write_text(json.dumps({"images": images, "annotations": rows}))
    queries = grounding.read_queries(str(path), task="phrases", odd=odd)
    assert [len(query.boxes) for query in queries] == [9, 1]
    assert queries[1].boxes.tolist() == [[1, 1, 4, 8]]
    assert {what: num for what, num in odd.items() if num} == {
        "box taken from the outline for want of a bbox": 1, "spans that overlap or cover nothing": 1,
        "box cut at the border": 1,
    }  # fmt: skip
    path.write_text(json.dumps({"images": images, "annotations": [row | {"bbox": [0.1, 0.1, 0.5, 0.5]}] * 3}))
    with pytest.raises(ValueError, match="3 boxes look relative to the image's size"):
        grounding.read_queries(str(path), task="phrases")


def test_the_command_prints_percents_and_hands_on_what_is_asked(monkeypatch, capsys, tmp_path):
    asked, protocol = [], {"num_texts": 3, "images_evaluated": 2}
    found = {"R@1": 0.125, "R@5": 1.0, "protocol": protocol}
    monkeypatch.setattr(grounding, "run", lambda **given: asked.append(given) or found)
    required = {"checkpoint": "run", "annotations": "g", "images": "photos"}
    arguments = [f"--{key}={value}" for key, value in required.items()]
    assert commands.run(grounding.main, arguments=arguments) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["3 texts on 2 images, in %", "R@1 12.5   R@5 100.0"]
    more = ["--task=referring", "--split=val", "--max_bad_share=0.25", f"--output={tmp_path}/scores/a.json"]
    assert commands.run(grounding.main, arguments=[*arguments, *more]) == 0
    assert json.loads((tmp_path / "scores" / "a.json").read_text()) == found
    assert asked == [
        required | {"task": "phrases", "split": "", "max_bad_share": 0.0, "folder": pathlib.Path("run/eval")},
        required | {"task": "referring", "split": "val", "max_bad_share": 0.25, "folder": tmp_path / "scores"},
    ]


def test_what_is_asked_in_many_files_has_a_hash_of_texts_photos_and_boxes():
    box = np.array([[1, 2, 3, 4.0]])
    queries = [("a.png", "dog", box), ("a.png", "cat", box), ("b.png", "dog", box), ("a.png", "dog", box + 1)]
    digests = [grounding._digest([grounding.Query(*query)]) for query in queries]
    assert len(set(digests)) == 4
    assert grounding._digest([grounding.Query("a.png", "dog", box.copy())]) == digests[0]


def test_other_files_are_refused(tmp_path, capsys):
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 3, "image_id": 1}]}))
    with pytest.raises(
        ValueError,
        match=r"1 of 1 annotations cannot .*annotations\[0\] bbox is not four numbers in px",
    ):
        grounding.read_queries(str(path), task="phrases")
    assert (
        commands.run(grounding.main, arguments=["--checkpoint=x", "--annotations=absent.json", f"--images={tmp_path}"])
        == 1
    )
    assert "error: --annotations" in capsys.readouterr().err


@pytest.mark.slow
def test_command_with_a_planted_model(tmp_path, monkeypatch, capsys):
    predictor = Predictor(*planted.make(), step=5)
    predictor.config.eval.update({"score_threshold": 0.125, "nms_iou": 0.375})
    monkeypatch.setattr(Predictor, "from_checkpoint", lambda workdir: predictor)
    boxes = {"red": (20, 10, 60, 60), "blue": (120, 20, 200, 70)}
    Image.fromarray(planted.paint((100, 250), boxes)).save(tmp_path / "0.png")
    caption = "red over blue"
    spans = {"red": [[0, 3]], "blue": [[9, 13]]}
    annotations = [
        {"id": i, "image_id": 1, "tokens_positive": spans[name], "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for i, (name, (x1, y1, x2, y2)) in enumerate(boxes.items())
    ]
    annotations[1]["bbox"][0] += 500  # not there
    content = {"images": [{"id": 1, "file_name": "0.png", "caption": caption}], "annotations": annotations}
    (tmp_path / "g.json").write_text(json.dumps(content))
    output = tmp_path / "scores.json"
    arguments = ["--checkpoint=run", f"--annotations={tmp_path}/g.json", f"--images={tmp_path}", f"--output={output}"]
    assert commands.run(grounding.main, arguments=arguments) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(output.read_text())
    assert (printed["R@1"], printed["merged_R@10"]) == (0.5, 0.5)
    expected = {
        "task": "phrases", "checkpoint": "run", "checkpoint_step": 5, "ema": False, "num_texts": 2,
        "images_evaluated": 1, "repaired": {}, "iou": 0.5, "split": "", "short_side": 64, "long_side": 128,
        "score_threshold": 0.125, "nms_iou": 0.375, "annotations": f"{tmp_path}/g.json",
        "annotations_sha256": files.sha256(tmp_path / "g.json"),
    }  # fmt: skip
    assert {key: printed["protocol"][key] for key in expected} == expected
    assert printed["protocol"]["text"].startswith("the phrase alone")
    # the same photo as RefCOCO has it
    predictor.config.optimizer.ema_decay = 0.5
    texts = [{"sent": "red"}, {"sent": "blue"}]
    (tmp_path / "refs(unc).p").write_bytes(
        pickle.dumps([{"split": "val", "image_id": 1, "ann_id": 0, "sentences": texts}], protocol=2)
    )
    (tmp_path / "instances.json").write_text(json.dumps(content))
    arguments[1] = f"--annotations={tmp_path}/refs(unc).p"
    assert commands.run(grounding.main, arguments=[*arguments, "--task=referring", "--split=val"]) == 0
    referred = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (referred["accuracy"], referred["protocol"]["split"], referred["protocol"]["ema"]) == (0.5, "val", True)
    assert referred["protocol"]["text"] == "the whole caption"
    assert referred["protocol"]["annotations_sha256"] != printed["protocol"]["annotations_sha256"]


@pytest.mark.slow
def test_a_killed_command_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(result, "PART_SECONDS", -1)
    predictor = Predictor(*planted.make(), step=5)
    monkeypatch.setattr(Predictor, "from_checkpoint", lambda workdir: predictor)
    images, annotations = [], []
    for i in range(4):
        x = 10 + 20 * i
        Image.fromarray(planted.paint((100, 250), {"red": (x, 10, x + 60, 60)})).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "caption": "red and blue"})
        annotations += [
            {"id": 2 * i + j, "image_id": i, "tokens_positive": spans, "bbox": [x + 60 * (i % 2), 10, 60, 50]}
            for j, spans in enumerate(([[0, 3]], [[8, 12]]))
        ]
    (tmp_path / "g.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    arguments = {"checkpoint": "run", "annotations": str(tmp_path / "g.json"), "images": str(tmp_path)}
    arguments |= {"task": "phrases", "folder": tmp_path / "scores"}
    expected = grounding.run(**arguments)
    assert 0 < expected["R@1"] < 1
    ground, seen = predictor.ground, []

    def killed_at_third(image, *rest, **limits):
        assert limits == {"max_detections": 10}
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(image)
        return ground(image, *rest, **limits)

    monkeypatch.setattr(predictor, "ground", killed_at_third)
    # with other texts, parameters or photos it begins anew
    content = (tmp_path / "g.json").read_text()
    for text, weight, day in (("rose", 1, 1), ("blue", 1, 1), ("blue", 2, 1), ("blue", 2, 2)):
        (tmp_path / "g.json").write_text(content.replace("blue", text))
        predictor.params["more"] = np.full(1, weight)
        os.utime(tmp_path / "3.png", (day, day))
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            grounding.run(**arguments)
        assert [name.rpartition("/")[2] for name in seen] == ["0.png", "1.png"]
    monkeypatch.setattr(
        predictor, "ground", lambda image, *rest, **limits: seen.append(image) or ground(image, *rest, **limits)
    )
    assert grounding.run(**arguments) == expected
    assert [name.rpartition("/")[2] for name in seen] == [f"{i}.png" for i in range(4)]
    assert len(list((tmp_path / "scores").iterdir())) == 3  # of the three others


def test_the_first_box_that_overlaps_any_is_a_hit():
    boxes = np.array([[0, 0, 10, 10.0], [50, 50, 10, 10]])
    found = np.array([[0, 0, 10, 4.9], [20, 0, 10, 10.0], [50, 50, 10, 5], [0, 0, 10, 10]])
    assert grounding.first_hit(found, boxes) == 3  # an IoU of exactly 1/2 is enough
    assert grounding.first_hit(found[:2], boxes) == np.inf
    assert grounding.first_hit(found[:0], boxes) == np.inf
