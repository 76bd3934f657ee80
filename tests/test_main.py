"""Whole runs of a micro model on generated scenes: files, resuming, seeds, and errors that say what to do."""

import contextlib
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import building
import jax
import numpy as np
import pytest

from detclipv2_jax import chips, main, session, train
from detclipv2_jax import config as config_lib
from detclipv2_jax.eval import loop, lvis
from detclipv2_jax.models import flops
from detclipv2_jax.runs import checkpoints, metrics
from detclipv2_jax.visualize import charts

ROOT = pathlib.Path(__file__).parents[1]


def start(config, workdir):
    """Returns the scores of a run."""
    return session.setup(config, workdir, training=True)()


def with_steps(config, num_steps):
    config = config.copy_and_resolve_references()
    config.num_steps = num_steps
    return config


def lines(workdir):
    """Returns {step: metrics} of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    merged: dict[int, dict] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update({k: v for k, v in row.items() if not k.startswith("timing/")})
    return merged


@contextlib.contextmanager
def shared_steps():
    """Runs of the same model, data and optimizer share their steps; tracing one takes longer than eight of it.

    The seed of a step only draws what stochastic depth drops, and the micro model has none. The first run draws its
    curves, which takes longer than its steps too.
    """
    compiled = {}
    jitted_step = train.jitted_step
    draws = iter([charts.curves])

    def shared_step(run, *which):
        values = (run.config[name] for name in ("model", "loss", "optimizer", "epochs", "mesh"))
        key = (run.mesh, *(getattr(part, "name", part) for part in which), *map(str, values))
        if key not in compiled:
            compiled[key] = jitted_step(run, *which)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "jitted_step", shared_step)
        patch.setattr(charts, "curves", lambda *path, **options: [draw(*path, **options) for draw in draws])
        yield


@pytest.fixture(scope="module", autouse=True)
def _steps_are_compiled_once():
    with shared_steps():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, micro_session):
    """A run of 8 steps, unbroken; (config, workdir, scores)."""
    workdir, config = tmp_path_factory.mktemp("whole") / "run", micro_session.copy_and_resolve_references()
    drawn = with_steps(config, 8)
    drawn.pictures_every_steps = 2
    return config, workdir, start(drawn, workdir)


@pytest.mark.slow
def test_a_workdir_has_what_the_design_names(finished):
    _, workdir, scores = finished
    assert {"AP", "AP50", "AP75", "APr", "APf", "AR@300", "fixed_AP"} <= scores.keys()
    assert [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()] == ["8"]
    history = lines(workdir)
    assert sorted(history) == list(range(1, 9))
    kinds = {name.split("/")[0] for row in history.values() for name in row if "/" in name}
    assert kinds == {"detection", "grounding", "image_text", "eval"}
    assert {"image_text/num_phrases_cut", "detection/num_negatives_cut"} <= {
        name for row in history.values() for name in row
    }
    assert list(workdir.glob("events.out.tfevents.*"))
    pictures = [path.name for path in (workdir / "pictures").iterdir()]
    for kind in config_lib.KINDS:
        assert sum(name.startswith(f"batch_{kind}") for name in pictures) >= 1 + (kind == "image_text")
    # of pairs also the best region of each phrase, four photos of every second batch but the first
    assert sum(name.startswith("alignment_image_text") for name in pictures) == 4
    assert "curves.png" in pictures
    found = json.loads(next((workdir / "eval").glob("*detections.json")).read_text())
    assert {"image_id", "category_id", "bbox", "score"} <= found[0].keys()


@pytest.mark.slow
def test_stopping_and_resuming_equals_one_run_bit_for_bit(finished, tmp_path):
    config, whole, _ = finished
    broken = tmp_path / "run"
    start(with_steps(config, 4), broken)
    start(with_steps(config, 8), broken)
    expected, resumed = lines(whole), lines(broken)
    for step, row in expected.items():
        shared = {name: value for name, value in resumed[step].items() if not name.startswith("eval/") or step == 8}
        assert shared == row, step
    one, other = (checkpoints.load_for_inference(workdir)[1] for workdir in (whole, broken))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_one_does_not(finished, tmp_path):
    config, whole, scores = finished
    assert start(with_steps(config, 8), tmp_path / "again") == scores
    assert lines(tmp_path / "again") == lines(whole)
    other = with_steps(config, 1)
    other.seed = 1
    start(other, tmp_path / "other")
    assert lines(tmp_path / "other")[1] != lines(whole)[1]


@pytest.mark.slow
def test_a_step_is_read_when_the_next_one_is_sent_and_can_be_traced(finished, tmp_path, monkeypatch):
    config = with_steps(finished[0], 4)
    config.scenes.num_eval = 0
    config.profile_steps = 2
    events, runs = [], []
    jitted_step, finish_step, step_cost = train.jitted_step, train.finish_step, train.step_cost

    def recorded_step(run, *which):
        runs.append(run)
        step = jitted_step(run, *which)

        def send(*arguments):
            events.append("sent")
            return step(*arguments)

        return send

    def recorded_finish(done, *arguments, **options):
        events.append(f"read {done}")
        finish_step(done, *arguments, **options)

    monkeypatch.setattr(train, "jitted_step", recorded_step)
    monkeypatch.setattr(train, "finish_step", recorded_finish)
    monkeypatch.setattr(flops, "chip_of", lambda kind: chips.CHIPS["h100"]._replace(peak=1e12))
    monkeypatch.setattr(train, "step_cost", lambda run, number, canvas: lambda num_concepts: 8e12)
    start(config, tmp_path / "run")
    assert events == ["sent", "sent", "read 1", "sent", "read 2", "sent", "read 3", "read 4"]
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["timing/images_per_second"] * row["timing/step_seconds"] == pytest.approx(8)  # one step of 8 images
    assert 0 <= row["timing/data_wait_share"] < 1
    assert row["timing/flop_utilization"] * row["timing/step_seconds"] == pytest.approx(1)
    few, more = (step_cost(runs[0], 0, (64, 64))(num_concepts) for num_concepts in (10, 20))
    assert 0 < step_cost(runs[0], 0, (32, 32))(10) < few < more


@pytest.mark.slow
def test_evaluating_the_checkpoint_gives_the_scores_of_the_run(finished, tmp_path):
    config, workdir, scores = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    config = session.with_scenes(with_steps(config, 8), copy)
    assert loop.make_evaluation(config, copy)() == scores
    # or from elsewhere: the model is the checkpoint's, whatever the configuration says
    config.init_from.checkpoint, config.model = str(copy), config_lib.model("nano")
    elsewhere = tmp_path / "elsewhere"
    assert loop.make_evaluation(config, elsewhere)() == scores
    protocol = json.loads((elsewhere / "eval" / "step_00000008_scores.json").read_text())["protocol"]
    assert (protocol["checkpoint_step"], protocol["ap"]) == (8, lvis.AP_KIND)  # scenes list absent categories


@pytest.mark.slow
def test_built_folders_train_as_the_raw_files_do(finished, tmp_path):
    config, whole, _ = finished
    config, data = with_steps(config, 4), whole / "data"
    for kind, builder, file in (
        ("detection", "coco_json", "detection.json"),
        ("grounding", "grounding_json", "grounding.json"),
        ("image_text", "image_text", "pairs.tsv"),
    ):
        output = str(tmp_path / kind)
        building.build(builder, input=str(data / file), images=str(data), output=output, shard_size=10)
        config[kind].data = (output,)
        config.scenes[f"num_{kind}"] = 0
    assert not any(config[kind].images for kind in config_lib.KINDS)
    config.scenes.num_eval = 0
    start(config, tmp_path / "run")
    expected, built = lines(whole), lines(tmp_path / "run")
    assert {name.split("/")[0] for step in range(1, 5) for name in built[step] if "/" in name} >= {
        "detection", "grounding", "image_text",
    }  # fmt: skip
    for step in range(1, 5):
        assert built[step] == expected[step]


@pytest.mark.slow
def test_starting_from_another_run_takes_its_parameters_only(finished, tmp_path):
    config, workdir, _ = finished
    config = with_steps(config, 1)
    config.init_from.checkpoint = str(workdir)
    assert config.optimizer.warmup_steps  # so that the first step has learning rate 0
    config.checkpoint.every_steps = 1
    start(config, tmp_path / "started")
    _, params, step = checkpoints.load_for_inference(tmp_path / "started")
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, params, checkpoints.load_for_inference(workdir)[1])
    config.model.head.num_convs = 2
    with pytest.raises(ValueError, match=r"does not fit the model[\s\S]*missing"):
        start(config, tmp_path / "other_model")


@pytest.mark.slow
def test_a_workdir_of_another_config_is_refused_with_each_difference(finished):
    config, workdir, _ = finished
    other = with_steps(config, 9)
    other.loss.temperature = 0.25
    other.model.head.num_convs = 2
    other.log_every_steps = 7  # may change
    with pytest.raises(ValueError, match="holds another run") as error:
        session.check_workdir(workdir, other, fresh_allowed=True)
    assert "loss.temperature: 0.5 -> 0.25" in str(error.value)
    assert "model.head.num_convs: 1 -> 2" in str(error.value)
    assert "log_every_steps" not in str(error.value)


def test_a_loss_that_is_not_finite_stops_or_is_skipped_by_config(micro, tmp_path):
    writer = metrics.MetricsWriter(tmp_path, 0)
    progress = metrics.Progress(0, 10)
    values = {"loss": np.float32(np.nan), "loss_box": np.float32(1.5), "finite": np.float32(0)}
    settings = {"logged": False, "cost": None, "writer": writer, "progress": progress}
    settings["examples"] = lambda: "pairs: 3, 4"
    with pytest.raises(
        train.NonFiniteError, match=r"step 7 was not applied.*detection/loss nan.*loss_box 1.5.*pairs: 3, 4"
    ):
        train.finish_step(7, "detection", values, stop=True, **settings)
    train.finish_step(8, "detection", values, stop=False, **settings)
    writer.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [7, 8]


def test_resuming_removes_metrics_of_steps_that_are_done_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2}\n{"step": 5, "a": 3}\n{"step": 6, "a"')
    metrics.MetricsWriter(tmp_path, 4).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 2}\n'


def test_missing_files_are_listed_together(micro, tmp_path):
    micro.scenes.num_detection = micro.scenes.num_grounding = micro.scenes.num_image_text = micro.scenes.num_eval = 0
    micro.detection.annotations, micro.detection.images = str(tmp_path / "nope.json"), str(tmp_path / "nowhere")
    micro.image_text.pairs, micro.image_text.images = str(tmp_path / "nope.tsv"), str(tmp_path)
    with pytest.raises(ValueError, match="nope") as error:
        train.make_run(micro, tmp_path)
    for name in ("nope.json", "nowhere", "nope.tsv"):
        assert name in str(error.value)


def command(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "detclipv2_jax.main", *arguments], capture_output=True, text=True, cwd=cwd, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "arguments are required: --config"),
        (("--config=configs/demo.py", "--config.nmu_steps=3"), 'Did you mean "num_steps"'),
        (("--config=configs/nope.py",), "configs/nope.py"),
        (("--config=configs/demo.py", "--config.detection.batch_size=12"), "12, which is not divisible by 8 devices"),
        (("--config=configs/swin_t.py",), "python -m detclipv2_jax.prepare"),
    ],
)
def test_one_clear_error_before_anything_is_compiled(arguments, message, tmp_path):
    result = command(*arguments, f"--workdir={tmp_path / 'run'}")
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("device", "variable", "kept"), [("", "", True), ("/dev/dxg", "", False), ("", "MALLOC_ARENA_MAX", False)]
)
def test_where_cpus_compute_memory_is_kept_for_the_next_step(device, variable, kept):
    program = """
