import json
import pathlib

import building
import numpy as np
import pytest
from PIL import Image

from detclipv2_jax.colors import PALETTE
from detclipv2_jax.data import scenes
from detclipv2_jax.data.schema import Batch, Kind
from detclipv2_jax.data.streams import train_streams
from detclipv2_jax.prepare import inspect


@pytest.fixture
def on_scenes(micro, tmp_path):
    """The micro configuration with its generated files."""
    sizes = {"num_detection": 12, "num_grounding": 12, "num_image_text": 12, "num_eval": 0}
    scenes.write(tmp_path / "data", **sizes, size_px=64, seed=0)
    for kind, key, file in (
        ("detection", "annotations", "detection.json"),
        ("grounding", "annotations", "grounding.json"),
        ("image_text", "pairs", "pairs.tsv"),
    ):
        micro[kind][key], micro[kind].images = str(tmp_path / "data" / file), str(tmp_path / "data")
    return micro


def check_pictures(folder, report):
    """Checks that there are sheets of two batches a stream and a histogram a quantity."""
    names = [f"{name.replace('/', '_')}_{n}.jpg" for name in report for n in range(2)]
    assert sorted(path.name for path in folder.glob("*.jpg")) == sorted(names)
    with Image.open(folder / "histograms.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[1] == 5 * 340  # what is the same everywhere is said below
    rows = np.array_split((pixels == np.array(PALETTE[0])).all(-1), 3)
    assert [sum(part.any() for part in np.array_split(row, 5, axis=1)) for row in rows] == [5, 5, 3]


def test_raw_files_are_counted_as_batches_have_them(on_scenes, tmp_path):
    report = inspect.inspect(str(tmp_path / "out"), config=on_scenes, num_examples=16)
    assert report == json.loads((tmp_path / "out" / "inspection.json").read_text())
    check_pictures(tmp_path / "out", report)
    assert list(report) == ["detection/64x64", "grounding/64x64", "image_text/64x64"]
    for stream in train_streams(on_scenes):
        batches, facts = [stream.batch(n) for n in range(2)], report[stream.name]
        assert (facts["images of an epoch"], facts["images counted"]) == (12, 16)
        assert facts["capacities"] == stream.capacities
        sizes = facts["photo: short side, px"]
        assert (sizes["smallest"], sizes["largest"], sizes["counts"]) == (64, 64, [16])
        for batch in batches:
            measured = inspect.measure(batch, stream.kind)
            assert (measured["tokens a concept of an image"] >= 3).all()
        if stream.kind is not Kind.IMAGE_TEXT:
            boxes = np.concatenate([batch.box_mask.sum(1) for batch in batches])
            found = facts["boxes an image"]
            assert dict(zip(found["edges"], found["counts"], strict=False)) == {
                n: int((boxes == n).sum()) for n in range(boxes.min(), boxes.max() + 1)
            }
            assert found["mean"] == round(boxes.mean(), 3)
            own = [{*batch.box_concepts[i][batch.box_mask[i]]} for batch in batches for i in range(8)]
        else:
            assert "boxes an image" not in facts
            assert "tokens a negative" not in facts
            own = [{*batch.caption_concepts[i][batch.caption_mask[i]]} for batch in batches for i in range(8)]
        assert facts["concepts an image"]["mean"] == round(np.mean([len(rows) for rows in own]), 3)
        assert sum(facts["tokens a concept of an image"]["counts"]) == sum(map(len, own))


def test_quantities_of_a_batch_by_hand():
    tokens = np.zeros((5, 4), np.int32)
    for row, num in enumerate((4, 3, 2, 3, 0)):
        tokens[row, :num] = 1
    mask = np.array([True, True, True, True, False])
    rows, used = np.array([[0, 1, 0], [1, 1, 2]]), np.array([[True, True, True], [True, True, False]])
    sizes, extent = np.array([[30, 90], [80, 20]]), np.array([[10, 30], [40, 9]])
    fields = dict.fromkeys(Batch._fields) | {"concept_tokens": tokens, "concept_mask": mask}
    fields |= {"original_size": sizes, "extent": extent}
    of_boxes = inspect.measure(Batch(**fields | {"box_concepts": rows, "box_mask": used}), Kind.GROUNDING)
    of_captions = inspect.measure(Batch(**fields | {"caption_concepts": rows, "caption_mask": used}), Kind.IMAGE_TEXT)
    expected = {
        "concepts an image": [2, 1], "tokens a concept of an image": [4, 3, 3], "tokens a negative": [2, 3],
        "photo: short side, px": [30, 20], "photo: long side, px": [90, 80], "on the canvas: short side, px": [10, 9],
    }  # fmt: skip
    assert {name: values.tolist() for name, values in of_captions.items()} == expected
    assert {name: values.tolist() for name, values in of_boxes.items()} == {"boxes an image": [3, 2]} | expected


def test_numbers_of_a_report_are_those_of_the_batches(on_scenes, tmp_path):
    on_scenes.grounding.annotations = on_scenes.grounding.images = ""
    on_scenes.image_text.pairs = on_scenes.image_text.images = ""
    on_scenes.detection.batch_size = 3
    (facts,) = inspect.inspect(str(tmp_path / "out"), config=on_scenes, num_examples=8).values()
    (stream,) = train_streams(on_scenes)
    assert (stream.batch_size, facts["images counted"]) == (3, 9)
    assert len([*(tmp_path / "out").glob("*.jpg")]) == 2
    boxes = np.concatenate([stream.batch(n).box_mask.sum(axis=1) for n in range(3)])
    found = facts["boxes an image"]
    assert (found["smallest"], found["median"], found["largest"]) == (boxes.min(), np.median(boxes), boxes.max())
    assert boxes.min() < np.median(boxes) < boxes.max()
    assert np.median(boxes) != boxes.mean()


def test_what_is_no_report_of_a_build_is_damaged(tmp_path):
    for content in ([], {}, {"kind": "boxes"}):
        (tmp_path / "build_report.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="is damaged: it does not say which kind of data"):
            inspect.inspect(str(tmp_path / "x"), folders=[str(tmp_path)])


def test_bins_are_whole_and_few():
    edges, counts = inspect.histogram(np.array([1, 3, 3]))
    assert (edges.tolist(), counts.tolist()) == ([1, 2, 3, 4], [1, 0, 2])
    edges, counts = inspect.histogram(np.arange(1, 1001))
    assert len(counts) <= 40
    assert counts.sum() == 1000
    assert set(np.diff(edges)) == {25}
    for largest, num in ((39, 40), (40, 21), (79, 40), (80, 27)):
        edges, counts = inspect.histogram(np.arange(largest + 1))
        assert (len(counts), counts.sum(), edges[0]) == (num, largest + 1, 0)


def test_built_folders_replace_what_the_configuration_names(on_scenes, tmp_path):
    data, out = tmp_path / "data", str(tmp_path / "built")
    building.build("coco_json", input=str(data / "detection.json"), output=out, images=str(data), shard_size=100)
    raw = inspect.inspect(str(tmp_path / "raw"), config=on_scenes, num_examples=8)
    built = inspect.inspect(str(tmp_path / "out"), config=on_scenes, folders=[out], num_examples=8)
    assert list(built) == ["detection/64x64"]
    assert built["detection/64x64"] == raw["detection/64x64"]
    with pytest.raises(ValueError, match=r"is no folder that .* has built: it has no build_report\.json"):
        inspect.inspect(str(tmp_path / "x"), folders=[str(pathlib.Path(out) / "no")])
