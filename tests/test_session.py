"""Checks around a run, what may change when it goes on, and the last lines."""

import json
import signal

import pytest

from detclipv2_jax import config as config_lib
from detclipv2_jax import config_json, session, train


def test_what_may_change_when_a_run_goes_on(micro, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json, so there is no run to evaluate or replay"):
        session.check_workdir(tmp_path, micro, fresh_allowed=False)
    session.check_workdir(tmp_path, micro, fresh_allowed=True)
    (tmp_path / "config.json").write_text(config_json.to_json(micro))
    values = config_lib.flat(micro)
    others = {
        key: value + 1
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not key.startswith("chips.")
    }
    assert len(others) > 100
    for key, value in others.items():
        config = micro.copy_and_resolve_references()
        section, _, last = key.rpartition(".")
        part = config
        for name in filter(None, section.split(".")):
            part = part[name]
        part[last] = value
        if key.partition(".")[0] in session.CHANGEABLE:
            session.check_workdir(tmp_path, config, fresh_allowed=False)
        else:
            with pytest.raises(ValueError, match=f"holds another run \\(stored -> now\\):\n  {key}: "):
                session.check_workdir(tmp_path, config, fresh_allowed=True)
    assert {key.partition(".")[0] for key in others} & set(session.CHANGEABLE) >= {
        "checkpoint",
        "eval",
        "input",
        "mesh",
    }
    assert set(session.CHANGEABLE) == {
        "num_steps", "log_every_steps", "pictures_every_steps", "profile_steps", "nonfinite", "timeout_s", "checkpoint",
        "eval", "input", "mesh", "chips", "closing", "trackers",
    }  # fmt: skip


def test_data_that_changed(tmp_path, caplog):
    before = {"config.detection.annotations": "a"}
    session.check_data(tmp_path, before, allowed=False)  # nothing was written
    (tmp_path / "data.json").write_text(json.dumps(before))
    session.check_data(tmp_path, {}, allowed=False)  # no checkpoint
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    session.check_data(tmp_path, before, allowed=False)
    now = {"config.detection.annotations": "b", "config.image_text.pairs": "c"}
    lines = "  config.detection.annotations changed\n  config.image_text.pairs is new"
    with pytest.raises(ValueError, match=f"the data are not those that the run of .* began with:\n{lines}\nRestore"):
        session.check_data(tmp_path, now, allowed=False)
    with caplog.at_level("WARNING", logger="absl"):
        session.check_data(tmp_path, before, allowed=True)
        assert not caplog.records
        session.check_data(tmp_path, now, allowed=True)
    assert lines in caplog.text
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(ValueError, match="annotations is new"):
        session.check_data(tmp_path, before, allowed=False)


def test_generated_files_are_those_that_were_asked_for(micro, tmp_path):
    micro.scenes.update({"num_detection": 2, "num_grounding": 0, "num_image_text": 1, "num_eval": 0, "size_px": 32})
    micro.eval.annotations = "own.json"
    complete = session.with_scenes(micro, tmp_path)
    folder = str(tmp_path / "data")
    assert (complete.detection.annotations, complete.detection.images) == (f"{folder}/detection.json", folder)
    assert (complete.image_text.pairs, complete.image_text.images) == (f"{folder}/pairs.tsv", folder)
    assert (complete.grounding.annotations, complete.eval.annotations, complete.eval.images) == ("", "own.json", "")
    assert micro.detection.annotations == ""
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "detection.json", "images", "pairs.tsv", "scenes.json",
    ]  # fmt: skip
    micro.scenes.folder = str(tmp_path / "other")
    assert session.with_scenes(micro, tmp_path).detection.images == str(tmp_path / "other")
    micro.scenes.update({"num_detection": 0, "num_image_text": 0})
    assert session.with_scenes(micro, tmp_path) is micro


def test_the_last_lines(tmp_path, capsys, caplog):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "best.json").write_text('{"step": 40, "score": "AP", "value": 0.25}')
    scores = {"AP": 0.123, "APs": -1.0, "AP50": 0.0, "forgetting/before/AP": 0.5, "forgetting/after/AP": 0.25}
    session.report(tmp_path, scores, minutes=12.34)
    assert capsys.readouterr().out.splitlines() == [
        "scores in %: AP 12.3, AP50 0.0",
        "second set, before training in %: AP 50.0",
        "second set, after training in %: AP 25.0",
        "best checkpoint: step 40, AP 25.0",
        f"done in 12.3 minutes; everything is in {tmp_path}/:",
        "  metrics.jsonl  loss terms, speed and scores by step (TensorBoard events beside it)",
        "  pictures       what the model saw and found",
    ]
    session.print_closing("rare {APr:.1f}, all {AP:.1f}", {"AP": 0.5, "APr": 0.125})
    session.print_closing("", {"AP": 0.5})
    assert capsys.readouterr().out == "rare 12.5, all 50.0\n"
    with caplog.at_level("INFO", logger="absl"):
        session.print_closing("rare {APr:.1f}", {"AP": 0.5})
    assert "the data have no score 'APr'" in caplog.text
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("training", [True, False])
def test_a_workdir_says_what_it_holds(micro, tmp_path, training):
    seen = []

    def work():
        seen.append((tmp_path / "run" / "lock").exists())
        return {"AP": 1.0}

    def run(config, data):
        return session.in_workdir(work, config, tmp_path / "run", training=training, data=data)

    assert run(micro, {"a": "1"}) == {"AP": 1.0}
    assert seen == [training]
    path = tmp_path / "run" / "config.json"
    assert path.read_text() == config_json.to_json(micro)
    assert (tmp_path / "run" / "data.json").exists() == training
    other = micro.copy_and_resolve_references()
    other.num_steps = 7
    run(other, {"a": "2"})
    # an evaluation leaves a run's configuration alone
    assert path.read_text() == config_json.to_json(other if training else micro)
    if training:
        assert json.loads((tmp_path / "run" / "data.json").read_text()) == {"a": "2"}


def test_a_run_that_was_told_to_stop_leaves_a_word_and_no_other(tmp_path):
    word = tmp_path / "preempted"
    with pytest.raises(train.Preempted), session.said_when_preempted(word):
        raise train.Preempted(signal.SIGTERM, 7)
    assert word.read_text() == "stopped by SIGTERM after step 7, which is saved\n"
    with pytest.raises(ValueError, match="other"), session.said_when_preempted(word):
        raise ValueError("other")
    assert not word.exists()


def test_it_is_left_in_the_workdir_of_a_run(micro, tmp_path):
    def stop():
        raise train.Preempted(signal.SIGTERM, 7)

    with pytest.raises(train.Preempted):
        session.in_workdir(stop, micro, tmp_path, training=True, data={})
    assert (tmp_path / "preempted").exists()
    session.in_workdir(dict, micro, tmp_path, training=False, data={})
    assert (tmp_path / "preempted").exists()  # an evaluation does not go on with it
    session.in_workdir(dict, micro, tmp_path, training=True, data={})
    assert not (tmp_path / "preempted").exists()
