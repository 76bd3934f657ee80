"""Time and memory of the LVIS evaluator beside lvis-api, on generated files of the benchmarks' sizes.

    python tests/benchmarks/lvis.py --images=4809 [--reference=/path/to/python-with-lvis] [--reference_images=1000]

Ours is the command from files to JSON, both protocols at once (4,809 images are minival, 19,809 are val). lvis-api
0.5.3 (`np.float` in its eval.py written as `float`, which numpy asks for) scores the standard one alone, on the first
`--reference_images` of the same images, since its time grows with their number.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

NUM_CATEGORIES = 1203
NUM_DETECTIONS = 300  # an image
REFERENCE = """
import sys
from lvis import LVIS, LVISEval, LVISResults
truth = LVIS(sys.argv[1])
evaluation = LVISEval(truth, LVISResults(truth, sys.argv[2]), "bbox")
evaluation.run()
import json
print(json.dumps({name: float(value) for name, value in evaluation.get_results().items()}))
"""


def generate(folder: str, *, num_images: int) -> tuple[str, str]:
    """Returns the paths of annotations and detections, written by a process of its own: a process that this one starts
    would count this one's memory as its own."""
    subprocess.run([sys.executable, __file__, f"--images={num_images}", f"--write={folder}"], check=True)
    return f"{folder}/annotations.json", f"{folder}/detections.json"


def write(folder: pathlib.Path, *, num_images: int) -> None:
    """Writes LVIS-like annotations (12 boxes an image with outlines) and detections.

    Half of the detections are annotated boxes moved a little, most of them under their own category.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, NUM_CATEGORIES + 1)
    weights /= weights.sum()
    outline = [[round(float(x), 2) for x in rng.uniform(0, 600, 80)]]
    images, annotations = [], []
    with open(folder / "detections.json", "w") as file:
        file.write("[")
        for image_id in range(1, num_images + 1):
            present = np.unique(rng.choice(NUM_CATEGORIES, 8, p=weights)) + 1
            absent = np.setdiff1d(rng.choice(NUM_CATEGORIES, 8, p=weights) + 1, present)
            labels = rng.choice(present, rng.poisson(12) + 1)
            size = rng.lognormal(4, 1, (len(labels), 2)).clip(4, 400)
            boxes = np.concatenate([rng.uniform(0, 640 - size.clip(max=600)), size], axis=1).round(2)
            images.append(
                {
                    "id": image_id,
                    "neg_category_ids": absent.tolist(),
                    "not_exhaustive_category_ids": present[rng.random(len(present)) < 0.1].tolist(),
                }
            )
            for label, box in zip(labels.tolist(), boxes.tolist(), strict=True):
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": image_id, "category_id": label, "bbox": box}
                    | {"area": box[2] * box[3] * 0.7, "segmentation": outline}
                )
            of = rng.integers(0, len(labels), NUM_DETECTIONS)
            found = np.abs(boxes[of] + rng.normal(0, 0.1, (NUM_DETECTIONS, 4)) * np.tile(boxes[of, 2:], 2)).round(2)
            found_labels = np.where(rng.random(NUM_DETECTIONS) < 0.7, labels[of], rng.choice(present, NUM_DETECTIONS))
            other = rng.random(NUM_DETECTIONS) < 0.5
            found_labels[other] = rng.choice(NUM_CATEGORIES, other.sum()) + 1
            scores = rng.beta(1, 4, NUM_DETECTIONS).astype(np.float32)
            rows = zip(found_labels.tolist(), found.tolist(), scores, strict=True)
            text = ", ".join(
                json.dumps({"image_id": image_id, "category_id": c, "bbox": b, "score": float(str(s))})
                for c, b, s in rows
            )
            file.write(("" if image_id == 1 else ", ") + text)
        file.write("]")
    categories = [{"id": i, "name": str(i), "frequency": "fcr"[i * 3 // 1204]} for i in range(1, NUM_CATEGORIES + 1)]
    with open(folder / "annotations.json", "w") as file:
        json.dump({"images": images, "annotations": annotations, "categories": categories}, file)


def run(command: list[str], *, name: str, num_images: int) -> tuple[float, dict[str, float]]:
    """Runs a command that prints scores, prints its time and memory; returns seconds and scores."""
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall, cpu, memory = time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20
    if status:
        sys.exit(f"{name} failed")
    print(f"{name:28}{num_images:7} images {wall:8.1f} s wall {cpu:8.1f} s CPU {memory:6.2f} GB peak", flush=True)
    return cpu, json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4809)
    parser.add_argument("--reference", help="Python that imports lvis; without it only ours is measured")
    parser.add_argument("--reference_images", type=int, default=1000)
    parser.add_argument("--write", metavar="DIR", help="only write the files")
    arguments = parser.parse_args()
    if arguments.write:
        write(pathlib.Path(arguments.write), num_images=arguments.images)
        return
    ours = [sys.executable, "-m", "detclipv2_jax.eval.lvis"]
    with tempfile.TemporaryDirectory() as folder:
        truth, detections = generate(folder, num_images=arguments.images)
        seconds, _ = run(
            [*ours, f"--annotations={truth}", f"--detections={detections}"],
            name="ours, standard and fixed",
            num_images=arguments.images,
        )
        if not arguments.reference:
            return
        num = min(arguments.reference_images, arguments.images)
        truth, detections = generate(folder, num_images=num)
        _, scores = run(
            [*ours, f"--annotations={truth}", f"--detections={detections}"],
            name="ours, standard and fixed",
            num_images=num,
        )
        other, expected = run(
            [arguments.reference, "-c", REFERENCE, truth, detections], name="lvis-api, standard", num_images=num
        )
        print(f"largest difference of a score: {max(abs(scores[name] - expected[name]) for name in expected):.1e}")
        ratio = other / num / (seconds / arguments.images)
        print(f"CPU time an image, lvis-api's standard over both of ours: {ratio:.1f}")


if __name__ == "__main__":
    main()
