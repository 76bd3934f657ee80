import dataclasses
import hashlib
import itertools
import json
import pathlib
import subprocess
import sys
import threading
import types

import building
import jax
import numpy as np
import pytest
from conftest import CAPTIONS, NAMES, PHRASES, SIZES, detection_json, write_image

from detclipv2_jax.data import streams, tokenizer
from detclipv2_jax.data.schema import Batch, DataError, Kind, StalledError
from detclipv2_jax.data.streams import eval_streams, train_streams
from detclipv2_jax.runs import sharding


def by_name(streams):
    return {stream.name: stream for stream in streams}


def text_ids(texts):
    return [tuple(row) for row in tokenizer.tokenize(texts).tolist()]


def names_of_table(batch):
    """Returns the words of each row of the table, from those the test knows; rows in use only."""
    known = [name.replace("_", " ") for name in NAMES] + CAPTIONS + [p for phrases in PHRASES for p in phrases]
    lookup = dict(zip(text_ids(known), known, strict=True))
    return [lookup[tuple(row)] for row in batch.concept_tokens[batch.concept_mask].tolist()]


def assert_equal(left: Batch, right: Batch):
    for field, a, b in zip(Batch._fields, left, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=field)
        assert np.asarray(a).dtype == np.asarray(b).dtype, field


def rows_of(batch):
    """Returns what a batch says of each image, independent of the order of its table."""
    rows = []
    for i in range(len(batch.image)):
        boxes = [
            (*box, *batch.concept_tokens[row].tolist())
            for box, row in zip(
                batch.boxes[i][batch.box_mask[i]].tolist(), batch.box_concepts[i][batch.box_mask[i]], strict=True
            )
        ]
        captions = batch.concept_tokens[batch.caption_concepts[i][batch.caption_mask[i]]].tolist()
        rows.append((batch.image[i].tobytes(), batch.extent[i].tolist(), int(batch.example_id[i]), boxes, captions))
    return rows


def test_streams_in_order_with_static_shapes(config):
    streams = train_streams(config, table_multiple=3)
    assert [(s.name, s.kind, s.canvas, s.num_examples, s.num_batches) for s in streams] == [
        ("detection/64x96", Kind.DETECTION, (64, 96), 4, 1),
        ("detection/96x64", Kind.DETECTION, (96, 64), 3, 1),
        ("grounding/64x96", Kind.GROUNDING, (64, 96), 4, 1),
        ("grounding/96x64", Kind.GROUNDING, (96, 64), 3, 1),
        ("image_text/64x64", Kind.IMAGE_TEXT, (64, 64), 7, 2),
    ]
    expected = {Kind.DETECTION: (5, 24, 0), Kind.GROUNDING: (5, 24, 0), Kind.IMAGE_TEXT: (0, 48, 9)}
    for stream in streams:
        batch = stream.batch(3)
        n, t, m = expected[stream.kind]
        assert stream.capacities == {"boxes": n, "table": t, "captions": m}
        assert {name: (a.shape, a.dtype.name) for name, a in batch._asdict().items() if a is not None} == {
            "image": ((4, *stream.canvas, 3), "uint8"),
            "extent": ((4, 2), "int32"),
            "scale": ((4, 2), "float32"),
            "original_size": ((4, 2), "int32"),
            "image_mask": ((4,), "bool"),
            "example_id": ((4,), "int32"),
            "boxes": ((4, n, 4), "float32"),
            "box_mask": ((4, n), "bool"),
            "box_concepts": ((4, n), "int32"),
            "concept_tokens": ((t, 16), "int32"),
            "concept_mask": ((t,), "bool"),
            "concept_ids": ((t, 2), "uint32"),
            "caption_concepts": ((4, m), "int32"),
            "caption_mask": ((4, m), "bool"),
        }
        assert batch.image_mask.all()


def test_what_is_padded_is_zero_and_masked(config):
    for stream in train_streams(config):
        batch = stream.batch(1)
        for image, (height, width), scale, size in zip(
            batch.image, batch.extent, batch.scale, batch.original_size, strict=True
        ):
            assert image[:height, :width].any()
            assert not image[height:].any()
            assert not image[:, width:].any()
            np.testing.assert_allclose(scale, np.array([height, width]) / size, rtol=1e-6)
        assert not batch.boxes[~batch.box_mask].any()
        assert not batch.box_concepts[~batch.box_mask].any()
        assert not batch.caption_concepts[~batch.caption_mask].any()
        assert not batch.concept_tokens[~batch.concept_mask].any()
        ids = batch.concept_ids[batch.concept_mask]
        assert len(np.unique(ids, axis=0)) == len(ids)


def test_batch_is_a_pure_function_of_n(config):
    first, second = train_streams(config), train_streams(config)
    for one, other in zip(first, second, strict=True):
        other.batch(7)
        other.batch(0)
        for n in (0, 5, 2):
            assert_equal(one.batch(n), other.batch(n))


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_iterating_from_anywhere_gives_the_same(config, num_threads):
    config.input.num_threads, config.input.prefetch_batches = num_threads, 3
    for stream in train_streams(config):
        iterator = stream.iterate(4)
        for n in range(4, 7):
            assert_equal(next(iterator), stream.batch(n))
        iterator.close()


