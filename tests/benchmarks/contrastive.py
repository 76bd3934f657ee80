"""Time of the contrastive loss, forward and backward, against plain einsum + max.

python tests/benchmarks/contrastive.py
"""

import argparse
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "losses"))
import flat


def example(images: int, proposals: int, concepts: int, dim: int, dtype) -> dict[str, jax.Array]:
    """Returns the array arguments of `word_region_loss`; every table row is one concept of one caption."""
    rng = np.random.default_rng(0)
    regions = rng.normal(size=(images, proposals, dim)).astype(np.float32)
    text = rng.normal(size=(concepts, dim)).astype(np.float32)
    per_caption = concepts // images
    return {
        "regions": jnp.asarray(regions, dtype),
        "text": jnp.asarray(text / np.linalg.norm(text, axis=1, keepdims=True)),
        "scale": jnp.float32(1.0),
        "region_mask": jnp.ones((images, proposals), bool),
        "region_areas": None,
        "concept_mask": jnp.ones(concepts, bool),
        "canonical": jnp.arange(concepts, dtype=jnp.int32),
        "caption_concepts": jnp.arange(images * per_caption, dtype=jnp.int32).reshape(images, per_caption),
        "caption_mask": jnp.ones((images, per_caption), bool),
        "image_mask": jnp.ones(images, bool),
    }


def plain(arrays: dict[str, jax.Array], *, temperature: float, label_smoothing: float) -> tuple[jax.Array, dict]:
    """Returns (text-to-image loss, no metrics), with all similarities at once."""
    text = (arrays["text"] * arrays["scale"]).astype(arrays["regions"].dtype)
    similarity = jnp.einsum("ikd,cd->ikc", arrays["regions"], text, preferred_element_type=jnp.float32)
    best = jnp.max(similarity, axis=1)[:, arrays["caption_concepts"]]
    logits = jnp.mean(best, axis=2) / temperature  # [image, caption]
    log_p = jax.nn.log_softmax(logits, axis=0)
    own = jnp.diagonal(log_p)
    return -jnp.mean((1.0 - label_smoothing) * own + label_smoothing * jnp.mean(log_p, axis=0)), {}


def ours(
    arrays: dict[str, jax.Array], *, temperature: float, label_smoothing: float, chunk_bytes: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (loss, metrics) of the same settings."""
    return flat.word_region_loss(
        **arrays,
        matching="one_to_one",
        side="text_to_image",
        temperature=temperature,
        label_smoothing=label_smoothing,
        matching_temperature=0.1,
        chunk_bytes=chunk_bytes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--proposals", type=int, default=100)
    parser.add_argument("--concepts", type=int, default=4000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chunk_mb", type=int, nargs="*", default=[128], help="several: compares chunk sizes")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    arrays = example(args.images, args.proposals, args.concepts, args.dim, args.dtype)
    values = {"temperature": 0.5, "label_smoothing": 0.1}

    def gradient(loss, **kwargs):
        def of_embeddings(embeddings, rest):
            return loss(rest | embeddings, **values, **kwargs)

        return jax.jit(jax.value_and_grad(of_embeddings, has_aux=True))

    learned = ("regions", "text", "scale")
    embeddings = {name: arrays[name] for name in learned}
    rest = {name: x for name, x in arrays.items() if name not in learned}
    runs = {"plain": gradient(plain)}
    for chunk_mb in args.chunk_mb:
        runs[f"ours, {chunk_mb} MB chunks"] = gradient(ours, chunk_bytes=chunk_mb << 20)
    losses = {name: float(run(embeddings, rest)[0][0]) for name, run in runs.items()}  # compiles
    seconds = {name: [] for name in runs}
    for _ in range(args.repeats):  # in turn, so that other load on the machine meets all of them
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(embeddings, rest))
            seconds[name].append(time.perf_counter() - start)
    for name in runs:
        best, plain_best = min(seconds[name]), min(seconds["plain"])
        print(f"{name}: loss {losses[name]:.6f}, {best:.3f} s, {plain_best / best:.2f} times as fast as plain")


if __name__ == "__main__":
    main()
