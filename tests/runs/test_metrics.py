"""Scalars as TensorBoard reads them."""

import math
import subprocess
import sys

from tensorboard.compat.proto import event_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from detclipv2_jax.runs import metrics


def test_events_hold_what_metrics_hold(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, 0)
    writer.write(3, {"a/b": 1.5, "nothing": float("nan")})
    writer.write(7, {"a/b": -2.5})
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
