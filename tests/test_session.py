"""Checks around a run, what may change when it goes on, and the last lines."""

import contextlib
import errno
import itertools
import json
import os
import signal

import pytest

from detclipv2_jax import chips, config_json, session, train
from detclipv2_jax import config as config_lib
from detclipv2_jax.bucket_store import BucketError
from detclipv2_jax.data.schema import DataError, StalledError
from detclipv2_jax.runs import processes
from detclipv2_jax.runs.checkpoints import DamagedError
from detclipv2_jax.runs.workdir import WorkdirError


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
        "eval", "input", "mesh", "chips", "closing", "trackers", "optimizer.text_lengths",
    }  # fmt: skip
    longer = micro.copy_and_resolve_references()
    longer.optimizer.text_lengths.grounding = ((16, 1.0),)
    session.check_workdir(tmp_path, longer, fresh_allowed=False)


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


@pytest.fixture
def told(micro, tmp_path, monkeypatch):
    """Runs `session.run` with stand-ins for what joins, sets up and leaves; returns (how it ends, what was asked)."""

    def run(work, *, replayed=None, training=True, process=0, compiling=False, wrong=None):
        asked = {}

        @contextlib.contextmanager
        def opened(workdir, *, training):
            asked["opened"] = training
            if wrong:
                raise wrong
            yield tmp_path, "bucket"
            asked["closed"] = True

        def setup(config, folder, **options):
            asked["prepared"] = (folder, options)
            return work

        def leave(status):
            raise SystemExit(f"left with {status}")

        micro.closing = "AP {AP:.0f}"
        monkeypatch.setattr(session.processes, "join", lambda mode, **options: asked.update(joined=(mode, options)))
        monkeypatch.setattr(session.remote, "opened", opened)
        monkeypatch.setattr(session, "setup", setup)
        monkeypatch.setattr(session.commands, "leave", leave)
        monkeypatch.setattr(session, "is_compiling", lambda: compiling)
        monkeypatch.setattr(session.jax, "process_index", lambda: process)
        clock = itertools.count(0, 7200)
        monkeypatch.setattr(session.time, "monotonic", lambda: next(clock))
        try:
            ended = session.run(
                micro, "runs/a", training=training, distributed="off", replayed=replayed, changed_data=True,
                preempted_status=75,
            )  # fmt: skip
        except SystemExit as error:
            ended = error.code
        return ended, asked

    return run


def fails(error):
    """Returns work that ends with an error."""

    def work():
        raise error

    return work


