"""Grounding from a json as made for MDETR: `final_mixed_train_no_coco.json`, `final_flickr_separateGT_train.json`.

The `tokens_positive` spans of a box are the parts of a phrase, or several phrases; each phrase is a box of its own in
the example. The format and what is checked are documented in `detclipv2_jax.data.box_json`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from detclipv2_jax.data.box_json import read_grounding
from detclipv2_jax.prepare.coco_json import BoxReader
from detclipv2_jax.prepare.record_builder import RecordBuilder


class GroundingJson(RecordBuilder):
    """Captioned images with the boxes of their phrases, from a json with tokens_positive."""

    name = "detclipv2_grounding_json"


def open_reader(annotations: str, images: str, *, shard_size: int, **limits: Any) -> BoxReader:
    """Returns the reader of a grounding json; limits as for `read_grounding`."""
    source = read_grounding(annotations, images, **limits)
    return BoxReader(source, indices=np.arange(len(source)), folder=images, shard_size=shard_size)
