"""Weights between two models: how they are scored, which are kept, and what cannot be interpolated."""

import json
import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from detclipv2_jax import config as config_lib
from detclipv2_jax import config_json, interpolate
from detclipv2_jax.eval import loop
from detclipv2_jax.interpolate import Point
from detclipv2_jax.runs import exported
from detclipv2_jax.visualize import charts

START, END = 2.0, 4.0


@pytest.fixture
def models(monkeypatch):
    """Models of one weight, whose scores follow from it: new 0.1 a unit, old best at 2.5; and what is evaluated."""
    config = config_lib.base()
    config.init_from.checkpoint = "start"
    config.eval.annotations, config.forgetting.annotations = "new.json", "old.json"
    config.eval.monitor, config.eval.num_pictures = "fixed_AP", 3
    images: list[str] = []
    weights, asked = {"start": START, "tuned": END, "other": np.zeros(2), "worse": 1.0, "alone": END}, []

    def load(workdir):
        own = config.copy_and_resolve_references()
        if workdir == "alone":
            own.init_from.checkpoint = own.forgetting.annotations = ""
        return loop.Checkpoint(own, None, {"a": jax.numpy.asarray(weights[workdir])}, 7)

    class Evaluator:
        def __init__(self, config, detector, *, streams, workdir):
            assert not any(pathlib.Path(workdir).iterdir())
            self.config, self.streams = config, streams

        def __call__(self, params, *, step):
            asked.append((self.config.eval.annotations, self.streams, self.config.eval.num_pictures, step))
            images.append(self.config.eval.images)
            weight = float(params["a"])
            if self.config.eval.annotations == "old.json":
                return {"AP": 0.5 - 0.1 * abs(weight - 2.5)}  # no score of LVIS
            return {"AP": 0.9, "fixed_AP": 0.1 * weight}

    monkeypatch.setattr(loop.Checkpoint, "load", load)
    monkeypatch.setattr(loop, "make_streams", lambda config, prefix="": f"{config.eval.annotations} {prefix}")
    monkeypatch.setattr(loop, "Evaluator", Evaluator)
    return config, asked, images


def test_the_best_weights_are_kept(models, tmp_path):
    config, asked, _ = models
    printed = interpolate.run(checkpoint="tuned", output=str(tmp_path / "kept"), steps=4)
    stored = json.loads((tmp_path / "kept" / "interpolation.json").read_text())
    assert (stored["before"], stored["after"], stored["score"]) == ("start", "tuned", "fixed_AP")
    assert (stored["new_annotations"], stored["old_annotations"]) == ("new.json", "old.json")
    points = [(round(point["new"], 6), round(point["old"], 6)) for point in stored["points"]]
    assert points == [(0.2, 0.45), (0.25, 0.5), (0.3, 0.45), (0.35, 0.4), (0.4, 0.35)]
    # shares of the gain 0, 0.25, 0.5, 0.75, 1; kept 1, 1.11, 1, 0.89, 0.78
    assert stored["best"] == 1.0
    assert printed.splitlines()[-1] == "| 1 (best) | 40.0 | 35.0 | 100.0 | 77.8 |"
    assert len(printed.splitlines()) == 7
    assert asked[:2] == [("new.json", "new.json ", 0, 7), ("old.json", "old.json config.forgetting", 0, 7)]
    assert len(asked) == 10
    assert (tmp_path / "kept" / "trade_off.png").stat().st_size > 1000
    assert exported.is_export(tmp_path / "kept")
    assert config_json.differences(exported.read_config(tmp_path / "kept"), config) == []
    weights, step = exported._read_weights(tmp_path / "kept")
    assert (weights["a"].item(), step) == (END, 7)


def test_other_data_and_another_start(models, tmp_path):
    _, asked, images = models
    options = {"before": "worse", "new_annotations": "mine.json", "old_annotations": "old.json", "old_images": "theirs"}
    options["new_images"] = "my photos"
    interpolate.run(checkpoint="alone", output=str(tmp_path / "kept"), steps=2, **options)
    assert [row[0] for row in asked] == ["mine.json", "old.json"] * 3
    stored = json.loads((tmp_path / "kept" / "interpolation.json").read_text())
    assert [round(point["new"], 6) for point in stored["points"]] == [0.1, 0.25, 0.4]
    assert (stored["before"], stored["new_annotations"], stored["old_annotations"]) == (
        "worse",
        "mine.json",
        "old.json",
    )
    assert images == ["my photos", "theirs"] * 3