@pytest.mark.slow
def test_worker_processes_give_the_same(config):
    config.input.num_workers = 2
    stream = train_streams(config)[-1]
    iterator = stream.iterate(3)
    for n in range(3, 7):
        assert_equal(next(iterator), stream.batch(n))
    iterator.close()


@pytest.mark.parametrize("kind", ["detection", "grounding", "image_text"])
def test_union_over_hosts_is_the_same_for_1_2_and_4_hosts(config, kind):
    streams = {count: [by_name(train_streams(config, process_index=i, process_count=count)) for i in range(count)]
               for count in (1, 2, 4)}  # fmt: skip
    for name in streams[1][0]:
        if not name.startswith(kind):
            continue
        for n in (0, 3):
            whole = streams[1][0][name].batch(n)
            for count in (2, 4):
                parts = [hosts[name].batch(n) for hosts in streams[count]]
                assert list(itertools.chain.from_iterable(map(rows_of, parts))) == rows_of(whole)
                ids = {tuple(row) for part in parts for row in part.concept_ids[part.concept_mask].tolist()}
                assert ids == {tuple(row) for row in whole.concept_ids[whole.concept_mask].tolist()}


def test_every_epoch_has_its_own_permutation(config):
    config.image_text.batch_size = 1
    stream = train_streams(config)[-1]
    ids = [int(stream.batch(n).example_id[0]) for n in range(7 * 4)]
    epochs = [ids[i : i + 7] for i in range(0, len(ids), 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    config.seed = 1
    assert [int(train_streams(config)[-1].batch(n).example_id[0]) for n in range(7)] != epochs[0]


def test_a_batch_may_cross_epochs(config):
    config.image_text.batch_size = 12
    batch = train_streams(config)[-1].batch(0)
    assert sorted(batch.example_id[:7].tolist()) == list(range(7))


def test_scales_are_drawn_from_the_range(config):
    config.detection.batch_size = 16
    stream = train_streams(config)[0]
    assert stream.num_batches == 1  # of 4 examples
    extents = np.concatenate([stream.batch(n).extent for n in range(4)])
    short = extents.min(axis=1)
    assert short.min() >= 28  # a 40 × 120 photo is bounded by the canvas' width: 96 / 120 * 40 = 32
    assert short.max() <= 64
    assert len(np.unique(short)) > 8


def test_flip_mirrors_pixels_boxes_and_no_caption_with_sides(config):
    config.detection.short_side = config.grounding.short_side = (64, 64)
    config.image_text.flip_prob = config.detection.flip_prob = config.grounding.flip_prob = 0.0
    config.detection.unflippable_words = ("tree",)
    plain = by_name(train_streams(config))
    config.image_text.flip_prob = config.detection.flip_prob = config.grounding.flip_prob = 1.0
    flipped = by_name(train_streams(config))
    for name, stream in plain.items():
        one, other = stream.batch(0), flipped[name].batch(0)
        np.testing.assert_array_equal(one.example_id, other.example_id)
        for i, (_, width) in enumerate(one.extent):
            example = one.example_id[i]
            has_tree = "tree" in [NAMES[(example + k) % 6] for k in range(2)]
            keeps = {"detection": has_tree, "grounding": "left" in CAPTIONS[example]}.get(name.split("/")[0], False)
            expected = one.image[i] if keeps else np.roll(one.image[i][:, ::-1], width - one.image.shape[2], axis=1)
            assert np.abs(other.image[i].astype(int) - expected).max() <= 3
            boxes = one.boxes[i].copy()
            if not keeps:
                mask = one.box_mask[i]
                boxes[mask] = np.stack(
                    [width - boxes[mask, 2], boxes[mask, 1], width - boxes[mask, 0], boxes[mask, 3]], 1
                )
            np.testing.assert_allclose(other.boxes[i], boxes, atol=1e-4)
    captions = [CAPTIONS[i] for s in ("64x96", "96x64") for i in plain[f"grounding/{s}"].batch(0).example_id]
    assert any("left" in caption for caption in captions)


def test_boxes_carry_their_names_and_places(config):
    for stream in train_streams(config)[:2]:
        batch = stream.batch(2)
        table = names_of_table(batch)
        assert set(table) == {name.replace("_", " ") for name in NAMES}
        for i, example in enumerate(batch.example_id):
            expected = [NAMES[(example + k) % 6].replace("_", " ") for k in range(2)]
            assert [table[row] for row in batch.box_concepts[i][batch.box_mask[i]]] == expected
            widths = batch.boxes[i, :2, 2] - batch.boxes[i, :2, 0]
            np.testing.assert_allclose(widths, np.array([20, 30]) * batch.scale[i, 1], rtol=1e-4)


def test_ids_of_concepts_are_both_halves_of_a_hash_of_their_tokens(config):
    for stream in train_streams(config):
        batch = stream.batch(0)
        for tokens, (high, low) in zip(batch.concept_tokens[batch.concept_mask], batch.concept_ids, strict=False):
            digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
            assert (int(high) << 32) + int(low) == int.from_bytes(digest, "big")


def test_num_concepts_bounds_positives_and_negatives_of_an_image(config):
    config.detection.batch_size, config.detection.num_concepts = 1, 4
    batches = [train_streams(config)[0].batch(n) for n in range(6)]
    assert all(batch.concept_mask.sum() == 4 for batch in batches)
    assert len({tuple(names_of_table(batch)) for batch in batches}) > 2
    config.detection.num_concepts = 1  # positives are never cut
    assert train_streams(config)[0].batch(0).concept_mask.sum() == 2


def test_full_table_cuts_negatives_and_counts_them(config):
    config.detection.max_concepts = 1  # rounded up to 8
    config.detection.num_concepts = 150
    content = detection_json()
    content["categories"] += [{"id": 100 + i, "name": f"thing {i} x"} for i in range(30)]
    pathlib.Path(config.detection.annotations).write_text(json.dumps(content))
    stream = train_streams(config)[0]
    batch = stream.batch(0)
    assert batch.concept_mask.sum() == len(batch.concept_mask) == 8
    assert stream.counters["negatives cut: concept table full"] == stream.overflow["num_negatives_cut"] == 36 - 8
    stream.batch(1)
    assert stream.counters["negatives cut: concept table full"] == 2 * 28
    assert stream.overflow["num_negatives_cut"] == 28  # of one batch
    rows = np.unique(batch.box_concepts[batch.box_mask])
    assert rows.tolist() == list(range(len(rows)))  # positives come first


def test_too_many_boxes_lose_the_smallest(config):
    config.detection.max_boxes = 1
    content = detection_json()
    small = [{"image_id": image["id"], "category_id": 1, "bbox": [0, 0, 4, 3]} for image in content["images"]]
    content["annotations"] = small + content["annotations"]
    pathlib.Path(config.detection.annotations).write_text(json.dumps(content))
    stream = train_streams(config)[0]
    batch = stream.batch(0)
    areas = np.prod((batch.boxes[:, 0, 2:] - batch.boxes[:, 0, :2]) / batch.scale[:, ::-1], axis=1)
    np.testing.assert_allclose(areas, 30 * 25, rtol=1e-4)
    table = names_of_table(batch)
    names = [NAMES[(example + 1) % 6].replace("_", " ") for example in batch.example_id]  # of the second box
    assert [table[row] for row in batch.box_concepts[:, 0]] == names
    assert stream.counters["boxes cut: more than max_boxes"] == stream.overflow["num_boxes_cut"] == 4 * 2


@pytest.mark.parametrize(("limit", "kept"), [(8, [0, 1, 3, 4, 5]), (2, [0, 1, 3]), (1, [0, 3])])
def test_identical_boxes_keep_their_different_concepts(config, limit, kept):
    """Six boxes, two of them different; those of one are cat, dog, cat again, tree and cup."""
    content = detection_json()
    boxes, image = ([5, 6, 20, 10], [10, 4, 30, 25]), content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != image] + [
        {"id": 100 + i, "image_id": image, "category_id": category, "bbox": boxes[box]}
        for i, (category, box) in enumerate([(1, 0), (2, 0), (1, 0), (3, 1), (4, 0), (6, 0)])
    ]
    pathlib.Path(config.detection.annotations).write_text(json.dumps(content))
    config.detection.max_boxes, config.detection.max_box_concepts, config.detection.flip_prob = 6, limit, 0.0
    config.detection.max_examples = 1
    stream = train_streams(config)[0]
    batch = stream.batch(0)
    categories = [1, 2, 1, 3, 4, 6]
    expected = [NAMES[categories[i] - 1].replace("_", " ") for i in kept]
    texts = tokenizer.decode(batch.concept_tokens)
    for row in range(4):
        mask = batch.box_mask[row]
        assert [texts[i] for i in batch.box_concepts[row][mask]] == expected
        assert np.unique(batch.boxes[row][mask], axis=0).shape == (2, 4)
    assert stream.overflow["num_box_concepts_cut"] == 4 * (5 - len(kept))


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (6, ["cat", "bird", "dog", "tree", "boat", "car"]),
        (5, ["cat", "bird", "dog", "tree", "boat"]),
        (4, ["cat", "dog", "tree", "car"]),  # the second place has two
        (3, ["cat", "dog", "tree"]),
        (2, ["bird", "boat"]),
        (1, ["car"]),
    ],
)
def test_a_place_stays_with_all_its_concepts_or_goes(config, limit, kept):
    """The largest place is cat, dog and tree; another bird and boat; the smallest is a car."""
    large, middle, small = [5, 6, 20, 20], [10, 4, 15, 15], [3, 4, 10, 8]
    content = detection_json()
    names, image = ["cat", "bird", "dog", "tree", "boat", "car"], content["images"][0]["id"]
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    content["annotations"] = [
        {"id": i, "image_id": image, "category_id": i, "bbox": box}
        for i, box in enumerate((large, middle, large, large, middle, small), 1)
    ]
    pathlib.Path(config.detection.annotations).write_text(json.dumps(content))
    config.detection.max_boxes, config.detection.max_examples = limit, 1
    stream = train_streams(config)[0]
    batch = stream.batch(0)
    texts = tokenizer.decode(batch.concept_tokens)
    assert [texts[row] for row in batch.box_concepts[0][batch.box_mask[0]]] == kept
    assert stream.overflow["num_boxes_cut"] == 4 * (6 - len(kept))


