"""What an evaluation writes and continues from."""

import json
import os
import time

import numpy as np

from detclipv2_jax.data import truth
from detclipv2_jax.eval import result
from detclipv2_jax.eval.result import Parts, Rows, write_detections, write_scores


def _rows(*image_ids):
    n = len(image_ids)
    boxes = np.arange(4 * n, dtype=np.float32).reshape(n, 4) / 3
    boxes[:, 2:] += boxes[:, :2]
    return Rows(np.array(image_ids), np.arange(n) + 5, boxes, np.linspace(0.9, 0.1, n).astype(np.float32))


def test_rows_become_coco_results():
    (first, second) = Rows.concatenate([_rows(9), _rows(4)]).to_coco()
    assert first["image_id"] == 4  # by image, whatever the batches were
    assert second == {"image_id": 9, "category_id": 5, "bbox": [0.0, 0.333, 0.667, 1.0], "score": 0.9}
    assert np.float32(first["score"]) == np.float32(0.9)  # float32 survives its shortest form
    assert Rows.concatenate([]).to_coco() == []
    many = Rows.concatenate([_rows(*(i % 3 for i in range(100)))])  # best first within an image
    assert many.category_ids.tolist() == [5 + i for image in range(3) for i in range(image, 100, 3)]
    content = {
        "images": [{"id": "b"}, {"id": 4}],
        "categories": [{"id": 10 * i} for i in range(9)],
        "annotations": [{"image_id": 4, "category_id": 10, "bbox": [0, 0, 2, 2]}],
    }
    ours = _rows(1, 0).to_coco(truth.from_content("set.json", content))  # positions in the order of ids
    assert [(row["image_id"], row["category_id"]) for row in ours] == [("b", 50), (4, 60)]


def test_parts_continue_where_they_were(tmp_path):
    parts = Parts(tmp_path, fingerprint={"step": 1})
    assert parts.done == 0
    parts.add(_rows(1, 1))
    parts.add(_rows(2))
    parts.write()
    parts.add(_rows(3))  # killed before it was written
    again = Parts(tmp_path, fingerprint={"step": 1})
    assert again.done == 2
    again.add(_rows(3))
    assert again.all_rows().image_ids.tolist() == [1, 1, 2, 3]
    again.write()
    num_files = len(list(tmp_path.rglob("*.rows")))
    again.write()  # nothing new
    assert len(list(tmp_path.rglob("*.rows"))) == num_files == 2
    assert Parts(tmp_path, fingerprint={"step": 1}).done == 3
    assert Parts(tmp_path, fingerprint={"step": 2}).done == 0  # another evaluation
    again.remove()
    assert not list(tmp_path.iterdir())
    again.remove()  # what is gone is gone, also where somebody else removed it


def test_a_missing_part_ends_the_known_batches(tmp_path):
    parts = Parts(tmp_path, fingerprint={})
    for image in range(3):
        parts.add(_rows(image))
        parts.write()
    first, second, _ = sorted(tmp_path.rglob("*.rows"))
    second.unlink()
    assert Parts(tmp_path, fingerprint={}).done == 1
    first.rename(second)  # rows of other batches
    assert Parts(tmp_path, fingerprint={}).done == 0
    second.rename(first)
    longer = first.rename(first.with_name("000000-000002.rows"))  # of more batches than it holds
    assert Parts(tmp_path, fingerprint={}).done == 0
    longer.rename(first)
    first.write_bytes(b"broken")
    assert Parts(tmp_path, fingerprint={}).done == 0


def test_rows_are_put_on_disk_once_a_minute_and_what_is_a_week_old_goes(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(result.time, "monotonic", lambda: now)
    parts = Parts(tmp_path, fingerprint={"a": 1, "b": 2})
    for now, num_files in ((1060.0, 0), (1061.0, 1), (1121.0, 1), (1122.0, 2)):  # noqa: B007 -- read above
        parts.add(_rows(1))
        assert len(list(tmp_path.rglob("*.rows"))) == num_files
    assert Parts(tmp_path, fingerprint={"b": 2, "a": 1}).done == 4
    assert parts.all_rows().image_ids.tolist() == [1] * 4  # each once
    for name, days in (("old", 8), ("young", 6)):
        (tmp_path / f".partial_{name}").mkdir()
        os.utime(tmp_path / f".partial_{name}", 2 * (time.time() - days * 24 * 3600,))
    parts.remove()
    assert [path.name for path in tmp_path.iterdir()] == [".partial_young"]


def test_any_change_of_a_part_is_noticed(tmp_path):
    parts = Parts(tmp_path, fingerprint={})
    parts.add(_rows(1, 2))
    parts.write()
    (path,) = tmp_path.rglob("*.rows")
    whole = path.read_bytes()
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert Parts(tmp_path, fingerprint={}).done == 0
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        assert Parts(tmp_path, fingerprint={}).done == 0
    path.write_bytes(whole)
    assert Parts(tmp_path, fingerprint={}).all_rows().image_ids.tolist() == [1, 2]


def test_scores_stand_beside_their_protocol(tmp_path, monkeypatch):
    monkeypatch.setattr(result, "PART_ROWS", 2)
    detections = _rows(1, 2, 3)
    paths = [
        write_detections(tmp_path / "eval", name="step_3", detections=detections),
        write_scores(tmp_path / "eval", name="step_3", scores={"AP": 0.5}, protocol={"ap": "COCO"}),
    ]
    assert [path.name for path in paths] == ["step_3_detections.json", "step_3_scores.json"]
    assert json.loads(paths[0].read_text()) == detections.to_coco()
    assert json.loads(paths[1].read_text()) == {
        "AP": 0.5,
        "protocol": {"ap": "COCO", "detections": "step_3_detections.json"},
    }
    assert len(list((tmp_path / "eval").iterdir())) == 2
    empty = write_detections(tmp_path, name="none", detections=_rows())
    assert json.loads(empty.read_text()) == []


def test_boxes_are_written_in_thousandths_of_a_pixel():
    row = Rows(np.array([1]), np.array([1]), np.array([[0.0004, 1, 3.0016, 5]], np.float32), np.ones(1, np.float32))
    assert row.xywh().tolist() == [[0.0, 1.0, 3.001, 4.0]]
    assert row.xywh().dtype == np.float64
