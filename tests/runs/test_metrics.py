"""Scalars as TensorBoard reads them."""

import contextlib
import json
import math
import subprocess
import sys

import pytest
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from detclipv2_jax.runs import metrics
from detclipv2_jax.runs.workdir import WorkdirError


def test_events_hold_what_metrics_hold(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, 0)
    writer.write(3, {"a/b": 1.5, "nothing": float("nan")})
    writer.write(7, {"a/b": -2.5})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 3, "a/b": 1.5, "nothing": null}', '{"step": 7, "a/b": -2.5}',
    ]  # fmt: skip
    (path,) = tmp_path.glob("events.out.tfevents.*")
    reader, read = PyRecordReader_New(str(path)), []  # each line is there at once, not when the run ends
    for _ in range(3):
        reader.GetNext()
        read.append(event_pb2.Event.FromString(reader.record()))
    writer.close()
    assert read[0].file_version == "brain.Event:2"
    found = {event.step: {value.tag: value.simple_value for value in event.summary.value} for event in read[1:]}
    assert found.keys() == {3, 7}
    assert found[7] == {"a/b": -2.5}
    assert found[3]["a/b"] == 1.5
    assert math.isnan(found[3]["nothing"])


def test_writing_them_loads_no_tensorflow(tmp_path):
    code = (
        "import pathlib, sys; from detclipv2_jax.runs import metrics\n"
        f"writer = metrics.MetricsWriter(pathlib.Path({str(tmp_path)!r}), 0)\n"
        "writer.write(1, dict(a=1.0)); writer.close()\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_rates_and_waiting(monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    progress = metrics.Progress(0, 10, peak_flops=50.0)
    for _ in range(4):
        with progress.waiting():
            now += 0.5
        now += 1.5
        progress.step(3)
        progress.flops += 40.0
    expected = {
        "timing/images_per_second": 12 / 8, "timing/step_seconds": 2.0, "timing/data_wait_share": 0.25,
        "timing/flop_utilization": 160 / (8 * 50),
    }  # fmt: skip
    assert progress.rates() == expected
    now += 1.0
    assert progress.rates() == {  # counted since the last call
        "timing/images_per_second": 0.0, "timing/step_seconds": 1.0, "timing/data_wait_share": 0.0,
        "timing/flop_utilization": 0.0,
    }  # fmt: skip
    assert progress.rates()["timing/images_per_second"] == 0.0  # although no time has passed
    progress.close()
    progress = metrics.Progress(0, 10)
    assert "timing/flop_utilization" not in progress.rates()  # of a device whose peak is not known
    progress.close()


@pytest.mark.parametrize(("process", "terminal", "shown"), [(0, True, True), (0, False, False), (1, True, False)])
def test_the_first_process_shows_a_bar_on_a_terminal(monkeypatch, process, terminal, shown):
    made = []
    monkeypatch.setattr(metrics, "tqdm", lambda **options: made.append(options))
    monkeypatch.setattr(metrics.jax, "process_index", lambda: process)
    monkeypatch.setattr(metrics.sys.stderr, "isatty", lambda: terminal)
    metrics.Progress(30, 100)
    assert (made[0]["initial"], made[0]["total"], made[0]["disable"]) == (30, 100, not shown)


class Service:
    """A tracker that notes what it gets."""

    def __init__(self, got):
        self.got = got

    def write(self, step, scalars):
        self.got.append((step, scalars))

    def close(self):
        self.got.append("closed")


def test_trackers_get_finite_scalars_and_are_closed(tmp_path):
    got = []
    writer = metrics.MetricsWriter(tmp_path, 0, open_trackers=lambda: [Service(got)])
    writer.write(3, {"a": 1.5, "b": float("nan"), "c": float("inf")})
    writer.close()
    assert got == [(3, {"a": 1.5}), "closed"]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "eval/AP": 0.5}\n')
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    writer = metrics.MetricsWriter(tmp_path, 4)
    writer.write(5, {"a": 1.5})
    writer.close()
    assert writer.recorded("eval") == []
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"step": 9, "eval/AP": 0.5}\n']


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_removed_is_missed(tmp_path, replaced):
    with contextlib.closing(metrics.MetricsWriter(tmp_path, 0)) as writer:
        writer.write(1, {"a": 1.0})
        (tmp_path / "metrics.jsonl").rename(tmp_path / "elsewhere")
        if replaced:
            (tmp_path / "metrics.jsonl").touch()
        with pytest.raises(WorkdirError, match=r"metrics\.jsonl was removed"):
            writer.write(2, {"a": 1.0})


@pytest.mark.parametrize("rest", ['{"step": 3}\n', '{"st', "[1]\n"])
def test_what_does_not_count_is_removed_before_anything_is_written(tmp_path, rest):
    whole = '{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + rest)
    metrics.MetricsWriter(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_lines_after_the_start_are_removed_and_the_start_stays(tmp_path):
    lines = [{"step": step, "eval/AP": 0.1 * step, "loss": 1.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": "1"}\n{"loss": 2.0}\n[1]\n{"step": 3, "e'
    )
    writer = metrics.MetricsWriter(tmp_path, 2)
    assert writer.recorded("eval") == [(1, {"AP": 0.1}), (2, {"AP": 0.2})]
    assert writer.recorded("forgetting") == []
    writer.write(3, {"loss": float("nan")})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [*lines[:2], {"step": 3, "loss": None}]


def test_the_bar_shows_loss_terms_and_speed(monkeypatch):
    now, shown = 10.0, []
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    progress = metrics.Progress(0, 5)
    monkeypatch.setattr(progress._bar, "set_postfix", shown.append)
    progress.step(12)
    now = 14.0
    progress.show({"a/loss": 0.12345, "a/loss_box": 2.0, "a/grad_norm": 3.0})
    progress.close()
    assert shown == [{"a/loss": "0.123", "a/loss_box": "2.000", "img/s": "3.0"}]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(29, "< 1 min"), (31, "1 min"), (89, "1 min"), (91, "2 min"), (3569, "59 min"), (3571, "1 h 00 min")],
)
def test_durations_are_rounded_to_minutes(seconds, text):
    assert metrics._duration(seconds) == text


def test_a_line_of_the_log_says_loss_last_score_and_time_left(tmp_path, monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "eval/fixed_AP": 0.25, "eval/AP": 0.5}\n')
    writer, progress = metrics.MetricsWriter(tmp_path, 10, monitor="fixed_AP"), metrics.Progress(10, 100)
    values = {"detection/loss": 1.23456, "detection/loss_box": 2.0, "detection/grad_norm": 3.0}
    with caplog.at_level("INFO", logger="absl"):
        for seconds in (30.0, 90.0, 9000.0):
            now += seconds
            progress.step(8)
            writer.write(11, values, seconds_left=progress.seconds_left())
        writer.write(12, {"eval/fixed_AP": 0.125, "eval/AP": 0.75})
        writer.write(13, values)
        writer.write(13, {"forgetting/AP": 0.5})
    writer.close()
    progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        "step 11: detection loss 1.235, fixed_AP 25.0%, 44 min left",
        "step 11: detection loss 1.235, fixed_AP 25.0%, 1 h 28 min left",
        "step 11: detection loss 1.235, fixed_AP 25.0%, 73 h 28 min left",
        "step 12: fixed_AP 12.5%",
        "step 13: detection loss 1.235, fixed_AP 12.5%",
        "step 13: fixed_AP 12.5%",
    ]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1] == {"step": 11, **values}  # all of them
    assert rows[4]["eval/AP"] == 0.75
