"""Runs on real photographs; skipped without them."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from configs import coco_json
from detclipv2_jax import config as config_lib
from detclipv2_jax import train

ROOT = pathlib.Path(__file__).parents[1]


def losses(workdir, kind):
    rows = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    return [row[f"{kind}/loss"] for row in rows if f"{kind}/loss" in row]


@pytest.mark.slow
def test_the_loss_on_eight_photographs_halves(shared_data, tmp_path):
    """The command of CONTRIBUTING in short: fewer pixels, fewer steps, no evaluation."""
    line = [
        sys.executable,
        "-m",
        "detclipv2_jax.main",
        "--config=configs/coco_json.py:overfit",
        f"--workdir={tmp_path}",
    ]
    changes = {
        "detection.annotations": shared_data / "coco_train" / "instances.json",
        "detection.images": shared_data / "coco_train" / "images",
        "detection.canvases": "((128,128),)",
        "detection.short_side": "(128,128)",
        "detection.long_side": 128,
        "model.head.deformable": False,  # much to compile
        "num_steps": 32,
        "log_every_steps": 1,
    }
    environment = os.environ | {"XLA_FLAGS": re.sub(r"--xla_force\S*", "", os.environ["XLA_FLAGS"])}  # one device
    arguments = [f"--config.{key}={value}" for key, value in changes.items()]
    done = subprocess.run([*line, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    history = losses(tmp_path, "detection")
    assert len(history) == 32
    assert history[-1] < 0.5 * history[0]


def test_all_three_sources_are_read_with_boxes_on_the_photos(shared_data):
    config = coco_json.get_config()
    config.detection.annotations = str(shared_data / "coco_train" / "instances.json")
    config.detection.images = str(shared_data / "coco_train" / "images")
    config.grounding.annotations = str(shared_data / "grounding" / "coco_train_derived.json")
    config.grounding.images = str(shared_data)
    config.image_text.pairs = str(shared_data / "image_text" / "pairs.tsv")
    config.image_text.images = str(shared_data / "image_text")
    run = train.make_run(config, shared_data)
    assert {stream.kind.value for stream in run.streams} == set(config_lib.KINDS)
    for stream in run.streams:
        batch = stream.batch(0)
        assert batch.image.shape == (stream.batch_size, *stream.canvas, 3)
        boxes, limits = batch.boxes, batch.extent[:, None, ::-1]
        assert (boxes[..., :2] >= 0).all()
        assert (boxes[..., 2:] <= limits).all()
        assert batch.box_mask.any() == (stream.kind.value != "image_text")