def test_definitions_join_the_names(config, tmp_path):
    (tmp_path / "dictionary.tsv").write_text("cat\ta small animal\nboat\ta vessel\nstone\ta rock\n")
    for kind in ("detection", "grounding", "image_text"):
        config[kind].dictionary, config[kind].definitions = str(tmp_path / "dictionary.tsv"), True
    streams = train_streams(config)
    tokens = {tuple(row) for row in streams[0].batch(0).concept_tokens.tolist()}
    assert set(text_ids(["cat, a small animal", "dog"])) <= tokens
    batch = streams[0].batch(0)
    positives = {tuple(batch.concept_tokens[row].tolist()) for row in np.unique(batch.box_concepts[batch.box_mask])}
    assert set(text_ids(["cat, a small animal"])) <= positives
    assert not set(text_ids(["cat"])) & tokens
    # grounding draws its negatives from the dictionary, never what the caption names
    batch = streams[2].batch(0)
    tokens = {tuple(row) for row in batch.concept_tokens.tolist()}
    assert set(text_ids(["stone, a rock", "a cat, a small animal"])) & tokens
    assert set(text_ids(["boat, a vessel"])) <= tokens
    tokens = {tuple(row) for row in streams[4].batch(0).concept_tokens.tolist()}
    assert set(text_ids(CAPTIONS)) & tokens


