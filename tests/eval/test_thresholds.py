"""A threshold for every word: held against brute force over all thresholds, and what few or bad examples get."""

import logging

import numpy as np
import pytest

from detclipv2_jax.data import truth as truth_lib
from detclipv2_jax.eval import thresholds
from detclipv2_jax.eval.detections import Found
from detclipv2_jax.eval.names import _iou

NAMES = ("cat", "dog")


def make_truth(boxes):
    """`boxes`: (image, category from 0, xywh, crowd)."""
    images = [{"id": i, "width": 1000, "height": 1000} for i in range(4)]
    rows = [
        {"id": i + 1, "image_id": image, "category_id": category + 1, "bbox": box, "iscrowd": int(crowd)}
        for i, (image, category, box, crowd) in enumerate(boxes)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
    return truth_lib.read({"images": images, "annotations": rows, "categories": categories})


def one_word(right, scores):
    """Returns the matches of a word with three annotated boxes."""
    return thresholds.Matches(np.array(scores), np.array(right), 3)


def random_case(seed):
    """Returns a truth and detections; some are moved copies of its boxes, some are anywhere, scores repeat."""
    rng = np.random.default_rng(seed)
    boxes = [
        (int(rng.integers(4)), i % 2, [*rng.integers(0, 900, 2).tolist(), *rng.integers(20, 99, 2).tolist()], i == 7)
        for i in range(24)
    ]
    truth, rows = make_truth(boxes), []
    for image, category, box, _ in boxes:
        for _ in range(2):
            moved = np.array(box) + rng.integers(-12, 13, 4)
            rows.append((image, category, moved, rng.integers(1, 20) / 20))
    rows += [(rng.integers(4), rng.integers(2), rng.integers(5, 300, 4), rng.integers(1, 9) / 20) for _ in range(20)]
    images, categories, moved, scores = zip(*rows, strict=True)
    return truth, Found(np.array(images), np.array(categories), np.array(moved, float), np.array(scores, float))


def counts(truth, found, category, threshold):
    """Returns right and wrong detections above a threshold and annotated boxes, one image and detection at a time."""
    right = wrong = 0
    for image in range(len(truth.images)):
        known = np.flatnonzero((truth.image == image) & (truth.category == category))
        rows = np.flatnonzero((found.images == image) & (found.categories == category) & (found.scores > threshold))
        free = list(known[~truth.crowd[known]])
        crowds = list(known[truth.crowd[known]])
        for row in rows[np.argsort(-found.scores[rows], kind="stable")]:
            overlaps = [_iou(found.boxes[[row]], truth.boxes[[i]])[0, 0] for i in free]
            if overlaps and max(overlaps) >= 0.5:
                free.pop(len(overlaps) - 1 - int(np.argmax(overlaps[::-1])))
                right += 1
            elif not any(_share(found.boxes[row], truth.boxes[i]) >= 0.5 for i in crowds):
                wrong += 1
    return right, wrong, int(((truth.category == category) & ~truth.crowd).sum())


def _share(box, crowd):
    low, high = np.maximum(box[:2], crowd[:2]), np.minimum(box[:2] + box[2:], crowd[:2] + crowd[2:])
    return np.prod(np.maximum(high - low, 0)) / np.prod(box[2:])


@pytest.mark.parametrize("seed", range(3))
def test_thresholds_equal_brute_force(seed):
    truth, found = random_case(seed)
    tried = np.arange(0, 1, 0.05) - 0.025  # between all scores
    for min_precision in (None, 0.6):
        chosen = thresholds.choose(truth, found, NAMES, min_precision=min_precision)
        for category, name in enumerate(NAMES):
            table = [counts(truth, found, category, threshold) for threshold in tried]
            f1 = np.array([2 * right / (right + wrong + num) for right, wrong, num in table])
            precision = np.array([right / max(right + wrong, 1) for right, wrong, _ in table])
            one = chosen["words"][name]
            right, wrong, num = counts(truth, found, category, one["threshold"])
            assert one["examples"] == num
            assert one["f1"] == pytest.approx(2 * right / (right + wrong + num))
            assert one["precision"] == pytest.approx(right / max(right + wrong, 1))
            assert one["recall"] == pytest.approx(right / num)
            if min_precision is None:
                assert one["f1"] == pytest.approx(f1.max())
                assert one["threshold"] > tried[np.flatnonzero(f1 > f1.max() - 1e-9)[-1]] - 0.05
            else:
                good = [right for (right, _, _), value in zip(table, precision, strict=True) if value >= 0.6]
                assert right == max(good, default=0)
                assert one["precision"] >= 0.6 or (not good and one["threshold"] == 1)


def test_few_examples_take_the_common_threshold_and_a_wanted_precision_that_there_is_not_keeps_nothing(caplog):
    boxes = [(i % 4, 0, [100 * i, 0, 50, 50], False) for i in range(6)] + [(0, 1, [0, 500, 50, 50], False)]
    truth = make_truth(boxes)
    images = np.array([i % 4 for i in range(6)] + [0])
    box = np.array([[100.0 * i, 0, 50, 50] for i in range(6)] + [[0, 500, 50, 50]])
    found = Found(images, np.array([0] * 6 + [1]), box, np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.1]))
    with caplog.at_level(logging.WARNING, logger="absl"):
        chosen = thresholds.choose(truth, found, NAMES)
    assert (chosen["rule"], chosen["annotations"], chosen["iou"]) == ("best F1", truth.name, 0.5)
    assert chosen["words"]["cat"] == pytest.approx(
        {"threshold": 0.2, "precision": 1.0, "recall": 1.0, "f1": 1.0, "examples": 6, "common": False}
    )
    assert chosen["words"]["dog"] == {"threshold": chosen["common"]["threshold"], "examples": 1, "common": True}
    assert chosen["common"]["threshold"] == pytest.approx(0.05)
    assert "these words take the threshold of all together: dog (1)" in caplog.text
    wrong = Found(images, found.categories, box + 600, found.scores)
    with caplog.at_level(logging.WARNING, logger="absl"):
        chosen = thresholds.choose(truth, wrong, NAMES, min_precision=0.9)
    assert chosen["rule"] == "precision of at least 0.9"
    assert chosen["words"]["cat"]["threshold"] == 1.0
    assert "no threshold gives a precision of 0.9; no box of these words is kept: cat" in caplog.text
    fewer = make_truth(boxes[: thresholds.MIN_EXAMPLES])  # just enough
    assert thresholds.choose(fewer, found.take(np.arange(5)), NAMES)["words"]["cat"]["common"] is False
    nothing = Found(images[:0], images[:0], box[:0], found.scores[:0])
    assert thresholds.choose(truth, nothing, NAMES)["common"]["threshold"] == 1.0
    with pytest.raises(ValueError, match="none of the words has an annotated box"):
        thresholds.choose(truth, found, ("", ""))