def test_what_cannot_be_interpolated_is_said_at_once(models, tmp_path):
    asked, output = models[1], str(tmp_path / "kept")
    for given, message in (
        ({"checkpoint": "alone"}, "alone was not started from another run; say which weights to mix in: --before=RUN"),
        ({"checkpoint": "alone", "before": "start"}, "no data that must not be forgotten: give --old_annotations=FILE"),
        ({"checkpoint": "tuned", "before": "other"}, r"(?s)--before=other does not fit .*reshaped .*a \(2,\) -> \(\)"),
        ({"checkpoint": "tuned", "steps": 1}, r"--steps=1 must be 2 to 100"),
        ({"checkpoint": "tuned", "steps": 101}, r"--steps=101 must be 2 to 100"),
        ({"checkpoint": "alone", "steps": 100}, "alone was not started from another run"),
    ):
        with pytest.raises(ValueError, match=message):
            interpolate.run(output=output, **given)
    assert not asked
    with pytest.raises(ValueError, match=r"the fine-tune gained nothing on the new data: 40\.0 before, 20\.0 after"):
        interpolate.run(checkpoint="start", before="tuned", output=output)
    assert len(asked) == 4
    assert not (tmp_path / "kept").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_text("")
    with pytest.raises(ValueError, match=r"--output: .* holds something already"):
        interpolate.run(checkpoint="tuned", output=output)


def test_the_smaller_share_judges():
    points = [
        Point(0, 0.2, 0.5),
        Point(0.25, 0.3, 0.5),
        Point(0.5, 0.39, 0.49),
        Point(0.75, 0.38, 0.3),
        Point(1, 0.4, 0.2),
    ]
    assert interpolate.best(points) == points[2]
    uneven = Point(0.6, 0.34, 0.9)  # shares 1.8 and 0.7: the sum is larger, the smaller one is not
    assert interpolate.best([points[0], uneven, points[2], points[4]]) == points[2]
    equal = points[2]._replace(alpha=0.6)
    assert interpolate.best([points[0], points[2], equal, points[4]]).alpha == 0.5  # nearer to the start
    with pytest.raises(ValueError, match="gained nothing"):
        interpolate.shares([Point(0, 0.2, 0.5), Point(1, 0.2, 0.5)])
    np.testing.assert_allclose(interpolate.shares(points)[2], (0.98, 0.95))
    assert " (best) | 39.0 | 49.0 | 95.0 | 98.0 |" in interpolate.table(points, points[2])
    with pytest.raises(ValueError, match=r"score 0\.0 on the old data: nothing to keep"):
        interpolate.shares([Point(0, 0.1, 0.0), Point(1, 0.2, 0.0)])


def test_ends_are_the_models_themselves():
    first, last = {"a": np.float32(0.1)}, {"a": np.float32(0.7)}
    assert interpolate.mix(first, last, 0.0) == first
    assert interpolate.mix(first, last, 1.0) == last
    np.testing.assert_allclose(interpolate.mix(first, last, 0.25)["a"], 0.25)
    found = interpolate.walk(lambda alpha: Point(alpha, 1 + alpha, 1.0), 3)
    assert [point.alpha for point in found] == [0.0, 0.3333, 0.6667, 1.0]


def test_the_second_set_is_named_or_there_is_none():
    config = config_lib.base()
    assert loop.second(config) is None
    config.forgetting.images = "photos"
    second = loop.second(config)
    assert isinstance(second, ConfigDict)
    assert (second.eval.images, config.eval.images) == ("photos", "")


def test_the_picture_has_a_mark_at_what_is_kept():
    points = [(0.0, 0.2, 0.5), (0.5, 0.35, 0.45), (1.0, 0.4, 0.2)]
    pictures = [charts.trade_off(points, chosen=chosen, score="AP") for chosen in (1, 2)]
    assert pictures[0].shape == (460, 600, 3)
    assert np.any(pictures[0] != pictures[1])
