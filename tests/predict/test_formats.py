"""Labels are read back by the tools that they are for, each with its own reader, where it is installed."""

import json
import os
import pathlib
import warnings
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from detclipv2_jax.inference import Found
from detclipv2_jax.predict import formats

NAMES = ("red car", 'the "big" <blue> & green: house', "Ärmel")


def make_found(size, boxes=(), scores=(), labels=()):
    return Found(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, int), NAMES, size
    )


@pytest.fixture
def results(tmp_path):
    """Photos of several folders and what was found on them; two have the same name, one has no box."""
    listed = []
    for name, found in {
        "a/1 & 2.png": make_found((60, 100), [[10, 20, 40, 50.5], [0, 0, 100, 60]], [0.9, 0.25], [2, 1]),
        "b/1 & 2.jpg": make_found((100, 60), [[0.125, 1, 3, 99]], [0.5], [0]),
        "é#%/photo 3.png": make_found((50, 50)),
        "B/PHOTO 3.PNG": make_found((7, 9), [[2, 3, 9, 7]], [1 / 3], [1]),
    }.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", found.size[::-1]).save(path)
        listed.append((path, found))
    return listed


def write(results, tmp_path, *names):
    output = tmp_path / "out"
    formats.check(names, output)
    formats.write(names, output, results, names=NAMES)
    return output


def rows_of(found):
    return sorted(zip(found.names, found.boxes.round(2).tolist(), strict=True))


def assert_same(results, read, *, atol=1e-3):
    """Checks boxes (xyxy px) and names by file; `read` has (name, box) of every real path."""
    assert {os.path.realpath(path) for path in read} == {os.path.realpath(path) for path, _ in results}
    read = {os.path.realpath(path): rows for path, rows in read.items()}
    for path, found in results:
        rows = sorted(read[os.path.realpath(path)], key=lambda row: (row[0], *row[1]))
        expected = sorted(zip(found.names, found.boxes.tolist(), strict=True), key=lambda row: (row[0], *row[1]))
        assert [name for name, _ in rows] == [name for name, _ in expected]
        for (_, box), (_, wanted) in zip(rows, expected, strict=True):
            np.testing.assert_allclose(box, wanted, atol=atol)


@pytest.fixture
def supervision():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("supervision")


def of_supervision(dataset):
    return {
        path: [(dataset.classes[i], box.tolist()) for i, box in zip(found.class_id, found.xyxy, strict=True)]
        for path, found in dataset.annotations.items()
    }


def test_supervision_reads_coco(results, tmp_path, supervision):
    output = write(results, tmp_path, "coco")
    photos = json.loads((output / "coco.json").read_text())["info"]["photos"]
    dataset = supervision.DetectionDataset.from_coco(photos, str(output / "coco.json"))
    assert dataset.classes == list(NAMES)
    assert_same(results, of_supervision(dataset))


def test_supervision_reads_yolo(results, tmp_path, supervision):
    for _ in range(2):  # a second run replaces the first
        output = write(results, tmp_path, "yolo")
    folder = output / "yolo"
    dataset = supervision.DetectionDataset.from_yolo(
        str(folder / "images"), str(folder / "labels"), str(folder / "data.yaml")
    )
    assert dataset.classes == list(NAMES)
    assert_same(results, of_supervision(dataset))
    assert len(list((folder / "labels").iterdir())) == len(results)


def test_labels_of_yolo_are_as_documented(results, tmp_path):
    folder = write(results, tmp_path, "yolo") / "yolo"
    (folder / "images" / "old.png").write_bytes(b"")
    (folder / "labels" / "old.txt").write_bytes(b"")
    write(results, tmp_path, "yolo")  # what is not of this run goes
    assert sorted(path.suffix for path in (folder / "images").iterdir()) == [".jpg", ".png", ".png", ".png"]
    photo_of = {path.stem: os.path.realpath(path) for path in (folder / "images").iterdir()}
    label_of = {photo_of[path.stem]: path.read_text() for path in (folder / "labels").iterdir()}
    assert [label_of[os.path.realpath(path)] for path, _ in results] == [
        "2 0.250000 0.587500 0.300000 0.508333\n1 0.500000 0.500000 1.000000 1.000000\n",
        "0 0.026042 0.500000 0.047917 0.980000\n",
        "",
        "1 0.611111 0.714286 0.777778 0.571429\n",
    ]


