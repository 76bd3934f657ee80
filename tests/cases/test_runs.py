"""Runs that are interrupted, finished, damaged or taken away, and what a stranger's workdir may hold."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest
import stand_in
import test_main
from micro import micro_config
from test_main import _steps_are_compiled_once  # noqa: F401  (steps are shared here too)

from detclipv2_jax import config_json, session, train
from detclipv2_jax.data import scenes
from detclipv2_jax.inference import Predictor
from detclipv2_jax.models import detclip
from detclipv2_jax.runs import checkpoints, trackers
from detclipv2_jax.runs import state as train_state
from detclipv2_jax.runs.workdir import WorkdirError

ROOT = pathlib.Path(__file__).parents[2]
MODEL = detclip.from_config  # not the stand-in for it


def small_config():
    c = micro_config()
    c.num_steps = 4
    c.scenes.num_grounding = c.scenes.num_image_text = 0
    c.checkpoint.every_steps = 2
    c.eval.num_pictures = c.pictures_every_steps = 0
    return c


@pytest.fixture(scope="module", autouse=True)
def _models_are_stand_ins():
    with stand_in.installed():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is done, and its scores."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, test_main.start(small_config(), workdir)


@pytest.fixture
def workdir(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def state_of(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.slow
def test_a_finished_run_that_is_started_again_writes_nothing(finished):
    folder, scores = finished
    before = state_of(folder)
    assert scores["AP"] >= 0
    assert test_main.start(small_config(), folder) == scores
    assert state_of(folder) == before


@pytest.mark.slow
def test_a_finished_run_is_evaluated_again_where_the_evaluation_is_another(workdir):
    config = small_config()
    config.eval.max_detections = 7
    test_main.start(config, workdir)
    protocol = json.loads((workdir / "eval" / "step_00000004_scores.json").read_text())["protocol"]
    assert protocol["max_detections"] == 7


JUNK = (None, True, -1, 0, 1.5, 2**70, 1e400, float("nan"), "x", "", [], {}, [[]], [None], {"a": 1}, "a" * 10_000)


@pytest.mark.parametrize("value", JUNK, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize(
    "key", ["", "model", "model.swin", "model.swin.depths", "model.embed_dim", "model.text.width", "eval", "detection",
            "eval.canvases", "optimizer.ema_decay", "model.logit.normalize_regions", "name"],
)  # fmt: skip
def test_a_configuration_of_a_stranger_is_read_or_one_error(tmp_path, key, value):
    content = json.loads(config_json.to_json(small_config()))
    if key:
        *path, last = key.split(".")
        section = content
        for part in path:
            section = section[part]
        section[last] = value
    else:
        content = value
    read_or_one_error(tmp_path, json.dumps(content).encode())


def read_or_one_error(folder, data):
    (folder / "config.json").write_bytes(data)
    with pytest.raises(ValueError, match=r".") as error:
        checkpoints.load_for_inference(folder)  # which then finds no checkpoints
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 2000
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff\xfe{", b"\xef\xbb\xbf{}", b"{", b"[" * 100_000, b'{"a":' * 3000 + b"1" + b"}" * 3000, b"9" * 10_000,
        b'{"model": ' + b"[" * 500 + b"]" * 500 + b"}", b"\0" * 100, b'{"a.b": 1}', b'{"": 1}',
        b'{"lock": 1, "keys": 2}',
        b'{"__class__": 1}', b'{"model": {"swin": {"items": 1}}}', b"\x80\x04.", "{\"a\": 1}".encode("utf-16"),
    ],
)  # fmt: skip
def test_what_is_no_configuration_is_read_or_one_error(tmp_path, data):
    read_or_one_error(tmp_path, data)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The workdir of a run that saved its model at once."""
    folder, config = tmp_path_factory.mktemp("untrained"), small_config()
    init = functools.partial(train_state.init_params, MODEL(config.model), context_length=16)
    params = jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), jax.eval_shape(init, jax.random.key(0)))
    state = train_state.TrainState(step=jax.numpy.zeros((), int), params=params, opt_state=(), ema=None)
    with contextlib.closing(checkpoints.Checkpoints(folder, keep=1)) as manager:
        manager.save(1, state)
    (folder / "config.json").write_text(config_json.to_json(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embed_dim", 32), ("swin.embed_dim", 0), ("swin.num_heads", [5, 1, 1, 1]), ("swin.depths", [1, 1, 1, 2]),
        ("text.width", 15), ("text.context_length", 0), ("head.num_groups", 7), ("head.num_convs", 2), ("dtype", "f99"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_not_the_checkpoints_is_one_error(untrained, tmp_path, key, value, monkeypatch):
    monkeypatch.setattr(detclip, "from_config", MODEL)
    workdir = shutil.copytree(untrained, tmp_path / "run")
    content = json.loads((workdir / "config.json").read_text())
    *path, last = key.split(".")
    section = content["model"]
    for part in path:
        section = section[part]
    section[last] = value
    (workdir / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"no model has the values of config\.model|does not fit the model"):
        Predictor.from_checkpoint(workdir)


def test_a_configuration_with_a_mark_is_read(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + config_json.to_json(small_config()).encode())
    with pytest.raises(ValueError, match="has no checkpoints"):
        checkpoints.load_for_inference(tmp_path)


@pytest.mark.slow
def test_a_broken_line_of_metrics_is_removed_with_a_warning_and_no_other(workdir, caplog):
    path = workdir / "metrics.jsonl"
    whole = path.read_text()
    for junk in ("{", "null", "[1]", '{"step": "x"}', "\0\0", "1" * 5000, '{"a": ' * 2000):
        lines = whole.splitlines(keepends=True)
        path.write_bytes((lines[0] + junk + "\n" + "".join(lines[1:])).encode() + b"\xff\n")
        caplog.clear()
        test_main.start(small_config(), workdir)
        assert path.read_text() == whole
        assert "are removed" in caplog.text


@pytest.mark.slow
def test_damaged_notes_of_a_finished_run_are_made_again(finished, workdir):
    path = workdir / "eval" / "step_00000004_scores.json"
    whole = json.loads(path.read_text())
    del whole["protocol"]["annotations"]  # a path
    for content in ({}, whole | {"AP": "x"}):
        path.write_text(json.dumps(content))
        assert test_main.start(small_config(), workdir) == finished[1]
        written = json.loads(path.read_text())
        del written["protocol"]["annotations"]
        assert written == whole


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff"])
def test_a_damaged_note_of_the_data_is_written_again_where_nothing_was_trained(tmp_path, data):
    (tmp_path / "data.json").write_bytes(data)
    session.check_data(tmp_path, {"a": "1"}, allowed=False)
    session.in_workdir(lambda: {}, small_config(), tmp_path, training=True, data={"a": "1"})
    assert json.loads((tmp_path / "data.json").read_text()) == {"a": "1"}
    (tmp_path / "trackers.json").write_bytes(b"[]" if data == b"\xff" else data)
    config = small_config()
    config.trackers = ("wandb",)
    with pytest.raises(ValueError, match=r"trackers\.json is (damaged; remove it|no valid json)"):
        trackers.opener(tmp_path, config)()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff"])
def test_a_damaged_marker_of_scenes_is_one_error(tmp_path, data):
    (tmp_path / "scenes.json").write_bytes(data)
    with pytest.raises(ValueError, match=str(tmp_path)):
        scenes.write(tmp_path, num_detection=1, num_grounding=0, num_image_text=0, num_eval=0, size_px=64)


@pytest.mark.slow
@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"step": "x"}', b'{"step": 1e400, "score": "AP", "value": 1}'])
def test_a_damaged_note_of_the_best_checkpoint_is_a_warning(workdir, caplog, data):
    (workdir / "best.json").write_bytes(data)
    _, _, step = checkpoints.load_for_inference(workdir)
    assert step == 4
    assert "best.json is damaged" in caplog.text


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_is_one_error(workdir):
    for path in (workdir / "checkpoints").glob("*/params/sha256.json"):
        path.write_text("[]")
    config = small_config()
    config.num_steps = 6
    with pytest.raises(checkpoints.DamagedError, match="no checkpoint is intact"):
        test_main.start(config, workdir)
    with pytest.raises(ValueError, match="no checkpoint is intact"):
        checkpoints.load_for_inference(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("remove_folder", [shutil.rmtree, lambda path: path.rename(path.with_name("elsewhere"))])
def test_a_workdir_that_is_removed_ends_the_run(tmp_path, monkeypatch, remove_folder):
    config = small_config()
    config.scenes.folder = str(tmp_path / "world")
    config.num_steps = config.checkpoint.every_steps = 100
    finish = train.finish_step

    def remove(step, *arguments, **options):
        if step == 3:
            remove_folder(tmp_path / "run")
        return finish(step, *arguments, **options)

    monkeypatch.setattr(train, "finish_step", remove)
    with pytest.raises(WorkdirError, match=r"was removed while this run was using it"):
        test_main.start(config, tmp_path / "run")


def test_a_disk_that_is_full_at_the_first_write_is_one_error(tmp_path, monkeypatch):
    def full(path, pieces):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "write_text", full)
    with pytest.raises(WorkdirError, match="no room for this run"):
        session.in_workdir(lambda: {}, small_config(), tmp_path / "run", training=True, data={})
    monkeypatch.setattr(scenes, "_write_part", lambda *_, **__: full("", ""))
    with pytest.raises(WorkdirError, match="no room for the generated scenes"):
        session.with_scenes(small_config(), tmp_path / "run")


CODE = """
import sys
import functools
import importlib
from detclipv2_jax import commands
command = importlib.import_module("detclipv2_jax.{module}")
if __name__ == "__main__":
    sys.argv = {argv!r}
    {before}
    {run}
"""


def start(module, argv, *, before="pass", run, **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    code = CODE.format(module=module, argv=[module, *map(str, argv)], before=before, run=run)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes, **options)


def interrupt_when(process, line):
    """Sends Ctrl-C to a command and its workers, as a terminal does, when it has printed a line."""
    said = []
    for text in process.stderr:
        said.append(text)
        if line in text:
            os.killpg(process.pid, signal.SIGINT)
            break
    return said


CONFIG = """
import stand_in
from cases.test_runs import small_config
stand_in.install()
def get_config():
    c = small_config()
    c.num_steps, c.checkpoint.every_steps = 1000, 1000
    return c
"""


@pytest.mark.slow
def test_ctrl_c_saves_the_state_of_a_run_and_the_second_ends_it_at_once(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    argv = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run", "--config.input.num_workers=1"]
    with start("main", argv, run="sys.exit(command.cli())") as process:
        interrupt_when(process, "step 2:")
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "Traceback" not in rest
    assert "stopped by Ctrl-C after step " in rest.splitlines()[-1]
    (saved,) = (path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert f"after step {saved}, which is saved" in rest
    slow = "import time; from detclipv2_jax.runs.checkpoints import Checkpoints; "
    slow += "Checkpoints.save = lambda *_: time.sleep(600)"
    with start("main", argv, before=slow, run="sys.exit(command.cli())") as process:
        interrupt_when(process, f"step {int(saved) + 2}:")
        time.sleep(2)
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=10) == 130
    assert "Traceback" not in rest
    assert rest.splitlines()[-1].startswith("stopped by Ctrl-C at once")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluation", "prepare", "prepare by processes", "predict"])
def test_ctrl_c_ends_other_commands_with_one_line(finished, tmp_path, command):
    folder = finished[0]
    wait = "print('at work', file=sys.stderr, flush=True) or time.sleep(600)"
    match command:
        case "evaluation":
            (tmp_path / "config.py").write_text("from cases.test_runs import small_config as get_config")
            argv = ["--mode=eval", f"--config={tmp_path}/config.py", f"--workdir={folder}"]
            before = "import stand_in, time; stand_in.install(); "
            before += f"from detclipv2_jax.eval.loop import Evaluator; Evaluator._predict = lambda *_: {wait}"
            process = start("main", argv, before=before, run="sys.exit(command.cli())")
        case "predict":
            argv = [
                f"--checkpoint={folder}",
                f"--images={folder}/data",
                "--words=cat",
                f"--output={tmp_path}/out",
            ]
            before = "import stand_in, time; stand_in.install(); from detclipv2_jax.inference import Predictor; "
            before += f"Predictor.iterate = lambda *_, **__: {wait}"
            process = start("predict.__main__", argv, before=before, run="sys.exit(commands.run(command.run))")
        case _:
            argv = ["coco_json", f"--input={folder}/data/detection.json", f"--output={tmp_path}/out", "--shard_size=4"]
            argv.append(f"--workers={2 if 'processes' in command else 1}")
            before = "import time; from detclipv2_jax.prepare import shards, record_builder; "
            patched = "generate = lambda *_, **__: " if argv[-1][-1] == "1" else "_tally = lambda *_: "
            before += f"shards.{patched}{wait}"
            run = "sys.exit(commands.run({'coco_json': functools.partial(command.run, 'coco_json')}))"
            process = start("prepare.__main__", argv, before=before, run=run)
    with process:
        timer = threading.Timer(120, process.kill)
        timer.start()
        before = interrupt_when(process, "at work")
        rest = process.stderr.read()
        timer.cancel()
        assert process.wait(timeout=10) == 130, "".join(before) + rest
    assert "Traceback" not in rest
    assert rest.strip().splitlines()[-1] == "stopped by Ctrl-C"
