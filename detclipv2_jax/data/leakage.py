"""Which photos of one set are those of another: evaluation photos must not be trained on."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from detclipv2_jax import files

# COCO_val2014_000000000042.jpg and val2017/000000000042.jpg are one photo; COCO's numbers have six digits
_COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)20\d\d_)?(0{6}\d{6})\.jpe?g", re.IGNORECASE)


def photo_of(name: str) -> str:
    """Returns what names a photo in all data sets: the number of COCO's and LVIS's photos, else the file name."""
    name = os.path.basename(name.replace("\\", "/"))  # of a json made on Windows
    return found[1] if (found := _COCO_NAME.fullmatch(name)) else name


def held_out_photos(jsons: Sequence[str]) -> frozenset[str]:
    """Returns what names the photos (`photo_of`) of COCO-format jsons; ValueError if one cannot be read."""
    photos: set[str] = set()
    for path in jsons:
        try:
            images = files.read_json(path)["images"]
            photos.update(photo_of(str(image.get("file_name") or image.get("coco_url"))) for image in images)
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"--validation: {path} is no COCO-format json ({type(error).__name__}: {error})") from None
    return frozenset(photos)