def test_photos_of_coco_have_their_sizes_and_boxes_their_scores(results, tmp_path):
    content = json.loads((write(results, tmp_path, "coco") / "coco.json").read_text())
    assert content["info"]["photos"] == str(tmp_path / "photos")
    assert [(row["id"], row["height"], row["width"]) for row in content["images"]] == [
        (1, 60, 100), (2, 100, 60), (3, 50, 50), (4, 7, 9)
    ]  # fmt: skip
    assert content["images"][0]["file_name"] == "a/1 & 2.png"
    assert content["categories"] == [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
    assert content["annotations"][2] == {
        "id": 3, "image_id": 2, "category_id": 1, "bbox": [0.125, 1.0, 2.875, 98.0], "score": 0.5, "area": 281.75,
        "iscrowd": 0,
    }  # fmt: skip
    assert [row["image_id"] for row in content["annotations"]] == [1, 1, 2, 4]


def test_pycocotools_scores_coco_against_itself(results, tmp_path):
    from detclipv2_jax.eval import coco

    output = write(results, tmp_path, "coco")
    content = json.loads((output / "coco.json").read_text())
    scores = coco.evaluate(content, content["annotations"])
    assert scores["AP"] == pytest.approx(1.0)


def test_label_studio_reads_its_tasks(results, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interface = pytest.importorskip("label_studio_sdk.label_interface")
        converter = pytest.importorskip("label_studio_sdk.converter")
    output = write(results, tmp_path, "label_studio")
    config = (output / "label_studio.xml").read_text()
    label_interface = interface.LabelInterface(config)
    label_interface.validate()
    tasks = json.loads((output / "label_studio.json").read_text())
    for task in tasks:
        assert label_interface.validate_prediction(task["predictions"][0], return_errors=True) == []
    assert not label_interface.validate_prediction(
        {"result": [{**tasks[0]["predictions"][0]["result"][0], "from_name": "other"}]}
    )
    # as exported again, once a person has accepted the predictions
    accepted = [{"id": i, "data": task["data"], "annotations": task["predictions"]} for i, task in enumerate(tasks)]
    (tmp_path / "export.json").write_text(json.dumps(accepted))
    converter.Converter(config, str(tmp_path), download_resources=False).convert_to_coco(
        str(tmp_path / "export.json"), str(tmp_path / "exported"), is_dir=False
    )
    exported = json.loads((tmp_path / "exported" / "result.json").read_text())
    names = {category["id"]: category["name"] for category in exported["categories"]}
    for i, (_, found) in enumerate(results):
        rows = [row for row in exported["annotations"] if row["image_id"] == exported["images"][i]["id"]]
        boxes = [np.add(row["bbox"], [0, 0, *row["bbox"][:2]]).round(2).tolist() for row in rows]
        read = sorted(zip([names[row["category_id"]] for row in rows], boxes, strict=True))
        assert [name for name, _ in read] == [name for name, _ in rows_of(found)]
        np.testing.assert_allclose([box for _, box in read], [box for _, box in rows_of(found)], atol=0.02)


def test_label_studio_tasks_are_as_documented(results, tmp_path):
    output = write(results, tmp_path, "label_studio")
    tasks = json.loads((output / "label_studio.json").read_text())
    assert [task["data"]["image"] for task in tasks[::2]] == [
        "/data/local-files/?d=photos/a/1%20%26%202.png",
        "/data/local-files/?d=photos/%C3%A9%23%25/photo%203.png",
    ]
    scores = [task["predictions"][0].get("score") for task in tasks]
    assert scores == [pytest.approx(0.575), 0.5, None, pytest.approx(1 / 3, abs=1e-6)]  # the mean of the boxes
    areas = [
        row["area"] for row in json.loads((write(results, tmp_path, "coco") / "coco.json").read_text())["annotations"]
    ]
    assert areas == [915, 6000, 281.75, 28]
    first, second = tasks[0]["predictions"][0]["result"]
    assert first == {
        "id": "box0",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": 100,
        "original_height": 60,
        "image_rotation": 0,
        "value": {
            "x": 10.0,
            "y": 33.333333,
            "width": 30.0,
            "height": 50.833333,
            "rotation": 0,
            "rectanglelabels": ["Ärmel"],
        },
        "score": 0.9,
    }
    assert second["value"]["rectanglelabels"] == [NAMES[1]]
    view = xml.etree.ElementTree.parse(output / "label_studio.xml").getroot()
    assert view.find("Image").attrib == {"name": "image", "value": "$image"}
    assert view.find("RectangleLabels").attrib == {"name": "label", "toName": "image"}
    assert tuple(label.get("value") for label in view.iter("Label")) == NAMES


@pytest.fixture
def importers(monkeypatch):
    """FiftyOne's readers of folders, which need no database."""
    monkeypatch.setenv("FIFTYONE_DISABLE_SERVICES", "1")
    monkeypatch.setenv("FIFTYONE_DO_NOT_TRACK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("fiftyone")
        import fiftyone.utils.coco
        import fiftyone.utils.data.importers
        import fiftyone.utils.yolo
    return fiftyone.utils


def of_fiftyone(importer, results):
    """Returns (name, box) by path, and all scores, from one of FiftyOne's importers."""
    sizes = {os.path.realpath(path): found.size for path, found in results}
    read, scores = {}, {}
    importer.setup()
    for path, _, label in importer:
        height, width = sizes[os.path.realpath(path)]
        label = label.get("detections") if isinstance(label, dict) else label
        detections = [] if label is None else label.detections
        corners = [np.array(one.bounding_box) * [width, height, width, height] for one in detections]
        corners = [np.concatenate([box[:2], box[:2] + box[2:]]).tolist() for box in corners]
        read[path] = [(one.label, box) for one, box in zip(detections, corners, strict=True)]
        scores[os.path.realpath(path)] = sorted(one.confidence or 0.0 for one in detections)
    return read, scores


def test_fiftyone_reads_its_own_format_and_the_others(results, tmp_path, importers):
    output = write(results, tmp_path, "fiftyone", "coco", "yolo")
    expected = {os.path.realpath(path): sorted(found.scores.tolist()) for path, found in results}
    own = importers.data.importers.FiftyOneImageDetectionDatasetImporter(
        dataset_dir=str(output / "fiftyone"), data_path="data.json"
    )
    photos = json.loads((output / "coco.json").read_text())["info"]["photos"]
    coco = importers.coco.COCODetectionDatasetImporter(data_path=photos, labels_path=str(output / "coco.json"))
    for importer in (own, coco):
        read, scores = of_fiftyone(importer, results)
        assert_same(results, read)
        assert {path: pytest.approx(values) for path, values in scores.items()} == expected
    yolo = importers.yolo.YOLOv5DatasetImporter(dataset_dir=str(output / "yolo"), yaml_path="data.yaml", split="train")
    read, _ = of_fiftyone(yolo, results)
    assert_same(results, read)


def test_the_file_for_fiftyone_is_as_documented(results, tmp_path):
    output = write(results, tmp_path, "fiftyone")
    content = json.loads((output / "fiftyone" / "labels.json").read_text())
    assert content["classes"] == list(NAMES)
    photos = json.loads((output / "fiftyone" / "data.json").read_text())
    assert list(photos.values()) == [str(path) for path, _ in results]
    labels = {os.path.splitext(name)[0]: content["labels"][os.path.splitext(name)[0]] for name in photos}
    assert labels == content["labels"]
    first, second, third, _ = labels.values()
    assert [row["label"] for row in first] == ["Ärmel", NAMES[1]]
    box = pytest.approx([0.125 / 60, 0.01, 2.875 / 60, 0.98], abs=1e-8)
    assert second == [{"label": "red car", "bounding_box": box, "confidence": 0.5}]
    assert third == []


def test_photos_are_linked_not_copied_and_files_of_others_stay(results, tmp_path):
    output = write(results, tmp_path, "yolo")
    images = sorted((output / "yolo" / "images").iterdir())
    assert all(path.is_symlink() for path in images)
    assert (output / "yolo" / "data.yaml").read_text().splitlines()[1:] == [
        "train: images",
        "val: images",
        "nc: 3",
        "names:",
        *(f"  {i}: {json.dumps(name, ensure_ascii=False)}" for i, name in enumerate(NAMES)),
    ]
    (output / "yolo" / "data.yaml").write_text("names: [mine]\n")
    with pytest.raises(ValueError, match="yolo was written by another program; choose another folder"):
        formats.check(["yolo"], output)
    with pytest.raises(ValueError, match="there is no format 'voc'; there are coco, yolo, label_studio, fiftyone"):
        formats.check(["coco", "voc"], output)


def test_a_file_system_without_links_gets_copies(results, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("no links here")

    monkeypatch.setattr(pathlib.Path, "symlink_to", refuse)
    output = write(results, tmp_path, "yolo")
    copies = [path for path in (output / "yolo" / "images").iterdir() if not path.is_symlink()]
    assert len(copies) == len(results)
    assert {path.read_bytes() for path in copies} == {path.read_bytes() for path, _ in results}


def test_nothing_found_at_all_is_written_too(tmp_path):
    output = write([], tmp_path, *formats.FORMATS)
    assert json.loads((output / "coco.json").read_text())["images"] == []
    assert json.loads((output / "label_studio.json").read_text()) == []
    assert json.loads((output / "fiftyone" / "labels.json").read_text())["labels"] == {}
    assert formats.root_of([]) == pathlib.Path.cwd()
