"""Raw files for the tests of `prepare`: small photos, jsons, TSV lines and tar shards."""

import io
import json
import pathlib
import tarfile

import cv2
import numpy as np


def jpeg(*, size=(24, 32), seed=0) -> bytes:
    """Returns an encoded picture, different for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    return cv2.imencode(".jpg", cv2.resize(pixels, size[::-1]))[1].tobytes()


def write_coco(folder: pathlib.Path, *, labels=((1,), (1, 2), (2,), (1,), (3,), (1,)), broken=()) -> pathlib.Path:
    """Writes photos and a COCO json whose image i has one box of each category in labels[i]; returns the json."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i, categories in enumerate(labels):
        name = f"{i:012d}.jpg"
        (folder / "images" / name).write_bytes(b"no image" if i in broken else jpeg(seed=i))
        images.append({"id": i, "file_name": name, "height": 24, "width": 32})
        annotations += [{"image_id": i, "category_id": c, "bbox": [c, 2, 5 + c, 6]} for c in categories]
    names = {c: f"thing_{c}" for categories in labels for c in categories}
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c, "name": names[c]} for c in sorted(names)],
    }
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder / "boxes.json"


def write_tar(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    """Writes a tar of files in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, caption: str | None, *, seed=0) -> dict[str, bytes]:
    """Returns the files of one webdataset sample."""
    return {f"{key}.jpg": jpeg(seed=seed)} | ({f"{key}.txt": caption.encode()} if caption is not None else {})