def test_grounding_concepts(config):
    config.grounding.batch_size = 1
    for stream in train_streams(config)[2:4]:
        for n in range(4):
            batch = stream.batch(n)
            table, example = names_of_table(batch), int(batch.example_id[0])
            assert [table[row] for row in batch.box_concepts[0][batch.box_mask[0]]] == PHRASES[example]
            negatives = set(table) - set(PHRASES[example])
            assert len(negatives) > 3
            assert not any(name.removeprefix("a ") in CAPTIONS[example] for name in negatives)


def test_detection_negatives_respect_the_federated_lists(config):
    content = detection_json()
    content["categories"] += [{"id": 100 + i, "name": f"thing {i} x"} for i in range(40)]
    for image in content["images"]:  # verified absent: 100 to 102; perhaps there, without boxes: 110 to 139
        image |= {"neg_category_ids": [100, 101, 102], "not_exhaustive_category_ids": list(range(110, 140))}
    pathlib.Path(config.detection.annotations).write_text(json.dumps(content))
    config.detection.batch_size, config.detection.num_concepts = 1, 7
    config.detection.federated = False
    known = dict(zip(text_ids([x["name"].replace("_", " ") for x in content["categories"]]), content["categories"]))  # noqa: B905
    drawn = set()
    for n in range(12):
        batch = train_streams(config)[0].batch(n)
        ids = {known[tuple(row)]["id"] for row in batch.concept_tokens[batch.concept_mask].tolist()}
        own = {1 + (int(batch.example_id[0]) + k) % 6 for k in range(2)}
        assert len(ids) == 7
        assert ids >= own | {100, 101, 102}
        assert not ids & set(range(110, 140))
        drawn |= ids - own
    assert len(drawn - {100, 101, 102}) > 8  # beyond the lists any category may come


def federated_of(batch):
    """Returns for each federated image the names that it was annotated for, None for others."""
    texts = tokenizer.decode(batch.concept_tokens)
    rows = zip(*batch.federated, strict=True)
    return [{texts[i] for i in concepts[mask]} if image else None for image, concepts, mask in rows]


@pytest.mark.parametrize("field", ["neg_category_ids", "not_exhaustive_category_ids"])
def test_one_field_makes_a_json_federated(config, field):
    """Nothing is known of a name that an image does not list, whatever the whole batch holds."""
    content = detection_json()
    lists = {10: [5], 11: [6, 3], 12: []}  # images 10 to 16 have categories i - 9 and i - 8, in a circle
    for image in content["images"][:3]:
        image[field] = lists[image["id"]]
    pathlib.Path(config.detection.annotations).write_text(json.dumps(content))
    config.detection.canvases, config.detection.batch_size = ((96, 96),), 7
    names = [name.replace("_", " ") for name in NAMES]
    batch = train_streams(config)[0].batch(0)
    for example, found in zip(batch.example_id, federated_of(batch), strict=True):
        own = {names[(example + k) % 6] for k in range(2)}
        listed = {names[i - 1] for i in lists.get(10 + example, [])}
        assert found == (own | listed if field == "neg_category_ids" else own - listed), example
    config.detection.federated = False
    assert train_streams(config)[0].batch(0).federated is None
    config.detection.federated = True
    assert all(stream.batch(0).federated is None for stream in train_streams(config)[1:])  # of other kinds


