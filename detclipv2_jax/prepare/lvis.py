"""Detection from LVIS v1: a COCO-format json whose images say which categories were looked for.

`neg_category_ids` (verified absent) become negatives, `not_exhaustive_category_ids` (may be present without boxes)
never do, and nothing is known of other categories (`config.detection.federated`). Images are named by `coco_url`: the
image folder holds train2017/ and val2017/.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

from detclipv2_jax.data.box_json import load_json
from detclipv2_jax.prepare.coco_json import BoxReader
from detclipv2_jax.prepare.coco_json import open_reader as open_coco_reader
from detclipv2_jax.prepare.record_builder import RecordBuilder

_FIELDS = ("neg_category_ids", "not_exhaustive_category_ids")
_FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}


class Lvis(RecordBuilder):
    """Images with the boxes of their categories and the federated lists of LVIS."""

    name = "detclipv2_lvis"


def open_reader(annotations: str, images: str, **options: Any) -> BoxReader:
    """Returns the reader of an LVIS json; options as for `coco_json.open_reader`.

    Its facts say how many categories are rare, common and frequent.

    Raises:
      ValueError: the fields that make a json LVIS are missing.
    """
    reader = open_coco_reader(annotations, images, **options)
    content = load_json(Path(annotations))
    missing = [field for field in _FIELDS if not any(field in image for image in content["images"])]
    if not all(category.get("frequency") in _FREQUENCIES for category in content["categories"]):
        missing.append("the frequency of every category (r, c or f)")
    if missing:
        raise ValueError(f"{annotations} is no LVIS json, it lacks {', '.join(missing)}; build it with KIND coco_json")
    frequencies = collections.Counter(_FREQUENCIES[category["frequency"]] for category in content["categories"])
    reader.facts["categories by frequency"] = dict(frequencies)
    return reader
