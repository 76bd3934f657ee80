"""Runs an export from disk with nothing but its runtime: python run_export.py FORMAT FOLDER INPUT.npz OUTPUT.npz.

INPUT has image, extent, original_size, words and their tokens; OUTPUT gets boxes, scores, labels, mask, the embeddings
of the words (unless the model has its own), and load_s, first_s and next_s: seconds for loading, the first call and the
best of three more.
Of safetensors, the weights and the vocabulary are read instead.
"""

import sys
import time
import warnings

import numpy as np

kind, folder, source, target = sys.argv[1:]
runtime = {
    "safetensors": {"safetensors"}, "stablehlo": {"jax", "safetensors"}, "onnx": {"onnxruntime"},
    "saved_model": {"tensorflow"},
}  # fmt: skip
others = {"jax", "safetensors", "tensorflow", "onnxruntime", "flax", "optax", "orbax", "ml_collections", "cv2"}
sys.modules.update(dict.fromkeys({"detclipv2_jax", *others} - runtime[kind]))  # importing these is an error
sys.path[0] = folder  # the scripts that were written with it
inputs = dict(np.load(source))
photos = {name: inputs[name] for name in ("image", "extent", "original_size") if name in inputs}
start = time.perf_counter()

if kind == "safetensors":
    import weights

    words, definitions, embeddings = weights.vocabulary(folder)
    found = {**weights.load(folder), "words": words, "definitions": definitions, "embeddings": embeddings}

elif kind == "stablehlo":
    from detector import Detector

    detector = Detector(folder)
    embeddings = detector.encode(inputs["tokens"])

    def run():
        return detector(*photos.values(), embeddings)

elif kind == "onnx":
    from onnx_detector import Detector

    detector = Detector(folder)
    own_words = bool(detector.words) and detector.text is None
    embeddings = None if own_words else detector.encode(inputs["tokens"])

    def run():
        return detector(*photos.values(), embeddings)

else:
    warnings.simplefilter("ignore")  # TensorFlow's own
    import tensorflow as tf
    import tensorflow_text  # noqa: F401  (its operations)

    signatures = tf.saved_model.load(folder).signatures
    words = tf.constant(inputs["words"].tolist())
    embeddings = signatures["encode"](words=words)["text"].numpy()

    def run():
        tensors = {name: tf.constant(value) for name, value in photos.items()}
        return {name: x.numpy() for name, x in signatures["serving_default"](**tensors, words=words).items()}


if kind == "stablehlo":  # one word, of a single number
    one = np.zeros_like(embeddings)
    one[1, 2] = 1.0
    alone = detector(*photos.values(), one)

if kind != "safetensors":
    seconds = [time.perf_counter() - start]
    for _ in range(4):
        start = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - start)
    if "names" in found:
        found["names"] = found["names"].astype("S")
    if kind == "stablehlo":
        found["labels_of_one"] = alone["labels"][alone["mask"]]
    if embeddings is not None:
        found["embeddings"] = embeddings
    found |= {"load_s": seconds[0], "first_s": seconds[1], "next_s": min(seconds[2:])}
np.savez(target, **found)