def test_only_as_many_verified_negatives_as_there_is_room_for_and_never_what_is_doubtful(config):
    content = detection_json()
    content["categories"] += [{"id": 100 + i, "name": f"thing {i} x"} for i in range(40)]
    # image 0: cat and dog are there, not every dog has a box; "big things" is the plural of a verified name
    content["categories"] += [
        {"id": 200 + i, "name": name} for i, name in enumerate(("big things", "big thing", "cats"))
    ]
    negatives = [1, 201, 202, *range(100, 130)]
    content["images"][0] |= {"neg_category_ids": negatives, "not_exhaustive_category_ids": [2, 103]}
    pathlib.Path(config.detection.annotations).write_text(json.dumps(content))
    config.detection.canvases, config.detection.batch_size, config.detection.max_examples = ((96, 96),), 1, 1
    drawn, things = [], {f"thing{i}x" for i in range(30)}
    for config.detection.num_concepts in (12, 60):
        config.detection.max_concepts = 0
        stream = train_streams(config)[0]
        for n in range(6):
            batch = stream.batch(n)
            [known] = federated_of(batch)
            texts = set(tokenizer.decode(batch.concept_tokens[batch.concept_mask]))
            assert known == texts - {"dog"}  # nothing else is in the table
            assert {text.replace(" ", "") for text in known} <= {"cat", "bigthing", *things} - {"thing3x"}
            assert len(texts) == min(config.detection.num_concepts, 2 + 30)
            assert batch.federated.mask.shape == (1, config.detection.num_concepts)
            drawn.append(known)
    assert len({*map(frozenset, drawn[:6])}) > 3
    config.detection.max_concepts = 8  # a table too small for them
    [known] = federated_of(batch := train_streams(config)[0].batch(0))
    assert known == set(tokenizer.decode(batch.concept_tokens)) - {"dog"}
    assert len(known) == 7


