"""Seconds until the page in the browser has its answer, warm: COCO's 80 names, an example box, a caption.

    python -m tests.benchmarks.page --run=runs/demo
    python -m tests.benchmarks.page

With a run its model and photos are used; without one Swin-T with random weights and a photo of 800 x 1200 px of noise.
"""

from __future__ import annotations

import io
import pathlib
import statistics
import sys
import time

import jax
import numpy as np
from PIL import Image

from detclipv2_jax import commands, config
from detclipv2_jax.demo.album import Album
from detclipv2_jax.demo.answers import Answers
from detclipv2_jax.inference import Predictor
from detclipv2_jax.models import detclip
from detclipv2_jax.runs import state


def main(*, run: str = "", repeats: int = 5) -> None:
    """Prints the seconds of every kind of question.

    Args:
      run: workdir of a run
      repeats: questions of each kind
    """
    if run:
        predictor = Predictor.from_checkpoint(run, keep_vocabularies=False)
        answers = Answers(predictor, Album(pathlib.Path(run, "data", "images", "eval")))
    else:
        settings = config.base()
        settings.model = config.model("swin_t")
        model = detclip.from_config(settings.model)
        params = jax.jit(lambda key: state.init_params(model, key, context_length=16))(jax.random.key(0))
        answers = Answers(Predictor(settings, model, params), Album(None))
        for i in range(repeats + 2):
            out = io.BytesIO()
            noise = np.random.default_rng(i).integers(0, 256, (800, 1200, 3), np.uint8)
            Image.fromarray(noise).save(out, "JPEG")
            answers.upload(out.getvalue(), name=f"{i}.jpg")
    photos = [entry.id for entry in answers.album.entries][: repeats + 2]
    entry = answers.album.get(photos[0])
    box = [entry.width / 4, entry.height / 4, entry.width / 2, entry.height / 2]
    example = {"name": "this", "photo": photos[0], "box": box}
    kinds = {
        "80 names": lambda photo: answers.find({"photo": photo, "vocabulary": "coco"}),
        "an example box": lambda photo: answers.find({"photo": photo, "examples": [example]}),
        "a caption of 3 phrases": lambda photo: answers.align({"photo": photo, "caption": "a cat, a dog and a house"}),
    }
    for name, ask in kinds.items():
        begin = time.perf_counter()
        ask(photos[1])
        first, seconds = time.perf_counter() - begin, []
        for photo in photos[2:]:  # no photo twice: what was found is kept
            begin = time.perf_counter(), time.process_time()
            ask(photo)
            seconds.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        wall, cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
        print(f"{name}: {wall:.2f} s, {cpu:.2f} CPU seconds (the first {first:.1f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(commands.run(main, about=__doc__))
