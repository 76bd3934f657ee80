"""What is drawn for an example: scale, flip and negatives, over many draws; sizes of the concept table."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from conftest import detection_json, grounding_json
from ml_collections import ConfigDict

from detclipv2_jax.data import batches
from detclipv2_jax.data.batches import pixels_of, table_capacity
from detclipv2_jax.data.schema import Kind, Record
from detclipv2_jax.data.streams import train_streams


def stream_of(config, kind):
    return next(stream for stream in train_streams(config) if stream.kind is kind)


def flipped_rows(config, kind, num_batches):
    """Returns which images of the first batches are mirrored [batch, row]: those that differ from a stream without."""
    section = config[kind.value]
    section.short_side = (section.long_side, section.long_side)
    plain, found = section.copy_and_resolve_references(), []
    for prob in (0.0, section.flip_prob):
        section.flip_prob = prob
        stream = stream_of(config, kind)
        found.append([stream.batch(n) for n in range(num_batches)])
    section.update(plain)
    assert all(np.array_equal(a.example_id, b.example_id) for a, b in zip(*found, strict=True))
    return np.array([[np.any(x != y) for x, y in zip(a.image, b.image, strict=True)] for a, b in zip(*found)])  # noqa: B905


def test_a_share_of_the_images_is_mirrored_and_every_batch_draws_anew(config):
    config.image_text.flip_prob = 0.3
    flips = flipped_rows(config, Kind.IMAGE_TEXT, 60)
    assert 0.2 < flips.mean() < 0.4  # 240 draws: standard deviation 0.03
    assert len({tuple(row) for row in flips}) > 8  # of 16 patterns
    # neither the place in the batch nor the one before decides
    assert flips.mean(axis=0).min() > 0.15
    assert flips.mean(axis=0).max() < 0.45
    config.seed = 1
    other = flipped_rows(config, Kind.IMAGE_TEXT, 60)
    assert 0.2 < other.mean() < 0.4
    assert np.mean(other != flips) > 0.2
    for config.image_text.flip_prob in (0.0, 1.0):
        assert np.all(flipped_rows(config, Kind.IMAGE_TEXT, 4) == config.image_text.flip_prob)


def test_every_scale_of_the_range_is_drawn_evenly_both_ends_included(config):
    config.image_text.short_side, config.image_text.canvases = (40, 44), ((64, 96),)
    config.image_text.long_side = 96
    config.image_text.max_examples = 3  # the next photo is so long that its short side is bounded

    def sides():
        stream = stream_of(config, Kind.IMAGE_TEXT)
        return np.concatenate([stream.batch(n).extent.min(axis=1) for n in range(50)])

    drawn = sides()
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [40, 41, 42, 43, 44]
    assert counts.min() > 22  # 40 expected, standard deviation 5.7
    assert counts.max() < 58
    config.seed = 1
    assert np.mean(sides() != drawn) > 0.5


@pytest.mark.parametrize(
    ("caption", "mirrored"),
    [
        ("a cat left of a dog", False),
        ("Left of the tree", False),
        ("the RIGHTMOST cup", False),
        ("on the left, a horse", False),
        ("his left-hand glove", False),
        ("leftover food in bright light", True),
        ("an upright piano", True),
    ],
)
def test_captions_with_sides_are_not_mirrored_whatever_their_capitals(config, caption, mirrored):
    content = grounding_json()
    for image in content["images"]:
        image["caption"] = caption
    for annotation in content["annotations"]:
        annotation["tokens_positive"] = [[0, len(caption)]]
    pathlib.Path(config.grounding.annotations).write_text(json.dumps(content))
    config.grounding.flip_prob = 1.0
    assert np.all(flipped_rows(config, Kind.GROUNDING, 2) == mirrored)


def negatives(config, kind, n):
    """Returns the ids of the concepts of batch n, without those of its boxes."""
    batch = stream_of(config, kind).batch(n)
    ids = batch.concept_ids[:, 0].astype(np.uint64) << np.uint64(32) | batch.concept_ids[:, 1]
    return set(ids[batch.concept_mask].tolist()) - set(ids[batch.box_concepts[batch.box_mask]].tolist())


def test_negatives_differ_between_positions_epochs_seeds_and_images_of_a_batch(config, tmp_path):
    (tmp_path / "words.tsv").write_text("\n".join(f"thing {i} x" for i in range(2000)))
    config.grounding.dictionary, config.grounding.canvases = str(tmp_path / "words.tsv"), ((96, 96),)
    config.grounding.batch_size, config.grounding.num_concepts = 7, 22
    drawn = [negatives(config, Kind.GROUNDING, n) for n in range(4)]
    assert drawn[2] == negatives(config, Kind.GROUNDING, 2)
    # 7 images draw about 20 of 2,000 each: as good as all are different
    assert all(len(ids) > 120 for ids in drawn)
    config.seed = 1
    drawn += [negatives(config, Kind.GROUNDING, n) for n in range(4)]
    for i, ids in enumerate(drawn):
        for other in drawn[:i]:
            assert len(ids & other) < 0.2 * len(ids)  # 7% expected
    # one image a batch, at the same positions: the same negatives
    config.grounding.batch_size = 1
    assert set().union(*(negatives(config, Kind.GROUNDING, n) for n in range(7))) == drawn[4]


def test_the_largest_boxes_stay_in_their_order_the_first_of_equal_ones(config):
    content = detection_json()
    boxes = [[1, 2, 10, 12], [2, 3, 5, 5], [3, 4, 20, 9], [4, 5, 12, 10], [5, 6, 15, 8]]  # three are of 120 px
    content["annotations"] = [{"image_id": 10, "category_id": 1, "bbox": box} for box in boxes]
    pathlib.Path(config.detection.annotations).write_text(json.dumps(content))
    config.detection.max_examples, config.detection.max_boxes, config.detection.flip_prob = 1, 3, 0.0
    batch = stream_of(config, Kind.DETECTION).batch(0)
    for found, mask, scale in zip(batch.boxes, batch.box_mask, batch.scale, strict=True):
        lefts = found[mask, 0] / scale[1]
        np.testing.assert_allclose(lefts, [1, 3, 4], rtol=1e-5)


def test_texts_that_are_cut_and_files_that_cannot_be_read_are_counted(config, tmp_path):
    content = detection_json()
    for i, category in enumerate(content["categories"]):
        category["name"] = f"thing {i} " * 9
    pathlib.Path(config.detection.annotations).write_text(json.dumps(content))
    stream = stream_of(config, Kind.DETECTION)
    batch = stream.batch(0)
    assert stream.overflow["num_texts_truncated"] == batch.concept_mask.sum() > 1
    (pathlib.Path(config.image_text.images) / "3.jpg").unlink()
    (pathlib.Path(config.image_text.images) / "3.jpg").mkdir()
    for section in (config.detection, config.grounding):
        section.annotations = section.images = ""
    config.image_text.max_bad_share, config.image_text.batch_size = 0.2, 7
    stream = stream_of(config, Kind.IMAGE_TEXT)
    stream.batch(0)
    assert stream.counters["image of pairs skipped: unreadable file (NotRegularError)"] == 1


def test_photos_of_buckets_are_asked_for_before_they_are_read_and_those_of_the_next_batch_too(config, monkeypatch):
    asked = []

    def read(path):
        assert any(path in paths for paths in asked)
        return pathlib.Path(path).read_bytes()

    stream = stream_of(config, Kind.IMAGE_TEXT)
    monkeypatch.setattr(batches.buckets, "place_of", lambda path: path)
    monkeypatch.setattr(batches.buckets, "begin", lambda paths: asked.append([*paths]))
    monkeypatch.setattr(batches.files, "read_bytes", read)
    for step, numbers in ((0, [2]), (3, [2, 5])):
        asked.clear()
        stream._maker.make(2, step=step)
        places = [[stream._maker.place(position) for position in stream._maker.positions(n)] for n in numbers]
        assert asked == [[stream.sources[0].file(index) for _, _, index in rows] for rows in places]


@pytest.mark.parametrize(
    ("options", "num_rows"),
    [
        ({"num_images": 4, "table_multiple": 1}, 40),
        ({"num_images": 3, "table_multiple": 1}, 32),  # 30 in eights
        ({"num_images": 8, "table_multiple": 1}, 80),
        ({"num_images": 4, "table_multiple": 16}, 48),
        ({"num_images": 4, "table_multiple": 12}, 48),  # 24 is the least common multiple with 8
        ({"num_images": 4, "table_multiple": 1, "most_concepts": 12}, 48),
        ({"num_images": 4, "table_multiple": 1, "most_concepts": 3}, 40),
        ({"num_images": 4, "table_multiple": 1, "num_known": 17}, 24),
        ({"num_images": 4, "table_multiple": 1, "num_known": 1000}, 40),
    ],
)
def test_rows_of_the_concept_table(options, num_rows):
    section = ConfigDict({"num_concepts": 10, "max_concepts": 0, "max_phrases": 9})
    assert table_capacity(section, Kind.DETECTION, **options) == num_rows
    if "most_concepts" not in options:  # the caption and 9 phrases: 10 again
        assert table_capacity(section, Kind.IMAGE_TEXT, **options) == num_rows
    section.max_concepts = 9
    assert table_capacity(section, Kind.DETECTION, **options) == {16: 16, 12: 24}.get(options["table_multiple"], 16)


def test_pixels_are_those_of_the_record_or_of_its_file(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"data")
    record = Record(
        kind=Kind.DETECTION, source="s", example_id=0, image=str(tmp_path / "a.jpg"), size=(0, 0),
        boxes=np.zeros((0, 4)), concepts=(), box_concepts=np.zeros(0, int),
    )  # fmt: skip
    assert pixels_of(record) == b"data"
    for image in (b"encoded", np.zeros((2, 2, 3), np.uint8)):
        assert pixels_of(dataclasses.replace(record, image=image)) is image
    with pytest.raises(FileNotFoundError):
        pixels_of(dataclasses.replace(record, image=str(tmp_path / "b.jpg")))