def test_a_precision_of_just_what_is_wanted_is_enough():
    found = one_word([True, False, True, False], [0.9, 0.7, 0.5, 0.3])
    for wanted, threshold in ((0.5, 0.15), (0.51, 0.4), (2 / 3, 0.4), (0.67, 0.8)):
        assert thresholds.best(found, min_precision=wanted)["threshold"] == pytest.approx(threshold)
    assert thresholds.best(found) == pytest.approx({"threshold": 0.4, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})


@pytest.mark.parametrize(("num", "more"), [(20, ""), (21, " …")])
def test_twenty_words_are_named_in_the_log(num, more, caplog):
    names = [f"w{i}" for i in range(num)]
    shown = ", ".join(names[:20]) + more
    few = {name: {"threshold": 1.0, "examples": 1, "common": True} for name in names}
    none = {name: {"threshold": 1.0, "examples": 9, "common": False} for name in names}
    with caplog.at_level(logging.WARNING, logger="absl"):
        thresholds.of_words({"words": {"w": {"threshold": 0.5}}, "common": {"threshold": 0.25}}, names)
        thresholds._say(few, where="a", min_precision=None)
        thresholds._say(none, where="a", min_precision=None)
    assert [message.rpartition(": ")[2] for message in caplog.messages] == [
        shown, ", ".join(f"{name} (1)" for name in names[:20]) + more, shown
    ]  # fmt: skip
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="absl"):
        thresholds._say({"w": {"threshold": 0.5, "examples": 5, "common": False}}, where="a", min_precision=0.5)
    assert not caplog.messages


def test_scores_that_float32_cannot_tell_apart_are_still_kept():
    one = thresholds.Matches(np.array([0.5, np.nextafter(0.5, 0)]), np.array([True, False]), 1)
    assert thresholds.best(one)["threshold"] < 0.5
    assert thresholds.best(one)["f1"] == thresholds.best(one)["recall"] == 1.0


def test_other_files_are_one_clear_error(tmp_path, caplog):
    path = tmp_path / "thresholds.json"
    common = '{"common": {"threshold": %s}, "words": {}}'
    word = '{"common": {"threshold": 0.5}, "words": {"cat": {"threshold": %s}}}'
    for content in (
        "[]",
        common % 2,
        common % 1.01,
        common % -0.01,
        word % 1.5,
        word % "null",
        common % "true",
        '{"common": {}, "words": []}',
        "3",
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match="has other content; it must be"):
            thresholds.read(path)
    with pytest.raises(ValueError, match="--thresholds: cannot read"):
        thresholds.read(tmp_path / "absent.json")
    path.write_text(word % 0)
    assert thresholds.read(path)["words"] == {"cat": {"threshold": 0}}
    path.write_text(word % 1)
    assert thresholds.read(path)["words"] == {"cat": {"threshold": 1}}
    path.write_text('{"common": {"threshold": 0.3}, "words": {"cat": {"threshold": 0.7}}}')
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert thresholds.of_words(thresholds.read(path), ["dog", "cat"]).tolist() == [0.3, 0.7]
    assert "the common one of 0.3 counts: dog" in caplog.text