def test_a_run_that_is_done_says_so_and_gives_its_workdir_back(told, capsys, micro, tmp_path):
    ended, asked = told(lambda: {"AP": 0.5})
    assert ended == 0
    assert asked == {
        "opened": True, "closed": True, "joined": ("off", {"timeout_s": micro.timeout_s}),
        "prepared": (tmp_path, {"training": True, "replayed": None, "changed_data": True, "bucket": "bucket"}),
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "scores in %: AP 50.0\n" in printed
    assert "done in 120.0 minutes" in printed
    assert printed.endswith("AP 50\n")
    for options in ({"replayed": 3}, {"process": 1}):
        assert told(lambda: {"AP": 0.5}, **options)[0] == 0
        assert capsys.readouterr().out == ""


def test_only_training_takes_a_workdir_in_a_bucket(told):
    options = ({}, {"training": False}, {"replayed": 3})
    assert [told(dict, **option)[1]["opened"] for option in options] == [True, False, False]


@pytest.mark.parametrize(
    "error",
    [
        BucketError("why"), DataError("why"), DamagedError("why"), processes.MissingProcessError("why"),
        train.NonFiniteError("why"), WorkdirError("why"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_a_run_was_given_ends_it_with_a_line(told, error):
    assert told(fails(error))[0] == "error: why"


def test_other_ends_of_a_run(told, capsys):
    assert told(fails(ValueError("a fault")))[0] == 1
    assert "Traceback" in capsys.readouterr().err
    assert told(fails(StalledError("a disk")))[0] == "left with 1"
    assert capsys.readouterr().err == "error: a disk\n"
    for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        stop = train.Preempted(number, 7)
        assert told(fails(stop))[0] == status
        assert told(fails(stop), compiling=True)[0] == f"left with {status}"  # whose thread would be waited for
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "error", [ValueError("why"), processes.MissingProcessError("why"), WorkdirError("why"), BucketError("why")]
)
def test_what_is_wrong_before_a_run_is_a_line(told, error):
    assert told(dict, wrong=error)[0] == "error: why"


@pytest.fixture
def prepared(micro, tmp_path, monkeypatch):
    """Runs `session.setup` on a chip with stand-ins for data and other processes; returns (work, what was asked)."""
    micro.chips.v5e = (("epochs", 3), ("eval.every_steps", 7))
    monkeypatch.setattr(session, "chip_of", lambda kind: chips.CHIPS["v5e"])
    monkeypatch.setattr(session.identity, "of_run", lambda config: {"read": config.detection.images})

    def prepare(**options):
        asked = []
        for name in ("check_same", "barrier"):
            monkeypatch.setattr(
                session.processes, name, lambda *args, name=name, **more: asked.append((name, args, more))
            )
        for place, name in ((session.train_lib, "make_run"), (session.evaluation, "make_evaluation")):
            monkeypatch.setattr(place, name, lambda config, workdir: asked.append((config, workdir)) or (lambda: {}))
        for name in ("train", "replay_step"):
            monkeypatch.setattr(session.train_lib, name, lambda *args, name=name: asked.append((name, args[1:])) or {})
        return session.setup(micro, tmp_path / "run", **options), asked

    return prepare


def test_all_is_checked_with_the_values_of_the_chip_before_a_workdir_is_taken(micro, prepared, tmp_path):
    work, asked = prepared(training=True)
    data = json.dumps({"read": str(tmp_path / "run" / "data")})
    timeout = {"timeout_s": micro.timeout_s}
    assert asked[0] == ("check_same", (config_json.to_json(micro),), {"what": "configuration"} | timeout)
    assert asked[1] == ("barrier", ("scenes are written",), timeout)
    assert asked[2] == ("check_same", (data,), {"what": "data"} | timeout)
    config, workdir = asked[3]
    assert (config.epochs, config.eval.every_steps, workdir) == (3, 7, tmp_path / "run")
    assert asked[4:] == [("barrier", ("all is checked",), timeout)]
    assert not (tmp_path / "run" / "config.json").exists()
    work()
    assert asked[5:] == [("train", ())]
    stored = (tmp_path / "run" / "config.json").read_text()
    assert stored == config_json.to_json(micro)  # whatever the chip is
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == json.loads(data)
    micro.chips.v5e = (("epochs", 0),)
    with pytest.raises(ValueError, match=r"config\.epochs is 0"):
        prepared(training=True)


@pytest.mark.parametrize(("chip", "named"), [("v5e", True), ("v6e", False), (None, False)])
def test_values_of_the_chip_are_named_where_there_are_any(prepared, monkeypatch, caplog, chip, named):
    monkeypatch.setattr(session, "chip_of", lambda kind: chips.CHIPS.get(chip))
    with caplog.at_level("INFO", logger="absl"):
        prepared(training=True)
    assert ("'eval.every_steps': 7" in caplog.text) == named
    assert ("config.chips." in caplog.text) == named


def test_an_evaluation_or_a_replay_needs_a_run(micro, prepared, tmp_path):
    for options in ({"training": False}, {"training": True, "replayed": 5}):
        with pytest.raises(ValueError, match="there is no run to evaluate or replay"):
            prepared(**options)
    micro.init_from.checkpoint = "elsewhere"
    with pytest.raises(ValueError, match="there is no run to evaluate or replay"):
        prepared(training=True, replayed=5)
    work, asked = prepared(training=False)
    assert [entry[-1]["what"] for entry in asked if entry[0] == "check_same"] == ["configuration"]
    ((config, workdir),) = (entry for entry in asked if len(entry) == 2)
    assert (config.eval.every_steps, workdir) == (7, tmp_path / "run")
    work()
    assert not (tmp_path / "run" / "data.json").exists()
    (tmp_path / "run" / "config.json").write_text(config_json.to_json(micro))
    work, asked = prepared(training=True, replayed=5)
    assert ("barrier", ("all is checked",), {"timeout_s": micro.timeout_s}) not in asked
    config, workdir = asked[-1]
    assert (config.epochs, workdir) == (3, tmp_path / "run")
    work()
    assert asked[-1] == ("replay_step", (5,))


@pytest.mark.parametrize("training", [True, False])
def test_files_of_buckets_are_read_from_their_copies(micro, prepared, monkeypatch, training):
    micro.init_from.checkpoint = "gs://bucket/run"

    def localized(config):
        config = config.copy_and_resolve_references()
        config.init_from.checkpoint = "copy/run"
        return config

    monkeypatch.setattr(session.buckets, "localized", localized)
    _, asked = prepared(training=training)
    ((config, _),) = (entry for entry in asked if len(entry) == 2)
    assert config.init_from.checkpoint == "copy/run"


def test_a_run_goes_on_with_other_data_only_if_it_may(prepared, tmp_path):
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "run" / "data.json").write_text('{"read": "others"}')
    with pytest.raises(ValueError, match="the data are not those"):
        prepared(training=True)
    prepared(training=True, changed_data=True)


@pytest.mark.parametrize("process", [0, 1])
def test_the_first_process_holds_the_workdir_in_a_bucket_and_the_others_wait(micro, tmp_path, monkeypatch, process):
    done = []

    @contextlib.contextmanager
    def kept(bucket, *, training):
        done.append((bucket, training))
        yield
        done.append("brought there")

    monkeypatch.setattr(session.remote, "kept", kept)
    monkeypatch.setattr(session.jax, "process_index", lambda: process)
    monkeypatch.setattr(session.processes, "barrier", lambda name, *, timeout_s: done.append(name))
    options = {"training": True, "data": {}, "bucket": "bucket"}
    session.in_workdir(lambda: done.append("work"), micro, tmp_path / "run", **options)
    whole = [("bucket", True), "the workdir is held", "work", "brought there"]
    assert done == (whole if process == 0 else ["the workdir is held", "work"])
    assert (tmp_path / "run").exists() == (process == 0)


def test_what_a_run_writes_has_room_or_an_error_says_so(micro, tmp_path):
    with pytest.raises(WorkdirError, match="no room for this run"):
        session.in_workdir(
            fails(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), micro, tmp_path, training=False, data={}
        )


def test_the_first_process_writes_the_scenes_and_all_wait(micro, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(session.scenes, "write", lambda folder, **options: done.append((folder, options)))
    monkeypatch.setattr(session.processes, "barrier", lambda name, *, timeout_s: done.append((name, timeout_s)))
    wanted = {name: value for name, value in micro.scenes.to_dict().items() if name != "folder"}
    complete = session.with_scenes(micro, tmp_path)
    assert done == [(tmp_path / "data", wanted), ("scenes are written", micro.timeout_s)]
    place = str(tmp_path / "data")
    assert (complete.eval.annotations, complete.eval.images) == (f"{place}/eval.json", place)
    assert (complete.grounding.annotations, complete.grounding.images) == (f"{place}/grounding.json", place)
    done.clear()
    monkeypatch.setattr(session.jax, "process_index", lambda: 1)
    session.with_scenes(micro, tmp_path / "other")
    assert done == [("scenes are written", micro.timeout_s)]
    assert not (tmp_path / "other").exists()
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match=r"nothing can be written to .*file/data"):
        session.with_scenes(micro, tmp_path / "file")