def test_images_of_other_sources_stay_as_they_are_beside_federated_ones(config, world):
    content = detection_json()
    content["images"][4]["neg_category_ids"] = [1]
    for annotation in content["annotations"]:
        annotation["category_id"] = 6  # a cup; all others are known from the built folder alone
    (world / "lvis.json").write_text(json.dumps(content))
    folder = str(world / "built")
    building.build("coco_json", input=str(world / "lvis.json"), images=str(world / "images"), output=folder)
    config.detection.data = (folder,)
    config.detection.canvases, config.detection.batch_size = ((96, 96),), 14
    stream = train_streams(config)[0]
    batch = stream.batch(0)
    found = federated_of(batch)
    assert sum(known is None for known in found) == 7
    sizes = {"table_rows": stream.capacities["table"], "num_verified": stream.num_verified}
    shapes = sharding.batch_shapes(config, Kind.DETECTION, (96, 96), **sizes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    assert sorted(map(sorted, (known for known in found if known is not None))) == [["cat", "cup"], *[["cup"]] * 6]
    assert len(names_of_table(batch)) == 6
    for example, (source, index) in enumerate(stream.examples):
        assert (found[example] is not None) == (source == 1), index
    parts = [train_streams(config, process_index=i, process_count=2)[0] for i in range(2)]
    assert [known for part in parts for known in federated_of(part.batch(0))] == found
    assert stream.capacities["table"] == 8  # six names, whichever of the sources has them
    config.detection.num_concepts = 1
    assert train_streams(config)[0].num_verified == 2  # what the image with most concepts has


def test_grounding_negatives_are_no_concept_of_the_caption_and_no_synonym_of_a_positive(config, tmp_path):
    lines = [
        "cat\ta feline",
        "kitty\ta feline",
        "dog\ta canine",
        "puppies\ta canine",
        "grass\ta plant",
        "Boats\ta vessel",
    ]
    lines += [f"thing {i} x\tdefinition {i}" for i in range(60)]
    (tmp_path / "words.tsv").write_text("\n".join(lines))
    config.grounding.dictionary, config.grounding.batch_size = str(tmp_path / "words.tsv"), 1
    config.grounding.num_concepts, config.grounding.canvases = 70, ((64, 96),)
    names = [line.split("\t")[0] for line in lines]
    known = dict(zip(text_ids([*names, *(p for of_image in PHRASES for p in of_image)]), names, strict=False))
    (stream,) = (stream for stream in train_streams(config) if stream.kind is Kind.GROUNDING)
    absent = {0: {"cat", "kitty", "dog", "puppies", "grass"}, 3: {"cat", "kitty", "dog", "puppies"}, 4: {"Boats"}}
    for n in range(7):
        batch = stream.batch(n)
        negatives = {known.get(tuple(row)) for row in batch.concept_tokens[batch.concept_mask].tolist()} - {None}
        example = int(batch.example_id[0])
        assert not negatives & absent.get(example, set())
        if example == 5:  # a man riding a horse
            assert set(names[:6]) <= negatives
        assert len(negatives) > 58


@pytest.mark.parametrize("kind", ["detection", "grounding"])
def test_negatives_are_seeded_by_example_and_epoch(config, tmp_path, kind):
    names = [f"thing {i} x" for i in range(80)]
    content = detection_json()
    content["categories"] += [{"id": 100 + i, "name": name} for i, name in enumerate(names)]
    pathlib.Path(config.detection.annotations).write_text(json.dumps(content))
    (tmp_path / "words.tsv").write_text("\n".join(names))
    config.grounding.dictionary = str(tmp_path / "words.tsv")
    config[kind].batch_size, config[kind].num_concepts, config[kind].canvases = 1, 12, ((64, 96),)

    def table(n):
        (stream,) = (stream for stream in train_streams(config) if stream.kind.value == kind)
        batch = stream.batch(n)
        return int(batch.example_id[0]), frozenset(map(tuple, batch.concept_tokens[batch.concept_mask].tolist()))

    drawn = [table(n) for n in range(14)]  # two epochs
    assert drawn == [table(n) for n in range(14)]
    assert sorted(example for example, _ in drawn[:7]) == sorted(example for example, _ in drawn[7:]) == list(range(7))
    assert len({concepts for _, concepts in drawn}) == 14  # another example, another epoch: other negatives
    config.seed = 1
    assert not {concepts for _, concepts in drawn} & {table(n)[1] for n in range(7)}


def test_captions_lead_their_phrases(config):
    stream = train_streams(config)[-1]
    for n in range(2):
        batch = stream.batch(n)
        table = names_of_table(batch)
        for row, mask, example in zip(batch.caption_concepts, batch.caption_mask, batch.example_id, strict=True):
            assert [table[i] for i in row[mask]] == list(dict.fromkeys([CAPTIONS[example], *PHRASES[example]]))


def test_phrases_are_unique_and_capped(config, world):
    phrases = ["A cat", "a  cat", CAPTIONS[0], *PHRASES[0], *(f"thing {i}" for i in range(10))]
    (world / "pairs.tsv").write_text(f"0.jpg\t{CAPTIONS[0]}\t{json.dumps(phrases)}\n")
    config.image_text.batch_size, config.image_text.max_phrases = 1, 3
    stream = train_streams(config)[-1]
    batch = stream.batch(0)
    expected = text_ids([CAPTIONS[0], "a cat", "a dog", "thing 0"])
    assert [tuple(row) for row in batch.concept_tokens[batch.caption_concepts[0]].tolist()] == expected
    assert stream.counters["phrases cut: more than max_phrases"] == stream.overflow["num_phrases_cut"] == 9
    config.image_text.max_phrases = 12  # just enough
    stream = train_streams(config)[-1]
    assert stream.batch(0).caption_mask.sum() == 13
    assert "phrases cut: more than max_phrases" not in stream.counters


def test_unusable_images_give_way_to_the_next_and_are_counted_once(config, world):
    for i in range(20):
        write_image(world / "images" / f"extra{i}.jpg", (64, 64), 100 + i)
    lines = "".join(f"extra{i}.jpg\tcaption {i}\t[]\n" for i in range(20))
    (world / "pairs.tsv").write_text(lines)
    config.image_text.batch_size, config.image_text.max_bad_share = 20, 0.1
    intact = train_streams(config)[-1].batch(0)
    data = (world / "images" / "extra7.jpg").read_bytes()
    (world / "images" / "extra7.jpg").write_bytes(data[: len(data) // 2])
    (world / "images" / "extra12.jpg").unlink()
    stream = train_streams(config)[-1]
    batch = stream.batch(0)
    assert stream.overflow["num_images_skipped"] == 2
    assert_equal(batch, train_streams(config)[-1].batch(0))
    stream.batch(1)
    assert stream.overflow["num_images_skipped"] == 0  # none that was not known
    stream.batch(2)
    assert stream.counters["image of pairs skipped: truncated image"] == 1
    assert stream.counters["image of pairs skipped: missing file"] == 1
    changed = intact.example_id != batch.example_id
    assert sorted(intact.example_id[changed].tolist()) == [7, 12]
    assert sorted(batch.example_id[changed].tolist()) == [8, 13]
    np.testing.assert_array_equal(intact.image[~changed], batch.image[~changed])
    (world / "images" / "extra3.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^image_text/64x64: 3 of 20 images cannot be used"):
        next(train_streams(config)[-1].iterate(0))


def test_a_stream_without_one_usable_image_ends_in_an_error(config, world):
    for i in range(len(SIZES)):
        (world / "images" / f"{i}.jpg").write_bytes(b"not an image at all")
    with pytest.raises(ValueError, match=r"cannot be used \(not an image\) and no other image"):
        train_streams(config)[-1].batch(0)


def test_all_missing_files_are_listed_at_once(config):
    config.detection.annotations = "/nowhere/a.json"
    config.detection.images = "/nowhere/images"
    config.grounding.annotations = config.eval.annotations  # a detection json
    config.image_text.pairs = ""
    config.image_text.dictionary = "/nowhere/dictionary.tsv"
    with pytest.raises(ValueError, match="nowhere") as caught:
        train_streams(config)
    message = str(caught.value)
    for part in (
        "config.detection.annotations: the file /nowhere/a.json does not exist",
        "config.detection.images: the folder /nowhere/images does not exist",
        "config.grounding: ",
        "has no tokens_positive",
        "config.image_text.pairs is empty; it must name a file",
        "config.image_text.dictionary: the file /nowhere/dictionary.tsv does not exist",
    ):
        assert part in message
    for kind in ("detection", "grounding", "image_text"):
        config[kind].images = config[kind].annotations = "" if kind != "image_text" else config[kind].images
    config.image_text.images = ""
    with pytest.raises(ValueError, match=r"no training data: set config\.detection\.annotations"):
        train_streams(config)


def test_batch_size_must_divide_over_hosts(config):
    with pytest.raises(ValueError, match=r"config.detection.batch_size 4 is not divisible by the number of hosts 3"):
        train_streams(config, process_count=3)
    with pytest.raises(ValueError, match=r"config.eval.batch_size 4 is not divisible by the number of hosts 3"):
        eval_streams(config.eval, input_config=config.input, process_count=3)
    with pytest.raises(ValueError, match=r"^config.forgetting.batch_size 4 is not"):
        eval_streams(config.eval, input_config=config.input, prefix="config.forgetting", process_count=3)


def test_kinds_without_files_and_empty_canvases_are_left_out(config):
    config.grounding.annotations = config.grounding.images = ""
    config.image_text.pairs = config.image_text.images = ""
    config.detection.max_examples = 1
    assert [stream.name for stream in train_streams(config)] == ["detection/64x96"]


def test_a_photo_of_another_size_than_its_annotation_is_skipped(config):
    content = detection_json()
    content["images"][0] |= {"height": 41, "width": 120}
    pathlib.Path(config.detection.annotations).write_text(json.dumps(content))
    config.detection.max_bad_share = 0.5
    stream = train_streams(config)[0]
    stream.batch(0)
    assert dict(stream.counters) == {"image of detection skipped: size differs from the annotation's": 1}


def test_streams_have_the_weight_of_their_kind_and_the_first_what_was_repaired(config):
    content = detection_json()
    content["annotations"][0]["iscrowd"] = 1
    pathlib.Path(config.detection.annotations).write_text(json.dumps(content))
    config.detection.weight, config.image_text.weight = 2.5, 0.5
    streams = train_streams(config)
    assert [stream.weight for stream in streams] == [2.5, 2.5, 1.0, 1.0, 0.5]
    assert [dict(stream.counters) for stream in streams] == [{"crowd box left out": 1}, {}, {}, {}, {}]


def test_evaluation_reads_everything_in_order(config):
    streams = eval_streams(config.eval, input_config=config.input)
    assert [(s.name, s.num_examples, s.num_batches) for s in streams] == [("eval/64x96", 4, 1), ("eval/96x64", 3, 1)]
    config.eval.batch_size = 2
    seen = []
    for stream in eval_streams(config.eval, input_config=config.input):
        batches = list(stream.iterate())
        assert len(batches) == stream.num_batches == 2
        for n, batch in enumerate(batches):
            assert_equal(batch, stream.batch(n))
            assert batch.boxes.shape == (2, 0, 4)
            assert batch.concept_tokens.shape == (0, 16)
            seen += batch.example_id[batch.image_mask].tolist()
        assert (batches[-1].image_mask == [True, stream.num_examples == 4]).all()
        assert not batches[-1].image[~batches[-1].image_mask].any()
        (rest,) = stream.iterate(1)  # a continued evaluation
        assert_equal(rest, batches[1])
        for n in (-1, 2):
            with pytest.raises(ValueError, match=f"there is no batch {n}"):
                stream.batch(n)
    assert seen == [0, 2, 3, 5, 1, 4, 6]
    truth = stream.ground_truth
    assert [truth.truth.image_ids.ids[i] for i in truth.images] == [10 + i for i in range(7)]
    assert truth.texts[:3] == ["cat", "dog", "red car"]
    assert str(truth.annotations) == config.eval.annotations


def test_evaluation_over_hosts(config):
    config.eval.batch_size, config.eval.canvases = 4, ((96, 96),)
    (whole,) = eval_streams(config.eval, input_config=config.input)
    hosts = [
        eval_streams(config.eval, input_config=config.input, process_index=i, process_count=4)[0] for i in range(4)
    ]
    for n in range(2):
        parts = [host.batch(n) for host in hosts]
        together = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        assert_equal(together, whole.batch(n))


def test_evaluation_refuses_what_it_cannot_read(config, world):
    (stream, _) = eval_streams(config.eval, input_config=config.input)
    (world / "images" / "2.jpg").unlink()
    with pytest.raises(ValueError, match=r"2\.jpg of .*detection\.json cannot be used \(missing file\)"):
        list(stream.iterate())
    (world / "images" / "5.jpg").unlink()  # all that are missing are named before anything is read
    with pytest.raises(ValueError, match=r"2 of 7 photos do not exist:\n.*/2\.jpg\n.*/5\.jpg$"):
        eval_streams(config.eval, input_config=config.input)
    config.eval.max_examples = 2
    assert [s.num_examples for s in eval_streams(config.eval, input_config=config.input)] == [1, 1]
    config.eval.annotations = ""
    config.eval.images = ""
    assert eval_streams(config.eval, input_config=config.input) == []


def test_a_reader_that_hangs_is_named_when_its_time_is_over(config):
    stream, answers = train_streams(config)[-1], threading.Event()
    hanging = int(stream.batch(0).example_id[2])

    class Hanging:
        """A source with one file that does not answer."""

        name = "pairs"
        file, describe = stream.sources[0].file, stream.sources[0].describe

        def __len__(self):
            return 7

        def __getitem__(self, index):
            if index == hanging:
                answers.wait(60)
            return source[index]

    (source,) = stream.sources
    stream.sources = (Hanging(),)
    stream._maker = dataclasses.replace(stream._maker, sources=stream.sources)
    stream._input = types.SimpleNamespace(num_workers=0, num_threads=1, prefetch_batches=1, timeout_s=0.2)
    said = rf"^image_text/64x64: no batch 0 within 0\.2 s .*; {source.file(hanging)} does not answer"
    with pytest.raises(StalledError, match=said):
        next(stream.iterate())
    before = set(threading.enumerate())
    with pytest.raises(StalledError, match=said):  # of a reader of its own
        stream._next((stream.sources[0][i] for i in [hanging]), 0)
    hang = set(threading.enumerate()) - before
    assert len(hang) == 2  # that one, and the one that found out what hangs
    assert all(thread.daemon for thread in hang)  # they keep no process from ending
    answers.set()
    assert stream._waited_for(0) == "everything can be read now"


def test_errors_of_reading_say_what_they_are(config):
    stream = train_streams(config)[-1]

    def failing(error):
        raise error
        yield

    with pytest.raises(DataError, match=r"image_text/64x64: exit code -9 Out of memory\?") as caught:
        stream._next(failing(RuntimeError("exit code -9")), 0)
    assert not isinstance(caught.value, StalledError)  # nothing is waited for
    for error in (ValueError("as it is"), RuntimeError("BucketError: full")):
        with pytest.raises(type(error), match=str(error)) as caught:
            stream._next(failing(error), 0)
        assert caught.value is error
    assert stream._next(iter(()), 0) is None


def test_examples_are_named_by_their_sources(config):
    stream = train_streams(config)[0]
    stream.sources = tuple(types.SimpleNamespace(name=name) for name in ("one", "other"))
    assert stream.named([(1, 4), (0, 2), (1, 3)]) == "other: 4, 3; one: 2"


def test_sources_share_a_weight_or_have_their_own():
    sources = [types.SimpleNamespace(name=name, class_names=name == "in1k") for name in ("a", "in1k", "b")]
    section = types.SimpleNamespace(source_weights=(), weight=2.0, class_weight=3.0)

    def grouped(sources):
        groups = streams._grouped(sources, section, "config.image_text")
        return [("".join(source.name for source in g["sources"]), g["suffix"], g["weight"]) for g in groups]

    assert grouped(sources) == [("ab", "", 2.0), ("in1k", "/classes", 6.0)]
    assert grouped(sources[:1]) == [("a", "", 2.0)]
    assert grouped([]) == []
    section.source_weights = (0.0, 1.0, 0.5)
    assert grouped(sources) == [("a", "/0_a", 0.0), ("in1k", "/1_in1k", 2.0), ("b", "/2_b", 1.0)]
    for section.source_weights in ((1.0, 1.0), (1.0, -0.1, 1.0)):
        with pytest.raises(ValueError, match=r"config\.image_text\.source_weights is .* 3 sources: a, in1k, b"):
            grouped(sources)


def test_a_closed_vocabulary_has_all_categories_and_no_phrases(config):
    config.model.text.classes = tuple(name.replace("_", " ") for name in NAMES)
    config.detection.definitions = False
    with pytest.raises(ValueError, match="phrases are no classes") as error:
        train_streams(config)
    lines = str(error.value).splitlines()
    assert [line.split(" has data")[0] for line in lines] == ["config.grounding", "config.image_text"]
    for section in (config.grounding, config.image_text):
        section["pairs" if section is config.image_text else "annotations"] = section.images = ""
    assert len(train_streams(config)) == 2
    config.model.text.classes = config.model.text.classes[1:]
    with pytest.raises(ValueError, match=r"^config\.detection, detection: 1 of 6 texts are none of the 5 classes"):
        train_streams(config)


@pytest.mark.slow
def test_reading_needs_no_tensorflow():
    code = "import sys, detclipv2_jax.data.streams, detclipv2_jax.data.scenes; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_photos(config, shared_data):
    config.detection.annotations = str(shared_data / "coco_train/instances.json")
    config.detection.images = str(shared_data / "coco_train/images")
    config.grounding.annotations = str(shared_data / "grounding/coco_train_derived.json")
    config.grounding.images = str(shared_data)
    config.image_text.pairs = str(shared_data / "image_text/pairs.tsv")
    config.image_text.images = str(shared_data / "image_text")
    config.detection.max_boxes = 300
    streams = train_streams(config)
    assert [stream.num_examples for stream in streams] == [86, 22, 28, 5, 120]
    for stream in streams:
        for n in range(3):
            batch = stream.batch(n)
            assert batch.image_mask.all()
            limit = np.concatenate([batch.extent[:, ::-1]] * 2, axis=1)[:, None]
            assert (batch.boxes <= limit + 1e-3).all()
            assert (batch.boxes >= 0).all()
            # photos are not dark: a decoding error would show as black or grey
            assert all(image[:h, :w].std() > 10 for image, (h, w) in zip(batch.image, batch.extent, strict=True))
    assert not any("skipped" in reason for stream in streams for reason in stream.counters)
