"""A killed command goes on: nothing is predicted twice, and the files are those of an unbroken run."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import planted
import pytest
from PIL import Image

from detclipv2_jax.inference import Found, Predictor
from detclipv2_jax.predict import __main__ as predict
from detclipv2_jax.predict.record import Record

ROOT = pathlib.Path(__file__).parents[2]
NUM_PHOTOS = 5
KILLED = """
import os, signal, sys
import planted
from detclipv2_jax.inference import Predictor
from detclipv2_jax.predict import __main__ as predict
from detclipv2_jax.predict import record

predictor, add, done = Predictor(*planted.make()), record.Record.add, []
Predictor.from_checkpoint = lambda workdir: predictor

def add_and_die(self, path, found):
    add(self, path, found)
    done.append(path)
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

record.Record.add = add_and_die
photos, output = sys.argv[1:]
options = {"words": "red, blue", "batch_size": 2, "formats": ("coco", "fiftyone")}
predict.run(checkpoint="run", images=photos, output=output, **options)
"""


@pytest.fixture
def photos(tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(NUM_PHOTOS):
        pixels = planted.paint((100, 300), {"red": (10 + 40 * i, 20, 60 + 40 * i, 80), "blue": (240, 10, 290, 60)})
        Image.fromarray(pixels).save(folder / f"{i}.png")
    predictor = Predictor(*planted.make())
    monkeypatch.setattr(Predictor, "from_checkpoint", lambda workdir: predictor)
    return folder


def run(photos, output, **options):
    options = {"words": "red, blue", "batch_size": 2, "formats": ("coco", "fiftyone")} | options
    return predict.run(checkpoint="run", images=str(photos), output=str(output), **options)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_killed_command_goes_on(photos, tmp_path, monkeypatch):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", KILLED, str(photos), str(tmp_path / "killed")]
    killed = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "detections.json").exists()
    with (tmp_path / "killed" / predict.RECORD).open("ab") as file:
        file.write(b'{"photo": "')  # a line that was not finished
    with pytest.raises(ValueError, match=r"found\.jsonl holds what a command with other words found until"):
        run(photos, tmp_path / "killed", words="red")
    run(photos, tmp_path / "whole")
    predicted, find = [], Predictor._find

    def noted(self, batch, *arguments, **options):
        predicted.extend(batch)
        return find(self, batch, *arguments, **options)

    monkeypatch.setattr(Predictor, "_find", noted)
    assert run(photos, tmp_path / "killed") == 0
    assert len(predicted) == NUM_PHOTOS - 2
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "killed") == whole
    assert {str(path) for path in whole} >= {"detections.json", "coco.json", "fiftyone/labels.json", "pictures/4.jpg"}
    assert run(photos, tmp_path / "killed", words="red") == 0  # what is complete may be replaced


def make_record(tmp_path, paths, **searched):
    return Record(
        tmp_path / "record", searched={"words": ["a"], "options": 1} | searched, paths=paths, names=("a", "b")
    )


def test_a_record_gives_back_what_it_was_given(tmp_path):
    paths = [tmp_path / name for name in ("1.png", os.fsdecode(b"\xff.png"), "3.png", "4.png")]
    for path in paths:
        path.write_bytes(b"a photo")
    rng = np.random.default_rng(0)
    found = [
        Found(
            rng.random((n, 4), np.float32) * 999, rng.random(n, np.float32), rng.integers(0, 2, n), ("a", "b"), (5, n)
        )
        for n in (3, 0, 2)
    ]
    record = make_record(tmp_path, paths)
    for i in (2, 0, 1):
        assert paths[i] not in record
        record.add(paths[i], found[i])
        assert paths[i] in record
    for _ in range(2):
        assert [path for path, _ in record] == paths[:3]
        assert len(record) == 3
        for (_, read), given in zip(record, found, strict=True):
            np.testing.assert_array_equal(read.boxes, given.boxes)
            np.testing.assert_array_equal(read.scores, given.scores)
            assert (read.names, read.size) == (given.names, given.size)
        with (tmp_path / "record").open("ab") as file:
            file.write(b"{")
        record = make_record(tmp_path, paths)
    record.add(paths[3], found[0])
    paths[0].write_bytes(b"another photo")
    record = make_record(tmp_path, paths)
    assert [path for path, _ in record] == paths[1:]
    os.utime(paths[2], (1, 1))  # another photo of the same size
    assert [path for path, _ in make_record(tmp_path, paths)] == [paths[1], paths[3]]
    with pytest.raises(ValueError, match="with other words, options found until it was stopped; repeat that command"):
        make_record(tmp_path, paths, words=["b"], options=2)
    record.remove()
    assert len(make_record(tmp_path, paths, words=["b"])) == 0


def test_a_record_that_was_killed_while_it_began_is_begun_anew(tmp_path):
    (tmp_path / "record").write_bytes(b'{"words": ["a')
    assert len(make_record(tmp_path, [])) == 0
    assert len(make_record(tmp_path, [])) == 0
    (tmp_path / "record").write_bytes(b"[]\n")
    with pytest.raises(ValueError, match="with other content"):
        make_record(tmp_path, [])


def test_a_damaged_record_keeps_the_photos_before_the_damage(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        path.write_bytes(b"a photo")
    record = make_record(tmp_path, paths)
    one = Found(np.ones((2, 4), np.float32), np.ones(2, np.float32), np.zeros(2, int), ("a", "b"), (5, 6))
    for path in paths:
        record.add(path, one)
    lines = (tmp_path / "record").read_bytes().splitlines(keepends=True)
    damaged = [b"[]\n", b"{}\n", b"\xff\n", b"\n", lines[3][:40] + b"\n"]
    damaged += [lines[3].replace(b"[5, 6]", size) for size in (b"[5]", b"[5, null]", b"7")]
    damaged += [lines[3].replace(b'"rows": "', b'"rows": "' + rows) for rows in (b"AAAA", b"!", b"A" * 16)]
    for line in damaged:
        assert line != lines[3]
        (tmp_path / "record").write_bytes(b"".join([*lines[:3], line, lines[4]]))
        record = make_record(tmp_path, paths)
        assert [path for path, _ in record] == paths[:2]
        assert (tmp_path / "record").read_bytes() == b"".join(lines[:3])
