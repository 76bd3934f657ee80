"""The expected result of a whole step: a model's own towers, image by image and text by text, around the oracle.

Also batches that hold what is easy to get wrong, and a stand-in for the model that compiles in no time.
"""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from oracle import geometry
from oracle import step as oracle

from detclipv2_jax.data.schema import Batch, Federated, Kind
from detclipv2_jax.models.detclip import Regions, l2_normalize

NUM_FEATURES = 8


class StandIn(nn.Module):
    """Has DetCLIP's methods; every output is one product of weights with what a cell of the photo looks like."""

    embed_dim: int = 16
    objectness: bool = False
    text: dict[str, Any] = flax.core.FrozenDict(context_length=16, classes=())

    def setup(self):
        normal = nn.initializers.normal
        self.region = self.param("region", normal(0.5), (NUM_FEATURES, self.embed_dim))
        self.box = self.param("box", normal(1.0), (NUM_FEATURES, 4))
        self.centerness = self.param("centerness", normal(0.5), (NUM_FEATURES,))
        self.object = self.param("objectness", normal(0.5), (NUM_FEATURES,))
        self.text_encoder = self.param("text_encoder", normal(1.0), (64, self.embed_dim))
        self.scale = self.param("logit_scale", nn.initializers.constant(1.5), ())
        self.bias = self.param("logit_bias", nn.initializers.constant(-1.0), ())

    def __call__(self, *_, **__):
        return self.scale

    def encode_text(self, tokens):
        return l2_normalize(self.text_encoder[tokens[:, 1] % 64])

    def encode_tokens(self, tokens):
        # an embedding says what stood before, too
        return l2_normalize(jnp.cumsum(self.text_encoder[tokens % 64], axis=1))

    def logit_parameters(self):
        return self.scale, self.bias

    def encode_image(self, image, extent, *, train):
        del extent
        b, height, width, _ = image.shape
        cells = []
        for stride in geometry.STRIDES:
            x = jnp.pad(image / 255.0 - 0.5, ((0, 0), (0, -height % stride), (0, -width % stride), (0, 0)))
            x = x.reshape(b, x.shape[1] // stride, stride, x.shape[2] // stride, stride, 3).mean((2, 4))
            cells.append(x.reshape(b, -1, 3))
        cells = 4.0 * jnp.concatenate(cells, axis=1)
        place = np.random.default_rng(0).normal(size=(1, cells.shape[1], NUM_FEATURES - 3)).astype(np.float32)
        features = jnp.concatenate([cells, jnp.broadcast_to(place, (b, *place.shape[1:]))], axis=2)
        if train:  # stochastic, as the depth of the backbone is
            keep = jax.random.bernoulli(self.make_rng("dropout"), 0.8, (*features.shape[:2], 1))
            features = jnp.where(keep, features, 0.5 * features)
        return Regions(
            features @ self.region,
            features @ self.box,
            features @ self.centerness,
            features @ self.object if self.objectness else None,
        )


def make_batch(
    kind, *, seed, canvas=(64, 96), b=16, n=4, t=32, m=3, distinct=20, share=0.7, federated=False, class_names=False
):
    """Returns a batch of the eight devices' rows.

    `distinct` names over the table, the same ones on several devices, rows in between that are not in use; photos of
    all shapes, with boxes that reach over their border; the last device has padding images only; image 1 has no box,
    caption 2 no concept. `share` of the boxes exist; with 0 only two captions do. Some boxes have several concepts.
    Most images are annotated for some concepts only if `federated`, image 3 for none. Captions are alone if they are
    `class_names`, many of them equal.
    """
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 0.7, (b, n, 2)) * canvas[::-1]
    size = np.exp(rng.uniform(np.log(6), np.log(80), (b, n, 2)))
    boxes = np.concatenate([corner, np.minimum(corner + size, canvas[::-1])], axis=2).astype(np.float32)
    boxes[::3, 2], boxes[::4, 3] = boxes[::3, 0], boxes[::4, 0]
    concept = rng.permutation(t) % distinct
    concept_mask = rng.uniform(size=t) < (0.85 if distinct < t else 1.0)
    used = np.flatnonzero(concept_mask)
    tokens = np.zeros((t, 16), np.int32)
    tokens[:, 0], tokens[:, 1], tokens[:, 2], tokens[:, 3] = 49406, 320 + concept, 500 + concept % 3, 49407
    tokens[concept % 5 == 1, 2:4] = 49407, 0  # shorter
    tokens[concept % 5 == 2, 2] = 0  # the id of "!", which is that of padding, too
    extent = np.stack([rng.integers(side // 3, side + 1, b) for side in canvas], axis=1).astype(np.int32)
    extent[0] = canvas
    box_mask = rng.uniform(size=(b, n)) < share
    box_mask[1] = False
    caption_mask = np.arange(m)[None] < rng.integers(1, m + 1, (b, 1))
    caption_mask[2:] &= (share > 0) | (np.arange(2, b) == 3)[:, None]
    caption_mask[2] = False
    image_mask = np.arange(b) < b - b // 8
    n, m = (0, 1 if class_names else m) if kind is Kind.IMAGE_TEXT else (n, 0)
    return Batch(
        image=rng.integers(0, 255, (b, *canvas, 3)).astype(np.uint8),
        extent=extent,
        scale=np.ones((b, 2), np.float32),
        original_size=extent,
        image_mask=image_mask,
        example_id=np.arange(b, dtype=np.int32),
        boxes=boxes[:, :n],
        box_mask=box_mask[:, :n],
        box_concepts=rng.choice(used, (b, n)).astype(np.int32),
        concept_tokens=tokens,
        concept_mask=concept_mask,
        concept_ids=np.stack([concept % 3, concept], axis=1).astype(np.uint32),
        caption_concepts=rng.choice(used, (b, m)).astype(np.int32),
        caption_mask=caption_mask[:, :m],
        class_names=np.ones(b, bool) if class_names else None,
        federated=Federated(
            images=(rng.uniform(size=b) < 0.8) | (np.arange(b) == 3),
            concepts=rng.choice(used, (b, 6)).astype(np.int32),
            mask=(rng.uniform(size=(b, 6)) < 0.7) & (np.arange(b) != 3)[:, None],
        )
        if federated
        else None,
    )


def recorder():
    """Returns an optimizer whose state is the gradient it was given last."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads)
    )


def jit_towers(model, *, text="encode_text"):
    """Returns a function of (parameters, image, extent, tokens, key, bars or None); `text` is the text tower's method.

    It returns the outputs of both towers, and the gradient to the parameters that the outputs' gradients `bars` give.
    """

    def towers(params, image, extent, tokens, key, bars):
        def forward(params):
            arguments = {"train": True, "rngs": {"dropout": key}}
            regions = model.apply({"params": params}, image, extent, **arguments, method="encode_image")
            concepts = model.apply({"params": params}, tokens, method=text)
            scale, bias = model.apply({"params": params}, method="logit_parameters")
            return [
                regions.embeddings,
                regions.box_deltas,
                regions.centerness,
                regions.objectness,
                concepts,
                scale,
                bias,
            ]

        outputs, pull = jax.vjp(forward, params)
        return outputs, None if bars is None else pull(bars)[0]

    return jax.jit(towers)


def expected_step(towers, params, batch, *, kind, config, canvas, step, num_devices, num_chunks):
    """Returns (loss, metrics, gradient to the parameters) of step number `step`; `towers` are those of `jit_towers`."""
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    keys = [jax.random.fold_in(key, i) for i in range(num_chunks)]
    rows = np.arange(len(batch.image)).reshape(num_devices, num_chunks, -1).swapaxes(0, 1).reshape(num_chunks, -1)
    calls = [
        (batch.image[part], batch.extent[part], batch.concept_tokens, key) for part, key in zip(rows, keys, strict=True)
    ]
    parts = [jax.device_get(towers(params, *call, None)[0]) for call in calls]
    order = np.argsort(rows.reshape(-1))
    images = [
        None if x[0] is None else np.concatenate(x)[order] for x in zip(*(part[:4] for part in parts), strict=True)
    ]
    outputs = oracle.Outputs(*images, *parts[0][4:])
    options = {"canvas": canvas, "settings": config.loss}
    if kind is Kind.IMAGE_TEXT:
        step_of = oracle.pair_step if batch.class_names is None else oracle.class_step
        loss, metrics, bars = step_of(outputs, batch, num_devices=num_devices, **options)
    else:
        head = config.model.head.objectness
        options |= {"objectness": head, "max_box_concepts": config[kind.value].max_box_concepts}
        loss, metrics, bars = oracle.box_step(outputs, batch, kind=kind.value, **options)
    bars = list(vars(bars).values())
    total = None
    for i, (part, call) in enumerate(zip(rows, calls, strict=True)):
        share = [None if x is None else x[part] for x in bars[:4]] + [x * (i == 0) for x in bars[4:]]
        _, grads = towers(params, *call, jax.tree.map(np.float32, share))
        total = grads if total is None else jax.tree.map(np.add, total, grads)
    return loss, metrics, jax.device_get(total)


def assert_same_gradients(ours, theirs, *, tolerance=1e-5):
    """Compares gradients, each by the length of the difference; one that should be zero by the length of all."""
    whole = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(theirs)))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        length = np.linalg.norm(np.float64(y))
        error = np.linalg.norm(np.float64(x) - y)
        assert error <= tolerance * length + 1e-3 * tolerance * whole, (jax.tree_util.keystr(path), error, length)
