"""What a search keeps of what a predictor finds, and in which pixels."""

import json
import types

import numpy as np
import planted
import pytest

from detclipv2_jax.data.transforms import Photo
from detclipv2_jax.inference import Found, vocabulary
from detclipv2_jax.predict.search import Search

BOXES = np.array([[0, 0, 4, 2], [1, 1, 3, 2], [2, 0, 4, 4], [0, 2, 4, 4]], np.float32)


@pytest.mark.parametrize(("thresholds", "kept"), [(None, [0, 1, 2, 3]), ([0.5, 0.25], [0, 2])])
def test_boxes_above_the_threshold_of_their_word_are_kept_in_pixels_of_the_photo(thresholds, kept):
    found = Found(BOXES, np.float32([0.75, 0.5, 0.5, 0.25]), np.array([0, 0, 1, 1]), ("a", "b"), (5, 8))
    asked = []

    def iterate(images, words, **options):
        asked.append((words, options))
        return [(i, found) for i, _ in list(enumerate(images))[::-1]]

    predictor = types.SimpleNamespace(iterate=iterate)
    given = None if thresholds is None else np.array(thresholds)
    search = Search(predictor, {"a": "", "b": ""}, {}, {"tile": 3}, thresholds=given)
    photos = [
        ("x", Photo(np.zeros((5, 8, 3), np.uint8), (5, 8))),
        ("y", Photo(np.zeros((5, 8, 3), np.uint8), (10, 32))),
    ]
    results = list(search.find(photos))
    assert asked == [({"a": "", "b": ""}, {"exemplars": {}, "tile": 3})]
    assert [(key, photo, one.size) for key, photo, one in results] == [
        (*photos[1], (10, 32)), (*photos[0], (5, 8))
    ]  # fmt: skip
    for (_, _, one), scale in zip(results, ([4, 2, 4, 2], [1, 1, 1, 1]), strict=True):
        np.testing.assert_array_equal(one.boxes, BOXES[kept] * scale)
        np.testing.assert_array_equal(one.scores, found.scores[kept])
        np.testing.assert_array_equal(one.labels, found.labels[kept])


def test_all_that_results_depend_on_is_described():
    config, _, params = planted.make()
    predictor = types.SimpleNamespace(config=config, params=params)
    shown = {"this": [("a.png", (1, 2, np.float32(3.5), 4))]}
    search = Search(predictor, {"cat": "a pet"}, shown, {"tile": 64, "score": None}, thresholds=np.array([0.25, 0.5]))
    described = search.described()
    configuration = described.pop("configuration")
    assert described == {
        "words": {"cat": "a pet"}, "exemplars": {"this": [["a.png", [1.0, 2.0, 3.5, 4.0]]]},
        "weights": vocabulary.weights_key(params), "options": {"tile": 64, "score": None}, "thresholds": [0.25, 0.5],
    }  # fmt: skip
    assert Search(predictor, {}, {}, {}).described()["thresholds"] is None
    assert json.loads(json.dumps(configuration)) == configuration
    for section, key, value in (("eval", "short_side", 999), ("model", "dtype", "bfloat16")):
        changed = config.copy_and_resolve_references()
        changed[section][key] = value
        predictor = types.SimpleNamespace(config=changed, params=params)
        assert Search(predictor, {}, {}, {}).described()["configuration"] != configuration
