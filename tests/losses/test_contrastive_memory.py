"""What the compiled programs need: memory, bytes on the network, work. Nothing of full size is run."""

import json
import pathlib
import subprocess
import sys

import contrastive_oracle as oracle
import flat
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.losses import matching

ROOT = pathlib.Path(__file__).parents[2]
IMAGES, CONCEPTS, DIM, PHRASES = 192, 37_000, 512, 9  # of one device; concepts of the global batch of 6,144
CHUNK_BYTES = 128 << 20


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


TABLE = {
    "text": shape(CONCEPTS, DIM),
    "scale": shape(),
    "concept_mask": shape(CONCEPTS, dtype=bool),
    "canonical": shape(CONCEPTS, dtype=jnp.int32),
    "caption_concepts": shape(IMAGES, PHRASES, dtype=jnp.int32),
    "caption_mask": shape(IMAGES, PHRASES, dtype=bool),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("match", "side", "most_bytes"),
    [
        ("one_to_one", "text_to_image", 0.30e9),
        ("one_to_many", "text_to_image", 0.30e9),
        ("one_to_one", "bilateral", 0.60e9),  # the table and its gradient in float32 once more
    ],
)
def test_memory_of_forward_and_backward_pass(match, side, most_bytes):
    """The similarities alone would have 192 × 100 × 37,000 × 4 bytes = 2.8 GB, and a gradient of that size."""
    learned = {"regions": shape(IMAGES, 100, DIM, dtype=jnp.bfloat16), "text": TABLE["text"], "scale": TABLE["scale"]}
    rest = {name: x for name, x in TABLE.items() if name not in learned}
    rest |= {"region_mask": shape(IMAGES, 100, dtype=bool), "image_mask": shape(IMAGES, dtype=bool)}

    def loss(learned, rest):
        return flat.word_region_loss(
            **learned,
            **rest,
            region_areas=None,
            matching=match,
            side=side,
            temperature=0.5,
            label_smoothing=0.1,
            matching_temperature=0.1,
            chunk_bytes=CHUNK_BYTES,
        )

    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(learned, rest).compile()
    assert program.memory_analysis().temp_size_in_bytes <= most_bytes


@pytest.mark.slow
def test_memory_of_the_selection():
    anchors = 2134  # of a 320 × 320 image
    per_anchor = {
        "embeddings": shape(IMAGES, anchors, DIM, dtype=jnp.bfloat16),
        "boxes": shape(IMAGES, anchors, 4),
        "centerness": shape(IMAGES, anchors),
        "anchor_mask": shape(IMAGES, anchors, dtype=bool),
    }
    captions = {"batch_concepts": TABLE["caption_concepts"], "batch_concepts_mask": TABLE["caption_mask"]}

    def select(arrays):
        return flat.select_proposals(
            **arrays,
            objectness=None,
            selection="text_batch",
            scope="global",
            num_proposals=100,
            pre_nms=1000,
            nms_iou=0.6,
            chunk_bytes=CHUNK_BYTES,
        )

    program = jax.jit(select).lower(per_anchor | TABLE | captions | {"bias": shape()}).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 0.5e9


@pytest.fixture(scope="module")
def measured():
    """Returns number of devices -> what `benchmarks/contrastive_memory.py` reads from the programs of full size."""
    script = ROOT / "tests" / "benchmarks" / "contrastive_memory.py"
    command = [sys.executable, str(script), "--no_plain", "--devices", "8", "32", "256"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=oracle.environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    return {result["devices"]: result for result in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [8, 32, 256])
def test_only_embeddings_ids_and_a_few_numbers_per_caption_cross_the_network(measured, num_devices):
    result = measured[num_devices]
    concepts, captions = result["concepts"], result["images"]
    sizes = {}
    for kind, size in result["ours"]["collectives"]:
        sizes.setdefault(kind, []).append(size)
    assert set(sizes) == {"all-gather", "reduce-scatter", "all-reduce"}
    # the two large ones: embeddings in bfloat16, and their float32 gradient
    assert sorted(sizes["all-gather"])[-1] == 2 * concepts * DIM
    assert sorted(sizes["reduce-scatter"])[-1] == 4 * concepts * DIM
    everything_else = result["ours"]["network"] - 6 * concepts * DIM
    ids = (4 + 1) * concepts + (4 + 1) * PHRASES * captions  # row and mask of each row of the table and of each phrase
    statistics = 8 * 4 * captions
    assert everything_else <= ids + statistics
    assert everything_else < captions * concepts / 50  # no matrix of captions × concepts, whatever its type
    assert everything_else < captions * captions


@pytest.mark.slow
def test_work_per_concept_does_not_depend_on_the_number_of_devices(measured):
    """One turn of the loops scores a chunk of concepts, whose size depends on the images of a device alone."""
    flops = [result["ours"]["flops"] for result in measured.values()]
    chunk = matching.chunk_size(10**9, 8 * IMAGES * 100, CHUNK_BYTES)
    similarity = 2 * IMAGES * 100 * DIM * chunk
    np.testing.assert_allclose(flops, similarity, rtol=0.05)  # the softmax over images and captions is in it too


def test_padding_and_repeated_texts_cost_no_work():
    """The loops run over the distinct concepts only: all else may even be NaN."""
    arrays, _ = oracle.example()
    expected = oracle.run(arrays)
    unused = ~arrays["concept_mask"] | (arrays["canonical"] != np.arange(48))
    in_use = int(np.sum(~unused))
    assert in_use <= 21  # three chunks of 7; the others are never looked at
    result = oracle.run(arrays | {"text": np.where(unused[:, None], np.nan, arrays["text"]).astype(np.float32)})
    np.testing.assert_array_equal(result[0], expected[0])


@pytest.mark.parametrize(
    ("row_bytes", "budget", "size"), [(10, 1000, 100), (10, 10_000, 896), (10, 5, 1), (1, 10**9, 5000)]
)
def test_chunks_fit_the_budget(row_bytes, budget, size):
    assert matching.chunk_size(5000, row_bytes, budget) == size
