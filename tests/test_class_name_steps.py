"""A run on generated scenes with what the paper adds to or changes of pairs: class names, tokens, a capped mixture."""

import json
import os

import building
import jax
import numpy as np
import pytest
import stand_in
from PIL import Image

from detclipv2_jax import session, train
from detclipv2_jax.data import scenes
from detclipv2_jax.runs import checkpoints


def crops_by_class(folder, output):
    """Writes what the boxes of generated scenes show to a folder a class, spelled with an underscore."""
    content = json.loads((folder / "detection.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    for i, box in enumerate(content["annotations"]):
        left, top, width, height = box["bbox"]
        place = output / names[box["category_id"]].replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        photo = Image.open(folder / files[box["image_id"]])
        photo.crop((left, top, left + width, top + height)).save(place / f"{i}.png")


@pytest.mark.slow
def test_tokens_class_names_and_a_capped_mixture_train_and_resume(micro, tmp_path):
    counts = {"num_detection": 24, "num_grounding": 0, "num_image_text": 0, "num_eval": 0}
    scenes.write(tmp_path / "scenes", **counts, size_px=64, seed=0)
    crops_by_class(tmp_path / "scenes", tmp_path / "classes")
    report = building.build("classes", input=str(tmp_path / "classes"), output=str(tmp_path / "built"))
    micro.scenes.update({"num_detection": 0, "num_grounding": 0, "num_image_text": 24, "num_eval": 0})
    micro.image_text.data, micro.image_text.class_weight = (str(tmp_path / "built"),), 24 / report["examples"]
    micro.loss.interaction, micro.loss.side = "tokens", "bilateral"
    micro.optimizer.warmup_steps, micro.pictures_every_steps, micro.mixing = 1, 0, ("capped", 2.0)
    micro.optimizer.learning_rate = 0.03  # the stand-in's weights are few and large
    jitted, compiled = train.jitted_step, {}

    def run(num_steps, name):
        micro.num_steps = num_steps
        with stand_in.installed(), pytest.MonkeyPatch.context() as patch:  # runs share their steps
            patch.setattr(train, "jitted_step", lambda r, *key: compiled.setdefault(key, jitted(r, *key)))
            session.setup(micro, tmp_path / name, training=True)()
        return checkpoints.load_for_inference(tmp_path / name)[1]

    whole = run(16, "whole")
    if os.environ.get("EXHAUSTIVE"):
        run(7, "broken")
        jax.tree.map(np.testing.assert_array_equal, whole, run(16, "broken"))
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for loss in ("contrastive", "classification"):
        values = [row[f"image_text/loss_{loss}"] for row in rows if f"image_text/loss_{loss}" in row]
        assert len(values) >= 6
        assert np.mean(values[-3:]) < np.mean(values[:3])
