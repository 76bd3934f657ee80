"""Images a second and core of the streams beside a Pillow pipeline; concept work; workers; memory; phrases encoded.

Run: `python tests/benchmarks/data.py [--data=../shared/data] [--batches=40] [--only_phrases]`. Both pipelines run in
turns on one core, and their CPU seconds count, not the clock, so that other work on the machine matters little; workers
need the clock.
"""

import argparse
import io
import json
import os
import pathlib
import tempfile
import time

import numpy as np
from PIL import Image

from detclipv2_jax import config as config_lib
from detclipv2_jax.data import tokenizer
from detclipv2_jax.data.batches import BatchMaker
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.data.streams import Stream, train_streams


def configuration(data: pathlib.Path, folder: pathlib.Path):
    """Returns the paper's input sizes on the real photos; detection with LVIS's 1203 names and definitions."""
    c = config_lib.base()
    content = json.loads((data / "coco_train/instances.json").read_text())
    lvis = json.loads((data / "categories/lvis_v1_categories.json").read_text())
    content["categories"] += [{"id": 1000 + x["id"], "name": x["name"], "def": x["def"]} for x in lvis]
    (folder / "detection.json").write_text(json.dumps(content))
    c.detection.annotations, c.detection.images = str(folder / "detection.json"), str(data / "coco_train/images")
    c.detection.batch_size = 8
    # phrases as a builder would find them: the words of the caption in pairs
    lines = []
    for line in (data / "image_text/pairs.tsv").read_text().splitlines():
        caption = line.split("\t")[1]
        words = caption.split()
        lines.append(f"{line}\t{json.dumps([' '.join(words[i : i + 2]) for i in range(0, len(words), 2)])}\n")
    (folder / "pairs.tsv").write_text("".join(lines))
    c.image_text.pairs, c.image_text.images = str(folder / "pairs.tsv"), str(data / "image_text")
    c.image_text.batch_size = 64
    return c


def pillow_batch(maker: BatchMaker, n: int) -> np.ndarray:
    """Returns the images of a batch made with Pillow alone: decode, bilinear resize, flip, pad, stack."""
    canvas_h, canvas_w = maker.canvas_of(n)
    images = []
    for position in range(n * maker.batch_size, (n + 1) * maker.batch_size):
        rng = np.random.default_rng(position)
        record = maker.sources[0][int(maker.members[position % len(maker.members)])]
        image = Image.open(io.BytesIO(pathlib.Path(record.image).read_bytes())).convert("RGB")
        short_side = rng.integers(maker.short_side[0], maker.short_side[1] + 1)
        scale = min(short_side / min(image.size), maker.long_side / max(image.size))
        scale = min(scale, canvas_w / image.width, canvas_h / image.height)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        if rng.random() < maker.flip_prob:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        canvas = np.zeros((canvas_h, canvas_w, 3), np.uint8)
        canvas[: image.height, : image.width] = np.asarray(image)
        images.append(canvas)
    return np.stack(images)


def compare(stream: Stream, *, num_batches: int) -> None:
    """Prints both pipelines' images a second on one core and the share of the concept work."""
    maker, seconds, concept_seconds = stream._maker, {"pillow": [], "ours": []}, []
    inner = BatchMaker._concepts

    def timed(self, *args):
        start = time.process_time()
        result = inner(self, *args)
        concept_seconds.append(time.process_time() - start)
        return result

    BatchMaker._concepts = timed
    stream.batch(0)
    pillow_batch(maker, 0)
    concept_seconds.clear()
    for n in range(num_batches):
        for name, run in (("pillow", lambda: pillow_batch(maker, n)), ("ours", lambda: stream.batch(n))):  # noqa: B023
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    BatchMaker._concepts = inner
    rates = {name: [stream.batch_size / s for s in values] for name, values in seconds.items()}
    best = {name: max(values) for name, values in rates.items()}
    median = {name: float(np.median(values)) for name, values in rates.items()}
    print(
        f"{stream.name}: pillow {best['pillow']:.0f} images/s, ours {best['ours']:.0f}: "
        f"{best['ours'] / best['pillow']:.2f}x (median {median['ours'] / median['pillow']:.2f}x); "
        f"concept work {np.median(concept_seconds) / np.median(seconds['ours']):.1%} of a batch"
    )


def memory_mb(process: str = "self") -> float:
    """Returns the memory that is held and not shared with other processes."""
    resident, shared = map(int, pathlib.Path(f"/proc/{process}/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 1e6


def children() -> list[str]:
    return [pid for file in pathlib.Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


def workers(config, *, num_batches: int) -> None:
    """Prints the images a second of one and of two worker processes, on all cores."""
    rates = {}
    for num_workers in (1, 2):
        config.input.num_workers, config.input.prefetch_batches = num_workers, 2 * num_workers
        stream = next(s for s in train_streams(config) if s.kind is Kind.IMAGE_TEXT)
        iterator = stream.iterate()
        for _ in range(2 * num_workers + 2):
            next(iterator)
        start = time.perf_counter()
        for _ in range(num_batches):
            next(iterator)
        rates[num_workers] = num_batches * stream.batch_size / (time.perf_counter() - start)
        memory = max(map(memory_mb, children()))
        iterator.close()
    print(
        f"image_text workers: 1: {rates[1]:.0f}/s, 2: {rates[2]:.0f}/s, {rates[2] / rates[1]:.2f}x; "
        f"memory of a worker {memory:.0f} MB"
    )


def phrases() -> None:
    """Prints how many short phrases are encoded a second on one core, of words that were not seen before."""
    texts, seconds = [f"{color} thing number {i}" for i in range(5000) for color in ("red", "blue")], []
    for _ in range(5):
        tokenizer._word.cache_clear()
        start = time.process_time()
        tokenizer.tokenize(texts)
        seconds.append(time.process_time() - start)
    print(f"short phrases encoded: {len(texts) / min(seconds):,.0f}/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path(__file__).parents[3] / "shared" / "data")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--memory_batches", type=int, default=200)
    parser.add_argument("--memory_batch_size", type=int, default=64, help="smaller for many batches")
    parser.add_argument("--only_phrases", action="store_true")
    options = parser.parse_args()
    cores = os.sched_getaffinity(0)
    phrases()
    if options.only_phrases:
        return
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(options.data.resolve(), pathlib.Path(folder))
        os.sched_setaffinity(0, {min(cores)})
        streams = train_streams(config)
        for stream in streams:
            if stream.canvas != (1344, 800):
                compare(stream, num_batches=options.batches)
        config.image_text.batch_size = options.memory_batch_size
        stream = train_streams(config)[-1]
        for n in range(options.memory_batches + 1):
            stream.batch(n)
            if n % (options.memory_batches // 4) == 0:
                print(f"memory after {n} image-text batches: {memory_mb():.0f} MB")
        os.sched_setaffinity(0, cores)
        config.image_text.batch_size = 64
        workers(config, num_batches=options.batches)


if __name__ == "__main__":
    main()
