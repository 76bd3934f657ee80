"""What was found, as labels in the files that other tools read; photos stay where they are.

format        | written to the folder              | read by
coco          | coco.json                          | `supervision.DetectionDataset.from_coco`, FiftyOne, pycocotools
yolo          | yolo/: data.yaml, labels/, images/ | `supervision.DetectionDataset.from_yolo`, FiftyOne, Ultralytics
label_studio  | label_studio.json and .xml         | Label Studio: pre-annotated tasks and the labeling interface
fiftyone      | fiftyone/: data.json, labels.json  | FiftyOne: a FiftyOneImageDetectionDataset

YOLO's labels hold no scores, the others do. Every photo that could be read has an entry, also one without boxes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import urllib.parse
import xml.sax.saxutils
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from detclipv2_jax import files
from detclipv2_jax.inference import Found

Results = Collection[tuple[pathlib.Path, Found]]  # photos and what was found on them; read more than once
_YOLO_MARK = "# labels that detclipv2_jax.predict wrote"
LABEL_STUDIO_URL = "/data/local-files/?d="  # of a file below LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT


def check(formats: Sequence[str], output: pathlib.Path) -> None:
    """Raises a ValueError for a format that there is not, or a folder of others that would be overwritten."""
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"--formats: there is no format {unknown[0]!r}; there are {', '.join(FORMATS)}")
    folder = output / "yolo"
    if "yolo" in formats and folder.exists():
        with contextlib.suppress(OSError, ValueError):
            if files.read_lines(folder / "data.yaml")[0] == _YOLO_MARK:
                return
        raise ValueError(f"--output: {folder} was written by another program; choose another folder")


def write(formats: Sequence[str], output: pathlib.Path, results: Results, *, names: Sequence[str]) -> None:
    """Writes labels of photos to a folder, in several formats."""
    for name in formats:
        FORMATS[name](output, results, names)


def root_of(results: Results) -> pathlib.Path:
    """Returns the folder that holds all photos; names of files in labels are relative to it."""
    folders = {os.path.dirname(os.path.abspath(path)) for path, _ in results}
    return pathlib.Path(os.path.commonpath(folders)) if folders else pathlib.Path.cwd()


def _coco(output: pathlib.Path, results: Results, names: Sequence[str]) -> None:
    root = root_of(results)

    def images() -> Iterator[dict[str, Any]]:
        for i, (path, found) in enumerate(results, start=1):
            height, width = found.size
            file_name = pathlib.Path(os.path.abspath(path)).relative_to(root).as_posix()
            yield {"id": i, "file_name": file_name, "height": height, "width": width}

    def annotations() -> Iterator[dict[str, Any]]:
        num = 0
        for i, (_, found) in enumerate(results, start=1):
            for row in found.to_coco(image_id=i):
                num += 1
                area = round(row["bbox"][2] * row["bbox"][3], 3)
                keys = {key: row[key] for key in ("image_id", "category_id", "bbox", "score")}
                yield {"id": num, **keys, "area": area, "iscrowd": 0}

    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    lists = {"categories": categories, "images": images(), "annotations": annotations()}

    def pieces() -> Iterator[str]:
        yield f'{{"info": {json.dumps({"photos": str(root)})}'
        for key, entries in lists.items():
            yield f',\n"{key}": '
            yield from _json_list(entries)
        yield "}\n"

    files.write_text(output / "coco.json", pieces())


def _yolo(output: pathlib.Path, results: Results, names: Sequence[str]) -> None:
    folder = output / "yolo"
    listed = [f"  {i}: {json.dumps(name, ensure_ascii=False)}\n" for i, name in enumerate(names)]
    head = f"{_YOLO_MARK}\ntrain: images\nval: images\nnc: {len(names)}\nnames:\n"
    files.write_text(folder / "data.yaml", [head, *listed])
    for old in ("images", "labels"):  # of an earlier run: its photos do not belong to this one
        shutil.rmtree(folder / old, ignore_errors=True)
        (folder / old).mkdir()
    stems = files.safe_names(path.stem for path, _ in results)
    for stem, (path, found) in zip(stems, results, strict=True):
        centers, sides = _centers_and_sides(found)
        columns = zip(found.labels.tolist(), centers.tolist(), sides.tolist(), strict=True)
        lines = [f"{label} {x:.6f} {y:.6f} {width:.6f} {height:.6f}\n" for label, (x, y), (width, height) in columns]
        files.write_text(folder / "labels" / f"{stem}.txt", lines)
        _link(path, folder / "images" / f"{stem}{path.suffix.lower()}")


def _link(path: pathlib.Path, target: pathlib.Path) -> None:
    """Makes a link to a photo, a copy where the file system has no links."""
    with contextlib.suppress(OSError):
        return target.symlink_to(os.path.realpath(path))
    shutil.copyfile(path, target)


def _label_studio(output: pathlib.Path, results: Results, names: Sequence[str]) -> None:
    root = root_of(results)

    def tasks() -> Iterator[dict[str, Any]]:
        for path, found in results:
            relative = os.fsencode(pathlib.Path(os.path.abspath(path)).relative_to(root.parent))
            result = list(_label_studio_regions(found))
            prediction: dict[str, Any] = {"model_version": "detclipv2_jax", "result": result}
            if result:
                prediction["score"] = round(float(np.mean(found.scores)), 6)
            yield {"data": {"image": LABEL_STUDIO_URL + urllib.parse.quote(relative)}, "predictions": [prediction]}

    files.write_text(output / "label_studio.json", _json_list(tasks()))
    labels = [f"    <Label value={xml.sax.saxutils.quoteattr(name)}/>\n" for name in names]
    lines = ["<View>\n", '  <Image name="image" value="$image"/>\n']
    lines += ['  <RectangleLabels name="label" toName="image">\n', *labels, "  </RectangleLabels>\n", "</View>\n"]
    files.write_text(output / "label_studio.xml", lines)


def _label_studio_regions(found: Found) -> Iterator[dict[str, Any]]:
    height, width = found.size
    whole = {"original_width": width, "original_height": height, "image_rotation": 0}
    centers, sides = _centers_and_sides(found)
    percent = (100 * np.concatenate([centers - sides / 2, sides], axis=1)).round(6)
    for i, (box, name, score) in enumerate(zip(percent.tolist(), found.names, found.scores, strict=True)):
        value = dict(zip(("x", "y", "width", "height"), box, strict=True))
        yield {
            "id": f"box{i}", "type": "rectanglelabels", "from_name": "label", "to_name": "image", **whole,
            "value": {**value, "rotation": 0, "rectanglelabels": [name]}, "score": float(str(score)),
        }  # fmt: skip


def _fiftyone(output: pathlib.Path, results: Results, names: Sequence[str]) -> None:
    stems = files.safe_names(path.stem for path, _ in results)

    def photos() -> Iterator[tuple[str, str]]:
        for stem, (path, _) in zip(stems, results, strict=True):
            yield f"{stem}{path.suffix}", os.path.abspath(path)

    def labels() -> Iterator[tuple[str, list[dict[str, Any]]]]:
        for stem, (_, found) in zip(stems, results, strict=True):
            centers, sides = _centers_and_sides(found)
            boxes = np.concatenate([centers - sides / 2, sides], axis=1).round(8).tolist()
            yield (
                stem,
                [
                    {"label": name, "bounding_box": box, "confidence": float(str(score))}
                    for name, box, score in zip(found.names, boxes, found.scores, strict=True)
                ],
            )

    files.write_text(output / "fiftyone" / "data.json", _json_object(photos()))
    head = f'{{"classes": {json.dumps(list(names), ensure_ascii=False)},\n"labels": '
    files.write_text(output / "fiftyone" / "labels.json", itertools.chain([head], _json_object(labels()), ["}\n"]))


def _centers_and_sides(found: Found) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n 2"]]:
    """Returns centers and sides of boxes (x, y) as shares of the photo's width and height."""
    height, width = found.size
    corners = found.boxes.astype(np.float64).reshape(-1, 2, 2) / (width, height)
    return corners.mean(axis=1), corners[:, 1] - corners[:, 0]


def _json_list(entries: Iterable[Any]) -> Iterator[str]:
    """Yields the text of a JSON list, an entry a line."""
    return _joined("[", "]", (json.dumps(entry, ensure_ascii=False) for entry in entries))


def _json_object(entries: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Yields the text of a JSON object, an entry a line."""
    return _joined("{", "}", (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries))


def _joined(first: str, last: str, entries: Iterable[str]) -> Iterator[str]:
    yield first
    for i, entry in enumerate(entries):
        yield ",\n" * (i > 0) + entry
    yield f"{last}\n"


FORMATS: dict[str, Callable[[pathlib.Path, Results, Sequence[str]], None]] = {
    "coco": _coco, "yolo": _yolo, "label_studio": _label_studio, "fiftyone": _fiftyone,
}  # fmt: skip