import os, resource, sys, threading
from detclipv2_jax import main
os.path.exists = lambda path, exists=os.path.exists: path == sys.argv[1] if path[:5] == "/dev/" else exists(path)
main.keep_memory()
def step():
    for part in range(2):
        b"x" * (1 << 26)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(3)][-1])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"JAX_PLATFORMS": ""} | ({variable: "2"} if variable else {})
    done = subprocess.run(
        [sys.executable, "-c", program, device], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) < 100) == kept  # pages of 4 KiB, of which an array has 16,384


def test_what_compiling_took_is_given_back():
    program = """
import os, pathlib, jax
from detclipv2_jax import main
main.keep_memory()
main.give_back_after_compiling()
events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
jax.jit(lambda x: x + 1)(1)
assert main.COMPILED in events
def megabytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
pieces = [bytes(100_000) for _ in range(2_000)]
pieces[:-1] = []  # the last is at the heap's end
before = megabytes()
for event, seconds in ((main.COMPILED, 0.01), ("/another", 9.0), (main.COMPILED, 9.0)):
    jax.monitoring.record_event_duration_secs(event, seconds)
    print(round((before - megabytes()) / 200, 1))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    short, another, third = map(float, done.stdout.split())
    assert short == another == 0
    assert third > 0.5


@pytest.fixture
def asked(monkeypatch):
    """What `main` asks of the session; the log is as before afterwards."""
    calls, handler = [], main.logging.get_absl_handler()
    filters = list(handler.filters)
    for name in ("set_verbosity", "set_stderrthreshold"):
        monkeypatch.setattr(main.logging, name, lambda level: calls.append(level))
    monkeypatch.setattr(session, "run", lambda *given, **options: calls.append((given, options)) or 75)
    yield calls
    for added in [one for one in handler.filters if one not in filters]:
        handler.removeFilter(added)


def test_options_of_the_command_are_those_of_the_session(asked, micro):
    main.give_back_after_compiling.cache_clear()
    assert main.main(config=micro) == 75
    assert main.give_back_after_compiling.cache_info().currsize == 1
    assert asked[:2] == [main.logging.INFO] * 2
    options = {
        "training": True, "distributed": "auto", "replayed": None, "changed_data": False, "preempted_status": 0,
    }  # fmt: skip
    assert asked[2] == ((micro, "runs/micro"), options)
    main.main(config=micro, workdir="a", mode="eval", distributed="on", replay=1, changed_data=True, preempted_status=7)
    options = {"training": False, "distributed": "on", "replayed": 1, "changed_data": True, "preempted_status": 7}
    assert asked[-1] == ((micro, "a"), options)
    for step in (0, -3):
        with pytest.raises(ValueError, match=f"--replay={step} must be a step, 1 or more"):
            main.main(config=micro, replay=step)


def test_the_log_leaves_out_what_checkpoints_say_of_their_files(asked, micro):
    main.main(config=micro)
    shown = main.logging.get_absl_handler().filter

    def record(path, level):
        return logging.LogRecord("absl", level, path, 1, "text", (), None)

    of_orbax, others = "/a/orbax/checkpoint.py", "/a/train.py"
    levels = (logging.INFO, logging.WARNING)
    found = [bool(shown(record(path, level))) for path in (of_orbax, others) for level in levels]
    assert found == [False, True, True, True]


def test_closed_streams_are_opened(monkeypatch):
    handler = main.logging.get_absl_handler().python_handler
    monkeypatch.setattr(handler, "stream", None)
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(sys, name, None)
    out = sys.stdout
    main.open_streams()
    opened = sys.stdin, sys.stderr
    assert sys.stdout is out
    assert handler.stream is sys.stderr
    for stream in opened:
        stream.write("nowhere")
        assert stream.read() == ""
        stream.close()
