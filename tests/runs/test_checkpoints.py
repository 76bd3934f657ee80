"""What a checkpoint says of itself and how it is compared with a model; saving and restoring are in tests/faults."""

import contextlib
import types

import jax
import numpy as np
import pytest

from detclipv2_jax import config as config_lib
from detclipv2_jax import config_json
from detclipv2_jax.runs import checkpoints

SHAPES = {"a": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)}, "b": jax.ShapeDtypeStruct((), np.float32)}


def test_the_best_step_is_what_its_file_says(tmp_path, caplog):
    path = tmp_path / "best.json"
    assert checkpoints.read_best(path) is None
    assert not caplog.records
    path.write_text('{"step": 7, "score": "AP", "value": 1, "more": 0}')
    assert checkpoints.read_best(path) == {"step": 7, "score": "AP", "value": 1.0}
    for text in ("{", "[]", '{"step": 7, "score": "AP"}', '{"step": null, "score": "AP", "value": 1}'):
        caplog.clear()
        path.write_text(text)
        assert checkpoints.read_best(path) is None
        assert "the newest checkpoint counts" in caplog.text


def test_differences_are_all_listed():
    checkpoints.report_differences(SHAPES, SHAPES, what="it")
    stored = {"a": {"kernel": np.zeros((3, 2))}, "c": np.zeros(())}
    with pytest.raises(ValueError, match=r"(?s)it does not fit .*missing \(1\): b.*unexpected \(1\): c.*a/kernel"):
        checkpoints.report_differences(stored, SHAPES, what="it")


def test_a_folder_without_a_configuration_is_no_workdir(tmp_path):
    with pytest.raises(ValueError, match=r"is no workdir: it has no config\.json"):
        checkpoints.read_config(tmp_path)
    config = config_lib.base()
    config.epochs = 3
    (tmp_path / "config.json").write_text(config_json.to_json(config))
    assert config_lib.differences(checkpoints.read_config(tmp_path), config) == []


def test_a_start_from_another_model_says_which_values_differ(tmp_path, monkeypatch):
    stored = types.SimpleNamespace(stored=lambda step, item: {"b": np.zeros(())})
    theirs, ours = config_lib.base(), config_lib.base()
    theirs.model.embed_dim = 7
    opened = contextlib.nullcontext((theirs, stored, 3, "params"))
    monkeypatch.setattr(checkpoints, "_opened", lambda workdir: opened)
    checkpoints.check_start(tmp_path, ours.model, {"b": SHAPES["b"]})
    with pytest.raises(
        ValueError, match=r"(?s)init_from.checkpoint .*missing \(1\): a/kernel.*config.model.embed_dim.*7"
    ):
        checkpoints.check_start(tmp_path, ours.model, SHAPES)


@pytest.mark.parametrize(("best", "kept"), [(None, [3, 4]), (1, [1, 3, 4]), (4, [3, 4])])
def test_the_newest_and_the_best_stay(best, kept):
    policy = checkpoints._NewestAndBest(2)
    policy.best = best
    stored = [types.SimpleNamespace(step=step) for step in (1, 2, 3, 4)]
    stays = policy.should_preserve(stored, context=None)
    assert [checkpoint.step for checkpoint, stay in zip(stored, stays, strict=True) if stay] == kept
