"""Where the contrastive loss's gradient goes in the detection head."""

import contrastive_oracle as oracle
import flat
import jax
import jax.numpy as jnp
import numpy as np

from detclipv2_jax.geometry import boxes as box_lib
from detclipv2_jax.losses import proposals
from detclipv2_jax.models.atss_head import AtssHead


def test_gradient_reaches_the_box_tower_through_the_deformable_layer_only():
    """Box and centerness outputs choose the proposals here, and still get exactly zero."""
    head = AtssHead(8, 8, 1, 2, num_levels=1, deform_impl="gather")
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(16, 4, 4, 8)), jnp.float32)
    shapes = jax.eval_shape(head.init, jax.random.key(0), features, 0)["params"]
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes)
    arrays = {name: jnp.asarray(x) for name, x in oracle.example()[0].items()}
    anchors = jnp.asarray(rng.random((1, 16, 2)) * 50, jnp.float32)
    anchors = jnp.concatenate([anchors, anchors + 20], axis=2)
    table = {name: arrays[name] for name in ("concept_mask", "canonical", "caption_concepts", "caption_mask")}

    def loss(params):
        output = head.apply({"params": params}, features, 0)
        boxes = anchors + output.box_deltas
        chosen = flat.select_proposals(
            output.embeddings,
            boxes,
            arrays["text"],
            jnp.float32(1.0),
            jnp.float32(0.0),
            centerness=output.centerness,
            objectness=None,
            anchor_mask=jnp.ones((16, 16), bool),
            **table,
            batch_concepts=table["caption_concepts"],
            batch_concepts_mask=table["caption_mask"],
            selection="text_batch_centerness",
            scope="global",
            num_proposals=5,
            pre_nms=16,
            nms_iou=0.6,
            chunk_bytes=1 << 20,
        )
        return flat.word_region_loss(
            proposals.take(output.embeddings, chosen.indices),
            arrays["text"],
            jnp.float32(1.0),
            **table,
            region_mask=chosen.mask,
            region_areas=box_lib.area(chosen.boxes),
            image_mask=arrays["image_mask"],
            matching="one_to_one",
            side="text_to_image",
            temperature=0.5,
            label_smoothing=0.1,
            matching_temperature=0.1,
            chunk_bytes=1 << 20,
        )[0]

    gradient_of = jax.jit(jax.grad(loss))

    def largest(params):
        parts = jax.device_get(gradient_of(params)).items()
        return {name: max(float(np.abs(x).max()) for x in jax.tree.leaves(part)) for name, part in parts}

    sizes = largest(params)
    assert min(sizes["embedding"], sizes["class_tower"], sizes["box_tower"]) > 1e-4
    assert sizes["box_deltas"] == sizes["centerness"] == sizes["level_scales"] == 0.0
    # without offsets and masks that follow the box tower there is no way to it
    params["deformable"]["steering"]["kernel"][:] = 0.0
    assert largest(params)["box_tower"] == 0.0
