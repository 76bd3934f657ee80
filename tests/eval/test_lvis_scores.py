"""LVIS scores: lvis-api's numbers, brute force on small random cases, federated rules, and what wrong files lead to."""

import collections
import json

import numpy as np
import pytest

from detclipv2_jax import commands, files
from detclipv2_jax.eval import coco, detections, lvis

FIXTURES = ("lvis_v05_val_100.json", "lvis_dt_generated.json")
ALL = (*(f"AP{x}" for x in ("", "50", "75", "s", "m", "l", "r", "c", "f")), *(f"AR{x}" for x in ("", "s", "m", "l")))


def test_numbers_of_lvis_api(shared_data, tmp_path, capsys):
    folder = shared_data / "eval_fixtures"
    expected = json.loads((folder / "expected.json").read_text())["lvis_generated"]
    expected.pop("source")
    output = tmp_path / "scores.json"
    arguments = [f"--{key}={folder / name}" for key, name in zip(("annotations", "detections"), FIXTURES, strict=True)]
    assert commands.run(lvis.score, arguments=[*arguments, f"--output={output}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = json.loads(lines[-1])
    assert printed == json.loads(output.read_text())
    assert {name: printed[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert any(line.split() == ["AP", "28.6", "28.6"] for line in lines)  # both protocols side by side
    protocol = printed["protocol"]
    assert (protocol["images_evaluated"], protocol["images_listed"]) == (100, 100)
    assert "10000 a category" in protocol["ap"]
    assert protocol["annotations_sha256"] == files.sha256(folder / FIXTURES[0])
    assert commands.run(lvis.score, arguments=[*arguments, "--fixed_ap"]) == 0
    fixed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert fixed["AP"] == printed["fixed_AP"]
    assert fixed["standard_AR@300"] == printed["AR@300"]


# --- brute force


def _case(seed, *, num_images=7):
    """Returns annotations and detections with ties, full images, ignored boxes, crowds and all federated lists."""
    rng = np.random.default_rng(seed)
    categories = [{"id": 10 * c, "name": str(c), "frequency": "rcf"[c % 3]} for c in range(1, 7)]
    images, annotations, rows = [], [], []
    for image in rng.permutation(num_images) + 1:
        lists = {}
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            lists[key] = [10 * int(c) for c in rng.choice(np.arange(1, 7), 2, replace=False)]
        images.append({"id": int(image), **lists})
        boxes = []
        for _ in range(rng.integers(0, 9)):
            size = rng.choice([20, 40, 110], 2) + rng.integers(0, 3, 2)
            box = [*rng.integers(0, 60, 2).tolist(), *size.tolist()]
            category = 10 * int(rng.integers(1, 6))  # the sixth has no box
            boxes.append((category, box))
            row = {"id": len(annotations) + 1, "image_id": int(image), "category_id": category, "bbox": box}
            row |= {"area": box[2] * box[3] * float(rng.choice([0.5, 1.0])), "ignore": int(rng.random() < 0.15)}
            row["iscrowd"] = int(rng.random() < 0.15)
            annotations.append(row)
        for _ in range(rng.integers(0, 40)):
            category, box = 10 * int(rng.integers(1, 7)), [*rng.integers(0, 60, 2), *rng.choice([20, 40, 110], 2)]
            if boxes and rng.random() < 0.8:
                category, box = boxes[rng.integers(len(boxes))]
                box = np.maximum(np.add(box, rng.integers(-3, 4, 4)), 1)
            box = [float(x) for x in box]
            score = float(rng.integers(1, 6)) / 5
            rows.append({"image_id": int(image), "category_id": category, "bbox": box, "score": score})
    rng.shuffle(rows)
    return {"images": images, "annotations": annotations, "categories": categories}, rows


def _iou(a, b, *, crowd):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / (a[2] * a[3] + (0 if crowd else b[2] * b[3] - common))


def _matches(found, boxes, *, iou, low, high, incomplete):
    """Yields (score, right) of the detections that count on one image for one category, as lvis-api's loops do."""
    ignored = [bool(box["ignore"] or box["iscrowd"] or not low <= box["area"] <= high) for box in boxes]
    free = [True] * len(boxes)
    for row in sorted(found, key=lambda row: -row["score"]):
        best, best_iou = None, iou
        for wanted in (False, True):  # ignored boxes only where there is no other
            for i, box in enumerate(boxes):
                overlap = _iou(row["bbox"], box["bbox"], crowd=box["iscrowd"])
                if free[i] and ignored[i] == wanted and overlap >= best_iou:
                    best, best_iou = i, overlap
            if best is not None:
                break
        if best is not None:
            free[best] = bool(boxes[best]["iscrowd"])
            if not ignored[best]:
                yield row["score"], True
        elif not incomplete and low <= row["bbox"][2] * row["bbox"][3] <= high:
            yield row["score"], False


def _oracle(truth, rows, *, limit, group):
    kept = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: -row["score"]):  # stable: of equal scores the first
        if len(kept[row[group]]) < limit:
            kept[row[group]].append(id(row))
    kept = set().union(*map(set, kept.values()))
    rows = [row for row in rows if id(row) in kept]
    precision, recall, frequency = {}, {}, {}
    for category in (entry["id"] for entry in truth["categories"]):
        frequency[category] = next(c["frequency"] for c in truth["categories"] if c["id"] == category)
        for area, (low, high) in {"": (0, 1e10), "s": (0, 1024), "m": (1024, 9216), "l": (9216, 1e10)}.items():
            for iou in np.linspace(0.5, 0.95, 10):
                total, counted = 0, []
                for image in sorted(truth["images"], key=lambda image: image["id"]):
                    own = [
                        [row for row in all_rows if (row["image_id"], row["category_id"]) == (image["id"], category)]
                        for all_rows in (rows, truth["annotations"])
                    ]
                    if not own[1] and category not in image["neg_category_ids"]:
                        continue
                    counting = (box for box in own[1] if not box["ignore"] and not box["iscrowd"])
                    total += sum(low <= box["area"] <= high for box in counting)
                    incomplete = category in image["not_exhaustive_category_ids"]
                    counted += _matches(*own, iou=iou, low=low, high=high, incomplete=incomplete)
                if not total:
                    continue
                points, hits = [], 0
                for place, (_, right) in enumerate(sorted(counted, key=lambda pair: -pair[0]), start=1):
                    hits += right
                    points.append((hits / total, hits / place))
                values = [max((p for r, p in points if r >= x), default=0.0) for x in np.linspace(0, 1, 101)]
                precision[category, area, round(100 * iou)] = values
                recall[category, area, round(100 * iou)] = hits / total

    def mean(chosen, table):
        values = [table[key] for key in table if chosen(*key)]
        return np.mean(values) if values else -1.0

    scores = {"AP": mean(lambda c, a, i: not a, precision)}
    for percent in (50, 75):
        scores[f"AP{percent}"] = mean(lambda c, a, i, percent=percent: not a and i == percent, precision)
    for name in "rcf":
        scores[f"AP{name}"] = mean(lambda c, a, i, name=name: not a and frequency[c] == name, precision)
    for kind, table in (("AP", precision), ("AR", recall)):
        for name in ("", "s", "m", "l"):
            scores[f"{kind}{name}"] = mean(lambda c, a, i, name=name: a == name, table)
    return scores


@pytest.mark.parametrize("seed", range(4))
def test_both_protocols_equal_brute_force(seed, monkeypatch):
    monkeypatch.setattr(lvis, "MAX_AN_IMAGE", 12)
    monkeypatch.setattr(lvis, "MAX_A_CATEGORY", 9)
    monkeypatch.setattr(lvis, "PAIRS_AT_ONCE", 5)
    truth, rows = _case(seed)
    assert max(collections.Counter(row["category_id"] for row in rows).values()) > 9
    scores = lvis.evaluate(truth, iter([rows[:20], rows[20:]]))  # in parts
    standard = _oracle(truth, rows, limit=12, group="image_id")
    fixed = _oracle(truth, rows, limit=9, group="category_id")
    assert standard != fixed
    for name in ALL:
        assert scores[f"fixed_{name}"] == pytest.approx(fixed[name], abs=1e-12), name
        assert scores[f"{name}@12" if name.startswith("AR") else name] == pytest.approx(standard[name], abs=1e-12), name


@pytest.mark.parametrize("module", [lvis, coco])
def test_shares_of_the_categories_make_the_whole(module):
    truth, rows = _case(0)
    collected = []
    for i in range(8):  # more processes than categories
        module.evaluate(truth, rows, share=coco.Share(i, 8, lambda array: collected.append(array.copy()) or array))
    whole = coco.Share(1, 8, lambda array: np.max([x for x in collected if x.shape == array.shape], axis=0))
    assert module.evaluate(truth, rows, share=whole) == module.evaluate(truth, rows)


# --- federated rules, by hand


def _truth(**lists):
    image = {"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []} | lists
    annotations = [{"id": 0, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50]}]
    categories = [{"id": 1, "name": "cat", "frequency": "f"}, {"id": 2, "name": "dog", "frequency": "r"}]
    return {"images": [image], "annotations": annotations, "categories": categories}


def _row(category, box, score):
    return {"image_id": 1, "category_id": category, "bbox": box, "score": score}


def test_federated_rules():
    false_cat, cat = _row(1, [300, 300, 50, 50], 0.9), _row(1, [0, 0, 50, 50], 0.5)
    rows = [false_cat, cat, _row(2, [0, 0, 50, 50], 1.0)]  # nobody looked for dogs
    assert lvis.evaluate(_truth(), rows)["AP"] == pytest.approx(0.5)
    assert lvis.evaluate(_truth(not_exhaustive_category_ids=[1]), rows)["AP"] == pytest.approx(1.0)
    scores = lvis.evaluate(_truth(neg_category_ids=[2]), rows)
    assert (scores["APr"], scores["APc"], scores["APf"]) == (-1.0, -1.0, pytest.approx(0.5))  # no dog to be found
    assert scores["APs"] == scores["fixed_ARl"] == -1.0
    assert "APr                -         -" in lvis.table(scores)


@pytest.mark.parametrize(("height", "found"), [(25, ("AP50",)), (24, ()), (37.5, ("AP50", "AP75"))])
def test_an_overlap_of_exactly_the_threshold_is_enough(height, found):
    scores = lvis.evaluate(_truth(), [_row(1, [0, 0, 50, height], 0.5)])
    assert {name for name in ("AP50", "AP75") if scores[name] > 0} == set(found)


@pytest.mark.parametrize(("side", "sizes"), [(32, "sm"), (96, "ml"), (31, "s"), (33, "m"), (97, "l")])
def test_both_ends_of_a_size_belong_to_it(side, sizes):
    truth = _truth()
    truth["annotations"][0]["bbox"] = [0, 0, side, side]
    rows = [_row(1, [0, 0, side, side], 0.5), _row(1, [300, 300, side, side], 0.9)]  # the second is wrong
    scores = lvis.evaluate(truth, rows)
    expected = [0.5 if size in sizes else -1.0 for size in "sml"]
    assert [scores[f"AP{size}"] for size in "sml"] == pytest.approx(expected)
    assert [scores[f"AR{size}@300"] for size in "sml"] == [1.0 if size in sizes else -1.0 for size in "sml"]


def test_of_boxes_that_overlap_as_much_the_last_is_taken():
    truth = _truth()
    truth["annotations"] = [truth["annotations"][0] | {"id": i + 1, "bbox": box} for i, box in enumerate(
        ([0, 0, 50, 30], [0, 20, 50, 30])
    )]  # fmt: skip
    # the better one overlaps both by 0.6, the other one only the first
    scores = lvis.evaluate(truth, [_row(1, [0, 0, 50, 50], 0.9), _row(1, [0, 0, 50, 28], 0.8)])
    assert scores["AP50"] == pytest.approx(1.0)


def test_the_best_detections_of_an_image_and_of_a_category_count(monkeypatch):
    monkeypatch.setattr(lvis, "MAX_AN_IMAGE", 2)
    monkeypatch.setattr(lvis, "MAX_A_CATEGORY", 3)
    cat, wrong = _row(1, [0, 0, 50, 50], 0.5), _row(1, [300, 300, 50, 50], 0.9)
    for others, standard, fixed in ((1, 1.0, 1.0), (2, 0.0, 1.0), (3, 0.0, 0.0)):
        scores = lvis.evaluate(_truth(), [cat, *[wrong] * others])
        assert (scores["AR@2"], scores["fixed_AR"]) == (standard, fixed)


def test_no_detections_and_part_of_the_images():
    truth = _truth()
    scores = lvis.evaluate(truth, [])
    assert scores["AP"] == scores["fixed_AR"] == 0.0
    assert "AP               0.0       0.0" in lvis.table(scores)
    truth["images"].append(truth["images"][0] | {"id": 2})
    truth["annotations"].append(truth["annotations"][0] | {"id": 1, "image_id": 2})
    rows = [_row(1, [0, 0, 50, 50], 0.5)]
    assert lvis.evaluate(truth, rows)["AR@300"] == 0.5
    assert lvis.evaluate(truth, rows, image_ids=[1])["AR@300"] == 1.0
    with pytest.raises(ValueError, match="1 of 1 images of the detections are unknown: 1"):
        lvis.evaluate(truth, rows, image_ids=[2])


@pytest.mark.parametrize("indent", [None, 1])
def test_files_are_read_in_parts(indent, tmp_path, monkeypatch):
    truth, rows = _case(0)
    for row in rows[::3]:  # what is no place to cut
        row["segmentation"] = {"size": [{"a": 1}, {"b": 2}], "text": "}, {"}
    path = tmp_path / "found.json"
    path.write_text(json.dumps(rows, indent=indent))
    expected = lvis.evaluate(truth, rows)
    for size in (64, 100, 1000):
        monkeypatch.setattr(detections, "PART_CHARS", size)
        assert lvis.evaluate(truth, path) == expected
        parts = list(detections.read(path))
        assert len(parts) > 1
        assert sum(len(part.scores) for part in parts) == len(rows)
    rows[-1]["score"] = "high"
    path.write_text(json.dumps(rows, indent=indent))
    with pytest.raises(ValueError, match=rf"found\.json: row {len(rows) - 1} is .*'high'"):
        lvis.evaluate(truth, path)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match=r"found\.json is not JSON"):
        lvis.evaluate(truth, path)


def test_command_carries_the_protocol_that_lies_beside(tmp_path, capsys):
    (tmp_path / "truth.json").write_text(json.dumps(_truth()))
    (tmp_path / "step_3_detections.json").write_text(json.dumps([_row(1, [0, 0, 50, 50], 0.5)]))
    (tmp_path / "step_3_scores.json").write_text(json.dumps({"AP": 1, "protocol": {"checkpoint_step": 3}}))
    arguments = [f"--annotations={tmp_path}/truth.json", f"--detections={tmp_path}/step_3_detections.json"]
    assert commands.run(lvis.score, arguments=arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["protocol"]["made_under"] == {"checkpoint_step": 3}
    more = ["--fixed_ap", f"--output={tmp_path}/scores.json", "--max_bad_share=0.5"]
    truth = _truth()
    truth["annotations"].append({"id": 9})
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    assert commands.run(lvis.score, arguments=[*arguments, *more]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    printed, scores = json.loads(line), lvis.evaluate(_truth(), tmp_path / "step_3_detections.json")
    assert printed == json.loads((tmp_path / "scores.json").read_text())
    assert printed["protocol"]["ap"].endswith("names without prefix: fixed")
    assert {name: printed[name] for name in ALL} == {name: scores[f"fixed_{name}"] for name in ALL}
    assert {name for name in printed if name.startswith("standard_")} == {
        f"standard_{name}" for name in scores if not name.startswith("fixed_")
    }
    (tmp_path / "truth.json").write_text(json.dumps(_truth()))
    assert commands.run(lvis.score, arguments=arguments) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["protocol"]["ap"].endswith("names without prefix: standard")
    assert {name: value for name, value in printed.items() if name != "protocol"} == scores
    (tmp_path / "found.json").write_text((tmp_path / "step_3_detections.json").read_text())
    assert commands.run(lvis.score, arguments=[arguments[0], f"--detections={tmp_path}/found.json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["protocol"]["made_under"] is None
    assert commands.run(lvis.score, arguments=[arguments[0], "--detections=absent.json"]) == 1
    assert "error: cannot read absent.json" in capsys.readouterr().err
