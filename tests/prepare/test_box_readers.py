import collections
import json

import building
import numpy as np
import pytest
from raw_files import write_coco

from detclipv2_jax.data.box_json import read_detection
from detclipv2_jax.data.built import read_built
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.prepare import __main__ as prepare
from detclipv2_jax.prepare.box_json import balanced_subset, open_detection
from detclipv2_jax.prepare.record_builder import Tally


def counts(source, indices):
    return collections.Counter(name for i in indices for name in source[int(i)].concepts)


def test_subset_is_balanced_seeded_and_exact(tmp_path):
    labels = [(1,)] * 20 + [(2,)] * 5 + [(1, 3)] * 2 + [(2, 4)]
    path = write_coco(tmp_path / "raw", labels=labels)
    source = read_detection(str(path), str(path.parent / "images"))
    chosen = balanced_subset(source, 10, seed=0)
    assert len(set(chosen.tolist())) == 10
    assert chosen.tolist() == sorted(chosen.tolist())
    kept = counts(source, chosen)
    assert (kept["thing 3"], kept["thing 4"]) == (2, 1)  # rare ones are all kept
    assert abs(kept["thing 1"] - kept["thing 2"]) <= 2  # of 22 and 6 images
    np.testing.assert_array_equal(chosen, balanced_subset(source, 10, seed=0))
    assert any((balanced_subset(source, 10, seed=seed) != chosen).any() for seed in (1, 2, 3))
    np.testing.assert_array_equal(balanced_subset(source, 28, seed=0), np.arange(28))
    with pytest.raises(ValueError, match="has 28 usable images"):
        balanced_subset(source, 29, seed=0)


def test_few_images_show_the_rarest_categories(tmp_path):
    path = write_coco(tmp_path / "raw", labels=[(1,)] * 6 + [(2,)] * 3 + [(3,)])
    source = read_detection(str(path), str(path.parent / "images"))
    for number, names in ((1, {"thing 3"}), (2, {"thing 3", "thing 2"})):
        assert counts(source, balanced_subset(source, number, seed=0)).keys() == names


def test_a_photo_that_is_a_link_out_of_its_folder_is_counted(tmp_path):
    path = write_coco(tmp_path / "raw")
    photo = path.parent / "images" / "000000000003.jpg"
    photo.rename(tmp_path / "elsewhere.jpg")
    photo.symlink_to(tmp_path / "elsewhere.jpg")
    report = building.build("coco_json", input=str(path), output=str(tmp_path / "out"), max_bad_share=0.5)
    assert report["examples"] == 5
    assert list(report["dropped"].values()) == [1]


def test_subset_takes_images_without_boxes_last(tmp_path):
    path = write_coco(tmp_path / "raw", labels=[(), (1,), (), (1,)])
    source = read_detection(str(path), str(path.parent / "images"))
    np.testing.assert_array_equal(balanced_subset(source, 2, seed=3), [1, 3])
    assert len(balanced_subset(source, 3, seed=3)) == 3


def test_a_reader_says_what_it_reads(tmp_path):
    path = write_coco(tmp_path / "raw")
    (path.parent / "sub").mkdir()
    (path.parent / "images" / "000000000003.jpg").rename(path.parent / "sub" / "3.jpg")
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = "sub/3.jpg" if image["id"] == 3 else f"images/{image['file_name']}"
    content["categories"].append({"id": 9, "name": "unused"})
    path.write_text(json.dumps(content))
    reader = open_detection(str(path), str(path.parent), shard_size=4)
    assert (reader.num_items, reader.num_shards) == (6, 2)
    assert open_detection(str(path), str(path.parent), shard_size=3).num_shards == 2
    assert reader.facts == {"federated": False, "categories without a box": ["unused"]}
    tally = Tally()
    assert [name for name, _ in reader.read(0, tally)] == [*(f"images/{i:012d}.jpg" for i in range(3)), "sub/3.jpg"]
    assert [name for name, _ in reader.read(1, tally)] == [f"images/{i:012d}.jpg" for i in (4, 5)]
    assert tally.seen == 6


def test_build_of_a_subset(tmp_path):
    path = write_coco(tmp_path / "raw")
    report = building.build("coco_json", input=str(path), output=str(tmp_path / "out"), num_examples=3, seed=1)
    assert report["examples"] == 3
    assert report["plan"]["seed"] == 1
    built = read_built(str(tmp_path / "out"), Kind.DETECTION)
    assert {name for i in range(3) for name in built[i].concepts} == {"thing 1", "thing 2", "thing 3"}


def test_validation_photos_are_reported_and_left_out_on_demand(tmp_path):
    path = write_coco(tmp_path / "raw")
    held_out = tmp_path / "val.json"
    images = [{"file_name": "COCO_val2014_000000000002.jpg"}, {"coco_url": "http://x/val2017/000000000004.jpg"}]
    held_out.write_text(json.dumps({"images": [*images, {"file_name": "000000000099.jpg"}]}))
    options = {"input": str(path), "validation": (str(held_out),)}
    report = building.build("coco_json", output=str(tmp_path / "all"), **options)
    assert report["validation photos"] == {
        "compared with": 3,
        "found": 2,
        "left out": False,
        "names": ["000000000002", "000000000004"],
    }
    assert report["examples"] == 6
    assert "2 of 3 found, KEPT" in prepare.summary(report, "x")
    report = building.build("coco_json", output=str(tmp_path / "clean"), drop_validation=True, **options)
    assert report["examples"] == 4
    assert report["left out or repaired"] == {"photo of a validation set left out": 2}
    with pytest.raises(ValueError, match="is no COCO-format json"):
        building.build(
            "coco_json", input=str(path), output=str(tmp_path / "x"), validation=(str(tmp_path / "no.json"),)
        )


def test_bad_boxes_and_images_are_counted_and_nothing_else_is_lost(tmp_path):
    path = write_coco(tmp_path / "raw", broken=(2,))
    content = json.loads(path.read_text())
    whole = (path.parent / "images" / "000000000005.jpg").read_bytes()
    (path.parent / "images" / "000000000005.jpg").write_bytes(whole[: len(whole) // 2])
    for box, category in (
        ([5, 5, 0, 4], 1),
        ([9, 9, -3, 4], 1),
        ([float("nan"), 1, 2, 3], 1),
        ([90, 90, 5, 5], 1),
        ([1, 1, 5, 5], 77),
    ):
        content["annotations"].append({"image_id": 0, "category_id": category, "bbox": box})
    content["images"].append(content["images"][1])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"5 of 12 boxes cannot be used \(1 box of an unlisted category"):
        building.build("coco_json", input=str(path), output=str(tmp_path / "out"))
    (path.parent / "images" / "000000000003.jpg").unlink()
    report = building.build("coco_json", input=str(path), output=str(tmp_path / "out"), max_bad_share=0.5)
    assert report["dropped"] == {"not an image": 1, "missing file": 1, "truncated image": 1}
    assert report["left out or repaired"] == {
        "image listed twice": 1,
        "box of an unlisted category": 1,
        "box not finite": 1,
        "box inverted": 1,
        "box without area": 1,
        "box outside the image": 1,
    }
    built = read_built(str(tmp_path / "out"), Kind.DETECTION)
    assert [built.describe(i).split()[0] for i in range(len(built))] == [f"{i:012d}.jpg" for i in (0, 1, 4)]
    assert [len(built[i].boxes) for i in range(3)] == [1, 2, 1]
    assert built.counters["missing file (when built)"] == 1
